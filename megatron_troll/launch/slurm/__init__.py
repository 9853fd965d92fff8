"""Jobs on a Slurm cluster: the job script, and the program that each of its tasks runs."""
