"""YAML, extends and overrides: what loads, and what is said about what does not."""

from pathlib import Path

import pytest

from megatron_troll.config import ConfigError
from megatron_troll.config.load import dump, load

BASE = """
name: first
models:
  policy:
    path: some/folder
    optimizer: {lr: 1e-6, betas: [0.9, 0.95]}
data:
  files: [train.jsonl]
objective:
  trust_region: {name: troll, bound: 0.05}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path, "base.yaml", BASE)


def test_floats_without_a_dot_are_floats_and_lists_become_tuples(base):
    optimizer = load(base).policy.optimizer
    assert optimizer.lr == 1e-6
    assert optimizer.betas == (0.9, 0.95)


def test_overrides_are_yaml(base):
    config = load(
        base,
        ["train.steps=7", "models.policy.layout={tp: 2, ep: 2}", "sft=null", "rollout.sampling.stop=['a,b']"],
    )
    assert config.train.steps == 7
    assert (config.policy.layout.tp, config.policy.layout.pp) == (2, 1)
    assert config.rollout.sampling.stop == ("a,b",)


def test_a_later_override_wins(base):
    assert load(base, ["seed=1", "seed=2"]).seed == 2


def test_deltas_merge_into_what_they_extend(base):
    path = write(base.parent, "delta.yaml", "extends: base.yaml\nmodels: {policy: {optimizer: {lr: 2e-4}}}\n")
    optimizer = load(path).policy.optimizer
    assert (optimizer.lr, optimizer.betas) == (2e-4, (0.9, 0.95))


def test_extends_takes_a_list_and_the_last_wins(base):
    write(base.parent, "long.yaml", "train: {steps: 100, updates: 2}\n")
    write(base.parent, "short.yaml", "train: {steps: 3}\n")
    path = write(base.parent, "both.yaml", "extends: [base.yaml, long.yaml, short.yaml]\nseed: 5\n")
    config = load(path)
    assert (config.train.steps, config.train.updates, config.seed) == (3, 2, 5)


def test_a_preset_is_found_by_its_name(tmp_path):
    path = write(
        tmp_path, "run.yaml", "extends: cpu_demo\nname: x\nmodels: {policy: {path: p}}\ndata: {files: [f]}\n"
    )
    assert load(path).rollout.prompts == 64


def test_a_chain_that_returns_to_itself_is_refused(tmp_path):
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    path = write(tmp_path, "b.yaml", "extends: a.yaml\n")
    assert "b.yaml -> " in refusal(path)
    assert "extends itself" in refusal(path)


def test_another_method_in_a_slot_drops_the_fields_of_the_first(base):
    assert load(base, ["objective.trust_region.alpha=2"]).objective.trust_region.fields == {
        "bound": 0.05,
        "alpha": 2,
    }
    clip = load(base, ["objective.trust_region.name=clip", "objective.trust_region.low=0.1"])
    assert clip.objective.trust_region.fields == {"low": 0.1}


def test_a_slot_without_a_name_holds_the_default_method(base):
    path = write(
        base.parent, "unnamed.yaml", BASE.replace("name: troll, bound: 0.05", "bound: 0.05, alpha: 1")
    )
    assert load(path).objective.trust_region.name == "troll"
    assert load(path, ["objective.trust_region.name=troll"]).objective.trust_region.fields["bound"] == 0.05
    assert load(path, ["objective.trust_region.name=clip"]).objective.trust_region.fields == {}


def test_a_field_alone_keeps_the_method_of_its_slot(base):
    bare = write(base.parent, "bare.yaml", BASE.split("objective")[0])
    config = load(bare, ["objective.trust_region.bound=0.1", "reward.timeout_s=3"])
    assert (config.objective.trust_region.name, config.objective.trust_region.fields) == (
        "troll",
        {"bound": 0.1},
    )
    assert (config.reward.name, config.reward.timeout_s) == ("exact", 3.0)
    clip = write(base.parent, "clip.yaml", "extends: bare.yaml\nobjective: {trust_region: {name: clip}}\n")
    assert load(clip, ["objective.trust_region.eps_low=0.1"]).objective.trust_region.name == "clip"
    delta = write(base.parent, "delta.yaml", "extends: bare.yaml\nobjective: {trust_region: {bound: 0.2}}\n")
    assert load(delta).objective.trust_region.name == "troll"


def test_another_verifier_keeps_the_limits_that_are_not_its_own(base):
    config = load(
        base, ["reward={name: regex, pattern: x, timeout_s: 3, overlong: {mode: mask}}", "reward.name=exact"]
    )
    assert config.reward.fields == {}
    assert (config.reward.timeout_s, config.reward.overlong.mode) == (3.0, "mask")


def test_the_resolved_configuration_loads_back_equal(base, tmp_path):
    config = load(
        base,
        ["models.policy.optimizer.lr=1e-6", "data.schema=dapo", "reward={name: regex, pattern: '1e-6'}"],
    )
    again = load(write(tmp_path, "resolved.yaml", dump(config)))
    assert again == config
    assert again.reward.fields == {"pattern": "1e-6"}


def test_an_unknown_key_names_file_line_and_the_nearest_known_key(base):
    path = write(base.parent, "typo.yaml", BASE + "train:\n  step: 10\n")
    assert refusal(path) == f"train.step: unknown key; did you mean 'steps'? ({path} line 12)"


def test_an_unknown_key_with_no_neighbour_lists_the_known_ones(base):
    assert "known: cp, ep, etp, pp, tp, vpp" in refusal(base, "models.policy.layout.zzz=1")


def test_an_override_in_error_is_quoted(base):
    assert (
        refusal(base, "train.setps=3")
        == "train.setps: unknown key; did you mean 'steps'? (override 'train.setps=3')"
    )
    assert "expected key=value" in refusal(base, "train.steps")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("models.policy.layout.tp=0", "models.policy.layout.tp: got 0, expected an integer >= 1"),
        ("train.steps=3.5", "train.steps: got 3.5, expected an integer >= 1"),
        ("train.packing=yes", "train.packing: got 'yes', expected true or false"),
        ("models.policy.optimizer.lr=-1", "expected a number > 0"),
        ("models.policy.optimizer.lr=.nan", "expected a number > 0"),
        ("models.policy.optimizer.betas=[0.9, 1.5]", "betas.1: got 1.5, expected a number >= 0 and < 1"),
        ("models.policy.dtype=fp8", "got 'fp8', expected one of fp32, bf16"),
        (
            "data.held_out=-1",
            "held_out: got -1, expected an integer >= 1 or a list of one or more, each a string",
        ),
        ("data.files=[]", "data.files: got [], expected a list of one or more, each a string"),
        ("sft.steps=3", "sft.files: missing; expected a list of one or more, each a string"),
        ("reward.timeout_s='10'", "reward.timeout_s: got '10', expected a number > 0"),
        ("evaluation.prompts=0", "evaluation.prompts: got 0, expected an integer >= 1 or null"),
        ("models={actor: {path: x}, policy: null}", "models.policy: got None, expected a mapping"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(base, override, said):
    assert said in refusal(base, override)


def test_a_run_without_a_policy_is_refused(tmp_path):
    path = write(tmp_path, "run.yaml", "name: x\nmodels: {actor: {path: p}}\ndata: {files: [f]}\n")
    missing, unknown = refusal(path).splitlines()
    assert missing.startswith("models.policy: missing")
    assert unknown == f"models.actor: unknown key; known: critic, policy, reference, rollout ({path} line 2)"


def test_every_wrong_key_is_reported_at_once(base):
    assert len(refusal(base, "train.setps=3", "seeds=1").splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [1,\n", "line 2: not valid YAML"),
        ("name: a\nseed: 1\nname: b\n", "line 3: 'name' is given twice"),
        ("- a\n", "line 1: expected a mapping"),
        ("extends: cpu_dmo\n", "line 1: extends: no preset 'cpu_dmo'; did you mean 'cpu_demo'?"),
        ("extends: missing.yaml\n", "missing.yaml: cannot be read"),
        ("extends: 3\n", "line 1: extends: expected a preset"),
        ("name: !!binary aGk=\n", "line 1: a value of the YAML type"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, text, said):
    path = write(tmp_path, "bad.yaml", text)
    message = refusal(path)
    assert said in message
    assert str(tmp_path) in message


def test_dates_and_words_stay_text(tmp_path):
    path = write(
        tmp_path, "run.yaml", "name: 2024-01-01\nruns: off\nmodels: {policy: {path: p}}\ndata: {files: [f]}\n"
    )
    assert (load(path).name, load(path).runs) == ("2024-01-01", "off")


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(9), "line 1: more than 10,000 values, aliases written out"),
        ("\n".join(f"k{n}: 1" for n in range(20_000)), "line 5000: more than 10,000 values"),
        ("\n".join(f"key{n}: 1" for n in range(100_000)), "more than 262,144 bytes; no configuration"),
        ("a: &a {b: *a}", "line 1: this value contains itself, through an alias"),
        ("name: x\na: &a\n  - 1\n  - [*a]", "line 2: this value contains itself, through an alias"),
        ("name: x\na: " + "[" * 3000 + "]" * 3000, "line 2: more than 50 levels deep"),
        ("{a: " * 60 + "1" + "}" * 60, "line 1: more than 50 levels deep"),
        ("name: x\nseed: !!int abc", "line 2: 'abc' cannot be read as tag:yaml.org,2002:int"),
        ("seed: !!bool maybe", "line 1: 'maybe' cannot be read as tag:yaml.org,2002:bool"),
        ("seed: !!float x", "line 1: 'x' cannot be read as tag:yaml.org,2002:float"),
        ("seed: !!timestamp x", "line 1: 'x' cannot be read as tag:yaml.org,2002:timestamp"),
        ("seed: !!binary '*'", "line 1: a value of the YAML type tag:yaml.org,2002:binary"),
        ("seed: !!python/object/apply:os.system [ls]", "got ['ls'], expected an integer"),
        ("seed: !mine 1", "line 1: not valid YAML: could not determine a constructor for the tag"),
        ("seed: " + "1" * 5000, "line 1: '1111"),
        ('name: "a\\uD83D"', "line 1: 'a\\ud83d': half a character"),
        ('"\\uD83D": 1', "line 1: '\\ud83d': half a character"),
        ('models: {policy: {path: "a\\0b"}}', "line 1: 'a\\x00b': the character 0"),
        ("extends: [base.yaml, base.yaml]", "line 1: extends: 'base.yaml' is given twice"),
    ],
)
def test_a_hostile_document_is_refused_by_its_line(base: Path, tmp_path: Path, text: str, said: str) -> None:
    message = refusal(write(tmp_path, "hostile.yaml", text))
    assert said in message
    assert len(message) < 4000


def test_files_that_extend_each_other_manifold_are_read_once(tmp_path: Path) -> None:
    write(tmp_path, "a0.yaml", BASE)
    write(tmp_path, "b0.yaml", BASE)
    for n in range(1, 30):
        for name in "ab":
            write(tmp_path, f"{name}{n}.yaml", f"extends: [a{n - 1}.yaml, b{n - 1}.yaml]")
    assert load(tmp_path / "a29.yaml").name == "first"


def test_files_extend_each_other_over_fifty_files(tmp_path: Path) -> None:
    write(tmp_path, "f0.yaml", BASE)
    for n in range(1, 60):
        write(tmp_path, f"f{n}.yaml", f"extends: f{n - 1}.yaml")
    assert load(tmp_path / "f49.yaml").name == "first"
    assert "extended over more than 50 files" in refusal(tmp_path / "f59.yaml")


def test_many_wrong_keys_are_named_on_one_screen(base: Path) -> None:
    keys = ", ".join(f"k{n}: 1" for n in range(500))
    lines = refusal(base, f"train={{{keys}}}").splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("train.k0: unknown key; ")
    assert lines[-1] == "and 480 keys more"


def test_an_override_of_many_parts_is_refused(base: Path) -> None:
    assert "expected key=value" in refusal(base, ".".join(["a"] * 3000) + "=1")


@pytest.mark.parametrize(
    "name", ["''", ".", "..", "/tmp/x", "a/b", "../x", "' a'", '"a\\nb"', '"a\\e[31m"', "x" * 201]
)
def test_a_run_is_named_like_one_folder(base: Path, name: str) -> None:
    assert refusal(base, f"name={name}").startswith("name: got ")


@pytest.mark.parametrize("name", ["a", "qwen3-30b_v1.2", "\u00fcber lang", "x" * 200, ".hidden"])
def test_other_names_are_taken(base: Path, name: str) -> None:
    assert load(base, [f"name={name}"]).name == name


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=4294967296", "seed: got 4294967296, expected an integer >= 0 and < 4294967296"),
        ("seed=-1", "seed: got -1, expected an integer >= 0 and < 4294967296"),
        (
            "models.policy.optimizer.betas=[0.9, 1]",
            "optimizer.betas.1: got 1, expected a number >= 0 and < 1",
        ),
        ("models.policy.optimizer.muon.momentum=1", "muon.momentum: got 1, expected a number >= 0 and < 1"),
        ("models.policy.optimizer.lr=1e300", "optimizer.lr: got 1e+300, expected a number > 0 and <= 1e+30"),
        ("models.policy.optimizer.eps=1e-300", "optimizer.eps: got 1e-300, expected a number >= 1e-30"),
        (
            "models.policy.optimizer.weight_decay=1e9",
            "weight_decay: got 1000000000.0, expected",
        ),
        (
            "observe.hang_timeout_s=1e10",
            "got 10000000000.0, expected a number > 0 and <= 8640000",
        ),
        (
            "reward.timeout_s=1e10",
            "reward.timeout_s: got 10000000000.0, expected",
        ),
        ("rollout.sglang.deadline_s=1e10", "deadline_s: got 10000000000.0"),
        ("launch.ranks=1000000", "launch.ranks: got 1000000, expected an integer >= 1 and <= 65536"),
        ("launch.threads=1000000", "launch.threads: got 1000000, expected an integer >= 1 and <= 1024"),
        ("train.steps=3000000000", "expected an integer >= 1 and <= 2147483647"),
        (
            "rollout.sampling.temperature=1e-30",
            "got 1e-30, expected 0 (greedy) or a number >= 0.001",
        ),
        ("evaluation.temperature=1e9", "evaluation.temperature: got 1000000000.0, expected"),
    ],
)
def test_values_that_would_fail_in_the_ranks_are_refused(base: Path, override: str, said: str) -> None:
    assert said in refusal(base, override)
