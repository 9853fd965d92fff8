"""Jobs on a Slurm cluster: the script, and what each of its tasks does."""
