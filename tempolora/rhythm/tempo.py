"""How much moves when: curves and spectra of luminance, in the clock of real playback.

Shapes: B batch, F video frame or frequency, S sample in time, H, W height and width.
"""

import torch
from einops import reduce
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def motion_energy(frames_FHW3: Tensor) -> Tensor:
    """Mean absolute change of luminance into each frame, (F,) in 0..1; the first entry is 0.

    frames_FHW3: uint8 RGB.
    """
    weight = torch.tensor(LUMA, device=frames_FHW3.device)
    change_F = weight.new_zeros(len(frames_FHW3))
    before_HW = None
    # one by one: a frame stays in the processor's cache
    for index, frame_HW3 in enumerate(frames_FHW3):
        luma_HW = (frame_HW3.float() / 255) @ weight
        if before_HW is not None:
            change_F[index] = (luma_HW - before_HW).abs().mean()
        before_HW = luma_HW
    return change_F


def block_luminance(frames_F3HW: Tensor, height: int, width: int) -> Tensor:
    """Luminance averaged over equal blocks: RGB (F, 3, H, W) -> (F, height, width), same range."""
    luma_FHW = torch.einsum("c,fchw->fhw", frames_F3HW.new_tensor(LUMA), frames_F3HW)
    return reduce(luma_FHW, "F (h y) (w x) -> F h w", "mean", h=height, w=width)


def detrend(samples: int) -> Tensor:
    """The projection that takes mean and slope away, (samples, samples) float64."""
    time = torch.linspace(-1, 1, samples, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.stack([torch.ones_like(time), time], dim=1))
    return torch.eye(samples, dtype=torch.float64) - basis @ basis.T


def spectrum(signal: Tensor) -> Tensor:
    """DFT of the detrended, Hann-windowed signal: (..., S) -> complex (..., S // 2 + 1)."""
    samples = signal.shape[-1]
    window = torch.hann_window(samples, periodic=True, dtype=torch.float64)
    map_SS = (window[:, None] * detrend(samples)).to(signal)
    return torch.fft.rfft(signal @ map_SS.T)


def power_spectrum(luma_BSHW: Tensor) -> Tensor:
    """|spectrum|^2, mean over pixels: (B, S, H, W) -> (B, S // 2 + 1). Differentiable."""
    spectrum_BHWF = spectrum(luma_BSHW.movedim(1, -1))
    return spectrum_BHWF.abs().square().mean(dim=(1, 2))


def motion(luma_BSHW: Tensor) -> Tensor:
    """Squared change from sample to sample, mean over time and pixels: (B, S, H, W) -> (B,)."""
    return luma_BSHW.diff(dim=1).square().mean(dim=(1, 2, 3))
