"""The energy of a probe: one number per sample, differentiable in the residual."""

import torch
from torch import Tensor


def probe_energy(residual_BCTHW: Tensor, probe_PCT: Tensor) -> Tensor:
    """energy[b] = mean_hw sum_p (sum_ct K[p,c,t] e[b,c,t,h,w])^2, shape (B,) float32.

    residual_BCTHW: any float dtype. probe_PCT: (P, C, T), or (B, P, C, T) for one probe per
    sample. Accumulates in float32 also under autocast; float64 inputs stay float64.
    """
    dtype = torch.promote_types(residual_BCTHW.dtype, torch.float32)
    columns = "bpct" if probe_PCT.ndim == 4 else "pct"
    with torch.autocast(residual_BCTHW.device.type, enabled=False):
        seen_BPHW = torch.einsum(
            f"{columns},bcthw->bphw", probe_PCT.to(dtype), residual_BCTHW.to(dtype)
        )
        return seen_BPHW.square().sum(dim=1).mean(dim=(1, 2))
