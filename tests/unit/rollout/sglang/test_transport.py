"""Buckets in memory that servers map."""

import torch

from megatron_troll.rollout.sglang.transport import shared, shared_payload
from megatron_troll.weights.buckets import TensorBucket, allocated, buckets


def moved_by_sending(flat: torch.Tensor) -> bool:
    """Whether there are two copies of a bucket while it is made ready for servers."""
    before = flat.data_ptr()
    shared_payload(TensorBucket((), flat))
    return flat.data_ptr() != before


def test_a_bucket_is_filled_where_servers_map_it() -> None:
    (bucket,) = buckets([("weight", torch.arange(6.0))], 64, shared)
    assert bucket.flat.view(torch.float32).tolist() == list(range(6))
    assert not moved_by_sending(bucket.flat)
    assert moved_by_sending(allocated(64, torch.device("cpu")))
