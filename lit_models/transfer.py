"""Transfer learning: a backbone that was trained elsewhere, and a new linear layer on its features.

Shapes: B batch, C channels, H height, W width, D features, K classes.

Source: PyTorch's tutorial "Transfer learning for computer vision"; Yosinski et al. 2014.
"""

import math

import torch
from pytorch_lightning.callbacks import BaseFinetuning
from torch import Tensor, nn

from callbacks.heat_maps import HeatMapPictures
from lit_models.convnet import ConvNet
from lit_models.pretrained import load_pretrained
from runner.errors import InputError, did_you_mean


class Transfer(ConvNet):
    """A classifier made of a backbone, from images (B, C, H, W) to features (B, D), and a head, from these to logits.

    What is frozen is left out of the optimiser, and stays in evaluation mode while the rest trains: its batch norms keep
    the means and variances they came with.

    Args:
        num_classes: K.
        backbone: torchvision's name of a classifier (`mobilenet_v2`), which is taken without its last linear layer; or a
            network of ours, `{class_path: lit_models.resnet.ResNetFeatures}`, whose maps are averaged.
        freeze: `all` of the backbone; `up_to:<layer>`, that layer and all before it; or `none`.
        unfreeze_at: the epoch, from 0, at whose start what is frozen is set free; None: never.
        backbone_lr: learning rate of the backbone, as a share of the head's.
        precompute: whether to compute the features of a wholly frozen backbone once, not once an epoch, where the data
            has no random augmentation.
        convnet: arguments of `ConvNet`; `weights` are the backbone's, with torchvision's names, or our own checkpoint.
    """

    pictures = HeatMapPictures

    def __init__(
        self,
        num_classes: int,
        backbone: str | nn.Module = "mobilenet_v2",
        freeze: str = "all",
        unfreeze_at: int | None = None,
        backbone_lr: float = 0.1,
        precompute: bool = True,
        **convnet,
    ):
        super().__init__(num_classes=num_classes, **convnet)
        if unfreeze_at is not None and unfreeze_at < 1:
            raise InputError(f"unfreeze_at: epochs count from 0, so the first to set free at is 1, got {unfreeze_at}")
        if not backbone_lr > 0:
            raise InputError(
                f"backbone_lr must be above 0, got {backbone_lr}; to keep the backbone as it is: freeze: all"
            )
        if freeze == "none" and unfreeze_at is not None:
            raise InputError(f"unfreeze_at {unfreeze_at}: with freeze none there is nothing to set free")
        if isinstance(backbone, str):
            if self.weights is None and freeze != "none":
                raise InputError(f"{backbone} would stay as it was drawn by chance: give it weights, or freeze: none")
            self.backbone, width, last = without_last_layer(backbone, transform_input=self.weights is not None)
            heads = (last, "aux1", "aux2", "AuxLogits")  # that these networks have in training, and here not
            self.pretrained = load_pretrained(self.backbone, self.weights, backbone, heads=heads)
        else:
            self.backbone, width = backbone, backbone.out_channels
            ours = {
                "heads": ("fc", "classifier", "aux1", "aux2"),
                "rename": lambda name: name.removeprefix("features."),
            }
            self.pretrained = load_pretrained(self.backbone, self.weights, None, **ours)
        self.head = nn.Linear(width, num_classes)
        self.unfreeze_at, self.backbone_lr, self.precompute = unfreeze_at, backbone_lr, precompute
        self.is_whole = freeze == "all" and unfreeze_at is None  # frozen from the first to the last epoch
        self.frozen = layers_up_to(self.backbone, freeze)
        self.set_frozen(True)

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to features (B, D)."""
        x = self.backbone(images)
        return x.mean(dim=(2, 3)) if x.ndim == 4 else x  # (B, D, h, w) -> (B, D)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W), or their features (B, D), to logits (B, K)."""
        return self.head(images if images.ndim == 2 else self.features(images))

    # -- what is frozen ----------------------------------------------------------------------------------------------

    def set_frozen(self, is_frozen: bool) -> None:
        """Freeze what `freeze` names, or set it free."""
        self.is_frozen = is_frozen
        for layer in self.frozen:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad = not is_frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> "Transfer":
        """Set the mode, also when Lightning does: but what is frozen stays in evaluation mode."""
        super().train(mode)
        for layer in self.frozen if self.is_frozen else ():
            layer.training = False  # its own: a container may have layers that are not frozen
        return self

    def configure_callbacks(self) -> list[BaseFinetuning]:
        """Return the callback that sets free, if that is asked for."""
        return [] if self.unfreeze_at is None else [Unfreeze(self.unfreeze_at)]

    # -- how it is trained -------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict]:
        """The head's parameters, and those of the backbone that are ever trained, at their share of its learning rate."""
        frozen = {id(p) for layer in self.frozen for p in layer.parameters(recurse=False)}
        stays = frozen if self.unfreeze_at is None else set()
        head = {"params": list(self.head.parameters()), "name": "head"}
        backbone = [p for p in self.backbone.parameters() if id(p) not in stays]
        if not backbone:
            return [head]
        lr = self.backbone_lr * self.optimizer_defaults()["lr"]
        return [head, {"params": backbone, "name": "backbone", "lr": lr}]

    def configure_optimizers(self):
        """Make them.

        Raises:
            InputError: the scheduler sets the same learning rate for head and backbone.
        """
        made = super().configure_optimizers()
        if isinstance(made, dict):
            rates = [group.get("initial_lr", group["lr"]) for group in made["optimizer"].param_groups]
            if len(rates) == 2 and not math.isclose(rates[1], self.backbone_lr * rates[0], rel_tol=1e-6):
                name = type(made["lr_scheduler"]["scheduler"]).__name__
                raise InputError(
                    f"lr_scheduler: {name} sets rates of its own, and the backbone's is not {self.backbone_lr} of the head's: "
                    "give it a list of two, the head's first"
                )
        return made

    def on_fit_start(self) -> None:
        """Compute the features once, if they will always be the same; a resumed run's weights are here by now."""
        data = self.trainer.datamodule
        if self.precompute and self.is_whole and getattr(data, "is_random", True) is False:
            with self.trainer.precision_plugin.forward_context():
                data.precompute(self.features, self.device, self.dtype)


class Unfreeze(BaseFinetuning):
    """Sets the model's frozen layers free at the start of an epoch.

    The optimiser has held their parameters from the beginning, without gradients: so its groups, and the scheduler's
    learning rates, are the same before and after, and after a resume.

    Args:
        epoch: from 0.
    """

    def __init__(self, epoch: int):
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module: Transfer) -> None:
        """Freeze."""
        pl_module.set_frozen(True)

    def finetune_function(self, pl_module: Transfer, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Set free, at the epoch or, in a run resumed later, after it."""
        if epoch >= self.epoch and pl_module.is_frozen:
            pl_module.set_frozen(False)


def without_last_layer(name: str, transform_input: bool = False) -> tuple[nn.Module, int, str]:
    """Return torchvision's classifier of that name without its last linear layer, its features D, and that layer's name.

    Args:
        name: as `torchvision.models.list_models` gives it.
        transform_input: of GoogLeNet and Inception, whose weights want pictures in [-1, 1].

    Raises:
        InputError: there is none, or its last layer is not linear.
    """
    from torchvision import models

    if "." in name:
        raise InputError(f"backbone: a network of ours is given as {{class_path: {name}}}")
    known = models.list_models(module=models)
    if name not in known:
        raise InputError(f"backbone: torchvision has no classifier {name!r}{did_you_mean(name, known)}")
    extra = {"aux_logits": False, "init_weights": False, "transform_input": transform_input}
    network = models.get_model(name, weights=None, **(extra if name in ("googlenet", "inception_v3") else {}))
    layers = [(layer_name, layer) for layer_name, layer in network.named_modules() if not list(layer.children())]
    with_weights = [(layer_name, layer) for layer_name, layer in layers if list(layer.parameters())]
    last_name, last = with_weights[-1]
    if not isinstance(last, nn.Linear):
        raise InputError(f"backbone: the last layer of {name}, {last_name}, is not linear: choose another network")
    network.set_submodule(last_name, nn.Identity())
    return network, last.in_features, last_name


def layers_up_to(backbone: nn.Module, freeze: str) -> list[nn.Module]:
    """Return the modules that `freeze` (`all`, `none` or `up_to:<layer>`) names, in their order.

    Raises:
        InputError: there is no such layer.
    """
    names, modules = zip(*backbone.named_modules(), strict=True)
    if freeze in ("all", "none"):
        return list(modules) if freeze == "all" else []
    kind, _, layer = freeze.partition(":")
    if kind != "up_to":
        raise InputError(f"freeze: expected all, none or up_to:<layer>, got {freeze!r}")
    if layer not in names or not layer:
        raise InputError(f"freeze: the backbone has no layer {layer!r}{did_you_mean(layer, names[1:])}")
    last = max(i for i, name in enumerate(names) if name == layer or name.startswith(f"{layer}."))
    return list(modules[: last + 1])
