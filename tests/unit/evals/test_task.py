"""What an evaluation is refused for, before any process is started."""

from pathlib import Path

import pytest

from megatron_troll.config.load import load
from megatron_troll.evals.task import EvalTask, prepare
from megatron_troll.task import PROBLEMS
from megatron_troll.task import prepare as prepare_training
from tests.printable import write_printable
from tests.unit.demo_task import write_config

CONFIG = """
name: trial
models: {{policy: {{path: {base}, init: random, layout: {{tp: 2, ep: 2}}}}}}
rollout: {{max_sequences: 6}}
reward: {{name: exact}}
eval:
  easy: {{files: [{prompts}], max_prompt_tokens: 32, sampling: {{max_tokens: 8}}}}
  hard:
    files: [{prompts}]
    max_prompt_tokens: 32
    prompts: 3
    samples: 4
    pass_at: [1, 4]
    sampling: {{max_tokens: 8, temperature: 0.5, stop: ["9"]}}
    reward: {{name: regex, pattern: '\\d+'}}
"""


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    return write_config(CONFIG, base, tmp_path)


def task(config: Path, *overrides: str) -> EvalTask:
    return prepare(load(config, overrides))


def test_each_data_set_has_its_own_prompts_decoding_and_reward(config: Path) -> None:
    easy, hard = task(config).sets
    assert (len(easy.prompts), [prompt.id for prompt in hard.prompts]) == (10, ["0", "1", "2"])
    assert (easy.reward.name, hard.reward.fields) == ("exact", {"pattern": r"\d+", "ignore": ""})
    assert (easy.rollout.sampling.temperature, hard.rollout.sampling.temperature) == (1.0, 0.5)
    assert len(hard.stops.ids) == len(easy.stops.ids) + 1
    assert str(hard) == "hard: 3 prompts x 4 (10 rows)"


def test_each_data_set_has_its_own_arguments_of_the_chat_template(config: Path, base: Path) -> None:
    template = base / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text + "{% if enable_thinking is false %}no{% endif %}")
    try:
        shared = "data={files: [none.jsonl], template_arguments: {enable_thinking: false}}"
        own = "eval.hard.template_arguments={enable_thinking: true}"
        easy, hard = task(config, shared, own).sets
    finally:
        template.write_text(text)
    assert len(easy.prompts[0].ids) == len(hard.prompts[0].ids) + 2


def test_the_resolved_configuration_holds_every_default(config: Path) -> None:
    resolved = task(config).config.eval["easy"].reward
    assert resolved is not None
    assert resolved.fields == {"strip": True, "ignore_case": False}


@pytest.mark.parametrize(("ranks", "at_once", "batches"), [(2, 6, 4), (4, 12, 2)])
def test_every_replica_decodes_a_full_batch(config: Path, ranks: int, at_once: int, batches: int) -> None:
    prepared = task(config, f"launch.ranks={ranks}")
    assert (prepared.at_once, prepared.batches) == (at_once, batches)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("eval.new={}", "eval.new: got none, expected exactly one of the keys files or gym"),
        (
            "eval.hard.pass_at=[1, 5]",
            "eval.hard.pass_at: 5 is more than the samples of a prompt: samples is 4",
        ),
        ("eval.hard.samples=3", "eval.hard.pass_at: 4 is more than the samples of a prompt: samples is 3"),
        ("eval.hard.pass_at=[0]", "eval.hard.pass_at.0: got 0, expected an integer >= 1"),
        ("eval.hard.smaples=3", "eval.hard.smaples: unknown key; did you mean 'samples'?"),
        ("eval.hard.sampling.top=3", "eval.hard.sampling.top: unknown key; did you mean 'stop'?"),
        ("eval.hard.files=[]", "eval.hard.files: got [], expected a list of one or more"),
        ("eval.hard.files=[none.jsonl]", "none.jsonl: no such file"),
        ("eval.hard.prompts=0", "eval.hard.prompts: got 0, expected an integer >= 1"),
        ("eval.hard.max_prompt_tokens=3", "(eval.hard.overlong_prompts=skip skips and counts it)"),
        ("eval.hard.sampling.stop=[12]", "eval.hard.sampling.stop.0: got 12, expected a string"),
        ("eval.hard.sampling.stop=['12']", "eval.hard.sampling.stop: '12' is not one token"),
        (
            "eval.hard.sampling.max_tokens=250",
            "eval.hard.max_prompt_tokens + eval.hard.sampling.max_tokens = 282 exceeds the model's",
        ),
        ("eval.hard.reward.pattern='('", "eval.hard.reward.pattern: '(' is not a regular expression"),
        ("eval.hard.reward.name=exat", "eval.hard.reward.name: unknown method 'exat'; did you mean 'exact'?"),
        (
            "eval.hard.template_arguments={enable_thinkng: true}",
            "eval.hard.template_arguments.enable_thinkng: the chat template reads no 'enable_thinkng'",
        ),
        ("reward.name=exat", "reward.name: unknown method 'exat'"),
        ("models.policy.path=nowhere", "nowhere/config.json not found"),
        ("models.policy.init=pretrained", "no model.safetensors.index.json or model.safetensors"),
        ("models.policy.layout={cp: 2}", "inprocess does not generate under context parallelism"),
        ("launch.ranks=3", "needs a world size divisible by tp x pp x cp = 2"),
        ("resume=true", "resume: an evaluation is not resumed"),
    ],
)
def test_it_is_refused(config: Path, override: str, said: str) -> None:
    with pytest.raises(PROBLEMS) as caught:
        task(config, override)
    assert said in str(caught.value)


def test_without_data_sets_there_is_nothing_to_evaluate(config: Path) -> None:
    config.write_text(config.read_text().partition("eval:")[0])
    with pytest.raises(PROBLEMS, match=r"eval: missing; `mtroll eval` needs eval\.<name>\.files"):
        task(config)


def test_an_empty_file_is_refused(config: Path) -> None:
    (config.parent / "prompts.jsonl").write_text("")
    with pytest.raises(PROBLEMS, match=r"prompts\.jsonl: the file holds no records"):
        task(config)


GYM = """
name: trial
models: {{policy: {{path: {folder}, init: random, layout: {{tp: 2, ep: 2}}}}}}
data: {{gym: {{name: chain_sum, max_terms: 2, size: 12}}, held_out: 4, max_prompt_tokens: 220}}
rollout: {{prompts: 4, sampling: {{max_tokens: 8}}}}
reward: {{timeout_s: 30}}
eval:
  sums:
    gym: {{name: chain_sum, max_terms: 2, size: 6}}
    max_prompt_tokens: 220
    sampling: {{max_tokens: 8}}
"""


@pytest.fixture
def on_tasks(tmp_path: Path, in_process: None) -> Path:
    write_printable(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(GYM.format(folder=tmp_path))
    return path


def test_tasks_are_evaluated_on_what_is_held_out(on_tasks: Path) -> None:
    (sums,) = task(on_tasks, "data=null").sets
    trained = prepare_training(load(on_tasks, ["reward.name=gym"]))
    assert [prompt.messages for prompt in sums.prompts[:4]] == [p.messages for p in trained.prompts.held_out]
    assert len({prompt.messages for prompt in sums.prompts}) == 6
    assert not {p.messages for p in trained.prompts.train} & {p.messages for p in trained.prompts.held_out}
    assert (sums.reward.name, sums.reward.timeout_s, sums.reward.fields) == ("gym", 30.0, {"credit": "full"})
    assert sums.counts.rows == 6
    (own,) = task(on_tasks, "data=null", "eval.sums.reward={name: exact}").sets
    assert own.reward.name == "exact"


def test_one_source_of_tasks_is_judged_by_its_scorer_or_not_at_all(on_tasks: Path) -> None:
    trained = prepare_training(load(on_tasks, ["reward={name: gym, credit: partial}"]))
    assert trained.rewards[""].fields == trained.config.reward.fields == {"credit": "partial"}
    with pytest.raises(PROBLEMS, match=r"reward\.name=exact: data\.gym has a scorer of its own"):
        prepare_training(load(on_tasks))


def test_an_unknown_set_of_an_evaluation_is_named(on_tasks: Path) -> None:
    with pytest.raises(PROBLEMS, match=r"eval\.sums\.gym\.name: reasoning-gym has no data set 'chain_sums'"):
        task(on_tasks, "eval.sums.gym=chain_sums")
