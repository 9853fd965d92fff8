"""Progress display: a live panel on a terminal, otherwise one line per step; only on rank 0."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_troll.system import drop
from megatron_troll.terminal import shown

# Rows of the panel: label, field of metrics.jsonl, format, unit.
SHOWN = (
    ("success", "success", "{:.3f}", ""),
    ("held-out success", "held_out_success", "{:.3f}", ""),
    ("loss", "loss", "{:.4f}", ""),
    ("KL before projection", "kl_before", "{:.1e}", "nats"),
    ("KL after projection", "kl_after", "{:.1e}", "nats"),
    ("projected", "projected", "{:.1%}", "of tokens"),
    ("entropy", "entropy", "{:.3f}", "nats"),
    ("gradient norm", "grad_norm", "{:.3f}", ""),
    ("speed", "tokens_per_s", "{:,.0f}", "tokens/s"),
    ("MFU", "mfu", "{:.1%}", ""),
)
# Parts of a log line: field and format. All other fields are in metrics.jsonl.
LOGGED = (
    ("success", "success {:.3f}"),
    ("loss", "loss {:7.4f}"),
    ("kl_before", "KL before {:.1e}"),
    ("kl_after", "after {:.1e}"),
    ("projected", "{:5.1%} projected"),
    ("entropy", "entropy {:.3f}"),
    ("tokens_per_s", "{:,.0f} tokens/s"),
    ("seconds", "{:.1f} s"),
)
PHASE_WIDTH = 16


class Progress(Protocol):
    """Progress display, entered for the whole run."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def phase(self, name: str) -> AbstractContextManager[None]:
        """Show `name` as the current phase until the block ends."""
        ...

    def step(self, step: int, metrics: Mapping[str, float], eta: float) -> None:
        """Show the figures of a finished step; `eta` in seconds."""
        ...

    def say(self, text: str) -> None:
        """Print a separate line: a warning, a checkpoint, the next command."""
        ...


class Silent:
    """Shows nothing, for every rank except 0."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def step(self, step: int, metrics: Mapping[str, float], eta: float) -> None: ...

    def say(self, text: str) -> None: ...


class LogLines(Silent):
    """Prints one plain line per step, never wrapped and without colours."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps

    def step(self, step: int, metrics: Mapping[str, float], eta: float) -> None:
        parts = [f"step {of(step, self._steps)}"]
        parts += [form.format(metrics[name]) for name, form in LOGGED if name in metrics]
        parts += [f"ETA {duration(eta)}"]
        if "held_out_success" in metrics:
            parts += [f"held-out success {metrics['held_out_success']:.3f}"]
        self.say(" | ".join(parts))

    def say(self, text: str) -> None:
        show(self._console, text)


class Terminal(Console):
    """A console that reports a pipe without a reader like any other failure; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        raise


def show(console: Console, text: str) -> None:
    """Print a line, never wrapped, its control characters shown. If it cannot be written, because the reader
    of a pipe has gone (`mtroll train ... | head`) or a disk is full, this is said on stderr, and the rest of
    stdout is dropped: a run does not end because nobody reads it, and metrics.jsonl has its figures."""
    try:
        console.print(shown(text), markup=False, highlight=False, soft_wrap=True)
    except OSError as error:
        drop(sys.stdout)
        with suppress(OSError):
            sys.stderr.write(f"nothing is printed any longer: {error}\n")


class LivePanel:
    """One panel, redrawn in place; lines printed meanwhile appear above it. Figures that a step does
    not report, such as held-out success between evaluations, keep their last value."""

    def __init__(self, console: Console, steps: int, title: str) -> None:
        self._console = console
        self._steps = steps
        self._title = title
        self._step = 0
        self._eta: float | None = None
        self._phase = "starting"
        self._metrics: dict[str, float] = {}
        self._live = Live(console=console, get_renderable=self._panel, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._phase = "done" if self._step >= self._steps else "stopped"
        self._live.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    def step(self, step: int, metrics: Mapping[str, float], eta: float) -> None:
        self._step = step
        self._eta = eta
        self._metrics |= metrics

    def say(self, text: str) -> None:
        self._console.print(shown(text), markup=False, highlight=False)

    def _panel(self) -> Panel:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self._steps, completed=self._step, width=30)
        eta = "" if self._eta is None else f"ETA {duration(self._eta)}"
        phase = self._phase.replace("_", " ").ljust(PHASE_WIDTH)
        head.add_row(f"step {of(self._step, self._steps)}", bar, eta, Text(phase, style="cyan"))
        body = Table.grid(padding=(0, 4))
        body.add_row(_rows(figures(self._metrics), "bold"), _rows(phase_times(self._metrics), "magenta"))
        return Panel(Group(head, "", body), title=Text(self._title), title_align="left", expand=False)


def open_progress(console: Console, steps: int, title: str) -> Progress:
    """The panel if the terminal can redraw, otherwise log lines. For rank 0."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LivePanel(console, steps, title)
    return LogLines(console, steps)


def figures(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """(label, text, unit) of the SHOWN fields that `metrics` has."""
    return [(label, form.format(metrics[name]), unit) for label, name, form, unit in SHOWN if name in metrics]


def phase_times(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """(phase, text, unit) of every `seconds/<phase>`."""
    times = ((name.removeprefix("seconds/"), s) for name, s in metrics.items() if name.startswith("seconds/"))
    return [(phase.replace("_", " "), f"{seconds:.2f}", "s") for phase, seconds in times]


def of(step: int, steps: int) -> str:
    """Step counter such as " 7/30", equally wide at every step."""
    return f"{step:{len(str(steps))}}/{steps}"


def duration(seconds: float) -> str:
    """Format seconds: 62 -> 1:02, 3723 -> 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _rows(rows: list[tuple[str, str, str]], style: str) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(justify="right", style=style, min_width=7)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    return table
