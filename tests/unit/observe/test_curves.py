import pytest

from megatron_troll.observe.runs import jitter2


def test_jitter2_by_hand():
    """Second differences of (0, 1, 0, 1) are -2 and 2; a straight line has none."""
    assert jitter2([0, 1, 0, 1]) == 2.0
    assert jitter2([0.1, 0.2, 0.3]) == pytest.approx(0.0)
    assert jitter2([1.0, 2.0]) is None
