"""A study as a page of Markdown: comparisons, results, and claims that were not confirmed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

from megatron_troll.study.outcomes import Interval, collapse_step, difference, mean, outcome
from megatron_troll.study.plan import Cell, Claim, Outcome, StudyPlan
from megatron_troll.study.results import RunResult

DIGITS: dict[Outcome, int] = {
    "final_success": 3,
    "steps_to_threshold": 1,
    "jitter2": 4,
    "entropy": 3,
    "collapses": 2,
}
SHOWN, OPPOSITE, NOT_SHOWN = "as claimed", "**the opposite**", "did not show"


def markdown(plan: StudyPlan, results: Mapping[Cell, RunResult], source: str, picture: str | None) -> str:
    """The whole page. `source`: the study file as the page names it; `picture`: path relative to the page,
    with {setting} in it, which becomes <setting>-survival for the second picture; None: no pictures."""
    study = plan.study
    done = [results[cell] for cell in plan.cells() if cell in results]
    lines = [
        f"# Study: {study.name}",
        "",
        f"Made from `{source}` and its results by `mtroll study report {source}`; do not edit.",
        "",
        *_what_ran(plan, done),
        "",
        "## Confirmatory comparisons",
        "",
        "These were written in the study file before its first run; nothing else here is a test. `a - b`",
        "is over paired seeds, with a 95 % bootstrap interval over seeds; over five, such intervals are",
        "somewhat too narrow. About one in twenty such intervals misses the true value by chance.",
        f"Run before they were written: {study.pilots or 'nothing'}",
        "",
        *_comparisons(plan, done),
    ]
    for setting in plan.settings:
        of_setting = [result for result in done if result.setting == setting]
        if of_setting:
            lines += ["", *_setting(plan, setting, of_setting)]
            lines += [] if picture is None else _pictures(plan, setting, of_setting, picture)
    return "\n".join([*lines, ""])


def collapsing(plan: StudyPlan, done: Iterable[RunResult]) -> set[str]:
    """The settings in which a run collapsed; only they get survival curves."""
    return {result.setting for result in done if collapse_step(result, plan.study) is not None}


def _pictures(plan: StudyPlan, setting: str, done: Sequence[RunResult], picture: str) -> list[str]:
    lines = ["", f"![{setting}]({picture.format(setting=setting)})"]
    if setting not in collapsing(plan, done):
        return lines
    path = picture.format(setting=f"{setting}-survival")
    return [*lines, "", "Survival: the share of runs that have not collapsed.", "", f"![Survival]({path})"]


def _what_ran(plan: StudyPlan, done: Sequence[RunResult]) -> list[str]:
    study, planned = plan.study, len(list(plan.cells()))
    seconds = sum(result.seconds for result in done)
    dates = sorted({result.date for result in done})
    days = " to ".join(dict.fromkeys(dates[:1] + dates[-1:]))
    lines = [
        f"{len(plan.methods)} methods x {len(study.seeds)} seeds x {len(plan.settings)} settings: "
        f"{len(done)} of {planned} runs finished"
        + (f", {days}, {seconds / 3600:.1f} h of runs in all." if dates else "."),
        "",
        "| setting | rollout batches | responses | optimizer steps | tokens | learning rate | staleness |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in plan.settings:
        config = plan.config(Cell(setting, next(iter(plan.methods)), study.seeds[0]))
        tokens = [result.tokens for result in done if result.setting == setting]
        lines.append(
            f"| {setting} | {config.train.steps} | "
            f"{config.train.steps * config.rollout.prompts * config.rollout.samples:,} | "
            f"{config.train.steps * config.train.updates} in {config.train.epochs} epochs per batch | "
            + (f"{min(tokens):,} to {max(tokens):,}" if tokens else "-")
            + f" | {config.policy.optimizer.lr:g} | {config.rollout.staleness} |"
        )
    return [
        *lines,
        "",
        "All methods of a setting get the same rollout batches, responses and optimizer steps; sampled",
        "tokens differ as far as responses differ in length. A critic or a reference model costs its",
        "forwards on top.",
        "",
        f"- Steps to {study.threshold:g}: rollout batches until held-out success reaches it; a run that",
        "  never does counts as its number of batches plus 1.",
        "- Jitter2: mean |second difference| of held-out success over rollout batches.",
        "- Entropy: of the last batch, nats per token.",
        f"- Collapse: the last held-out success is below {study.collapse:g} of the run's best. It happens",
        "  at the step from which on success stays below.",
    ]


def _comparisons(plan: StudyPlan, done: Sequence[RunResult]) -> list[str]:
    if not plan.study.comparisons:
        return ["None: this study only describes."]
    head = ["| claim | setting | outcome | a | b | claimed | a - b | verdict |", "|---" * 8 + "|"]
    rows, missing = [], []
    for comparison in plan.study.comparisons:
        found = compare(comparison, plan, done)
        verdict = "not run" if found is None else verdict_of(comparison, found)
        text = "-" if found is None else _interval(found, comparison.outcome, signed=True)
        c = comparison
        rows.append(
            f"| {c.claim} | {c.setting} | {_name(c.outcome, plan)} | {c.a} | {c.b} | {c.expect} | {text} | "
            f"{verdict} |"
        )
        if verdict in (NOT_SHOWN, OPPOSITE):
            how = "did not show" if verdict == NOT_SHOWN else "came out the other way round"
            missing.append(f"- {c.claim} ({c.setting}, {_name(c.outcome, plan)}): {how}.")
    said = ["", "Claims that did not show at this scale:", "", *missing] if missing else []
    return [*head, *rows, *said]


def compare(comparison: Claim, plan: StudyPlan, done: Iterable[RunResult]) -> Interval | None:
    """a - b of a comparison; None if there are fewer than two pairs of runs."""
    of_setting = [result for result in done if result.setting == comparison.setting]
    a, b = ([r for r in of_setting if r.method == name] for name in (comparison.a, comparison.b))
    return difference(a, b, lambda result: outcome(comparison.outcome, result, plan.study))


def verdict_of(comparison: Claim, found: Interval) -> str:
    """Verdict: whether the interval lies on the claimed side of 0, on the other side, or contains 0."""
    if found.low <= 0 <= found.high:
        return NOT_SHOWN
    return SHOWN if (found.low > 0) == (comparison.expect == "higher") else OPPOSITE


def _setting(plan: StudyPlan, setting: str, done: Sequence[RunResult]) -> list[str]:
    baseline = plan.study.baseline or next(iter(plan.methods))
    names: tuple[Outcome, ...] = get_args(Outcome)
    by_method = {method: [r for r in done if r.method == method] for method in plan.methods}

    def cells(method: str, show: Callable[[Sequence[RunResult], Outcome], str]) -> str:
        return " | ".join(show(by_method[method], name) for name in names)

    def level(runs: Sequence[RunResult], name: Outcome) -> str:
        values = [outcome(name, run, plan.study) for run in runs]
        return _level(values, name) if values else "-"

    def apart(runs: Sequence[RunResult], name: Outcome) -> str:
        found = difference(runs, by_method[baseline], lambda run: outcome(name, run, plan.study))
        return "-" if found is None else _interval(found, name, signed=True)

    head = ["| method | " + " | ".join(_name(name, plan) for name in names) + " |", "|---" * 6 + "|"]
    return [
        f"## {setting}",
        "",
        "Mean over seeds, with a 95 % bootstrap interval. Descriptive, not tests.",
        "",
        *head,
        *(f"| {method} | {cells(method, level)} |" for method in plan.methods if by_method[method]),
        "",
        f"Paired differences from {baseline}:",
        "",
        *head,
        *(
            f"| {method} | {cells(method, apart)} |"
            for method in plan.methods
            if by_method[method] and method != baseline
        ),
    ]


def _level(values: Sequence[float], name: Outcome) -> str:
    if name == "collapses":
        return f"{sum(values):.0f} of {len(values)}"
    return _interval(mean(values), name, signed=False)


def _interval(found: Interval, name: Outcome, signed: bool) -> str:
    form = f"{'+' if signed else ''}.{DIGITS[name]}f"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _name(name: Outcome, plan: StudyPlan) -> str:
    words = {"steps_to_threshold": f"steps to {plan.study.threshold:g}", "jitter2": "Jitter2"}
    return words.get(name, name.replace("_", " "))
