"""Source frames at their own timestamps -> frames on the model's clock, with natural motion.

Picking the nearest frame writes judder into the data and averaging writes ghosts, so a source
frame is taken where one falls on the output time, and elsewhere a motion-compensated in-between
is made. numpy and OpenCV only: the decoding worker (`data/decode.py`) must start at once.

The in-between follows each pixel along a smooth path through four source frames (dense inverse
search flow: Kroeger et al. 2016, arXiv 1603.03590). Paths are carried to the output time by
softmax splatting (Niklaus & Liu 2020, arXiv 2003.05534), once from each neighbour; the path along
which the two neighbours agree best wins, and the colour is looked up in the source frames at its
ends: in both where they are alike, else in the nearer one or in the one that shows the thing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

SAME_RATE = 0.005  # a tempo change this small (relative) is worth fewer made-up frames
ON_TIME = 0.02  # a source frame this close (in source intervals) to the output time is taken
HOLE = 2.0  # a gap between source frames longer than this many target intervals is a hole
NATURAL_HZ = 3.5  # swings up to about this rate keep their full width between source frames
FLOW_SIDE = 320  # px; flow is computed on pictures shrunk until the shorter side is within this
PHOTO_LEVELS = 14.0  # neighbours that differ by more along a path (of 255) do not agree
SINC_REACH = 3.0  # output intervals to each side that a sped-up clip is smoothed over
ALIKE_LEVELS = 4.0  # ... and by less: their mean is as sharp as either
AGREED_SHARE = 0.8  # of the picture must lie on agreed paths, else the nearest frame is taken


@dataclass(frozen=True)
class Pick:
    """One output frame: source frames `left` and `right` and how far between them, 0 <= at < 1."""

    left: int
    right: int
    at: float


def source_fps(pts_s: np.ndarray) -> float:
    """Mean rate in Hz of sorted timestamps (N >= 2,) in seconds."""
    return (len(pts_s) - 1) / float(pts_s[-1] - pts_s[0])


def is_too_slow(pts_s: np.ndarray, fps: float) -> bool:
    """Is the source slower than `fps` by more than 0.5 %?"""
    return source_fps(pts_s) < fps * (1 - SAME_RATE)


def clock(pts_s: np.ndarray, fps: float) -> np.ndarray:
    """Times (N,) in s of the source frames on the output's clock, which starts at the first frame.

    A constant-rate source within 0.5 % of n/2 times `fps` is taken to run at exactly that: 16.02
    fps is one to one with 16, and 23.976 fps gives 16 fps a source frame at every other output.
    Any other source keeps its timestamps. Constant: to 2 ms or 5 % of the frame interval.
    """
    since_first = pts_s - pts_s[0]
    rate = source_fps(pts_s)
    unevenness = np.abs(np.diff(pts_s) * rate - 1).max()
    multiple = round(2 * rate / fps) / 2
    if unevenness > max(0.05, 0.002 * rate) or abs(rate / fps - multiple) > SAME_RATE * multiple:
        return since_first
    return np.arange(len(pts_s)) / (multiple * fps)


def plan_picks(clock_s: np.ndarray, fps: float) -> list[Pick]:
    """All output frames at k / fps that frames at `clock_s` (N,) in s, from 0, allow."""
    gaps = np.diff(clock_s)
    num = int(np.floor((clock_s[-1] + ON_TIME * gaps[-1]) * fps)) + 1
    picks = []
    for time in np.arange(num) / fps:
        left = min(int(np.searchsorted(clock_s, time, side="right")) - 1, len(gaps) - 1)
        at = float((time - clock_s[left]) / gaps[left])
        if abs(at - round(at)) <= ON_TIME:
            picks.append(Pick(left + round(at), left + round(at), 0.0))
        else:
            picks.append(Pick(left, left + 1, at))
    return picks


def hole_in(picks: list[Pick], clock_s: np.ndarray, fps: float) -> float | None:
    """Length (s) of the longest gap that `picks` would have to bridge, if it is a hole."""
    first, last = picks[0].left, picks[-1].right
    gap = float(np.diff(clock_s[first : last + 1]).max(initial=0.0))
    return gap if gap > HOLE / fps * (1 + 1e-6) else None


@dataclass(frozen=True)
class Made:
    """An output frame (H, W, 3) uint8 and its origin: source | inbetween | nearest | smoothed."""

    frame: np.ndarray
    origin: str


def frame_maker(
    get: Callable[[int], np.ndarray], clock_s: np.ndarray, mode: str
) -> Callable[[Pick], Made]:
    """A function that makes the frame of a `Pick`; `get(i)` is source frame i, uint8 (H, W, 3).

    mode "auto" makes in-betweens, "nearest" takes the nearest frame, "blend" averages by time. Call
    it in order of time: neighbouring picks share the flow between the same two frames.
    """

    @lru_cache(maxsize=6)
    def small_gray(index: int) -> np.ndarray:
        gray = cv2.cvtColor(get(index), cv2.COLOR_RGB2GRAY)
        shrink = int(np.ceil(min(gray.shape) / FLOW_SIDE))
        size = gray.shape[1] // shrink, gray.shape[0] // shrink
        return gray if shrink == 1 else cv2.resize(gray, size, interpolation=cv2.INTER_AREA)

    @lru_cache(maxsize=8)
    def flow(here: int, there: int) -> np.ndarray:
        return dense_flow(small_gray(here), small_gray(there))

    def make(pick: Pick) -> Made:
        if pick.at == 0.0:
            return Made(get(pick.left), "source")
        nearest = pick.left if pick.at <= 0.5 else pick.right
        if mode == "nearest":
            return Made(get(nearest), "nearest")
        left, right = get(pick.left), get(pick.right)
        if mode == "blend":
            return Made(cv2.addWeighted(left, 1 - pick.at, right, pick.at, 0), "inbetween")
        assert mode == "auto", mode
        paths, agreed_share = _paths(pick, small_gray, flow, clock_s)
        if agreed_share < AGREED_SHARE:
            return Made(get(nearest), "nearest")
        return Made(_render(paths, left, right), "inbetween")

    return make


def smooth_maker(
    get: Callable[[int], np.ndarray], clock_s: np.ndarray, fps: float
) -> Callable[[Pick], Made]:
    """As `frame_maker`, for a source that is sped up: what is faster than fps / 2 Hz is taken away.

    Else it would come back as slow motion that never was. Each output frame is the mean of the
    source frames around its time under a sinc of that cutoff, Hann-windowed to three output
    intervals on each side. No motion is estimated: what moves far between output frames blurs, as
    it would before a shutter that is open all the time.
    """
    spacing_s = np.gradient(clock_s)

    @lru_cache(maxsize=2 + int(2 * SINC_REACH / fps / np.diff(clock_s).min()))
    def levels(index: int) -> np.ndarray:
        return get(index).astype(np.float32)

    def make(pick: Pick) -> Made:
        gap = clock_s[pick.right] - clock_s[pick.left]
        turn = (clock_s - clock_s[pick.left] - pick.at * gap) * fps  # in output intervals
        near = np.flatnonzero(np.abs(turn) < SINC_REACH)
        weights = np.sinc(turn[near]) * (1 + np.cos(np.pi * turn[near] / SINC_REACH))
        weights *= spacing_s[near]  # sparse frames stand for more time
        total = sum(w * levels(int(k)) for k, w in zip(near, weights, strict=True))
        frame = np.clip(np.rint(total / weights.sum()), 0, 255).astype(np.uint8)
        return Made(frame, "smoothed")

    return make


@dataclass(frozen=True)
class Paths:
    """Where each pixel of an in-between comes from, on the (h, w) grid that flow was computed on.

    `to_left`, `to_right`: offsets (h, w, 2) in px of that grid to the same thing in the two
    neighbours; `from_left` (h, w): how much of the colour the left one gives, in [0, 1].
    """

    to_left: np.ndarray
    to_right: np.ndarray
    from_left: np.ndarray


def _paths(pick: Pick, gray: Callable, flow: Callable, clock_s: np.ndarray) -> tuple[Paths, float]:
    """The paths through the in-between of `pick`, and the share where the neighbours agree."""
    left, right = pick.left, pick.right
    gap = float(clock_s[right] - clock_s[left])
    past = future = None
    if left > 0:
        past = flow(left, left - 1), float(clock_s[left - 1] - clock_s[left]) / gap
    if right + 1 < len(clock_s):
        future = flow(right, right + 1), float(clock_s[right + 1] - clock_s[left]) / gap
    forth, back = flow(left, right), flow(right, left)
    a = _carry(gray(left), gray(right), forth, back, past, future, gap, pick.at)
    past, future = (end and (end[0], 1 - end[1]) for end in (future, past))  # time runs backwards
    b = _carry(gray(right), gray(left), back, forth, past, future, gap, 1 - pick.at)
    use_a = np.where(a.hit & b.hit, a.error <= b.error, a.hit)
    error = np.where(use_a, a.error, b.error)
    agreed = (error < PHOTO_LEVELS) & (a.hit | b.hit)
    # Where both neighbours show the thing, the mean of their look-ups by time takes out the flow's
    # error in position; unless they are too unlike, where the nearer one alone is sharper. Where
    # one hides it, only the one that the path started from has the right colour.
    both = np.where(error < ALIKE_LEVELS, 1 - pick.at, pick.at <= 0.5)
    from_left = np.where(agreed, both, use_a).astype(np.float32)
    return Paths(
        to_left=_calm(np.where(use_a[..., None], a.to_near, b.to_far)),
        to_right=_calm(np.where(use_a[..., None], a.to_far, b.to_near)),
        from_left=cv2.blur(cv2.medianBlur(from_left, 5), (3, 3)),
    ), float(agreed.mean())


def _calm(offsets: np.ndarray) -> np.ndarray:
    """Offsets (h, w, 2) without stray pixels; edges between motions stay sharp."""
    return np.stack([cv2.medianBlur(np.ascontiguousarray(offsets[..., c]), 5) for c in (0, 1)], -1)


def dense_flow(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Dense flow (h, w, 2) in px: here[p] is found at there[p + flow[p]]."""
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    search.setFinestScale(0)
    search.setPatchStride(2)  # at 3 or more, fine texture that moves fast is lost
    search.setVariationalRefinementIterations(0)  # costs more than it gains here
    return search.calc(here, there, None)


@dataclass(frozen=True)
class _Carried:
    """Paths that start in one neighbour, seen at the output time: offsets (h, w, 2) to the near and
    far neighbour, their photometric error (h, w) in levels, and where any path landed (h, w)."""

    to_near: np.ndarray
    to_far: np.ndarray
    error: np.ndarray
    hit: np.ndarray


def _carry(near, far, forth, back, past, future, gap_s: float, at: float) -> _Carried:
    """Carry all pixels of `near` (time 0) along their paths to time `at` on the way to `far` (1).

    `past` and `future` are (flow, time) of the next frames outwards, or None at a clip's end.
    """
    here = _grid(near.shape)
    landed = here + forth
    knots, places = [0.0, 1.0], [np.zeros_like(forth), forth]
    if past is not None:
        knots, places = [past[1], *knots], [past[0], *places]
    if future is not None:
        knots, places = [*knots, future[1]], [*places, forth + _sample(future[0], landed)]
    curved = sum(w * place for w, place in zip(time_weights(knots, at, gap_s), places, strict=True))
    straight = at * forth
    bend = _length(curved - straight)
    reach = sum(_length(place) for place in places)
    tame = (bend <= 0.2 * reach + 0.5)[..., None]  # a wild bend is a flow error
    moved = np.where(tame, curved, straight)

    error = np.abs(near.astype(np.float32) - _sample(far.astype(np.float32), landed))
    error = cv2.blur(error, (5, 5))
    astray = _length(forth + _sample(back, landed))  # there and back again, px
    importance = np.exp(-np.minimum(error / 4 + astray, 20))
    values = np.concatenate([-moved, forth - moved, error[..., None]], -1)
    carried, hit = _splat(values, importance, here + moved)
    return _Carried(carried[..., :2], carried[..., 2:4], carried[..., 4], hit)


def time_weights(knots: list[float], at: float, gap_s: float) -> np.ndarray:
    """Weights of the places at `knots` in the place at time `at` (units of gap_s seconds).

    With four knots they are exact for steady motion and for swings at NATURAL_HZ, which keeps
    swings below it true as well (a cubic would lose 2.6 % of a 4 Hz swing seen at 24 fps); with
    three they are the parabola's, with two the straight line's.
    """
    turn = 2 * np.pi * NATURAL_HZ * gap_s
    if len(knots) == 4 and turn < np.pi:
        basis = [np.ones_like, lambda t: t, lambda t: np.cos(turn * t), lambda t: np.sin(turn * t)]
    else:
        basis = [lambda t, n=n: t**n for n in range(len(knots))]
    times = np.asarray(knots, np.float64)
    return np.linalg.solve(
        np.stack([f(times) for f in basis]), np.stack([f(np.float64(at)) for f in basis])
    )


def _render(paths: Paths, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The in-between (H, W, 3): bicubic look-ups in the frames that `paths` names."""
    height, width = left.shape[:2]
    scale = np.float32([width / paths.from_left.shape[1], height / paths.from_left.shape[0]])
    here = _grid((height, width))

    def look_up(frame, offset):
        at_px = here + cv2.resize(offset * scale, (width, height))
        mode = cv2.BORDER_REPLICATE
        return cv2.remap(frame, at_px, None, cv2.INTER_CUBIC, borderMode=mode)

    share = cv2.resize(paths.from_left, (width, height))[..., None]
    if share.min() == 1:
        return look_up(left, paths.to_left)
    if share.max() == 0:
        return look_up(right, paths.to_right)
    mixed = share * look_up(left, paths.to_left) + (1 - share) * look_up(right, paths.to_right)
    return np.rint(mixed).astype(np.uint8)


def _grid(shape: tuple[int, ...]) -> np.ndarray:
    """(H, W, 2) float32 px coordinates x, y."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    return np.stack([x, y], -1)


def _length(offset: np.ndarray) -> np.ndarray:
    """Length (h, w) of offsets (h, w, 2); several times faster than numpy's norm."""
    return np.sqrt(offset[..., 0] ** 2 + offset[..., 1] ** 2)


def _splat(
    values: np.ndarray, importance: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean by importance of `values` (h, w, C) splatted at `target`, and where any landed."""
    height, width, channels = values.shape
    corner = np.floor(target).astype(np.int32)
    part = (target - corner).astype(np.float32)
    layers = [*(np.moveaxis(values, -1, 0) * importance), importance]
    sums = np.zeros((channels + 1, height * width))
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x, y = corner[..., 0] + dx, corner[..., 1] + dy
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        share = abs(1 - dx - part[..., 0]) * abs(1 - dy - part[..., 1]) * inside
        index = np.where(inside, y * width + x, 0).ravel()
        for total, layer in zip(sums, layers, strict=True):
            total += np.bincount(index, (share * layer).ravel(), height * width)
    hit = sums[-1] > 1e-12
    mean = sums[:-1] / np.where(hit, sums[-1], 1)
    return mean.T.reshape(values.shape).astype(np.float32), hit.reshape(height, width)


def _sample(image: np.ndarray, at_px: np.ndarray) -> np.ndarray:
    """Bilinear look-up of a float32 image at `at_px` (h, w, 2) in px."""
    return cv2.remap(image, at_px, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
