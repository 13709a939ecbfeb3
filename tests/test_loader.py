"""The order of samples: a function of the seed and the draw, not of the processes."""

import os
import resource
import signal
from collections import Counter

import pytest
import torch

from tempolora.config import ConfigError
from tempolora.data.loader import batches, sample_of_draw
from tempolora.train.step import Batch


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
    collate=lambda drawn: drawn,
):
    return list(
        batches(
            reader or Reader(),
            collate,
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


def test_shared_memory_without_room_is_one_sentence_and_no_wait_for_ever():
    """The limit on a file's size holds for shared memory too; it is the loader process's alone."""

    def collate(drawn):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        tensors = ("latents_BCTHW", "noise_BCTHW", "sigma_B", "text_BLD", "onset_BF", "speed_B")
        return Batch(keys=[], condition_BCTHW=None, **{name: torch.zeros(4096) for name in tensors})

    def late(*_):
        raise AssertionError("the loader waits for a batch that never comes")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        with pytest.raises(
            ConfigError, match=r"^data.workers: no room in shared memory .*too large"
        ):
            run(1, 0, workers=1, collate=collate)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_batch_from_a_loader_process_is_what_was_collated():
    def collate(drawn):
        ((draw, sample),) = drawn
        values = torch.arange(3) + 10 * draw
        return Batch([str(sample)], *[values.clone() for _ in range(4)], None, values, values)

    here, there = (run(1, 0, workers=workers, collate=collate) for workers in (0, 2))
    assert len(here) == len(there) == 12
    for one, other in zip(here, there, strict=True):
        assert one.keys == other.keys and other.condition_BCTHW is None
        assert torch.equal(one.noise_BCTHW, other.noise_BCTHW)
        assert torch.equal(one.onset_BF, other.onset_BF)


def test_a_signal_to_a_loader_process_is_not_taken_for_the_trainers(tmp_path):
    """Slurm sends SIGUSR1 to all processes of a job."""
    heard = tmp_path / "heard"
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.touch())

    def collate(drawn):
        os.kill(os.getpid(), signal.SIGUSR1)
        return drawn

    try:
        assert run(1, 0, workers=1, collate=collate) == run(1, 0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not heard.exists()


def test_groups_take_turns_and_each_is_gone_through_whole():
    """A group of two counts as much as one of six."""
    drawn = [sample for _, sample in flat(1, groups=(range(6), range(6, 8)), microsteps=12)]
    assert sorted(drawn[0::2]) == list(range(6))
    assert sorted(drawn[1::2]) == [6, 6, 6, 7, 7, 7]
    assert flat(2, groups=(range(6), range(6, 8)), microsteps=6) == flat(
        1, groups=(range(6), range(6, 8)), microsteps=12
    )
