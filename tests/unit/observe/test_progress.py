"""The same calls make a panel on a terminal and lines elsewhere."""

import io
import re

from rich.console import Console

from megatron_troll.observe.progress import LivePanel, LogLines, Progress, duration, open_progress

FIRST = {"success": 0.25, "held_out_success": 0.4, "kl_before": 0.05, "kl_after": 0.04, "projected": 0.125}
SECOND = {
    "success": 0.5,
    "entropy": 1.5,
    "tokens_per_s": 12345.6,
    "seconds": 3.21,
    "seconds/forward_backward": 2.34,
}


def drive(progress: Progress) -> None:
    with progress, progress.phase("generation"):
        progress.step(1, FIRST, eta=62)
        progress.step(2, SECOND, eta=3723)
        progress.say("[saved] step 2")


def test_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    progress = open_progress(Console(file=out, width=40), steps=30, title="demo")
    assert isinstance(progress, LogLines)
    drive(progress)
    assert out.getvalue().splitlines() == [
        "step  1/30 | success 0.250 | KL before 5.0e-02 | after 4.0e-02 | 12.5% projected | ETA 1:02 | "
        "held-out success 0.400",
        "step  2/30 | success 0.500 | entropy 1.500 | 12,346 tokens/s | 3.2 s | ETA 1:02:03",
        "[saved] step 2",
    ]


def test_panel_on_a_terminal_keeps_the_last_evaluation() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None, _environ={"TERM": "xterm"})
    progress = open_progress(console, steps=30, title="demo")
    assert isinstance(progress, LivePanel)
    drive(progress)
    panel = out.getvalue().split("╭")[-1]
    for text in ("demo", "step  2/30", "ETA 1:02:03", "0.500", "forward backward", "2.34 s", "stopped"):
        assert text in panel
    assert re.search(r"held-out success +0\.400", panel)
    assert re.search(r"KL after projection +4\.0e-02 nats", panel)
    assert "[saved] step 2" in out.getvalue()


def test_a_finished_run_says_done() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None, _environ={"TERM": "xterm"})
    with open_progress(console, steps=1, title="demo") as progress:
        progress.step(1, {}, eta=0)
    assert "done" in out.getvalue().split("╭")[-1]


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]
