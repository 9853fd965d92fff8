#!/usr/bin/env bash
# The demo with its controls, for each seed given: RL (TROLL and PPO-clip), more warm start instead of RL,
# and RL with shuffled rewards. Everything lies in runs/seeds; the last lines are held-out success.
#   examples/demo_seeds.sh 0 1 2
set -euo pipefail
mtroll=${MTROLL:-.venv/bin/mtroll}
for seed in "$@"; do
  at=runs/seeds/$seed
  data="data.files=[$at/demo/data/train.jsonl] data.held_out=[$at/demo/data/held_out.jsonl] runs=$at seed=$seed"
  policy=models.policy.path=$at/warm/hf
  test -d "$at/demo" || $mtroll demo "$at/demo" --seed "$seed"
  $mtroll sft examples/configs/cpu_warm_start.yaml $data name=warm \
    models.policy.path="$at/demo/base" sft.files="[$at/demo/data/warm.jsonl]"
  $mtroll sft examples/configs/cpu_warm_start.yaml $data name=more-warm-start \
    $policy models.policy.init=pretrained sft.files="[$at/demo/data/warm.jsonl]"
  $mtroll train examples/configs/cpu_troll.yaml $data $policy name=troll
  $mtroll train examples/configs/cpu_clip.yaml $data $policy name=clip
  $mtroll train examples/configs/cpu_troll.yaml $data $policy name=shuffled-rewards train.shuffle_rewards=true
done
for seed in "$@"; do
  for name in warm more-warm-start troll clip shuffled-rewards; do
    grep -h held_out_success_after "runs/seeds/$seed/$name/summary.json" | sed "s|^|seed $seed $name|"
  done
done
