"""Weight table of Apertus."""

import math

from megatron_troll.mcore.shape import ModelShape
from megatron_troll.weights.families.parts import HF, MEGATRON, attention, embeddings, layer_norms
from megatron_troll.weights.table import Entry, HFTensor, Table, Tensors

# Initial values in transformers: softplus of alpha_p is .8, and .8 that of alpha_n plus beta.
BETA, EPS = 0.5, -1e-6
ALPHA_P, ALPHA_N = (math.log(math.expm1(value)) for value in (0.8, 0.8 - BETA))


def table(shape: ModelShape) -> Table:
    """The table of a model of this shape."""
    norms = layer_norms(shape, "attention_layernorm", "feedforward_layernorm")
    return Table((*embeddings(shape), *norms, *attention(shape), *_mlp(shape)), shape.layer_types, 0)


def _mlp(shape: ModelShape) -> tuple[Entry, ...]:
    hf, megatron = HF + "mlp.", MEGATRON + "mlp."
    up = HFTensor(hf + "up_proj.weight", (shape.ffn, shape.hidden))
    down = HFTensor(hf + "down_proj.weight", (shape.hidden, shape.ffn))
    return (
        Entry((up,), (megatron + "linear_fc1.weight",), axis=0),
        *(
            Entry((HFTensor(f"{hf}act_fn.{name}", (1,), init=start),), (f"{megatron}activation_func.{name}",))
            for name, start in (("alpha_p", ALPHA_P), ("alpha_n", ALPHA_N))
        ),
        *(
            Entry(
                (HFTensor(f"{hf}act_fn.{name}", (), init=value),),
                (f"{megatron}activation_func.{name}",),
                _as_vector,
                _as_scalar,
                trained=False,
            )
            for name, value in (("beta", BETA), ("eps", EPS))
        ),
        Entry((down,), (megatron + "linear_fc2.weight",), axis=1),
    )


def _as_vector(tensors: Tensors) -> Tensors:
    return (tensors[0].reshape(1),)


def _as_scalar(parts: Tensors) -> Tensors:
    return (parts[0].reshape(()),)
