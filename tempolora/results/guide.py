"""What a sampled video shall move to, and what is heard with it.

Before sampling: a soundtrack or a frequency, and a readout of the VAE, become a guide for the
sampler. For another speed the video is sampled twice: as it is, to measure its frequency, and then
guided to that times the speed. After it: the soundtrack, and clicks on the video's own beats,
become its sound.
"""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tempolora.config import Config, ConfigError
from tempolora.data.audio import onset_envelope
from tempolora.data.fit_readout import readout_of_vae
from tempolora.data.readout import read_checked
from tempolora.data.soundtrack import OPTION, RATE_HZ, read_soundtrack
from tempolora.data.toy_set import click_track
from tempolora.model.encoders import WanEncoders
from tempolora.model.memory import free_memory
from tempolora.rhythm import metrics
from tempolora.rhythm.guidance import Guide, Score, at_frequency, change_times, each, on_beat
from tempolora.rhythm.readout import Readout
from tempolora.timebase import TimeBase

logger = logging.getLogger(__name__)

SOUNDTRACK, FREQUENCY, SPEED = 0.5, 1.0, 0.5  # strengths by default
SIGMA = (0.5, 0.95)
OFF_OCTAVES = 0.25  # from the asked frequency: another one


@dataclass(frozen=True)
class Rhythm:
    """What is asked for. strength and sigma are those of `Guide`; strength None: the default.

    soundtrack: a file with sound, to follow and to be heard. beat: what shall fall on its onsets,
    "hit" (motion is fastest) or "rest" (it stands). hz: a frequency to move at. speed: a factor on
    the video's own frequency. readout: its file; without one it is found or fitted. click: the
    video's own beats are heard.
    """

    soundtrack: Path | None = None
    beat: str = "hit"
    hz: float | None = None
    speed: float | None = None
    strength: float | None = None
    sigma: tuple[float, float] = SIGMA
    readout: Path | None = None
    click: bool = False

    def __post_init__(self) -> None:
        asked = {"--soundtrack": self.soundtrack, "--guide-hz": self.hz, "--tempo": self.speed}
        first, *more = [flag for flag, value in asked.items() if value is not None] or [None]
        if more:
            raise ConfigError(f"{more[0]}: {first} guides already; give one of them")
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
    clock = cfg.timebase
    if rhythm.soundtrack is not None:
        audio = read_soundtrack(rhythm.soundtrack, clock.duration_s, cfg.data.decode_timeout_s)
        times_s = change_times(clock.samples, clock.fps)
        envelope_G = torch.from_numpy(onset_envelope(audio, RATE_HZ, times_s))
        try:
            score = on_beat(envelope_G, rest=rhythm.beat == "rest")
        except ValueError as error:
            raise ConfigError(f"{OPTION}: {rhythm.soundtrack}: {error}") from None
        given["soundtrack"] = audio
        given["guide"] = _guide(cfg, rhythm, score, device)
    elif rhythm.hz is not None:
        given["guide"] = _guide(cfg, rhythm, _at(clock, rhythm.hz), device)
    elif rhythm.speed is not None:
        given["retime"] = Retime(clock, _readout(cfg, rhythm, device), rhythm, _given_frames(cfg))
    return given


def _at(clock: TimeBase, hz: float) -> Score:
    if hz > highest_hz(clock):
        raise ConfigError(
            f"--guide-hz: {hz:g} cannot be asked for: above {highest_hz(clock):g} Hz, for clips of "
            f"{clock.fps:g} fps, it has not been shown to work; ask for less"
        )
    try:
        return at_frequency(clock.samples, clock.fps, hz)
    except ValueError as error:
        raise ConfigError(f"--guide-hz: {hz:g} cannot be asked for: {error}") from None


def highest_hz(clock: TimeBase) -> float:
    """The highest frequency that guidance has been shown to meet: 6 Hz at 16 fps."""
    return 1.5 * clock.latent_fps


def speed_guide(
    clock: TimeBase,
    readout: Readout,
    own_hz_N: Tensor,
    speed: float,
    strength: float = SPEED,
    sigma: tuple[float, float] = SIGMA,
) -> Guide:
    """Guide for N videos, each to its own frequency in Hz times the speed.

    Kept to what a clip can carry and guidance can meet; a video that does not move (NaN) is guided
    to the speed itself in Hz. At a lower speed it moves as much as without (`Guide.hold`): a push
    to slow changes is large in latents, where they lie between latent frames.
    """
    slowest = 1.01 * clock.fps / clock.samples
    hz_N = (own_hz_N.nan_to_num(1.0) * speed).clamp(slowest, highest_hz(clock))
    score = each([at_frequency(clock.samples, clock.fps, hz) for hz in hz_N.tolist()])
    return Guide(readout, score, strength, sigma, hold=speed < 1)


@dataclass
class Retime:
    """Another speed for one video: seen as it is, it gives the guide to sample it again with.

    given: as of `Guide`.
    """

    clock: TimeBase
    readout: Readout
    rhythm: Rhythm
    given: int = 0

    def guide(self, frames_FHW3: np.ndarray) -> Guide | None:
        """For a finished video's uint8 frames; None where there is nothing to change."""
        hz_1, share_1 = _own_hz(frames_FHW3, self.clock.fps)
        if hz_1.isnan().any():
            logger.info("tempo: nothing moves, so there is nothing to make faster or slower")
            return None
        rhythm, most = self.rhythm, highest_hz(self.clock)
        self._asked_hz = min(hz_1.item() * rhythm.speed, most)
        logger.info(
            "tempo: by itself it moves at %.2f Hz (confidence %.2f); sampled again at %.2f Hz%s",
            hz_1.item(),
            share_1.item(),
            self._asked_hz,
            "" if self._asked_hz < most else ", the most that can be asked for",
        )
        given = rhythm.strength or SPEED, rhythm.sigma
        guide = speed_guide(self.clock, self.readout, hz_1, rhythm.speed, *given)
        return replace(guide, given=self.given)

    def check(self, frames_FHW3: np.ndarray) -> None:
        """Say what came out; a warning where it is not what was asked for."""
        hz = _own_hz(frames_FHW3, self.clock.fps)[0].item()
        if math.isfinite(hz) and abs(math.log2(hz / self._asked_hz)) < OFF_OCTAVES:
            logger.info("tempo: it moves at %.2f Hz now", hz)
        else:
            logger.warning(
                "tempo: it moves at %.2f Hz and not at %.2f: the video keeps to its own; "
                "--guide-hz %.2f in place of --tempo pushes harder",
                hz,
                self._asked_hz,
                self._asked_hz,
            )


def _guide(cfg: Config, rhythm: Rhythm, score: Score, device: torch.device) -> Guide:
    default = FREQUENCY if rhythm.soundtrack is None else SOUNDTRACK
    readout = _readout(cfg, rhythm, device)
    return Guide(readout, score, rhythm.strength or default, rhythm.sigma, _given_frames(cfg))


def _given_frames(cfg: Config) -> int:
    """First latent frames that the 5B's image to video is given clean."""
    return int(cfg.task == "i2v" and cfg.variant.per_token_time)


def _readout(cfg: Config, rhythm: Rhythm, device: torch.device) -> Readout:
    coder = WanEncoders(cfg, device)
    if rhythm.readout is None:
        readout = readout_of_vae(cfg, coder)
    else:
        readout = _named_readout(cfg, coder, rhythm.readout)
    del coder
    free_memory(device)
    return readout


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
    curve_1G = metrics.motion_curve(_luma(frames_FHW3))
    beats_s = metrics.motion_beats(curve_1G[0].double().numpy(), fps)
    hz_1, share_1 = _own_hz(frames_FHW3, fps)
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


def _own_hz(frames_FHW3: np.ndarray, fps: float) -> tuple[Tensor, Tensor]:
    """`metrics.dominant_hz` of one video: Hz (1,), share (1,)."""
    return metrics.dominant_hz(_luma(frames_FHW3).flatten(2).double(), fps)


def _luma(frames_FHW3: np.ndarray) -> Tensor:
    video_1F3HW = torch.from_numpy(frames_FHW3)[None].movedim(-1, 2) / 255
    return metrics.luminance(video_1F3HW)
