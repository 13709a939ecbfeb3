"""Which rhythm terms an expert trains with: weights, probes, and what the log says of them."""

from torch import Tensor

from tempolora.config import Config, ConfigError
from tempolora.rhythm.probes import spectral_bins, spectral_probe, tv_probe
from tempolora.rhythm.readout import Readout

KEYS = {"spectral": "spec", "tv": "tv", "sound": "sound"}  # term -> rhythm.<key>_weight


def term_weights(cfg: Config, expert: str) -> dict[str, float]:
    """Weight of each term that is on."""
    weights = {name: cfg.rhythm.weight(key, expert) for name, key in KEYS.items()}
    return {name: weight for name, weight in weights.items() if weight}


def build_probes(cfg: Config, expert: str, readout: Readout | None) -> dict[str, Tensor]:
    """The probes that do not follow the clip: spectral where it is on, and tv.

    tv is there even where it has no weight, to watch motion by; only clips too short for a
    difference have none. Raises ConfigError where the readout leaves no frequency to look at.
    """
    timebase, channels = cfg.timebase, cfg.variant.latent_channels
    probes = {}
    if "spectral" in term_weights(cfg, expert):
        try:
            probes["spectral"] = spectral_probe(
                timebase, readout, **_choice(cfg), channels=channels
            )
        except ValueError as error:
            raise ConfigError(
                f"rhythm.spec_weight: {error}; change band or cutoff, or set this weight to 0"
            ) from None
    if readout or timebase.latent_frames > 2:
        probes["tv"] = tv_probe(timebase, readout, channels=channels)
    return probes


def describe_terms(cfg: Config, expert: str, readout: Readout | None) -> str:
    """One line for the log: the terms, and the frequencies that the spectral one looks at."""
    weights = term_weights(cfg, expert)
    text = ", ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "none"
    if "spectral" in weights:
        bins = spectral_bins(cfg.timebase, readout, **_choice(cfg))
        text += f"; in the band {_span(bins.band)}, above the cutoff {_span(bins.jitter)}"
    if readout:
        comb = " and ".join(f"{hz:g}" for hz in cfg.timebase.comb_hz)
        text += f"; the decoder's comb at {comb} Hz is left out"
    return text


def _choice(cfg: Config) -> dict:
    rhythm = cfg.rhythm
    absolute = rhythm.spec_form == "absolute"  # power in the band is no fault of a clip
    return {
        "cutoff_hz": rhythm.spec_cutoff_hz,
        "band_hz": rhythm.band_hz,
        "band_gain": 0.0 if absolute else rhythm.band_gain,
        "jitter_gain": rhythm.jitter_gain,
    }


def _span(chosen: dict[int, float]) -> str:
    hz = list(chosen.values())
    return f"{len(hz)} frequencies from {hz[0]:.2f} to {hz[-1]:.2f} Hz" if hz else "nothing"
