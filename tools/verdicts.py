"""Measure math_verify on answers with known verdicts: python tools/verdicts.py [FILE.jsonl ...]

Each line of a file has gold, answer, right, style and half (tests/unit/rewards/verdicts/README.md). Printed
for each half: false accepts (wrong answers that earn a reward), false rejects (right ones that earn none).
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from megatron_troll.config import RewardConfig
from megatron_troll.rewards.reward import Reward, build
from megatron_troll.types import Prompt

PAIRS = Path(__file__).parents[1] / "tests" / "unit" / "rewards" / "verdicts"


@dataclass(frozen=True)
class Pair:
    """An answer to a question with this gold answer, and whether it is right."""

    gold: str
    answer: str
    right: bool
    style: str
    half: str


@dataclass(frozen=True)
class Judged:
    pair: Pair
    accepted: bool

    @property
    def mistake(self) -> str | None:
        if self.accepted == self.pair.right:
            return None
        return "false accept" if self.accepted else "false reject"


def read(path: Path) -> list[Pair]:
    return [Pair(**json.loads(line)) for line in path.read_text().splitlines()]


def judged(pairs: Iterable[Pair], verifier: Reward) -> Iterator[Judged]:
    for pair in pairs:
        yield Judged(pair, verifier(pair.answer, Prompt("p", (), pair.gold)) > 0)


def counts(found: Sequence[Judged]) -> str:
    """False accepts of the wrong answers and false rejects of the right ones."""
    right = sum(one.pair.right for one in found)
    mistakes = [one.mistake for one in found]
    accepts, rejects = mistakes.count("false accept"), mistakes.count("false reject")
    return f"{accepts:4} of {len(found) - right:4} {rejects:6} of {right:4}"


def grouped(found: Iterable[Judged], *fields: str) -> dict[str, list[Judged]]:
    groups: dict[str, list[Judged]] = defaultdict(list)
    for one in found:
        groups[", ".join(getattr(one.pair, field) for field in fields)].append(one)
    return dict(groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(PAIRS.glob("*.jsonl")))
    parser.add_argument("--wrong", choices=["seen", "unseen"], help="name the mistakes of this half")
    parser.add_argument("--styles", action="store_true", help="count by style as well")
    arguments = parser.parse_args()
    verifier = build(RewardConfig(name="math_verify"))
    print(f"math-verify {version('math-verify')}")
    print(f"{'':40} {'false accepts':>12} {'false rejects':>14}")
    for path in arguments.files:
        found = list(judged(read(path), verifier))
        for half, some in grouped(found, "half").items():
            print(f"{path.name + ', ' + half:40} {counts(some)}")
        for style, some in grouped(found, "style", "half").items() if arguments.styles else ():
            print(f"  {style:38} {counts(some)}")
        for one in found:
            if one.mistake and one.pair.half == arguments.wrong:
                print(f"  {one.mistake}: {one.pair.gold!r} {one.pair.answer!r}")


if __name__ == "__main__":
    main()
