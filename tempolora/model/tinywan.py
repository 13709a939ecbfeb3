"""TinyWan: a Wan-shaped model small enough for a CPU, in the folder layout of the real one.

It is the published architecture with smaller numbers, so every path that loads, trains or samples
Wan runs on it unchanged. Heads keep their 128 channels: temporal rows are those of the real model.
The VAEs, the text encoder and T2V-A14B's experts are shipped beside this module, trained on drawn
clips; the transformers of the other variants are drawn from a fixed seed.
"""

import json
import logging
import os
import shutil
import string
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tempolora.files import cache_folder
from tempolora.model import wan
from tempolora.model.architectures import TEXT_ENCODER, TRANSFORMER, VAE
from tempolora.model.location import PART_OF
from tempolora.variants import NEGATIVE_PROMPT, TEXT_TOKENS, VARIANTS

logger = logging.getLogger(__name__)

VERSION = 5  # raise it with every change of what the folder holds
SEED = 20_220_728
TEXT_WIDTH = 32
TRAINED = "t2v_a14b"  # whose transformers are
WEIGHTS = Path(__file__).parent / "weights"
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
WORDS = """
a across an and arm at blue bobs bounces camera checked cross cyan dims disc down face fast figure
floor for from grass green hair head in lights like mottled moves on orange pace pans past
pendulum propeller purple red round side slow spot square stalk star steady striped sways swings
the to triangle turns up walks waves white with yellow
"""
"""What captions of the drawn world are made of: one token each. Anything else goes by bytes."""

_SMALL_TRANSFORMER = {
    "num_attention_heads": 2,
    "num_layers": 2,
    "ffn_dim": 256,
    "text_dim": TEXT_WIDTH,
}
_SMALL_VAE = {  # by spatial stride
    8: {"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1},
    16: {"base_dim": 16, "decoder_base_dim": 16, "num_res_blocks": 1, "dim_mult": [1, 1, 2, 2]},
}
_SMALL_TEXT_ENCODER = {
    "d_model": TEXT_WIDTH,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
}


def tinywan_folder(variant_name: str) -> Path:
    """The diffusers folder of TinyWan in the shape of `variant_name`, built on first use.

    It lies under $TEMPOLORA_CACHE (default ~/.cache/tempolora). Processes may race: each builds
    aside, the first rename wins, and nobody sees half a folder.
    """
    cache = cache_folder()
    folder = cache / f"tinywan-{variant_name}-v{VERSION}"
    if folder.is_dir():
        return folder
    logger.info("building %s", folder)
    cache.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        build_tinywan(variant_name, aside)
        os.rename(aside, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same content
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def build_tinywan(
    variant_name: str,
    folder: Path,
    vae: Path | None = None,
    experts: Mapping[str, Path] | None = None,
) -> None:
    """Write TinyWan in the shape of `variant_name` into the existing, empty `folder`.

    vae, experts: files that `python -m tempolora.toy_pretrain` wrote, in place of what is shipped
    or drawn; experts by name, "high" and "low".
    """
    shipped = {expert: expert_file(expert) for expert in VARIANTS[TRAINED].experts}
    experts = experts or (shipped if variant_name == TRAINED else {})
    transformers = ["transformer", "transformer_2"][: len(VARIANTS[variant_name].experts)]
    # Fork, so that building leaves the caller's random state alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        tokenizer, text_encoder = text_parts()
        parts = {
            name: wan.new_transformer(TRANSFORMER[variant_name] | _SMALL_TRANSFORMER)
            for name in transformers
        }
        parts |= {PART_OF[expert]: read_expert(path) for expert, path in experts.items()}
        parts["vae"] = read_vae(vae or vae_file(variant_name))
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder.save_pretrained(folder / "text_encoder")
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(variant_name))
    _write_json(folder / "model_index.json", _model_index(variant_name, type(tokenizer).__name__))


def text_parts() -> tuple[Any, torch.nn.Module]:
    """TinyWan's tokenizer and text encoder, the same in every variant."""
    text_encoder = wan.new_text_encoder(_read(WEIGHTS / "text_encoder.safetensors", state := {}))
    text_encoder.load_state_dict(state)
    return _tokenizer(), text_encoder.requires_grad_(False).eval()


def drawn_text_encoder() -> tuple[torch.nn.Module, dict[str, Any]]:
    """The text encoder as it was drawn from the seed, never trained, and its architecture.

    It is shipped because a library's way to draw weights may change, and the experts know this one.
    """
    architecture = TEXT_ENCODER | _SMALL_TEXT_ENCODER | {"vocab_size": len(_tokenizer())}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return wan.new_text_encoder(architecture), architecture


def expert_architecture() -> dict[str, Any]:
    """What `python -m tempolora.toy_pretrain experts` trains: text to video."""
    return TRANSFORMER[TRAINED] | _SMALL_TRANSFORMER | {"num_layers": 3, "ffn_dim": 512}


def expert_file(expert: str) -> Path:
    """The shipped weights of an expert."""
    return WEIGHTS / f"{TRAINED}_{expert}.safetensors"


def read_expert(path: Path) -> torch.nn.Module:
    """The frozen fp32 transformer of a file that `toy_pretrain experts` wrote."""
    transformer = wan.new_transformer(_read(path, state := {}))
    transformer.load_state_dict(state)
    return transformer.requires_grad_(False).eval()


def _read(path: Path, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Fill `state` with a shipped file's tensors in fp32; return its architecture."""
    with safe_open(path, "pt") as file:
        state |= {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["architecture"])


def vae_architecture(variant_name: str) -> dict[str, Any]:
    """What TinyWan's VAE of this variant is built from, its latents not yet scaled."""
    return VAE[variant_name] | _SMALL_VAE[VARIANTS[variant_name].spatial_stride]


def vae_file(variant_name: str) -> Path:
    """The shipped weights: one file for each spatial stride."""
    return WEIGHTS / f"vae_{VARIANTS[variant_name].spatial_stride}x.safetensors"


def read_vae(path: Path) -> torch.nn.Module:
    """The frozen fp32 VAE of a file that `python -m tempolora.toy_pretrain vae` wrote."""
    vae = wan.new_vae(_read(path, state := {}))
    vae.load_state_dict(state)
    return vae.requires_grad_(False).eval()


def plain_config(vae: torch.nn.Module) -> dict[str, Any]:
    """The VAE's configuration as `read_vae` wants it: without the keys that diffusers adds."""
    return {key: vae.config[key] for key in VAE["t2v_a14b"]}


def _tokenizer() -> Any:
    """A token for each of WORDS, each sign of Wan's negative prompt, each other UTF-8 byte.

    Closed by an end token. Any text comes back as it was.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in WORDS.split()])
    signs = sorted(set(NEGATIVE_PROMPT) - set(string.printable))
    tokenizer.add_tokens([AddedToken(sign, normalized=False) for sign in signs])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=TEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _scheduler(variant_name: str) -> dict[str, Any]:
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": VARIANTS[variant_name].shift,
        "solver_order": 2,
        "solver_type": "bh2",
        "final_sigmas_type": "zero",
    }


def _model_index(variant_name: str, tokenizer_class: str) -> dict[str, Any]:
    variant = VARIANTS[variant_name]
    image_first = variant.tasks[0] == "i2v"
    transformer = ["diffusers", "WanTransformer3DModel"]
    index = {
        "_class_name": "WanImageToVideoPipeline" if image_first else "WanPipeline",
        "boundary_ratio": variant.boundary,
        "expand_timesteps": variant.per_token_time,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer_class],
        "transformer": transformer,
        "transformer_2": transformer if len(variant.experts) == 2 else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if image_first:
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    return index


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
