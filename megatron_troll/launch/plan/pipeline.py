"""Micro-batches: how many an optimizer step has, and how many a stage keeps at once (1F1B, with or without
interleaving)."""

from dataclasses import dataclass

from megatron_troll.checks import data_of
from megatron_troll.config import Config
from megatron_troll.launch.plan.ranks import Ranks


@dataclass(frozen=True)
class Work:
    """Work of one data-parallel rank for one rollout batch in which every answer has maximum length.

    tokens          tokens of a response with its prompt, as the model reads it
    responses       responses of the rollout batch on this rank
    micro_batches   micro-batches of one optimizer step
    micro_tokens    most tokens of one micro-batch, over its context-parallel ranks
    """

    tokens: int
    responses: int
    micro_batches: int
    micro_tokens: int


def work_of(config: Config, ranks: Ranks) -> Work:
    train = config.train
    longest = data_of(config).max_prompt_tokens + config.rollout.sampling.max_tokens - 1
    align = 2 * ranks.layout.cp * ranks.layout.tp if ranks.layout.cp > 1 else ranks.layout.tp
    length = -(-longest // align) * align
    budget = max(train.token_budget // align * align, length)
    responses = -(-config.rollout.prompts * config.rollout.samples // ranks.dp)
    step = -(-responses * train.epochs // train.updates)
    micro = -(-step // (budget // length))
    multiple = ranks.layout.pp if ranks.layout.vpp else 1
    return Work(longest, responses, -(-micro // multiple) * multiple, budget)


def in_flight(ranks: Ranks, stage: int, micro_batches: int) -> int:
    """The most forwards of one chunk that wait for their backward on a stage."""
    pp, chunks = ranks.layout.pp, ranks.chunks
    ahead = pp - stage - 1 if chunks == 1 else 2 * (pp - stage - 1) + (chunks - 1) * pp
    return min(ahead + 1, micro_batches * chunks)
