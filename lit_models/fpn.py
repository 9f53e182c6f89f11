"""Feature pyramid network: fine maps that know what coarse ones know (Lin et al. 2017).

A classifier's early maps tell where something is, its late ones what it is. Here the late ones are enlarged and added to the
early ones, level by level, so that objects of every size are looked for in maps of their scale.

Shapes: B batch, H height, W width, D maps of every level.
"""

import re
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.backbones import Backbone
from lit_models.pretrained import load_pretrained
from runner.errors import InputError


class FeaturePyramid(Backbone):
    """A backbone made of another: its layers to as many levels of D maps each, and with `extra` one or two coarser ones.

    Args:
        backbone: with a layer for each level, from large maps to small.
        channels: D.
        extra: `pool`: every other place of the coarsest level, for Faster R-CNN's largest anchors. `p6p7`: two levels by
            convolutions of stride 2 of the coarsest level, RetinaNet's; they start from the pyramid's P5, as torchvision's do,
            where the paper's (Lin et al. 2017, "Focal loss") start from the backbone's C5.

    Attributes:
        channels: D of each level.
        strides: pixels of the picture per place of each level.
        levels: how many come from the backbone's layers: all but the extra ones.
        pretrained: the backbone's.
    """

    def __init__(self, backbone: Backbone, channels: int = 256, extra: Literal["none", "pool", "p6p7"] = "none"):
        nn.Module.__init__(self)  # the network is the other's
        if channels < 1:
            raise InputError(f"channels of a FeaturePyramid start at 1, got {channels}")
        self.backbone, self.extra, self.pretrained = backbone, extra, backbone.pretrained
        self.norms = backbone.norms
        self.lateral = nn.ModuleList(nn.Conv2d(d, channels, kernel_size=1) for d in backbone.channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in self.lateral)
        if extra == "p6p7":
            self.p6 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
            self.p7 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d) and not name.startswith("backbone."):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)
        self.levels = len(self.lateral)
        self.strides = [*backbone.strides]
        for _ in range({"none": 0, "pool": 1, "p6p7": 2}[extra]):
            self.strides.append(2 * self.strides[-1])
        self.channels = [channels] * len(self.strides)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) to levels (B, D, H / stride, W / stride), fine to coarse."""
        layers = [conv(layer) for conv, layer in zip(self.lateral, self.backbone(images), strict=True)]  # (B, D, h, w)
        for i in reversed(range(len(layers) - 1)):  # from the top down
            layers[i] = layers[i] + F.interpolate(layers[i + 1], size=layers[i].shape[-2:], mode="nearest")
        levels = [conv(layer) for conv, layer in zip(self.output, layers, strict=True)]
        if self.extra == "pool":
            levels.append(levels[-1][:, :, ::2, ::2])
        if self.extra == "p6p7":
            levels.append(self.p6(levels[-1]))
            levels.append(self.p7(F.relu(levels[-1])))
        return levels


# -- torchvision's detectors with a pyramid ------------------------------------------------------------------------------


def rename(name: str) -> str:
    """Return our name of one in the backbone or the pyramid of torchvision's detectors, whose older files have shorter ones."""
    name = re.sub(r"^backbone\.body\.", "backbone.backbone.body.", name)
    name = re.sub(r"^backbone\.fpn\.inner_blocks\.(\d+)\.(?:0\.)?", r"backbone.lateral.\1.", name)
    name = re.sub(r"^backbone\.fpn\.layer_blocks\.(\d+)\.(?:0\.)?", r"backbone.output.\1.", name)
    return re.sub(r"^backbone\.fpn\.extra_blocks\.", "backbone.", name)


def load_detector(
    model: nn.Module,
    weights: str | list[str] | None,
    architecture: str,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    heads: tuple[str, ...],
    eps: float = 1e-5,
) -> dict | None:
    """Load a whole detector's weights: see `load_pretrained`.

    Args:
        model: to load them into.
        weights: of torchvision (`COCO_V1`), or of ours.
        architecture: torchvision's name of the detector.
        convert: from a state dict of torchvision to one of ours; names of ours it leaves as they are.
        heads: names of last layers: left as they are if the file's are for other classes.
        eps: that torchvision trained frozen norms with, where the weights are its own. No file says it.
    """
    wanted = [weights] if isinstance(weights, str) else weights or []
    if any(name in ("COCO_V1", "DEFAULT") or f"{architecture}_coco" in name for name in wanted):
        for norm in model.backbone.norms:
            norm.eps = eps
    return load_pretrained(model, weights, architecture, heads=heads, convert=convert)
