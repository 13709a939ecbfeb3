"""The two encoders that precompute needs, one in memory at a time: text first, then the VAE."""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from tempolora.config import Config, ModelConfig
from tempolora.model import wan
from tempolora.model.memory import free_memory


def encoder_fingerprints(model: ModelConfig) -> dict[str, str]:
    """{"vae": ..., "text_encoder": ...}: what identifies the weights that samples come from."""
    return {part: wan.fingerprint(model, part) for part in ("vae", "text_encoder")}


class WanEncoders:
    """Text encoder and VAE of a configuration's model, loaded when first asked for."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self._cfg = cfg
        self._device = device
        self._vae = None
        self._fingerprints: dict[str, str] | None = None
        # I2V-A14B sees the first frame through extra channels; the 5B through the frame itself.
        self._stores_condition = cfg.task == "i2v" and not cfg.variant.per_token_time

    def fingerprints(self) -> dict[str, str]:
        """As `encoder_fingerprints`."""
        if self._fingerprints is None:
            self._fingerprints = encoder_fingerprints(self._cfg.model)
        return self._fingerprints

    def encode_texts(self, batches: Iterator[list[str]]) -> Iterator[list[Tensor]]:
        """Prompts to (L, D) embeddings at true length; the encoder is freed at the end."""
        tokenizer, encoder = wan.load_text(self._cfg.model, self._device)
        for batch in batches:
            with torch.no_grad():
                yield [text.cpu() for text in wan.encode_prompts(tokenizer, encoder, batch)]
        del tokenizer, encoder
        free_memory(self._device)

    @torch.no_grad()
    def encode_frames(self, frames_FHW3: Tensor) -> dict[str, Tensor]:
        """uint8 frames to normalised latents (C, T, H, W); i2v A14B also gets "condition"."""
        frames_BFHW3 = frames_FHW3[None].to(self._device)
        encoded = {"latents": wan.encode_video(self._loaded_vae(), frames_BFHW3)}
        if self._stores_condition:
            first_BHW3 = frames_BFHW3[:, 0]
            encoded["condition"] = wan.encode_condition(
                self._loaded_vae(), first_BHW3, len(frames_FHW3)
            )
        return {name: value[0].cpu() for name, value in encoded.items()}

    def decode_frames(self, latents_CTHW: Tensor) -> Tensor:
        """Normalised latents to RGB (F, 3, H, W) float32 in 0..1, on the VAE's device."""
        return rearrange(
            wan.decode_frames(self._loaded_vae(), latents_CTHW[None]), "1 C F H W -> F C H W"
        )

    def _loaded_vae(self) -> wan.AutoencoderKLWan:
        if self._vae is None:
            self._vae = wan.load_vae(self._cfg.model, self._device)
        return self._vae
