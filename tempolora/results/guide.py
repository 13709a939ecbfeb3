"""What a sampled video shall move to, and what is heard with it.

Before sampling: a soundtrack or a frequency, and a readout of the VAE, become a guide for the
sampler. After it: the soundtrack, and clicks on the video's own beats, become its sound.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tempolora.config import Config, ConfigError
from tempolora.data.audio import onset_envelope
from tempolora.data.fit_readout import readout_of_vae
from tempolora.data.readout import read_checked
from tempolora.data.soundtrack import OPTION, RATE_HZ, read_soundtrack
from tempolora.data.toy_set import click_track
from tempolora.model.encoders import WanEncoders
from tempolora.model.memory import free_memory
from tempolora.rhythm import metrics
from tempolora.rhythm.guidance import Guide, Score, at_frequency, change_times, on_beat
from tempolora.rhythm.readout import Readout

logger = logging.getLogger(__name__)

SOUNDTRACK, FREQUENCY = 0.5, 1.0  # strengths by default


@dataclass(frozen=True)
class Rhythm:
    """What is asked for. strength and sigma are those of `Guide`; None: SOUNDTRACK or FREQUENCY.

    soundtrack: a file with sound, to follow and to be heard. beat: what shall fall on its onsets,
    "hit" (motion is fastest) or "rest" (it stands). hz: a frequency to move at. readout: its file;
    without one it is found or fitted. click: the video's own beats are heard.
    """

    soundtrack: Path | None = None
    beat: str = "hit"
    hz: float | None = None
    strength: float | None = None
    sigma: tuple[float, float] = (0.5, 0.95)
    readout: Path | None = None
    click: bool = False

    def __post_init__(self) -> None:
        if self.soundtrack is not None and self.hz is not None:
            raise ConfigError("--guide-hz: --soundtrack guides already; give one of them")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ConfigError(f"--guide-strength: {self.strength:g} is not above 0 and up to 1")
        low, high = self.sigma
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"--guide-sigma: {low:g} {high:g} is no range within 0 to 1, lowest first"
            )


def prepare(cfg: Config, rhythm: Rhythm, device: torch.device) -> dict:
    """The arguments of `sample_video` that come of it.

    Raises ConfigError for a soundtrack that cannot be read or is silent, a frequency that the clip
    cannot carry, and a readout that is missing, damaged or of another VAE.
    """
    given = {"click": rhythm.click}
    score = None
    if rhythm.soundtrack is not None:
        clock = cfg.timebase
        audio = read_soundtrack(rhythm.soundtrack, clock.duration_s, cfg.data.decode_timeout_s)
        times_s = change_times(clock.samples, clock.fps)
        envelope_G = torch.from_numpy(onset_envelope(audio, RATE_HZ, times_s))
        try:
            score = on_beat(envelope_G, rest=rhythm.beat == "rest")
        except ValueError as error:
            raise ConfigError(f"{OPTION}: {rhythm.soundtrack}: {error}") from None
        given["soundtrack"] = audio
    elif rhythm.hz is not None:
        highest = cfg.timebase.latent_fps
        if rhythm.hz > highest:
            raise ConfigError(
                f"--guide-hz: {rhythm.hz:g} cannot be asked for: above the rate of latent frames, "
                f"{highest:g} Hz, it has not been shown to work; ask for less"
            )
        try:
            score = at_frequency(cfg.timebase.samples, cfg.timebase.fps, rhythm.hz)
        except ValueError as error:
            raise ConfigError(f"--guide-hz: {rhythm.hz:g} cannot be asked for: {error}") from None
    if score is not None:
        given["guide"] = _guide(cfg, rhythm, score, device)
    return given


def _guide(cfg: Config, rhythm: Rhythm, score: Score, device: torch.device) -> Guide:
    coder = WanEncoders(cfg, device)
    if rhythm.readout is None:
        readout = readout_of_vae(cfg, coder)
    else:
        readout = _named_readout(cfg, coder, rhythm.readout)
    del coder
    free_memory(device)
    default = FREQUENCY if rhythm.soundtrack is None else SOUNDTRACK
    return Guide(readout, score, rhythm.strength or default, rhythm.sigma)


def _named_readout(cfg: Config, coder: WanEncoders, path: Path) -> Readout:
    """The readout in a file that the user names."""
    try:
        tensors, facts = read_checked(path)
        readout = Readout.from_tensors(tensors)
        readout.matrix(cfg.timebase.latent_frames)
    except FileNotFoundError:
        raise ConfigError(
            f"--readout: there is no {path}; `tempolora precompute` leaves a readout.safetensors "
            "beside the shards, and without --readout one is found or fitted"
        ) from None
    except ValueError as error:
        raise ConfigError(f"--readout: {path}: {error}") from None
    if facts.get("vae") != coder.fingerprints()["vae"]:
        raise ConfigError(f"--readout: {path} is of another VAE than that of model.id")
    return readout


def heard(
    frames_FHW3: np.ndarray, fps: float, soundtrack: np.ndarray | None, click: bool
) -> np.ndarray | None:
    """The video's sound, float32 (samples, 2) at RATE_HZ, no longer than the video; None for none.

    soundtrack: (samples, 2), kept as it is where it is shorter. click: a click on each of
    `metrics.motion_beats`, over the soundtrack at half its loudness where there are both.
    """
    duration_s = len(frames_FHW3) / fps
    sound = None if soundtrack is None else soundtrack[: round(duration_s * RATE_HZ)]
    if not click:
        return sound
    beats_s = own_beats(frames_FHW3, fps)
    clicks = np.repeat(click_track(beats_s, duration_s, RATE_HZ)[:, None], 2, axis=1)
    if sound is not None:
        clicks[: len(sound)] += sound / 2
    return clicks.clip(-1, 1)


def own_beats(frames_FHW3: np.ndarray, fps: float) -> np.ndarray:
    """Times in s at which the motion of uint8 frames comes to rest; says them and their tempo."""
    video_1F3HW = torch.from_numpy(frames_FHW3)[None].movedim(-1, 2) / 255
    luma_1FHW = metrics.luminance(video_1F3HW)
    beats_s = metrics.motion_beats(metrics.motion_curve(luma_1FHW)[0].double().numpy(), fps)
    hz_1, share_1 = metrics.dominant_hz(luma_1FHW.flatten(2).double(), fps)
    if hz_1.isnan().any():
        logger.info("clicks: nothing moves, so there is no beat")
    else:
        logger.info(
            "clicks: %d beats at %s s; motion at %.2f Hz, which is %.0f turns a minute, "
            "confidence %.2f (share of the change in time that one frequency explains)",
            len(beats_s),
            " ".join(f"{time:.2f}" for time in beats_s) or "no",
            hz_1.item(),
            60 * hz_1.item(),
            share_1.item(),
        )
    return beats_s
