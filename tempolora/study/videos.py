"""Experts, noise and captions to videos; and the filter that a LoRA has to beat.

Shapes: N video, C channel, T latent frame, F video frame, H, W height and width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tempolora.config import Config
from tempolora.model.lora import set_lora_scale
from tempolora.results.sample import sample_latents
from tempolora.rhythm.guidance import Guide
from tempolora.study.clips import decode

HALVINGS = 20
WIDEST_FRAMES = 4.0


def sample(
    cfg: Config,
    experts: dict[str, nn.Module],
    vae: nn.Module,
    noise_NCTHW: Tensor,
    text: tuple[Tensor, Tensor],
    strength: float | None = None,
    guide: Guide | None = None,
) -> Tensor:
    """Videos with Wan's sampler and guidance, uint8 (N, F, H, W, 3), on the noise's device.

    text: of the captions and of the negative prompt, padded. strength: of the adapters, where
    there are any. guide: what pushes the clean estimate in each step.
    """
    for expert in experts.values() if strength is not None else ():
        set_lora_scale(expert, strength)
    steps = cfg.output.sample_steps
    given = experts.__getitem__, cfg.variant, noise_NCTHW, *text
    latents = sample_latents(*given, steps=steps, guide=guide)
    return decode(vae, latents)


def lowpass(videos_NFHW3: Tensor, width_frames: float) -> Tensor:
    """Each pixel's values in time under a Gaussian of this standard deviation; uint8.

    The ends are repeated. Width 0 changes nothing.
    """
    if width_frames == 0:
        return videos_NFHW3
    time_F = torch.arange(videos_NFHW3.shape[1], device=videos_NFHW3.device)
    reach = int(4 * width_frames) + 1
    offset_K = torch.arange(-reach, reach + 1, device=videos_NFHW3.device)
    weight_K = (-0.5 * (offset_K / width_frames).square()).exp()
    source_FK = (time_F[:, None] + offset_K).clamp(0, len(time_F) - 1)
    map_FF = torch.zeros(len(time_F), len(time_F), device=videos_NFHW3.device)
    map_FF.scatter_add_(1, source_FK, (weight_K / weight_K.sum()).expand(len(time_F), -1))
    smooth = [torch.einsum("fg,ghwc->fhwc", map_FF, clip.float()) for clip in videos_NFHW3]
    return torch.stack([clip.round().to(torch.uint8) for clip in smooth])


def width_that_leaves(left_at: Callable[[float], float], wanted: float) -> float:
    """The width, in frames, at which what is left has come down to `wanted`; 0 where it is there.

    left_at: log2 of it at a width, falling. Raises ValueError where even the widest leaves more.
    """
    low, high = 0.0, WIDEST_FRAMES
    if left_at(low) <= wanted:
        return low
    if left_at(high) > wanted:
        raise ValueError(f"a filter {high:g} frames wide leaves more than there should be")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if left_at(middle) > wanted else (low, middle)
    return high
