"""Frequencies of the rotary embedding, and its attention factor, against transformers'; what is refused."""

import copy
import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

from megatron_troll.config import ConfigError
from megatron_troll.mcore.rotary import attention_factor, inverse_frequencies
from megatron_troll.mcore.shape import Yarn, shape_of
from tests.dist.tiny import DENSE, NEXT
from tests.dist.tiny_families import LLAMA3, QWEN3_5_TEXT

HEADS = {"head_dim": 128, "max_position_embeddings": 131072}
LLAMA_3_2 = LLAMA3 | {"rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS: tuple[dict[str, Any], ...] = (
    LLAMA_3_2,
    LLAMA_3_2 | {"low_freq_factor": 0.5, "high_freq_factor": 9.0},
    {key: value for key, value in LLAMA_3_2.items() if key != "original_max_position_embeddings"},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    {"type": "linear", "rope_theta": 1e4, "factor": 3},
    YARN,
    YARN | {"factor": 0.5},
    YARN | {"factor": None},
    YARN | {"beta_fast": 64, "beta_slow": 2.0, "truncate": False},
    YARN | {"beta_fast": None, "beta_slow": None},
    YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    YARN | {"attention_factor": 0.9},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
    YARN | {"mscale": 0.7},
    YARN | {"original_max_position_embeddings": 4, "beta_slow": 1e-9},
)


def theirs(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    there: Any = AutoConfig.for_model(**config)
    return ROPE_INIT_FUNCTIONS[there.rope_parameters["rope_type"]](there)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_frequencies_and_attention_factor_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    for config in (DENSE | HEADS, NEXT | HEADS | {"partial_rotary_factor": 0.25}):
        config = config | {"rope_parameters": dict(scaling)}
        shape = shape_of(config)
        frequencies, factor = theirs(config)
        torch.testing.assert_close(inverse_frequencies(shape), frequencies, rtol=1e-7, atol=0)
        assert attention_factor(shape) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("section", [[2, 1, 1], [0, 3, 1], None])
@pytest.mark.parametrize("kind", [{"rope_type": "default", "rope_theta": 1e4}, YARN])
def test_three_axes_turn_text_like_one(section: list[int] | None, kind: dict[str, Any]) -> None:
    rope = kind | {"partial_rotary_factor": 0.25, "mrope_interleaved": True}
    rope |= {"mrope_section": section} if section else {}
    config: dict[str, Any] = QWEN3_5_TEXT | {"rope_parameters": rope}
    shape, positions = shape_of(config), torch.arange(100)
    there: Any = AutoConfig.for_model(**copy.deepcopy(config))
    embedding = Qwen3_5TextRotaryEmbedding(there)
    cos, sin = embedding(torch.zeros(1), positions.expand(3, 1, -1))
    angles = torch.outer(positions.float(), inverse_frequencies(shape)).repeat(1, 2)
    torch.testing.assert_close(cos[0], angles.cos() * attention_factor(shape), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[0], angles.sin() * attention_factor(shape), rtol=0, atol=1e-6)


def test_settings_of_older_files() -> None:
    """`rope_scaling` counts before `rope_parameters`, and original positions outside before those inside."""
    old = {key: value for key, value in YARN.items() if key != "rope_theta"}
    config = DENSE | HEADS | {"rope_theta": 5e5, "rope_scaling": old}
    for changed in ({}, {"original_max_position_embeddings": 4096}):
        frequencies, _ = theirs(config | changed | {"rope_scaling": dict(old)})
        mine = inverse_frequencies(shape_of(config | changed))
        torch.testing.assert_close(mine, frequencies, rtol=1e-7, atol=0)


def test_without_scaling() -> None:
    shape = shape_of(DENSE | HEADS)
    expected = [1e6 ** (-pair / 64) for pair in range(64)]
    torch.testing.assert_close(inverse_frequencies(shape), torch.tensor(expected), rtol=1e-5, atol=0)
    assert attention_factor(shape) == 1.0


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"rope_type": "dynamic", "factor": 2.0}, "rope type 'dynamic' is not supported (default, linear, "),
    ({"rope_type": "longrope", "factor": 2.0}, "rope type 'longrope' is not supported"),
    ({"rope_type": ["yarn"]}, "rope type \"['yarn']\" is not supported"),
    ({"rope_type": "linear"}, "rope_parameters: 'factor' is missing"),
    (LLAMA_3_2 | {"factor": -1}, "rope_parameters: factor -1 must be a number above 0"),
    (LLAMA_3_2 | {"low_freq_factor": 4.0}, "low_freq_factor 4.0 must be below high_freq_factor 4.0"),
    (YARN | {"truncate": 1}, "rope_parameters: truncate 1 must be true or false"),
    (YARN | {"extrapolation_factor": 1}, "'extrapolation_factor' is no key of rope type 'yarn' in "),
    (YARN | {"attn_factor": 0.5}, "give attention_factor too, which is 0.569315 to SGLang"),
    ({"full_attention": LLAMA_3_2}, "settings for full_attention layers alone are not supported"),
)


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_other_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        shape_of(DENSE | {"rope_parameters": {"rope_theta": 1e6} | settings})


def test_what_sglang_alone_reads_is_kept_beside_what_hugging_face_reads() -> None:
    scaling = YARN | {"attention_factor": 1.0, "attn_factor": 0.878}
    shape = shape_of(DENSE | {"rope_parameters": scaling})
    assert isinstance(shape.rope_scaling, Yarn)
    assert (attention_factor(shape), shape.rope_scaling.attn_factor) == (1.0, 0.878)
