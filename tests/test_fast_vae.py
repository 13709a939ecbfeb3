"""The faster walk through the VAE's encoder is diffusers' encoder, whatever the chunks."""

import pytest
import torch

from tempolora.model import fast_vae, wan
from tempolora.model.architectures import VAE
from tempolora.model.tinywan import read_vae, vae_file

# fp32, one function in another order of sums, over the largest value. Seen: 3e-7 to 4e-6.
TOLERANCE = 1e-5


def video(frames, size, batch=1):
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, frames, size, size + 32, 3, generator=generator) * 2 - 1


def difference(vae, video_BFHWC, **options):
    theirs = vae._encode(video_BFHWC.permute(0, 4, 1, 2, 3))
    ours = fast_vae.encode(vae, video_BFHWC, **options)
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("variant", ["t2v_a14b", "ti2v_5b"])
@pytest.mark.parametrize("frames", [1, 5, 29])
@torch.no_grad()
def test_chunks_of_any_length_give_diffusers_latents(variant, frames):
    vae = read_vae(vae_file(variant))
    for chunk in (4, 16, None):
        assert difference(vae, video(frames, 32, batch=2), frames=chunk) < TOLERANCE
    fast_vae.to_channels_last(vae.encoder)
    assert difference(vae, video(frames, 32), frames=8) < TOLERANCE


@pytest.mark.parametrize("variant", ["t2v_a14b", "ti2v_5b"])
@torch.no_grad()
def test_the_encoder_of_full_size_is_walked_too(variant):
    torch.manual_seed(0)
    vae = wan.new_vae(VAE[variant] | {"decoder_base_dim": 8}).eval()
    assert difference(vae, video(9, 16), frames=4) < TOLERANCE


@torch.no_grad()
def test_the_compiler_sees_a_chunk_whole_and_only_two_kinds_of_it(monkeypatch):
    """One graph for the chunk that begins with the first frame, one for all others."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    walk = torch.compile(fast_vae._walk, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(fast_vae, "_compiled", lambda: walk)
    vae = read_vae(vae_file("ti2v_5b"))
    assert difference(vae, video(17, 32), frames=4, compiled=True) < TOLERANCE
    assert len(graphs) == 2


@pytest.mark.parametrize(("height", "width", "frames"), [(576, 1024, 16), (2160, 3840, 4)])
def test_no_tensor_grows_beyond_what_32_bits_count(height, width, frames):
    with torch.device("meta"):
        vae = wan.new_vae(VAE["t2v_a14b"])
    assert fast_vae.frames_that_fit(vae, 1, height, width) == frames
