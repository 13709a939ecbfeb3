"""The order of samples: a function of the seed and the draw, not of the processes."""

from collections import Counter

import pytest

from tempolora.config import ConfigError
from tempolora.data.loader import batches, sample_of_draw


class Reader:
    """Stands for a folder of ten samples; position 3 can be damaged."""

    def __init__(self, damaged=False):
        self.damaged = damaged

    def __len__(self):
        return 10

    def read(self, position):
        if self.damaged and position == 3:
            raise ConfigError("shard x: bytes 1 to 2 are not what was written")
        return position


def run(
    world,
    rank,
    *,
    batch_size=1,
    first_draw=0,
    microsteps=12,
    workers=0,
    seed=0,
    reader=None,
    groups=(range(10),),
):
    return list(
        batches(
            reader or Reader(),
            lambda drawn: drawn,
            groups=groups,
            seed=seed,
            batch_size=batch_size,
            first_draw=first_draw,
            microsteps=microsteps,
            rank=rank,
            world=world,
            workers=workers,
        )
    )


def flat(world, **options):
    """All processes' batches, in the order of the draws."""
    per_rank = [run(world, rank, **options) for rank in range(world)]
    return [pair for step in zip(*per_rank, strict=True) for batch in step for pair in batch]


def test_every_epoch_visits_every_sample_once_and_in_another_order():
    epochs = [[sample_of_draw(10 * e + n, 10, seed=0) for n in range(10)] for e in range(3)]
    assert all(Counter(epoch) == Counter(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_sample_that_is_left_out_is_never_drawn():
    kept = [0, 2, 5, 9]
    drawn = flat(1, groups=(kept,), microsteps=8)
    assert Counter(position for _, position in drawn) == Counter(kept * 2)


def test_another_seed_is_another_order():
    assert run(1, 0, seed=0) != run(1, 0, seed=1)


@pytest.mark.parametrize(("world", "batch_size"), [(2, 1), (4, 1), (2, 3), (1, 4)])
def test_more_processes_see_the_same_samples_in_the_same_order(world, batch_size):
    microsteps = 24 // (world * batch_size)
    one = flat(1, microsteps=24)
    assert flat(world, batch_size=batch_size, microsteps=microsteps) == one


def test_loader_processes_do_not_change_the_order():
    assert run(2, 1, workers=2) == run(2, 1)


def test_a_resumed_run_goes_on_with_the_very_next_draw_even_on_other_processes():
    whole = flat(2, microsteps=12)
    resumed = flat(3, first_draw=12, microsteps=4)
    assert resumed == whole[12:24]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_one_sentence_also_from_a_loader_process(workers):
    with pytest.raises(ConfigError) as caught:
        run(1, 0, workers=workers, reader=Reader(damaged=True))
    assert str(caught.value) == "shard x: bytes 1 to 2 are not what was written"


def test_groups_take_turns_and_each_is_gone_through_whole():
    """A group of two counts as much as one of six."""
    drawn = [sample for _, sample in flat(1, groups=(range(6), range(6, 8)), microsteps=12)]
    assert sorted(drawn[0::2]) == list(range(6))
    assert sorted(drawn[1::2]) == [6, 6, 6, 7, 7, 7]
    assert flat(2, groups=(range(6), range(6, 8)), microsteps=6) == flat(
        1, groups=(range(6), range(6, 8)), microsteps=12
    )
