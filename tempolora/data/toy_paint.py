"""Shapes as signed distances and surfaces as formulas, exact at any position between pixels.

Shapes: N scene, F frame, H, W pixel; coordinates u, v are px from a shape's middle, x to the right
and y down. Functions of (u, v) take and give what broadcasts to (N, F, H, W).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tempolora.data.toy_scenes import SHAPES, TEXTURES, Scenes

SKIN, DARK, LIPS = (0.87, 0.68, 0.55), (0.12, 0.09, 0.09), (0.62, 0.16, 0.18)
CONTRAST = {1: 0.07, 2: 0.1}  # of stripes and checks on the ground and on movers, to either side
WAVES, WAVE_CONTRAST = 12, 8 / 255


def uniform(*keys: Tensor | int) -> Tensor:
    """Numbers in (0, 1) that follow from whole keys, on any device: MurmurHash3's 32-bit mixer."""
    low32, found = 2**32 - 1, 0
    for key in keys:
        found = (found * 31 + key * 0x9E3779B1 + 0x7F4A7C15) & low32
        found = ((found ^ (found >> 16)) * 0x85EBCA6B) & low32
        found = ((found ^ (found >> 13)) * 0xC2B2AE35) & low32
        found = found ^ (found >> 16)
    return (found + 0.5) / 2**32


def normal(*keys: Tensor | int) -> Tensor:
    """Standard normal numbers that follow from whole keys (Box and Muller)."""
    return (-2 * uniform(*keys, 0).log()).sqrt() * (2 * math.pi * uniform(*keys, 1)).cos()


def wide(values_NX: Tensor) -> Tensor:
    """(N, X) to float32 (N, X, 1, 1)."""
    return values_NX.float()[..., None, None]


def tall(colour_N3: Tensor) -> Tensor:
    """(N, 3) to (N, 1, 3, 1, 1)."""
    return colour_N3[:, None, :, None, None]


def coverage(inside: Tensor) -> Tensor:
    """Share of a pixel that lies inside, from the signed distance of its middle in px."""
    return (inside + 0.5).clamp(0, 1)


def _by(choice_N: Tensor, options: int) -> Iterator[tuple[int, Tensor]]:
    """(option, rows that chose it)."""
    choice_N, device = choice_N.cpu(), choice_N.device
    for option in range(options):
        rows = (choice_N == option).nonzero()[:, 0]
        if len(rows):
            yield option, rows.to(device)


def distance_inside(shape_N: Tensor, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in px, positive inside, of shapes of about equal area."""
    inside = torch.empty(torch.broadcast_shapes(u.shape, v.shape), device=u.device)
    for shape, rows in _by(shape_N, len(SHAPES)):
        inside[rows] = _DISTANCES[SHAPES[shape]](u[rows], v[rows], radius[rows])
    return inside


def _disc(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return r - torch.hypot(u, v)


def _square(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.minimum(r - u.abs(), r - v.abs())


def _triangle(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Point up, its centroid in the middle."""
    slanted = 0.75 * r - (math.sqrt(0.75) * u.abs() - 0.5 * v)
    return torch.minimum(slanted, 0.75 * r - v)


def _star(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Five points, one of them up: the sector between a tip and a notch, mirrored ten times."""
    tip, notch = 1.4 * r, 0.62 * r
    fifth = 2 * math.pi / 5
    angle = torch.atan2(u, -v)
    angle = (angle - fifth * torch.round(angle / fifth)).abs()
    length = torch.hypot(u, v)
    along, across = length * angle.cos(), length * angle.sin()
    end_x, end_y = notch * math.cos(fifth / 2) - tip, notch * math.sin(fifth / 2)
    return ((tip - along) * end_y + across * end_x) / torch.hypot(end_x, end_y)


def _cross(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    u, v = u.abs(), v.abs()
    long, short = 1.2 * r, 0.45 * r
    lying = torch.minimum(long - u, short - v)
    return torch.maximum(lying, torch.minimum(short - u, long - v))


_DISTANCES = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "face": lambda u, v, r: _disc(u, v, 1.15 * r),
}


def face_at(u: Tensor, v: Tensor, r: Tensor, tint: Tensor) -> Tensor:
    """Skin, hair in the tint, eyes and a mouth: (N, F, 3, H, W)."""

    def over(picture: Tensor, inside: Tensor, colour: Tensor) -> Tensor:
        return torch.lerp(picture, colour, coverage(inside)[:, :, None])

    def of(colour: tuple[float, float, float]) -> Tensor:
        return u.new_tensor(colour).view(1, 1, 3, 1, 1)

    picture = over(of(SKIN), -v - 0.5 * r, tint)
    eyes = 0.2 * r - torch.hypot(u.abs() - 0.45 * r, v + 0.12 * r)
    picture = over(picture, eyes, of(DARK))
    mouth = torch.minimum(0.5 * r - u.abs(), 0.13 * r - (v - 0.55 * r).abs())
    return over(picture, mouth, of(LIPS))


def pattern_at(
    texture_N: Tensor, u: Tensor, v: Tensor, scenes: Scenes, unit: float, layer: int
) -> Tensor:
    """What is added to a surface's colour at the points (u, v) px on it: (N, F, H, W)."""
    pattern = torch.zeros(torch.broadcast_shapes(u.shape, v.shape), device=u.device)
    for texture, rows in _by(texture_N, len(TEXTURES)):
        if texture:
            draw = _waves if TEXTURES[texture] == "waves" else _stripes
            crossed = TEXTURES[texture] == "checks"
            pattern[rows] = draw(u[rows], v[rows], scenes[rows], unit, layer, crossed)
    return pattern


def _stripes(u, v, scenes: Scenes, unit: float, layer: int, crossed: bool) -> Tensor:
    """Bands of equal width with edges one pixel wide, crossed by others for checks."""
    seed_N1 = scenes.seed_N[:, None]
    angle_N1 = math.pi * uniform(seed_N1, layer, 10)
    pitch = wide(unit * (0.14 + 0.08 * uniform(seed_N1, layer, 11)) * (1.5 if layer == 1 else 1))
    c, s = wide(angle_N1.cos()), wide(angle_N1.sin())

    def bands(along: Tensor) -> Tensor:
        return (2 * pitch * (((along / pitch) % 1 - 0.5).abs() - 0.25)).clamp(-1, 1)

    pattern = bands(c * u + s * v)
    return CONTRAST[layer] * (pattern * bands(c * v - s * u) if crossed else pattern)


def _waves(u, v, scenes: Scenes, unit: float, layer: int, _: bool) -> Tensor:
    """Waves of equal strength per octave, as in natural pictures."""
    seed_N1 = scenes.seed_N[:, None]
    short_N1, long_N1 = scenes.waves_N2.split(1, 1)
    pattern = torch.zeros_like(u + v)
    for n in range(WAVES):
        k_N1 = 2 * math.pi / (unit * short_N1 * (long_N1 / short_N1) ** (n / (WAVES - 1)))
        angle_N1 = math.pi * uniform(seed_N1, n, layer, 12)
        start = wide(2 * math.pi * uniform(seed_N1, n, layer, 13))
        kx, ky = wide(k_N1 * angle_N1.cos()), wide(k_N1 * angle_N1.sin())
        pattern += torch.cos(kx * u + (ky * v + start))
    return WAVE_CONTRAST * pattern
