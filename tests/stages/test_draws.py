"""Batches are a function of the step: of several processes, of a resumed epoch, of a table that ends."""

import pytest

from aneurysm.stages.draws import DrawnBatches


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_see_together_what_one_sees_with_the_whole_batch(world):
    one = list(DrawnBatches(steps=4, batch=2 * world))
    parts = [list(DrawnBatches(4, 2, 0, rank, world)) for rank in range(world)]
    assert [[n for part in together for n in part] for together in zip(*parts, strict=True)] == one


def test_an_epoch_that_is_gone_on_with_has_the_batches_that_are_left():
    whole = DrawnBatches(steps=5, batch=3)
    rest = DrawnBatches(steps=5, batch=3, first=2)
    assert list(rest) == list(whole)[2:] and len(rest) == len(whole) == 5


@pytest.mark.parametrize("total", range(1, 14))
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_draw_of_a_table_comes_once_and_all_processes_take_every_step(total, world):
    batch = 2
    steps = -(-total // (batch * world))
    parts = [list(DrawnBatches(steps, batch, 0, rank, world, total)) for rank in range(world)]
    assert all(len(part) == steps for part in parts)
    # Dealt in order: batch by batch, process by process. A process may get nothing of the last batch.
    assert [n for step in zip(*parts, strict=True) for numbers in step for n in numbers] == list(range(total))
    sizes = [len(part[-1]) for part in parts]
    assert max(sizes) - min(sizes) <= 1
