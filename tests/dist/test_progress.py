"""Long phases show signs of life: loading, decoding, training and exporting, piece by piece."""

from pathlib import Path

import pytest

from megatron_troll.config import Layout, Model, Sampling
from megatron_troll.mcore.schedule import accumulate, infer
from megatron_troll.mcore.shape import read_shape
from megatron_troll.training.build import open_policy
from megatron_troll.weights.export import stream
from megatron_troll.weights.families import table_of
from megatron_troll.weights.placement import held_parameters
from tests.dist.generation_worker import CONFIG, Case, generate, packed
from tests.dist.layout_table import Sizes
from tests.dist.tiny import started, write_reference

TOKENS = 8


@pytest.mark.parametrize(("world", "sizes"), [(1, {}), (2, {"pp": 2, "vpp": 2})])
def test_every_piece_of_a_long_phase_is_progress(
    world: int, sizes: Sizes, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write_reference(CONFIG, tmp_path)
    chunks = sizes.get("vpp", 1)
    for beats in request.getfixturevalue(f"ranks{world}").run(beats_of, sizes, str(tmp_path)):
        assert beats["load"] == beats["parameters"]
        assert beats["generate"] == chunks * TOKENS
        assert beats["infer"] == beats["accumulate"] == chunks * 2
        assert beats["stream"] >= beats["parameters"]


def beats_of(sizes: Sizes, folder: str) -> dict[str, int]:
    """How often each phase called `progress` on this rank, and how many parameters it holds."""
    counts: list[int] = []
    beats: dict[str, int] = {}
    layout, shape = Layout(**sizes), read_shape(folder)

    def note(name: str) -> None:
        beats[name] = len(counts) - sum(beats.values())

    with started(layout) as groups:
        config = Model(path=folder, dtype="fp32", layout=layout)
        model = open_policy(config, shape, groups, 0, 1, lambda: counts.append(1)).model
        note("load")
        rollouts = generate(model, Case(Sampling(max_tokens=TOKENS)))
        note("generate")
        batches = packed(rollouts, groups)
        infer(model, batches, lambda i, hidden: None)
        note("infer")
        accumulate(model, batches, lambda i, hidden: (hidden.sum(), None))
        note("accumulate")
        for _ in stream(model):
            pass
        note("stream")
    return beats | {"parameters": len(held_parameters(model, table_of(shape)))}
