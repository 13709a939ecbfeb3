"""Tempo and beats of a curve of events: how often it repeats, how surely, and when it strikes.

Of sound or of motion alike: it knows a curve (S,) of how much begins at each sample, and its rate;
and it says how two such curves lie to each other in time.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

SLOWEST_BPM, FASTEST_BPM = 40.0, 240.0
BLUR_S = 0.03  # players and picture frames are no more exact
MULTIPLES = 4  # of a beat that must fit: a bar
AS_GOOD = 0.85  # of the best score: what repeats each beat repeats each other beat as well
FINER = 4  # periods tried for each sample of the curve
SURE = 0.5  # confidence from which a beat is believed
TIGHTNESS = 100.0  # of beats to their period, as in librosa.beat.beat_track


@dataclass(frozen=True)
class Tempo:
    """Beats a minute, and 0..1 how well the curve repeats after one to four of them."""

    bpm: float
    confidence: float


def tempo_of(curve_S: np.ndarray, rate_hz: float) -> Tempo | None:
    """The fastest tempo of 40 to 240 bpm at which `curve_S` repeats as well as at any.

    The score of a period is the curve's correlation with itself one period later, mean over one to
    four periods as far as half the curve reaches; of all peaks within 85 % of the best, the
    shortest period is taken. Its score is the confidence: 1 for a metronome, 0 for what does not
    repeat. None where the curve is flat, is never like itself, or is too short to hold a period
    twice.
    """
    half = len(curve_S) // 2
    shortest, longest = 60 * rate_hz / FASTEST_BPM, min(60 * rate_hz / SLOWEST_BPM, half)
    if longest <= shortest or np.ptp(curve_S) == 0:
        return None
    likeness_L = _self_correlation(_blurred(curve_S, rate_hz), half)
    margin = 2 / FINER  # beside the range, so that its ends can be peaks too
    periods_Q = np.arange(shortest - margin, longest + margin, 1 / FINER)
    lags_KQ = np.arange(1, MULTIPLES + 1)[:, None] * periods_Q
    fits_KQ = lags_KQ <= max(half, periods_Q[-1])
    found_KQ = np.interp(lags_KQ, np.arange(half + 1), likeness_L)
    score_Q = (found_KQ * fits_KQ).sum(0) / fits_KQ.sum(0)
    inner_Q = score_Q[1:-1]
    is_peak_Q = (inner_Q >= score_Q[:-2]) & (inner_Q >= score_Q[2:]) & (inner_Q > 0)
    peaks = 1 + np.flatnonzero(is_peak_Q)
    if not len(peaks):
        return None
    best = peaks[score_Q[peaks] >= AS_GOOD * score_Q[peaks].max()][0]
    # the shoulder before a peak may already be as good: climb to the top
    near = peaks[(peaks >= best) & (periods_Q[peaks] <= 1.1 * periods_Q[best])]
    best = near[score_Q[near].argmax()]
    bpm = float(np.clip(60 * rate_hz / periods_Q[best], SLOWEST_BPM, FASTEST_BPM))
    return Tempo(bpm, min(1.0, float(score_Q[best])))


def beats_of(curve_S: np.ndarray, rate_hz: float, bpm: float) -> np.ndarray:
    """Times (K,) in s from the first sample of the beats: strong places about a period apart.

    Dynamic programming of Ellis 2007 ("Beat tracking by dynamic programming"). Beats before the
    first and after the last place where something begins are left out.
    """
    local_S = _blurred(curve_S, rate_hz)
    local_S = local_S / max(float(local_S.std()), 1e-12)
    period = 60 * rate_hz / bpm
    back = np.arange(round(period / 2), round(2 * period) + 1)
    cost = TIGHTNESS * np.log(back / period) ** 2
    num = len(local_S)
    total_S, before_S = local_S.copy(), np.full(num, -1)
    for now in range(int(back[0]), num):
        reach = back[: np.searchsorted(back, now, side="right")]
        gain = total_S[now - reach] - cost[: len(reach)]
        best = gain.argmax()
        if gain[best] > 0:  # else a first beat does better
            total_S[now] += gain[best]
            before_S[now] = now - reach[best]
    last = max(0, num - round(period))
    beat = last + int(total_S[last:].argmax())
    beats = []
    while beat >= 0:
        beats.append(beat)
        beat = int(before_S[beat])
    beats = np.array(beats[::-1])
    strong = np.flatnonzero(local_S[beats] > 0.5 * np.sqrt(np.mean(local_S[beats] ** 2)))
    return beats[strong[0] : strong[-1] + 1] / rate_hz if len(strong) else np.zeros(0)


MOST_LAG_S = 0.5  # further apart, a person sees two things


@dataclass(frozen=True)
class Alignment:
    """The lag at which two curves belong together most, and their correlation there, -1..1.

    Negative where one rests when the other strikes, as a swing does at its ends. `chance` is the
    size that the best lag reaches, on the mean, where one curve is turned against the other by more
    than a second: a steady beat fits almost anywhere.
    """

    lag_s: float
    correlation: float
    chance: float


def align(curve_S: np.ndarray, other_S: np.ndarray, rate_hz: float) -> Alignment | None:
    """How much later `curve_S` is than `other_S`, at most half a second either way.

    Both are in a circle, whose seam is a small part of a clip of some seconds. None where one of
    them is flat, or the clip is shorter than three seconds.
    """
    num, reach = len(curve_S), int(MOST_LAG_S * rate_hz)
    curve_S, other_S = (np.asarray(c, np.float64) - np.mean(c) for c in (curve_S, other_S))
    norm = float(np.linalg.norm(curve_S) * np.linalg.norm(other_S))
    if norm <= 1e-12 or num < 3 * rate_hz - 1:
        return None
    product = np.fft.rfft(curve_S) * np.fft.rfft(other_S).conj()
    turned_S = np.fft.irfft(product, num) / norm  # at each turn of the circle, from 0
    size_S = np.abs(turned_S)
    best = int(np.roll(size_S, reach)[: 2 * reach + 1].argmax()) - reach
    left, top, right = np.roll(size_S, 1 - best)[:3]
    bend = left - 2 * top + right
    between = float(np.clip((left - right) / bend / 2, -0.5, 0.5)) if bend < 0 else 0.0
    lag_s = float(np.clip((best + between) / rate_hz, -MOST_LAG_S, MOST_LAG_S))
    elsewhere = range(2 * reach + 1, num - 2 * reach)
    chance = [size_S[turn - reach : turn + reach + 1].max() for turn in elsewhere]
    return Alignment(lag_s, float(turned_S[best]), float(np.mean(chance)))


def _blurred(curve_S: np.ndarray, rate_hz: float) -> np.ndarray:
    curve_S = np.asarray(curve_S, np.float64)
    blurred_S = gaussian_filter1d(curve_S, BLUR_S * rate_hz, mode="constant")
    return blurred_S - blurred_S.mean()


def _self_correlation(curve_S: np.ndarray, longest: int) -> np.ndarray:
    """Correlation of the curve with itself, each lag 0..longest over what overlaps there."""
    num = len(curve_S)
    power = np.abs(np.fft.rfft(curve_S, 2 * num)) ** 2
    product_L = np.fft.irfft(power)[: longest + 1]
    energy = np.concatenate([[0.0], np.cumsum(curve_S**2)])
    lags = np.arange(longest + 1)
    norm_L = np.sqrt(energy[num - lags] * (energy[-1] - energy[lags]))
    return product_L / np.maximum(norm_L, 1e-12 * max(energy[-1], 1e-12))
