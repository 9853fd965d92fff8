"""Tensors come out of buckets as they went in, within the memory that was promised."""

import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_troll.weights.buckets import TensorBucket, buckets

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


def unpacked(bucket: TensorBucket) -> Iterator[tuple[str, Tensor]]:
    """As a receiver reads it, without gaps."""
    start = 0
    for piece in bucket.pieces:
        assert piece.start == start
        start = piece.end
        yield piece.name, bucket.flat[piece.start : piece.end].view(piece.dtype).view(piece.shape).clone()
    assert start == len(bucket.flat)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=12), st.integers(1, 200))
def test_everything_comes_through(sizes: list[tuple[tuple[int, ...], torch.dtype]], max_bytes: int) -> None:
    sent = [(f"t{i}", torch.randn(shape).to(dtype)) for i, (shape, dtype) in enumerate(sizes)]
    found = []
    for bucket in buckets(iter(sent), max_bytes):
        assert len({piece.dtype for piece in bucket.pieces}) == 1
        not_empty = [piece for piece in bucket.pieces if piece.end > piece.start]
        assert bucket.flat.nbytes <= max_bytes or len(not_empty) == 1
        found += unpacked(bucket)
    assert [name for name, _ in found] == [name for name, _ in sent]
    for (_, before), (_, after) in zip(sent, found):
        assert before.dtype == after.dtype
        assert torch.equal(before.float(), after.float())


def test_two_buffers_are_held() -> None:
    pieces = [(f"t{i}", torch.full((100,), float(i))) for i in range(40)]
    seen = [bucket.flat.data_ptr() for bucket in buckets(iter(pieces), 1000)]
    assert len(seen) == 20
    assert len(set(seen)) == 2


def test_one_bucket_is_readable_while_the_next_is_filled() -> None:
    pieces = [(f"t{i}", torch.full((100,), float(i))) for i in range(6)]
    before: TensorBucket | None = None
    for i, bucket in enumerate(buckets(iter(pieces), 400)):
        if before is not None:
            assert before.flat.view(torch.float32).tolist() == [float(i - 1)] * 100
        before = bucket


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_that_is_not_contiguous(dtype: torch.dtype) -> None:
    tensor = torch.arange(12.0).view(3, 4).to(dtype).t()
    (bucket,) = buckets([("t", tensor)], 1)
    assert torch.equal(next(unpacked(bucket))[1].float(), tensor.float())


def test_two_buckets_and_the_tensor_in_hand_are_two_buckets() -> None:
    """Counted over all storages that are alive, while one bucket is read and the next is filled."""
    limit, held, peak = 4000, 0, 0

    def tracked(tensor: Tensor) -> Tensor:
        nonlocal held, peak
        size = tensor.untyped_storage().nbytes()
        held += size
        peak = max(peak, held)
        weakref.finalize(tensor.untyped_storage(), freed, size)
        return tensor

    def freed(size: int) -> None:
        nonlocal held
        held -= size

    def allocate(size: int, device: torch.device) -> Tensor:
        return tracked(torch.empty(size, dtype=torch.uint8, device=device))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i in range(30):
            yield f"t{i}", tracked(torch.full((50 + 10 * (i % 20),), float(i)))

    total, before = 0, None
    for bucket in buckets(tensors(), limit, allocate):
        total += bucket.flat.nbytes
        assert before is None or before.pieces
        before = bucket
    assert total == sum(4 * (50 + 10 * (i % 20)) for i in range(30))
    assert 1.7 * limit < peak <= 2 * limit
