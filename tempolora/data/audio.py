"""Sound on the video's clock: how strongly something starts at each frame.

Sits between the decoded clip and the shard; decoding the sound is `data/decode.py`'s.
"""

import numpy as np

SILENT_DBFS = -60.0  # RMS below this is room noise, not a soundtrack
HOP_S = 0.005  # onset strength is taken this often, far finer than video frames
WINDOW_S = 0.046  # of the spectrogram: librosa's usual 1024 samples at 22,050 Hz
NUM_MELS = 64


def has_sound(audio: np.ndarray) -> bool:
    """Is the RMS of float `audio` (samples,) or (samples, channels) above -60 dBFS?"""
    if audio.size == 0:
        return False
    rms = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
    return rms > 10 ** (SILENT_DBFS / 20)


def onset_envelope(audio: np.ndarray, rate: int, frame_times_s: np.ndarray) -> np.ndarray:
    """Onset strength at each video frame, float32 (F,) in [0, 1], its maximum 1; 0 when silent.

    `audio` is float (samples,) or (samples, channels) at `rate` Hz, `frame_times_s` (F,) are the
    frames' times in s from its first sample; outside the audio the envelope is 0. Each frame takes
    the strongest onset of the time nearer to it than to its neighbours, so that no beat falls
    between two frames. Onsets: spectral flux, Boeck & Widmer 2013, as in librosa.onset.
    """
    frame_times_s = np.asarray(frame_times_s, np.float64)
    mono = audio.mean(1) if audio.ndim == 2 else audio
    if not has_sound(mono):
        return np.zeros(len(frame_times_s), np.float32)
    import librosa  # here, because it takes seconds to import and few callers have sound

    hop = max(1, round(HOP_S * rate))
    window = max(256, 2 ** round(np.log2(WINDOW_S * rate)))
    strength = librosa.onset.onset_strength(
        y=np.asarray(mono, np.float32),
        sr=rate,
        hop_length=hop,
        n_fft=window,
        n_mels=NUM_MELS,
        fmax=rate / 2,
        center=True,  # value i is the onset at sample i * hop: half a window is made up for
    )
    times = np.arange(len(strength)) * hop / rate
    edges = (frame_times_s[1:] + frame_times_s[:-1]) / 2
    half = (frame_times_s[-1] - frame_times_s[0]) / max(len(frame_times_s) - 1, 1) / 2
    edges = np.concatenate([[frame_times_s[0] - half], edges, [frame_times_s[-1] + half]])
    owner = np.searchsorted(edges, times, side="right") - 1
    envelope = np.zeros(len(frame_times_s))
    inside = (owner >= 0) & (owner < len(frame_times_s))
    np.maximum.at(envelope, owner[inside], strength[inside])
    peak = envelope.max()
    return (envelope / peak if peak > 0 else envelope).astype(np.float32)
