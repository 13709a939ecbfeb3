"""Which processes train which expert: two groups at once, or all of them each expert in turn.

A group's size does not change how long it takes: each process brings samples of its own, so that a
larger group takes more of them in a step, not shorter ones. Two halves therefore end together where
both experts' steps take as long; where the base is sharded, the size decides what fits.
"""

from dataclasses import replace
from math import inf, lcm

from tempolora.config import Config, ConfigError
from tempolora.launched import check_engine, uses_deepspeed
from tempolora.train.plan import Card, changed, fitting, with_engine


def shares(cfg: Config, processes: int, card: Card | None) -> dict[str, int]:
    """How many processes train each expert, in the order of ranks; {} where all train each in turn.

    card: all GPUs together; None: there are none, and nothing is predicted. The answer follows
    from settings and GPUs alone, so that a run started again is split as before. Raises ConfigError
    where `parallel.expert_split` does not go with the processes or the engine.
    """
    asked = cfg.parallel.expert_split
    if asked is None or len(cfg.experts) == 1:
        return {}
    sizes = _auto(cfg, processes, card) if asked == "auto" else asked
    if not sizes:
        return {}
    if sum(sizes) != processes:
        raise ConfigError(
            f"parallel.expert_split: {list(sizes)} are {sum(sizes)} processes, {processes} were "
            'started; use "auto"'
        )
    for size in sizes:
        check_engine(cfg, size)
    return dict(zip(cfg.experts, sizes, strict=True))


def part_of(card: Card, gpus: int) -> Card:
    """Some of the GPUs, with their part of the host's memory."""
    host = None if card.host is None else card.host * gpus / card.gpus
    return replace(card, gpus=gpus, host=host)


def seconds(cfg: Config, expert: str, gpus: int, card: Card) -> float:
    """Predicted seconds to train one expert on some of the card's GPUs; infinite where it does not
    fit there."""
    keys = {"parallel.expert_split": "auto"}
    if len(cfg.experts) > 1:
        keys["model.expert"] = expert
    if expert == "high":  # it has no rollouts
        keys["rhythm.rollout_every"] = 0
    one = changed(with_engine(cfg, "deepspeed") if uses_deepspeed(cfg) else cfg, keys)
    plans = fitting(one, part_of(card, gpus))
    return cfg.train.max_steps * plans[0].seconds if plans else inf


def _auto(cfg: Config, processes: int, card: Card | None) -> tuple[int, int] | None:
    """Halves; None where taking turns is predicted to end sooner, or where an engine that shares
    would have a group of one. The odd process goes to the low-noise expert: it has more sigmas."""
    over = cfg.parallel.shard_over
    # processes that a group holds a multiple of
    share = lcm(cfg.parallel.context, over if isinstance(over, int) else 1)
    least = max(share, 2 if cfg.parallel.engine in ("ddp", "fsdp") else 1)
    high = processes // share // 2 * share
    sizes = high, processes - high
    if high < least:
        return None
    if card is None:
        return sizes
    at_once = max(seconds(cfg, expert, n, card) for expert, n in zip(cfg.experts, sizes))
    in_turn = sum(seconds(cfg, expert, processes, card) for expert in cfg.experts)
    return sizes if at_once < in_turn else None
