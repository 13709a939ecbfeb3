"""The drawn world: batches of clips whose appearance, motion and rhythm are known exactly.

A scene (`data/toy_scenes.py`) is a set of independent factors; its motion is a function of real
time in seconds, so that it can be drawn at any frame rate. Edges and patterns are exact at
positions between pixels, so that no jitter comes from the drawing. Truth about a scene comes from
the layers that draw it (`data/toy_stage.py`).

Positions are in px from the picture's upper left corner, x to the right and y down; pixel centres
lie at whole numbers + 0.5. Shapes: N scene, F frame, H, W pixel, 2 x and y, 3 red, green, blue.
"""

import torch
from torch import Tensor

from tempolora.data.toy_paint import normal, wide
from tempolora.data.toy_scenes import (
    BAND_HZ,
    COLOURS,
    KINDS,
    SHAPES,
    SIDEWAYS,
    TEXTURES,
    UPRIGHT,
    Scenes,
    amplitude_px,
    beat_times,
    captions,
    draw_scenes,
    known,
    scene,
)
from tempolora.data.toy_stage import CHUNK_PX, Flicker, stages

__all__ = [
    "BAND_HZ",
    "CHUNK_PX",
    "COLOURS",
    "KINDS",
    "REGIONS",
    "SHAPES",
    "SIDEWAYS",
    "STYLES",
    "TEXTURES",
    "UPRIGHT",
    "Flicker",
    "Scenes",
    "amplitude_px",
    "beat_times",
    "brightness",
    "captions",
    "draw_scenes",
    "flow",
    "mask",
    "render",
    "scene",
    "tracks",
]
STYLES = ("clean", "flickering")
REGIONS = ("mover", "face", "texture")


def _noise_of(style: str, flicker: Flicker | None) -> Flicker | None:
    if known(STYLES, style) == "clean":
        if flicker is not None:
            raise ValueError('the strength of flicker is given, but the style is "clean"')
        return None
    return flicker or Flicker()


@torch.no_grad()
def render(
    scenes: Scenes,
    *,
    fps: float,
    num_frames: int,
    height: int,
    width: int,
    style: str = "clean",
    flicker: Flicker | None = None,
    start_s: float = 0.0,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Draw the scenes at the times start_s + k / fps, on their device: (N, F, H, W, 3).

    uint8, or a floating `dtype` in 0..1. In the style "flickering", noise of the strength `flicker`
    follows from each scene's seed and the frame's number, counted from time 0.
    """
    noise = _noise_of(style, flicker)
    size = (len(scenes), num_frames, height, width, 3)
    video = torch.empty(size, dtype=dtype, device=scenes.hz_N.device)
    for rows, stage in stages(scenes, fps, num_frames, height, width, start_s, noise):
        picture = None
        boils: dict[bool, Tensor] = {}
        for layer in stage.layers():
            colour = layer.paint()
            if noise:
                if layer.is_mover not in boils:
                    boils[layer.is_mover] = 1 + noise.texture * stage.boil(layer.is_mover)
                colour = colour * boils[layer.is_mover]
            if picture is None:
                picture = colour.expand(-1, num_frames, 3, height, width)
            else:
                picture = torch.lerp(picture, colour, layer.cover()[:, :, None])
        if noise:
            gain_NF = 1 + noise.gain * normal(stage.scenes.seed_N[:, None], stage.number_F, 1)
            picture = picture * wide(gain_NF)[:, :, None]
        picture = picture.clamp(0, 1)
        if dtype == torch.uint8:
            picture = picture.mul(255).round_()
        video[rows] = picture.to(dtype).permute(0, 1, 3, 4, 2)
    return video


def tracks(
    scenes: Scenes,
    *,
    fps: float,
    num_frames: int,
    height: int,
    width: int,
    style: str = "clean",
    flicker: Flicker | None = None,
    start_s: float = 0.0,
) -> Tensor:
    """The mover's centre in px in every frame: (N, F, 2) float64.

    That is the shape's middle: of the walker its head, of the pan what stands in the world (it
    moves as the picture does), of the rotation the tip of the arm.
    """
    noise = _noise_of(style, flicker)
    found = torch.empty(len(scenes), num_frames, 2, dtype=torch.float64, device=scenes.hz_N.device)
    for rows, stage in stages(scenes, fps, num_frames, height, width, start_s, noise):
        found[rows] = stage.centre_NF2
    return found


def brightness(scenes: Scenes, *, fps: float, num_frames: int, start_s: float = 0.0) -> Tensor:
    """The factor on the mover's colour in every frame, 1 but for the pulse: (N, F) float64."""
    found = torch.empty(len(scenes), num_frames, dtype=torch.float64, device=scenes.hz_N.device)
    for rows, stage in stages(scenes, fps, num_frames, 1, 1, start_s, None):
        found[rows] = stage.brightness_NF
    return found


def mask(
    scenes: Scenes,
    *,
    fps: float,
    num_frames: int,
    height: int,
    width: int,
    region: str = "mover",
    style: str = "clean",
    flicker: Flicker | None = None,
    start_s: float = 0.0,
) -> Tensor:
    """Share of each pixel that lies in a region: (N, F, H, W) float32 in 0..1.

    "mover": the shape, of a walker its body too; "face": the shape where it is a face; "texture":
    wherever a pattern is painted, on the mover or on the open background.
    """
    known(REGIONS, region)
    found = torch.empty(len(scenes), num_frames, height, width, device=scenes.hz_N.device)
    noise = _noise_of(style, flicker)
    for rows, stage in stages(scenes, fps, num_frames, height, width, start_s, noise):
        share = None
        for layer in stage.layers():
            here_N = torch.full_like(layer.is_face_N, layer.is_mover)
            here_N = {"mover": here_N, "face": layer.is_face_N, "texture": layer.has_pattern_N}[
                region
            ]
            here = here_N.float()[:, None, None, None]
            if share is None:
                share = here.expand(-1, num_frames, height, width)
            else:
                share = torch.lerp(share, here, layer.cover())
        found[rows] = share
    return found


def flow(
    scenes: Scenes,
    *,
    fps: float,
    num_frames: int,
    height: int,
    width: int,
    start_s: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """True motion in px from frame k to k + 1 of the clean style, and where it holds.

    (N, F-1, H, W, 2) float32 and (N, F-1, H, W) bool. A pixel's flow is that of whatever covers
    more than half of it, exact for all parts. It holds where the pixel and those around its aim lie
    wholly in the same part: edges and what is hidden or leaves the picture drop out. A pulse
    changes its brightness and does not move.
    """
    shape = (len(scenes), num_frames - 1, height, width)
    motion = torch.empty(*shape, 2, device=scenes.hz_N.device)
    valid = torch.empty(shape, dtype=torch.bool, device=scenes.hz_N.device)
    for rows, stage in stages(scenes, fps, num_frames, height, width, start_s, None):
        part = stage.x.new_zeros(len(rows), num_frames, height, width)
        whole = torch.ones_like(part, dtype=torch.bool)
        here = stage.x.new_zeros(len(rows), num_frames - 1, height, width, 2)
        for number, layer in enumerate(stage.layers()):
            cover = layer.cover().expand_as(part)
            part = torch.where(cover > 0.5, float(number), part)
            whole = torch.where(cover >= 0.999, True, whole & (cover <= 0.001))
            here = torch.where(cover[:, :-1, ..., None] > 0.5, layer.moves(), here)
        motion[rows] = here
        valid[rows] = whole[:, :-1] & _arrives(torch.where(whole, part, -1.0), part, here)
    return motion, valid


def _arrives(pure: Tensor, part: Tensor, flow: Tensor) -> Tensor:
    """Whether all four pixels around the aim are wholly of the part that the pixel is of."""
    height, width = part.shape[2:]
    y = torch.arange(height, device=part.device)[:, None] + flow[..., 1]
    x = torch.arange(width, device=part.device) + flow[..., 0]
    left, top = x.floor().long(), y.floor().long()
    inside = (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    later, own = pure[:, 1:].flatten(2), part[:, :-1]
    for right, below in ((0, 0), (0, 1), (1, 0), (1, 1)):
        column = (left + right).clamp(0, width - 1)
        row = (top + below).clamp(0, height - 1)
        inside &= later.gather(2, (row * width + column).flatten(2)).view_as(own) == own
    return inside
