"""`mtroll plan` as a user meets it: the table, JSON, exit codes, refusals."""

import json
from pathlib import Path

import pytest

from megatron_troll.cli.main import main
from megatron_troll.rollout.engines.drawing import PROMPT_TOKENS

JACKPOT = Path(__file__).parents[4] / "examples" / "configs" / "qwen3_8b_jackpot.yaml"
CONFIG = """
extends: [qwen3_30b_a3b, troll]
name: trial
data: {files: [prompts.jsonl]}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_a_plan_that_fits_says_so_last(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "30,532,122,624" in text
    assert "fits: stage 0 holds the most, 79.93 GiB of 129.00 GiB" in text.split("weight sync")[1]


def test_the_same_as_json(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == 30_532_122_624
    assert found["sync"] == 2 * 30_532_122_624
    assert found["worst"]["total"] <= found["limit"]
    assert set(found["worst"]["activations"]) == {"none", "selective", "full"}
    assert set(found["logits"]) >= {"whole", "dense", "own", "old"}
    assert found["config"]["models"]["policy"]["layout"]["ep"] == 8
    assert {"token_bf16", "token_fp8"} <= set(found["servers"][0])


def test_what_does_not_fit_says_what_takes_the_most(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "models.policy.recompute=none"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit: stage 0 holds" in text
    assert "most of it: activations 112." in text


def test_caches_of_the_in_process_engine_count(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "rollout.engine=inprocess"]) == 1
    assert "most of it: caches" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", config, "rollout.engine=inprocess", "rollout.max_sequences=16"]) == 0


def test_servers_on_the_same_gpus_count(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "rollout.sglang.colocated=true"]) == 1
    assert "most of it: servers 118.15 GiB" in " ".join(capsys.readouterr().out.split())
    small = ["rollout.sglang.colocated=true", "serve.memory_fraction=0.3", "serve={servers: 2, tp: 4}"]
    assert main(["plan", config, *small]) == 0


def test_a_rollout_model_draws_in_the_policys_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(JACKPOT), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [model["model"] for model in found["models"]] == ["policy", "rollout"]
    # 28 layers of 8 heads of 128, keys and values, over tp 2.
    assert found["servers"][1]["token_bf16"] == 28 * 2 * 8 * 128 * 2 // 2


@pytest.mark.parametrize("engine", ["inprocess", "sglang"])
def test_evaluations_beside_a_rollout_model_hold_caches_of_the_policy(
    engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(JACKPOT), f"rollout.engine={engine}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokens = 80 * (2048 + 8192) + PROMPT_TOKENS  # those of the rows, and of prompts that are read
    assert found["worst"]["generation"]["caches"] == tokens * 36 * 2 * 8 * 128 * 2 // 2


def test_replayed_experts_count(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "train.replay=old", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokens = 64 * 16 // 8 * (2048 + 14336 - 1)
    assert found["worst"]["training"]["replay"] == tokens * 48 * 8


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["models.policy.layout={ep: 3}"], "experts (128) cannot be divided by ep (3); set ep to 2 or 4"),
        (["launch.ranks=12"], "needs a world size divisible by etp x ep x pp = 8; this one has 12 ranks"),
        (["models.policy.path=models/Qwen9"], "models/Qwen9/config.json not found"),
        (["rollout.sampling.max_tokens=40000"], "exceeds the model's max_position_embeddings 40960"),
        (["objective.kl.name=tike"], "models.reference: missing; objective.kl=tike"),
        (["models.policy.layout={cp: 2}", "rollout.engine=inprocess"], "under context parallelism"),
        (
            ["models.rollout.path=models/Qwen3-1.7B", "objective.old=engine"],
            "objective.old=engine does not go with models.rollout",
        ),
        (["serve.tp=3"], "serve.tp=3: 32 attention heads cannot be divided by it; set it to 2 or 4"),
        (["serve={tp: 4, ep: 8}"], "serve.ep=8: must divide serve.tp=4 and the model's 128 experts"),
        (
            ["rollout.sglang.colocated=true", "serve.tp=2"],
            "serve.servers=8 x serve.tp=2 = 16 GPUs, shared with 8 ranks",
        ),
        (["serve.memory_fraction=0.41"], "serve.tp=1: with 56.9 GiB of weights, a sequence of 16383 tokens"),
        (["data=null"], "data: missing"),
        (["trian.steps=3"], "did you mean 'train'?"),
    ],
)
def test_what_cannot_run_is_refused(
    overrides: list[str], said: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", config, *overrides]) == 2
    assert said in capsys.readouterr().err
