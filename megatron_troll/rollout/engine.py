"""What the loop asks of whoever generates: requests in, rollouts out."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_troll.config.tree import Config, RolloutConfig, Sampling
from megatron_troll.rollout.sampling import token_uniforms
from megatron_troll.types import FinishReason, Prompt, Rollout, TokenTopK

if TYPE_CHECKING:
    from megatron_troll.mcore.model import MegatronModel


class EngineError(RuntimeError):
    """The engine cannot go on. Raised on every rank alike; the message says what to do."""


@dataclass(frozen=True)
class Request:
    """One sample to draw. prompt_ids int64 [P]; group: the prompt's index in its batch; sample: which of the
    samples that the batch has of the prompt."""

    prompt: Prompt
    group: int
    sample: int
    prompt_ids: np.ndarray


@dataclass(frozen=True)
class Completion:
    """What was drawn for a request, the stop token included. ids, versions int64, logp float32 [T]; experts,
    where train.replay=rollout asks for them; see Rollout."""

    ids: np.ndarray
    logp: np.ndarray
    topk: TokenTopK | None
    versions: np.ndarray
    finish: FinishReason
    experts: np.ndarray | None = None


@dataclass(frozen=True)
class Setup:
    """What an engine is built from. `model` is what it has to draw from, as it is at the last `sync`, and
    `folder` the Hugging Face folder that it began with; `prompts` are a few that the run asks, for an engine
    that tries itself on some."""

    config: Config
    model: "MegatronModel"
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    prompts: tuple[Prompt, ...] = ()

    @property
    def rollout(self) -> RolloutConfig:
        return self.config.rollout


class Engine(ABC):
    """Draws one rollout per request. Built on every rank; every rank calls every method, with the same
    arguments, and blocks until all have. Raises EngineError on all ranks or on none.

    returns_experts  whether rollouts have `experts` where train.replay=rollout asks for them
    draws_elsewhere  whether what is begun by `start` goes on while the trainer trains
    """

    returns_experts: ClassVar[bool] = False
    draws_elsewhere: ClassVar[bool] = False

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @abstractmethod
    def generate(self, requests: Sequence[Request], sampling: Sampling, round: int) -> list[Rollout]:
        """One rollout per request, in their order, all of them on every rank. A response ends with one of
        `setup.stop_ids`, which hold the tokens of `sampling.stop`, or after `sampling.max_tokens`; its text
        lacks the stop token. `round` sets the random numbers of one batch apart from those of another."""

    def start(
        self, requests: Sequence[Request], sampling: Sampling, round: int
    ) -> Callable[[], list[Rollout]]:
        """Begin to `generate` for a batch of training; what is returned waits for the rollouts. Where
        `draws_elsewhere`, this goes on over a `sync`: the rest of an answer then comes from the newer
        weights, and `Rollout.versions` says so. A batch that a run asks for again after a crash may be
        answered from what was kept of it."""
        rollouts = self.generate(requests, sampling, round)
        return lambda: rollouts

    def forget(self, round: int) -> None:  # noqa: B027
        """The batches up to `round` will not be asked for again."""

    def rest(self) -> None:  # noqa: B027
        """Nothing is under way, and nothing will be asked before the next `sync`."""

    def sync(self, version: int) -> dict[str, float]:
        """From now on draw from the weights that the model has now; `version` is what rollouts call them.
        Returns metrics. Called before `generate` wherever the model may have changed; the same version again
        is nothing to do."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Give back what the engine holds. Called once, also after an error, and maybe on some ranks only."""


def rollout_of(setup: Setup, request: Request, answer: Completion, sampling: Sampling, round: int) -> Rollout:
    """The record of an answer."""
    ids = answer.ids[:-1] if answer.finish == "stop" else answer.ids
    return Rollout(
        prompt=request.prompt,
        group=request.group,
        sample=request.sample,
        prompt_ids=request.prompt_ids,
        response_ids=answer.ids,
        mask=np.ones(len(answer.ids), dtype=np.float32),
        logp=answer.logp,
        uniform=token_uniforms(setup.config.seed, round, request.prompt.id, request.sample, len(answer.ids)),
        topk=answer.topk,
        text=str(setup.tokenizer.decode(ids.tolist(), skip_special_tokens=True)),
        finish=answer.finish,
        versions=answer.versions,
        temperature=sampling.law_temperature,
        experts=answer.experts,
    )


def requests_for(prompts: Sequence[Prompt], samples: int, drawn: Counter[str] | None = None) -> list[Request]:
    """`samples` requests for each prompt, a prompt's samples next to each other. The samples of a prompt that
    comes again (where an epoch ends) are numbered on, so that it draws others; `drawn` has the samples that
    earlier calls of the same round asked for, by prompt id, and is counted on. Raises ValueError for a
    prompt without ids."""
    requests: list[Request] = []
    drawn = Counter() if drawn is None else drawn
    for group, prompt in enumerate(prompts):
        if not len(prompt.ids):
            raise ValueError(f"prompt {prompt.id!r} has no ids: give it those of data.chat.tokenized")
        ids, first = prompt.ids.astype(np.int64), drawn[prompt.id]
        requests += [Request(prompt, group, first + sample, ids) for sample in range(samples)]
        drawn[prompt.id] += samples
    return requests
