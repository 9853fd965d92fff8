"""Which weights of a server are not what the trainer exports."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from megatron_troll.rollout.sglang.desk import Desk
from megatron_troll.rollout.sglang.errors import Passing, UpdateRefused
from megatron_troll.rollout.sglang.transport import Disk, Failed, Tensors
from megatron_troll.rollout.sglang.weights import Agreed, delivered

NUMBER = re.compile(r"\.\d+(?=\.|$)")


def told(agreed: Agreed, url: str, source_folder: Path, folder: Path) -> str:
    """What is at fault with the weights of the server at `url`, in words: they are compared, parameter by
    parameter, with what the server has after loading a fresh export from `folder`. The server has lost its
    version then. Blocks on all ranks."""

    def load_afresh(desk: Desk, tensors: Tensors) -> Failed:
        disk = Disk(desk.background, desk.control, folder, source_folder, max_bytes=2**30)
        return disk.deliver(tensors, [url], "diagnosis")

    def sums(desk: Desk) -> dict[str, str]:
        return desk.background.run(desk.control.checksums(url))

    try:
        before = agreed.on_first(sums)
        lost = delivered(agreed, [url], load_afresh)
        after = agreed.on_first(sums) if url not in lost else {}
    except (Passing, UpdateRefused) as error:
        return f"Its weights cannot be compared with the trainer's: {error}"
    differing = families(before, after)
    if not differing:
        return (
            "Its weights are what the trainer exports, so the gap is not theirs alone: compare dtype, KV "
            "cache and quantisation with the trainer's, and for a new model family its weight table"
        )
    return (
        f"At fault: {', '.join(differing)}. They are not what the trainer exports: rollout.sglang.sync.via "
        "does not bring them over; try another way, and report it"
    )


def families(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The parameters whose hash differs, by their names without numbers, with how many of them do."""
    everything = Counter(NUMBER.sub(".*", name) for name in before)
    differing = Counter(NUMBER.sub(".*", name) for name in before if before[name] != after.get(name))
    return [f"{name} ({count} of {everything[name]})" for name, count in sorted(differing.items())]
