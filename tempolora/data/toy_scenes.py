"""What a drawn clip shows: scenes as tensors of independent factors, and what follows from them.

Lengths are shares of the picture's smaller side, so that a scene may be drawn at any size, and time
is in seconds, so that it may be drawn at any rate. Shapes: N scene, 2 x and y, 3 red, green, blue.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

KINDS = ("slide", "walk", "pan", "spin", "pulse", "water", "grass", "ball", "pendulum")
SHAPES = ("disc", "square", "triangle", "star", "cross", "face")
TEXTURES = ("flat", "stripes", "checks", "waves")
COLOURS = {
    "red": (214, 48, 49),
    "green": (46, 170, 87),
    "blue": (52, 101, 220),
    "yellow": (236, 196, 50),
    "purple": (142, 68, 190),
    "white": (240, 240, 236),
    "orange": (240, 128, 40),
    "cyan": (60, 190, 200),
}
PATTERN_WORDS = ("", "striped ", "checked ", "mottled ")  # of TEXTURES
SENTENCES = {
    "slide": "a {look} moves {way}",
    "walk": "a figure in {colour}{head} walks {where}",
    "pan": "the camera pans {way} past a {look}",
    "spin": "a {look} turns round on an arm like a propeller",
    "pulse": "a {look} lights up and dims",
    "water": "a {look} bobs on waves",
    "grass": "a {look} sways on a stalk in the grass",
    "ball": "a {look} bounces on the floor",
    "pendulum": "a {look} swings like a pendulum",
}
GROUND_LEVELS = (20, 90)
BAND_HZ = (0.5, 6.0)
SIDEWAYS, UPRIGHT = 0.0, math.pi / 2

# Half of the mover's way from end to end, over its amplitude; of the pulse: share of brightness.
REACH = {
    **dict.fromkeys(KINDS, 1.0),
    **{"walk": 0.3, "spin": 1.7, "pulse": 2.0, "water": 0.6, "ball": 1.4, "pendulum": 1.2},
}
# What is drawn beside a mover needs room.
SCALE = {
    **dict.fromkeys(KINDS, 1.0),
    **{"walk": 0.55, "spin": 0.6, "water": 0.8, "grass": 0.75, "ball": 0.8, "pendulum": 0.8},
}


@dataclass(frozen=True)
class Scenes:
    """N scenes as tensors. Lengths are shares of the picture's smaller side.

    With turn = 2 pi hz t + phase (radians), the mover's displacement is amplitude * cos(turn) in
    its `direction` (radians, 0 sideways, pi/2 up and down) or what its kind makes of it, and a
    beat falls wherever turn is a whole number of turns. `size` is the mover's radius (0: none),
    `place` the middle of its motion from the picture's, `travel` a walker's speed per second,
    `waves` the shortest and longest pitch of the texture "waves". `tint` and `ground` are RGB in
    0..1. `seed` chooses patterns and flicker.
    """

    kind_N: Tensor
    shape_N: Tensor
    texture_N: Tensor
    ground_texture_N: Tensor
    tint_N3: Tensor
    ground_N3: Tensor
    hz_N: Tensor
    phase_N: Tensor
    amplitude_N: Tensor
    size_N: Tensor
    direction_N: Tensor
    place_N2: Tensor
    travel_N: Tensor
    waves_N2: Tensor
    seed_N: Tensor

    def __len__(self) -> int:
        return len(self.kind_N)

    def __getitem__(self, index: int | slice | Tensor) -> "Scenes":
        index = [index] if isinstance(index, int) else index
        return self._each(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> "Scenes":
        return self._each(lambda tensor: tensor.to(device))

    @property
    def kinds(self) -> list[str]:
        return [KINDS[n] for n in self.kind_N.tolist()]

    @staticmethod
    def cat(parts: Sequence["Scenes"]) -> "Scenes":
        names = [field.name for field in fields(Scenes)]
        return Scenes(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Scenes":
        return Scenes(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


def draw_scenes(
    count: int,
    rng: np.random.Generator,
    *,
    kinds: Sequence[str] = KINDS,
    shapes: Sequence[str] = SHAPES,
    textures: Sequence[str] = TEXTURES,
    ground_textures: Sequence[str] = TEXTURES,
    colours: Sequence[str] = tuple(COLOURS),
    hz: tuple[float, float] = BAND_HZ,
    amplitude: tuple[float, float] = (0.1, 0.2),
    size: tuple[float, float] = (0.14, 0.2),
    directions: Sequence[float] = (SIDEWAYS, UPRIGHT),
) -> Scenes:
    """`count` scenes, each factor drawn independently; frequencies are log-uniform in `hz`.

    One call for N scenes draws the same as N calls for one. Raises ValueError for an unknown name.
    """
    u_KN = iter(rng.random((count, 18)).T)

    def between(low: float, high: float) -> Tensor:
        return torch.from_numpy(low + (high - low) * next(u_KN))

    def one_of(options: Sequence) -> Tensor:
        return (between(0, 1) * len(options)).long()

    def named(options: Sequence[str], chosen: Sequence[str]) -> Tensor:
        return torch.tensor([_index(options, name) for name in chosen])[one_of(chosen)]

    tints = torch.tensor([COLOURS[known(COLOURS, name)] for name in colours]) / 255
    return Scenes(
        kind_N=named(KINDS, kinds),
        shape_N=named(SHAPES, shapes),
        texture_N=named(TEXTURES, textures),
        ground_texture_N=named(TEXTURES, ground_textures),
        tint_N3=tints[one_of(colours)],
        ground_N3=torch.stack([between(*GROUND_LEVELS) for _ in range(3)], 1).float() / 255,
        hz_N=between(math.log(hz[0]), math.log(hz[1])).exp(),
        phase_N=between(0, 2 * math.pi),
        amplitude_N=between(*amplitude),
        size_N=between(*size),
        direction_N=torch.tensor(directions, dtype=torch.float64)[one_of(directions)],
        place_N2=torch.stack([between(-0.08, 0.08) for _ in range(2)], 1),
        # Half of the walkers stay where they are.
        travel_N=between(-0.15, 0.15) * (between(0, 1) < 0.5),
        waves_N2=torch.tensor([[0.09, 1.0]], dtype=torch.float64).expand(count, 2),
        seed_N=between(0, 2**31).long(),
    )


def scene(
    kind: str,
    hz: float,
    phase: float = 0.0,
    amplitude: float = 0.15,
    *,
    shape: str = "square",
    texture: str = "waves",
    ground_texture: str = "waves",
    tint: tuple[int, int, int] = COLOURS["red"],
    ground: tuple[int, int, int] = (70, 74, 84),
    size: float = 0.16,
    direction: float = SIDEWAYS,
    place: tuple[float, float] = (0.0, 0.0),
    travel: float = 0.0,
    waves: tuple[float, float] = (0.09, 1.0),
    seed: int = 0,
) -> Scenes:
    """One scene by hand; colours in 0..255. Raises ValueError for an unknown name."""

    def real(value) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

    return Scenes(
        kind_N=torch.tensor([_index(KINDS, kind)]),
        shape_N=torch.tensor([_index(SHAPES, shape)]),
        texture_N=torch.tensor([_index(TEXTURES, texture)]),
        ground_texture_N=torch.tensor([_index(TEXTURES, ground_texture)]),
        tint_N3=torch.tensor([tint]) / 255,
        ground_N3=torch.tensor([ground]) / 255,
        hz_N=real(hz),
        phase_N=real(phase),
        amplitude_N=real(amplitude),
        size_N=real(size),
        direction_N=real(direction),
        place_N2=real(place),
        travel_N=real(travel),
        waves_N2=real(waves),
        seed_N=torch.tensor([seed]),
    )


def known(options: Sequence[str], name: str) -> str:
    if name not in options:
        raise ValueError(f"unknown name {name!r}, choose from {', '.join(options)}")
    return name


def _index(options: Sequence[str], name: str) -> int:
    return options.index(known(options, name))


def amplitude_px(scenes: Scenes, *, height: int, width: int) -> Tensor:
    """Half of the track's way from end to end in px: (N,). Of a pulse: 0."""
    reach_K = torch.tensor([REACH[k] * (k != "pulse") for k in KINDS], dtype=torch.float64)
    return reach_K.to(scenes.hz_N.device)[scenes.kind_N] * scenes.amplitude_N * min(height, width)


def beat_times(scenes: Scenes, duration_s: float) -> np.ndarray:
    """Times (s) in [0, duration_s) at which the phase of a single scene is a whole turn."""
    hz, offset = scenes.hz_N.item(), scenes.phase_N.item() / (2 * math.pi)
    turns = np.arange(np.ceil(offset), np.ceil(hz * duration_s + offset))
    return (turns - offset) / hz


def captions(scenes: Scenes, *, tempo_words: bool = False) -> list[str]:
    """A sentence for each scene: colour, pattern, shape and motion; with its tempo if asked.

    slow, steady and fast are the thirds of 0.5 to 6 Hz on a logarithmic scale.
    """
    palette = torch.tensor(list(COLOURS.values())) / 255
    nearest_N = torch.cdist(scenes.tint_N3.cpu(), palette).argmin(1)
    colours = [list(COLOURS)[n] for n in nearest_N.tolist()]
    shapes = [SHAPES[n] for n in scenes.shape_N.tolist()]
    patterns = [PATTERN_WORDS[n] for n in scenes.texture_N.tolist()]
    upright = scenes.direction_N.cos().abs() < 0.5
    sentences = [
        SENTENCES[kind].format(
            colour=colour,
            look=f"face with {colour} hair" if shape == "face" else f"{colour} {pattern}{shape}",
            head="" if shape == "face" else f" with a {pattern}{shape} for a head",
            way="up and down" if up else "from side to side",
            where="across" if travels else "on the spot",
        )
        for kind, colour, shape, pattern, up, travels in zip(
            scenes.kinds, colours, shapes, patterns, upright.tolist(), scenes.travel_N.tolist()
        )
    ]
    if not tempo_words:
        return sentences
    return [f"{text} at a {_tempo(hz)} pace" for text, hz in zip(sentences, scenes.hz_N.tolist())]


def _tempo(hz: float) -> str:
    third = 3 * math.log(hz / BAND_HZ[0]) / math.log(BAND_HZ[1] / BAND_HZ[0])
    return ("slow", "steady", "fast")[min(max(int(third), 0), 2)]
