"""`mtroll serve` and `mtroll train` of examples/configs/cpu_sglang.yaml, as a user types them."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_troll.launch.local import free_port
from megatron_troll.observe.rollouts import read_step
from megatron_troll.rollout.sglang.journal import Journal
from tests.e2e.workplace import REPOSITORY, Done, Workplace, finish, succeed, wait_until
from tests.sglang.farm import PYTHON

CONFIG = """
extends: {examples}/cpu_sglang.yaml
models: {{policy: {{path: runs/demo/base, init: random}}}}
serve: {{python: {python}, port: {port}}}
rollout: {{prompts: 8, samples: 4}}
reward: {{name: "tests.e2e.rewards:Overlap"}}
train: {{steps: 3, updates: 2}}
evaluation: {{every: 0, prompts: 8}}
checkpoint: {{every: 1}}
"""
# Of a batch.
ANSWERS = 8 * 4


@dataclass(frozen=True)
class Served:
    """A place where `mtroll serve` runs a server for runs/cpu-sglang."""

    place: Workplace
    serving: "subprocess.Popen[str]"

    @property
    def written_down(self) -> list[dict[str, Any]]:
        folder = self.place.run("cpu-sglang") / "servers"
        return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = Workplace(tmp_path_factory.mktemp("e2e"))
    examples = REPOSITORY / "examples" / "configs"
    (place.root / "config.yaml").write_text(CONFIG.format(examples=examples, python=PYTHON, port=free_port()))
    succeed(place.mtroll("demo", "runs/demo"))
    served = Served(place, place.start("serve", "config.yaml"))
    yield served
    if served.serving.poll() is None:
        succeed(stopped(served))


def stopped(served: Served) -> Done:
    served.serving.send_signal(signal.SIGTERM)
    return finish(served.serving)


@pytest.fixture(scope="module")
def trained(served: Served) -> list[dict[str, Any]]:
    """The rows of a run that waits for its server."""
    succeed(served.place.mtroll("train", "config.yaml"))
    return served.place.metrics("cpu-sglang")


def test_a_run_draws_from_its_server(trained: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in trained] == [0, 1, 2, 3]
    for row in trained[1:]:
        assert row["skipped_updates"] == 0
        assert row["rollout_trainer_gap/max"] < 1e-4
    for row in (trained[0], *trained[2:]):  # step 1 draws from the weights that step 0 synced
        assert row["servers"] == 1
        assert row["engine_kl"] < 1e-6


def test_a_trainer_that_is_killed_asks_for_nothing_twice(
    served: Served, trained: list[dict[str, Any]]
) -> None:
    """One step off: the next batch is drawn while a step trains. Continued, the run learns from the very
    answers that were there when it was killed, from each once."""
    place, url = served.place, served.written_down[0]["url"]
    servers = f"rollout.sglang.servers=[{url}]"
    key = "rollout.sglang.api_key_file=runs/cpu-sglang/servers/key"
    off = ("name=off", servers, key, "rollout.staleness=1", "objective.correction={name: tis}")
    first = place.start("train", "config.yaml", *off)
    wait_until(lambda: len(buffered(place, 2)) >= ANSWERS // 4, first)
    heartbeat = place.run("off") / "heartbeat" / "rank_0.json"
    os.kill(json.loads(heartbeat.read_text())["pid"], signal.SIGKILL)
    assert finish(first).code != 0
    kept = {round: buffered(place, round) for round in (1, 2)}
    assert kept[2]
    succeed(place.mtroll("train", "config.yaml", *off, "resume=true"))
    learnt = {step: drawn_in(place, step) for step in (1, 2, 3)}
    for round in (1, 2):
        assert kept[round].items() <= learnt[round].items()
    assert len({name for step in learnt.values() for name in step}) == 3 * ANSWERS
    rows = place.metrics("off")[1:]
    assert [(row["step"], row["skipped_updates"]) for row in rows] == [(1, 0), (2, 0), (3, 0)]
    assert rows[-1]["staleness"] == 1
    assert 0 < rows[-1]["version_age"] <= 1
    assert not list((place.run("off") / "buffer").iterdir())


def buffered(place: Workplace, round: int) -> dict[str, list[float]]:
    """The log-probs of each answer from the first weights in the buffer, as the rollout store rounds them."""
    answers = Journal(place.run("off") / "buffer").read(round)
    return {
        name: [rounded(value) for value in stored.answer.logp]
        for name, stored in answers.items()
        if not stored.answer.versions.any()
    }


def drawn_in(place: Workplace, step: int) -> dict[str, list[float]]:
    """The same of what a step learnt from."""
    return {f"{sample.prompt}#{sample.sample}": sample.logp for sample in read_step(place.run("off"), step)}


def rounded(value: float) -> float:
    return round(float(value), 4)


def test_a_server_that_is_killed_is_started_again(served: Served, trained: list[dict[str, Any]]) -> None:
    (before,) = served.written_down
    os.kill(before["pid"], signal.SIGKILL)
    wait_until(lambda: served.written_down not in ([], [before]), served.serving)
    (after,) = served.written_down
    assert after["url"] == before["url"]


def test_asked_to_stop_it_leaves_nothing(served: Served, trained: list[dict[str, Any]]) -> None:
    """No process, and no server that a run would look for."""
    pids = [server["pid"] for server in served.written_down]
    assert pids
    assert "is healthy; its log is" in succeed(stopped(served)).out
    assert not served.written_down
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
