"""Weights from files: equal to what diffusers and transformers load, in one copy, or refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from tempolora.bench import load as bench
from tempolora.config import ConfigError, ModelConfig
from tempolora.model import checkpoint, fp8, offload, wan
from tempolora.model.architectures import TRANSFORMER

CPU = torch.device("cpu")
TOY = Path(__file__).parents[1] / "configs" / "toy.json"
SMALL = TRANSFORMER["t2v_a14b"] | {
    "num_attention_heads": 2,
    "attention_head_dim": 48,
    "ffn_dim": 160,
    "num_layers": 2,
    "text_dim": 32,
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder whose transformer is in several fp32 shards."""
    folder = tmp_path_factory.mktemp("sharded")
    bench.draw_transformer(folder / "transformer", SMALL, shard=300_000)
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def torn_up(monkeypatch):
    """Pieces that end within rows, and host memory that ends within matrices."""
    monkeypatch.setattr(checkpoint, "PIECE", 1000)
    monkeypatch.setattr(checkpoint, "AHEAD", 5000)
    monkeypatch.setattr(offload, "CHUNK", 2**13)
    monkeypatch.setattr(wan, "ROUNDED_VALUES", 700)


def load(folder, **settings):
    return wan.load_transformer(ModelConfig(id=str(folder), **settings), "high", CPU)


def values(module):
    """All weights, those of units in host memory while these are resident."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    streamed = getattr(module, "streamed", None)
    for unit in range(len(streamed) if streamed else 0):
        with streamed.resident([unit]):
            for name, tensor in module.state_dict().items():
                if tensor.stride() and any(tensor.stride()):
                    state[name] = tensor.clone()
    return state


@pytest.mark.parametrize("base", ["bf16", "fp32", "fp8"])
@pytest.mark.parametrize("placement", ["gpu", "host"])
def test_shards_are_loaded_as_diffusers_loads_them(sharded, torn_up, base, placement):
    dtype = torch.float32 if base == "fp32" else torch.bfloat16
    reference = WanTransformer3DModel.from_pretrained(
        sharded, subfolder="transformer", torch_dtype=dtype
    )
    want = reference.state_dict()
    for name in [f"{n}.weight" for n in fp8.quantised_layers(reference)] if base == "fp8" else []:
        rounded, scale = fp8.quantise_rows(want[name])
        want |= {name: rounded, name.replace("weight", "scale"): scale}
    ours = values(load(sharded, base=base, placement=placement))
    assert ours.keys() == want.keys()
    for name, tensor in want.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].float(), tensor.float()), name


@pytest.mark.parametrize("placement", ["gpu", "host"])
def test_the_text_encoder_is_loaded_as_transformers_loads_it(tinywan, torn_up, placement):
    folder = tinywan("t2v_a14b")
    reference = UMT5EncoderModel.from_pretrained(
        folder, subfolder="text_encoder", dtype=torch.bfloat16
    )
    _, ours = wan.load_text(ModelConfig(id=str(folder), placement=placement), CPU)
    assert ours.shared.weight is ours.encoder.embed_tokens.weight
    assert {n: p.dtype for n, p in ours.named_parameters()} == {
        n: p.dtype for n, p in reference.named_parameters()
    }
    ids = torch.arange(12)[None]
    with torch.no_grad():
        a, b = (m(ids, torch.ones_like(ids)).last_hidden_state for m in (ours, reference))
    assert torch.equal(a, b)


def test_of_the_hub_only_the_parts_files_are_fetched_and_its_own_config_is_read(
    sharded, monkeypatch
):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(sharded)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    transformer = load("someone/wan")
    assert len(transformer.blocks) == SMALL["num_layers"]
    assert asked == [("someone/wan", ["transformer/*.json", "transformer/*.safetensors"])]


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(sharded, tmp_path):
    """A copy of the folder to spoil, and its shard that holds a certain weight."""
    folder = shutil.copytree(sharded / "transformer", tmp_path / "wan" / "transformer")
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    return folder, folder / index["weight_map"]["proj_out.weight"]


def change(path, **tensors):
    """Rewrite a file with other tensors; None leaves one out."""
    state = load_file(path) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t for name, t in state.items() if t is not None}, path)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"proj_out__weight": None}, r"lacks weights .*: there is no proj_out\.weight in {folder}"),
        ({"more__weight": torch.ones(2)}, r"does not fit: more\.weight of {file} has no place"),
        (
            {"proj_out__weight": torch.ones(3, 2)},
            r"does not fit: proj_out\.weight in {file} is \(3, 2\), not \(64, 96\)$",
        ),
        (
            {"proj_out__weight": torch.ones(64, 96, dtype=torch.int64)},
            r"does not fit: proj_out\.weight in {file} is I64, not one of F64, F32",
        ),
        (
            {"patch_embedding__bias": torch.ones(96)},
            r": patch_embedding\.bias is in .* and in {file}; remove one",
        ),
        (
            {"proj_out__weight": None, "more": torch.ones(2), "proj_out__bias": torch.ones(1)},
            r"there is no proj_out\.weight in {folder} \(and 2 more\)$",
        ),
    ],
)
def test_a_weight_that_is_amiss_is_named_with_its_file(spoiled, tensors, says):
    folder, path = spoiled
    change(path, **tensors)
    match = says.format(file=path, folder=folder)
    with pytest.raises(ConfigError, match=rf"^model\.id: the transformer of .*{match}") as error:
        load(folder.parent)
    assert "\n" not in str(error.value)


def test_a_torn_file_is_named(spoiled):
    folder, path = spoiled
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=rf"^model\.id: .* cannot read {path}: .*incomplete"):
        load(folder.parent)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=f"cannot read {path}: "):
        load(folder.parent)


def test_a_file_that_is_cut_while_it_is_read_is_named(spoiled, monkeypatch):
    folder, path = spoiled
    contents = checkpoint.contents

    def then_cut(file):
        found = contents(file)
        if file == path:
            path.write_bytes(path.read_bytes()[:-5])
        return found

    monkeypatch.setattr(wan, "contents", then_cut)
    with pytest.raises(ConfigError, match=f"cannot be read: {path} has become shorter"):
        load(folder.parent)


@pytest.mark.parametrize("name", ["no.safetensors", "../vae/model.safetensors"])
def test_an_index_that_names_what_is_not_beside_it_is_refused(spoiled, name):
    folder, _ = spoiled
    (folder.parent / "vae").mkdir()
    save_file({"proj_out.bias": torch.ones(64)}, folder.parent / "vae" / "model.safetensors")
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["proj_out.bias"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=rf"transformer lacks {name}, which .*index\.json names"):
        load(folder.parent)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"index\.json is no index of shards"):
        load(folder.parent)


# --- Memory ---------------------------------------------------------------------------------------

LARGE = SMALL | {
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "ffn_dim": 8192,
    "num_layers": 8,
}


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    bench.draw_transformer(folder / "transformer", LARGE, shard=500 * 10**6)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "case", ["host", *(pytest.param(case, marks=pytest.mark.soak) for case in ("gpu", "fp8"))]
)
def test_a_gigabyte_is_loaded_with_one_copy_in_memory(gigabyte, case):
    command = [sys.executable, "-m", "tempolora.bench", "load", "--config", str(TOY)]
    command += ["--folder", str(gigabyte), "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    copy, peak = found["weights_gib"] * 1024, found["anonymous_gib"] * 1024
    assert copy > (500 if case == "fp8" else 1000)
    # Four pieces of 16 MiB. Of what is rounded, a few matrices of 32 MiB and some rows in fp32, and
    # what malloc keeps of them.
    more = 4 * 16 + (9 * 32 if case == "fp8" else 0)
    assert copy < peak < copy + more + 32


@pytest.mark.soak
def test_the_bench_reads_a_folder_cold_and_again(sharded, tmp_path, capsys):
    out = tmp_path / "load.json"
    bench.main(
        ["--config", str(TOY), "--folder", str(sharded), "--cases", "host", "--json", str(out)]
    )
    found = json.loads(out.read_text())
    assert found["disk_gb_s"] > 0
    assert all(found[f"host {files}"]["gb_s"] > 0 for files in ("dropped", "cached"))
    assert len(capsys.readouterr().out.splitlines()) == 4
