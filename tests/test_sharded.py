"""Latents split over real processes: energies and gradients of the whole, to rounding."""

import pytest
import torch
import torch.distributed as dist

from tempolora.rhythm.sharded import spatial_flow_and_probe, temporal_flow_and_probe

B, C, T, H, W, P = 2, 4, 13, 7, 6, 5
SPLITS = {"height": 3, "width": 4, "time": 2}
PROBES = {"shared": (P, C, T), "per sample": (B, P, C, T), "per channel": (P, T)}


def inputs(device, probe_shape, rows):
    generator = torch.Generator().manual_seed(1)
    v_hat, v = (torch.randn(B, C, T, H, W, generator=generator) for _ in range(2))
    probe = torch.randn(probe_shape, generator=generator)
    weight = torch.rand((B, P) if rows else (B,), generator=generator)
    return [x.to(device) for x in (v_hat, v, probe, weight)]


def whole(v_hat, v, probe, weight, first_frame):
    """Energies and gradient in float64, written out."""
    v_hat = v_hat.double().requires_grad_()
    e, probe = v_hat - v.double(), probe.double()
    flow = e[:, :, first_frame:].square().mean(dim=(1, 2, 3, 4))
    if probe.ndim == 2:
        seen = torch.einsum("pt,bcthw->bpchw", probe, e)
    else:
        full = probe if probe.ndim == 4 else probe.expand(B, *probe.shape)
        seen = torch.einsum("bpct,bcthw->bphw", full, e)
    energy = seen.square().flatten(2).sum(dim=2) / (H * W)
    energy = energy if weight.ndim == 2 else energy.sum(dim=1)
    (flow.sum() + (weight.double() * energy).sum()).backward()
    return flow.detach(), energy.detach(), v_hat.grad


def check_all(rank, size, device):
    for dim_name, dim in SPLITS.items():
        for kind, shape in PROBES.items():
            for first_frame, rows in ((0, True), (1, False)):
                v_hat, v, probe, weight = inputs(device, shape, rows)
                flow, energy, gradient = whole(v_hat, v, probe, weight, first_frame)
                starts = [0, *torch.tensor_split(torch.arange(v.shape[dim]), size)]
                mine = starts[1 + rank]
                start = int(mine[0])
                cut = slice(start, start + len(mine))
                here, target = (
                    x.index_select(dim, mine.to(device)).contiguous() for x in (v_hat, v)
                )
                here.requires_grad_()
                if dim_name == "time":
                    got = temporal_flow_and_probe(
                        here, target, probe, weight, start, first_frame=first_frame
                    )
                else:
                    got = spatial_flow_and_probe(
                        here, target, probe, weight, first_frame=first_frame
                    )
                (got[0].sum() + (weight * got[1]).sum()).backward()
                where = f"{dim_name}, {kind}, {size} processes"
                index = [slice(None)] * 5
                index[dim] = cut
                for ours, truth in (
                    (got[0], flow),
                    (got[1], energy),
                    (here.grad, gradient[tuple(index)]),
                ):
                    error = (ours.detach().double() - truth).norm() / truth.norm()
                    assert error < 1e-5, f"{where}: relative error {error:.2e}"


def process(rank, backend):
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    check_all(rank, dist.get_world_size(), device)
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_split_latents_have_the_energy_and_gradient_of_the_whole(size, ranks, tmp_path):
    ranks.call("test_sharded:process", size, ["gloo"], tmp_path / "log")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2, 4])
def test_split_over_gpus_they_do_too(size, ranks, tmp_path):
    if torch.cuda.device_count() < size:
        pytest.skip(f"{torch.cuda.device_count()} GPUs")
    ranks.call("test_sharded:process", size, ["nccl"], tmp_path / "log")
