"""Generalised advantage estimation with a critic (arXiv 1506.02438, eq. 16; PPO, arXiv 1707.06347)."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_troll.advantages import Advantage, Values
from megatron_troll.config import Fraction

WHITENING_EPS = 1e-8


class Gae(Advantage):
    """A_t = sum_l (gamma lam)^l delta_{t+l},   delta_t = r_t + gamma V_{t+1} - V_t

    r_t is the reward of the response at its last token and 0 before; V after the last token is 0, so that a
    response cut by the length limit counts as ended. `whiten` shifts and scales the advantages of the batch
    to mean 0 and variance 1 (ddof 0), over all tokens of all prompts, as in PPO's code. The critic's targets
    come from `gae` and are not whitened.
    """

    family: ClassVar[str] = "critic"

    gamma: Fraction = Field(default=1.0, description="discount per token")
    lam: Fraction = Field(default=0.95, description="0: one-step differences; 1: return minus value")
    whiten: bool = Field(default=True, description="scale the advantages of the batch to mean 0, variance 1")

    @property
    def needs_groups(self) -> bool:
        return False

    @property
    def needs_values(self) -> bool:
        return True

    def __call__(self, rewards: Tensor, group: Tensor, values: Values | None = None) -> Tensor:
        """Advantages [L] of the tokens of `values`. Raises ValueError if `values` is None."""
        if values is None:
            raise ValueError("objective.advantage gae needs a critic's values: set models.critic")
        advantages, _ = gae(values.value, rewards, values.length, self.gamma, self.lam)
        return (whitened(advantages) if self.whiten else advantages).to(rewards.dtype)

    def targets(self, rewards: Tensor, values: Values) -> Tensor:
        """[L] float64, advantage plus value, not whitened."""
        return gae(values.value, rewards, values.length, self.gamma, self.lam)[1]


def gae(
    values: Tensor, rewards_at_end: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (advantage + value, the critic's targets), float64 [L], detached.

    values [L] of all tokens, response by response; rewards_at_end [B]; lengths [B], 0 for an empty response.
    Holds B x T numbers for the longest response T, and takes T steps. Raises ValueError unless there are B
    lengths that add up to L.
    """
    if int(lengths.sum()) != len(values) or len(lengths) != len(rewards_at_end):
        raise ValueError(
            f"{len(values)} values and {len(rewards_at_end)} rewards, but {len(lengths)} lengths that add up "
            f"to {int(lengths.sum())}"
        )
    if len(values) == 0:
        return values.double(), values.double()
    # In reverse order every response starts with its last token, and padding never affects a token.
    turned = [part.flip(0) for part in values.detach().double().split(lengths.tolist())]
    backward = pad_sequence(turned, batch_first=True)  # [B, T]
    following = torch.cat((torch.zeros_like(backward[:, :1]), backward[:, :-1]), dim=1)
    delta = gamma * following - backward
    delta[:, 0] += rewards_at_end.detach().double()
    advantage = [delta[:, 0]]
    for step in delta.unbind(1)[1:]:
        advantage.append(step + gamma * lam * advantage[-1])
    rows = torch.stack(advantage, dim=1)
    advantages = torch.cat([row[:n].flip(0) for row, n in zip(rows, lengths.tolist())])
    return advantages, advantages + values.detach().double()


def whitened(advantages: Tensor) -> Tensor:
    """(A - mean) / sqrt(var + 1e-8) over all tokens [L]; an empty batch stays empty."""
    if len(advantages) == 0:
        return advantages
    centred = advantages - advantages.mean()
    return centred / (centred.square().mean() + WHITENING_EPS).sqrt()
