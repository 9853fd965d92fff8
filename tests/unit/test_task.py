"""What a configuration is refused for, before any process is started."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_troll.config import Layout
from megatron_troll.config.load import load
from megatron_troll.mcore.layout import smallest_world
from megatron_troll.mcore.shape import read_shape
from megatron_troll.rollout.engine import Engine
from megatron_troll.task import PROBLEMS, Task, demonstrations, prepare
from megatron_troll.weights.source import RandomSource
from tests.unit.demo_task import write_config

CONFIG = """
name: trial
models: {{policy: {{path: {base}, init: random, layout: {{tp: 2, ep: 2}}}}}}
data: {{files: [{prompts}], held_out: 1, max_prompt_tokens: 32}}
rollout: {{prompts: 4, sampling: {{max_tokens: 8}}}}
train: {{updates: 2}}
objective: {{trust_region: {{name: troll}}}}
"""


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    return write_config(CONFIG, base, tmp_path)


def task(config: Path, *overrides: str) -> Task:
    return prepare(load(config, overrides))


def refusal(config: Path, *overrides: str) -> str:
    with pytest.raises(PROBLEMS) as caught:
        task(config, *overrides)
    return str(caught.value)


def test_what_is_fit_comes_back_with_every_default_written_out(config: Path) -> None:
    prepared = task(config)
    assert prepared.config.objective.trust_region.fields["k"] == 64
    assert prepared.config.reward.model_dump()["timeout_s"] == 10.0
    assert (len(prepared.prompts.train), len(prepared.prompts.held_out)) == (9, 1)
    assert prepared.shape.vocab == 64
    assert prepared.token_text(prepared.stop_ids[0]) == "<|end|>"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stpes=3", "train.stpes: unknown key; did you mean 'steps'?"),
        (
            "objective.trust_region.bonud=1",
            "objective.trust_region.bonud: unknown key; did you mean 'bound'?",
        ),
        ("objective.trust_region=clip", "got 'clip', expected a method with its fields, {name: METHOD, "),
        ("reward.name=exat", "did you mean 'exact'?"),
        ("rollout.engine=inproces", "did you mean 'inprocess'?"),
        (
            "models.policy.layout={tp: 3, ep: 3}",
            "models.policy.layout: attention heads (4) cannot be divided by tp (3)",
        ),
        ("models.policy.layout={pp: 3}", "layers (4) cannot be divided by pp x vpp (3)"),
        ("models.policy.layout={tp: 1, ep: 3}", "experts (8) cannot be divided by ep (3)"),
        ("models.policy.layout={cp: 2}", "inprocess does not generate under context parallelism"),
        ("launch.ranks=3", "needs a world size divisible by tp x pp x cp = 2; this one has 3 ranks"),
        ("models.policy.spec=te", "needs CUDA and transformer_engine"),
        ("models.policy.path=nowhere", "nowhere/config.json not found"),
        ("models.policy.init=pretrained", "no model.safetensors.index.json or model.safetensors"),
        ("rollout.sampling.temperature=0", "0 is greedy and explores nothing"),
        ("rollout.sampling.top_p=0.9", "top_p cut the distribution that tokens are sampled from"),
        ("rollout.sampling.max_tokens=250", "= 282 exceeds the model's max_position_embeddings 256"),
        ("objective.trust_region.p_d=0.1", "objective: (V - |S|) * p_d = 6.3 >= 1"),
        ("train.updates=8", "at least as many prompts per batch as steps per epoch"),
        ("rollout.samples=1", "advantage 'grpo' compares the answers to one prompt"),
        ("objective.advantage.name=gae", "gae needs a critic, and there is none"),
        ("models.critic={path: x}", "models.critic and objective.advantage=gae go together"),
        ("objective.kl.name=k3", "models.reference: missing; objective.kl=k3"),
        ("rollout.prompts=10", "rollout.prompts=10 is more than the 9 training prompts"),
        ("train.epochs=3", "make it a multiple of train.epochs=3"),
        ("train={share_prefixes: true, packing: false}", "true: padded rows share nothing"),
        ("data.files=[none.jsonl]", "none.jsonl: no such file"),
        ("data.max_prompt_tokens=3", "line 1: prompt '0' has 9 tokens, over data.max_prompt_tokens=3"),
        ("data.held_out=0", "data.held_out: got 0, expected an integer >= 1"),
        ("data.held_out=10", "leaves nothing to train on"),
    ],
)
def test_it_is_refused(config: Path, override: str, said: str) -> None:
    assert said in refusal(config, override)


def test_more_kept_tokens_than_a_gpu_holds_are_refused_where_there_is_one(
    config: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "wide")
    described = json.loads((base / "config.json").read_text()) | {"vocab_size": 512}
    (tmp_path / "wide" / "config.json").write_text(json.dumps(described))
    changes = f"models.policy.path={tmp_path / 'wide'}", "objective.trust_region.k=300", "rollout.top_k=300"
    task(config, *changes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    task(config, *changes, "objective.trust_region.k=256")
    said = "objective: k=300: the kernels of a GPU keep at most 256 tokens of a position"
    assert said in refusal(config, *changes)


def test_on_a_gpu_context_parallelism_shares_nothing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = ("objective.advantage.name=gae", "models.critic={path: x, layout: {cp: 2}}")
    said = "train.share_prefixes=true: on a GPU not under context parallelism; models.critic.layout.cp is 2"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert said in refusal(config, "train.share_prefixes=true", *critic)


def test_a_sparse_head_is_kept_or_refused_before_the_run(config: Path) -> None:
    task(config, "objective.head=sparse")
    task(config, "objective.trust_region={name: clip}")
    said = refusal(config, "objective.head=sparse", "objective.trust_region={name: clip}")
    assert "objective.head=sparse: the full softmax is differentiated by trust_region" in said


def test_the_engines_record_must_hold_what_a_mask_reads(config: Path) -> None:
    said = "rollout.top_k=8: a method that reads the engine's own record needs at least 20"
    assert said in refusal(
        config, "objective.trust_region={name: cppo, divergence: topk_tv}", "rollout.top_k=8"
    )


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ((), 0),
        (("objective.old=engine",), 64),
        (("objective.correction={name: jackpot}",), 64),
        (("objective.trust_region={name: cppo, divergence: topk_tv}",), 64),
        (("objective.old=engine", "rollout.top_k=128"), 128),
    ],
)
def test_the_engine_is_asked_for_its_record_where_something_reads_it(
    config: Path, overrides: tuple[str, ...], asked: int
) -> None:
    assert task(config, *overrides).engine_top_k == asked


def test_the_engines_record_must_hold_what_the_trust_region_reads(config: Path) -> None:
    assert "rollout.top_k=8: objective.old=engine needs at least 64" in refusal(
        config, "objective.old=engine", "rollout.top_k=8"
    )


def test_dynamic_sampling_is_for_advantages_that_compare_samples(config: Path, base: Path) -> None:
    critic = f"models.critic={{path: {base}, init: random, layout: {{tp: 2, ep: 2}}}}"
    said = refusal(config, "rollout.refill=2", "objective.advantage.name=gae", critic)
    assert "advantage 'gae' learns from those too" in said


def test_replay_needs_something_to_repeat(config: Path, tmp_path: Path) -> None:
    for replay in ("old", "rollout"):
        task(config, f"train.replay={replay}")
    said = refusal(config, "train.replay=old", "objective.old=engine")
    assert (
        "train.replay=old repeats the experts of the old policy's forward, which objective.old=engine" in said
    )
    said = refusal(config, "train.replay=rollout", "rollout.engine=sglang")
    assert "the engine sglang does not return the experts it chose; set serve.routed_experts=true" in said
    task(config, "train.replay=rollout", "rollout.engine=sglang", "serve.routed_experts=true")
    said = refusal(config, "train.replay=rollout", "rollout.engine=tests.unit.test_task:Forgetful")
    assert "the engine tests.unit.test_task:Forgetful does not return" in said
    said = refusal(config, "train.replay=old", *dense_policy(config, tmp_path))
    assert "train.replay=old repeats choices of experts: " in said


def rollout_model(base: Path, **fields: object) -> str:
    tree = {"path": str(base), "init": "random", "dtype": "fp32", "layout": {"tp": 2, "ep": 2}} | fields
    return f"models.rollout={json.dumps(tree)}"


def test_a_rollout_model_may_be_of_another_architecture(config: Path, base: Path, tmp_path: Path) -> None:
    task(config, rollout_model(base))
    task(config, rollout_model(base), "rollout.engine=sglang")
    path, _ = dense_policy(config, tmp_path)
    dense = path.removeprefix("models.policy.path=")
    prepared = task(config, rollout_model(Path(dense), layout={"tp": 2}))
    assert prepared.config.models.rollout is not None
    assert prepared.config.models.rollout.layout.ep == 1


@pytest.mark.parametrize(
    ("fields", "overrides", "said"),
    [
        ({"layout": {}}, (), "must be those of the policy, {'tp': 2, 'pp': 1, 'vpp': None, 'cp': 1}"),
        (
            {"layout": {"tp": 2, "ep": 3}},
            (),
            "models.rollout.layout: experts (8) cannot be divided by ep (3)",
        ),
        (
            {"layout": {"tp": 2, "ep": 2, "cp": 2}},
            ("rollout.engine=sglang", "models.policy.layout.cp=2", "launch.ranks=4"),
            "models.policy.layout.cp=2: with models.rollout, evaluations of the policy are sampled in",
        ),
        ({}, ("objective.old=engine",), "objective.old=engine does not go with models.rollout"),
        ({}, ("train.replay=rollout",), "train.replay=rollout does not go with models.rollout"),
        (
            {"distill": {"weight": 200.0}},
            (),
            "models.rollout.distill.weight=200 is outside of limits [0.01, 100]",
        ),
        ({"distill": {"limits": [3, 2]}}, (), "is outside of limits [3, 2]"),
        ({"init": "pretrained"}, (), "no model.safetensors.index.json or model.safetensors"),
        ({"moe": {"bias_rate": 0.1}}, (), "models.rollout.moe.bias_rate: checkpoint.export must be false"),
    ],
)
def test_a_rollout_model_is_refused(
    config: Path, base: Path, fields: dict[str, object], overrides: tuple[str, ...], said: str
) -> None:
    assert said in refusal(config, rollout_model(base, **fields), *overrides)


def test_a_rollout_model_reads_the_policys_tokens(config: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    told = json.loads(file.read_text())
    vocab = told["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(told))
    assert "have different tokens" in refusal(config, rollout_model(tmp_path / "other"))


class Forgetful(Engine):
    """Tells nothing of its experts."""

    def generate(self, requests, sampling, round):
        return []


def dense_policy(config: Path, folder: Path) -> tuple[str, ...]:
    """The overrides that make the policy a dense model of the same vocabulary."""
    base = Path(load(config).policy.path)
    shutil.copytree(base, folder / "dense")
    described = json.loads((base / "config.json").read_text()) | {"model_type": "qwen3"}
    (folder / "dense" / "config.json").write_text(json.dumps(described))
    return f"models.policy.path={folder / 'dense'}", "models.policy.layout={ep: 1}"


def test_training_needs_data(config: Path) -> None:
    assert "data: missing; training needs prompts" in refusal(config, "data=null")


def test_a_malformed_line_is_named_or_skipped_and_counted(config: Path) -> None:
    prompts = config.parent / "prompts.jsonl"
    prompts.write_text(prompts.read_text() + "{oops\n")
    assert "prompts.jsonl line 11: not valid JSON" in refusal(config)
    assert "1 malformed skipped (first: " in str(task(config, "data.malformed=skip").prompts)


@pytest.mark.parametrize(
    ("reward", "answer", "said"),
    [
        ("{name: exact}", " ", "the answer ' ' is blank"),
        ("{name: regex, pattern: x, ignore: ','}", ",,", "nothing is left of the answer ',,' without ','"),
        ("{name: math_verify}", "$", "the answer '$' is not mathematics"),
        ("{name: code}", "-", "record field 'tests' must be a list of tests, got None"),
        ("{name: 'tests.unit.rewards.plugin_rewards:Checks'}", "-", "KeyError: 'needed'"),
    ],
)
def test_an_answer_that_the_verifier_cannot_use_is_malformed(
    config: Path, reward: str, answer: str, said: str
) -> None:
    """Before any compute, with file and line, and skippable."""
    bad = config.parent / "prompts.jsonl"
    good = bad.read_text().replace('"answer": ', '"needed": 1, "tests": ["assert f(1)"], "answer": ')
    turns = [{"role": "user", "content": "new"}]
    bad.write_text(good + json.dumps({"messages": turns, "answer": answer}) + "\n")
    assert f"{bad} line 11: {said}" in refusal(config, f"reward={reward}")
    assert "1 malformed skipped" in str(task(config, f"reward={reward}", "data.malformed=skip"))


def test_an_empty_file_is_refused(config: Path) -> None:
    (config.parent / "prompts.jsonl").write_text("")
    assert "prompts.jsonl: the file holds no records" in refusal(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 50}, "tokens beyond the model's vocab_size 50: "),
        ({"model_type": "gpt2"}, "config.json: model_type 'gpt2' is not supported"),
        ({"hidden_size": None}, "config.json: 'hidden_size' is missing"),
    ],
)
def test_a_model_folder_that_does_not_fit(config: Path, base: Path, change: dict, said: str) -> None:
    folder = config.parent / "model"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text()) | change
    kept = {key: value for key, value in fields.items() if value is not None or key not in change}
    (folder / "config.json").write_text(json.dumps(kept))
    assert said in refusal(config, f"models.policy.path={folder}")


def test_fp8_weights_are_read_and_said_but_not_served(config: Path, base: Path) -> None:
    folder = Path(shutil.copytree(base, config.parent / "model"))
    source = RandomSource(read_shape(folder), seed=0)
    tensors = {name: source.read(name) for name in source.shapes}
    name = "model.layers.0.self_attn.o_proj.weight"
    codes, scale = tensors[name].to(torch.float8_e4m3fn), torch.tensor(0.5)
    save_file(tensors | {name: codes, f"{name}_scale": scale}, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (folder / "config.json").write_text(json.dumps(fields))
    overrides = (f"models.policy.path={folder}", "models.policy.init=pretrained")
    told = str(task(config, *overrides))
    assert "(NVIDIA ModelOpt, FP8; quantization_config of config.json): 1 FP8 weights" in told
    said = refusal(config, *overrides, "rollout.engine=sglang")
    assert said.startswith(f"models.policy.path: {folder} is quantised (NVIDIA ModelOpt, FP8; ")
    assert "\n" not in said


def test_a_token_that_ends_turns_only_is_a_stop_token_and_said(config: Path, base: Path) -> None:
    """As in Base models, whose end of sequence is another token than that of the chat template."""
    folder = Path(shutil.copytree(base, config.parent / "model"))
    for name, change in (
        ("generation_config.json", {"eos_token_id": 0}),
        ("config.json", {"eos_token_id": 0}),
        ("tokenizer_config.json", {"eos_token": "<pad>"}),
    ):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(told | change))
    prepared = task(config, f"models.policy.path={folder}")
    assert prepared.stop_ids == prepared.stops.exported == (0, 4)
    assert "the chat template ends a turn with '<|end|>'" in str(prepared)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 64]}')
    said = refusal(config, f"models.policy.path={folder}")
    assert said.startswith(
        f"{folder}/generation_config.json: eos_token_id: no model of 64 tokens can sample 64"
    )


def test_an_argument_that_the_chat_template_does_not_read_is_refused(config: Path) -> None:
    said = refusal(config, "data.template_arguments={enable_thinking: false}")
    assert said.startswith("data.template_arguments.enable_thinking: the chat template reads no")


def test_wandb_that_is_not_installed_is_said_with_the_fix(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    assert "install megatron-troll[wandb]" in refusal(config, "observe.wandb_project=p")


def test_a_warm_start_needs_demonstrations_that_fit(config: Path) -> None:
    chats = config.parent / "chats.jsonl"
    turns = [{"role": "user", "content": "sort 21"}, {"role": "assistant", "content": "12"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    (example,) = demonstrations(task(config, f"sft.files=[{chats}]")).examples
    assert example.mask.tolist() == [0.0] * 9 + [1.0] * 3
    with pytest.raises(PROBLEMS, match=r"sft: missing; `mtroll sft` needs sft\.files"):
        demonstrations(task(config))
    with pytest.raises(PROBLEMS, match="a warm start is not resumed"):
        demonstrations(task(config, f"sft.files=[{chats}]", "resume=true"))
    turns[1]["content"] = "1" * 300
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(PROBLEMS, match=r"chats\.jsonl line 1: 311 tokens, more than .* 256"):
        demonstrations(task(config, f"sft.files=[{chats}]"))


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({}, 1),
        ({"tp": 2, "ep": 2}, 2),
        ({"tp": 2, "ep": 4}, 4),
        ({"tp": 2, "pp": 2, "ep": 2}, 4),
        ({"tp": 2, "cp": 2, "ep": 2, "etp": 2}, 4),
        ({"tp": 2, "ep": 3}, 6),
    ],
)
def test_the_smallest_world(layout: dict[str, int], ranks: int) -> None:
    assert smallest_world(Layout(**layout)) == ranks


def test_biases_of_experts_stay_in_the_trainer(config: Path) -> None:
    task(config, "models.policy.moe.bias_rate=1e-3", "checkpoint.export=false")
    said = "models.policy.moe.bias_rate: checkpoint.export must be false, it is true"
    assert said in refusal(config, "models.policy.moe.bias_rate=1e-3")


def test_a_dispatcher_that_is_not_installed_is_refused(config: Path) -> None:
    said = refusal(config, "models.policy.moe.dispatcher=deepep")
    assert said == "models.policy: moe.dispatcher=deepep needs CUDA, and there is none here"
