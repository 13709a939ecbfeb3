"""The learning rate and the averaging rate, as pure functions of the step."""

import math

from tempolora.config import TrainConfig


def lr_at(step: int, train: TrainConfig) -> float:
    """Rate of optimizer step `step`, counted from 1: linear warm-up, then constant or cosine."""
    if step <= train.warmup_steps:
        return train.lr * step / (train.warmup_steps + 1)
    if train.schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps + 1)
    return train.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def ema_decay_at(step: int, decay: float) -> float:
    """Decay of the moving average at step `step`: short at first, so that the zero
    initialisation is soon forgotten (as torch_ema and TensorFlow do)."""
    return min(decay, (1 + step) / (10 + step))
