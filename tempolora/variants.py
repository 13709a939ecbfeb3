"""What is fixed about each published Wan 2.2 model; everything here is a fact, nothing a setting.

Values are those of the official code (Wan2.2 `wan/configs/*.py`), not of the converted folders:
Diffusers' A14B folders carry a shift of 3.0, which is neither trained nor sampled with.
"""

from dataclasses import dataclass

TEMPORAL_STRIDE = 4  # pixel frames per latent frame, after the first frame
PATCH = 2  # transformer patch size in latent pixels, height and width
TEXT_TOKENS = 512  # text embeddings are zero-padded to this length; there is no attention mask


@dataclass(frozen=True)
class Variant:
    """One model of the family.

    fps: native frame rate (Hz). shift: k of the sigma shift. boundary: sigma at and above which
    the high-noise expert works, or None with one transformer. guidance: classifier-free guidance
    of the (low, high) expert. latent_channels, spatial_stride: of the VAE. tasks: the first is
    the default. per_token_time: each token carries its own timestep (a clean first frame).
    """

    fps: float
    shift: float
    boundary: float | None
    guidance: tuple[float, float]
    latent_channels: int
    spatial_stride: int
    tasks: tuple[str, ...]
    per_token_time: bool

    @property
    def experts(self) -> tuple[str, ...]:
        """The transformers there are, in the order sampling uses them."""
        return ("single",) if self.boundary is None else ("high", "low")

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        return self.spatial_stride * PATCH


VARIANTS = {
    "t2v_a14b": Variant(16.0, 12.0, 0.875, (3.0, 4.0), 16, 8, ("t2v",), False),
    "i2v_a14b": Variant(16.0, 5.0, 0.900, (3.5, 3.5), 16, 8, ("i2v",), False),
    "ti2v_5b": Variant(24.0, 5.0, None, (5.0, 5.0), 48, 16, ("t2v", "i2v"), True),
}

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The negative prompt Wan ships with its own sampler (`wan/configs/shared_config.py`)."""
