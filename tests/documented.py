"""Whether docs/metrics.md, which is made from the table of fields, has a key."""

from megatron_troll.observe.fields import (
    EXPERTS,
    PARTS_OF_REWARDS,
    PER_TOKEN,
    PHASES,
    RUN,
    SOURCES,
    SPEED,
    names,
)
from megatron_troll.observe.metrics import REDUCTIONS


def documented(name: str) -> bool:
    """Whether `name`, a key of metrics.jsonl, is in the table."""
    base, _, suffix = name.partition("/")
    if base == "seconds" and suffix:
        return suffix in names(PHASES)
    if suffix.startswith("layer_"):
        return base in names(EXPERTS)
    if {f"{base}/SOURCE", f"{base}/PART"} & names([*SOURCES, *PARTS_OF_REWARDS]):
        return True
    if suffix:
        return base in names(PER_TOKEN) and suffix in REDUCTIONS
    return base in names([*RUN, *PER_TOKEN, *EXPERTS, *SPEED])
