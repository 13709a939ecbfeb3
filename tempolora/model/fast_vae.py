"""The Wan VAE's encoder, walked in a faster way: same weights, same sums, other order of work.

diffusers encodes four frames at a time, pads by copying and computes in the layout it is given.
Here channels lie last, which is what bf16 3D convolutions are fast in; a chunk is any number of
frames, as each convolution is handed the frames before it; and a chunk is a pure function of
tensors, so that the compiler sees all of it and joins norm, activation and padding into one kernel.

Shapes: B batch, F video frame, T latent frame, H, W pixels, C channel; inside the encoder F, H and
W are those of the layer.
"""

from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from tempolora.variants import TEMPORAL_STRIDE

MOST_FRAMES = 16  # of a chunk, where memory allows
LIVE = 7  # tensors of a layer at full resolution that are alive at once
TINY = 1e-24  # the square of what diffusers' norm adds


def encode(
    vae: Any, video_BFHWC: Tensor, frames: int | None = None, compiled: bool = False
) -> Tensor:
    """Mean and log-variance of a video's latents, (B, 2 C, T, H, W) as `vae._encode` gives them.

    video_BFHWC: 4 k + 1 frames in the VAE's dtype, -1..1. frames: of a chunk, a multiple of 4; by
    default as many as memory has room for. compiled: pays after some tens of clips of one size.
    """
    F, H, W = video_BFHWC.shape[1:4]
    assert F % TEMPORAL_STRIDE == 1, f"{F} frames are not 4 k + 1"
    frames = frames or frames_that_fit(vae, len(video_BFHWC), H, W)
    walk = _compiled() if compiled else _walk
    x_BFHWC = _fold_patches(video_BFHWC, vae.config.patch_size or 1)
    starts = [0, *range(1 + frames, F, frames), F]
    parts, tails = [], None
    for start, stop in pairwise(starts):
        part_BTHWC, tails = walk(vae.encoder, x_BFHWC[:, start:stop].contiguous(), tails)
        parts.append(part_BTHWC)
    moments_BTHWC = _pointwise(vae.quant_conv, torch.cat(parts, dim=1))
    return moments_BTHWC.permute(0, 4, 1, 2, 3)


def frames_that_fit(vae: Any, batch: int, height: int, width: int) -> int:
    """Frames of a chunk for which half of the free memory is enough, 4 to MOST_FRAMES.

    No tensor gets more elements than 32 bits can count: cuDNN has no 3D convolution for such.
    """
    weight = vae.encoder.conv_in.weight
    pixels = batch * height * width // (vae.config.patch_size or 1) ** 2
    room = 2**31 // (len(weight) * pixels) - 3  # the first frame, and two before the chunk
    if weight.device.type == "cuda":
        frame_bytes = LIVE * len(weight) * weight.element_size() * pixels
        room = min(room, _free_bytes(weight.device) // 2 // frame_bytes)
    return max(TEMPORAL_STRIDE, min(MOST_FRAMES, room // TEMPORAL_STRIDE * TEMPORAL_STRIDE))


def _free_bytes(device: torch.device) -> int:
    """What this process may still take of the device, its allocator's own reserve included."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)


def to_channels_last(module: nn.Module) -> None:
    """Lay the convolutions' weights out with channels last, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


@cache
def _compiled() -> Any:
    return torch.compile(_walk, fullgraph=True, dynamic=False)


class _Tails:
    """The last frames that each temporal convolution saw, taken and left in the layers' order."""

    def __init__(self, before: list[Tensor] | None) -> None:
        self._before = before
        self.left: list[Tensor] = []

    @property
    def at_start(self) -> bool:
        return self._before is None

    def join(self, x_BFHWC: Tensor, frames: int) -> Tensor:
        """x behind the `frames` frames before it, which are zero at the start of the video."""
        if self._before is None:
            joined = nnf.pad(x_BFHWC, (0, 0, 0, 0, 0, 0, frames, 0))
        else:
            joined = torch.cat([self._before[len(self.left)], x_BFHWC], dim=1)
        # of one layout whatever came before, as the compiler makes each layout a program of its own
        tail = joined[:, joined.shape[1] - frames :]
        self.left.append(tail.clone(memory_format=torch.contiguous_format))
        return joined


def _walk(
    encoder: Any, x_BFHWC: Tensor, before: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """A chunk through the encoder, and the tails for the next one. before: None at the start."""
    tails = _Tails(before)
    x = _causal(encoder.conv_in, x_BFHWC, tails)
    for layer in (*encoder.down_blocks, encoder.mid_block):
        x = _layer(layer, x, tails)
    x = _causal(encoder.conv_out, nnf.silu(_norm(encoder.norm_out, x)), tails)
    return x, tails.left


def _layer(layer: Any, x: Tensor, tails: _Tails) -> Tensor:
    """Whatever diffusers puts in a row: told apart by their parts, as the classes are its own."""
    if hasattr(layer, "conv1"):
        return _residual(layer, x, tails)
    if hasattr(layer, "to_qkv"):
        return _attention(layer, x)
    if hasattr(layer, "resample"):
        return _downsample(layer, x, tails)
    if hasattr(layer, "attentions"):  # the middle
        first, *others = layer.resnets
        x = _residual(first, x, tails)
        for attention, resnet in zip(layer.attentions, others, strict=True):
            x = _residual(resnet, _attention(attention, x), tails)
        return x
    shortcut = _average(layer.avg_shortcut, x)  # a stage of the 2.2 VAE
    for resnet in layer.resnets:
        x = _residual(resnet, x, tails)
    if layer.downsampler is not None:
        x = _downsample(layer.downsampler, x, tails)
    return x + shortcut


def _residual(block: Any, x: Tensor, tails: _Tails) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else None
    if shortcut is None:
        shortcut = _pointwise(block.conv_shortcut, x)
    x = _causal(block.conv1, nnf.silu(_norm(block.norm1, x)), tails)
    return shortcut + _causal(block.conv2, nnf.silu(_norm(block.norm2, x)), tails)


def _attention(block: Any, x_BFHWC: Tensor) -> Tensor:
    """Each frame attends to itself."""
    B, F, H, W, C = x_BFHWC.shape
    tokens = _norm(block.norm, x_BFHWC).reshape(B * F, 1, H * W, C)
    q, k, v = _pointwise(block.to_qkv, tokens).chunk(3, dim=-1)
    attended = nnf.scaled_dot_product_attention(q, k, v)
    return x_BFHWC + _pointwise(block.proj, attended).reshape(x_BFHWC.shape)


def _downsample(block: Any, x_BFHWC: Tensor, tails: _Tails) -> Tensor:
    """Half the height and width; then half the frames, where the very first one stands alone."""
    B, F = x_BFHWC.shape[:2]
    conv = block.resample[1]
    padded = nnf.pad(x_BFHWC, (0, 0, 0, 1, 0, 1)).flatten(0, 1)
    x = nnf.conv2d(padded.permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride)
    x_BFHWC = x.permute(0, 2, 3, 1).unflatten(0, (B, F))
    if block.mode == "downsample2d":
        return x_BFHWC
    first = x_BFHWC[:, :1]
    joined = tails.join(x_BFHWC, 1)
    if not tails.at_start:
        return _conv(block.time_conv, joined)
    return first if F == 1 else torch.cat([first, _conv(block.time_conv, x_BFHWC)], dim=1)


def _average(shortcut: Any, x_BFHWC: Tensor) -> Tensor:
    """Blocks of time and space folded into channels, and groups of these averaged."""
    ft, fs, groups = shortcut.factor_t, shortcut.factor_s, shortcut.out_channels
    x = nnf.pad(x_BFHWC, (0, 0, 0, 0, 0, 0, -x_BFHWC.shape[1] % ft, 0))
    B, F, H, W, C = x.shape
    x = x.view(B, F // ft, ft, H // fs, fs, W // fs, fs, C).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, F // ft, H // fs, W // fs, groups, -1).mean(dim=-1)


def _causal(conv: Any, x_BFHWC: Tensor, tails: _Tails) -> Tensor:
    return _conv(
        conv, tails.join(x_BFHWC, conv._padding[4]), (0, conv._padding[2], conv._padding[0])
    )


def _conv(conv: Any, x_BFHWC: Tensor, padding: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    x = x_BFHWC.permute(0, 4, 1, 2, 3)
    y = nnf.conv3d(x, conv.weight, conv.bias, conv.stride, padding)
    return y.permute(0, 2, 3, 4, 1)


def _pointwise(conv: Any, x_C: Tensor) -> Tensor:
    """A convolution over one pixel is a matrix product."""
    return nnf.linear(x_C, conv.weight.flatten(1), conv.bias)


def _norm(norm: Any, x_C: Tensor) -> Tensor:
    return nnf.rms_norm(x_C, x_C.shape[-1:], norm.gamma.flatten(), TINY)


def _fold_patches(video_BFHWC: Tensor, size: int) -> Tensor:
    """Squares of size x size pixels folded into channels, in the order of diffusers' patchify."""
    B, F, H, W, C = video_BFHWC.shape
    x = video_BFHWC.view(B, F, H // size, size, W // size, size, C).permute(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(B, F, H // size, W // size, C * size * size)
