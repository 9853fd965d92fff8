"""What of a config.json is read, and what is refused."""

from typing import Any

import pytest

from megatron_troll.data.demo_model import model_config
from megatron_troll.mcore.shape import shape_of


@pytest.mark.parametrize(("fields", "softcap"), [({}, None), ({"final_logit_softcapping": 30.0}, 30.0)])
def test_a_soft_cap_is_read(fields: dict[str, Any], softcap: float | None) -> None:
    assert shape_of(model_config() | fields).softcap == softcap


@pytest.mark.parametrize("softcap", [0, -5.0])
def test_a_soft_cap_must_be_above_0(softcap: float) -> None:
    with pytest.raises(ValueError, match=r"config.json: final_logit_softcapping .* must be above 0"):
        shape_of(model_config() | {"final_logit_softcapping": softcap})
