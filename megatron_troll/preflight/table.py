"""The reports of all nodes in one table: what they agree on once, the rest node by node."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from megatron_troll.preflight.finding import Finding
from megatron_troll.preflight.run import Report

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def table(reports: Sequence[Report]) -> Table:
    """A row for each thing that was found, with the nodes that found it."""
    shown = Table("check", "", "nodes", "found", "what to do", box=None)
    for finding, nodes in grouped(reports):
        where = "all" if len(nodes) == len(reports) else ", ".join(nodes)
        level = Text(finding.level, STYLES[finding.level])
        shown.add_row(finding.check, level, *map(Text, (where, finding.text, finding.advice)))
    return shown


def grouped(reports: Sequence[Report]) -> list[tuple[Finding, list[str]]]:
    """Check by check, in the order of the first node."""
    nodes: dict[Finding, list[str]] = {}
    for report in reports:
        for finding in report.findings:
            nodes.setdefault(finding, []).append(report.node)
    order = list(dict.fromkeys(finding.check for finding in nodes))
    return sorted(nodes.items(), key=lambda item: order.index(item[0].check))
