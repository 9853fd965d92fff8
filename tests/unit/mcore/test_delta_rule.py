"""The gated delta rule, chunked and recurrent, against its definition: each head and position apart."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_troll.mcore.delta_rule import Rule, chunked, recurrent, unit

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(batch: int, length: int, heads: tuple[int, int], dims: tuple[int, int], seed: int) -> Inputs:
    """query, key, value, decay, beta and a state, for (key heads, value heads per key head)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    key_heads, value_heads = heads[0], heads[0] * heads[1]
    return (
        unit(normal(batch, length, key_heads, dims[0])),
        unit(normal(batch, length, key_heads, dims[0])),
        normal(batch, length, value_heads, dims[1]),
        -normal(batch, length, value_heads).exp(),
        normal(batch, length, value_heads).sigmoid(),
        normal(batch, value_heads, *dims),
    )


drawn = st.builds(
    inputs,
    batch=st.integers(1, 2),
    length=st.integers(1, 20),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    dims=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 2**31),
)
RULES: dict[str, Rule] = {
    "recurrent": recurrent,
    "one position a chunk": partial(chunked, size=1),
    "chunks of 6": partial(chunked, size=6),
    "one chunk": chunked,
}


def defined(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Every batch row, value head and position apart."""
    shared = value.shape[2] // key.shape[2]
    outputs, states = torch.zeros_like(value), torch.zeros_like(state)
    for row in range(len(value)):
        for head in range(value.shape[2]):
            memory = state[row, head]
            for t in range(value.shape[1]):
                q, k = query[row, t, head // shared], key[row, t, head // shared]
                memory = decay[row, t, head].exp() * memory
                memory = memory + beta[row, t, head] * torch.outer(k, value[row, t, head] - memory.T @ k)
                outputs[row, t, head] = memory.T @ q / q.shape[0] ** 0.5
            states[row, head] = memory
    return outputs, states


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@settings(max_examples=25, deadline=None)
@given(drawn)
def test_outputs_and_state_are_those_of_the_definition(rule: Rule, given: Inputs) -> None:
    for value, expected in zip(rule(*given), defined(*given), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@settings(max_examples=25, deadline=None)
@given(drawn)
def test_a_sequence_may_be_read_in_two_parts(rule: Rule, given: Inputs) -> None:
    *sequence, state = given
    whole, last = rule(*given)
    cut = whole.shape[1] // 3
    outputs = []
    for part in (slice(0, cut), slice(cut, None)):
        if whole[:, part].shape[1]:
            output, state = rule(*(tensor[:, part] for tensor in sequence), state)
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)


def gradients(rule: Callable[..., tuple[Tensor, Tensor]], given: Inputs) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    output, state = rule(*leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in (output, state))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradients_are_those_of_the_definition(rule: Rule) -> None:
    given = inputs(2, 15, (2, 2), (3, 4), seed=0)
    for gradient, expected in zip(gradients(rule, given), gradients(defined, given), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decay", [-1e-4, -0.1, -30.0, -1e4])
def test_fp32_stays_near_float64_over_many_chunks(decay: float) -> None:
    """Whether the state hardly decays or is gone at once: no exponent overflows."""
    *rest, _, beta, state = inputs(1, 1000, (1, 2), (16, 16), seed=0)
    decays = torch.full_like(beta, decay)
    expected, _ = recurrent(*rest, decays, beta, state)
    single = [tensor.float() for tensor in (*rest, decays, beta, state)]
    output, last = chunked(*single)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    for gradient in torch.autograd.grad(_sum_of(single), single[:-1]):
        assert gradient.isfinite().all()
    assert last.dtype == torch.float32


def _sum_of(given: list[Tensor]) -> Tensor:
    for tensor in given:
        tensor.requires_grad_()
    return chunked(*given)[0].sum()


def test_bf16_is_computed_in_fp32() -> None:
    narrow = [tensor.bfloat16() for tensor in inputs(1, 30, (1, 1), (8, 8), seed=0)]
    output, state = chunked(*narrow[:-1], None)
    expected, _ = chunked(*(tensor.float() for tensor in narrow[:-1]), None)
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(output, expected.bfloat16())
