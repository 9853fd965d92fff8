"""Views of stored rollouts: a listing in the terminal, and one HTML page with filters."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from megatron_troll.observe.rollouts import Sample, read_step, stored_steps
from megatron_troll.observe.run_folder import RunFolderError
from megatron_troll.system import write_atomic
from megatron_troll.terminal import shown

SORTS: dict[str, Callable[[Sample], float]] = {
    "reward": lambda sample: sample.reward,
    "advantage": lambda sample: sample.advantage,
    "length": lambda sample: len(sample.tokens),
    "logp": lambda sample: sample.mean_logp,
}
PAGE_TOKENS = 400_000
# Terminal colour of a token whose -log p is at most the bound, in nats.
SHADES = ((0.1, "default"), (0.7, "yellow"), (2.3, "dark_orange"), (float("inf"), "bold red"))


def ordered(samples: Sequence[Sample], sort: str) -> list[Sample]:
    """Sort samples, largest first; `-reward`: smallest first. Raises RunFolderError for an unknown sort."""
    key = SORTS.get(sort.removeprefix("-"))
    if key is None:
        raise RunFolderError(f"cannot sort rollouts by {sort!r}; known: {', '.join(SORTS)}, or -NAME")
    return sorted(samples, key=key, reverse=not sort.startswith("-"))


def browse(
    root: Path, console: Console, step: int | None = None, sort: str = "reward", limit: int = 20
) -> None:
    """List `limit` rollouts of a step (default: the last stored one). Tokens are coloured by their log-prob,
    unlikely ones in warmer colours; each rollout's least likely token is listed with its log-prob."""
    steps = stored_steps(root)
    step = steps[-1] if step is None else step
    samples = ordered(list(read_step(root, step)), sort)
    console.print(Text(shown(f"{root}, step {step} of {steps[0]}-{steps[-1]}: {len(samples):,} rollouts")))
    prompt = None
    for sample in samples[:limit]:
        if sample.prompt != prompt:
            prompt = sample.prompt
            console.print(Text(shown(f"\n{sample.question}\nexpected: {sample.answer}"), style="bold"))
        console.print(_facts(sample))
        console.print(Padding(shaded(sample), (0, 0, 0, 2), expand=False))


def _facts(sample: Sample) -> Text:
    """One line about a rollout: name, reward, advantage, mean log-prob, least likely token."""
    least = min(range(len(sample.logp)), key=sample.logp.__getitem__, default=None)
    worst = "" if least is None else f", least {sample.tokens[least]!r} {sample.logp[least]:.2f}"
    reward = Text(f"reward {sample.reward:g}", style="bold")
    rest = f", adv. {sample.advantage:.2f}, {shown(sample.finish)}, {len(sample.tokens)} tokens"
    logp = f", logp {sample.mean_logp:.3f}"
    name = shown(f"{sample.prompt}#{sample.sample}: ")
    return Text.assemble(name, reward, Text(rest + logp + worst, style="dim"))


def shaded(sample: Sample) -> Text:
    """The answer with one style per token; tokens that carry no loss are dim."""
    text = Text()
    for token, logp, keep in zip(sample.tokens, sample.logp, sample.mask, strict=True):
        style = next((style for bound, style in SHADES if -logp <= bound), "reverse")  # reverse: NaN
        text.append(shown(token), style=style if keep else "dim")
    return text


def html(root: Path, output: Path, step: int | None = None) -> None:
    """Write a self-contained page of the run's rollouts (or one step's), with filters by step, reward and
    text. If there are more than PAGE_TOKENS tokens (about 10 MB), the page has only every n-th rollout, and
    shows how many there are."""
    steps = stored_steps(root) if step is None else [step]
    samples = [sample for one in steps for sample in read_step(root, one)]
    every = max(1, -(-sum(len(sample.tokens) for sample in samples) // PAGE_TOKENS))
    shown = [asdict(sample) for sample in samples[::every]]
    data = {"run": root.resolve().name, "total": len(samples), "samples": shown}
    # Inside <script>, only "<" can start a tag or a comment.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = files("megatron_troll.observe").joinpath("rollouts.html").read_text(encoding="utf-8")
    write_atomic(output, template.replace('"ROLLOUTS"', text))
