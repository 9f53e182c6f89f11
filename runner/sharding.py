"""`--trainer.strategy fsdp`: one network divided among processes, none of which keeps all of it (PyTorch's FSDP2).

Each process keeps its part of every parameter, of its gradient, and of what the optimiser remembers of it. The parameters of a
block (a Transformer's, a Swin's or a Mixer's) are gathered when it is about to be computed, forwards and again backwards, and
are let go of after it; those outside of blocks, from the step's beginning to its end. All else is as with DDP, of which this
is a kind: each process has its share of every batch (`callbacks/sharing.py`), and all make the step that one would make.

Checkpoints are files as one process writes and reads them. (With Lightning's own strategies they would not be: and
`FSDPStrategy` refuses CPUs, where `ModelParallelStrategy` leaves it to each model to divide itself.)
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from callbacks.averaged_weights import AveragedWeights
from lit_models.mlp_mixer import MixerBlock
from lit_models.swin import SwinBlock
from lit_models.transformer import Block
from runner.errors import InputError


class ShardingStrategy(DDPStrategy):
    """Lightning's DDP, with the network divided in place of copied."""

    def configure_ddp(self) -> None:
        """Divide the network."""
        model = self.lightning_module
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # in `channels_last` it cannot be divided
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        blocks = [module for module in model.modules() if isinstance(module, Block | SwinBlock | MixerBlock)]
        for part in (*blocks, model):
            fully_shard(part, mesh=mesh)
        for step in ("training_step", "validation_step"):  # some use their layers without a call of `forward`
            register_fsdp_forward_method(model, step)

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Return the weights, as one process would have them."""
        return whole(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimiser's state, as one process would have it."""
        return whole(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over this process's part of the optimisers' states. (The weights were there before they were divided.)"""
        states = checkpoint["optimizer_states"]
        parts = [part(state, optimizer) for state, optimizer in zip(states, self.optimizers, strict=True)]
        super().load_optimizer_state_dict({"optimizer_states": parts})


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with its tensors gathered, in the first process; the others, which write no file, do not keep them."""

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        value = value.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else None

    return tree_map(gather, state)


def part(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimiser's state with this process's part of what has the shape of the parameter that it is about."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def divide(value: Any, like: DTensor) -> Any:
        if not isinstance(value, Tensor) or value.shape != like.shape:
            return value  # such as the number of steps
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    divided = {i: {key: divide(v, parameters[i]) for key, v in values.items()} for i, values in state["state"].items()}
    return {**state, "state": divided}


def check_sharding(model: LightningModule, callbacks: list[Callback], precision: str | int | None) -> None:
    """Check that a model can be trained divided.

    Raises:
        InputError: it cannot.
    """
    cannot = {
        f"{type(model).__name__}, which steps its optimisers itself": not model.automatic_optimization,
        "a compiled network (--model.compile false)": getattr(model, "is_to_compile", False),
        "AveragedWeights, which keeps all weights": any(isinstance(c, AveragedWeights) for c in callbacks),
        "16-mixed, which scales the loss (bf16-mixed does not)": str(precision) in ("16-mixed", "16"),
    }
    if why := [reason for reason, holds in cannot.items() if holds]:
        raise InputError(f"trainer.strategy: fsdp is not for {why[0]}; ddp is")
