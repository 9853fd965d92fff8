"""All checks on this node, including those with the other nodes, and the verdict that all nodes share."""

import datetime
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text

from megatron_troll.config import Config, RunPaths
from megatron_troll.parallel.groups import Group, joined
from megatron_troll.preflight import node, packages, serving, together
from megatron_troll.preflight.finding import Finding
from megatron_troll.preflight.serving import NodeServers

TIMEOUT = datetime.timedelta(seconds=120)


@dataclass(frozen=True)
class Needs:
    """Requirements of a run on this node: disk space at `folder`; GPUs (0: it runs without) and memory of
    each; those of its servers, if it serves."""

    config: Config
    disk_bytes: int
    gpus: int
    gpu_bytes: int
    servers: NodeServers | None

    @property
    def folder(self) -> Path:
        return RunPaths.of(self.config).root


@dataclass(frozen=True)
class Report:
    """The findings of one node."""

    node: str
    findings: tuple[Finding, ...]


def examine(needs: Needs) -> list[Report]:
    """Run all checks and return one report per node, in rank order, on every rank. One process runs on each
    node, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment; without RANK there is only
    this node. Blocks.

    Raises torch.distributed.DistError if the nodes cannot reach each other.
    """
    with joined(TIMEOUT) as world:
        findings = (*_alone(needs), *_together(needs, world))
        return world.all_gather_objects(Report(_name(), findings))


def _alone(needs: Needs) -> Iterator[Finding]:
    yield from packages.findings(needs.gpus > 0)
    yield node.gpus(needs.gpus)
    yield from node.gpu_memory(node.free_memory() if needs.gpus else [], needs.gpu_bytes)
    yield node.disk(needs.folder, needs.disk_bytes)
    yield node.names()
    if needs.servers is not None:
        yield from serving.findings(needs.servers)
    if needs.config.own_servers:
        yield from serving.scales(needs.config)


def _together(needs: Needs, world: Group) -> Iterator[Finding]:
    yield together.shared_folder(world, needs.folder)
    yield together.clock(world)
    group, device = world, torch.device("cpu")
    if needs.gpus and world.size > 1:
        handle, device = dist.new_group(backend="nccl"), torch.device("cuda", 0)
        assert isinstance(handle, dist.ProcessGroup)
        group = Group(handle, world.rank, world.size)
    yield from together.all_reduce(
        group, device, os.environ.get("NCCL_SOCKET_IFNAME", "the default interface")
    )


def _name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def failures(reports: Sequence[Report]) -> list[str]:
    """One line for each failed check."""
    return [
        f"{report.node}: {finding.check}: {finding.text}; {finding.advice}"
        for report in reports
        for finding in report.findings
        if finding.level == "failed"
    ]


STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def table(reports: Sequence[Report]) -> Table:
    """A table with one row for each finding, and the nodes that have it."""
    shown = Table("check", "", "nodes", "found", "what to do", box=None)
    for finding, nodes in grouped(reports):
        where = "all" if len(nodes) == len(reports) else ", ".join(nodes)
        level = Text(finding.level, STYLES[finding.level])
        shown.add_row(finding.check, level, *map(Text, (where, finding.text, finding.advice)))
    return shown


def grouped(reports: Sequence[Report]) -> list[tuple[Finding, list[str]]]:
    """Findings with their nodes, check by check, in the order of the first node."""
    nodes: dict[Finding, list[str]] = {}
    for report in reports:
        for finding in report.findings:
            nodes.setdefault(finding, []).append(report.node)
    order = list(dict.fromkeys(finding.check for finding in nodes))
    return sorted(nodes.items(), key=lambda item: order.index(item[0].check))
