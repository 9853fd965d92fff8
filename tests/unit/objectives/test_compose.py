"""The table of ALGORITHMS 7, walked whole in both directions, and what every allowed objective owes."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_troll.config import ConfigError, ObjectiveConfig, Slot, known_methods
from megatron_troll.objectives import Objective, compose, resolve
from megatron_troll.objectives.compose import SLOTS, head_gradient, head_remarks, refuse_dense_head, remarks
from megatron_troll.objectives.energy import Energy
from megatron_troll.objectives.objective import merge_reads
from megatron_troll.objectives.slots import Correction, Policy, Statistics, Term
from megatron_troll.types import HeadOutputs, HeadRequest, ObjectiveInputs, Support
from tests.unit.golden.records import inputs_of, topk_record
from tests.unit.objectives.rows import Rows, sample, statistics_of

ADVANTAGES = ("dr_grpo", "gae", "grpo", "rloo")
RATIOS = ("dfpo", "gspo", "token")
REGIONS = ("cispo", "clip", "cppo", "dppo", "minpro", "none", "symclip", "trm", "troll")
KLS = ("exact", "k1", "k2", "k3", "k3_k2grad", "none", "tike", "tike_sparse")
CORRECTIONS = ("icepop", "jackpot", "none", "tis")

# ALGORITHMS 7 as written there: the corrections that go with each pair. Pairs that are absent are refused.
TABLE = {
    ("token", "none"): "none tis icepop jackpot",
    ("token", "clip"): "none tis icepop jackpot",
    ("token", "symclip"): "none tis icepop",
    ("token", "troll"): "none tis icepop jackpot",
    ("token", "cppo"): "none",
    ("token", "dppo"): "none",
    ("token", "trm"): "none",
    ("token", "cispo"): "none tis icepop",
    ("token", "minpro"): "none tis icepop",
    ("gspo", "none"): "none tis icepop",
    ("gspo", "clip"): "none tis icepop",
    ("gspo", "troll"): "none tis icepop",
    ("dfpo", "clip"): "none tis icepop",
    ("dfpo", "troll"): "none tis icepop",
}
MASKS = ("cppo", "dppo", "trm")
# With `against: old`, masks leave the correction to its slot.
FROM_OLD = {("token", mask): "none tis icepop" for mask in MASKS}


def slot(name: str, **fields: object) -> Slot:
    return Slot.model_validate({"name": name} | fields)


def config(ratio: str, region: Slot | str, correction: str, **slots: object) -> ObjectiveConfig:
    named = {"ratio": slot(ratio), "correction": slot(correction)} | slots
    return ObjectiveConfig(trust_region=slot(region) if isinstance(region, str) else region, **named)  # pyright: ignore[reportArgumentType]


def test_every_method_is_in_the_table():
    listed = (ADVANTAGES, RATIOS, REGIONS, KLS, CORRECTIONS)
    assert {name: known_methods(folder) for name, (folder, _) in SLOTS.items()} == dict(zip(SLOTS, listed))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("region", REGIONS)
def test_the_whole_product_against_the_table(ratio, region):
    for advantage, kl, correction in product(ADVANTAGES, KLS, CORRECTIONS):
        allowed = correction in TABLE.get((ratio, region), "").split()
        allowed = allowed and not (ratio == "dfpo" and advantage == "gae")
        wanted = config(ratio, region, correction, advantage=slot(advantage), kl=slot(kl))
        if allowed:
            compose(wanted)
            continue
        with pytest.raises(ConfigError, match=r"^objective: "):
            compose(wanted)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_against_the_old_policy(mask):
    for ratio, correction in product(RATIOS, CORRECTIONS):
        wanted = config(ratio, slot(mask, against="old"), correction)
        if correction in FROM_OLD.get((ratio, mask), "").split():
            compose(wanted)
            continue
        with pytest.raises(ConfigError, match=r"^objective: "):
            compose(wanted)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize(("ratio", "region"), TABLE, ids=[f"{a}-{b}" for a, b in TABLE])
def test_aggregations(ratio, region, aggregation):
    """Any goes with any, but CISPO is token-mean (6.3)."""
    wanted = config(ratio, region, "none", aggregation=aggregation)
    if region == "cispo" and aggregation != "token-mean":
        with pytest.raises(ConfigError, match="'cispo' is not defined with aggregation"):
            compose(wanted)
    else:
        compose(wanted)


def allowed() -> list:
    found = [(*pair, {}, c) for pair, corrections in TABLE.items() for c in corrections.split()]
    found += [(*pair, {"against": "old"}, c) for pair, cs in FROM_OLD.items() for c in cs.split()]
    found += [("token", "troll", {"bound": {"from": "cppo"}}, c) for c in CORRECTIONS]
    return [pytest.param(*case, id="-".join((*case[:2], *case[2], case[3]))) for case in found]


@pytest.mark.parametrize(("ratio", "region", "fields", "correction"), allowed())
def test_every_allowed_objective(ratio, region, fields, correction):
    rows = sample([5, 3, 0, 4], vocab=12)
    for kl in KLS:
        penalty = slot(kl) if kl == "none" else slot(kl, beta=0.3)
        objective = compose(config(ratio, slot(region, **fields), correction, kl=penalty))
        whole = rows.inputs(objective)
        gradient = check_loss(objective, whole, rows)
        check_split(objective, whole, rows, gradient)
        check_zero_weight(objective, whole, rows)


def check_loss(objective: Objective, inputs: ObjectiveInputs, rows: Rows) -> Tensor:
    terms = objective.loss(inputs, statistics_of(objective, [inputs]))
    (gradient,) = torch.autograd.grad(terms.loss, rows.new, retain_graph=True)
    assert terms.loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient != 0).any()
    assert terms.per_token.keys() <= objective.diagnostics.keys()
    for name, values in terms.per_token.items():
        assert values.shape == rows.weight.shape, name
        assert not values.requires_grad, name
    return gradient


def check_split(objective: Objective, inputs: ObjectiveInputs, rows: Rows, expected: Tensor) -> None:
    """Two micro-batches that split every group, with the statistics of both."""
    parts = [rows.only([1, 2]).inputs(objective), rows.only([3, 0]).inputs(objective)]
    whole = objective.statistics(inputs)
    statistics = statistics_of(objective, parts)
    assert (whole is None) == (statistics is None) == (not objective.needs_statistics)
    for name, total in (whole or {}).items():
        assert torch.allclose((statistics or {})[name], total, rtol=1e-12, atol=1e-12), name
    losses = [objective.loss(part, statistics).loss for part in parts]
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), rows.new)
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12)


def check_zero_weight(objective: Objective, inputs: ObjectiveInputs, rows: Rows) -> None:
    inputs = replace(inputs, weight=torch.zeros_like(rows.weight))
    loss = objective.loss(inputs, statistics_of(objective, [inputs])).loss
    (gradient,) = torch.autograd.grad(loss, rows.new)
    assert loss.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (config("gspo", "dppo", "none"), r"'dppo' is not defined with ratio 'gspo': it masks each token"),
        (config("gspo", "symclip", "none"), "its bound and its cancellation are those of token ratios"),
        (config("dfpo", "none", "none"), "that a clip leaves .*goes with trust_region clip, troll"),
        (config("token", "cppo", "tis"), "contains that correction already; .*against=old"),
        (config("gspo", "clip", "jackpot"), "rejects single tokens, .* goes with ratio token$"),
        (config("dfpo", "clip", "none", advantage=slot("gae")),
         "advantages centred on their group; it goes with advantage dr_grpo, grpo"),
        (config("token", "clip", "tis", old="engine"), "is 1 with objective.old=engine"),
        (config("token", slot("troll", bound={"from": "dppo"}), "none"), "bound.from: got 'dppo'"),
        (config("token", slot("troll", bound={"delta": 0.1}), "none"), "bound.from: missing"),
        (config("token", slot("troll", bound={"from": "cppo", "divergence": "tv"}), "none"),
         "bound.divergence: unknown key"),
        (config("token", slot("troll", bound="cppo"), "none"), "bound: got 'cppo', .* >= 0 or a map"),
        (config("token", slot("troll", bound={"from": "cppo", "w_min": 0.0}), "none"), "bound.w_min: got 0"),
        (config("token", slot("cppo", w_min=0.0), "none"), r"w_min: got 0.0, .* > 0 and <= 1"),
        (config("token", slot("cppo", divergence="tv"), "none"), "got 'tv', expected one of binary_tv"),
        (config("token", slot("dppo", k=0), "none"), "trust_region.k: got 0, expected an integer >= 1"),
        (config("token", slot("trm", over="mean"), "none"), "over: got 'mean', expected one of max, avg"),
        (config("token", slot("symclip", eps=-1.0), "none"), "trust_region.eps: got -1.0"),
        (ObjectiveConfig(ratio=slot("dfpo", transform="orth"), trust_region=slot("clip")),
         "objective.ratio.*orth can reverse updates; set allow_negative: true"),
        (ObjectiveConfig(trust_region=slot("trol")),
         r"trust_region.name: unknown method 'trol'; did you mean 'troll'\? Known here: cispo, clip"),
        (ObjectiveConfig(advantage=slot("grop")), "objective.advantage.name.*did you mean 'grpo'"),
        (ObjectiveConfig(trust_region=slot("troll", bund=1)), r"trust_region.bund: .*did you mean 'bound'\?"),
        (ObjectiveConfig(trust_region=slot("troll", bound=-0.1)), "trust_region.bound: got -0.1, .* >= 0"),
        (ObjectiveConfig(trust_region=slot("troll", delta=1.0)), "trust_region.delta: got 1.0"),
        (ObjectiveConfig(trust_region=slot("clip", eps_low=1.5)), "trust_region.eps_low: got 1.5"),
        (ObjectiveConfig(ratio=slot("no.such.module:Class")), "objective.ratio.name: cannot import"),
        (ObjectiveConfig(ratio=slot("megatron_troll.objectives.kl.none:NoKl")),
         "does not lead to a subclass of Ratio"),
    ],
)  # fmt: skip
def test_refusals_say_why(wanted, message):
    with pytest.raises(ConfigError, match=f"(?s){message}") as caught:
        compose(wanted)
    assert len(str(caught.value).splitlines()) == 1


def test_the_default_is_grpo_with_troll():
    objective = compose(ObjectiveConfig())
    assert objective.reads == HeadRequest(topk=Support("old", 64, 1e-5))
    assert objective.reads_old == HeadRequest(topk=Support("own", 64, 1e-5))
    assert not objective.needs_statistics
    assert remarks(ObjectiveConfig(), objective) == ()


def test_resolving_writes_out_every_field():
    resolved = resolve(ObjectiveConfig(trust_region=slot("troll", bound=0.1)))
    assert resolved.trust_region.fields == {
        "bound": 0.1, "alpha": 1.0, "k": 64, "delta": 1e-5, "p_d": 1e-12, "support": "old",
    }  # fmt: skip
    assert resolve(resolved) == resolved
    assert compose(resolved) == compose(ObjectiveConfig(trust_region=slot("troll", bound=0.1)))


def test_what_a_reader_must_know():
    troll_with_budget = config("dfpo", slot("troll", bound={"from": "cppo"}), "none")
    experimental, direction = remarks(troll_with_budget, compose(troll_with_budget))
    assert experimental.startswith("experimental: dfpo")
    assert "KL(mu || new)" in direction


KEPT_ALONE = "LM head: gradient through the kept top-K columns only; no method needs the full softmax"


def test_the_sparse_head_takes_what_reads_kept_tokens_alone():
    for kl, correction in product(KLS, CORRECTIONS):
        objective = compose(config("token", "troll", correction, kl=slot(kl)))
        if kl in ("none", "tike_sparse"):
            refuse_dense_head(objective)
            assert head_gradient(objective) == KEPT_ALONE
            continue
        with pytest.raises(ConfigError, match=r"head=sparse: the full softmax is differentiated by kl; set"):
            refuse_dense_head(objective)
        assert head_gradient(objective).endswith("whole rows recomputed in backward, because of kl")


@pytest.mark.parametrize(
    ("region", "slots", "because"),
    [
        ("clip", {"kl": slot("k3")}, "trust_region, kl"),
        ("troll", {"entropy_bonus": 0.01}, "entropy_bonus"),
        ("troll", {"entropy_bonus": 0.01, "entropy_over": "sparse"}, ""),
    ],
)
def test_what_the_head_is_differentiated_through_is_named(region, slots, because):
    objective = compose(config("token", region, "none", **slots))
    said = head_gradient(objective)
    assert said.endswith(f"because of {because}") if because else said == KEPT_ALONE


def test_a_run_whose_records_keep_every_token_says_so():
    sparse, dense = compose(config("token", "troll", "none")), compose(config("token", "clip", "none"))
    assert list(head_remarks(sparse, 64)) == [
        KEPT_ALONE,
        "K = 64 covers the vocabulary of 64 tokens: nothing is sparse in this run",
    ]
    assert list(head_remarks(sparse, 65)) == [KEPT_ALONE]
    assert len(list(head_remarks(dense, 8))) == 1


def test_measuring_energy_reads_the_full_softmax():
    objective = replace(compose(config("token", "troll", "none")), energy=Energy())
    assert head_gradient(objective).endswith("because of observe.energy")
    with pytest.raises(ConfigError, match=r"observe\.energy=false"):
        refuse_dense_head(objective)


class HalfOfTheStep(Correction):
    """A method from outside the package: weighs by a number over the whole step."""

    share: float = 0.5

    @property
    def needs_statistics(self) -> bool:
        return True

    def statistics(self, inputs: ObjectiveInputs) -> Statistics:
        return {"tokens": torch.tensor(float(len(inputs.weight)))}

    def weight(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        assert statistics is not None
        return Term(self.share / statistics["tokens"] * torch.ones_like(inputs.advantage))


def test_a_method_by_import_path_and_statistics_of_the_step():
    path = f"{__name__}:HalfOfTheStep"
    objective = compose(ObjectiveConfig(trust_region=slot("none"), correction=slot(path, share=0.25)))
    assert resolve(ObjectiveConfig(correction=slot(path))).correction.fields == {"share": 0.5}
    logp = torch.zeros(4)
    readings = HeadOutputs(logp, None, None)
    inputs = inputs_of(readings, readings, torch.ones(4), torch.ones(4))
    statistics = objective.statistics(inputs)
    assert statistics is not None
    over_two_ranks = {name: 2 * value for name, value in statistics.items()}
    assert objective.loss(inputs, over_two_ranks).loss.item() == pytest.approx(-4 * 0.25 / 8)
    assert compose(ObjectiveConfig(trust_region=slot("none"))).statistics(inputs) is None


def test_reads_of_the_slots_are_joined():
    first, second = HeadRequest(topk=Support("old", 8, 0.0)), HeadRequest(logp=True, full=True)
    third = HeadRequest(topk=Support("own", 8, 0.0), at_rollout=True)
    assert merge_reads((first, second, first)) == HeadRequest(
        logp=True, topk=Support("old", 8, 0.0), full=True
    )
    joined = merge_reads((second, first, third))
    assert joined.supports == (Support("old", 8, 0.0), Support("own", 8, 0.0))
    assert joined.at_rollout


def test_each_method_sees_the_record_it_asked_for():
    """TROLL at the old policy's 3 tokens, TIKE at the 2 largest of the new one."""
    objective = compose(
        config("token", slot("troll", k=3, delta=0.0), "none", kl=slot("tike", k=2, beta=1.0))
    )
    rows = sample([4, 4], vocab=12)
    terms = objective.loss(rows.inputs(objective))
    p, q = rows.new.softmax(1).detach(), rows.reference.softmax(1)
    top = p.topk(2).indices
    ratio = (p / rows.old.softmax(1)).gather(1, rows.target[:, None])[:, 0]
    expected = ratio * (p * (p / q).log()).gather(1, top).sum(1)
    assert torch.allclose(terms.per_token["reference_kl"], expected)
    assert terms.per_token["kept_old"].max() <= 4
    inputs = rows.inputs(objective)
    with pytest.raises(ValueError, match="the head gave no record of"):
        objective.loss(replace(inputs, new=replace(inputs.new, others={})))


def test_every_old_record_is_cut_from_the_engine_s():
    """`old: engine` gives one wide record for all."""
    troll, tike = slot("troll", k=3, delta=0.01), slot("tike", k=5, support="old")
    objective = compose(config("token", troll, "none", kl=tike))
    rows = sample([4, 4], vocab=12)
    wide = topk_record(rows.old.log_softmax(1), rows.target, 11, 0.0)
    logp = wide.logits.gather(1, wide.place[:, None])[:, 0]
    old = objective.prepare_old(HeadOutputs(logp, wide, None))
    direct = rows.inputs(objective).old
    assert old.topk is not None
    assert direct.topk is not None
    assert torch.equal(old.topk.ids, direct.topk.ids)
    support = Support("own", 5, 0.0)
    assert torch.equal(old.others[support].ids, direct.others[support].ids)
    with pytest.raises(ValueError, match="reads the old policy's top-K record; none was given"):
        compose(config("token", "clip", "none", kl=tike)).prepare_old(HeadOutputs(logp, None, None))


def test_advantage_belongs_to_the_objective():
    advantage: Tensor = compose(ObjectiveConfig()).advantage(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    assert advantage.tolist() == pytest.approx([0.70710, -0.70710], abs=1e-4)


def test_a_record_made_for_this_objective_is_not_measured_again() -> None:
    """The head chooses by rows rounded to the dtype of the model and reads the chosen ids more finely: by its
    own logits a record may then hold a little less than it was cut for."""
    logits, target = torch.randn(20, 30), torch.arange(20)
    record = topk_record(logits, target, 12, 0.3)
    assert record.lse is not None
    rounded = replace(record, lse=record.lse + 0.05)
    objective = compose(config("token", slot("troll", k=12, delta=0.3), "none"))
    assert objective.check_old(HeadOutputs(None, rounded, None)).topk is rounded
    with pytest.raises(ValueError, match="keeps fewer tokens than k=12"):
        objective.prepare_old(HeadOutputs(None, rounded, None))
