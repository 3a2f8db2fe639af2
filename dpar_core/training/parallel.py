"""One model on one or many processes: gradients averaged (DDP), or everything sharded (FSDP2).

What leaves here is always full tensors by parameter name, so a run may go on with another number of ranks or another
strategy. Every function marked "collective" must be called by all ranks together.
"""

from __future__ import annotations

import inspect
import itertools
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dpar_core.choices import Strategy

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

_MOMENTS = ("exp_avg", "exp_avg_sq")
_FORMS = 32


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, and its device. world > 1 needs an initialised process group."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor; collective."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: Any) -> Any:
        """Return the first rank's value on all ranks; collective."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that sharding, compiling and checkpointing work on: members of lists named `layers`."""
    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "layers"]
    return [block for modules in lists for block in modules]


def checkpoint_activations(model: nn.Module) -> None:
    """Make every block keep its input only and compute the rest again in the backward pass."""
    for block in transformer_blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile every block, and what pools and copies patches; all that are alike share their code.

    Packed rows differ from batch to batch, so the shapes of those modules stay open; the others see the same shape at every
    step and are compiled for it. Only the forward function: what checkpoints activations or gathers sharded weights goes
    around it, uncompiled.
    """
    # One code object serves blocks over T - 1, T and packed rows, with and without dropout and gradients, and the last
    # batch of a validation: more than the 8 forms after which torch gives up and runs it uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _FORMS)
    packed: list[nn.Module] = list(getattr(model, "packed_blocks", ()))
    for block in {*transformer_blocks(model), *packed}:
        block.forward = torch.compile(block.forward, dynamic=block in packed, backend=backend)


def spread(model: nn.Module, strategy: Strategy, ranks: Ranks) -> nn.Module:
    """Return the module whose forward pass runs over all ranks; `model` keeps the (maybe sharded) parameters.

    ddp on one rank is the model itself. fsdp shards every block and the rest (FSDP2) within a node and replicates them
    across nodes. Blocks gather their weights in float32 and autocast rounds them, so that norms, products and sums of
    gradients have the precision they have in ddp.
    """
    if strategy == "fsdp":
        # Imported where it is used, as below: with sympy and all it is 0.4 s of the start of every process.
        from torch.distributed.fsdp import fully_shard

        shape = mesh_shape(ranks)
        names = ("replicate", "shard") if len(shape) == 2 else ("shard",)
        mesh = dist.device_mesh.init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
        for block in transformer_blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    if ranks.world == 1:
        return model
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # Buffers are tables that all ranks compute alike; the option's name changed in torch 2.13.
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"device_ids": devices, "gradient_as_bucket_view": True, sync: False}
    return DistributedDataParallel(model, **options)


def mesh_shape(ranks: Ranks) -> tuple[int, ...]:
    """Return (nodes, ranks per node), or (ranks,) where that is not one mesh of several nodes and ranks; collective."""
    nodes: list[Any] = [None] * ranks.world
    dist.all_gather_object(nodes, platform.node())
    return shape_of_nodes(nodes)


def shape_of_nodes(nodes: Sequence[str]) -> tuple[int, ...]:
    """Return the mesh of ranks whose nodes have these names, rank by rank.

    Sharding stays within a node, whose links are the fast ones, when every node has the same number of consecutive ranks
    and more than one of them; otherwise all ranks shard together.
    """
    runs = [len(list(group)) for _, group in itertools.groupby(nodes)]
    regular = len(runs) == len(set(nodes)) and len(set(runs)) == 1
    if not regular or len(runs) == 1 or runs[0] == 1:
        return (len(nodes),)
    return (len(runs), runs[0])


def gradient_sync(module: nn.Module, *, on: bool) -> AbstractContextManager[None]:
    """Return a context for one micro-batch: gradients travel between ranks only in the last one (`on`)."""
    if _is_sharded(module):
        module.set_requires_gradient_sync(on)
    elif isinstance(module, DistributedDataParallel) and not on:
        return module.no_sync()
    return nullcontext()


def let_go(module: nn.Module) -> None:
    """Give up what a forward pass without a backward pass has gathered of sharded weights."""
    if _is_sharded(module):
        module.reshard()


def _is_sharded(module: nn.Module) -> TypeGuard[FSDPModule]:
    # What FSDP2 wraps became an FSDPModule: without that import there is none.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _is_part(tensor: Tensor) -> TypeGuard[DTensor]:
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def full_model(model: nn.Module) -> dict[str, Tensor]:
    """Return all weights by name, whole, on the CPU; collective. Ranks other than the first get an empty dict."""
    return _gather(dict(model.named_parameters()))


def full_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return AdamW's state as exp_avg/NAME, exp_avg_sq/NAME and step/NAME, whole, on the CPU; collective."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"{key}/{name}": state[key] for key in (*_MOMENTS, "step")}
    return _gather(tensors)


def _gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first = not dist.is_initialized() or dist.get_rank() == 0
    whole = {}
    for name, tensor in tensors.items():
        mine = tensor.detach()
        full = mine.full_tensor() if _is_part(mine) else mine
        if first:
            whole[name] = full.to("cpu")
    return whole


@torch.no_grad()
def load_model(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole weights into a (maybe sharded) model; collective. Raises ValueError when names or shapes differ."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        strangers = sorted(parameters.keys() ^ weights.keys())
        raise ValueError(f"weights do not belong to this model: {len(strangers)} names differ, first {strangers[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(f"{name} is {tuple(parameter.shape)} here and {tuple(weights[name].shape)} in the weights")
        parameter.copy_(_like(parameter, weights[name]))


@torch.no_grad()
def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the whole state that `full_optimizer` returned into a fresh optimizer of a (maybe sharded) model."""
    for name, parameter in model.named_parameters():
        state = {key: _like(parameter, tensors[f"{key}/{name}"]) for key in _MOMENTS}
        step = tensors[f"step/{name}"].to(parameter.device)
        optimizer.state[parameter] = {"step": step, **state}


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    if _is_part(parameter):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.clone()
