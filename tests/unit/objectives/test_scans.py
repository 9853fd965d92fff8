import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_troll.objectives.budget import before, places, scan, starts

numbers = st.floats(-100, 100, width=32)
packed = st.lists(st.lists(numbers, max_size=9), max_size=5)


def owners(responses: list[list[float]]) -> torch.Tensor:
    return torch.tensor([i for i, r in enumerate(responses) for _ in r], dtype=torch.int64)


@settings(deadline=None)
@given(packed)
def test_running_sums_and_minima_stay_inside_a_response(responses):
    values = torch.tensor([x for r in responses for x in r], dtype=torch.float64)
    owner = owners(responses)
    sums = [sum(r[: i + 1]) for r in responses for i in range(len(r))]
    minima = [min(r[: i + 1]) for r in responses for i in range(len(r))]
    assert torch.allclose(scan(values, owner, torch.add), torch.tensor(sums, dtype=torch.float64))
    assert scan(values, owner, torch.minimum).tolist() == minima
    assert places(owner).tolist() == [i for r in responses for i in range(len(r))]
    assert starts(owner).tolist() == [i == 0 for r in responses for i in range(len(r))]
    assert before(values, owner, 7.0).tolist() == [x for r in responses for x in ([7.0, *r])[: len(r)]]


def test_an_infinity_stays_in_its_response():
    values, owner = torch.tensor([float("inf"), 1.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])
    assert scan(values, owner, torch.add).tolist() == [float("inf"), float("inf"), 2.0, 5.0]
