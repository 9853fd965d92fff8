"""runs/<name>/: where everything of a run lies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_troll.config.tree import Config


@dataclass(frozen=True)
class RunPaths:
    """The paths of one run. Nothing is touched."""

    root: Path

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(Path(config.runs) / config.name)

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def discarded_metrics(self) -> Path:
        return self.root / "metrics.discarded.jsonl"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def stopped(self) -> Path:
        """Is there after a run that was asked to stop, until it is resumed."""
        return self.root / "stopped"

    @property
    def saved(self) -> Path:
        """The step of the newest checkpoint: told apart from a run that never had one, when all are gone."""
        return self.root / "saved"

    @property
    def evaluation(self) -> Path:
        return self.root / "eval.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def curves(self) -> Path:
        return self.root / "curves.png"

    @property
    def hf(self) -> Path:
        return self.root / "hf"

    @property
    def hf_rollout(self) -> Path:
        return self.root / "hf-rollout"

    @property
    def heartbeat(self) -> Path:
        return self.root / "heartbeat"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def servers(self) -> Path:
        """Where SGLang servers of the run are written down, by whatever machine starts them."""
        return self.root / "servers"

    @property
    def buffer(self) -> Path:
        """Where answers are kept until they have been learnt from."""
        return self.root / "buffer"

    @property
    def weights(self) -> Path:
        """Where servers read weights, unless rollout.sglang.sync.folder says otherwise."""
        return self.root / "weights"
