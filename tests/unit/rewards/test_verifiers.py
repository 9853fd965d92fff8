"""Each verifier on answers right and wrong."""

import random
import threading

import pytest

from megatron_troll.config import ConfigError, RewardConfig
from megatron_troll.data.boxed import last_boxed
from megatron_troll.rewards.reward import Votes, build
from megatron_troll.rewards.terms import resolve
from megatron_troll.rewards.verifiers.code import Code
from megatron_troll.rewards.verifiers.math_verify import PLAIN, _parsed_gold
from megatron_troll.types import Prompt

PLUGINS = "tests.unit.rewards.plugin_rewards"
GSM8K = {"pattern": r"#### (-?[\d,]+)", "ignore": ","}


def reward(text: str, answer: str, name: str, **fields) -> float:
    return build(RewardConfig(name=name, **fields))(text, Prompt("p", (), answer))


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("12", {}, 1.0),
        (" 12\n", {}, 1.0),
        (" 12", {"strip": False}, 0.0),
        ("12.", {}, 0.0),
        ("", {}, 0.0),
    ],
)
def test_exact(text, fields, expected):
    assert reward(text, "12", "exact", **fields) == expected


def test_exact_without_case():
    assert reward("YES", "yes", "exact") == 0.0
    assert reward("YES", "yes", "exact", ignore_case=True) == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so it is\n#### 1,018", 1.0),
        ("#### 5 no, wait\n#### 1018", 1.0),
        ("#### 1018 no, wait\n#### 5", 0.0),
        ("1018", 0.0),
        ("#### 10185", 0.0),
    ],
)
def test_regex_compares_the_last_match(text, expected):
    assert reward(text, "1018", "regex", **GSM8K) == expected


def test_regex_without_a_group_compares_the_whole_match():
    assert reward("colour: red", "red", "regex", pattern="red|blue") == 1.0


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{2x+1}", "1 + 2x", 1.0),
        (r"first \boxed{3}, then \boxed{34}", "34", 1.0),
        (r"\boxed{34} no, \boxed{3}", "34", 0.0),
        ("the answer is 34", "34", 1.0),
        ("the answer is 35", "34", 0.0),
        (r"\boxed{}", "34", 0.0),
        (r"\boxed{\frac{1}{", "34", 0.0),
        (r"\boxed{\frac{}{}}}}{{", "34", 0.0),
        ("", "34", 0.0),
        ("34", r"$34$", 1.0),
    ],
)
def test_math_verify(text, answer, expected):
    assert reward(text, answer, "math_verify") == expected


@pytest.mark.parametrize("seed", range(20))
def test_gold_answers_that_are_not_parsed_when_read_are_mathematics(seed):
    """Random ones of the pattern that is taken for plain."""
    draw = random.Random(seed)
    terms = ["7", "-1.5", "2\\pi", "3\\sqrt{2}", "-\\frac{1}{2}", "2\\dfrac{-3}{4}", "x", "4x^2", "n^{12}"]
    joined = draw.choice(terms)
    for _ in range(draw.randrange(4)):
        joined += draw.choice(["+", " - ", ", ", "=", ","]) + draw.choice(terms)
    answer = draw.choice(["{}", "({})", "[{}]"]).format(joined)
    assert PLAIN.fullmatch(answer)
    assert _parsed_gold(build(RewardConfig(name="math_verify"))._gold(answer))


def test_math_verify_can_ask_for_a_box():
    assert reward("the answer is 34", "34", "math_verify", boxed=True) == 0.0
    assert reward(r"\boxed{34}", "34", "math_verify", boxed=True) == 1.0


def test_math_verify_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(reward(r"\boxed{4}", "2+2", "math_verify")))
    thread.start()
    thread.join()
    assert found == [1.0]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{a{b}c} and \boxed{d{", "a{b}c"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\left\{1,2\right.} and }", r"\left\{1,2\right."),
        (r"\fbox {12}", "12"),
        (r"\boxed 204$", "204"),
        ("none", None),
    ],
)
def test_the_last_box_that_closes(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 50_000, r"\boxed{" * 1500 + "7" + "}" * 1500, "Answer:" * 20_000]
)
def test_an_answer_that_fell_into_a_loop_earns_nothing(text):
    """The first has a box that never closes, 50,000 times; the reward takes no recursion and no long time."""
    assert reward(f"I think it is {text}", "34", "math_verify") == 0.0


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (r"\boxed{seat}", "east", 0.0),
        (r"\boxed{no}", r"\text{no}", 1.0),
        (r"\boxed{\{1.6e-19, 2\}}", r"\{9.1\times10^{-31}, 2\}", 0.0),
        (r"\boxed{\begin{pmatrix}1.6e-19\\1\end{pmatrix}}", r"\begin{pmatrix}1.7e-19\\1\end{pmatrix}", 0.0),
        (r"\boxed{0.00333333}", r"\frac{1}{300}", 1.0),
        (r"\boxed{0.0033}", r"\frac{1}{300}", 0.0),
        (r"\boxed{0.0000001}", "0", 0.0),
        (r"\boxed{3 \text{ cm}}", r"3\text{ centimetres}", 1.0),
        (r"\boxed{3 \text{ cm}^2}", r"3\text{ square centimeters}", 1.0),
        (r"\boxed{3 \text{ sec}}", r"3\text{ min}", 0.0),
        (r"\boxed{FF_{16}}", "FF_{16}", 1.0),
        (r"\boxed{11_2}", "3", 1.0),
        ("Answer:\n\\[ 34 \\]", "34", 1.0),
        ("Answer: 100 dollars", "100", 1.0),
        ("Answer: 100 times", "7", 0.0),
        (r"\boxed{5 \text{ million}}", "5", 0.0),
        (r"\boxed{5 \text{ million}}", "5,000,000", 1.0),
        ("Answer: the number of ways is:\n\n$$34$$", "34", 1.0),
        ("Let me check the answer: it is even.\nSo \\boxed{34} holds.", "34", 1.0),
        (r"\boxed{" + "(" * 300 + "34" + ")" * 300 + "}", "34", 0.0),
    ],
)
def test_math_verify_beside_the_known_answers(text, answer, expected):
    assert reward(text, answer, "math_verify") == expected


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("3 quarters", r"\frac{3}{4}", "3"),
        (r"3\text{ quarters}", "0.75", "3"),
        ("1 half", "0.5", "1"),
        ("3 halves", "1.5", "3"),
        ("2 thirds of the cake", "2/3", "2"),
        ("3 squared", "9", "3"),
        ("2 cubed", "8", "2"),
        ("4 factorial", "24", "4"),
        ("5 dozen", "60", "5"),
        (r"5~\text{dozen eggs}", "60", "5"),
        ("3 percent", "0.03", "4"),
        (r"3\text{ per cent}", "3", "300"),
        ("2 below zero", r"\text{2 below zero}", "2"),
        ("5 degrees below zero", "5 degrees below zero", "5"),
        ("5 choose two", "5 choose two", "5"),
        ("7 remainder three", "7 Remainder three", "7"),
        ("7 remainder 3", "7 remainder 3", "7"),
        ("5 less than x", "5 less than x", "5"),
        ("3 meters squared", "3", "9"),
        ("36 apples", "36", "35"),
    ],
)
def test_words_that_change_the_number_before_them(answer, right, wrong):
    for text in (rf"\boxed{{{answer}}}", f"Answer: {answer}"):
        assert reward(text, right, "math_verify") == 1.0
        assert reward(text, wrong, "math_verify") == 0.0
    assert reward(rf"\boxed{{{wrong}}}", answer, "math_verify") == 0.0


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("6 m", "6 cm", 0.0),
        ("6 cm", "6 m", 0.0),
        ("6m", r"6\text{ cm}", 0.0),
        ("6 m", r"6\text{ m}", 1.0),
        ("6 m", "6 meters", 1.0),
        (r"6\text{ L}", "6 L", 1.0),
        ("6 L", "6 liters", 1.0),
        ("3 g", "3 kg", 0.0),
        ("10 s", "10 ms", 0.0),
        ("10 N", r"10\text{ N}", 1.0),
        ("6", "6 cm", 1.0),
        ("6 m", "6", 1.0),
        ("6x", "6 cm", 0.0),
        ("6x", "6x", 1.0),
        ("2m", "2m", 1.0),
    ],
)
def test_units_of_one_letter(answer, gold, expected):
    assert reward(rf"\boxed{{{answer}}}", gold, "math_verify") == expected


@pytest.mark.parametrize(
    "answer", [r"\text{}", r"\boxed{5", "}", "$", " ", r"\boxed{}", "(" * 300 + "1" + ")" * 300, "3" * 5000]
)
def test_a_gold_answer_that_is_no_mathematics_is_refused(answer):
    with pytest.raises(ValueError, match="is not mathematics"):
        build(RewardConfig(name="math_verify")).check(Prompt("p", (), answer))


@pytest.mark.parametrize(
    "answer", ["34", "-1.5", r"\text{even}", "B", r"\frac{1}{2}", "(1, 2)", "x>2", "7.", "$34$"]
)
def test_a_gold_answer_that_is_mathematics(answer):
    verifier = build(RewardConfig(name="math_verify"))
    verifier.check(Prompt("p", (), answer))
    assert verifier(rf"\boxed{{{answer}}}", Prompt("p", (), answer)) == 1.0


@pytest.mark.parametrize(
    ("name", "fields", "text", "voted"),
    [
        ("exact", {"ignore_case": True}, " Yes\n", "yes"),
        ("regex", GSM8K, "#### 5 no\n#### 1,018 ", "1018"),
        ("regex", GSM8K, "1018", None),
        ("math_verify", {}, r"\boxed{\frac{1}{2}}", "1/2"),
        ("math_verify", {}, r"\boxed{0.5}", "1/2"),
        ("math_verify", {}, r"\boxed{50\%}", "1/2"),
        ("math_verify", {}, r"\boxed{x = 34}", "34"),
        ("math_verify", {}, r"\boxed{\sqrt{2}}", "707107/500000"),
        ("math_verify", {}, r"\boxed{1.41421356}", "707107/500000"),
        ("math_verify", {}, r"\boxed{10^{30}+1}", f"{10**30 + 1}"),
        ("math_verify", {}, r"\boxed{1 + 2x}", "2*x + 1"),
        ("math_verify", {}, r"\boxed{2x+1}", "2*x + 1"),
        ("math_verify", {}, r"\boxed{\sqrt{-2}}", "sqrt(2)*I"),
        ("math_verify", {}, r"\boxed{\infty}", "oo"),
        ("math_verify", {}, r"\boxed{10^{5000}}", "10^{5000}"),
        ("math_verify", {}, r"\boxed{10^{5000} + \sqrt{2}}", r"10^{5000} + \sqrt{2}"),
        ("math_verify", {}, r"\boxed{1.6\times10^{-19}}", "1/6250000000000000000"),
        ("math_verify", {}, r"\boxed{101_2}", "5"),
        ("math_verify", {}, r"\boxed{\text{(B)}}", "B"),
        ("math_verify", {}, r"\boxed{B}", "B"),
        ("math_verify", {}, r"\boxed{\text{Even}}", "even"),
        ("math_verify", {}, "\\boxed{3}\nAnswer: 34.", "34"),
        ("math_verify", {}, r"\boxed{}", None),
        ("math_verify", {"boxed": True}, "34", None),
    ],
)
def test_votes(name, fields, text, voted):
    verifier = build(RewardConfig(name=name, **fields))
    assert isinstance(verifier, Votes)
    assert verifier.vote(text) == voted


def test_an_answer_that_is_a_program_does_not_vote():
    assert not issubclass(Code, Votes)


def test_resolving_fills_in_the_defaults_of_the_verifier():
    config = resolve(RewardConfig(name="regex", pattern="x", timeout_s=3.0))
    assert config.fields == {"pattern": "x", "ignore": ""}
    assert config.timeout_s == 3.0
    assert resolve(config) == config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"name": "exakt"}, "unknown method 'exakt'; did you mean 'exact'?"),
        ({"name": "exact", "strp": True}, "reward.strp: unknown key; did you mean 'strip'?"),
        ({"name": "exact", "strip": "yes"}, "reward.strip: got 'yes', expected true or false"),
        ({"name": "regex"}, "reward.pattern: missing; expected a string"),
        ({"name": "regex", "pattern": "("}, "reward.pattern: '(' is not a regular expression"),
        ({"name": "no_such_module:Class"}, "cannot import 'no_such_module'"),
        ({"name": PLUGINS + ":Missing"}, "does not lead to a subclass of Reward"),
        ({"name": PLUGINS + ":NotAReward"}, "does not lead to a subclass of Reward"),
        (
            {"name": PLUGINS + ":TakenField"},
            "declares fields that every reward has: ['timeout_s']",
        ),
    ],
)
def test_configurations_that_are_refused(config, said):
    with pytest.raises(ConfigError) as caught:
        resolve(RewardConfig(**config))
    assert said in str(caught.value)


def test_a_plug_in_is_found_by_its_import_path():
    assert reward("four", "", PLUGINS + ":Length") == 1.0
    assert reward("four", "", PLUGINS + ":Length", longest=3) == 0.0
