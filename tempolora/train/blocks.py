"""Per block: what is kept for the backward pass, which attention runs, and compilation.

Applied from outside, to the forward of each transformer block. The levels, by what a block of
width D keeps of L tokens, with F the width of the feed-forward layer:

    none       whatever autograd asks for
    matmuls    its input, its self-attention's output and the outputs of its matrix products: only
               elementwise work and the attention to the text are repeated
    attention  its input and its self-attention's output
    full       its input

`train.checkpointing: selective` gives the last `kept_blocks` blocks level "matmuls" (theirs is
freed first, before the other blocks need room to be recomputed in) and the others "attention". An
output is worth keeping by the FLOPs that it saves per byte: L per byte for self-attention, K for a
product over K channels. So LoRA's up-projections, over its few channels, are always repeated, and
so is the attention to 512 text tokens.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tempolora.config import Config, ConfigError
from tempolora.model.lora import lora_parameters
from tempolora.variants import TEXT_TOKENS

log = logging.getLogger(__name__)

# One compilation per level, input size, strength of the adapters and grad mode; beyond the limit
# dynamo would run the rest uncompiled in silence.
COMPILATIONS = 64
WORTH_KEEPING = 192  # channels a product sums over: more than a LoRA's rank, fewer than a model's
SPARE = 0.05  # of a GPU's memory: what an allocator cannot use, libraries' own buffers
ADAM_BYTES = 12  # per trained value: gradient and two moments, fp32
PREFERRED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

_CACHE_FUNCTIONS = "autograd_cache_allow_custom_autograd_functions"
_ATTENTION = ("aten::_scaled_dot_product", "aten::_flash_att", "aten::_efficient_att")
_PRODUCTS = {  # operator -> position of its left matrix
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.baddbmm.default: 1,
    torch.ops.aten.linear.default: 0,
    torch.ops.aten._scaled_mm.default: 0,
}


def prepare_blocks(
    cfg: Config,
    transformer: nn.Module,
    device: torch.device,
    *,
    compiled: bool,
    arriving_bytes: int = 0,
) -> None:
    """Checkpoint and compile the blocks of a transformer whose adapters are in place.

    arriving_bytes: as for `choose_levels`, which this raises the errors of.
    """
    levels = choose_levels(cfg, transformer, device, arriving_bytes)
    if compiled:
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, COMPILATIONS
        )
        # Fp8Linear's autograd function is traced into the graph, which is what the cache's key is
        # made of; without this a second run would compile it again.
        if hasattr(torch._functorch.config, _CACHE_FUNCTIONS):  # not in every torch
            setattr(torch._functorch.config, _CACHE_FUNCTIONS, True)
    for block, level in zip(transformer.blocks, levels, strict=True):
        forward = block.forward
        if device.type == "cuda" and not compiled:
            forward = _with_fastest_attention(forward)  # in the recomputation as well
        # Inside the compiled block, and inside FSDP's hooks: weights gathered for a block's
        # backward serve its recomputation too.
        forward = _recomputed(forward, level)
        if compiled:
            forward = torch.compile(forward, dynamic=False)
            if device.type == "cuda":
                # Outside: the choice is made while a block is compiled, and a graph that holds it
                # would not be cached.
                forward = _with_fastest_attention(forward)
        block.forward = forward
    if device.type == "cuda":
        _report_attention(transformer, device)


# --- What is kept -------------------------------------------------------------------------------


def choose_levels(
    cfg: Config, transformer: nn.Module, device: torch.device, arriving_bytes: int = 0
) -> list[str]:
    """The level of each block. arriving_bytes: of weights that will yet come to `device`.

    Raises ConfigError where train.kept_blocks is more than there are.
    """
    first = int(next(iter(lora_parameters(transformer))).split(".")[1])
    trained = len(transformer.blocks) - first
    below = ["none"] * first  # no gradient goes below the first adapter: nothing is kept there
    if cfg.train.checkpointing != "selective":
        return below + [cfg.train.checkpointing] * trained
    kept = _kept_blocks(cfg, transformer, device, trained, arriving_bytes)
    return below + ["attention"] * (trained - kept) + ["matmuls"] * kept


def kept_bytes(
    level: str, *, tokens: int, width: int, ffn: int, heads: int, text_tokens: int = TEXT_TOKENS
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


def transient_bytes(*, tokens: int, width: int, ffn: int) -> int:
    """Room to run one block's backward in: its recomputed values, gradients and fp32 copies.

    Twelve tensors of tokens * width and four of tokens * ffn, bf16: 7.0 GB for 29,952 tokens of
    the A14B, where a compiled step with full checkpointing takes 8.0 GB beyond weights and inputs.
    """
    return 2 * tokens * (12 * width + 4 * ffn)


def choose_kept_blocks(
    free_bytes: float, *, blocks: int, tokens: int, width: int, ffn: int, heads: int, batch: int
) -> int:
    """How many of `blocks` can keep their products when all keep their attention's output.

    free_bytes: beside weights and optimizer. tokens: of the whole batch.
    """
    sizes = {"tokens": tokens, "width": width, "ffn": ffn}
    least, most = (
        kept_bytes(level, **sizes, heads=heads, text_tokens=batch * TEXT_TOKENS)
        for level in ("attention", "matmuls")
    )
    room = free_bytes - transient_bytes(**sizes) - blocks * least
    return int(min(blocks, max(0, room // (most - least))))


def _kept_blocks(
    cfg: Config, transformer: nn.Module, device: torch.device, blocks: int, arriving_bytes: int
) -> int:
    """train.kept_blocks, or what it stands for on this device, now that the weights are there."""
    asked = cfg.train.kept_blocks
    if asked is not None:
        if asked > blocks:
            raise ConfigError(
                f"train.kept_blocks: given {asked}, but {blocks} blocks are trained; "
                f"at most {blocks}, or leave it out"
            )
        return asked
    if device.type != "cuda":
        return blocks  # without a GPU there is no such limit
    free = free_bytes(device) - arriving_bytes
    free -= ADAM_BYTES * sum(p.numel() for p in lora_parameters(transformer).values())
    model = transformer.config
    kept = choose_kept_blocks(
        free,
        blocks=blocks,
        tokens=cfg.train.batch_size * num_tokens(cfg, model.patch_size),
        width=model.num_attention_heads * model.attention_head_dim,
        ffn=model.ffn_dim,
        heads=model.num_attention_heads,
        batch=cfg.train.batch_size,
    )
    log.info(
        "train.kept_blocks: null chose %d of %d, as %.0f GiB are free", kept, blocks, free / 2**30
    )
    return kept


def num_tokens(cfg: Config, patch_size: tuple[int, int, int]) -> int:
    """Tokens of one sample."""
    _, *sizes = cfg.latent_shape
    T, H, W = (size // patch for size, patch in zip(sizes, patch_size, strict=True))
    return T * H * W


def free_bytes(device: torch.device) -> float:
    """Memory of a GPU that this process may still use, its own unused reserve included."""
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(free + reserved - allocated, allowed - allocated) - SPARE * allowed


def _recomputed(forward: Callable[..., Tensor], level: str) -> Callable[..., Tensor]:
    """`forward` with gradient checkpointing. A plain function: a functools.partial in its place
    makes torch.compile pass the whole block over in silence."""
    if level == "none":
        return forward
    options = {"use_reentrant": False}
    if level != "full":
        options["context_fn"] = {"attention": _keep_attention, "matmuls": _keep_matmuls}[level]

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(forward, *args, **options, **kwargs)

    return run


def _keep_attention():
    return create_selective_checkpoint_contexts(_policy(worth=None))


def _keep_matmuls():
    return create_selective_checkpoint_contexts(_policy(worth=WORTH_KEEPING))


for _level in (_keep_attention, _keep_matmuls):  # what torch's compile cache knows them by
    _level.cache_hash = f"tempolora.train.blocks.{_level.__name__}.1"


def _policy(worth: int | None) -> Callable[..., CheckpointPolicy]:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _PRODUCTS:
            left = args[_PRODUCTS[op]]
            channels = left.shape[-1]
            rows = left.numel() // channels
            # few rows, many channels: the text's keys and values cost next to nothing to keep
            keep = rows <= channels if worth is None else channels >= worth
        else:
            keep = op.name().startswith(_ATTENTION) and args[1].shape[-2] >= args[0].shape[-2]
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


# --- Attention ----------------------------------------------------------------------------------


def _with_fastest_attention(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """cuDNN's attention first, and torch's own where a shape is beyond it; in this call alone."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(PREFERRED, set_priority=True):
            return forward(*args, **kwargs)

    return run


def _report_attention(transformer: nn.Module, device: torch.device) -> None:
    """Say in the log where cuDNN's attention, which is twice as fast, cannot be had."""
    config = transformer.config
    shape = (1, config.num_attention_heads, 128, config.attention_head_dim)
    query = torch.empty(shape, dtype=transformer.dtype, device=device, requires_grad=True)
    parameters = torch.backends.cuda.SDPAParams(query, query, query, None, 0.0, False, False)
    if not torch.backends.cuda.can_use_cudnn_attention(parameters, debug=False):
        log.warning("cuDNN's attention does not take this model or GPU; torch's own is used")
