"""What goes wrong with new weights is an error on every rank, none waits in a collective, and it says what to
do."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_troll.config import RunPaths
from megatron_troll.rollout.sglang.registry import register, unregister
from tests.dist.harness import RankPool
from tests.sglang import worker
from tests.sglang.farm import Farm, RealServer
from tests.sglang.model import write_model
from tests.sglang.serving import tell
from tests.sglang.worker import Job

TP = {"tp": 2, "ep": 2}
WAYS = ("disk", "tensor", "distributed")


def job(servers: list[RealServer], folder: Path, runs: Path, **sglang: Any) -> Job:
    urls = tuple(server.url for server in servers)
    return Job(TP, folder, runs, {"servers": urls} | sglang, {"max_tokens": 8})


@pytest.mark.parametrize("via", ["tensor", "distributed"])
def test_weights_outside_of_a_session_are_refused(
    via: str, ranks2: RankPool, one: RealServer, trained: Path, tmp_path: Path
) -> None:
    """The server's answer comes before the broadcast would."""
    errors = ranks2.run(worker.sync_without_session, job([one], trained, tmp_path, sync={"via": via}))
    for kind, message in errors:
        assert kind == "UpdateRefused"
        assert "must run between begin_weight_update" in message
        assert "Restart it" in message


@pytest.mark.parametrize("via", ["tensor", "distributed"])
def test_a_session_that_was_left_open_is_in_nobodys_way(
    via: str, ranks2: RankPool, one: RealServer, trained: Path, tmp_path: Path
) -> None:
    tell(one, "/begin_weight_update")
    tell(one, "/pause_generation", mode="retract")
    drawn = ranks2.run(worker.draw_once, job([one], trained, tmp_path, sync={"via": via}))
    assert drawn[0].synced["engine_kl"] < 1e-6


def test_colocated_servers_rest_and_get_their_weights_again(
    ranks2: RankPool, one: RealServer, trained: Path, tmp_path: Path
) -> None:
    """What memory they give back is up to the GPU; here, that all calls are in order."""
    asked = job([one], trained, tmp_path, sync={"via": "tensor"}, colocated=True)
    before, after = ranks2.run(worker.draw_after_rest, asked)[0]
    worker.assert_the_trainers([after], 1)
    for drawn in (before, after):
        assert drawn.synced["servers"] == 1
        assert drawn.synced["engine_kl"] < 1e-6
    log = one.log.read_text()
    assert log.count('POST /release_memory_occupation HTTP/1.1" 200') == 1
    assert log.count('POST /resume_memory_occupation HTTP/1.1" 200') == 1


def test_a_version_that_does_not_arrive(
    ranks2: RankPool, one: RealServer, trained: Path, tmp_path: Path
) -> None:
    errors = ranks2.run(worker.sync_without_name, job([one], trained, tmp_path, sync={"via": "tensor"}))
    for kind, message in errors:
        assert kind == "WrongServer"
        assert "something else updates it too" in message


def test_a_family_that_does_not_come_over_is_named(
    ranks2: RankPool, one: RealServer, trained: Path, tmp_path: Path
) -> None:
    errors = ranks2.run(
        worker.sync_with_a_fault,
        job([one], trained, tmp_path, sync={"via": "tensor"}, probe={"max_kl": 1e-4}),
    )
    for kind, message in errors:
        assert kind == "WrongServer"
        assert "nats from the trainer" in message
        assert "At fault: model.layers.*.self_attn.q_norm.weight (4 of 4)." in message


def test_weights_that_are_not_finite(
    ranks2: RankPool, one: RealServer, trained: Path, tmp_path: Path
) -> None:
    errors = ranks2.run(worker.sync_nan, job([one], trained, tmp_path, sync={"via": "tensor"}))
    for kind, message in errors:
        assert kind == "BadReply"
        assert "restart it" in message


@pytest.mark.parametrize("via", WAYS)
def test_a_server_of_another_shape_refuses(
    via: str, ranks2: RankPool, farm: Farm, trained: Path, tmp_path: Path
) -> None:
    """Its folder is on another machine, as far as the trainer can see. SGLang refuses, or dies of it."""
    narrow = write_model(tmp_path / "narrow", hidden_size=64)
    server = farm.start(narrow).wait_until_healthy()
    shutil.rmtree(narrow)
    try:
        asked = job([server], trained, tmp_path, sync={"via": via}, patience_s=4.0)
        errors = ranks2.run(worker.sync_error, asked)
    finally:
        server.kill()
    for kind, message in errors:
        assert kind in ("UpdateRefused", "NoServers")
        assert "shape" in message


def test_a_server_that_replaces_the_only_one_goes_on_with_the_batch(
    ranks2: RankPool, farm: Farm, folder: Path, trained: Path, tmp_path: Path
) -> None:
    asked = job([], trained, tmp_path, sync={"via": "tensor"}, patience_s=120.0)
    registry, under_way = RunPaths.of(asked.config).servers, tmp_path / "under_way"
    first = farm.start(folder).wait_until_healthy()
    register(registry, first.url, first.pid)
    second: list[RealServer] = []

    def replace() -> None:
        while not under_way.exists():
            time.sleep(0.01)
        time.sleep(0.2)
        first.kill()
        unregister(registry, first.url)
        second.append(farm.start(folder).wait_until_healthy())
        register(registry, second[0].url, second[0].pid)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        drawn = ranks2.run(worker.draw_long, asked, under_way)
    finally:
        thread.join()
        second[0].kill()
    rollouts = drawn[0].rollouts
    assert [r.name for r in rollouts] == [r.name for r in drawn[1].rollouts]
    worker.assert_the_trainers(drawn, 1)
