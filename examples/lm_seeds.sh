#!/usr/bin/env bash
# make lm with its controls, for each seed given: RL (TROLL), RL with shuffled rewards, and more warm start instead
# of RL, each of as many optimizer steps and sequences. What is finished in runs/lm-seeds is not run again; the
# last lines are held-out success, sampled, of 1,024 questions.
#   examples/lm_seeds.sh 0 1 2
set -euo pipefail
mtroll=${MTROLL:-.venv/bin/mtroll}
python=${PYTHON:-.venv/bin/python}
configs=examples/configs
$python tools/smollm2.py runs/lm/base
for seed in "$@"; do
  at=runs/lm-seeds/$seed
  common=("runs=$at" "seed=$seed")
  run=("${common[@]}" "data.sources.names.gym.seed=$((2 * seed))" evaluation.every=0 evaluation.prompts=1024)
  warm=models.policy.path=$at/warm/hf
  demonstrations=$at/demonstrations.jsonl
  test -f "$at/answers/eval.json" ||
    $mtroll eval $configs/lm_answers.yaml "${common[@]}" name=answers eval.names.gym.seed=$((2 * seed + 1))
  test -f "$demonstrations" || $python tools/lm_demonstrations.py "$at/answers" "$demonstrations"
  supervised() { # NAME SETTINGS...
    test -f "$at/$1/summary.json" && return
    rm -rf "${at:?}/$1"
    $mtroll sft $configs/lm_warm_start.yaml "${run[@]}" sft.files="[$demonstrations]" name="$1" "${@:2}"
  }
  supervised warm
  $mtroll train $configs/lm_troll.yaml "${run[@]}" "$warm" name=troll resume=true
  $mtroll train $configs/lm_troll.yaml "${run[@]}" "$warm" name=shuffled-rewards train.shuffle_rewards=true resume=true
  supervised more-warm-start "$warm" sft.steps=80
done
for seed in "$@"; do
  for name in warm more-warm-start troll shuffled-rewards; do
    grep -h held_out_success_after "runs/lm-seeds/$seed/$name/summary.json" | sed "s|^|seed $seed $name|"
  done
done
