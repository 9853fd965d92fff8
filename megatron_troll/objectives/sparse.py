"""Configuration of the methods on sparse distributions (arXiv 2510.03817, eq. 21; ALGORITHMS 1.1)."""

import warnings
from typing import Annotated, Literal

from pydantic import Field

from megatron_troll.config import ConfigError, Positive
from megatron_troll.objectives.slots import Method
from megatron_troll.types import HeadRequest, Support


class Sparse(Method):
    """A method that reads the most likely tokens and the sampled one; the defaults are TROLL's."""

    k: Positive = Field(default=64, description="tokens kept at most, besides the sampled one")
    delta: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=1e-5, description="mass that the kept tokens may leave out"
    )
    p_d: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-12, description="probability of a token left out"
    )
    support: Literal["own", "old"] = Field(
        default="old", description="whose kept tokens are read: the new policy's own or the old policy's"
    )

    @property
    def reads(self) -> HeadRequest:
        return HeadRequest(topk=Support(self.support, self.k, self.delta))

    def check(self, vocab: int) -> None:
        left_out = (vocab - 1) * self.p_d
        if left_out >= 1:
            raise ConfigError(
                f"(V - |S|) * p_d = {left_out:.3g} >= 1 for one kept token of V={vocab}: lower p_d"
            )
        if left_out > self.delta > 0:
            warnings.warn(
                f"default tokens may hold {left_out:.3g}, more than delta={self.delta:g}", stacklevel=2
            )
