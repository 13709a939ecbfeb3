"""The readout: luminance at the full frame rate as a linear map of the latents.

Wan's decoder makes four pixel frames of each latent frame after the first and looks at past latent
frames only. The luminance of a latent pixel's block in those four frames is read as

    y[4 (t - 1) + k] = sum_{j=0..2} A[k, j] . z[t - j] + b[k],    k = 1..4,  t = 1..T-1

where pixel frame 0 is left out. The decoder treats its first groups specially, so t = 1, which has
only two lags, and t = 2 have an A and b of their own; all later t share one. The map is fitted by
ridge regression in closed form, in double precision, and judged on clips the fit has not seen.

Shapes: B batch, C channel, T latent frame, S = 4 (T - 1) samples in time, H, W latent height and
width, G group (t = 1, t = 2, t >= 3), K frame in the group, J lag, N column of one latent pixel,
I regressor (J x C, then a constant), R ridge, F frequency.
"""

from dataclasses import dataclass, fields

import torch
from einops import rearrange
from torch import Tensor

from tempolora.rhythm.tempo import spectrum
from tempolora.timebase import TimeBase
from tempolora.variants import TEMPORAL_STRIDE

GROUPS, PHASES, LAGS = 3, TEMPORAL_STRIDE, 3
FOLDS = 4  # each clip is judged by a fit on the other three quarters
COLUMNS = 256  # latent pixels of a clip that are kept whole, for the coherence
RIDGES = tuple(10.0**exponent for exponent in range(-10, 1))
"""Strengths tried, in units of the latents' variance, which is about one per channel."""


@dataclass(frozen=True)
class Readout:
    """A fitted readout. r2_GK and g2_F are of clips that the fit had not seen.

    num_frames: pixel frames F of the clips it was fitted on. g2_F: coherence with the VAE's own
    reconstruction at k fps / S Hz, S = F - 1. Groups that those clips do not have are zero.
    """

    weight_GKJC: Tensor
    bias_GK: Tensor
    r2_GK: Tensor
    g2_F: Tensor
    num_frames: int

    def __post_init__(self) -> None:
        *found, channels = self.weight_GKJC.shape
        shapes = {
            "weight": (found, [GROUPS, PHASES, LAGS]),
            "bias": (list(self.bias_GK.shape), [GROUPS, PHASES]),
            "r2": (list(self.r2_GK.shape), [GROUPS, PHASES]),
            "g2": (list(self.g2_F.shape), [(self.num_frames - 1) // 2 + 1]),
        }
        for name, (has, wanted) in shapes.items():
            if has != wanted:
                raise ValueError(f"{name} of a readout of {channels} channels: {has}, not {wanted}")

    def matrix(self, latent_frames: int) -> Tensor:
        """R without its bias, (S, C, T) float64. Raises ValueError for groups it has no fit of."""
        matrix_SCT = torch.zeros(
            PHASES * (latent_frames - 1),
            self.weight_GKJC.shape[-1],
            latent_frames,
            dtype=torch.float64,
        )
        for t, group in enumerate(self._groups(latent_frames), start=1):
            for lag in range(min(t + 1, LAGS)):
                matrix_SCT[PHASES * (t - 1) : PHASES * t, :, t - lag] = self.weight_GKJC[
                    group, :, lag
                ]
        return matrix_SCT

    def bias(self, latent_frames: int) -> Tensor:
        """What is added to each sample, (S,) float64."""
        return self.bias_GK[self._groups(latent_frames)].flatten()

    def luminance(self, latents_BCTHW: Tensor) -> Tensor:
        """Luminance of pixel frames 1.. in 0..1 as read from normalised latents.

        (B, C, T, H, W) -> (B, S, H, W), float64 of float64, else float32. Differentiable. Raises
        ValueError as `matrix`.
        """
        frames, device = latents_BCTHW.shape[2], latents_BCTHW.device
        dtype = torch.promote_types(latents_BCTHW.dtype, torch.float32)
        matrix_SCT = self.matrix(frames).to(device, dtype)
        bias_S = self.bias(frames).to(device, dtype)
        with torch.autocast(device.type, enabled=False):
            read_BSHW = torch.einsum("sct,bcthw->bshw", matrix_SCT, latents_BCTHW.to(dtype))
            return read_BSHW + bias_S[:, None, None]

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, for a file."""
        return {
            "weight": self.weight_GKJC,
            "bias": self.bias_GK,
            "r2": self.r2_GK,
            "g2": self.g2_F,
            "num_frames": torch.tensor(self.num_frames),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Readout":
        """The inverse of `tensors`. Raises ValueError where these are no readout's."""
        names = ("weight", "bias", "r2", "g2", "num_frames")
        if missing := [name for name in names if name not in tensors]:
            raise ValueError(f"a readout lacks {', '.join(missing)}")
        return cls(*(tensors[name] for name in names[:4]), int(tensors["num_frames"]))

    def _groups(self, latent_frames: int) -> list[int]:
        """The group of each latent frame but the first."""
        groups = [group_of(t) for t in range(1, latent_frames)]
        if groups and max(groups) > group_of((self.num_frames - 1) // PHASES):
            raise ValueError(
                f"the readout was fitted on {self.num_frames} frames and cannot read "
                f"{PHASES * (latent_frames - 1) + 1}"
            )
        return groups


def group_of(t: int) -> int:
    """The group that shares a map with latent frame t >= 1."""
    return min(t, GROUPS) - 1


@dataclass
class NormalEquations:
    """The sums that ridge regression needs, float64: X^T X, X^T y and y^T y of each group."""

    xtx_GII: Tensor
    xty_GIK: Tensor
    yty_GK: Tensor

    @classmethod
    def empty(cls, channels: int) -> "NormalEquations":
        """Sums over nothing."""
        size = LAGS * channels + 1
        shapes = ((GROUPS, size, size), (GROUPS, size, PHASES), (GROUPS, PHASES))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, latents_CTHW: Tensor, luma_SHW: Tensor) -> None:
        """Count every latent pixel of a clip. Raises FloatingPointError for what is not finite."""
        if not (latents_CTHW.isfinite().all() and luma_SHW.isfinite().all()):
            raise FloatingPointError("latents or luminance of a clip are not finite")
        x_TNI = _regressors(latents_CTHW)
        y_TNK = rearrange(luma_SHW.double(), "(T K) H W -> T (H W) K", K=PHASES)
        for group, frames in enumerate((slice(0, 1), slice(1, 2), slice(2, None))):
            x_NI, y_NK = x_TNI[frames].flatten(0, 1), y_TNK[frames].flatten(0, 1)
            self.xtx_GII[group] += x_NI.T @ x_NI
            self.xty_GIK[group] += x_NI.T @ y_NK
            self.yty_GK[group] += y_NK.square().sum(dim=0)

    def merge(self, other: "NormalEquations") -> None:
        """Count what the other has counted."""
        for field in fields(self):
            getattr(self, field.name).add_(getattr(other, field.name))


def _regressors(latents_CTHW: Tensor) -> Tensor:
    """What the map of each latent frame but the first is applied to, (T - 1, N, I) float64."""
    z_TNC = rearrange(latents_CTHW.double(), "C T H W -> T (H W) C")
    now, last = z_TNC[1:], z_TNC[:-1]
    before_last = torch.cat([torch.zeros_like(z_TNC[:1]), z_TNC[:-2]])  # t = 1 has none
    return torch.cat([now, last, before_last, torch.ones_like(now[..., :1])], dim=-1)


@dataclass(frozen=True)
class Part:
    """What the fit needs of one clip: its sums, and some latent pixels over the whole time."""

    sums: NormalEquations
    latents_NCT: Tensor
    luma_NS: Tensor

    @classmethod
    def of(cls, latents_CTHW: Tensor, luma_SHW: Tensor, seed: int) -> "Part":
        """Sums over all latent pixels; at most COLUMNS of these, chosen by `seed`, are kept."""
        sums = NormalEquations.empty(len(latents_CTHW))
        sums.add(latents_CTHW, luma_SHW)
        pixels = latents_CTHW.shape[2] * latents_CTHW.shape[3]
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(pixels, generator=generator)[:COLUMNS]
        latents_NCT = rearrange(latents_CTHW, "C T H W -> (H W) C T")[chosen].float()
        return cls(sums, latents_NCT, rearrange(luma_SHW, "S H W -> (H W) S")[chosen].float())

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, for a file."""
        return {**vars(self.sums), "latents": self.latents_NCT, "luma": self.luma_NS}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Part":
        """The inverse of `tensors`. Raises KeyError where it is none."""
        sums = NormalEquations(*(tensors[field.name] for field in fields(NormalEquations)))
        return cls(sums, tensors["latents"], tensors["luma"])


def fit(parts: list[Part]) -> tuple[Readout, tuple[float, ...]]:
    """The readout of these clips, at least two of equal length, and the ridge of each group.

    Cross-validation over FOLDS sets of clips: each is predicted by a fit on the others. The ridge
    of a group is the one with the least squared error there, and r2_GK and g2_F are of those same
    predictions. The final map is fitted on all clips. r2 is 1 - SSE / SST, SST about the mean over
    all clips; g2 is of what differs from the mean over all columns.
    """
    if len(parts) < 2:
        raise ValueError("a readout takes at least two clips: one to fit on, another to judge by")
    folds = [parts[first::FOLDS] for first in range(min(FOLDS, len(parts)))]
    held_out = [_total(fold) for fold in folds]
    others = [_total([p for f in folds if f is not fold for p in f]) for fold in folds]
    every = _total(parts)
    num_frames = parts[0].luma_NS.shape[1] + 1
    groups = range(group_of((num_frames - 1) // PHASES) + 1)

    # Without a fitted group its rows stay zero.
    final_GIK = torch.zeros_like(every.xty_GIK)
    fold_GIK = [torch.zeros_like(final_GIK) for _ in folds]
    r2_GK = torch.zeros_like(every.yty_GK)
    ridges = []
    for group in groups:
        tried = [_solve(sums, group) for sums in others]
        error_RK = sum(
            _squared_error(held, group, maps_RIK)
            for held, maps_RIK in zip(held_out, tried, strict=True)
        )
        best = int(error_RK.sum(dim=1).argmin())
        ridges.append(RIDGES[best])
        r2_GK[group] = _explained(error_RK[best], every, group)
        final_GIK[group] = _solve(every, group)[best]
        for map_GIK, maps_RIK in zip(fold_GIK, tried, strict=True):
            map_GIK[group] = maps_RIK[best]

    predicted_NS = torch.cat(
        [
            _predict(map_GIK, part.latents_NCT)
            for map_GIK, fold in zip(fold_GIK, folds, strict=True)
            for part in fold
        ]
    )
    true_NS = torch.cat([part.luma_NS for fold in folds for part in fold]).double()
    weight_GKJC = rearrange(final_GIK[:, :-1], "G (J C) K -> G K J C", J=LAGS).contiguous()
    bias_GK = final_GIK[:, -1].contiguous()
    # what all columns share is the decoder's own pattern and the bias alone foretells it
    g2_F = coherence(true_NS - true_NS.mean(dim=0), predicted_NS - predicted_NS.mean(dim=0))
    return Readout(weight_GKJC, bias_GK, r2_GK, g2_F, num_frames), tuple(ridges)


def coherence(y_NS: Tensor, y_hat_NS: Tensor) -> Tensor:
    """|sum Y conj(Y_hat)|^2 / (sum |Y|^2 sum |Y_hat|^2) at each frequency, over N columns.

    (S // 2 + 1,) float64 in 0..1; detrended, Hann window. 0 where one of the two has no power.
    The magnitude-squared coherence of Carter, Proc. IEEE 75 (1987), with columns as segments.
    """
    y_NF, y_hat_NF = spectrum(y_NS.double()), spectrum(y_hat_NS.double())
    cross_F = (y_NF * y_hat_NF.conj()).sum(dim=0).abs().square()
    power_F, power_hat_F = y_NF.abs().square().sum(dim=0), y_hat_NF.abs().square().sum(dim=0)
    # below this is the rounding of a constant
    floor = 1e-20 * y_NS.double().square().sum()
    seen_F = (power_F > floor) & (power_hat_F > floor)
    return torch.where(seen_F, cross_F / (power_F * power_hat_F), 0.0).clamp(max=1)


def _total(parts: list[Part]) -> NormalEquations:
    total = NormalEquations.empty(parts[0].latents_NCT.shape[1])
    for part in parts:
        total.merge(part.sums)
    return total


def _solve(sums: NormalEquations, group: int) -> Tensor:
    """Weights and bias of one group at every ridge, (R, I, K); the bias is not shrunk."""
    xtx_II, xty_IK = sums.xtx_GII[group], sums.xty_GIK[group]
    channels = (len(xtx_II) - 1) // LAGS
    used = slice(0, min(group + 2, LAGS) * channels)
    count = xtx_II[-1, -1]
    mean_I, mean_K = xtx_II[-1, used] / count, xty_IK[-1] / count
    covariance_II = xtx_II[used, used] / count - torch.outer(mean_I, mean_I)
    cross_IK = xty_IK[used] / count - torch.outer(mean_I, mean_K)
    variance_I, axes_II = torch.linalg.eigh(covariance_II)
    shrunk_RI = 1 / (variance_I.clamp(min=0) + torch.tensor(RIDGES).double()[:, None])
    weight_RIK = axes_II @ (shrunk_RI[..., None] * (axes_II.T @ cross_IK))
    solution_RIK = xtx_II.new_zeros(len(RIDGES), *xty_IK.shape)
    solution_RIK[:, used] = weight_RIK
    solution_RIK[:, -1] = mean_K - torch.einsum("i,rik->rk", mean_I, weight_RIK)
    return solution_RIK


def _squared_error(sums: NormalEquations, group: int, map_RIK: Tensor) -> Tensor:
    """Squared error summed over the counted pixels, (R, K)."""
    xtx_II, xty_IK = sums.xtx_GII[group], sums.xty_GIK[group]
    explained_RK = ((2 * xty_IK - xtx_II @ map_RIK) * map_RIK).sum(dim=1)
    return (sums.yty_GK[group] - explained_RK).clamp(min=0)


def _explained(error_K: Tensor, sums: NormalEquations, group: int) -> Tensor:
    """1 - SSE / SST for each frame in the group; 0 where the luminance does not vary at all."""
    count, sum_K = sums.xtx_GII[group, -1, -1], sums.xty_GIK[group, -1]
    power_K = sums.yty_GK[group]
    variation_K = power_K - sum_K.square() / count
    varies = variation_K > 1e-12 * power_K
    return torch.where(varies, 1 - error_K / variation_K, 0.0)


def _predict(map_GIK: Tensor, latents_NCT: Tensor) -> Tensor:
    """Luminance of single latent pixels by a map, (N, S) float64."""
    x_TNI = _regressors(rearrange(latents_NCT, "N C T -> C T N 1"))
    groups = [group_of(t) for t in range(1, len(x_TNI) + 1)]
    return rearrange(x_TNI @ map_GIK[groups], "T N K -> N (T K)")


def draw(readout: Readout, timebase: TimeBase):
    """A matplotlib Figure: coherence over frequency with the decoder's comb, R^2 of each frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.plot(timebase.bins_hz[1:], readout.g2_F[1:], marker="o", markersize=3)
    left.axhline(0.5, color="0.4", linestyle="--", linewidth=1, label="least that is used")
    for number, hz in enumerate(timebase.comb_hz):
        label = "decoder's comb" if number == 0 else None
        left.axvline(hz, color="0.7", linestyle=":", linewidth=1, label=label)
    left.set(
        xlabel="frequency, Hz",
        ylabel="coherence with the reconstruction",
        xlim=(0, timebase.nyquist_hz * 1.02),
        ylim=(0, 1.03),
    )
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "frameon": False, "ncols": 3}
    left.legend(**above)
    names = ("latent frame 1", "2", "3 and later")[: group_of(timebase.latent_frames - 1) + 1]
    for group, name in enumerate(names):
        offset = 0.27 * (group - (len(names) - 1) / 2)
        positions = [k + offset for k in range(1, PHASES + 1)]
        right.bar(positions, readout.r2_GK[group].clamp(min=0), width=0.25, label=name)
    right.set(xlabel="frame in the group of four", ylabel="R² on held-out clips", ylim=(0, 1.03))
    right.set_xticks(range(1, PHASES + 1))
    right.legend(**above)
    return figure
