"""Engines: how a transformer with adapters is spread over processes, and how it takes a step.

Two classes with one face. `TorchEngine` keeps the adapters whole on every process, since they are
small, and averages their gradients itself; what differs between plain, ddp and fsdp is only
whether the frozen base is replicated or sharded by FSDP2. `DeepSpeedEngine` hands all of it to
ZeRO. Neither changes the model's own code. The base comes sharded already (tempolora/train/spread).

    forward through `transformer` -> backward(loss) for each microstep -> step(lr) -> lora_state()
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from tempolora.config import Config, TrainConfig
from tempolora.launched import needs_whole_model, uses_deepspeed
from tempolora.model.lora import lora_parameters
from tempolora.model.quick_parts import use_quick_parts
from tempolora.train.auto import card_here
from tempolora.train.blocks import prepare_blocks
from tempolora.train.context import context_of, share_attention
from tempolora.train.plan import fitting, with_engine
from tempolora.train.recompute import recompute_blocks
from tempolora.train.world import World
from tempolora.train.zero_state import (
    all_parts,
    optimizer_cut,
    own_part,
    partitions,
    take_up_whole,
    whole_state,
)

log = logging.getLogger(__name__)


def choose_engine(cfg: Config, world: World) -> str:
    """The engine that `parallel.engine: auto` stands for here; a set one is returned as it is.

    Every process must call it.
    """
    if cfg.parallel.engine != "auto":
        return cfg.parallel.engine
    if uses_deepspeed(cfg):
        engine, why = "deepspeed", "the deepspeed launcher started this run"
    elif world.size == 1:
        engine, why = "plain", "there is one process"
    elif needs_whole_model(cfg):
        engine, why = "ddp", "model.placement host and checkpointing offload shard nothing"
    elif cfg.model.base == "nf4":
        engine, why = "ddp", "nf4 weights are not sharded"
    elif fitting(with_engine(cfg, "ddp"), card_here(world)):
        engine, why = "ddp", "the base is predicted to fit on every device"
    else:
        engine, why = "fsdp", "a whole base is not predicted to fit"
    log.info("parallel.engine: auto chose %s: %s", engine, why)
    return engine


def build_engine(kind: str, cfg: Config, transformer: nn.Module, world: World) -> "Engine":
    """Checkpoint and compile a transformer that is spread, with its adapters in place.

    Settings left at "auto" mean weights on the device and full checkpointing.
    """
    compiled = cfg.train.compile
    if compiled is None:
        compiled = world.device.type == "cuda"
    if world.device.type == "cuda":
        use_quick_parts(transformer, compiled=compiled)
    if world.context > 1:
        share_attention(transformer, context_of(cfg, world))
    if needs_whole_model(cfg):
        offload = cfg.train.checkpointing == "offload"
        recompute_blocks(transformer, world.device, offload=offload, compiled=compiled)
        return TorchEngine(cfg.train, transformer, world)
    prepare_blocks(
        with_engine(cfg, kind),
        transformer,
        world.device,
        compiled=compiled,
        arriving_bytes=_arriving_bytes(kind, cfg, transformer),
    )
    if kind == "deepspeed":
        return DeepSpeedEngine(cfg, transformer, world)
    return TorchEngine(cfg.train, transformer, world)


def _arriving_bytes(kind: str, cfg: Config, transformer: nn.Module) -> int:
    """What a step will yet bring to this GPU: of a sharded base, two blocks gathered whole."""
    if kind in ("plain", "ddp") or cfg.parallel.zero_stage == 2:
        return 0
    block = transformer.blocks[0].parameters()
    return 2 * sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in block)


def build_optimizer(train: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with its rate at zero; the loop sets the rate of every step."""
    options = {"lr": 0.0, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


class TorchEngine:
    """plain, ddp and fsdp: adapters and optimizer whole on every process."""

    def __init__(self, train: TrainConfig, transformer: nn.Module, world: World) -> None:
        self.transformer = transformer
        self._train, self._world = train, world
        self.own_finite = torch.tensor(False)
        """Whether this process's own gradients were finite in the last step; looked at only where
        the norm was not, for which one process alone is always at fault."""
        self._parameters = lora_parameters(transformer)
        self._optimizer = build_optimizer(train, list(self._parameters.values()))

    def backward(self, loss: Tensor) -> None:
        """Add one microstep's gradient; of a loss that is not finite none is. The part of the clip
        that is here counts as the whole in the mean over processes."""
        share = self._world.context / self._train.gradient_accumulation
        (poisoned(loss) * share).backward()

    def step(self, lr: float) -> Tensor:
        """Average, clip and apply the gradients; returns their norm before clipping, ().

        Where that is not finite, on all processes alike, nothing is applied.
        """
        gradients = [p.grad for p in self._parameters.values()]
        if self._world.size > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            self.own_finite = flat.isfinite().all()
            for gradient, mean in zip(
                gradients,
                self._world.mean(flat).split([g.numel() for g in gradients]),
                strict=True,
            ):
                gradient.copy_(mean.view_as(gradient))
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._train.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if torch.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def lora_state(self) -> dict[str, Tensor]:
        """The adapters, float32, whole; valid until the next step."""
        return {name: p.detach() for name, p in self._parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """What the optimizer remembers, as tensors `position.key`; valid until the next step."""
        return pack_optimizer(self._optimizer, list(self._parameters.values()))

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `optimizer_state` gave."""
        unpack_optimizer(self._optimizer, list(self._parameters.values()), state)

    def close(self) -> None:
        """Nothing outlives the model."""


class DeepSpeedEngine:
    """ZeRO: base, adapters and optimizer sharded by DeepSpeed."""

    def __init__(self, cfg: Config, transformer: nn.Module, world: World) -> None:
        import deepspeed

        # A block is gathered whole: its inner modules then bear no hooks, which would stand in the
        # way of compilation and cost a collective each.
        deepspeed.utils.set_z3_leaf_modules(transformer, [type(transformer.blocks[0])])
        optimizer = build_optimizer(cfg.train, list(lora_parameters(transformer).values()))
        self._engine, _, _, _ = deepspeed.initialize(
            model=transformer, optimizer=optimizer, config=deepspeed_config(cfg, world)
        )
        self.transformer, self._world = self._engine, world
        self._cut = optimizer_cut(cfg, world.size) is not None
        self._parameters = lora_parameters(transformer)
        if hasattr(self._engine.optimizer, "leaf_parameters"):  # stage 3
            self._reduce_when_accumulated()
        self._begins = True  # the next backward is a step's first

    def backward(self, loss: Tensor) -> None:
        """Add one microstep's gradient; the last one's backward averages over the processes."""
        if self._begins:
            self.own_finite = torch.ones_like(loss, dtype=torch.bool)
        self._begins = False
        self.own_finite &= loss.isfinite()
        self._engine.backward(poisoned(loss) * self._world.context)  # as in TorchEngine
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, lr: float) -> Tensor:
        """As TorchEngine.step; ZeRO itself leaves an update out whose norm is not finite."""
        self._begins = True
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def lora_state(self) -> dict[str, Tensor]:
        """As TorchEngine.lora_state; every process must call it."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self._parameters.values())):
            return {name: p.detach().clone() for name, p in self._parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """As TorchEngine.optimizer_state, or all processes' parts of it where it is cut; every
        process must call it."""
        zero, device = self._engine.optimizer, self._world.device
        if self._cut:
            return all_parts(pack_optimizer(zero.optimizer, partitions(zero)), device)
        return whole_state(zero, list(self._parameters.values()), device)

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `optimizer_state` gave."""
        zero = self._engine.optimizer
        if self._cut:
            unpack_optimizer(zero.optimizer, partitions(zero), own_part(state))
        else:
            take_up_whole(zero, list(self._parameters.values()), state)

    def close(self) -> None:
        """Take DeepSpeed's hooks and buffers down, so that memory can be freed."""
        self._engine.destroy()

    def _reduce_when_accumulated(self) -> None:
        """Reduce an adapter's gradient when it is whole. DeepSpeed reduces those of a block that is
        gathered whole after each of its backward passes, of which a step may hold several, and of
        the first block, whose inputs need no gradient, before there are any."""
        zero = self._engine.optimizer
        for hook in zero._leaf_module_hooks:
            hook.remove()
        zero._leaf_module_hooks.clear()
        for parameter in self._parameters.values():
            del parameter.ds_z3_leaf_module
        zero.create_reduce_and_remove_grad_hooks()


Engine = TorchEngine | DeepSpeedEngine


def deepspeed_config(cfg: Config, world: World) -> dict[str, Any]:
    """The DeepSpeed configuration that follows from ours, `parallel.deepspeed` laid over it.

    No `bf16` section: the base is loaded in its number format and the adapters are fp32; DeepSpeed
    would cast both, and Wan's fp32 modules with them.
    """
    train = cfg.train
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "train_batch_size": train.batch_size * train.gradient_accumulation * world.size,
        "gradient_clipping": train.max_grad_norm,
        # Its own linear function saves weights less often, which blocks gathered whole have no need
        # of, and loses gradients where torch 2.11 compiles it.
        "zero_optimization": {
            "stage": cfg.parallel.zero_stage or 3,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": train.max_steps + 1,
    }
    return _laid_over(derived, cfg.parallel.deepspeed)


def _laid_over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def poisoned(loss: Tensor) -> Tensor:
    """The loss; one that is not finite gives NaN to every gradient, so that the norm tells of it.

    Nothing here waits for the device, and a finite loss is as it was to the bit.
    """
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


def pack_optimizer(optimizer: torch.optim.Optimizer, parameters: list[Any]) -> dict[str, Tensor]:
    """Optimizer state as flat named tensors, `position.key`; some share storage, none is copied."""
    packed = {}
    for position, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            # bitsandbytes counts its steps in a Python int
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
            packed[f"{position}.{key}"] = tensor.detach()
    return packed


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, parameters: list[Any], packed: dict[str, Tensor]
) -> None:
    """Put back what `pack_optimizer` took, on the same parameters in the same order."""
    for name, tensor in packed.items():
        position, _, key = name.partition(".")
        parameter = parameters[int(position)]
        if key == "step":
            # torch keeps its step count on the CPU
            value = tensor.item() if tensor.dtype == torch.int64 else tensor.clone()
        else:
            value = tensor.to(parameter.device)
        optimizer.state[parameter][key] = value
