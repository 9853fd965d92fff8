"""A method is a file: a copy of any goes with what the original goes with, and a wrong one is told where."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_troll.advantages
from megatron_troll.config import ConfigError, ObjectiveConfig, Slot, known_methods
from megatron_troll.objectives.catalogue import listing
from megatron_troll.objectives.compose import CHOICES, SLOTS, compose, offered, partners

ROOT = Path(megatron_troll.advantages.__file__).parents[2]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """An empty folder for each slot, in which files count as files of the slot's own."""
    made, before = {}, set(sys.modules)
    for slot, (package, _) in SLOTS.items():
        made[slot] = tmp_path / slot
        made[slot].mkdir()
        __import__(package)
        monkeypatch.setattr(
            sys.modules[package], "__path__", [*sys.modules[package].__path__, str(made[slot])]
        )
    yield made
    for name in set(sys.modules) - before:
        package, _, last = name.rpartition(".")
        if package in {package for package, _ in SLOTS.values()}:
            del sys.modules[name]
            vars(sys.modules[package]).pop(last, None)


def originals(slot: str) -> tuple[str, ...]:
    return known_methods(SLOTS[slot][0])


@pytest.mark.parametrize("slot", SLOTS)
def test_a_copy_of_any_method_has_the_partners_of_the_original(slot: str, folders: dict[str, Path]) -> None:
    names, keys = originals(slot), [key for key in (*SLOTS, *CHOICES) if key != slot]
    folder = ROOT / SLOTS[slot][0].replace(".", "/")
    for name in names:
        shutil.copy(folder / f"{name}.py", folders[slot] / f"{name}_copy.py")
    found = {one.name: {key: partners(one, key) for key in keys} for one in offered(slot)}
    assert len(found) == 2 * len(names)
    for name in names:
        assert found[f"{name}_copy"] == found[name]
        assert f"\n  {name}_copy " in listing(slot)


def test_copies_go_with_copies(folders: dict[str, Path]) -> None:
    """Nothing is known by the name of its file where its partner is a copy too."""
    for slot, name in (
        ("trust_region", "cppo"),
        ("correction", "tis"),
        ("ratio", "gspo"),
        ("ratio", "token"),
    ):
        file = ROOT / SLOTS[slot][0].replace(".", "/") / f"{name}.py"
        shutil.copy(file, folders[slot] / f"{name}_copy.py")

    def objective(**slots: str) -> ObjectiveConfig:
        return ObjectiveConfig(**{slot: Slot(name=name) for slot, name in slots.items()})  # pyright: ignore[reportArgumentType]

    compose(objective(ratio="token_copy", trust_region="cppo_copy"))
    with pytest.raises(ConfigError, match="'cppo_copy' is not defined with ratio 'gspo_copy': it masks"):
        compose(objective(ratio="gspo_copy", trust_region="cppo_copy"))
    with pytest.raises(ConfigError, match="'cppo_copy' is not defined with correction 'tis_copy'"):
        compose(objective(trust_region="cppo_copy", correction="tis_copy"))


KL = "from megatron_troll.objectives.slots import Kl\n\n\n"
WRONG = """from megatron_troll.config import Pairing
from megatron_troll.objectives.slots import TrustRegion


class Mine(TrustRegion):
    @property
    def refuses(self):
        return (
            Pairing({key!r}, ("{name}",), "of its weights"),
        )
"""


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        (
            "ratio",
            "gsop",
            r"mine\.py:9: trust_region 'mine' declares a partner ratio 'gsop', .*mean 'gspo'\?",
        ),
        ("ratio", "respons", "partner ratio 'respons', which does not exist; did you mean 'response'"),
        ("ratios", "gspo", "partner key 'ratios', which does not exist; did you mean 'ratio'"),
        ("old", "sglang", "partner old 'sglang', which does not exist; known: engine, trainer"),
    ],
)
def test_an_unknown_partner(key: str, name: str, message: str, folders: dict[str, Path]) -> None:
    (folders["trust_region"] / "mine.py").write_text(WRONG.format(key=key, name=name).replace("'", '"'))
    with pytest.raises(ConfigError, match=message):
        compose(ObjectiveConfig(trust_region=Slot(name="mine")))
    with pytest.raises(ConfigError, match=message):
        listing("trust_region")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "class Mine:\n    pass\n",
            r"kl\.name: this file must define one subclass of Kl: .*mine\.py:1: Mine is not one",
        ),
        ("LIMIT = 3\n", r"must define one subclass of Kl: .*mine\.py:1$"),
        (
            KL + "class A(Kl):\n    pass\n\n\nclass B(Kl):\n    pass\n",
            r"must define one subclass of Kl: .*mine\.py:4: A, .*mine\.py:8: B",
        ),
        (
            KL + "class Mine(Kl):\n    pass\n",
            r"mine\.py:4: Mine does not define penalty",
        ),
    ],
)
def test_a_file_that_is_no_method(text: str, message: str, folders: dict[str, Path]) -> None:
    (folders["kl"] / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        compose(ObjectiveConfig(kl=Slot(name="mine")))
    with pytest.raises(ConfigError, match=message):
        listing()


def test_two_methods_of_one_name(folders: dict[str, Path]) -> None:
    (folders["kl"] / "mine.py").write_text("")
    (folders["kl"] / "mine").mkdir()
    (folders["kl"] / "mine" / "__init__.py").write_text("")
    with pytest.raises(ConfigError, match=r"kl/mine\.py:1: .*kl/mine is a method 'mine' too: rename one"):
        compose(ObjectiveConfig(kl=Slot(name="mine")))


def test_an_unknown_slot_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no slot 'trust-region'; did you mean 'trust_region'"):
        listing("trust-region")
