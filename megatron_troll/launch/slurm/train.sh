
set -euo pipefail
refuse() {
  echo "$*"
  exit 1
}

# sbatch may have been asked for something else than the script was written for.
all=$((first + nodes))
if ((SLURM_JOB_NUM_NODES != all || ${SLURM_GPUS_ON_NODE:-0} < gpus)); then
  refuse "the job has $SLURM_JOB_NUM_NODES nodes of ${SLURM_GPUS_ON_NODE:-0} GPUs, and its script is for" \
    "$all of $gpus: write another one with mtroll launch"
fi
if ((${#container[@]})) && [[ $(srun --help) != *--container-image* ]]; then
  refuse "--container: srun knows no --container-image: the cluster has no pyxis"
fi
if [[ $image && ! -e $image ]]; then refuse "--container: $image is not there"; fi

# Every attempt has a folder of its own; logs/latest is the last one.
mkdir -p "$run/logs"
[[ -w $run/logs ]] || refuse "cannot write to $run/logs"
attempt=0
until mkdir "$run/logs/attempt_$attempt" 2>/dev/null; do attempt=$((attempt + 1)); done
logs=$run/logs/attempt_$attempt
ln -sfn "attempt_$attempt" "$run/logs/latest"
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, attempt $attempt: every rank writes to $logs"
echo "$SLURM_JOB_ID" >"$logs/job"

# USR1 comes before the time limit, TERM with a preemption: the ranks finish their step and save.
asked=
# shellcheck disable=SC2329 # the trap calls it
ask() {
  if [[ $asked ]]; then return; fi
  asked=yes
  echo "asking the ranks to save and stop"
  signal USR1 ranks
}
trap ask USR1 TERM

# Sends a signal to the step of that name, if it is there. Of a step on some of the nodes Slurm 22.05 says that it
# does not exist, and delivers the signal.
signal() {
  local id name
  squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j' | while read -r id name; do
    if [[ $name == "$2" ]]; then scancel --quiet --signal="$1" "$id" 2>/dev/null || true; fi
  done
}

# Runs a step to its end, through signals, and leaves in `code` the exit code of the task that failed first, which
# wrote it into the folder $1. srun's own code may be that of a task that Slurm ended because of it (143).
step() {
  local first_code=$1/exit_code
  shift
  srun --kill-on-bad-exit=1 "${container[@]}" "$@" &
  local step=$!
  code=0
  while kill -0 "$step" 2>/dev/null; do
    if wait "$step"; then code=0; else code=$?; fi
  done
  if ((code)) && [[ -s $first_code ]]; then code=$(<"$first_code"); fi
}
task=("$python" -P -m megatron_troll.launch.slurm.task "${network[@]}")

# The nodes first, a task each.
step "$logs/preflight" --nodes="$all" --ntasks="$all" --ntasks-per-node=1 "${task[@]}" "$logs/preflight" \
  preflight --serve-nodes "$first" "${command[@]:1}"
if [[ $asked ]]; then code=1; fi

# Then the job's own servers, if it has any, until one is up.
servers=
if ((code == 0 && ${#serving[@]})); then
  srun --job-name=servers --kill-on-bad-exit=0 "${serving[@]}" "${container[@]}" "$python" \
    -P -m megatron_troll.launch.slurm.server "${network[@]}" "${command[@]:1}" &
  servers=$!
  until [[ $asked || -n $(find "$run/servers" -name '*.json' -newer "$logs/job" 2>/dev/null) ]]; do
    kill -0 "$servers" 2>/dev/null || refuse "no server started: see above, and $run/logs"
    sleep 1
  done
  if [[ $asked ]]; then code=1; fi
fi

# Then the ranks. Servers end with them.
if ((code == 0)); then
  step "$logs" --job-name=ranks --relative="$first" --nodes="$nodes" --ntasks="$ranks" "${task[@]}" "$logs" "${command[@]}"
fi
trap '' USR1 TERM
if [[ $servers ]]; then
  signal INT servers
  wait "$servers" || true
fi

# A run that was stopped goes on in the queue, unless the job was cancelled.
state=$(scontrol show job -o "$SLURM_JOB_ID" | grep -o ' JobState=[A-Z]*' || true)
if [[ $run/stopped -nt $logs/job || ($asked && $code != 0) ]] && [[ $state == *=RUNNING ]]; then
  restart=${SLURM_RESTART_COUNT:-0}
  if ((restart < restarts)); then
    echo "back into the queue: the next attempt goes on from the newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 600
  fi
  refuse "restarted $restart times, which is all that was asked for: submit again to go on"
fi

# The first failure has the last word.
for reason in "$logs"/{,preflight/}failed/*; do
  if [[ -e $reason ]]; then
    tail -n 1 "$reason"
    exit "$code"
  fi
done
if ((code)); then echo "no rank said why: see above what srun says, and $logs"; fi
exit "$code"
