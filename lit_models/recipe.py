"""What lets networks of patches learn from few pictures: mixed pictures, steps left out by chance, decay of matrices only.

A convolution knows from the start that near pixels belong together, and that a thing is the same thing elsewhere. A vision
transformer has to learn it, and learns the training pictures by heart instead, if it is let. The rest of the recipe (Touvron
et al. 2021, table 9) is in the YAML: label smoothing (`label_smoothing`), warm-up and cosine (`lr_scheduler`), RandAugment
(`datamodules.cifar10.RandAugmentCIFAR10`), averaged weights (`callbacks.averaged_weights.AveragedWeights` among
`trainer.callbacks`).

Shapes: B batch, C channels, H height, W width, K classes.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.convnet import ConvNet
from runner.errors import InputError


class PatchNet(ConvNet):
    """A classifier that sees a picture as patches. (From `ConvNet` it has weights trained elsewhere, and compilation.)

    With mixed pictures `train/acc` counts a picture right if the prediction is the first one's class.

    Args:
        num_classes: K.
        mixup: alpha of the Beta distribution that two pictures' shares are drawn from (Zhang et al. 2018); 0: none.
        cutmix: the same, of the share of a picture that a piece of another one covers (Yun et al. 2019); 0: none. With
            both, each batch has one of them, by chance.
        convnet: arguments of `ConvNet`.

    Raises:
        InputError: an alpha is below 0; or pictures are to be mixed, but the loss takes no mixed labels.
    """

    heads = ("head",)

    def __init__(self, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0, **convnet):
        super().__init__(num_classes=num_classes, **convnet)
        if min(mixup, cutmix) < 0:
            raise InputError(f"mixup and cutmix are 0 (none) or more, got {mixup} and {cutmix}")
        self.mixing = None
        if mixup or cutmix:
            if self.loss_name != "cross_entropy":
                raise InputError(
                    f"mixup and cutmix mix labels, too, for which loss must be cross_entropy, got {self.loss_name}"
                )
            from torchvision.transforms import v2  # a second to import: only if it is needed

            alphas = {v2.MixUp: mixup, v2.CutMix: cutmix}
            kinds = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in alphas.items() if alpha]
            # drawn from the global generator, which `EpochSeeding` seeds
            self.mixing = v2.RandomChoice(kinds) if len(kinds) > 1 else kinds[0]

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images (B, C, H, W) and labels (B,), if that is asked for: the labels are then shares (B, K)."""
        return self.mixing(images, labels) if self.mixing else (images, labels)

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Classifier`, of mixed pictures."""
        if not self.mixing:
            return super().training_loss(images, labels)
        images, shares = self.mix(images, labels)
        logits = self(images)
        return F.cross_entropy(logits, shares, label_smoothing=self.label_smoothing), logits

    def parameter_groups(self) -> list[dict]:
        """Only matrices have weight decay: no norms, biases, positions or tokens."""
        decays = {True: [], False: []}
        for name, parameter in self.named_parameters():
            decays[parameter.ndim > 1 and not name.endswith(("positions", "token"))].append(parameter)
        return [
            {"params": decays[True], "name": "matrices"},
            {"params": decays[False], "name": "others", "weight_decay": 0.0},
        ]


class StepDropout(nn.Module):
    """Dropout of what a step found, and stochastic depth (Huang et al. 2016): by chance a picture's step is left out whole.

    Args:
        dropout: share of numbers set to zero in training.
        leave_out: share of pictures whose step is left out in training; the others' result grows to make up for it.
    """

    def __init__(self, dropout: float, leave_out: float):
        super().__init__()
        from torchvision.ops import StochasticDepth

        self.dropout, self.depth = nn.Dropout(dropout), StochasticDepth(leave_out, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.depth(self.dropout(x))


def add_stochastic_depth(blocks: Sequence[nn.Module], most: float) -> None:
    """Let blocks leave out their steps by chance, from never in the first to a share of `most` in the last.

    Args:
        blocks: each has a `dropout`, which a step's result passes before it is added.
        most: 0 changes nothing.

    Raises:
        InputError: it is no share below 1.
    """
    if not 0 <= most < 1:
        raise InputError(f"stochastic_depth: a share from 0 to below 1, got {most}")
    for i, block in enumerate(blocks):
        if share := most * i / max(1, len(blocks) - 1):
            block.dropout = StepDropout(block.dropout.p, share)


def patch_grid(image_size: int, patch: int) -> int:
    """Return how many patches there are in a row and in a column of a square picture.

    Raises:
        InputError: they do not fill it.
    """
    if patch < 1 or image_size < patch or image_size % patch:
        raise InputError(f"image_size: patches of {patch} pixels do not fill pictures of {image_size}")
    return image_size // patch


def check_patches(images: Tensor, patches: nn.Conv2d) -> None:
    """Raise InputError if pictures (B, C, H, W) have other channels than the patches, or are not filled by them."""
    (_, c, h, w), size = images.shape, patches.kernel_size[0]
    if c != patches.in_channels:
        raise InputError(
            f"pictures of {c} channels, and the network's patches have {patches.in_channels}: --model.channels {c}"
        )
    if h % size or w % size or not h or not w:
        raise InputError(
            f"patches of {size} pixels do not fill pictures of {h} x {w}: choose sizes that {size} divides"
        )


def initialise_patches(patches: nn.Conv2d) -> None:
    """Draw the weights as the linear layer's that it is: N(0, 1 / inputs), cut off at two standard deviations."""
    inputs = patches.in_channels * patches.kernel_size[0] ** 2
    nn.init.trunc_normal_(patches.weight, std=inputs**-0.5)
    nn.init.zeros_(patches.bias)


def initialise_mlp(mlp: nn.Module) -> None:
    """Draw an MLP's matrices as Glorot and Bengio 2010 do; biases begin next to nothing."""
    for layer in mlp.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
