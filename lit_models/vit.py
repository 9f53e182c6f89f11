"""Vision Transformer: "An image is worth 16x16 words" (Dosovitskiy et al. 2021).

    picture -> patches -> a linear map of each -> + its position -> Transformer encoder -> class token -> linear layer

A picture becomes a sequence of patches, and all else is the Transformer as it is for text. That near patches belong
together, which a convolution has built in, it has to learn from pictures: with few of them a ResNet is better.

Shapes: B batch, C channels, H height, W width, P patch size, h = H / P and w = W / P patches, E more tokens (the class token),
T = E + h w tokens, D width, K classes.

With copied weights equal to torchvision's `vit_b_16`, `vit_b_32`, `vit_l_16`, `vit_l_32`, `vit_h_14`. With dropout there is a
difference: `transformer.py` has it on attention's weights, too, where torchvision has a setting of its own.
"""

import re
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.attention_rollout import AttentionRolloutPictures, roll_out
from lit_models.pretrained import load_pretrained
from lit_models.recipe import (
    PatchNet,
    add_stochastic_depth,
    check_patches,
    initialise_mlp,
    initialise_patches,
    patch_grid,
)
from lit_models.transformer import Encoder
from runner.errors import InputError

NAMES = {  # (patch, layers, heads, width) -> torchvision's name
    (16, 12, 12, 768): "vit_b_16",
    (32, 12, 12, 768): "vit_b_32",
    (16, 24, 16, 1024): "vit_l_16",
    (32, 24, 16, 1024): "vit_l_32",
    (14, 32, 16, 1280): "vit_h_14",
}


class ViT(PatchNet):
    """Patches, positions, encoder, linear layer. The defaults are ViT-B/16.

    Args:
        num_classes: K.
        image_size: side of the pictures that positions are learned for, in pixels; for others they are interpolated.
        patch: P.
        channels: C.
        layers: blocks.
        heads: of attention.
        width: D.
        hidden: width of the MLPs' hidden layer; None: 4 D.
        pool: the classes are read off a class `token`, as in the paper; or off the `mean` of the patches (Beyer et al. 2022).
        dropout: of embeddings and blocks.
        stochastic_depth: share of steps left out in training in the last block; see `add_stochastic_depth`.
        patch_net: arguments of `PatchNet`; `weights` may be of another picture size, or of a checkpoint of ours.

    Raises:
        InputError: the patches do not fill the picture, the heads do not divide the width, or the weights do not fit.
    """

    pictures = AttentionRolloutPictures

    def __init__(
        self,
        num_classes: int = 1000,
        image_size: int = 224,
        patch: int = 16,
        channels: int = 3,
        layers: int = 12,
        heads: int = 12,
        width: int = 768,
        hidden: int | None = None,
        pool: Literal["token", "mean"] = "token",
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        **patch_net,
    ):
        super().__init__(num_classes=num_classes, **patch_net)
        if pool not in ("token", "mean"):
            raise InputError(f"pool: token or mean, got {pool!r}")
        self.grid = patch_grid(image_size, patch)
        self.patches = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if pool == "token" else None
        self.positions = nn.Parameter(0.02 * torch.randn(1, (pool == "token") + self.grid**2, width))
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(layers, width, heads, hidden=hidden, dropout=dropout, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        initialise_patches(self.patches)
        for block in self.encoder.blocks:
            initialise_mlp(block.mlp)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        add_stochastic_depth(self.encoder.blocks, stochastic_depth)
        is_theirs = channels == 3 and hidden in (None, 4 * width) and pool == "token"
        self.load_weights(NAMES.get((patch, layers, heads, width)) if is_theirs else None)

    def tokens(self) -> list[Tensor]:
        """Return the tokens before the patches', each (1, 1, D)."""
        return [] if self.class_token is None else [self.class_token]

    def load_weights(self, architecture: str | None) -> None:
        """Load `weights`, whose names are torchvision's or ours, and whose positions may be of another picture size."""

        def convert(content: dict[str, Tensor]) -> dict[str, Tensor]:
            theirs = OrderedDict((our_name(name), tensor) for name, tensor in content.items())
            positions, extra = theirs.get("positions"), len(self.tokens())
            if positions is not None and positions.ndim == 3 and is_square(positions.shape[1] - extra):
                theirs["positions"] = resize_positions(positions, (self.grid, self.grid), extra)
            return theirs

        self.pretrained = load_pretrained(self, self.weights, architecture, heads=self.heads, convert=convert)

    def embed(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to tokens with their positions (B, T, D).

        Raises:
            InputError: the patches do not fill them.
        """
        check_patches(images, self.patches)
        x = self.patches(images)  # (B, D, h, w)
        grid, tokens = tuple(x.shape[2:]), self.tokens()
        x = x.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, D, h w) -> (B, h w, D)
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1)  # (B, T, D)
        return self.dropout(x + resize_positions(self.positions, grid, len(tokens)))

    def pool(self, x: Tensor) -> Tensor:
        """Map the encoder's tokens (B, T, D) to (B, D)."""
        return x.mean(dim=1) if self.class_token is None else x[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return self.head(self.pool(self.encoder(self.embed(images))))

    def rollout(self, images: Tensor) -> Tensor:
        """Return from which patches (B, h, w) the token came that the class is read off; see `roll_out`."""
        weights: list[Tensor] = []
        self.encoder(self.embed(images), seen=weights)
        rolled, extra = roll_out(weights), len(self.tokens())  # (B, T, T)
        rolled = self.pool(rolled)[:, extra:]  # the class token's row, or the rows' mean: (B, h w)
        return rolled.unflatten(1, (images.shape[2] // self.patches.kernel_size[0], -1))  # (B, h, w)


def resize_positions(positions: Tensor, grid: tuple[int, int], extra: int) -> Tensor:
    """Interpolate positions (1, E + g g, D), learned for g x g patches, to (1, E + h w, D), by cubic splines.

    Args:
        positions: those of the E `extra` tokens first, which stay as they are.
        grid: h, w.
        extra: E.
    """
    side = round((positions.shape[1] - extra) ** 0.5)
    if (side, side) == grid:
        return positions
    tokens, patches = positions[:, :extra], positions[:, extra:]
    patches = patches.transpose(1, 2).unflatten(2, (side, side))  # (1, g g, D) -> (1, D, g g) -> (1, D, g, g)
    patches = F.interpolate(patches, grid, mode="bicubic", align_corners=True)  # as in torchvision
    return torch.cat([tokens, patches.flatten(2).transpose(1, 2)], dim=1)  # (1, D, h, w) -> (1, D, h w) -> (1, h w, D)


def is_square(n: int) -> bool:
    """Return whether so many patches fill a square."""
    return n > 0 and round(n**0.5) ** 2 == n


def our_name(name: str) -> str:
    """Return our name of a parameter of torchvision's VisionTransformer; ours stay as they are."""
    for theirs, ours in (
        (r"^conv_proj\.", "patches."),
        (r"^encoder\.pos_embedding$", "positions"),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"encoder.blocks.\1."),
        (r"\.ln_(\d)\.", r".norm\1."),
        (r"\.self_attention\.", ".attention."),
        (r"\.mlp\.linear_1\.", ".mlp.0."),  # in files from before torchvision 0.14
        (r"\.mlp\.linear_2\.", ".mlp.3."),
        (r"^encoder\.ln\.", "encoder.norm."),
        (r"^heads\.head\.", "head."),
    ):
        name = re.sub(theirs, ours, name)
    return name
