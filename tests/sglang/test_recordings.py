"""What the fake server of the unit tests answers is what a real one does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_troll.rollout.sglang.wire import part_of
from tests.sglang.farm import Farm
from tests.sglang.recordings import EXCHANGES, ask_of, form, record, recorded


@pytest.fixture(scope="module")
def answers(farm: Farm, folder: Path) -> dict[str, Any]:
    """Of a server that has done nothing yet."""
    server = farm.start(folder).wait_until_healthy()
    try:
        return record(server.url, folder)
    finally:
        server.kill()


@pytest.mark.parametrize("name", [exchange.name for exchange in EXCHANGES])
def test_a_recording_matches_the_real_server(name: str, answers: dict[str, Any]) -> None:
    kept, real = recorded()[name], answers[name]
    assert (kept["path"], kept["status"]) == (real["path"], real["status"])
    assert form(kept["content"]) == form(real["content"])


@pytest.mark.parametrize("name", ["generate", "generate_flat_json", "generate_nested_json"])
def test_the_recorded_tokens_are_drawn_again(name: str, answers: dict[str, Any]) -> None:
    kept, real = (part_of(all_of[name]["content"], ask_of()) for all_of in (recorded(), answers))
    assert real.ids.tolist() == kept.ids.tolist()
    np.testing.assert_allclose(real.logp, kept.logp, atol=1e-4)
    assert kept.topk is not None
    assert real.topk is not None
    assert real.topk.ids.tolist() == kept.topk.ids.tolist()
    np.testing.assert_allclose(real.topk.logp, kept.topk.logp, atol=1e-4)


def test_what_is_refused_is_told_in_the_same_words(answers: dict[str, Any]) -> None:
    for name, answer in recorded().items():
        if answer["status"] >= 400:
            assert answers[name]["content"] == answer["content"]
