"""The interface of a rollout engine: requests in, rollouts out."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_troll.config import Config, RolloutConfig, Sampling
from megatron_troll.rollout.sampling import mask_key
from megatron_troll.types import FinishReason, Prompt, Rollout, TokenTopK, marked

if TYPE_CHECKING:
    from megatron_troll.mcore.model import MegatronModel


class EngineError(RuntimeError):
    """The engine cannot continue. Raised on every rank; the message says what to do."""


@dataclass(frozen=True)
class Request:
    """One sample to generate. prompt_ids int32 [P]; group: the prompt's index in its batch; sample: number of
    this sample among those of the prompt in the batch."""

    prompt: Prompt
    group: int
    sample: int
    prompt_ids: np.ndarray


@dataclass(frozen=True)
class Completion:
    """Tokens sampled for a request, including the stop token. ids, versions int32, logp float32 [T]; experts
    if train.replay=rollout asks for them; see Rollout."""

    ids: np.ndarray
    logp: np.ndarray
    topk: TokenTopK | None
    versions: np.ndarray
    finish: FinishReason
    experts: np.ndarray | None = None


@dataclass(frozen=True)
class Setup:
    """Inputs to build an engine. `model` is the model to sample from, with its weights at the last `sync`,
    and `folder` the Hugging Face folder that it started from; `prompts` are a few prompts of the run, for an
    engine that tests itself on some."""

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
    """Generates one rollout per request. Built on every rank; every rank calls every method with the same
    arguments, and blocks until all ranks have called it. Raises EngineError on all ranks or on none.

    returns_experts  whether rollouts have `experts` if train.replay=rollout asks for them
    generates_elsewhere  whether generation begun by `start` continues while the trainer trains
    """

    returns_experts: ClassVar[bool] = False
    generates_elsewhere: ClassVar[bool] = False

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @abstractmethod
    def generate(self, requests: Sequence[Request], sampling: Sampling, round: int) -> list[Rollout]:
        """Return one rollout per request, in the same order, all of them on every rank; top-K and experts
        maybe on rank 0 only (`Rollout.elsewhere`). A response ends with
        one of `setup.stop_ids`, which include the tokens of `sampling.stop`, or after `sampling.max_tokens`;
        its text omits the stop token. Batches with different `round` use different random numbers."""

    def start(
        self, requests: Sequence[Request], sampling: Sampling, round: int
    ) -> Callable[[], list[Rollout]]:
        """Begin to `generate` a training batch; the returned function waits for the rollouts. With
        `generates_elsewhere`, generation continues across a `sync`: the rest of an answer then comes from the
        newer weights, as recorded in `Rollout.versions`. If a run requests a batch again after a crash,
        answers that were stored may be reused."""
        rollouts = self.generate(requests, sampling, round)
        return lambda: rollouts

    def forget(self, round: int) -> None:  # noqa: B027
        """Drop stored answers of the batches up to `round`, which will not be requested again."""

    def rest(self) -> None:  # noqa: B027
        """Called when no request is in flight and none will come before the next `sync`."""

    def sync(self, version: int) -> dict[str, float]:
        """Sample from the model's current weights from now on; rollouts record them as `version`. Returns
        metrics. Called before `generate` whenever the model may have changed; a call with an unchanged
        version needs to do nothing."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Release the engine's resources. Called once, also after an error, and maybe on some ranks only."""


def rollout_of(
    setup: Setup,
    request: Request,
    answer: Completion,
    sampling: Sampling,
    round: int,
    *,
    elsewhere: bool = False,
) -> Rollout:
    """Build the rollout of a completion, of which another rank has the records (`Rollout.elsewhere`) if
    `elsewhere`."""
    ids = answer.ids[:-1] if answer.finish == "stop" else answer.ids
    return Rollout(
        prompt=request.prompt,
        group=request.group,
        sample=request.sample,
        prompt_ids=request.prompt_ids,
        response_ids=answer.ids,
        marks=marked(np.ones(len(answer.ids), dtype=bool), answer.versions),
        logp=answer.logp,
        key=mask_key(setup.config.seed, round, request.prompt.id, request.sample),
        topk=answer.topk,
        text=str(setup.tokenizer.decode(ids.tolist(), skip_special_tokens=True)),
        finish=answer.finish,
        temperature=sampling.logprob_temperature,
        experts=answer.experts,
        elsewhere=elsewhere,
    )


def requests_for(prompts: Sequence[Prompt], samples: int, drawn: Counter[str] | None = None) -> list[Request]:
    """Return `samples` requests for each prompt, a prompt's samples next to each other. If a prompt occurs
    again (at the end of an epoch), the numbering of its samples continues, so that it gets new samples;
    `drawn` counts the samples that earlier calls of the same round requested, by prompt id, and is updated.
    Raises ValueError for a prompt without ids."""
    requests: list[Request] = []
    drawn = Counter() if drawn is None else drawn
    for group, prompt in enumerate(prompts):
        if not len(prompt.ids):
            raise ValueError(f"prompt {prompt.id!r} has no ids: tokenize it with data.chat.tokenized")
        first = drawn[prompt.id]
        requests += [Request(prompt, group, first + sample, prompt.ids) for sample in range(samples)]
        drawn[prompt.id] += samples
    return requests
