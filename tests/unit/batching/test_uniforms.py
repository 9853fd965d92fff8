"""Random numbers follow from a key, and a key from the numbers of older files."""

import numpy as np
import pytest

from megatron_troll.batching.uniforms import key_of, token_uniforms, uniforms

KEYS = (0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_a_key_is_found_again_from_its_numbers(key: int, length: int) -> None:
    numbers = token_uniforms(key, length)
    assert numbers.tolist() == [uniforms([key], position)[0] for position in range(length)]
    found = key_of(numbers)
    assert token_uniforms(found, length).tolist() == numbers.tolist()
    assert length == 1 or found == key


def test_numbers_of_no_key_are_refused() -> None:
    with pytest.raises(ValueError, match="of any key"):
        key_of(np.array([0.1, 0.2, 0.3]))
    assert key_of(np.zeros(0)) == 0
