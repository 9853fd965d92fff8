"""Every version is written once, or agrees with where else it is written."""

import re
import sysconfig
import tomllib
from importlib.metadata import distributions, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_troll.launch.sglang_flags import SGLANG
from megatron_troll.mcore.version import pinned
from tests.house.markdown import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE, CPU = (ROOT / "Dockerfile").read_text(), (ROOT / "Dockerfile.cpu").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PIN = re.compile(r"([\w.-]+)==([\w.]+)")


def pins(name: str) -> dict[str, Version]:
    """Package -> version, from a list in which every line pins one."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    found = [PIN.fullmatch(line) for line in lines]
    assert all(found), [line for line, pin in zip(lines, found) if pin is None]
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in found if pin}


PINS, NEMO = pins("constraints.txt"), pins("examples/nemo_run/requirements.txt")


def test_what_the_project_requires_is_pinned_within_its_range() -> None:
    asked = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    asked = [one for one in asked if one.name not in ("triton", "megatron-core")]
    missing = [one.name for one in asked if canonicalize_name(one.name) not in PINS]
    assert missing == [], "add them to constraints.txt"
    outside = [str(one) for one in asked if PINS[canonicalize_name(one.name)] not in one.specifier]
    assert outside == []


def test_the_environment_is_the_pinned_one() -> None:
    """What only a GPU needs may be missing. Not on sys.path, to which setuptools adds packages of its own."""
    found = {}
    for package in distributions(path=[sysconfig.get_path("purelib")]):
        installed, pinned = Version(package.version), PINS.get(canonicalize_name(package.name))
        if pinned is not None and installed.base_version != pinned.base_version:
            found[package.name] = f"{installed}, and not {pinned}: make env"
    assert found == {}


def test_megatron_core_is_pinned_in_one_place() -> None:
    assert f"megatron-core=={pinned()}" in PROJECT["dependencies"]
    assert version("megatron-core") == pinned()
    assert "megatron-core" not in PINS
    assert f"pinned to {pinned()} " in (ROOT / "docs" / "megatron-core.md").read_text()
    assert f"Megatron-Core {pinned()}" in (ROOT / "README.md").read_text()


def test_linear_attention_is_one_that_knows_grouped_values() -> None:
    """megatron-core's extra `dev` asks for 0.4, whose rule takes the head count from the keys; our layer has
    more value heads than key heads."""
    (asked,) = map(Requirement, PROJECT["optional-dependencies"]["linear-attention"])
    assert PINS["flash-linear-attention"] == PINS["fla-core"]
    assert PINS["flash-linear-attention"] in asked.specifier


def argument(name: str) -> str:
    """The default of an argument of the Dockerfile, which every one of the first stage has."""
    found = re.search(rf"^ARG {name}=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert found, name
    return found[1]


def test_sources_are_pinned_too() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", argument("APEX"))
    for name in ("SGLANG", "TRANSFORMER_ENGINE"):
        assert re.fullmatch(r"\d+\.\d+\.\d+", argument(name))
    assert re.findall(r"git\+\S+@(\S+)\"", DOCKERFILE) == ["${APEX}"]
    engine = re.findall(r'"(transformer-engine\S*)==\$\{TRANSFORMER_ENGINE\}"', DOCKERFILE)
    assert sorted(engine) == ["transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"]


def test_sglang_is_the_same_everywhere() -> None:
    assert argument("SGLANG") == SGLANG
    assert f"\nsglang=={SGLANG}\n" in (ROOT / "sglang_cpu" / "requirements.txt").read_text()
    assert f"SGLang {SGLANG}" in " ".join((ROOT / "docs" / "rollouts.md").read_text().split())


def test_nemo_run_is_the_one_that_is_described() -> None:
    assert f"nemo-run {NEMO['nemo-run']} " in (ROOT / "docs" / "nemo-run.md").read_text()


def test_the_cpu_image_installs_what_ci_does() -> None:
    """CI's checkout is clean: `make check` makes the environment there, as the image does."""
    assert re.findall(r"^RUN (.*)$", CPU, re.MULTILINE)[1:] == ["make env"]
    assert "\nmake check\n" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^check: env$", MAKEFILE, re.MULTILINE)
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)\.\d+-", CPU, re.MULTILINE)
    assert PROJECT["requires-python"] == f">={python}"
    assert f'WANTED="{python} or newer"' in (ROOT / "tools" / "find_python.sh").read_text()
