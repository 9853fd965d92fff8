"""A layout that cannot divide a model is refused with the sizes that can."""

import pytest

from megatron_troll.config import ConfigError, Layout
from megatron_troll.mcore.layout import check_layout, cuts
from megatron_troll.mcore.shape import shape_of

# SmolLM2-135M's config.json: heads of which few sizes divide both kinds.
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}


@pytest.mark.parametrize(
    ("tp", "what", "sizes"),
    [
        (2, "attention heads (9)", "1 or 3"),
        (4, "attention heads (9)", "3"),
        (9, "key-value heads (3)", "3"),
    ],
)
def test_tensor_parallelism_that_does_not_divide_the_heads(tp: int, what: str, sizes: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(shape_of(SMOLLM2), Layout(tp=tp))
    assert str(caught.value) == f"{what} cannot be divided by tp ({tp}); set tp to {sizes}"


@pytest.mark.parametrize("tp", [1, 3])
def test_the_sizes_that_are_named_do_divide_it(tp: int) -> None:
    layout = Layout(tp=tp)
    check_layout(shape_of(SMOLLM2), layout)
    assert all(cut.fits for cut in cuts(shape_of(SMOLLM2), layout))
