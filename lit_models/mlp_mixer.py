"""MLP-Mixer (Tolstikhin et al. 2021): patches as in a vision transformer, and no attention: MLPs in both directions.

    x = x + MLP over the patches   (each channel by itself: the same place-to-place map for all of them)
    x = x + MLP over the channels  (each patch by itself, as in a Transformer)

What attention works out anew for each picture, how patches mix, is here a learned matrix: so their number is fixed.

Shapes: B batch, C channels, H height, W width, P patch size, T = H / P * W / P patches, D width, K classes.
"""

from torch import Tensor, nn

from lit_models.recipe import (
    PatchNet,
    add_stochastic_depth,
    check_patches,
    initialise_mlp,
    initialise_patches,
    patch_grid,
)
from runner.errors import InputError


class MixerBlock(nn.Module):
    """Mixes patches, then channels: (B, T, D) to (B, T, D).

    Args:
        tokens: T.
        width: D.
        token_hidden: width of the hidden layer of the MLP over the patches.
        channel_hidden: of the one over the channels.
        dropout: share set to zero in training, of each step's result and of the hidden layers.
    """

    def __init__(self, tokens: int, width: int, token_hidden: int, channel_hidden: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.token_mlp = _mlp(tokens, token_hidden, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.channel_mlp = _mlp(width, channel_hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        y = self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)  # (B, T, D) -> (B, D, T) -> (B, T, D)
        x = x + self.dropout(y)
        return x + self.dropout(self.channel_mlp(self.norm2(x)))


def _mlp(width: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))


class MLPMixer(PatchNet):
    """Patches, blocks, the patches' mean, a linear layer. The defaults are Mixer-B/16.

    Args:
        num_classes: K.
        image_size: side of the pictures, in pixels: no others can be mixed.
        patch: P.
        channels: C.
        layers: blocks.
        width: D.
        token_hidden, channel_hidden: widths of the MLPs' hidden layers; None: D / 2 and 4 D, as in the paper.
        dropout: of the blocks.
        stochastic_depth: share of steps left out in training in the last block; see `add_stochastic_depth`.
        patch_net: arguments of `PatchNet`; `weights` are a checkpoint of ours.

    Raises:
        InputError: the patches do not fill the picture, or a size is below 1.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        image_size: int = 224,
        patch: int = 16,
        channels: int = 3,
        layers: int = 12,
        width: int = 768,
        token_hidden: int | None = None,
        channel_hidden: int | None = None,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        **patch_net,
    ):
        super().__init__(num_classes=num_classes, **patch_net)
        token_hidden = width // 2 if token_hidden is None else token_hidden
        channel_hidden = 4 * width if channel_hidden is None else channel_hidden
        sizes = {"layers": layers, "width": width, "token_hidden": token_hidden, "channel_hidden": channel_hidden}
        if small := [name for name, size in sizes.items() if size < 1]:
            raise InputError(f"{small[0]}: at least 1, got {sizes[small[0]]}")
        self.image_size = image_size
        tokens = patch_grid(image_size, patch) ** 2
        self.patches = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.blocks = nn.ModuleList(
            MixerBlock(tokens, width, token_hidden, channel_hidden, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        initialise_patches(self.patches)
        initialise_mlp(self.blocks)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        add_stochastic_depth(self.blocks, stochastic_depth)
        self.load_weights(None)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K).

        Raises:
            InputError: they are not of the size that it mixes.
        """
        check_patches(images, self.patches)
        if tuple(images.shape[2:]) != (self.image_size, self.image_size):
            raise InputError(
                f"the Mixer's patches are those of {self.image_size} x {self.image_size} pixels, and the pictures have "
                f"{images.shape[2]} x {images.shape[3]}: set model.image_size, and train it on such"
            )
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, D, T) -> (B, T, D)
        x = x.to(self.norm.weight.dtype)  # not autocast's: see `Swin`
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))  # (B, T, D) -> (B, D) -> (B, K)
