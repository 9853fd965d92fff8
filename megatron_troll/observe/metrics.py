"""Per-token diagnostics of one step, reduced over its micro-batches and over the ranks of a group."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_troll.parallel.groups import Group

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
REDUCTIONS = ("mean", "sum", "min", "max", *QUANTILES)
QUANTILE_SAMPLES = 65_536


def metric_name(name: str, reduction: str) -> str:
    """Name in metrics.jsonl: `kl_before` for the mean, `kl_before/p99` for another reduction."""
    return name if reduction == "mean" else f"{name}/{reduction}"


class Reducer:
    """Collects name -> [N] tensors of several micro-batches and reduces them to floats.

    `table` is the objective's: name -> reductions; every rank passes the same one. mean, sum, min and max
    are exact over every token of the group (float64 sums). Quantiles are values of the pooled tokens;
    a rank with more than QUANTILE_SAMPLES tokens contributes every n-th of them, in order, with weight n.
    A NaN entry means that the token has no such value (objectives/slots.py) and is not counted; a
    diagnostic without any value on any rank is absent from the result.
    Holds 4 bytes per token and diagnostic until `result`; nothing waits for the device before that.
    """

    def __init__(
        self, table: Mapping[str, Sequence[str]], group: Group, device: torch.device | str = "cpu"
    ) -> None:
        for name, reductions in table.items():
            if unknown := set(reductions) - set(REDUCTIONS):
                raise ValueError(f"diagnostic {name}: unknown {sorted(unknown)}; known are {REDUCTIONS}")
        self._table = table
        self._group = group
        self._device = device
        self._parts: dict[str, list[tuple[Tensor, Tensor | None]]] = {name: [] for name in table}

    def add(self, per_token: Mapping[str, Tensor], keep: Tensor | None = None) -> None:
        """Add diagnostics [N] of one micro-batch; tokens where `keep` [N] bool is False are left out."""
        if unknown := per_token.keys() - self._table.keys():
            raise ValueError(f"diagnostics {sorted(unknown)} are not in the objective's table")
        for name, values in per_token.items():
            self._parts[name].append((values.detach().to(self._device, torch.float32), keep))

    def result(self) -> dict[str, float]:
        """Reduce over the group and reset. Collective: every rank of the group calls it. Blocks."""
        values = {name: self._take(name) for name in self._table}
        reduced = self._moments(values)
        with_quantiles = [name for name, wanted in self._table.items() if QUANTILES.keys() & set(wanted)]
        for name in with_quantiles:
            reduced[name] |= self._quantiles(values[name])
        return {
            metric_name(name, reduction): reduced[name][reduction]
            for name, wanted in self._table.items()
            if reduced[name]["count"] > 0
            for reduction in wanted
        }

    def _take(self, name: str) -> Tensor:
        parts = [values if keep is None else values[keep] for values, keep in self._parts[name]]
        self._parts[name] = []
        values = torch.cat([torch.empty(0, device=self._device), *parts])
        return values[~values.isnan()]

    def _moments(self, values: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """Reduce all diagnostics together, with one sum and one max all-reduce."""
        if not values:
            return {}
        sums = torch.stack([_sums(v) for v in values.values()])  # [D, 2] float64
        peaks = torch.stack([_peaks(v) for v in values.values()])  # [D, 2] float64
        self._group.all_reduce(sums)
        self._group.all_reduce(peaks, op=dist.ReduceOp.MAX)
        rows = torch.cat([sums, peaks], dim=1).tolist()
        return {name: _named(*row) for name, row in zip(values, rows, strict=True)}

    def _quantiles(self, values: Tensor) -> dict[str, float]:
        """Quantiles of the pooled values. Gathers at most QUANTILE_SAMPLES float32 values and their weights
        from each rank."""
        every = max(1, -(-len(values) // QUANTILE_SAMPLES))
        sample = values[::every]
        longest = torch.tensor(len(sample), device=self._device)
        width = int(self._group.all_reduce(longest, op=dist.ReduceOp.MAX))
        mine = torch.zeros(2, width, device=self._device)  # values, weights; weight 0 is padding
        mine[0, : len(sample)] = sample
        mine[1, : len(sample)] = every
        pooled = torch.cat(self._group.all_gather(mine), dim=1)
        value, weight = pooled[:, pooled[1] > 0]
        if len(value) == 0:
            return {}
        value, order = value.sort()
        reached = weight[order].double().cumsum(0)
        at = torch.tensor(list(QUANTILES.values()), dtype=torch.float64, device=self._device) * reached[-1]
        found = value[torch.searchsorted(reached, at).clamp(max=len(value) - 1)].tolist()
        return dict(zip(QUANTILES, found, strict=True))


def _sums(values: Tensor) -> Tensor:
    """[2] float64: count, sum."""
    count = torch.tensor(len(values), dtype=torch.float64, device=values.device)
    return torch.stack([count, values.double().sum()])


def _peaks(values: Tensor) -> Tensor:
    """[2] float64: max and -min; -inf if there is no value."""
    if len(values) == 0:
        return torch.full((2,), -torch.inf, dtype=torch.float64, device=values.device)
    return torch.stack([values.max(), -values.min()]).double()


def _named(count: float, total: float, high: float, minus_low: float) -> dict[str, float]:
    mean = total / count if count else 0.0
    return {"count": count, "mean": mean, "sum": total, "max": high, "min": -minus_low}
