"""Options that are refused: for what they are, and for what a machine lacks."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from megatron_troll.config import Model
from megatron_troll.mcore.options import check_machine, check_muon_layout, check_options
from megatron_troll.mcore.shape import shape_of
from tests.dist.tiny import DENSE, MOE


def model(**fields: Any) -> Model:
    return Model.model_validate({"path": "x"} | fields)


@pytest.mark.parametrize(
    ("sizes", "fields", "said"),
    [
        (DENSE, {"moe": {"bias_rate": 1e-3}}, "moe={'bias_rate': 0.001} needs a model with experts"),
        (MOE, {"moe": {"dispatcher": "deepep"}}, "needs layout.ep or layout.etp above 1"),
        (
            MOE,
            {"optimizer": {"offload": 0.5, "distributed": False}},
            "optimizer.offload needs optimizer.distributed=true",
        ),
        (MOE, {"optimizer": {"precision_aware": {}}, "dtype": "fp32"}, "needs dtype=bf16; it is fp32"),
        (MOE, {"optimizer": {"precision_aware": {}, "offload": 1.0}}, "exclude each other"),
        (
            MOE,
            {"optimizer": {"muon": {"scale": 1.0}}},
            "optimizer.muon={'scale': 1.0} needs optimizer.name=muon",
        ),
        (
            MOE,
            {"optimizer": {"name": "muon"}, "dtype": "fp32"},
            "set optimizer.distributed=false or dtype=bf16",
        ),
        (MOE, {"optimizer": {"name": "muon", "offload": 0.5}}, "optimizer.offload is for the state of adamw"),
        (MOE, {"recompute_modules": ("mlp",)}, "mlp is not part of a model with experts"),
        (DENSE, {"recompute_modules": ("moe",)}, "moe is not part of a model without experts"),
    ],
)
def test_what_has_no_meaning_is_refused(sizes: dict, fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("{", r"\{").replace(".", r"\.")):
        check_options(shape_of(sizes), model(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"moe": {"dispatcher": "allgather", "bias_rate": 1e-3, "freeze_router": True}},
        {"moe": {"dispatcher": "deepep"}, "layout": {"ep": 2}},
        {"optimizer": {"offload": 1.0}},
        {"optimizer": {"precision_aware": {"exp_avg": "fp8"}}},
        {"optimizer": {"name": "muon", "muon": {"momentum": 0.9}}},
        {"optimizer": {"name": "muon", "distributed": False}, "dtype": "fp32"},
    ],
)
def test_what_has_one_is_not(fields: dict) -> None:
    check_options(shape_of(MOE), model(**fields))


@pytest.mark.parametrize(
    ("layout", "world", "refused"),
    [
        ({"tp": 2}, 2, True),
        ({"tp": 4, "etp": 2}, 4, True),
        ({"tp": 2, "ep": 2}, 2, False),
        ({"tp": 2, "etp": 2}, 2, False),
        ({"tp": 2}, 4, False),
        ({"pp": 2}, 2, False),
    ],
)
def test_matrices_without_an_owner_of_their_own(layout: dict, world: int, refused: bool) -> None:
    sharded = model(layout=layout, optimizer={"name": "muon"})
    with pytest.raises(ValueError, match=r"set optimizer\.distributed=false") if refused else nullcontext():
        check_muon_layout(shape_of(MOE), sharded, world)
    check_muon_layout(shape_of(DENSE), sharded, world)
    check_muon_layout(shape_of(MOE), model(layout=layout), world)


DEEPEP = {"moe": {"dispatcher": "deepep"}, "layout": {"ep": 2}}


@pytest.mark.parametrize(
    "fields", [DEEPEP, {"optimizer": {"offload": 1.0}}, {"optimizer": {"precision_aware": {}}}]
)
def test_a_machine_without_cuda_is_told_so(fields: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs CUDA"):
        check_machine(model(**fields))


@pytest.mark.parametrize(
    ("fields", "package"),
    [(DEEPEP, "deep_ep"), ({"optimizer": {"precision_aware": {}}}, "transformer_engine")],
)
def test_a_missing_package_is_named(fields: dict, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"needs the package {package}: install"):
        check_machine(model(**fields))
