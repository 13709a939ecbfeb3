"""Where everything in a scene is at given times, and the layers that show it.

Truth and picture come from the same layers. The unit of length is the picture's smaller side.
Shapes: N scene, F frame, H, W pixel, 2 x and y.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tempolora.data.toy_paint import (
    coverage,
    distance_inside,
    face_at,
    normal,
    pattern_at,
    tall,
    uniform,
    wide,
)
from tempolora.data.toy_scenes import KINDS, REACH, SCALE, SHAPES, TEXTURES, Scenes

WATER, GRASS, ROD = (0.12, 0.34, 0.56), (0.22, 0.48, 0.16), (0.62, 0.62, 0.64)
BOIL_WAVES, BOIL_U = 8, (0.1, 0.8)
STALKS, STALK_U, STALK_THICK_U = 9, 0.6, 0.035
GRASS_LAG = 4.0  # radians per U
WATER_LENGTH_U, WATER_LEVEL_U = 0.9, 0.12
FLOOR_U, ROD_U = 0.1, 0.6
TORSO_U, FEET_U = 0.22, 0.42  # of the walker: length, and how far below the middle it stands
WALK_SWING = 3.0  # radians of the limbs over the amplitude
CHUNK_PX = 2**22  # pixels drawn at a time


@dataclass(frozen=True)
class Flicker:
    """How strong the style "flickering" is: standard deviations per frame.

    `gain`: of the whole picture's brightness; `texture`: of smooth noise that changes with every
    frame, drawn apart for mover and background; `jitter_px`: of the position, each axis, in a
    picture of 64 px (it grows with the picture).
    """

    gain: float = 0.05
    texture: float = 0.08
    jitter_px: float = 0.6


@dataclass(frozen=True)
class Limb:
    """Length and half the thickness in U; how far the joint bends, radians, knees backwards."""

    length: float
    thickness: float
    bend: float


LEG, ARM = Limb(0.3, 0.033, 1.0), Limb(0.2, 0.02, -0.6)


@dataclass(frozen=True)
class Layer:
    """A part of the picture; later ones lie above earlier ones.

    cover() in 0..1 broadcasts to (N, F, H, W), paint() to (N, F, 3, H, W), moves(), the flow in px
    from frame k to k + 1, to (N, F-1, H, W, 2).
    """

    cover: Callable[[], Tensor]
    paint: Callable[[], Tensor]
    moves: Callable[[], Tensor]
    is_mover: bool
    is_face_N: Tensor
    has_pattern_N: Tensor


def stages(
    scenes: Scenes,
    fps: float,
    num_frames: int,
    height: int,
    width: int,
    start_s: float,
    noise: Flicker | None,
) -> Iterator[tuple[Tensor, "Stage"]]:
    """The scenes of each kind, in portions that fit in memory, with their rows."""
    portion = max(1, CHUNK_PX // (num_frames * height * width))
    number_F = torch.arange(num_frames, dtype=torch.float64, device=scenes.hz_N.device)
    number_F += start_s * fps
    kinds_N = scenes.kind_N.cpu()
    for index, kind in enumerate(KINDS):
        for rows in (kinds_N == index).nonzero()[:, 0].split(portion):
            if len(rows):
                rows = rows.to(scenes.hz_N.device)
                yield rows, Stage(kind, scenes[rows], number_F, fps, height, width, noise)


class Stage:
    """Scenes of one kind at given times: where everything is, and the layers that show it."""

    def __init__(
        self,
        kind: str,
        scenes: Scenes,
        number_F: Tensor,
        fps: float,
        height: int,
        width: int,
        noise: Flicker | None,
    ):
        self.kind, self.scenes, self.height, self.width = kind, scenes, height, width
        self.unit = float(min(height, width))
        self.seconds_F = number_F / fps
        self.number_F = number_F.round().long()
        self.turn_NF = 2 * math.pi * scenes.hz_N[:, None] * self.seconds_F
        self.turn_NF += scenes.phase_N[:, None]
        self.reach_N1 = (REACH[kind] * self.unit * scenes.amplitude_N)[:, None]
        self.brightness_NF = torch.ones_like(self.turn_NF)
        self.is_face_N = scenes.shape_N == SHAPES.index("face")
        self.radius_N = SCALE[kind] * self.unit * scenes.size_N
        device = scenes.hz_N.device
        self.x = torch.arange(width, device=device).view(1, 1, 1, -1) + 0.5
        self.y = torch.arange(height, device=device).view(1, 1, -1, 1) + 0.5
        middle_2 = torch.tensor([width / 2, height / 2], dtype=torch.float64, device=device)
        self.home_N2 = middle_2 + self.unit * scenes.place_N2
        self.jitter_NF2 = torch.zeros(*self.turn_NF.shape, 2, dtype=torch.float64, device=device)
        if noise:
            axes = [normal(scenes.seed_N[:, None], self.number_F, n) for n in (2, 3)]
            self.jitter_NF2 = noise.jitter_px * self.unit / 64 * torch.stack(axes, -1)
        centre_NF2, self.angle_NF = getattr(self, f"_{kind}")()
        self.centre_NF2 = centre_NF2 + self.jitter_NF2

    # Where the mover is and how far it is turned: (N, F, 2) px, (N, F) radians.

    def _slide(self) -> tuple[Tensor, Tensor]:
        direction_N1 = self.scenes.direction_N[:, None]
        swing_NF = self.reach_N1 * self.turn_NF.cos()
        way = torch.stack([swing_NF * direction_N1.cos(), swing_NF * direction_N1.sin()], -1)
        return self.home_N2[:, None] + way, torch.zeros_like(swing_NF)

    _pan = _slide

    def _pulse(self) -> tuple[Tensor, Tensor]:
        self.brightness_NF = 1 - self.reach_N1 / self.unit * (1 - self.turn_NF.cos())
        still_NF = torch.zeros_like(self.turn_NF)
        return self.home_N2[:, None] + still_NF[..., None], still_NF

    def _spin(self) -> tuple[Tensor, Tensor]:
        arm = torch.stack([self.turn_NF.cos(), self.turn_NF.sin()], -1) * self.reach_N1[..., None]
        return self.home_N2[:, None] + arm, self.turn_NF

    def _ball(self) -> tuple[Tensor, Tensor]:
        part_NF = (self.turn_NF / (2 * math.pi)) % 1.0  # on the floor at each whole turn
        rest = self.height - FLOOR_U * self.unit - self.radius_N[:, None]
        y_NF = rest - 2 * self.reach_N1 * 4 * part_NF * (1 - part_NF)
        return self._at(self.home_N2[:, :1], y_NF), torch.zeros_like(y_NF)

    def _pendulum(self) -> tuple[Tensor, Tensor]:
        length = ROD_U * self.unit
        angle_NF = self.reach_N1 * self.turn_NF.cos() / length
        x_NF = self.home_N2[:, :1] + length * angle_NF.sin()
        return self._at(x_NF, self._pivot_y() + length * angle_NF.cos()), -angle_NF

    def _water(self) -> tuple[Tensor, Tensor]:
        wave = 2 * math.pi / (WATER_LENGTH_U * self.unit)
        slope_NF = self.reach_N1 * wave * self.turn_NF.sin()
        y_NF = self._level_y() + self.reach_N1 * self.turn_NF.cos()
        return self._at(self.home_N2[:, :1], y_NF), 0.5 * slope_NF.atan()

    def _grass(self) -> tuple[Tensor, Tensor]:
        bend_NF = self.reach_N1 * self.turn_NF.cos()
        length = STALK_U * self.unit
        y_NF = torch.full_like(bend_NF, self.height - length)
        return self._at(self.home_N2[:, :1] + bend_NF, y_NF), (2 * bend_NF / length).atan()

    def _walk(self) -> tuple[Tensor, Tensor]:
        """Once over to each side in a turn, up and down twice."""
        margin = 0.3 * self.unit  # out of sight on one side, back on the other
        whole = self.width + 2 * margin
        far_NF = self.home_N2[:, :1] + self.unit * self.scenes.travel_N[:, None] * self.seconds_F
        x_NF = (far_NF + margin) % whole - margin + self.reach_N1 * self.turn_NF.cos()
        bob_NF = 0.5 * self.reach_N1 * (2 * self.turn_NF).cos()
        hip_y = self.height / 2 + (FEET_U - LEG.length + 0.02) * self.unit
        head = TORSO_U * self.unit + 0.9 * self.radius_N[:, None]
        return self._at(x_NF, hip_y - head + bob_NF), torch.zeros_like(x_NF)

    def _at(self, x_NF: Tensor, y_NF: Tensor) -> Tensor:
        return torch.stack(torch.broadcast_tensors(x_NF, y_NF), -1)

    def _pivot_y(self) -> float:
        return self.height / 2 - 0.5 * self.unit

    def _level_y(self) -> float:
        return self.height / 2 + WATER_LEVEL_U * self.unit

    # What there is to see.

    def layers(self) -> Iterator[Layer]:
        """From the back to the front: the ground, what belongs to the kind, the mover."""
        yield self._ground_layer()
        yield from getattr(self, f"_{self.kind}_scenery", lambda: ())()
        yield self._mover_layer()

    def boil(self, of_mover: bool) -> Tensor:
        """Smooth noise, a new one in every frame, of unit variance: (N, F, 1, H, W)."""
        seed_N1 = self.scenes.seed_N[:, None]
        wave_K = torch.arange(BOIL_WAVES, device=seed_N1.device)
        low, high = BOIL_U
        pitch_K = self.unit * low * (high / low) ** (wave_K / (BOIL_WAVES - 1))
        angle_NK = math.pi * uniform(seed_N1, wave_K, 4)
        k_NK2 = torch.stack([angle_NK.cos(), angle_NK.sin()], -1) * 2 * math.pi / pitch_K[:, None]
        turn_NKHW = wide(k_NK2[..., 0]) * self.x + wide(k_NK2[..., 1]) * self.y
        basis = torch.cat([turn_NKHW.cos(), turn_NKHW.sin()], 1)
        number_F1 = self.number_F[:, None]
        wave_2K = torch.arange(2 * BOIL_WAVES, device=seed_N1.device)
        strength_NFK = normal(seed_N1[..., None], number_F1, wave_2K, 5 + of_mover)
        strength_NFK = strength_NFK.float() / math.sqrt(BOIL_WAVES)
        return torch.einsum("nfk,nkhw->nfhw", strength_NFK, basis)[:, :, None]

    def _layer(self, cover, paint, moves, part: str = "scenery", pattern_N=None) -> Layer:
        no_N = torch.zeros_like(self.is_face_N)
        return Layer(
            cover=cover,
            paint=paint,
            moves=moves,
            is_mover=part != "scenery",
            is_face_N=self.is_face_N if part == "mover" else no_N,
            has_pattern_N=no_N if pattern_N is None else pattern_N,
        )

    def _ground_layer(self) -> Layer:
        """Seen by a camera that moves in a pan, and else stands."""
        scenes, moving = self.scenes, self.kind == "pan"
        texture_N = scenes.ground_texture_N
        if moving:  # a flat world would hide that the camera moves
            texture_N = torch.where(texture_N == 0, TEXTURES.index("waves"), texture_N)
        shift_NF2 = self.centre_NF2 if moving else self.home_N2[:, None]
        u, v = self.x - wide(shift_NF2[..., 0]), self.y - wide(shift_NF2[..., 1])

        def paint() -> Tensor:
            pattern = pattern_at(texture_N, u, v, scenes, self.unit, layer=1)
            return tall(scenes.ground_N3) + pattern[:, :, None]

        return self._layer(
            cover=lambda: torch.ones_like(self.x),
            paint=paint,
            moves=self._with_mover if moving else lambda: self.x.new_zeros(1, 1, 1, 1, 2),
            pattern_N=texture_N != 0,
        )

    def _mover_layer(self) -> Layer:
        scenes = self.scenes
        u, v = self._own_coordinates()
        radius = wide(self.radius_N[:, None])

        def paint() -> Tensor:
            pattern = pattern_at(scenes.texture_N, u, v, scenes, self.unit, layer=2)
            colour = tall(scenes.tint_N3) + pattern[:, :, None]
            faces = self.is_face_N.nonzero()[:, 0]
            if len(faces):
                face = face_at(u[faces], v[faces], radius[faces], tall(scenes.tint_N3[faces]))
                colour = colour.index_copy(0, faces, face.expand_as(colour[faces]))
            lit = wide(self.brightness_NF)[:, :, None]
            return colour * lit if self.kind == "pulse" else colour

        return self._layer(
            cover=lambda: coverage(distance_inside(scenes.shape_N, u, v, radius)) * (radius > 0),
            paint=paint,
            moves=self._with_mover,
            part="mover",
            pattern_N=(scenes.texture_N != 0) & ~self.is_face_N,
        )

    def _own_coordinates(self) -> tuple[Tensor, Tensor]:
        """Where each pixel lies in the mover's own frame, px: two of (N, F, H, W)."""
        u, v = self.x - wide(self.centre_NF2[..., 0]), self.y - wide(self.centre_NF2[..., 1])
        if self.kind not in ("spin", "pendulum", "water", "grass"):
            return u, v
        c, s = wide(self.angle_NF.cos()), wide(self.angle_NF.sin())
        return c * u + s * v, c * v - s * u

    def _with_mover(self) -> Tensor:
        return self._rigid(self.centre_NF2, self.angle_NF)

    def _rigid(self, origin_NF2: Tensor, angle_NF: Tensor) -> Tensor:
        """Flow of a part whose own frame has this origin and angle: (N, F-1, H, W, 2)."""
        u, v = (axis - wide(origin_NF2[:, :-1, ..., n]) for n, axis in ((0, self.x), (1, self.y)))
        turned = angle_NF.diff(dim=1)
        c, s = wide(turned.cos()), wide(turned.sin())
        step_x, step_y = (wide(step) for step in origin_NF2.diff(dim=1).unbind(-1))
        return torch.stack(
            torch.broadcast_tensors(step_x + c * u - s * v - u, step_y + s * u + c * v - v), -1
        )

    def _capsule(self, start_NF2, end_NF2, thickness: float) -> Tensor:
        """Signed distance (px, positive inside) of a line with round ends: (N, F, H, W)."""
        along = end_NF2 - start_NF2
        ax, ay = (wide(part) for part in along.unbind(-1))
        u, v = (axis - wide(start_NF2[..., n]) for n, axis in ((0, self.x), (1, self.y)))
        share = ((u * ax + v * ay) / wide((along**2).sum(-1) + 1e-9)).clamp(0, 1)
        return thickness * self.unit - torch.hypot(u - share * ax, v - share * ay)

    def _line_layer(self, start_NF2, end_NF2, thickness, colour, moves, part="scenery") -> Layer:
        return self._layer(
            cover=lambda: coverage(self._capsule(start_NF2, end_NF2, thickness)),
            paint=lambda: colour,
            moves=moves,
            part=part,
        )

    def _of(self, colour: tuple[float, float, float]) -> Tensor:
        return self.x.new_tensor(colour).view(1, 1, 3, 1, 1)

    def _spin_scenery(self) -> Iterator[Layer]:
        """The arm reaches past the hub, so that it looks like a propeller."""
        hub_NF2 = self.home_N2[:, None] + self.jitter_NF2
        end_NF2 = hub_NF2 - 1.1 * (self.centre_NF2 - hub_NF2)
        rod = self._of(ROD)
        yield self._line_layer(end_NF2, self.centre_NF2, 0.035, rod, self._with_mover)
        yield self._line_layer(hub_NF2, hub_NF2, 0.06, 0.5 * rod, self._with_mover)

    def _pendulum_scenery(self) -> Iterator[Layer]:
        pivot_NF2 = self._at(self.home_N2[:, :1], torch.full_like(self.turn_NF, self._pivot_y()))
        pivot_NF2 = pivot_NF2 + self.jitter_NF2
        rod = self._of(ROD)
        yield self._line_layer(pivot_NF2, self.centre_NF2, 0.025, rod, self._with_mover)

    def _ball_scenery(self) -> Iterator[Layer]:
        floor = self.height - FLOOR_U * self.unit
        yield self._layer(
            cover=lambda: coverage(self.y - floor + 0 * self.x),
            paint=lambda: 0.55 * tall(self.scenes.ground_N3),
            moves=lambda: self.x.new_zeros(1, 1, 1, 1, 2),
        )

    def _water_scenery(self) -> Iterator[Layer]:
        """A wave that travels to the right; bands below its surface follow it."""
        wave = 2 * math.pi / (WATER_LENGTH_U * self.unit)
        reach = wide(self.reach_N1)
        delay = wave * (self.x - wide(self.home_N2[:, :1]))
        c, s = wide(self.turn_NF.cos()), wide(self.turn_NF.sin())
        height = reach * (c * delay.cos() + s * delay.sin())  # (N, F, 1, W)
        slope = reach * wave * (s * delay.cos() - c * delay.sin())
        jitter_x, jitter_y = (wide(part) for part in self.jitter_NF2.unbind(-1))
        level = self._level_y() + height + jitter_y + slope * jitter_x

        def paint() -> Tensor:
            depth = (self.y - level) / self.unit
            bands = 0.07 * torch.cos(2 * math.pi * depth / 0.13) - 0.12 * depth
            return (0.4 * tall(self.scenes.ground_N3) + self._of(WATER)) + bands[:, :, None]

        def moves() -> Tensor:
            up = height.diff(dim=1).expand(-1, -1, self.height, -1)
            return torch.stack([torch.zeros_like(up), up], -1)

        yield self._layer(
            cover=lambda: coverage((self.y - level) / torch.sqrt(1 + slope**2)),
            paint=paint,
            moves=moves,
        )

    def _grass_scenery(self) -> Iterator[Layer]:
        """Stalks that bend in a gust from the left; the last one carries the mover."""
        seed_N = self.scenes.seed_N
        for n in range(STALKS):
            root_N = self.width * (n + 0.2 + 0.6 * uniform(seed_N, n, 7)) / STALKS
            length_N = self.unit * (0.3 + 0.35 * uniform(seed_N, n, 8))
            yield self._stalk_layer(root_N, length_N, 0.6 + 0.6 * uniform(seed_N, n, 9))
        whole_N = torch.ones_like(self.radius_N)
        yield self._stalk_layer(self.home_N2[:, 0], STALK_U * self.unit * whole_N, 1.1 * whole_N)

    def _stalk_layer(self, root_N: Tensor, length_N: Tensor, shade_N: Tensor) -> Layer:
        """A stalk whose points keep their height and move with its square."""
        lag_N = GRASS_LAG * (root_N - self.home_N2[:, 0]) / self.unit
        reach_N1 = self.reach_N1 * (length_N / (STALK_U * self.unit))[:, None]
        bend = wide(reach_N1 * (self.turn_NF - lag_N[:, None]).cos())
        jitter_x, jitter_y = (wide(part) for part in self.jitter_NF2.unbind(-1))
        length = wide(length_N[:, None])
        height = self.height + jitter_y - self.y  # above the root
        share = (height / length).clamp(0, 1)

        def cover() -> Tensor:
            off = self.x - wide(root_N[:, None]) - jitter_x - bend * share**2
            off = off.abs() / torch.sqrt(1 + (2 * bend * share / length) ** 2)
            thickness = STALK_THICK_U * self.unit * (1 - 0.6 * share)
            return coverage(torch.minimum(thickness - off, length - height))

        def moves() -> Tensor:
            step = (bend.diff(dim=1) * share[:, :1] ** 2).expand(-1, -1, -1, self.width)
            return torch.stack([step, torch.zeros_like(step)], -1)

        return self._layer(
            cover=cover,
            paint=lambda: wide(shade_N[:, None])[:, :, None] * self._of(GRASS),
            moves=moves,
        )

    def _walk_scenery(self) -> Iterator[Layer]:
        """Far leg and arm, torso, near leg and arm; the far ones lie in the shade."""
        head = 0.9 * self.radius_N[:, None]
        shoulder_NF2 = self._below(self.centre_NF2, head + 0.05 * self.unit)
        hip_NF2 = self._below(self.centre_NF2, head + TORSO_U * self.unit)
        near_NF, far_NF = self.turn_NF, self.turn_NF + math.pi
        tint = tall(self.scenes.tint_N3)
        yield from self._limb_layers(ARM, shoulder_NF2, near_NF, 0.45 * tint)
        yield from self._limb_layers(LEG, hip_NF2, far_NF, 0.45 * tint)
        yield self._line_layer(shoulder_NF2, hip_NF2, 0.065, tint, self._with_mover, "body")
        yield from self._limb_layers(LEG, hip_NF2, near_NF, 0.75 * tint)
        yield from self._limb_layers(ARM, shoulder_NF2, far_NF, 0.75 * tint)

    def _below(self, point_NF2: Tensor, px_N1: Tensor) -> Tensor:
        return point_NF2 + torch.stack([torch.zeros_like(px_N1), px_N1], -1)

    def _limb_layers(
        self, limb: Limb, root_NF2: Tensor, turn_NF: Tensor, colour: Tensor
    ) -> Iterator[Layer]:
        """Upper and lower half; the joint bends while the limb comes forward."""
        facing_N1 = torch.where(self.scenes.travel_N < 0, -1.0, 1.0)[:, None]
        swing_NF = WALK_SWING * self.scenes.amplitude_N[:, None] * turn_NF.cos()
        bend_NF = limb.bend * (0.5 - 0.5 * turn_NF.sin()) ** 2
        for angle_NF in (facing_N1 * swing_NF, facing_N1 * (swing_NF - bend_NF)):
            way_NF2 = torch.stack([angle_NF.sin(), angle_NF.cos()], -1)
            end_NF2 = root_NF2 + limb.length / 2 * self.unit * way_NF2
            moves = partial(self._rigid, root_NF2, -angle_NF)
            yield self._line_layer(root_NF2, end_NF2, limb.thickness, colour, moves, "body")
            root_NF2 = end_NF2
