"""The layouts that tests run on, as world size and parallel sizes, and the groups that each must form."""

from megatron_troll.parallel.groups import Groups

Sizes = dict[str, int]
LAYOUTS: dict[str, tuple[int, Sizes]] = {
    "one-rank": (1, {}),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}),
    "tp2-etp2": (2, {"tp": 2, "etp": 2}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2-interleaved": (2, {"pp": 2, "vpp": 2}),
    "ep2": (2, {"ep": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2": (2, {}),
    "tp2-ep2-dp2": (4, {"tp": 2, "ep": 2}),
    "tp2-dp2": (4, {"tp": 2}),
    "tp2-pp2-ep2": (4, {"tp": 2, "pp": 2, "ep": 2}),
    "tp2-pp2-etp2-interleaved": (4, {"tp": 2, "pp": 2, "etp": 2, "vpp": 2}),
    "tp2-cp2-ep2-etp2": (4, {"tp": 2, "cp": 2, "ep": 2, "etp": 2}),
}
AXES = ("world", "tp", "pp", "cp", "dp", "ep", "etp", "dp_cp")


def expected_groups(world: int, sizes: Sizes) -> Sizes:
    """The size of the group on each axis."""
    size = dict.fromkeys(AXES, 1) | {axis: n for axis, n in sizes.items() if axis != "vpp"}
    dp_cp = world // (size["tp"] * size["pp"])
    return size | {"world": world, "dp_cp": dp_cp, "dp": dp_cp // size["cp"]}


def formed_groups(groups: Groups) -> Sizes:
    return {axis: getattr(groups, axis).size for axis in AXES}
