"""The paths inside a run folder, runs/<name>/."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_troll.config.tree import Config


@dataclass(frozen=True)
class RunPaths:
    """The paths of one run. Reads and creates nothing."""

    root: Path

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(Path(config.runs) / config.name)

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

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
        """File that marks a run as stopped on request; it is deleted when the run is opened again."""
        return self.root / "stopped"

    @property
    def saved(self) -> Path:
        """File with the step of the newest checkpoint; if all checkpoints are lost, it shows that there were
        some."""
        return self.root / "saved"

    @property
    def changes(self) -> Path:
        """File of what was changed on purpose between the checkpoints of the run; missing if nothing was."""
        return self.root / "changes.json"

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
        """Folder in which every machine that starts SGLang servers of the run registers them."""
        return self.root / "servers"

    @property
    def key(self) -> Path:
        """API key of these servers, unless rollout.sglang.api_key_file names a file."""
        return self.servers / "key"

    @property
    def buffer(self) -> Path:
        """Folder that keeps answers until a checkpoint contains the steps trained on them."""
        return self.root / "buffer"

    @property
    def weights(self) -> Path:
        """Folder from which servers read weights, unless rollout.sglang.sync.folder is set."""
        return self.root / "weights"
