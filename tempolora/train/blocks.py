"""Per block: what is kept for the backward pass, which attention runs, and compilation.

Applied from outside, to the forward of each transformer block. The levels, by what a block of
width D keeps of L tokens, with F the width of the feed-forward layer:

    none       whatever autograd asks for
    matmuls    its input, its self-attention's output and the outputs of its matrix products: only
               elementwise work and the attention to the text are repeated
    attention  its input and its self-attention's output
    full       its input
    hosted     the same as matmuls, in pinned host memory (tempolora/train/hosted.py)

`train.checkpointing: selective` gives the last `kept_blocks` blocks level "matmuls" (theirs is
freed first, before the other blocks need room to be recomputed in), `host_blocks` of the others,
evenly spread so that copies have time, "hosted", and the rest "attention". An
output is worth keeping by the FLOPs that it saves per byte: L per byte for self-attention, K for a
product over K channels. So LoRA's up-projections, over its few channels, are always repeated, and
so is the attention to 512 text tokens. How many bytes that is says `tempolora.train.work`.
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
from tempolora.train.hosted import HostedBlocks
from tempolora.train.plan import SPARE, kept_blocks_in
from tempolora.train.world import free_bytes

log = logging.getLogger(__name__)

# One compilation per level, input size, strength of the adapters and grad mode; beyond the limit
# dynamo would run the rest uncompiled in silence.
COMPILATIONS = 64
WORTH_KEEPING = 192  # channels a product sums over: more than a LoRA's rank, fewer than a model's
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
_IN_4_BITS = "bitsandbytes::gemm_4bit"  # by name, as it is there only once that is imported


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
    hosted = HostedBlocks(transformer, device) if "hosted" in levels else None
    for block, level in zip(transformer.blocks, levels, strict=True):
        forward = block.forward
        if device.type == "cuda" and not compiled:
            forward = _with_fastest_attention(forward)  # in the recomputation as well
        # Inside the compiled block, and inside FSDP's hooks: weights gathered for a block's
        # backward serve its recomputation too.
        forward = _recomputed(forward, level, compiled)
        if compiled:
            forward = torch.compile(forward, dynamic=False)
            if device.type == "cuda":
                # Outside: the choice is made while a block is compiled, and a graph that holds it
                # would not be cached.
                forward = _with_fastest_attention(forward)
        if hosted:  # outside too: what autograd saves is known once a block is compiled
            forward = hosted.keeping(block, forward, level == "hosted")
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
    if cfg.train.checkpointing == "auto":
        return below + ["full"] * trained
    if cfg.train.checkpointing != "selective":
        return below + [cfg.train.checkpointing] * trained
    kept = _kept_blocks(cfg, transformer, device, trained, arriving_bytes)
    return below + _spread(trained - kept, cfg.train.host_blocks) + ["matmuls"] * kept


def _spread(count: int, hosted: int) -> list[str]:
    """Levels of `count` blocks, of which at most `hosted`, evenly spread, are on the host."""
    hosted = min(count, hosted)
    return [
        "hosted" if (n + 1) * hosted // count > n * hosted // count else "attention"
        for n in range(count)
    ]


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
    allowed = torch.cuda.get_per_process_memory_fraction(device)
    allowed *= torch.cuda.get_device_properties(device).total_memory
    room = free_bytes(device) - SPARE * allowed - arriving_bytes
    kept = kept_blocks_in(room, cfg)
    log.info(
        "train.kept_blocks: null chose %d of %d, as %.0f GiB are free", kept, blocks, room / 2**30
    )
    return kept


def _recomputed(
    forward: Callable[..., Tensor], level: str, compiled: bool
) -> Callable[..., Tensor]:
    """`forward` with gradient checkpointing. A plain function: a functools.partial in its place
    makes torch.compile pass the whole block over in silence."""
    if level == "none":
        return forward
    options = {"use_reentrant": False}
    # Left to itself torch 2.11's compiler keeps what an autograd.Function returns, and such are all
    # 8-bit and 4-bit products.
    if level != "full" or compiled:
        options["context_fn"] = _KEEP.get(level, _keep_matmuls)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(forward, *args, **options, **kwargs)

    return run


def _keep_nothing():
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)


def _keep_attention():
    return create_selective_checkpoint_contexts(_policy(worth=None))


def _keep_matmuls():
    return create_selective_checkpoint_contexts(_policy(worth=WORTH_KEEPING))


_KEEP = {"full": _keep_nothing, "attention": _keep_attention}
for _level in (*_KEEP.values(), _keep_matmuls):  # what torch's compile cache knows them by
    _level.cache_hash = f"tempolora.train.blocks.{_level.__name__}.2"


def _policy(worth: int | None) -> Callable[..., CheckpointPolicy]:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _PRODUCTS or op.name() == _IN_4_BITS:
            left = args[_PRODUCTS.get(op, 0)]
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
