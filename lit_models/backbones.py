"""Backbones of detectors and segmenters: the maps of a classifier's inner layers.

Shapes: B batch, C channels, H height, W width, D maps.
"""

import warnings
from collections import OrderedDict

import torch
from torch import Tensor, nn

from lit_models.convnet import initialise
from lit_models.pretrained import load_pretrained
from lit_models.resnet import BasicBlock
from runner.errors import InputError, did_you_mean, one_line


class SmallFeatures(nn.Sequential):
    """A residual network for 64 to 256 pixels on a CPU: stage i has maps of 1 / 2^i of the picture's side.

    `stage1` to `stage4`: images (B, C, H, W) to maps (B, D, H / 2^i, W / 2^i); the first is a convolution.

    Args:
        widths: D of each stage.
        channels: C.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128), channels: int = 3):
        stages = OrderedDict()
        for i, width in enumerate(widths, start=1):
            conv = nn.Conv2d(channels, width, kernel_size=3 if i == 1 else 1, stride=2, padding=int(i == 1), bias=False)
            strided = nn.Sequential(conv, nn.BatchNorm2d(width))
            stages[f"stage{i}"] = (
                nn.Sequential(strided, nn.ReLU(inplace=True)) if i == 1 else BasicBlock(channels, width, 2, strided)
            )
            channels = width
        super().__init__(stages)
        initialise(self)


class Backbone(nn.Module):
    """A network's maps at some of its layers; what comes after the last of them is left out.

    Args:
        network: torchvision's name of a classifier (`mobilenet_v2`), or a network of ours,
            `{class_path: lit_models.backbones.SmallFeatures}`.
        layers: names of the layers whose outputs are returned, from large maps to small: `[features.13]`.
        weights: what `load_pretrained` takes; torchvision's, or a checkpoint of ours.
        frozen_norm: whether batch norms keep the means, variances, weights and biases that they came with: for weights
            trained elsewhere, and batches too small to measure them.

    Attributes:
        channels: D of each layer.
        strides: pixels of the picture per pixel of each layer's maps.
    """

    def __init__(
        self,
        network: str | nn.Module,
        layers: list[str],
        weights: str | list[str] | None = None,
        frozen_norm: bool = False,
    ):
        super().__init__()
        from torchvision.models import get_model, list_models
        from torchvision.models.feature_extraction import create_feature_extractor

        weights = None if weights == "None" else weights  # on the command line, jsonargparse makes a nested null this
        architecture = None
        if isinstance(network, str):
            if network not in list_models():
                ours = f"; a network of ours is given as {{class_path: {network}}}" if "." in network else ""
                raise InputError(
                    f"network: torchvision has no {network!r}{ours or did_you_mean(network, list_models())}"
                )
            architecture, network = network, get_model(network, weights=None)
        known = [name for name, _ in network.named_modules()]
        for layer in layers:
            if layer not in known:
                raise InputError(f"layers: the network has no {layer!r}{did_you_mean(layer, known)}")
        if not layers:
            raise InputError("layers: name at least one")
        self.pretrained = load_pretrained(
            network, weights, architecture, heads=("fc", "classifier", "AuxLogits", "aux")
        )
        try:
            with warnings.catch_warnings(action="ignore"):  # that training has other nodes behind the last layer
                self.body = create_feature_extractor(network, {layer: str(i) for i, layer in enumerate(layers)})
        except Exception as error:  # torch.fx raises many kinds for what it cannot follow
            raise InputError(f"layers: {one_line(error)}") from error
        self.norms = [m for m in self.body.modules() if isinstance(m, nn.BatchNorm2d)] if frozen_norm else []
        for norm in self.norms:
            norm.requires_grad_(False)
        self.eval()
        with torch.no_grad():
            maps = self(torch.zeros(1, 3, 256, 256))
        self.train()
        if any(m.ndim != 4 for m in maps):
            raise InputError(f"layers: not all of {', '.join(layers)} have maps (B, D, h, w)")
        self.channels, self.strides = [m.shape[1] for m in maps], [round(256 / m.shape[2]) for m in maps]

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; norms that are frozen stay in evaluation."""
        super().train(mode)
        for norm in self.norms:
            norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (B, C, H, W) to a list of maps (B, D, h, w), one for each layer."""
        return list(self.body(images).values())
