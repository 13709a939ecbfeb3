"""The two encoders that precompute needs, one in memory at a time: text first, then the VAE."""

from collections import defaultdict
from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from tempolora.config import Config, ModelConfig
from tempolora.model import wan
from tempolora.model.memory import free_memory

BATCH_TOKENS = 4096  # that the text encoder sees at once
COMPILE_AFTER = 64  # windows: the compiler takes about as long as it saves on so many


def encoder_fingerprints(model: ModelConfig) -> dict[str, str]:
    """{"vae": ..., "text_encoder": ...}: what identifies the weights that samples come from."""
    return {part: wan.fingerprint(model, part) for part in ("vae", "text_encoder")}


class WanEncoders:
    """Text encoder and VAE of a configuration's model, loaded when first asked for."""

    def __init__(
        self, cfg: Config, device: torch.device, compile_after: int = COMPILE_AFTER
    ) -> None:
        """compile_after: windows after which the VAE's encoder is compiled, on a GPU."""
        self._cfg = cfg
        self._device = device
        self._vae = None
        self._windows = 0
        self._compile_after = compile_after
        self._fingerprints: dict[str, str] | None = None
        # I2V-A14B sees the first frame through extra channels; the 5B through the frame itself.
        self._stores_condition = cfg.task == "i2v" and not cfg.variant.per_token_time

    def fingerprints(self) -> dict[str, str]:
        """As `encoder_fingerprints`."""
        if self._fingerprints is None:
            self._fingerprints = encoder_fingerprints(self._cfg.model)
        return self._fingerprints

    def encode_texts(self, prompts: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Each prompt and its (L, D) embedding at true length, the short ones first.

        The encoder is freed at the end.
        """
        tokenizer, encoder = wan.load_text(self._cfg.model, self._device)
        for batch in batches_by_length(prompts, wan.padded_lengths(tokenizer, prompts)):
            with torch.no_grad():
                texts = wan.encode_prompts(tokenizer, encoder, batch)
            yield from zip(batch, [text.cpu() for text in texts], strict=True)
        del tokenizer, encoder
        free_memory(self._device)

    @torch.no_grad()
    def encode_frames(self, frames_FHW3: Tensor) -> dict[str, Tensor]:
        """uint8 frames to normalised latents (C, T, H, W); i2v A14B also gets "condition"."""
        vae, compiled = self._loaded_vae(), self._compiles(frames_FHW3)
        frames_BFHW3 = frames_FHW3[None].to(self._device, non_blocking=True)
        encoded = {"latents": wan.encode_video(vae, frames_BFHW3, compiled)}
        if self._stores_condition:
            first_BHW3 = frames_BFHW3[:, 0]
            num_frames = len(frames_FHW3)
            encoded["condition"] = wan.encode_condition(vae, first_BHW3, num_frames, compiled)
        return {name: value[0].cpu() for name, value in encoded.items()}

    def decode_frames(self, latents_CTHW: Tensor) -> Tensor:
        """Normalised latents to RGB (F, 3, H, W) float32 in 0..1, on the VAE's device."""
        return rearrange(
            wan.decode_frames(self._loaded_vae(), latents_CTHW[None]), "1 C F H W -> F C H W"
        )

    def _compiles(self, frames_FHW3: Tensor) -> bool:
        """Of windows of the configured size alone: any other is compiled for anew."""
        data = self._cfg.data
        if frames_FHW3.shape[:3] != (data.num_frames, data.height, data.width):
            return False
        self._windows += 1
        return self._device.type == "cuda" and self._windows > self._compile_after

    def _loaded_vae(self) -> wan.AutoencoderKLWan:
        if self._vae is None:
            self._vae = wan.load_vae(self._cfg.model, self._device)
        return self._vae


def batches_by_length(prompts: list[str], lengths: list[int]) -> Iterator[list[str]]:
    """Prompts of equal length together, BATCH_TOKENS at once, the short ones first.

    No prompt is padded for the sake of another, so its embedding does not depend on them.
    """
    by_length: dict[int, list[str]] = defaultdict(list)
    for prompt, length in zip(prompts, lengths, strict=True):
        by_length[length].append(prompt)
    for length, alike in sorted(by_length.items()):
        size = max(1, BATCH_TOKENS // length)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))
