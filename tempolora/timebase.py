"""Frames, latent frames, seconds and hertz: the only place that knows the VAE's stride in time.

Wan's VAE is causal: latent frame 0 holds one pixel frame, every later one holds four. A rhythm
term leaves latent frame 0 out, so that what remains is sampled evenly.
"""

from dataclasses import dataclass

from tempolora.variants import TEMPORAL_STRIDE


@dataclass(frozen=True)
class TimeBase:
    """The clock of one clip: `num_frames` pixel frames at `fps` (Hz).

    Raises ValueError unless num_frames is temporal_stride * k + 1 with k >= 1 and fps > 0.
    """

    fps: float
    num_frames: int
    temporal_stride: int = TEMPORAL_STRIDE

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise ValueError(f"fps must be above 0, not {self.fps}")
        if self.num_frames <= self.temporal_stride or self.num_frames % self.temporal_stride != 1:
            raise ValueError(
                f"num_frames must be {self.temporal_stride}k+1 (5, 9, ... 49 ... 81), "
                f"not {self.num_frames}"
            )

    @property
    def latent_frames(self) -> int:
        """Latent frames, the first one included."""
        return 1 + (self.num_frames - 1) // self.temporal_stride

    @property
    def duration_s(self) -> float:
        """Playing time in seconds."""
        return self.num_frames / self.fps

    @property
    def nyquist_hz(self) -> float:
        """The highest frequency that pixel frames can carry."""
        return self.fps / 2

    @property
    def latent_fps(self) -> float:
        """Latent frames per second after the first."""
        return self.fps / self.temporal_stride

    @property
    def latent_nyquist_hz(self) -> float:
        """The highest frequency that latent frames can carry."""
        return self.latent_fps / 2

    @property
    def comb_hz(self) -> tuple[float, ...]:
        """Multiples of the latent rate up to Nyquist, where the decoder's own groups of four
        frames leave their pattern."""
        count = self.temporal_stride // 2
        return tuple(k * self.latent_fps for k in range(1, count + 1))

    @property
    def samples(self) -> int:
        """Evenly spaced video frames that the readout sees: all but frame 0."""
        return self.num_frames - 1

    @property
    def bins_hz(self) -> tuple[float, ...]:
        """Frequencies of the real DFT over these samples."""
        return _bins_hz(self.fps, self.samples)

    @property
    def latent_bins_hz(self) -> tuple[float, ...]:
        """Frequencies of the real DFT over the evenly sampled latent frames (all but frame 0)."""
        return _bins_hz(self.latent_fps, self.latent_frames - 1)

    def usable_bins_hz(self, signal: str) -> dict[int, float]:
        """Bin number -> Hz of what the "readout" or the "latent" signal can be asked about.

        Without 0 Hz. In the readout also without the decoder's comb and the bins beside it, into
        which a Hann window spreads it.
        """
        if signal == "latent":
            return {k: hz for k, hz in enumerate(self.latent_bins_hz) if k}
        step = self.latent_frames - 1  # bins from one tooth of the comb to the next
        teeth = [k * step for k in range(1, self.temporal_stride // 2 + 1)]
        return {
            k: hz
            for k, hz in enumerate(self.bins_hz)
            if k and min(abs(k - tooth) for tooth in teeth) > 1
        }


def _bins_hz(rate_hz: float, samples: int) -> tuple[float, ...]:
    return tuple(k * rate_hz / samples for k in range(samples // 2 + 1))
