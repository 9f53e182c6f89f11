"""What the convolutional networks share: weights trained elsewhere, the memory format, compilation."""

import warnings

import torch
from torch import Tensor, nn

from lit_models.pretrained import load_pretrained
from lit_models.tasks import Classifier
from runner.errors import InputError, one_line


class ConvNet(Classifier):
    """A classifier of pictures: most have `features`, from images (B, C, H, W) to maps (B, D, h, w), and a head.

    Args:
        num_classes: K.
        weights: torchvision's (`IMAGENET1K_V1`), or a file: see `load_pretrained`. With another number of classes than
            theirs the last layer begins anew. None: all begins anew.
        channels_last: whether to keep a pixel's channels side by side in memory, which convolutions are faster with.
        compile: whether to compile the network with `torch.compile`; where that does not work (for want of a C++
            compiler), a warning says so, and it runs as it is.
        task: arguments of `Classifier`.
    """

    heads: tuple[str, ...]  # names of the layers whose size depends on K

    def __init__(
        self,
        num_classes: int,
        weights: str | list[str] | None = None,
        channels_last: bool = False,
        compile: bool = False,
        **task,
    ):
        super().__init__(num_classes=num_classes, **task)
        self.weights, self.channels_last, self.is_to_compile = weights, channels_last, compile

    def load_weights(self, architecture: str | None) -> None:
        """Load `weights`, now that the network is made; `architecture` is torchvision's name for it, if it has one."""
        self.pretrained = load_pretrained(self, self.weights, architecture, "features.", self.heads)

    def setup(self, stage: str) -> None:
        """Set the memory format, and compile."""
        super().setup(stage)
        if self.channels_last and can_be_channels_last(self, self.trainer.strategy.root_device):
            self.to(memory_format=torch.channels_last)  # the first convolution turns its images to it, too
        if self.is_to_compile and self._compiled_call_impl is None and can_compile(self.trainer.strategy.root_device):
            self.compile(dynamic=False)  # a graph for each batch size: there are few, and each is fast

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss.

        Raises:
            InputError: a batch of one leaves batch norm a single value a channel, which has no variance.
        """
        try:
            return super().training_step(batch, batch_idx)
        except (ValueError, RuntimeError) as error:  # the latter, if compiled
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"{type(self).__name__} cannot be trained on a batch of one picture of {tuple(batch[0].shape[2:])}: its last "
                "maps are of one pixel, and batch norm cannot take the variance of a single value: choose a batch_size that "
                "leaves no batch of one, or larger pictures"
            ) from error


def initialise(network: nn.Module) -> None:
    """Draw the convolutions' weights as He et al. 2015 do for ReLU, from the maps that come out; biases begin at 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def can_be_channels_last(network: nn.Module, device: torch.device) -> bool:
    """Return whether no layer of the network writes past its memory if its channels lie side by side.

    On a CPU the backward pass of a 1 x 1 convolution with a stride does, with fewer than 16 channels and an odd batch:
    torch 2.15 dies of it (a segmentation fault, or "corrupted size vs. prev_size"). A warning names the layer.
    """
    for name, layer in network.named_modules():
        strides = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride != (1, 1)
        if strides and layer.in_channels < 16 and device.type == "cpu":
            warnings.warn(
                f"without channels_last: {name} has a stride, and takes {layer.in_channels} channels; with fewer than 16 "
                "such a layer can crash on a CPU",
                stacklevel=2,
            )
            return False
    return True


def can_compile(device: torch.device) -> bool:
    """Return whether `torch.compile` works here; a warning says why not."""
    try:
        torch.compile(torch.relu_, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds
        warnings.warn(f"not compiled, so it runs as it is: {one_line(error)[:160]}", stacklevel=2)
        return False
    print("compiling the network, which takes a minute or more the first time", flush=True)
    return True
