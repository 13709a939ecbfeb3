"""What one training step computes: sizes, weights and FLOPs, from the configuration alone.

The planner and the train log count with the same functions. Model FLOPs are those of the forward
pass and of the gradients that LoRA needs: frozen weights need none of their own, nothing below the
first adapter is differentiated, and what checkpointing computes twice counts once.

L tokens of a sample, D width, F width of the feed-forward layers, R rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from tempolora.config import Config, ConfigError
from tempolora.model.location import PART_OF, part_config
from tempolora.model.targets import adapter_rows, target_modules
from tempolora.variants import TEXT_TOKENS

FREQ_DIM = 256  # of the sinusoidal time embedding
BF16, FP32 = 2, 4
NF4 = 1 / 2 + 1 / 64 + FP32 / (64 * 256)  # magnitudes of 64 values, and scales of 256 of these
SMALLEST_8BIT = 4096  # bitsandbytes keeps the states of smaller tensors in fp32
SELF, CROSS = "attn1", "attn2"
UP, DOWN = "ffn.net.0.proj", "ffn.net.2"


@dataclass(frozen=True)
class Flops:
    """Multiply-adds count as two. Attention: the products with k and v, not their layers."""

    linear_forward: float = 0.0
    linear_backward: float = 0.0
    attention_forward: float = 0.0
    attention_backward: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(self.all, other.all, strict=True)))

    @property
    def all(self) -> tuple[float, ...]:
        return tuple(vars(self).values())

    @property
    def total(self) -> float:
        return sum(self.all)


@dataclass(frozen=True)
class Work:
    """One microstep of one expert on one process.

    rows: output width of each adapted layer's B, by its name within a block. adapted: first and
    one past the last block with adapters. context: processes that share the samples.
    """

    batch: int
    tokens: int
    width: int
    ffn: int
    heads: int
    blocks: int
    text_dim: int
    in_channels: int  # of a token: channels times patch
    out_channels: int
    per_token_time: bool
    rank: int
    rows: dict[str, int]
    adapted: tuple[int, int]
    context: int = 1

    @property
    def all_tokens(self) -> int:
        """Of all samples of the microstep, on this process."""
        return self.batch * self.tokens // self.context

    # --- Weights ----------------------------------------------------------------------------------

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each linear layer of a block."""
        width = self.width
        square = {
            f"{attention}.{name}": (width, width)
            for attention in (SELF, CROSS)
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        }
        return square | {UP: (width, self.ffn), DOWN: (self.ffn, width)}

    def block_weights(self, base: str) -> float:
        """Bytes of one frozen block in model.base."""
        matrices = sum(a * b for a, b in self.linears.values())
        outputs = sum(b for _, b in self.linears.values())  # one bias each, one scale in fp8
        others = BF16 * (outputs + 4 * self.width)  # norms of q and k, twice
        kept_fp32 = FP32 * (2 + 6) * self.width  # norm2 and the modulation table
        if base == "fp8":
            return matrices + FP32 * outputs + others + kept_fp32
        if base == "nf4":
            return NF4 * matrices + others + kept_fp32
        size = FP32 if base == "fp32" else BF16
        return size / BF16 * (BF16 * matrices + others) + kept_fp32

    def block_matrices(self, base: str) -> float:
        """Bytes of a block's matrices alone, which model.placement host streams."""
        return self._size(base) * sum(a * b for a, b in self.linears.values())

    def largest_third(self, base: str) -> float:
        """Bytes of the matrices of a block's attention or feed-forward layer: a slot's."""
        attention, ffn = 4 * self.width**2, 2 * self.width * self.ffn
        return self._size(base) * max(attention, ffn)

    @staticmethod
    def _size(base: str) -> int:
        return {"fp8": 1, "fp32": FP32}.get(base, BF16)

    def outer_weights(self, base: str) -> float:
        """Bytes of what is frozen outside of the blocks: embeddings and head."""
        width, size = self.width, FP32 if base == "fp32" else BF16
        patch = (self.in_channels + 1) * width
        time = (FREQ_DIM + 1) * width + (width + 1) * width
        modulation = (width + 1) * 6 * width
        text = (self.text_dim + 1) * width + (width + 1) * width
        head = (width + 1) * self.out_channels
        return size * (patch + modulation + text + head) + FP32 * (time + 2 * width)

    def weights(self, base: str) -> float:
        """Bytes of the frozen transformer."""
        return self.blocks * self.block_weights(base) + self.outer_weights(base)

    @property
    def adapters(self) -> list[int]:
        """Elements of each trained tensor, A and B in turn."""
        first, end = self.adapted
        sizes = []
        for name, rows in self.rows.items():
            sizes += [self.rank * self.linears[name][0], self.rank * rows]
        return sizes * (end - first)

    def optimizer_bytes(self, optimizer: str) -> float:
        """Of AdamW's two states."""
        if optimizer == "adamw":
            return 2 * FP32 * sum(self.adapters)
        return sum(2 * n * (1 if n >= SMALLEST_8BIT else FP32) for n in self.adapters)

    # --- FLOPs ------------------------------------------------------------------------------------

    @cached_property
    def flops(self) -> Flops:
        """Of forward and backward of a microstep."""
        first, _ = self.adapted
        total = self._outside()
        for block in range(self.blocks):
            total += self.block_flops(block, entered=block > first)
        return total

    def _outside(self) -> Flops:
        """Embeddings and head; none but the head lies above an adapter."""
        tokens, width = self.all_tokens, self.width
        timesteps = tokens if self.per_token_time else self.batch
        text = self.batch * TEXT_TOKENS
        head = 2 * tokens * width * self.out_channels
        forward = 2 * tokens * self.in_channels * width
        forward += 2 * timesteps * (FREQ_DIM + 7 * width) * width
        forward += 2 * text * (self.text_dim + width) * width
        return Flops(linear_forward=forward + head, linear_backward=head)

    def block_flops(self, block: int, entered: bool) -> Flops:
        """One block. entered: whether its input needs a gradient."""
        first, end = self.adapted
        trained = set(self.rows) if first <= block < end else set()
        flops, grads = Flops(), entered
        for attention, keys in ((SELF, self.tokens), (CROSS, TEXT_TOKENS)):
            part, grads = self._attention(attention, keys, trained, grads)
            flops += part
        for name in (UP, DOWN):
            flops += self._linear(name, self.all_tokens, name in trained, grads)
            grads = grads or name in trained
        return flops

    def _attention(
        self, attention: str, keys: int, trained: set[str], grads: bool
    ) -> tuple[Flops, bool]:
        """Layers and products of an attention; whether what comes out needs a gradient. grads:
        whether the block's hidden states do; the text that cross-attention reads never does."""
        names = [f"{attention}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
        inputs = [grads, *([grads and attention == SELF] * 2)]
        read = self.all_tokens if attention == SELF else self.batch * keys
        rows = [self.all_tokens, read, read]
        needs = [into or name in trained for into, name in zip(inputs, names, strict=False)]
        flops = Flops()
        for name, count, into in zip(names, rows, inputs, strict=False):
            flops += self._linear(name, count, name in trained, into)
        product = 2 * self.all_tokens * keys * self.width
        # of the weights, if q or k needs one; then of q, k and v, each a product
        backward = (needs[0] or needs[1]) + sum(needs)
        flops += Flops(attention_forward=2 * product, attention_backward=backward * product)
        flops += self._linear(names[3], self.all_tokens, names[3] in trained, any(needs))
        return flops, grads or any(needs) or names[3] in trained

    def _linear(self, name: str, count: int, trained: bool, into: bool) -> Flops:
        """A layer and its adapter on `count` vectors. into: whether its input needs a gradient."""
        a, b = self.linears[name]
        forward, backward = 2 * count * a * b, 2 * count * a * b * into
        if trained:
            down, up = 2 * count * a * self.rank, 2 * count * self.rank * self.rows[name]
            forward += down + up
            backward += down * (1 + into) + 2 * up
        return Flops(linear_forward=forward, linear_backward=backward)


def kept_bytes(
    level: str, *, tokens: int, width: int, ffn: int, heads: int, text_tokens: int
) -> int:
    """Bytes that one block keeps until its backward, at level "full", "attention" or "matmuls".

    bf16 tensors. tokens and text_tokens: of the whole batch. At "matmuls" the tensors of size
    tokens * width are: input, q, k, v, attention's output, its projection, the cross-attention's q
    and its projection; one of tokens * ffn is the feed-forward's first product. Attention keeps
    the logarithm of its denominators as well, fp32 per head and token. The text's keys and values
    are kept from "attention" up.
    """
    hidden, inner = 2 * tokens * width, 2 * tokens * ffn
    if level == "full":
        return hidden
    attention = 2 * hidden + 4 * heads * tokens + 2 * 2 * text_tokens * width
    return {"attention": attention, "matmuls": attention + 6 * hidden + inner}[level]


def tokens_of(cfg: Config) -> int:
    """Transformer tokens of one sample."""
    _, frames, height, width = cfg.latent_shape
    return frames * (height // 2) * (width // 2)


def work_of(cfg: Config, expert: str) -> Work:
    """The work of one microstep of `expert` ("high", "low" or "single")."""
    arch = part_config(cfg.model, PART_OF[expert])
    heads, head_dim = arch["num_attention_heads"], arch["attention_head_dim"]
    width, patch = heads * head_dim, 4
    rows = adapter_rows(cfg.lora, cfg.timebase, head_dim)
    names = list(_within_a_block(target_modules(cfg.lora, arch["num_layers"])))
    widths = {UP: arch["ffn_dim"]}
    return Work(
        batch=cfg.train.batch_size,
        tokens=tokens_of(cfg),
        width=width,
        ffn=arch["ffn_dim"],
        heads=heads,
        blocks=arch["num_layers"],
        text_dim=arch["text_dim"],
        in_channels=arch["in_channels"] * patch,
        out_channels=arch["out_channels"] * patch,
        per_token_time=cfg.variant.per_token_time,
        rank=cfg.lora.rank,
        rows={n: widths.get(n, width) if rows is None else heads * rows for n in names},
        adapted=cfg.lora.blocks or (0, arch["num_layers"]),
        context=cfg.parallel.context,
    )


def check_heads(cfg: Config, expert: str) -> None:
    """Raise ConfigError where `parallel.context` does not share out the attention heads equally."""
    heads = part_config(cfg.model, PART_OF[expert])["num_attention_heads"]
    if heads % cfg.parallel.context:
        raise ConfigError(
            f"parallel.context: {heads} attention heads cannot be shared by "
            f"{cfg.parallel.context} processes; take a divisor of {heads}"
        )


def _within_a_block(names: list[str]) -> Iterator[str]:
    """Layer names without `blocks.N.`, each once."""
    yield from dict.fromkeys(name.split(".", 2)[2] for name in names)
