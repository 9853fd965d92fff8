"""The store through which ranks find each other."""

from datetime import timedelta

import psutil
import torch.distributed as dist

from megatron_troll.parallel.groups import store_at


def test_a_store_listens_only_at_its_address() -> None:
    store = store_at("127.0.0.1", 0, 1, timedelta(seconds=10))
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == store.port] == ["127.0.0.1"]
    other = dist.TCPStore("127.0.0.1", store.port, timeout=timedelta(seconds=10))
    other.set("key", "value")
    assert store.get("key") == b"value"
