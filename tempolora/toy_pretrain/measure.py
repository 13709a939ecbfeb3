"""What a VAE passes of a picture and of its rhythm, measured on clips whose motion is known.

Shapes: B, N clip, F video frame, H, W in pixels, T, h, w latent frame, height and width, C latent
channel.
"""

from functools import partial

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from tempolora.data.toy import scene
from tempolora.model import wan
from tempolora.rhythm.tempo import LUMA
from tempolora.toy_pretrain.clips import FPS, FRAMES, SIZE, drawn_clips, render_clips
from tempolora.variants import TEMPORAL_STRIDE

FREQUENCIES_HZ = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
# 16 px are whole latents, where a grating looks the same in all of them: the hardest case.
PITCHES_PX = (16, 64 / 3, 32)


def measure_vae(vae: nn.Module, real: list[np.ndarray]) -> dict[str, float]:
    """What the VAE passes: PSNR (dB), gains, comb (levels of 255), R^2 of a linear readout.

    Everything goes through the uint8 pictures that users see. Clips are none of those it saw.
    """
    drawn = torch.from_numpy(drawn_clips(48, seed=1))
    latents, decoded = _through(vae, drawn)
    figures = {"PSNR drawn": _psnr(decoded, drawn)}
    if real:
        clips = torch.from_numpy(np.stack(real))[:, :, :128, :128]
        figures["PSNR real"] = _psnr(_through(vae, clips)[1], clips)
    figures |= _readout_figures(latents, _luma(decoded), vae.config.scale_factor_spatial)
    movers = {"brightness": (pulsing_clips(FREQUENCIES_HZ), track_brightness)}
    for pitch in PITCHES_PX:
        track = partial(track_grating, pitch_px=pitch)
        movers[f"grating {pitch:.0f} px"] = swinging_gratings(FREQUENCIES_HZ, pitch), track
    movers["square"] = swinging_squares(FREQUENCIES_HZ), track_square
    for name, (clips, track) in movers.items():
        seen = track(_luma(_through(vae, torch.from_numpy(clips))[1]).numpy())
        true = track(_luma(torch.from_numpy(clips)).numpy())
        for hz, a, b in zip(FREQUENCIES_HZ, seen, true):
            figures[f"gain {name} {hz:g} Hz"] = amplitude(a, hz) / amplitude(b, hz)
    figures |= _comb_figures(vae)
    figures["latent mean"] = latents.mean((0, 2, 3, 4)).abs().max().item()
    figures["latent std"] = latents.std().item()
    return figures


def pulsing_clips(frequencies_hz: tuple[float, ...]) -> np.ndarray:
    """A textured picture whose brightness swings by 30 %, at each frequency: (N, F, H, W, 3)."""
    still = _textured_still()
    seconds = np.arange(FRAMES) / FPS
    gains = [1 + 0.3 * np.cos(2 * np.pi * hz * seconds + 0.7) for hz in frequencies_hz]
    clips = np.stack(gains)[..., None, None, None] * still
    return np.rint(clips.clip(0, 255)).astype(np.uint8)


def swinging_gratings(frequencies_hz: tuple[float, ...], pitch_px: float) -> np.ndarray:
    """A grey grating that swings by 3 px, at each frequency: (N, F, H, W, 3)."""
    seconds = np.arange(FRAMES) / FPS
    x = np.arange(SIZE)
    clips = []
    for hz in frequencies_hz:
        shift = 3 * np.cos(2 * np.pi * hz * seconds + 0.7)
        rows = 128 + 60 * np.cos(2 * np.pi * (x - shift[:, None]) / pitch_px)
        clips.append(np.broadcast_to(rows[:, None, :, None], (len(rows), len(x), len(x), 3)))
    return np.rint(np.stack(clips)).astype(np.uint8)


def swinging_squares(frequencies_hz: tuple[float, ...]) -> np.ndarray:
    """A light square on dark ground that swings by 6 px, at each frequency: (N, F, H, W, 3)."""
    look = {"tint": (230, 230, 230), "ground": (40, 40, 40)}
    look |= {"texture": "flat", "ground_texture": "flat"}
    swing = 6 / SIZE
    return render_clips([scene("slide", hz, 0.7, swing, **look) for hz in frequencies_hz])


def track_brightness(luma_NFHW: np.ndarray) -> np.ndarray:
    """Mean luminance of each frame: (N, F)."""
    return luma_NFHW.mean((2, 3))


def track_grating(luma_NFHW: np.ndarray, pitch_px: float) -> np.ndarray:
    """Position in px of `swinging_gratings`, from the phase of the wave: (N, F)."""
    wave = np.exp(-2j * np.pi * np.arange(SIZE) / pitch_px)
    return -np.unwrap(np.angle(luma_NFHW.mean(2) @ wave)) * pitch_px / (2 * np.pi)


def track_square(luma_NFHW: np.ndarray) -> np.ndarray:
    """Horizontal centre in px of what is lighter than the ground of `swinging_squares`: (N, F)."""
    light = (luma_NFHW - 60).clip(0)
    return (light * np.arange(SIZE)).sum((2, 3)) / light.sum((2, 3))


def amplitude(track_F: np.ndarray, hz: float) -> float:
    """Amplitude of the oscillation at `hz` in a track at 16 fps, without its first frame."""
    seconds = np.arange(FRAMES) / FPS
    turn = 2 * np.pi * hz * seconds
    basis = np.stack([np.cos(turn), np.sin(turn), np.ones_like(turn), seconds - 1.5], 1)
    fit = np.linalg.lstsq(basis[1:], track_F[1:], rcond=None)[0]
    return float(np.hypot(fit[0], fit[1]))


def _through(vae: nn.Module, clips_BFHW3: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised latents and reconstruction of the clips, on the CPU."""
    latents = [wan.encode_video(vae, part) for part in clips_BFHW3.split(8)]
    decoded = [wan.decode_video(vae, part).cpu() for part in latents]
    return torch.cat(latents).cpu(), torch.cat(decoded)


def _luma(video_BFHW3: Tensor) -> Tensor:
    return video_BFHW3.double() @ torch.tensor(LUMA, dtype=torch.float64)


def _psnr(video: Tensor, wanted: Tensor) -> float:
    """Mean over clips of the PSNR in dB."""
    error = (video.double() - wanted.double()).square().mean((1, 2, 3, 4))
    return (10 * torch.log10(255**2 / error)).mean().item()


def _readout_figures(latents_BCTHW: Tensor, luma_BFHW: Tensor, stride: int) -> dict[str, float]:
    """R^2 of the reconstruction's block luminance, and of its change from frame to frame, by least
    squares on z[t], z[t-1], z[t-2]: fitted on one half of the clips, measured on the other."""
    z = rearrange(latents_BCTHW.double(), "B C T H W -> B T H W C").numpy()
    inputs = np.concatenate([z[:, 3:], z[:, 2:-1], z[:, 1:-2], np.ones_like(z[:, 3:, ..., :1])], -1)
    wanted = reduce(
        luma_BFHW[:, 1:].numpy(),
        "B (T k) (H a) (W b) -> B T H W k",
        "mean",
        k=TEMPORAL_STRIDE,
        a=stride,
        b=stride,
    )[:, 2:]
    half = len(z) // 2
    flat = [rearrange(part, "B T H W X -> (B T H W) X") for part in (inputs[:half], wanted[:half])]
    found = inputs[half:] @ np.linalg.lstsq(*flat, rcond=None)[0]
    figures = {"readout R2": _r_squared(found, wanted[half:])}
    steps = [rearrange(part, "B T H W k -> B (T k) H W") for part in (found, wanted[half:])]
    figures["readout R2 of change"] = _r_squared(*(np.diff(part, axis=1) for part in steps))
    return figures


def _r_squared(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(1 - ((found - wanted) ** 2).sum() / ((wanted - wanted.mean()) ** 2).sum())


def _comb_figures(vae: nn.Module) -> dict[str, float]:
    """What the decoder's groups of four frames leave on a still: rms over pixels of the amplitude,
    in levels of 255, at fps/4 and fps/2, over the last 40 frames."""
    still = torch.from_numpy(np.rint(_textured_still()).astype(np.uint8))
    luma = _luma(_through(vae, still.expand(1, FRAMES, -1, -1, -1))[1])[0, -40:]
    wave = torch.fft.rfft(luma, dim=0).abs() / 40
    return {
        "comb fps/4": 2 * wave[10].square().mean().sqrt().item(),
        "comb fps/2": wave[20].square().mean().sqrt().item(),
    }


def _textured_still() -> np.ndarray:
    """(H, W, 3) floats around a middle brightness, nowhere near black or white."""
    still = scene("pan", 1.0, amplitude=0.0, size=0.0, ground=(120, 110, 100), seed=5)
    return 110 + 0.6 * (render_clips([still])[0, 0].astype(np.float64) - 110)
