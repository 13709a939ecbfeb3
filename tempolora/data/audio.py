"""Sound on the video's clock: how strongly something starts at each frame, and its beats.

Sits between the decoded clip and the shard; decoding the sound is `data/decode.py`'s, tempo and
beats are found by `rhythm/beat.py`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tempolora.rhythm.beat import SURE, Tempo, beats_of, tempo_of

SILENT_DBFS = -60.0  # RMS below this is room noise, not a soundtrack
HOP_S = 0.005  # onset strength is taken this often, far finer than video frames
WINDOW_S = 0.046  # of the spectrogram: librosa's usual 1024 samples at 22,050 Hz
NUM_MELS = 64
PIECE_S = 60.0  # analysed at once, so that memory does not grow with the sound
CONTEXT_S = 0.25  # read before and behind each piece, so that it has no edges
LEAST_ONSET_DB = 3.0  # hiss rises by 0.4 dB above its median now and then, a click by 18 or more


def has_sound(audio: np.ndarray) -> bool:
    """Is the RMS of float `audio` (samples,) or (samples, channels) above -60 dBFS?"""
    if audio.size == 0:
        return False
    rms = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
    return rms > 10 ** (SILENT_DBFS / 20)


def onset_envelope(audio: np.ndarray, rate: int, frame_times_s: np.ndarray) -> np.ndarray:
    """Onset strength at each video frame, float32 (F,) in [0, 1]; 0 when silent.

    `audio` is float (samples,) or (samples, channels) at `rate` Hz, `frame_times_s` (F,) are the
    frames' times in s from its first sample; outside the audio the envelope is 0. 1 is the audio's
    strongest onset. More: `Track.envelope`.
    """
    if not has_sound(audio):
        return np.zeros(len(frame_times_s), np.float32)
    return Track(audio, rate).envelope(frame_times_s)


@dataclass(frozen=True)
class WindowSound:
    """The sound of one window of a clip, on the window's own clock.

    `onset_F` in 0..1; `beats_s` (K,) in s from the first frame; `tempo` that of the whole clip, as
    fast as the window shows it; None where nothing can be said.
    """

    onset_F: np.ndarray
    beats_s: np.ndarray
    tempo: Tempo | None


@dataclass(frozen=True)
class Track:
    """A sound track: float `audio` (samples,) or (samples, channels) at `rate` Hz.

    `start_s`: when its first sample sounds, from the clip's first frame.
    """

    audio: np.ndarray
    rate: int
    start_s: float = 0.0

    @property
    def rate_hz(self) -> float:
        """Of `strength_S`: about 200 a second, and exactly this."""
        return self.rate / self._hop

    @property
    def _hop(self) -> int:
        return max(1, round(HOP_S * self.rate))

    @cached_property
    def strength_S(self) -> np.ndarray:
        """How much begins at start_s + k / rate_hz: rise of level in dB over all mel bands.

        Less the track's median, so that what goes on evenly is 0. Spectral flux, Boeck & Widmer
        2013, as in librosa.onset; value k is the onset at sample k * hop. A sound that sets in
        while pictures run is an onset, one that is there with the first of them is not.
        """
        mono = self.audio.mean(1) if self.audio.ndim == 2 else self.audio
        mono = np.asarray(mono, np.float32)
        context, piece = (round(s * self.rate_hz) for s in (CONTEXT_S, PIECE_S))
        num = 1 + len(mono) // self._hop
        lead = context if self.start_s > 0 else 0
        mono = np.pad(mono, (lead * self._hop, 0))
        pieces = []
        for first in range(lead, lead + num, piece):
            before = min(first, context)
            start, end = first - before, min(first + piece, lead + num)
            part = mono[start * self._hop : (end + context) * self._hop]
            pieces.append(self._flux(part)[before : before + end - first])
        strength_S = np.concatenate(pieces)
        return np.maximum(strength_S - np.median(strength_S), 0)

    def _flux(self, mono: np.ndarray) -> np.ndarray:
        import librosa  # here, because it takes seconds to import and few callers have sound

        window = max(256, 2 ** round(np.log2(WINDOW_S * self.rate)))
        return librosa.onset.onset_strength(
            y=np.pad(mono, (0, window)),  # at least a window, and a value at the last sample
            sr=self.rate,
            hop_length=self._hop,
            n_fft=window,
            n_mels=NUM_MELS,
            fmax=self.rate / 2,
            center=True,  # half a window is made up for
            pad_mode="reflect",  # noughts would make a beginning of every cut
        )

    @cached_property
    def tempo(self) -> Tempo | None:
        """Of the whole track; None for silence and for less than two beats."""
        return tempo_of(self.strength_S, self.rate_hz)

    @cached_property
    def beats_s(self) -> np.ndarray:
        """Beats (K,) in s from the clip's first frame; none where the tempo is not sure."""
        if self.tempo is None or self.tempo.confidence < SURE:
            return np.zeros(0)
        return self.start_s + beats_of(self.strength_S, self.rate_hz, self.tempo.bpm)

    def envelope(self, times_s: np.ndarray) -> np.ndarray:
        """Onsets at frames that are shown at `times_s` (F,) from the clip's first: float32 (F,).

        Each frame takes the strongest onset of the time nearer to it than to its neighbours, so
        that no beat falls between two frames. 1 is the strongest onset of the track, or 3 dB where
        none is that strong: hiss is no rhythm. 0 where there is no sound.
        """
        times_s = np.asarray(times_s, np.float64)
        at_s = self.start_s + np.arange(len(self.strength_S)) / self.rate_hz
        middles_s = (times_s[1:] + times_s[:-1]) / 2
        half_s = (times_s[-1] - times_s[0]) / max(len(times_s) - 1, 1) / 2
        edges_s = np.concatenate([[times_s[0] - half_s], middles_s, [times_s[-1] + half_s]])
        owner = np.searchsorted(edges_s, at_s, side="right") - 1
        inside = (owner >= 0) & (owner < len(times_s))
        envelope_F = np.zeros(len(times_s))
        np.maximum.at(envelope_F, owner[inside], self.strength_S[inside])
        peak = max(float(self.strength_S.max(initial=0)), LEAST_ONSET_DB)
        return (envelope_F / peak).astype(np.float32)

    def is_heard(self, times_s: np.ndarray) -> bool:
        """Whether there is sound above -60 dBFS while frames are shown at `times_s`."""
        first, last = ((t - self.start_s) * self.rate for t in (times_s[0], times_s[-1]))
        return has_sound(self.audio[max(0, round(first)) : max(0, round(last))])

    def window(self, times_s: np.ndarray, fps: float) -> WindowSound:
        """What is heard in a window of F frames: of the clip's `times_s`, shown at `fps` Hz.

        A window that shows the clip faster than it was has its beats and tempo faster, too.
        """
        times_s = np.asarray(times_s, np.float64)
        shown_s = np.arange(len(times_s)) / fps
        inside = (self.beats_s >= times_s[0]) & (self.beats_s <= times_s[-1])
        tempo = self.tempo
        if tempo is not None and len(times_s) > 1:
            speed = float((times_s[-1] - times_s[0]) / shown_s[-1])
            tempo = Tempo(tempo.bpm * speed, tempo.confidence)
        beats_s = np.interp(self.beats_s[inside], times_s, shown_s)
        return WindowSound(self.envelope(times_s), beats_s.astype(np.float32), tempo)
