"""Curricula by success: which level of its prompts a source draws, batch by batch."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from megatron_troll.data.mixture import SourcePrompts, Stage
from megatron_troll.types import Prompt


@dataclass
class Progress:
    """The state of one source. rises: for each level after the first, the batch from which on it is drawn and
    the number of prompts that the source had drawn before; recent: the success of the last prompts of the
    level that is drawn now, at most a window of them."""

    rises: list[list[int]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)


class Curricula:
    """The levels of all sources that have any. The same on every rank, because all see all rewards."""

    def __init__(self, sources: Sequence[SourcePrompts]) -> None:
        self._sources = {source.name: source for source in sources if source.curriculum is not None}
        self._levels = {
            prompt.id: level
            for source in self._sources.values()
            for level, prompts in enumerate(source.levels)
            for prompt in prompts
        }
        self._progress = {name: Progress() for name in self._sources}

    @property
    def state(self) -> dict[str, Any]:
        """The state of every source, for a checkpoint."""
        return {name: asdict(one) for name, one in self._progress.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; sources that it lacks begin anew."""
        for name in self._progress:
            self._progress[name] = Progress(**deepcopy(state[name])) if name in state else Progress()

    def stages(self, batch: int) -> dict[str, Stage]:
        """The stage of each source in batch number `batch`, counted from 1. It is final for batches that have
        been begun, so that a resumed run begins it with the same prompts."""
        found = {}
        for name, one in self._progress.items():
            reached = [since for begins, since in one.rises if begins <= batch]
            level = min(len(reached), len(self._sources[name].levels) - 1)
            found[name] = Stage(level, reached[level - 1] if level else 0)
        return found

    def observe(
        self, prompts: Sequence[Prompt], success: np.ndarray, begins: int, drawn: Callable[[str], int]
    ) -> list[str]:
        """Learn from the `success` [B] of the responses to `prompts`. A source whose last `window` prompts of
        the present level reach the mean `curriculum.success` draws the next level from batch `begins` on, the
        first that is not begun; `drawn` says how many prompts it has drawn. Returns a line for each rise."""
        said = []
        stages = self.stages(begins)
        for name, source in self._sources.items():
            curriculum, one, level = source.curriculum, self._progress[name], stages[name].level
            assert curriculum is not None
            one.recent += self._of(name, level, prompts, success)
            del one.recent[: -curriculum.window]
            mean = float(np.mean(one.recent)) if len(one.recent) == curriculum.window else 0.0
            if mean >= curriculum.success and level + 1 < len(source.levels):
                one.rises.append([begins, drawn(name)])
                one.recent.clear()
                said.append(
                    f"{name or 'gym'} rises to level {source.first_level + level + 1} with batch {begins}: "
                    f"success {mean:.3f} on its last {curriculum.window} prompts"
                )
        return said

    def metrics(self, batch: int) -> dict[str, float]:
        """`level/SOURCE`, the level drawn in `batch`."""
        stages = self.stages(batch)
        return {
            f"level/{name}" if name else "level": float(self._sources[name].first_level + stage.level)
            for name, stage in stages.items()
        }

    def _of(self, name: str, level: int, prompts: Sequence[Prompt], success: np.ndarray) -> list[float]:
        """The mean success of each prompt of a source at a level, in the order of the prompts."""
        values: dict[str, list[float]] = {}
        for prompt, value in zip(prompts, success.tolist(), strict=True):
            if prompt.source == name and self._levels.get(prompt.id) == level:
                values.setdefault(prompt.id, []).append(value)
        return [float(np.mean(each)) for each in values.values()]
