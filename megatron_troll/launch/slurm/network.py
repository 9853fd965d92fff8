"""The choice of a job's network interfaces, made on every node because names differ between nodes."""

import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

INFINIBAND = Path("/sys/class/infiniband")


def address_of(interface: str) -> str:
    """The IPv4 address of an interface. Raises ValueError listing the interfaces that exist."""
    found = addresses()
    if interface not in found:
        raise ValueError(f"no interface {interface!r} with an IPv4 address here; there are {sorted(found)}")
    return found[interface]


def interface_with(address: str) -> str:
    """The interface that has an address. Raises ValueError."""
    for name, its in addresses().items():
        if its == address:
            return name
    raise ValueError(f"no interface here has the address {address}; there are {addresses()}")


def addresses() -> dict[str, str]:
    """Map each interface to its first IPv4 address."""
    found = {}
    for name, entries in psutil.net_if_addrs().items():
        ipv4 = [entry.address for entry in entries if entry.family == socket.AF_INET]
        if ipv4:
            found[name] = ipv4[0]
    return found


def fabric(root: Path = INFINIBAND) -> list[str]:
    """The host channel adapters with an active port of the highest rate on this node. Slower ones are
    for storage or management, but NCCL would use them too."""
    rates: dict[str, float] = {}
    for port in sorted(root.glob("*/ports/*")):
        if "ACTIVE" in (port / "state").read_text().split():
            name = port.parent.parent.name
            rate = float((port / "rate").read_text().split()[0])
            rates[name] = max(rate, rates.get(name, 0.0))
    return [name for name, rate in rates.items() if rate == max(rates.values())]


def environment(interface: str, given: Mapping[str, str], root: Path = INFINIBAND) -> dict[str, str]:
    """Environment variables that make gloo and NCCL use `interface` and the fabric's adapters, without those
    that `given` already sets."""
    chosen = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    if adapters := fabric(root):
        # With "=" NCCL matches exactly these names; without it they are prefixes.
        chosen["NCCL_IB_HCA"] = "=" + ",".join(adapters)
    return {name: value for name, value in chosen.items() if name not in given}
