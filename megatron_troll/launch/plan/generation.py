"""Bytes that the in-process engine (rollout/engines/inprocess.py) holds on a rank besides the states."""

from dataclasses import replace

from megatron_troll.checks import data_of
from megatron_troll.config import Config
from megatron_troll.launch.plan.activations import Work, flow_of, working_set
from megatron_troll.launch.plan.models import Planned
from megatron_troll.launch.plan.saved.flow import FLOAT
from megatron_troll.launch.plan.servers import GIB, server_share, state_of_sequence, values_of_token
from megatron_troll.rollout.engines.drawing import PROMPT_TOKENS

# Bytes per element of a whole row of logits, on the last stage: logits and their gathered shards, log-probs,
# probabilities, and a cumulative sum in fp64.
ROW = 6 * FLOAT
MIB = 1 << 20


def held(config: Config, policy: Planned, drawing: Planned, work: Work, stage: int) -> dict[str, int]:
    """Bytes held while the model `drawing` generates the rollouts or, if the policy is another model, while
    the policy generates its evaluations, whichever is more. Empty if servers elsewhere generate
    everything."""
    found = {}
    if config.rollout.engine == "sglang" and config.rollout.sglang.colocated:
        found["servers"] = round(server_share(config) * config.launch.device_gib * GIB)
    here = [drawing] if config.rollout.engine == "inprocess" else []
    here += [] if drawing is policy else [policy]
    engines = [_in_process(config, planned, work, stage) for planned in here]
    return found | max(engines, key=lambda engine: sum(engine.values()), default={})


def sync(config: Config, stage: int) -> dict[str, int]:
    """Bytes that a sync of weights to servers holds on rank 0, which the first stage has: two buckets
    (weights/buckets.py); via disk they are in host memory."""
    sending = config.rollout.sglang.sync
    if config.rollout.engine != "sglang" or sending.via == "disk":
        return {}
    return {"weight sync": 2 * sending.bucket_mib * MIB if stage == 0 else 0}


def _in_process(config: Config, drawing: Planned, work: Work, stage: int) -> dict[str, int]:
    """Bytes that the in-process engine holds for the model `drawing`; `prefill` is an estimate."""
    ranks, shape, flow = drawing.ranks, drawing.shape, flow_of(drawing, work)
    tp, prompt = ranks.layout.tp, data_of(config).max_prompt_tokens
    sequences = min(config.rollout.max_sequences, work.responses)
    # What one forward reads of prompts: at least one, and as many as PROMPT_TOKENS hold.
    read = max(prompt, min(sequences * prompt, PROMPT_TOKENS))
    chunks = [ranks.layers(stage, chunk, shape.layers) for chunk in range(ranks.chunks)]
    kinds = [shape.layer_types[layer] for layers in chunks for layer in layers]
    token = flow.width * values_of_token(shape, kinds, tp)
    held = token * (prompt + config.rollout.sampling.max_tokens)
    held += state_of_sequence(shape, kinds, tp, flow.width)
    # Sequence parallelism is off during generation: every tensor-parallel rank has all tokens.
    prefill = working_set(replace(flow, tokens=(sequences + read) * tp))
    return {
        "caches": sequences * held + read * token,
        "prefill": prefill,
        "rows": sequences * ROW * shape.vocab if stage == ranks.layout.pp - 1 else 0,
    }
