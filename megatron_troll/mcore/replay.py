"""Which experts tokens go to, recorded in one forward and repeated in others.

R3 (arXiv:2510.11370) repeats the rollout engine's choices in the trainer, R2 those of the policy at the start
of the update (both names: arXiv:2512.01374). Megatron has such a switch (moe_enable_routing_replay) in a
global list of all routers; it knows neither padding nor several models.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Replay:
    """What one router records and repeats.

    recorded  choices [n, k] of each forward; None: not recorded
    given     choices [n, k] for the forward that runs; None: no such forward runs, or it chooses itself
    waiting   those of forwards that the backward pass will recompute. Every schedule goes backward through a
              chunk's micro-batches in the order of their forwards.
    """

    recorded: list[Tensor] | None = None
    given: Tensor | None = None
    recomputed: bool = False
    waiting: deque[Tensor] = field(default_factory=deque)

    def begin(self, experts: Tensor) -> None:
        """Before a forward; whether gradients are on says whether there will be a backward."""
        self.given, self.recomputed = experts, torch.is_grad_enabled()

    def end(self) -> None:
        self.given = None

    def take(self) -> Tensor | None:
        """The choices that the router has to repeat now. Outside of a forward it is called by recompute."""
        if self.given is None:
            return self.waiting.popleft() if self.waiting else None
        # A checkpointed layer runs without gradient first.
        if self.recomputed and not torch.is_grad_enabled():
            self.waiting.append(self.given)
        return self.given

    def record(self, routing_map: Tensor, per_token: int) -> None:
        """routing_map [n, E] bool."""
        if self.recorded is None:
            return
        chosen = routing_map.byte().topk(per_token, dim=-1).indices.sort(-1).values
        self.recorded.append(chosen.to(torch.uint8 if routing_map.shape[1] <= 256 else torch.uint16))
