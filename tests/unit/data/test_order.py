import pytest

from megatron_troll.data.order import PromptOrder


def test_every_epoch_draws_each_prompt_once_in_its_own_order():
    order = PromptOrder(10, seed=0)
    first, second = order.next(10), order.next(10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != list(range(10))


def test_the_same_seed_draws_the_same_prompts_in_any_batch_size():
    whole = PromptOrder(7, seed=3).next(20)
    order = PromptOrder(7, seed=3)
    assert order.next(3) + order.next(10) + order.next(7) == whole
    assert PromptOrder(7, seed=4).next(20) != whole


def test_a_resumed_order_continues_where_the_first_stopped():
    order = PromptOrder(7, seed=1)
    order.next(10)
    resumed = PromptOrder(7, seed=1)
    resumed.seek(order.position)
    assert resumed.next(12) == order.next(12)
    assert resumed.position == 22


def test_the_order_is_the_same_on_every_machine():
    assert PromptOrder(6, seed=0).next(6) == [0, 2, 1, 5, 4, 3]


def test_without_shuffling_the_order_is_that_of_the_file():
    assert PromptOrder(3, seed=0, shuffle=False).next(5) == [0, 1, 2, 0, 1]


def test_impossible_positions_and_sizes():
    with pytest.raises(ValueError, match="one prompt or more"):
        PromptOrder(0, seed=0)
    with pytest.raises(ValueError, match="got -1"):
        PromptOrder(3, seed=0).seek(-1)
