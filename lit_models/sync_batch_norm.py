"""Batch norm over the batch of all processes (`trainer.sync_batchnorm`), on CPUs, too: PyTorch's own is for GPUs only.

Shapes: B batch, D maps, H height, W width.
"""

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins import TorchSyncBatchNorm
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, whose mean and variance in training are those of all processes' maps."""

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, D, H, W) to the same shape."""
        if not self.training:
            return super().forward(maps)
        x = maps.to(torch.promote_types(maps.dtype, torch.float32))
        count = Sum.apply(x.new_tensor(x.numel() / x.shape[1]))
        mean = (Sum.apply(x.sum(dim=(0, 2, 3), dtype=torch.float64)) / count).to(x.dtype)  # (D,)
        x = x - mean[:, None, None]
        variance = (Sum.apply(x.square().sum(dim=(0, 2, 3), dtype=torch.float64)) / count).to(x.dtype)  # (D,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        x = x * ((variance + self.eps).rsqrt() * self.weight)[:, None, None] + self.bias[:, None, None]
        return x.to(maps.dtype)


class Sum(torch.autograd.Function):
    """The sum over all processes; the gradient of each one's part is the sum of their gradients."""

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        """Add up."""
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """Add up."""
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SyncInPlace(TorchSyncBatchNorm):
    """Makes batch norms into synchronised ones where they are; Lightning puts others in their place, which a model that
    keeps a list of them, to freeze them, would not know."""

    def apply(self, model: LightningModule) -> LightningModule:
        """Change the batch norms of two-dimensional maps."""
        on_cpu = model.trainer.strategy.root_device.type == "cpu"
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncBatchNorm2d if on_cpu else nn.SyncBatchNorm
                module.process_group = None
        return model

    def revert(self, model: LightningModule) -> LightningModule:
        """Change them back."""
        for module in model.modules():
            if type(module) in (SyncBatchNorm2d, nn.SyncBatchNorm):
                module.__class__ = nn.BatchNorm2d
        return model
