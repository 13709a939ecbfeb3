"""Flow and probe energies of latents that are split over processes.

Each process holds a slice; what comes back is the value of the whole, the same on every process,
and its gradient in the slice is the slice of the whole gradient. Split over height or width a probe
needs no communication but that of the scalars. Split over time the partial outputs of the probe
(K e is linear) are summed before they are squared.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tempolora.rhythm.kernels import flow_and_probe


class _Sum(torch.autograd.Function):
    """The sum over processes, each of which goes on to compute the same loss from it.

    The gradient therefore passes through unchanged: adding up the copies would count it once for
    every process.
    """

    @staticmethod
    def forward(ctx, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)  # which NCCL asks for
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def mean_of_slices(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean over pixels of the whole, from that over each of equal slices of height or width."""
    return _Sum.apply(value, group) / dist.get_world_size(group)


def spatial_flow_and_probe(
    v_hat_BCTHW: Tensor,
    v_BCTHW: Tensor,
    probe: Tensor,
    weight: Tensor,
    first_frame: int = 0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`flow_and_probe` of the whole, from slices of height or width; slices may differ in size."""
    pixels = torch.tensor(
        v_hat_BCTHW.shape[3] * v_hat_BCTHW.shape[4], device=v_hat_BCTHW.device, dtype=torch.float64
    )
    share = (pixels / _Sum.apply(pixels, group)).float()
    flow_B, energy = flow_and_probe(v_hat_BCTHW, v_BCTHW, probe, weight, first_frame)
    return _Sum.apply(share * flow_B, group), _Sum.apply(share * energy, group)


def temporal_flow_and_probe(
    v_hat_BCTHW: Tensor,
    v_BCTHW: Tensor,
    probe: Tensor,
    weight: Tensor,
    start: int,
    first_frame: int = 0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`flow_and_probe` of the whole, from slices of time that begin at latent frame `start`.

    probe: of the whole, (P, C, T), (B, P, C, T) or (P, T). Sends the probe's output, (B, P, H, W),
    or (B, C, P, H, W) for (P, T).
    """
    frames = v_hat_BCTHW.shape[2]
    dtype = torch.promote_types(v_hat_BCTHW.dtype, torch.float32)
    residual = v_hat_BCTHW.to(dtype) - v_BCTHW.to(dtype)
    learned = residual[:, :, max(first_frame - start, 0) :]
    sums_B = learned.square().sum(dim=(1, 2, 3, 4))
    count = residual.shape[1] * (probe.shape[-1] - first_frame) * residual[0, 0, 0].numel()
    flow_B = _Sum.apply(sums_B, group) / count
    part = probe[..., start : start + frames].to(dtype)
    axes, out = {2: ("pt", "bcphw"), 3: ("pct", "bphw"), 4: ("bpct", "bphw")}[probe.ndim]
    seen = _Sum.apply(torch.einsum(f"{axes},bcthw->{out}", part, residual), group)
    if probe.ndim == 2:
        seen = seen.movedim(1, 2)
    energy_BP = seen.square().flatten(2).sum(dim=2) / residual[0, 0, 0].numel()
    return flow_B, energy_BP if weight.ndim == 2 else energy_BP.sum(dim=1)
