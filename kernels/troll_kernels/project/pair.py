"""Two sparse distributions on one set of slots (ALGORITHMS 1.2).

The slots of a row are those of the new policy, then those of the old policy that the new one lacks,
then one default slot for all tokens outside both. U is their number. A slot's multiplicity is the
number of tokens it stands for: 1, 0 on padding, V - |union| on the default slot.
"""

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST = float("-inf")


class Pair(NamedTuple):
    """log_q, log_p [N, U]: log-probs of the old and the new distribution, finite everywhere (0 on padding);
    multiplicity [N, U]; log_mass [N, U] = log(multiplicity) + log_q, -inf on padding; old_slot [N, W_old]:
    the slot of each old id."""

    log_q: Tensor
    log_p: Tensor
    multiplicity: Tensor
    log_mass: Tensor
    old_slot: Tensor

    def rows(self, index: Tensor) -> "Pair":
        return Pair(*(field[index] for field in self))


def pair_aligned(new_logp: Tensor, old_logp: Tensor, vocab: int, p_d: float) -> Pair:
    """Pair two distributions [N, W] on the same ids, as `support: old` gives them: no matching, U = W + 1."""
    new_valid, old_valid = new_logp != LOWEST, old_logp != LOWEST
    default = log(p_d)
    log_q = torch.where(old_valid, old_logp, default)
    log_p = torch.where(new_valid, new_logp, default)
    slots = torch.arange(old_logp.shape[1], device=old_logp.device)
    return _with_default(log_q, log_p, new_valid | old_valid, slots.expand_as(old_logp), vocab, p_d)


def pair_union(
    new_ids: Tensor, new_logp: Tensor, old_ids: Tensor, old_logp: Tensor, vocab: int, p_d: float
) -> Pair:
    """Pair two distributions on separate supports [N, W_new] and [N, W_old]; U = W_new + W_old + 1."""
    width = new_logp.shape[1]
    new_valid, old_valid = new_logp != LOWEST, old_logp != LOWEST
    in_new, match = _match(new_ids, new_valid, old_ids, old_valid)
    default = log(p_d)
    # Old slots without a match write into a spare column, which is dropped.
    spare = torch.full((new_logp.shape[0], width + 1), default, dtype=new_logp.dtype, device=new_logp.device)
    matched_q = spare.scatter(1, torch.where(in_new, match, width), old_logp)[:, :width]
    log_q = torch.cat((matched_q, old_logp), dim=1)
    log_p = torch.cat((new_logp, torch.full_like(old_logp, default)), dim=1)
    listed = torch.cat((new_valid, old_valid & ~in_new), dim=1)
    own = width + torch.arange(old_logp.shape[1], device=old_logp.device)
    return _with_default(log_q, log_p, listed, torch.where(in_new, match, own), vocab, p_d)


def _match(new_ids: Tensor, new_valid: Tensor, old_ids: Tensor, old_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the new support holds the id of each old slot, and in which slot: bool, int64 [N, W_old]."""
    if new_ids.shape[1] == 0:
        return torch.zeros_like(old_valid), torch.zeros_like(old_ids)
    ids, order = new_ids.masked_fill(~new_valid, torch.iinfo(new_ids.dtype).max).sort(1)
    at = torch.searchsorted(ids, old_ids.contiguous()).clamp(max=ids.shape[1] - 1)
    return (ids.gather(1, at) == old_ids) & old_valid, order.gather(1, at)


def _with_default(
    log_q: Tensor, log_p: Tensor, listed: Tensor, old_slot: Tensor, vocab: int, p_d: float
) -> Pair:
    """Add the default slot and make padding finite."""
    zero = log_q.new_zeros(())
    default = log_q.new_full((log_q.shape[0], 1), log(p_d))
    outside = (vocab - listed.sum(1, keepdim=True)).to(log_q.dtype)
    return Pair(
        torch.cat((torch.where(listed, log_q, zero), default), dim=1),
        torch.cat((torch.where(listed, log_p, zero), default), dim=1),
        torch.cat((listed.to(log_q.dtype), outside), dim=1),
        torch.cat((torch.where(listed, log_q, LOWEST), default + outside.log()), dim=1),
        old_slot,
    )
