"""Training of TinyWan's VAE, on whole clips at once, and the file it is shipped in.

Shapes: B clip of a batch, N clip of the pool, F video frame, H, W in pixels, T, h, w latent frame,
height and width, C latent channel.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from tqdm import tqdm

from tempolora.model import tinywan, wan
from tempolora.rhythm.tempo import LUMA
from tempolora.toy_pretrain.clips import POOL_SIZE, draw_batch
from tempolora.variants import TEMPORAL_STRIDE

log = logging.getLogger(__name__)

PHASES = ((0.8, 32, 17, 4), (0.2, 16, 33, 8))  # share of steps, batch, frames, latent pixels across
LEARNING_RATE, WARMUP_STEPS = 2e-3, 200
KL_WEIGHT = 1e-4  # per latent value, against an L1 per pixel value
READ_WEIGHT = 0.5  # of what a linear map misses of the luminance


def new_vae(variant_name: str) -> nn.Module:
    """TinyWan's VAE at weights that keep the variance of what goes through.

    PyTorch's own are a third of that and let the picture fade out on the way: there is no path
    around the resampling layers.
    """
    vae = wan.new_vae(tinywan.vae_architecture(variant_name))
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    return vae


def train_vae(variant_name: str, pool_NFHW3: Tensor, steps: int, seed: int) -> nn.Module:
    """A VAE trained on crops of the pool, on the pool's device; its latents are not yet scaled.

    Beside it a linear map learns to read the luminance of each latent's block at its four frames
    from the latents, which keeps them readable; it is dropped.
    """
    device = pool_NFHW3.device
    torch.manual_seed(seed)
    vae = new_vae(variant_name).to(device)
    stride = vae.config.scale_factor_spatial
    reader = nn.Conv3d(vae.config.z_dim, TEMPORAL_STRIDE, (3, 1, 1)).to(device)
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    cuda = device.type == "cuda"
    weights = [*vae.parameters(), *reader.parameters()]
    rate = torch.tensor(0.0, device=device)  # where a captured step reads it
    optimizer = torch.optim.AdamW(weights, rate, betas=(0.9, 0.99), fused=True, capturable=cuda)

    def step(batch: int, frames: int, size: int) -> tuple[Tensor, ...]:
        video = draw_batch(pool_NFHW3, batch, frames, size)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            mean, log_variance = encode_whole(vae, video)
            latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            decoded = decode_whole(vae, latents)
        picture = picture_loss(decoded, video)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        luma = block_luminance(video, stride)[:, :, 2:]
        read = (reader(latents[:, :, 1:]) - luma).abs().mean()
        optimizer.zero_grad()
        (picture + KL_WEIGHT * kl + READ_WEIGHT * read).backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return picture.detach(), kl.detach(), read.detach(), norm

    done = 0
    with whole_clips(vae):
        for share, batch, frames, blocks in PHASES:
            size = min(blocks * stride, POOL_SIZE)
            do_step = repeated(partial(step, batch, frames, size), device)
            for _ in tqdm(range(round(share * steps)), f"{frames} frames", disable=None):
                optimizer.param_groups[0]["lr"].fill_(LEARNING_RATE * _rate(done, steps))
                figures = do_step()
                done += 1
                if done % 200 == 0 or done == steps:
                    _log_figures(done, figures)
    return vae.requires_grad_(False).eval()


@contextmanager
def whole_clips(vae: nn.Module) -> Iterator[None]:
    """Let encoder and decoder take whole clips instead of a frame and then fours of frames.

    Diffusers' VAE resamples time only in its chunked passes; these hooks do it for all frames at
    once, with the same result in a fifth of the launches.
    """

    def upsample(resample: nn.Module, args: tuple) -> tuple:
        x = args[0]
        later = resample.time_conv(x[:, :, 1:])
        later = rearrange(later, "B (two C) T H W -> B C (T two) H W", two=2)
        return (torch.cat([x[:, :, :1], later], dim=2), *args[1:])

    def downsample(resample: nn.Module, args: tuple, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :1], resample.time_conv(x)], dim=2)

    handles = []
    for module in vae.modules():
        if getattr(module, "mode", None) == "upsample3d":
            handles.append(module.register_forward_pre_hook(upsample))
        elif getattr(module, "mode", None) == "downsample3d":
            handles.append(module.register_forward_hook(downsample))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def encode_whole(vae: nn.Module, video_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance (B, C, T, h, w) of the raw latents; inside `whole_clips`."""
    patch = vae.config.patch_size or 1
    x = rearrange(video_BCFHW, "B C F (H a) (W b) -> B (C b a) F H W", a=patch, b=patch)
    mean, log_variance = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode_whole(vae: nn.Module, latents_BCTHW: Tensor) -> Tensor:
    """Video (B, 3, F, H, W) of raw latents, not clamped; inside `whole_clips`."""
    patch = vae.config.patch_size or 1
    x = vae.decoder(vae.post_quant_conv(latents_BCTHW), first_chunk=True).float()
    return rearrange(x, "B (C b a) F H W -> B C F (H a) (W b)", a=patch, b=patch)


def picture_loss(video: Tensor, wanted: Tensor) -> Tensor:
    """L1 of the pixels, of their change from frame to frame, and of the slopes of the picture."""
    error = video - wanted
    slopes = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    return error.abs().mean() + 0.5 * error.diff(dim=2).abs().mean() + 0.25 * slopes


def block_luminance(video_B3FHW: Tensor, stride: int) -> Tensor:
    """Mean luminance of each latent pixel's block, without the first frame: (B, 4, T-1, h, w)."""
    luma = sum(weight * colour for weight, colour in zip(LUMA, video_B3FHW[:, :, 1:].unbind(1)))
    blocks = "B (T k) (h a) (w b) -> B k T h w"
    return reduce(luma, blocks, "mean", k=TEMPORAL_STRIDE, a=stride, b=stride)


def repeated(step: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Callable:
    """`step`, on a GPU as one CUDA graph: a small model's thousands of launches become one.

    Three steps are taken before the capture.
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        figures = step()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return figures

    return replay


def _log_figures(step: int, figures: tuple[Tensor, ...]) -> None:
    picture, kl, read, norm = (figure.item() for figure in figures)
    if not math.isfinite(norm):
        raise FloatingPointError(f"step {step}: the gradient is not finite")
    log.info("step %d: picture %.4f kl %.2f read %.4f", step, picture, kl, read)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a short rise, then a cosine down to 0."""
    return min((step + 1) / WARMUP_STEPS, 1) * 0.5 * (1 + math.cos(math.pi * step / steps))


def scale_latents(vae: nn.Module, clips_BFHW3: Tensor) -> None:
    """Set latents_mean and latents_std so that latents of these clips are standard per channel."""
    channels = vae.config.z_dim
    vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    latents = torch.cat([wan.encode_video(vae, part).cpu() for part in clips_BFHW3.split(8)])
    std_C, mean_C = torch.std_mean(latents, dim=(0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in mean_C.tolist()],
        latents_std=[round(value, 4) for value in std_C.tolist()],
    )
