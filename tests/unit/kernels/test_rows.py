import pytest
import torch
from torch import Tensor
from troll_kernels.transform import IDENTITY, Transform

from tests.unit.kernels.implementations import both, kernel

# numpy under the interpreter remarks on infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = float("inf")


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits, some of them -inf."""
    x = 3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[:, 1::7] = -INF
    return x.to(dtype)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", [IDENTITY, Transform(0.7), Transform(1.3, cap=4.0)])
@pytest.mark.parametrize(
    ("width", "held", "tile"), [(4500, 4512, 32), (4096, 4096, 128), (33, 48, 32), (5, 5, 128)]
)
def test_against_float64(implementation, dtype, transform, width, held, tile):
    x, target = rows(3, held, dtype=dtype), torch.tensor([width - 1, 0, 1])
    got = implementation("rows").row_statistics(x, width, target, transform, tile)
    logits = transform.apply(x[:, :width].double())
    p = logits.softmax(1)
    torch.testing.assert_close(got.lse, logits.logsumexp(1), rtol=1e-6, atol=2e-6)
    entropy = torch.special.entr(p).sum(1)
    torch.testing.assert_close(got.lse - got.mean, entropy, rtol=1e-6, atol=5e-6)
    assert torch.equal(got.target, x[torch.arange(3), target].float())
    tiles = torch.nn.functional.pad(x[:, :width].float(), (0, -width % tile), value=-INF)
    assert torch.equal(got.tile_max, tiles.unflatten(1, (-1, tile)).amax(2))


@both
@pytest.mark.parametrize("width", [8, 2080])
def test_probabilities_are_not_rounded_as_their_logits_are(implementation, width):
    """Units in the last place of the logits are 2e-6; masses of a prefix, cut at 1 - 1e-5, are finer."""
    x = rows(3, width) - 1.0
    x[:, 0] = 20.3
    lse = implementation("rows").row_statistics(x, width, torch.tensor([0, 0, 0]), IDENTITY, 32).lse
    torch.testing.assert_close(lse, x.double().logsumexp(1), rtol=0.0, atol=3e-7)


@both
def test_shards_combine(implementation):
    row_statistics = implementation("rows").row_statistics
    x, target = rows(2, 300), torch.tensor([10, 290])
    whole = row_statistics(x, 300, target, IDENTITY, 32)
    parts = [
        row_statistics(x[:, start : start + 150].contiguous(), 150, target - start, IDENTITY, 32)
        for start in (0, 150)
    ]
    local = torch.stack([part.lse for part in parts])
    lse = local.logsumexp(0)
    mean = sum((part.lse - lse).exp() * part.mean for part in parts)
    torch.testing.assert_close(lse, whole.lse)
    torch.testing.assert_close(mean.float(), whole.mean)
    assert torch.equal(torch.maximum(parts[0].target, parts[1].target), whole.target)


@both
def test_a_shard_without_a_possible_token_adds_nothing(implementation):
    row_statistics = implementation("rows").row_statistics
    for logits, width in ((torch.zeros(2, 16), 0), (torch.full((2, 16), -INF), 16)):
        got = row_statistics(logits, width, torch.tensor([3, -5]), IDENTITY, 32)
        assert got.lse.tolist() == got.target.tolist() == [-INF, -INF]
        assert got.mean.tolist() == [0.0, 0.0]


@both
@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("place", [0, 2047, 2049])
def test_bad_logits_show_in_lse(implementation, bad, place):
    x = rows(2, 2050)
    x[1, place] = bad
    lse = implementation("rows").row_statistics(x, 2050, torch.tensor([0, 0]), IDENTITY, 32).lse
    assert lse.isfinite().tolist() == [True, False]
    assert lse[1] != -INF


@both
def test_no_rows(implementation):
    got = implementation("rows").row_statistics(
        torch.zeros(0, 70), 70, torch.zeros(0, dtype=torch.int64), IDENTITY, 32
    )
    assert got.lse.shape == (0,)
    assert got.tile_max.shape == (0, 3)


def test_rows_that_are_not_aligned_are_slow_and_say_so():
    target = torch.zeros(1, dtype=torch.int64)
    with pytest.warns(UserWarning, match="rows of 33 logits, not a multiple of 16"):
        kernel("rows").row_statistics(torch.zeros(1, 33), 33, target, IDENTITY, 32)
