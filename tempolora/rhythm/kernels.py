"""Flow loss and probe energies of a residual: the formulas in torch, and who computes them where.

    energy[b] = mean_hw sum_p (sum_ct K[p,c,t] e[b,c,t,h,w])^2
    flow[b]   = mean of e[b]^2 over the channels, learned frames and pixels

A CUDA device runs the fused Triton kernel (triton_launch.py); anything else, and float64
everywhere, runs the torch code below, which is also what the kernel is tested against.

Legend: B sample, C channel, T latent frame, H, W latent height and width, P probe row.
"""

import torch
from torch import Tensor


def probe_energy(residual_BCTHW: Tensor, probe: Tensor) -> Tensor:
    """Energy (B,) of a residual as a probe sees it, differentiable in the residual.

    residual_BCTHW: any float dtype and any strides. probe: (P, C, T); (B, P, C, T), one per sample;
    or (P, T), which sees every channel alike and sums over channels. It gets no gradient.

    Accumulates in float32, also under autocast, and returns float32; float64 stays float64. Raises
    ValueError where shapes do not fit.
    """
    _check(residual_BCTHW, probe)
    if _fused(residual_BCTHW):
        return _fused_kernels().probe_energy(residual_BCTHW, probe)
    dtype = torch.promote_types(residual_BCTHW.dtype, torch.float32)
    with torch.autocast(residual_BCTHW.device.type, enabled=False):
        return _energy_BP(residual_BCTHW.to(dtype), probe.to(dtype)).sum(dim=1)


def flow_and_probe(
    v_hat_BCTHW: Tensor, v_BCTHW: Tensor, probe: Tensor, weight: Tensor, first_frame: int = 0
) -> tuple[Tensor, Tensor]:
    """Flow loss (B,) and probe energies of e = v_hat - v, differentiable in v_hat.

    probe: as in `probe_energy`. weight: (B,), what the caller will multiply the energy (B,) with
    before adding it to the flow loss; or (B, P), one weight and one energy (B, P) for every probe
    row. It is not multiplied in here and gets no gradient: `flow + weight * energy` is the sum
    whose gradient is there when the loss is; that of any other is right too, and takes longer.

    first_frame: 1 where latent frame 0 is given: the flow loss leaves it out, and the probe sees of
    it what its own columns say. v is the target; it may differ from v_hat in dtype and strides.

    Accumulates in float32, also under autocast, and returns float32; float64 stays float64. Raises
    ValueError where shapes do not fit, or where v or the probe asks for a gradient.
    """
    _check(v_hat_BCTHW, probe)
    samples, _, frames, _, _ = v_hat_BCTHW.shape
    if v_BCTHW.shape != v_hat_BCTHW.shape:
        raise ValueError(f"v has shape {tuple(v_BCTHW.shape)}, v_hat {tuple(v_hat_BCTHW.shape)}")
    if v_BCTHW.requires_grad:
        raise ValueError("v is the target of the flow loss and gets no gradient: detach it")
    if tuple(weight.shape) not in {(samples,), (samples, _rows(probe))}:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: it must be ({samples},), one per sample, or "
            f"({samples}, {_rows(probe)}), one per sample and probe row"
        )
    if not 0 <= first_frame < frames:
        raise ValueError(f"first_frame {first_frame} is not one of {frames} latent frames")
    if _fused(v_hat_BCTHW, v_BCTHW):
        return _fused_kernels().flow_and_probe(v_hat_BCTHW, v_BCTHW, probe, weight, first_frame)
    dtype = torch.promote_types(v_hat_BCTHW.dtype, v_BCTHW.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    with torch.autocast(v_hat_BCTHW.device.type, enabled=False):
        e_BCTHW = v_hat_BCTHW.to(dtype) - v_BCTHW.to(dtype)
        flow_B = e_BCTHW[:, :, first_frame:].square().mean(dim=(1, 2, 3, 4))
        energy_BP = _energy_BP(e_BCTHW, probe.to(dtype))
    return flow_B, energy_BP if weight.ndim == 2 else energy_BP.sum(dim=1)


def _energy_BP(e_BCTHW: Tensor, probe: Tensor) -> Tensor:
    if probe.ndim == 2:
        seen_BCPHW = torch.einsum("pt,bcthw->bcphw", probe, e_BCTHW)
        return seen_BCPHW.square().sum(dim=1).mean(dim=(2, 3))
    columns = "bpct" if probe.ndim == 4 else "pct"
    seen_BPHW = torch.einsum(f"{columns},bcthw->bphw", probe, e_BCTHW)
    return seen_BPHW.square().mean(dim=(2, 3))


def _rows(probe: Tensor) -> int:
    return probe.shape[1] if probe.ndim == 4 else probe.shape[0]


def _check(residual_BCTHW: Tensor, probe: Tensor) -> None:
    if residual_BCTHW.ndim != 5 or 0 in residual_BCTHW.shape:
        raise ValueError(f"a residual is (B, C, T, H, W), not {tuple(residual_BCTHW.shape)}")
    samples, channels, frames, _, _ = residual_BCTHW.shape
    columns = {2: (frames,), 3: (channels, frames), 4: (samples, channels, frames)}
    seen = tuple(size for axis, size in enumerate(probe.shape) if axis != max(0, probe.ndim - 3))
    if probe.ndim not in columns or seen != columns[probe.ndim] or 0 in probe.shape:
        raise ValueError(
            f"a probe of shape {tuple(probe.shape)} does not fit {tuple(residual_BCTHW.shape)}: it "
            f"must be (P, {channels}, {frames}), ({samples}, P, {channels}, {frames}) or "
            f"(P, {frames})"
        )
    if probe.requires_grad:
        raise ValueError("a probe is fixed and gets no gradient: detach it")


def _fused(*tensors: Tensor) -> bool:
    return tensors[0].is_cuda and all(tensor.dtype != torch.float64 for tensor in tensors)


def _fused_kernels():
    """What launches the kernels, imported where a CUDA tensor first asks for it.

    Without Triton the same sums in torch read and write the residual some twenty times over, so
    that is an error and no quiet way round: torch's CUDA wheels for Linux bring Triton along.
    """
    try:
        from tempolora.rhythm import triton_launch
    except ImportError as error:
        raise RuntimeError(
            "the rhythm terms need Triton on a CUDA device: pip install triton "
            "(on Windows: triton-windows)"
        ) from error
    return triton_launch
