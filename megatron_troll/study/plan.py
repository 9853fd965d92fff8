"""The plan of a study: its runs and the comparisons between them, written down before any run."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_troll.config import Config, ConfigError, Fraction, Natural, Node, nearest
from megatron_troll.config.document import YamlValue
from megatron_troll.config.load import assemble, extended, merge, overlay, parse_file, place, read
from megatron_troll.config.shape import Shape
from megatron_troll.config.validate import validate

Outcome = Literal["final_success", "steps_to_threshold", "jitter2", "entropy", "collapses"]
PATHS = ("base", "warm_start", "rollout_warm_start")
# Keys whose values are parts of configurations.
DELTAS = ("config", "settings", "methods")
NOTHING = YamlValue({}, "")


class Claim(Node):
    """One claim that the study tests."""

    claim: str = Field(description="who claims what, in a sentence")
    setting: str = Field(description="the setting in which a and b are compared")
    outcome: Outcome = Field(description="what is compared")
    a: str = Field(description="a method")
    b: str = Field(description="the method it is compared with")
    expect: Literal["higher", "lower"] = Field(
        description="whether a's outcome is claimed to be above or below b's"
    )


class Study(Node):
    """The keys of a study file except its parts of configurations: `config` (of every run), `settings` and
    `methods` (name -> part), which are merged over `base` in that order. A part may extend presets. A file
    may extend another: `config` is merged over the other's, any other key replaces it."""

    name: str = Field(description="runs lie in <runs>/<name>")
    runs: str = Field(default="runs", description="folder that holds the study's folder")
    base: str = Field(description="configuration file that every run starts from")
    warm_start: str | None = Field(
        default=None,
        description="configuration of `mtroll sft`: each seed then has its own demo task and warm start, "
        "which all of its runs share; null: the data and models of the base",
    )
    rollout_warm_start: str | None = Field(
        default=None, description="the same for models.rollout, on the seed's demo task; null: as it is there"
    )
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = Field(description="each with every method")
    threshold: Fraction = Field(default=0.7, description="held-out success of `steps_to_threshold`")
    collapse: Fraction = Field(
        default=0.5,
        description="a run collapsed if its last held-out success is below this share of its best one",
    )
    baseline: str | None = Field(
        default=None, description="the method that tables show differences from; default: the first"
    )
    comparisons: tuple[Claim, ...] = Field(default=(), description="the confirmatory ones, all of them")
    pilots: str | None = Field(
        default=None, description="what had been run before the comparisons were written; null: nothing"
    )


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    setting: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.setting}/{self.method}/seed-{self.seed}"


@dataclass(frozen=True)
class StudyPlan:
    """A study and the parts of its configurations."""

    study: Study
    common: YamlValue
    settings: dict[str, YamlValue]
    methods: dict[str, YamlValue]

    @property
    def root(self) -> Path:
        return Path(self.study.runs) / self.study.name

    def cells(self) -> Iterator[Cell]:
        """Every run, seed by seed, so that an interrupted study has complete pairs."""
        for seed in self.study.seeds:
            for setting in self.settings:
                for method in self.methods:
                    yield Cell(setting, method, seed)

    def folder(self, cell: Cell) -> Path:
        return self.of_seed(cell.seed) / cell.setting / cell.method

    def of_seed(self, seed: int) -> Path:
        return self.root / f"seed-{seed}"

    def config(self, cell: Cell) -> Config:
        """The configuration of one run. Raises ConfigError."""
        parts = self._parts(cell)
        config = assemble(parts)
        folder = self.folder(cell)
        changes = {"name": cell.method, "runs": str(folder.parent), "seed": cell.seed}
        started = {"warm-start": ("policy", "reference", "critic"), "rollout-warm-start": ("rollout",)}
        for name in self.warm_starts():
            changes |= self._data(cell.seed) | {
                f"models.{model}.path": str(self.of_seed(cell.seed) / name / "hf")
                for model in started[name]
                if getattr(config.models, model) is not None
            }
        return assemble(parts, _overrides(changes))

    def warm_starts(self) -> dict[str, str]:
        """Folder name of each warm start of a seed -> the file that configures it."""
        files = {"warm-start": self.study.warm_start, "rollout-warm-start": self.study.rollout_warm_start}
        return {name: file for name, file in files.items() if file is not None}

    def digest(self, cell: Cell) -> str:
        """Hash of what the study's files specify for a run, its seed and its warm starts, 16 hexadecimal
        digits. A result with another digest belongs to another run."""
        plain = {name: read(Path(file)).plain() for name, file in self.warm_starts().items()}
        said = [cell.seed, plain.get("warm-start"), overlay(self._parts(cell)).plain()]
        if "rollout-warm-start" in plain:
            said.append(plain["rollout-warm-start"])
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def warm_start(self, seed: int, name: str) -> Config:
        """The configuration of a seed's warm start, in the folder `name`; its model is the one of the same
        name among the seed's demo models. Raises ConfigError."""
        folder, parts = self.of_seed(seed), [read(Path(self.warm_starts()[name])), self.common]
        changes = self._data(seed) | {
            "name": name,
            "runs": str(folder),
            "seed": seed,
            "checkpoint.export": True,
            "models.policy.path": str(folder / "demo" / Path(assemble(parts).policy.path).name),
            "sft.files": [str(folder / "demo" / "data" / "warm.jsonl")],
        }
        return assemble(parts, _overrides(changes))

    def _parts(self, cell: Cell) -> list[YamlValue]:
        of_cell = (self.settings[cell.setting], self.methods[cell.method])
        return [read(Path(self.study.base)), self.common, *of_cell]

    def _data(self, seed: int) -> dict[str, object]:
        data = self.of_seed(seed) / "demo" / "data"
        return {"data.files": [str(data / "train.jsonl")], "data.held_out": [str(data / "held_out.jsonl")]}


def load_plan(path: str | Path) -> StudyPlan:
    """Read a study. Raises ConfigError if one of its runs has no valid configuration, if the methods of a
    setting do not get the same compute, or if a comparison or the baseline names something unknown."""
    tree = _read(Path(path))
    assert isinstance(tree.value, dict)
    own = YamlValue({key: entry for key, entry in tree.value.items() if key not in DELTAS}, tree.place)
    study = validate(Study, own.plain(), "", lambda keys: place(own, keys))
    settings, methods = (tree.value.get(key, NOTHING).value or {} for key in ("settings", "methods"))
    if not (isinstance(settings, dict) and settings and isinstance(methods, dict) and methods):
        raise ConfigError(f"{path}: settings and methods must each map one name or more to a part")
    plan = StudyPlan(study, tree.value.get("config", NOTHING), settings, methods)
    _refuse_unmatched(plan)
    if study.baseline is not None:
        _known(study.baseline, methods, "baseline")
    for c in study.comparisons:
        for name, known in zip((c.setting, c.a, c.b), (settings, methods, methods)):
            _known(name, known, f"comparison {c.claim!r}")
    return plan


def _read(path: Path) -> YamlValue:
    """Read the file with its paths and parts resolved, merged over the study that it extends."""
    own = parse_file(path)
    assert isinstance(own.value, dict)
    keys = dict(own.value)
    other = keys.pop("extends", None)
    before = NOTHING if other is None else _read(path.parent / str(other.value))
    assert isinstance(before.value, dict)
    for key in PATHS:
        if key in keys and keys[key].value is not None:
            keys[key] = YamlValue(str(path.parent / str(keys[key].value)), keys[key].place)
    for key in ("settings", "methods"):
        if key in keys and isinstance(named := keys[key].value, dict):
            parts = {name: extended(part, path) for name, part in named.items()}
            keys[key] = YamlValue(parts, keys[key].place)
    if "config" in keys:
        common = extended(keys["config"], path)
        keys["config"] = merge(before.value.get("config", NOTHING), common, Shape.of(Config))
    return YamlValue({**before.value, **keys}, own.place)


def _overrides(changes: dict[str, object]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _refuse_unmatched(plan: StudyPlan) -> None:
    """Raise ConfigError if the methods of a setting do not get the same compute (`_compute`)."""
    for setting in plan.settings:
        spent: dict[tuple[int, ...], str] = {}
        for method in plan.methods:
            config = plan.config(Cell(setting, method, plan.study.seeds[0]))
            spent.setdefault(_compute(config), method)
        if len(spent) > 1:
            (one, a), (two, b), *_ = spent.items()
            raise ConfigError(
                f"study {plan.study.name}, setting {setting}: {a} and {b} do not get the same compute: "
                f"rollout batches, responses per batch, updates, epochs, longest response: {one} and {two}"
            )


def _compute(config: Config) -> tuple[int, ...]:
    train, rollout = config.train, config.rollout
    responses = rollout.prompts * rollout.samples
    return (train.steps, responses, train.updates, train.epochs, rollout.sampling.max_tokens)


def _known(name: str, known: dict[str, YamlValue], where: str) -> None:
    if name not in known:
        raise ConfigError(f"{where}: no {name!r}; {nearest(name, list(known))}")
