"""What servers call the weights of a run: its name, a word of its own, and how often it has trained them."""

import secrets
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Versions:
    """Names that no other run, and no earlier start of this one, gives: a server that was restarted, or that
    another run writes to, is told from one that has these weights."""

    name: str
    nonce: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def run(self) -> str:
        return f"{self.name}.{self.nonce}"

    def called(self, number: int) -> str:
        """The weights after training on `number` rollout batches."""
        return f"{self.run}.{number}"

    def number(self, version: str) -> int | None:
        """The inverse of `called`; None for what is not of this run."""
        run, _, number = version.rpartition(".")
        return int(number) if run == self.run and number.isdigit() else None
