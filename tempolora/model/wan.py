"""Wan as plain functions: load its parts, encode and decode, predict a velocity, name the weights.

The only module that imports diffusers' Wan classes. Everything above it sees tensors and an
`nn.Module`; parallelism, LoRA, compilation and autocast are applied from outside.

Shapes: B batch, C channel, T latent frame, F video frame, H, W latent height and width (of pixels
beside F), L token, D width.
"""

import hashlib
import json
import logging
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from tempolora.config import ConfigError, ModelConfig
from tempolora.model import fast_vae, fp8, nf4
from tempolora.model.architectures import architecture
from tempolora.model.checkpoint import DTYPES, Stored, contents, fill, read
from tempolora.model.location import (
    PART_OF,
    local_folder,
    part_config,
    part_files,
    single_file,
    weight_files,
)
from tempolora.model.offload import StreamedWeights, stand_in, stream_layers, stream_transformer
from tempolora.variants import TEMPORAL_STRIDE, TEXT_TOKENS

logger = logging.getLogger(__name__)

if not sys.stderr.isatty():  # a log file wants lines, not bars
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()

TIMESTEPS = 1000  # the transformer's timestep is TIMESTEPS * sigma
RANDOM_SEED = 0
RANDOM_STD = 0.02
TEXT_MULTIPLE = 16  # tokens: few lengths, all good for matrix products
_MIB = 2**20
ROUNDED_VALUES = 2**22  # at a time; rounding takes several times its input in fp32
# of what is not an 8-bit or 4-bit layer
_BF16 = torch.bfloat16
_DTYPE = {"auto": _BF16, "bf16": _BF16, "fp8": _BF16, "nf4": _BF16, "fp32": torch.float32}
_ROUNDED = {"fp8": fp8, "nf4": nf4}


# --- Building and loading -------------------------------------------------------------------------


def new_transformer(config: dict[str, Any]) -> WanTransformer3DModel:
    """A transformer of this architecture with diffusers' own initialisation."""
    return WanTransformer3DModel.from_config(config)


def new_vae(config: dict[str, Any]) -> AutoencoderKLWan:
    """A VAE of this architecture with diffusers' own initialisation."""
    return AutoencoderKLWan.from_config(config)


def new_text_encoder(config: dict[str, Any]) -> UMT5EncoderModel:
    """A text encoder of this architecture with transformers' own initialisation."""
    return UMT5EncoderModel(UMT5Config.from_dict(config))


# What of a weight is here: those of its elements, as they lie in memory, that begin at a number.
Here = Callable[[Tensor], tuple[Tensor, int]]
# Shares a frozen module out among processes; weights on meta get memory for what is here alone.
Spread = Callable[[nn.Module], Here]


def load_transformer(
    model: ModelConfig, expert: str, device: torch.device | str, spread: Spread | None = None
) -> WanTransformer3DModel:
    """The frozen transformer of `expert` ("high", "low" or "single") on `device`.

    Weights are in `model.base`, except the modules that Wan keeps in fp32 (time embedder, norms,
    modulation tables). They are read in file order and cast one by one into the memory they stay
    in. With base "fp8" the blocks' linear layers are Fp8Linear, with "nf4" Linear4bit, rounded one
    by one. With `model.placement` host the blocks' matrices are in host memory and `device` sees
    them in turn. With `spread` each process reads no more than its part; all of them must call it.
    "nf4" goes with neither. A base or placement left at "auto" is bf16 on `device`. Raises
    ConfigError if the weights cannot be had or do not fit.
    """
    hosted = ("blocks.", stream_transformer) if model.placement == "host" else None
    return _load(model, PART_OF[expert], device, new_transformer, _transformer_keys, hosted, spread)


def meta_transformer(model: ModelConfig, expert: str) -> WanTransformer3DModel:
    """The transformer that `load_transformer` gives, on the meta device: names and shapes alone."""
    part = PART_OF[expert]
    random = model.init == "random"
    config = architecture(model.variant, part) if random else part_config(model, part)
    return _on_meta(new_transformer, config)


def blank_transformer(model: ModelConfig, expert: str) -> WanTransformer3DModel:
    """What `load_transformer` gives with all weights on one device, number formats included, on
    the meta device. A base left at "auto" is bf16."""
    module = meta_transformer(model, expert)
    rounded = _swap_on_meta(module, model.base)
    for name, parameter in module.named_parameters():
        kept = name in rounded | set(map(_scale_of, rounded)) or _kept_fp32(module, name)
        if not kept:
            parameter.data = parameter.data.to(_DTYPE[model.base])
    return module.requires_grad_(False).eval()


def transformer_bytes(model: ModelConfig, expert: str) -> int:
    """Memory of `load_transformer`'s weights in `model.base`, without loading them."""
    module = meta_transformer(model, expert)
    values, bytes_ = sum(p.numel() for p in module.parameters()), 0
    if model.base in _ROUNDED:
        rounded, bytes_ = _ROUNDED[model.base].quantised_bytes(module)
        values -= rounded
    return bytes_ + values * _DTYPE[model.base].itemsize


def load_vae(model: ModelConfig, device: torch.device | str) -> AutoencoderKLWan:
    """The frozen VAE in `model.base` on `device`. Raises ConfigError as load_transformer does."""
    vae = _load(model, "vae", device, new_vae, _vae_keys)
    fast_vae.to_channels_last(vae.encoder)
    return vae


def load_text(
    model: ModelConfig, device: torch.device | str
) -> tuple[Callable[..., Any], UMT5EncoderModel]:
    """(tokenizer, frozen UMT5 encoder in `model.base` on `device`).

    With random weights the tokenizer is TinyWan's, one token per byte, as no vocabulary is at hand.
    `model.placement` host as in load_transformer. Raises ConfigError as that does.
    """
    hosted = ("encoder.block.", _stream_text) if model.placement == "host" else None
    text_encoder = _load(model, "text_encoder", device, new_text_encoder, None, hosted)
    if model.init == "random":
        model = model.model_copy(update={"id": "tinywan"})
    folder = local_folder(model) or _snapshot(model, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    except (OSError, ValueError) as error:
        raise _cannot_load(model, "tokenizer", error) from error
    return tokenizer, text_encoder


def _stream_text(text_encoder: UMT5EncoderModel, device: torch.device) -> StreamedWeights:
    return stream_layers(text_encoder, text_encoder.encoder.block, device)


Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]
# What names begin with that are kept in host memory, and what puts them there.
Hosted = tuple[str, Callable[[Any, torch.device], StreamedWeights]]


def _load(
    model: ModelConfig,
    part: str,
    device: torch.device | str,
    new: Callable[[dict[str, Any]], nn.Module],
    rename: Rename | None,
    hosted: Hosted | None = None,
    spread: Spread | None = None,
) -> Any:
    """One part from its source: random weights, a single file, or a folder or hub id."""
    device, dtype = torch.device(device), _DTYPE[model.base]
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # threads have another current
    base = model.base if part.startswith("transformer") else "bf16"  # nothing else is rounded
    if base == "fp8":
        fp8.check_device(device)
    ways = device, dtype, hosted, spread, base
    if model.init == "random":
        module = _on_meta(new, architecture(model.variant, part))
        names = [name for name, _ in module.named_parameters()]
        return _draw(_Places(module, names, *ways), part)
    path = single_file(model, part)
    if path is not None:
        files, config = [path], part_config(model, part)
    else:
        folder = local_folder(model) or _snapshot(model, part)
        files = part_files(folder / part)
        config = part_config(model.model_copy(update={"id": str(folder)}), part)
    module = _on_meta(new, config)
    stored = _fitting(model, part, module, files, rename)
    try:
        return _read(_Places(module, list(stored), *ways), stored)
    except OSError as error:
        raise ConfigError(f"{_key(model, part)}: cannot be read: {error}") from error


def _key(model: ModelConfig, part: str) -> str:
    """How a message about a part's weights begins."""
    path = single_file(model, part)
    return f"model.files.{part}: {path}" if path else f"model.id: the {part} of {model.id}"


def _cannot_load(model: ModelConfig, part: str, error: Exception) -> ConfigError:
    reason = str(error).strip().split("\n")[0]
    return ConfigError(f"model.id: cannot load the {part} of {model.id}: {reason}")


def _fitting(
    model: ModelConfig, part: str, module: nn.Module, files: list[Path], rename: Rename | None
) -> dict[str, Stored]:
    """The weights in the files by the names of the module, in diffusers' spelling or the original.

    Raises ConfigError for a torn file, and for any weight too many or too few or of another shape.
    """
    found: dict[str, Stored] = {}
    for path in files:
        try:
            held = contents(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{_key(model, part)}: cannot read {path}: {error}") from error
        for name in held.keys() & found.keys():
            raise ConfigError(
                f"{_key(model, part)}: {name} is in {found[name].path} and in {path}; remove one"
            )
        found |= held
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if rename:
        both = (found, _renamed(found, rename))
        found = max(both, key=lambda names: len(names.keys() & shapes.keys()))
    for other, name in _ties(module).items():
        shapes.pop(other)
        if other in found:
            tied = found.pop(other)
            found.setdefault(name, tied)
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    found = {
        name: stored
        for name, stored in found.items()
        if name in shapes or not any(re.search(pattern, name) for pattern in ignored)
    }
    place = files[0] if len(files) == 1 else files[0].parent
    faults = _faults(found, shapes, place)
    if faults:
        lacks = "lacks weights and " if shapes.keys() - found.keys() else ""
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ConfigError(f"{_key(model, part)} {lacks}does not fit: {faults[0]}{more}")
    return found


def _faults(found: dict[str, Stored], shapes: dict[str, tuple[int, ...]], place: Path) -> list[str]:
    """What is amiss, weight by weight; what is missing first."""
    faults = [f"there is no {name} in {place}" for name in sorted(shapes.keys() - found.keys())]
    for name, stored in sorted(found.items()):
        if name not in shapes:
            faults.append(f"{name} of {stored.path} has no place in it")
        elif stored.shape != shapes[name]:
            faults.append(f"{name} in {stored.path} is {stored.shape}, not {shapes[name]}")
        elif stored.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            faults.append(f"{name} in {stored.path} is {stored.dtype}, not one of {known}")
    return faults


def _renamed(found: dict[str, Stored], rename: Rename) -> dict[str, Stored]:
    """`rename` of what is not in memory yet: tensors of no size stand for it."""
    blanks = {name: torch.empty(stored.shape, device="meta") for name, stored in found.items()}
    of = {id(blank): found[name] for name, blank in blanks.items()}
    return {n: of[id(blank)] for n, blank in rename(dict(blanks)).items() if id(blank) in of}


def _ties(module: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several, and the first name of each."""
    first: dict[int, str] = {}
    named = [(n, first.setdefault(id(p), n)) for n, p in module.named_parameters("", True, False)]
    return {name: tied for name, tied in named if name != tied}


class _Places:
    """The memory of a module that was built on meta: what its weights `names` are put into.

    It is what they stay in: on the device, in host memory, or of this process's share alone.
    """

    def __init__(
        self,
        module: nn.Module,
        names: list[str],
        device: torch.device,
        dtype: torch.dtype,
        hosted: Hosted | None,
        spread: Spread | None,
        base: str,
    ) -> None:
        self.module, self.names, self.device, self.dtype = module, names, device, dtype
        whole = module.state_dict()
        self.shapes = {name: whole[name].shape for name in names}
        self.base, self.rounded = base, _swap_on_meta(module, base)
        prefix, stream = hosted or (None, None)
        meta, state = module.state_dict(), {}
        for name in names:
            scaled = base == "fp8" and name in self.rounded
            for key in (name, _scale_of(name)) if scaled else (name,):
                like = meta[key] if name in self.rounded else meta[key].to(self.dtype_of(name))
                if stream and key.startswith(prefix) and like.ndim == 2:
                    state[key] = stand_in(like, device)
                else:
                    state[key] = torch.empty_like(like, device="meta" if spread else device)
        module.load_state_dict(state, assign=True, strict=False)
        module.requires_grad_(False).eval()
        self._here = spread(module) if spread else None
        _complete(module, device)
        self._streamed = stream(module, device) if stream else None
        self._tensors = module.state_dict(keep_vars=True)

    def dtype_of(self, name: str) -> torch.dtype:
        """What a weight is cast to, and rounded from."""
        return torch.float32 if _kept_fp32(self.module, name) else self.dtype

    def here(self, name: str) -> tuple[int, int]:
        """(first, number) of the elements of a weight that are wanted here."""
        if not self._here:
            return 0, self.shapes[name].numel()
        values, begin = self._here(self._tensors[name])
        return begin, len(values)

    def spans(self, name: str) -> list[Tensor]:
        """Where these go, one-dimensional, in a row."""
        tensor = self._tensors[name]
        if self._here:
            return [self._here(tensor)[0]]
        place = self._streamed.place(tensor) if self._streamed else None
        return place or [tensor.data.view(-1)]

    def put_rounded(self, name: str, values: Tensor) -> None:
        """Round whole rows, all that are wanted here, into their places."""
        width = self.shapes[name][1]
        rows = values.view(-1, width)
        if self.base == "nf4":
            nf4.put(self.module.get_submodule(name.removesuffix(".weight")), rows)
            return
        step = max(1, ROUNDED_VALUES // width)
        for row in range(0, len(rows), step):
            weight, scale = fp8.quantise_rows(rows[row : row + step])
            fill(self.spans(name), row * width, weight.view(-1))
            fill(self.spans(_scale_of(name)), row, scale.view(-1))


def _read(places: _Places, stored: dict[str, Stored]) -> nn.Module:
    """Fill the module as the files are read."""
    wanted = {name: stored[name].part(*places.here(name)) for name in places.names}

    def home(name: str) -> list[Tensor]:
        if name in places.rounded:
            return [torch.empty(wanted[name].shape, dtype=places.dtype, device=places.device)]
        return places.spans(name)

    on_gpu = places.device.type == "cuda"
    for name, filled in read(wanted, home, pinned=on_gpu):
        if name in places.rounded:
            places.put_rounded(name, filled[0])
        del filled  # before the next one's home is made
    if on_gpu:
        torch.cuda.empty_cache()  # what casting and rounding took
    return places.module


def _draw(places: _Places, part: str) -> nn.Module:
    """Fill the module with normal weights (std 0.02), norms 1 and biases 0, seeded by its part.

    Norms in front of every matrix keep activations finite at any depth. Where processes share the
    weights, each draws all of them and keeps its part.
    """
    device = places.device
    generator = torch.Generator(device).manual_seed(RANDOM_SEED + _number(part))
    for name in places.names:
        # drawn and rounded on the device, where billions of values take no time
        tensor = torch.empty(places.shapes[name], dtype=places.dtype_of(name), device=device)
        if name.endswith("bias"):
            tensor.zero_()
        elif "norm" in name:
            tensor.fill_(1)
        else:
            tensor.normal_(0, RANDOM_STD, generator=generator)
        begin, count = places.here(name)
        ours = tensor.view(-1)[begin : begin + count]
        if name in places.rounded:
            places.put_rounded(name, ours)
        else:
            fill(places.spans(name), 0, ours)
    return places.module


def _swap_on_meta(module: nn.Module, base: str) -> set[str]:
    """Give a module without memory the layers of its base; the names of weights that are rounded
    when they come."""
    return _ROUNDED[base].swap_on_meta(module) if base in _ROUNDED else set()


def _scale_of(name: str) -> str:
    return f"{name.removesuffix('weight')}scale"


def _on_meta(new: Callable[[dict[str, Any]], nn.Module], config: dict[str, Any]) -> nn.Module:
    """The module without memory: shapes only."""
    with torch.device("meta"):
        return new(config)


def _complete(module: nn.Module, device: torch.device) -> None:
    """Give a module what no state dict holds."""
    if isinstance(module, UMT5EncoderModel):
        module.tie_weights()  # the embedding has two names and one tensor
    if isinstance(module, WanTransformer3DModel):
        config = module.config  # the rope tables are buffers outside the state dict
        module.rope = type(module.rope)(
            config.attention_head_dim, config.patch_size, config.rope_max_seq_len
        ).to(device)
    meta = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    assert not meta, f"left without memory: {meta}"


def _kept_fp32(module: nn.Module, name: str) -> bool:
    """Whether Wan keeps this weight in fp32, by the rule of diffusers' `from_pretrained`."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    return isinstance(module, WanTransformer3DModel) and not set(kept).isdisjoint(name.split("."))


def _transformer_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Original (ComfyUI) names, with or without `model.diffusion_model.`, to diffusers'."""
    return convert_wan_transformer_to_diffusers(state)


_NESTED = re.compile(r"(en|de)coder\.(?:down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)")
_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def _vae_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Original names to diffusers'. Diffusers' table lacks the nested blocks of the 2.2 VAE."""
    renamed, rest = {}, {}
    for key, tensor in state.items():
        match = _NESTED.fullmatch(key)
        if match is None:
            rest[key] = tensor
            continue
        side, block, index, tail = match.groups()
        stem = f"encoder.down_blocks.{block}." if side == "en" else f"decoder.up_blocks.{block}."
        layer, _, leaf = tail.rpartition(".")
        if layer in _RESIDUAL:
            renamed[f"{stem}resnets.{index}.{_RESIDUAL[layer]}.{leaf}"] = tensor
        else:
            renamed[f"{stem}{'down' if side == 'en' else 'up'}sampler.{tail}"] = tensor
    return renamed | convert_wan_vae_to_diffusers(rest)


def convert_lora_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA file's tensors by diffusers' names: `transformer.blocks.N.attn1.to_q.lora_A.weight`.

    Takes the forms that WanPipeline.load_lora_weights takes, and folds `.alpha` in as it does.
    Raises KeyError or ValueError where diffusers cannot convert them.
    """
    return WanLoraLoaderMixin.lora_state_dict(dict(state))


# --- Video and text -------------------------------------------------------------------------------


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, frames_BFHW3: Tensor, compiled: bool = False) -> Tensor:
    """Video to normalised latents: uint8 (B, F, H, W, 3) -> float32 (B, C, T, H, W).

    The mode of the posterior, (z - mean) / std per channel; computed in the VAE's dtype.
    compiled: as `fast_vae.encode`.
    """
    frames_BFHW3 = frames_BFHW3.to(vae.device, non_blocking=True)
    return _encode(vae, frames_BFHW3.float() / 127.5 - 1, compiled)


@torch.no_grad()
def decode_video(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """Normalised latents to video: (B, C, T, H, W) -> uint8 (B, F, H, W, 3)."""
    frames = (decode_frames(vae, latents_BCTHW) * 255).round().to(torch.uint8)
    return rearrange(frames, "B C F H W -> B F H W C")


@torch.no_grad()
def decode_frames(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """Normalised latents to RGB before rounding: (B, C, T, H, W) -> float32 (B, 3, F, H, W), 0..1.

    On the VAE's device.
    """
    mean, std = _statistics(vae)
    latents = latents_BCTHW.to(vae.device).float() * std + mean
    frames_BCFHW = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return ((frames_BCFHW.float() + 1) / 2).clamp(0, 1)


@torch.no_grad()
def encode_condition(
    vae: AutoencoderKLWan, first_frame_BHW3: Tensor, num_frames: int, compiled: bool = False
) -> Tensor:
    """Condition latents of I2V-A14B: the first frame, then mid-grey: float32 (B, C, T, H, W).

    first_frame_BHW3: uint8. As diffusers' WanImageToVideoPipeline.prepare_latents.
    """
    first_BFHW3 = first_frame_BHW3[:, None].to(vae.device).float() / 127.5 - 1
    grey = torch.zeros_like(first_BFHW3).expand(-1, num_frames - 1, -1, -1, -1)
    return _encode(vae, torch.cat([first_BFHW3, grey], dim=1), compiled)


def condition_channels(latent_condition_BCTHW: Tensor) -> Tensor:
    """Condition latents behind their 4-channel mask: (B, C, T, H, W) -> (B, 4 + C, T, H, W).

    The mask has one channel per pixel frame of a latent frame: 1 where the frame is given.
    """
    B, _, T, H, W = latent_condition_BCTHW.shape
    mask = latent_condition_BCTHW.new_zeros(B, TEMPORAL_STRIDE, T, H, W)
    mask[:, :, 0] = 1
    return torch.cat([mask, latent_condition_BCTHW], dim=1)


def _encode(vae: AutoencoderKLWan, video_BFHW3: Tensor, compiled: bool) -> Tensor:
    mean, std = _statistics(vae)
    moments = fast_vae.encode(vae, video_BFHW3.to(vae.dtype), compiled=compiled)
    mode_BCTHW, _ = moments.chunk(2, dim=1)
    return ((mode_BCTHW.float() - mean) / std).contiguous()


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, float32 (C, 1, 1, 1) on the VAE's device."""
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device)
    mean, std = rearrange(values, "S C -> S C 1 1 1")
    return mean, std


@torch.no_grad()
def encode_prompts(
    tokenizer: Callable[..., Any], text_encoder: UMT5EncoderModel, prompts: list[str]
) -> list[Tensor]:
    """Text embeddings of each prompt, cut to its true length: (L, D), L at most 512.

    Cleaned, tokenised and masked as WanPipeline does, but padded no further than the longest needs:
    what the mask hides has no weight. pad_text restores the length that WanPipeline feeds.
    """
    tokens = _tokenise(
        tokenizer, prompts, padding=True, pad_to_multiple_of=TEXT_MULTIPLE, return_tensors="pt"
    ).to(text_encoder.device)
    text_BLD = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    lengths = tokens.attention_mask.sum(dim=1).tolist()
    return [text_LD[:length] for text_LD, length in zip(text_BLD, lengths, strict=True)]


def padded_lengths(tokenizer: Callable[..., Any], prompts: list[str]) -> list[int]:
    """Tokens that the text encoder sees of each prompt when it is encoded by itself."""
    found = [len(ids) for ids in _tokenise(tokenizer, prompts).input_ids]
    return [math.ceil(length / TEXT_MULTIPLE) * TEXT_MULTIPLE for length in found]


def _tokenise(tokenizer: Callable[..., Any], prompts: list[str], **padding: Any) -> Any:
    return tokenizer(
        [prompt_clean(prompt) for prompt in prompts],
        max_length=TEXT_TOKENS,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        **padding,
    )


def pad_text(texts: list[Tensor]) -> Tensor:
    """Text embeddings (L, D) padded with zeros to the (B, 512, D) that Wan attends to unmasked."""
    first = texts[0]
    padded_BLD = first.new_zeros(len(texts), TEXT_TOKENS, first.shape[-1])
    for row, text_LD in zip(padded_BLD, texts, strict=True):
        row[: len(text_LD)] = text_LD
    return padded_BLD


# --- The velocity ---------------------------------------------------------------------------------


def predict_velocity(
    transformer: nn.Module,
    latents_BCTHW: Tensor,
    sigma_B: Tensor,
    text_BLD: Tensor,
    condition_BCTHW: Tensor | None = None,
    clean_first_frame: bool = False,
    per_token_time: bool = False,
) -> Tensor:
    """The velocity noise - x0 that the transformer sees in x_t: float32 (B, C, T, H, W).

    condition_BCTHW: what condition_channels returned (I2V-A14B). per_token_time: every token gets
    its own timestep (5B); with clean_first_frame those of the first latent frame are 0, and the
    caller has put the clean latents there. Otherwise as WanPipeline and WanImageToVideoPipeline,
    but for the timestep: their UniPC sampler cuts 1000 * sigma to a whole number.
    """
    assert per_token_time or not clean_first_frame, "a clean first frame needs per-token time"
    bare = getattr(transformer, "module", transformer)  # DeepSpeed wraps the model
    inputs = latents_BCTHW
    if condition_BCTHW is not None:
        inputs = torch.cat([latents_BCTHW, condition_BCTHW.to(latents_BCTHW.dtype)], dim=1)
    timestep = TIMESTEPS * sigma_B.float()
    if per_token_time:
        timestep = _per_token(timestep, latents_BCTHW, bare.config.patch_size, clean_first_frame)
    velocity = transformer(
        hidden_states=inputs.to(bare.dtype),
        timestep=timestep,
        encoder_hidden_states=text_BLD.to(bare.dtype),
        return_dict=False,
    )[0]
    return velocity.float()


def _per_token(
    timestep_B: Tensor, latents_BCTHW: Tensor, patch_size: tuple[int, ...], clean_first_frame: bool
) -> Tensor:
    """Timesteps (B, tokens) in the transformer's token order: frame, row, column."""
    frames, height, width = (
        size // patch for size, patch in zip(latents_BCTHW.shape[2:], patch_size, strict=True)
    )
    timestep_BTN = timestep_B[:, None, None].repeat(1, frames, height * width)
    if clean_first_frame:
        timestep_BTN[:, 0] = 0
    return timestep_BTN.flatten(1)


# --- Naming the weights ---------------------------------------------------------------------------


def fingerprint(model: ModelConfig, part: str) -> str:
    """sha256 that tells one set of weights from another: 'vae', 'text_encoder', 'transformer'...

    Over the part's config.json and, for each weight file, its name, size and first and last MiB.
    The first MiB holds the safetensors header (every tensor's name, type, shape and place) and the
    first weights; training moves all weights, so another model differs there. It guards against
    mix-ups, not against forgery, and takes milliseconds where hashing 57 GB takes minutes.
    With random weights: the architecture and the seed. Raises ConfigError if nothing is there.
    """
    digest = hashlib.sha256()
    if model.init == "random":
        content = architecture(model.variant, part) | {"seed": RANDOM_SEED + _number(part)}
        return _digest_json(digest, content).hexdigest()
    file = single_file(model, part)
    if file is not None:
        return _digest_file(digest, file).hexdigest()
    folder = (local_folder(model) or _snapshot(model, part)) / part
    files = weight_files(folder)
    if not files:
        raise ConfigError(f"model.id: {folder} holds no .safetensors file")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Library versions are written there too, and say nothing about the weights.
    _digest_json(
        digest,
        {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"},
    )
    for path in files:
        _digest_file(digest, path)
    return digest.hexdigest()


def _snapshot(model: ModelConfig, part: str) -> Path:
    """The folder in the local hub cache, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        kinds = ("*",) if part == "tokenizer" else ("*.json", "*.safetensors")
        return Path(snapshot_download(model.id, allow_patterns=[f"{part}/{k}" for k in kinds]))
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise _cannot_load(model, part, error) from error


def _digest_json(digest: Any, content: dict[str, Any]) -> Any:
    digest.update(json.dumps(content, sort_keys=True).encode())
    return digest


def _digest_file(digest: Any, path: Path) -> Any:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_MIB)
            file.seek(max(0, size - _MIB))
            tail = file.read(_MIB)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    digest.update(f"{path.name}:{size}:".encode() + head + tail)
    return digest


def _number(part: str) -> int:
    """A seed of its own for each part, so that the two experts differ."""
    return ("transformer", "transformer_2", "vae", "text_encoder").index(part)
