"""Bytes of a rollout batch: rollouts and micro-batches in host memory, and the micro-batch in use."""

from megatron_troll.batching.experts import expert_dtype
from megatron_troll.batching.held import WAITING_ENTRY_BYTES, WAITING_LOSS_TOKEN_BYTES, WAITING_TOKEN_BYTES
from megatron_troll.config import Config
from megatron_troll.launch.plan.activations import Work
from megatron_troll.launch.plan.models import Planned
from megatron_troll.objectives.objective import Objective
from megatron_troll.types import ENTRY_BYTES, LOSS_TOKEN_BYTES, TOKEN_BYTES

# Bytes of a rollout: per response token, per entry of the engine's top-K.
ROLLOUT_TOKEN_BYTES, ROLLOUT_ENTRY_BYTES = 12, 8


def in_use(config: Config, objective: Objective, work: Work, cp: int) -> int:
    """Bytes on the device of the one micro-batch that is used."""
    tokens = work.micro_tokens // cp
    answers = min(tokens, tokens * config.rollout.sampling.max_tokens // work.tokens)
    entries = _packed(config, objective)
    return TOKEN_BYTES * tokens + (LOSS_TOKEN_BYTES + ENTRY_BYTES * entries) * answers


def on_host(config: Config, objective: Objective, work: Work, policy: Planned) -> dict[str, int]:
    """Bytes in host memory: of the rollouts on every rank, and of their records of top-K and experts on rank
    0, over all batches that are sampled and not trained on; and of the policy's micro-batches of one batch on
    a rank."""
    ranks, cp = policy.ranks, policy.model.layout.cp
    batches = 1 + config.rollout.staleness
    responses = batches * work.responses * ranks.dp
    answers = responses * config.rollout.sampling.max_tokens
    experts = 0
    if config.train.replay == "rollout":
        shape = policy.shape
        experts = shape.layers * shape.experts_per_token * expert_dtype(shape.experts)().nbytes
    mine = work.responses * config.train.epochs
    waiting = WAITING_LOSS_TOKEN_BYTES + WAITING_ENTRY_BYTES * _packed(config, objective)
    return {
        "rollouts": ROLLOUT_TOKEN_BYTES * answers,
        "records": ROLLOUT_ENTRY_BYTES * _asked(config, objective) * answers
        + experts * responses * work.tokens,
        "micro-batches": mine
        * (WAITING_TOKEN_BYTES * work.tokens + waiting * config.rollout.sampling.max_tokens)
        // cp,
    }


def _asked(config: Config, objective: Objective) -> int:
    """Entries of the engine's top-K that something reads."""
    read = config.objective.old == "engine" or objective.reads_rollout_topk
    return config.rollout.top_k if read else 0


def _packed(config: Config, objective: Objective) -> int:
    """Slots of a token in a micro-batch: those entries, and the sampled token."""
    asked = _asked(config, objective)
    return asked + 1 if asked else 0
