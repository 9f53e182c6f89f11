"""Swin: a Transformer for pictures whose tokens look at their neighbours only (Liu et al. 2021).

ViT lets every patch look at all others, which for twice the picture's side is sixteen times the work. Here patches look at
those of their window of 7 x 7, and the work grows with the picture's area. So that what windows know spreads, every second
block has them shifted by half a window. Between stages 2 x 2 patches are merged into one of twice the width, as in a
convolutional network: what comes out are maps of several strides.

    shifted windows      the picture is rolled, cut into windows as before, and rolled back: those at the edge hold parts of
                         opposite sides, and a mask keeps these from looking at each other
    relative position    windows have no positions: each head adds a learned number to a score, by how far down and to the
                         right the key is from the query

With copied weights equal to torchvision's `swin_t`, `swin_s` and `swin_b`; names are theirs, so their files fit. As there, a
picture that windows do not divide is padded with zeros, which are looked at, too.

Shapes: B batch, C channels, H, W height and width, in patches behind the first layer, D width, h heads, d = D / h, M side of
a window, N = M * M, G windows of a picture, K classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from lit_models.convnet import ConvNet
from runner.errors import InputError

ARCHITECTURES = {  # width, depths, heads: torchvision's name
    (96, (2, 2, 6, 2), (3, 6, 12, 24)): "swin_t",
    (96, (2, 2, 18, 2), (3, 6, 12, 24)): "swin_s",
    (128, (2, 2, 18, 2), (4, 8, 16, 32)): "swin_b",
}


def to_windows(x: Tensor, side: int) -> Tensor:
    """Cut x (B, H, W, ...) into windows (B, G, N, ...), row by row; the side divides H and W."""
    B, H, W = x.shape[:3]
    x = x.unflatten(2, (W // side, side)).unflatten(1, (H // side, side))  # (B, H / M, M, W / M, M, ...)
    return x.transpose(2, 3).reshape(B, -1, side * side, *x.shape[5:])


def from_windows(x: Tensor, height: int, width: int) -> Tensor:
    """Put windows (B, G, N, D) together again: (B, H, W, D)."""
    B, _, N, D = x.shape
    side = round(N**0.5)
    x = x.view(B, height // side, width // side, side, side, D)
    return x.transpose(2, 3).reshape(B, height, width, D)


def relative_positions(side: int) -> Tensor:
    """Return the row of the table of biases (N * N,) for each pair of query and key, queries first.

    The table has a row for each of the (2M - 1)^2 ways that two places of a window can be apart.
    """
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    down = y.flatten()[:, None] - y.flatten() + side - 1  # (N, N), from 0 to 2M - 2
    right = x.flatten()[:, None] - x.flatten() + side - 1
    return (down * (2 * side - 1) + right).flatten()


def strangers(height: int, width: int, side: int, shift: tuple[int, int], device: torch.device) -> Tensor:
    """Return which pairs in the windows of a rolled picture are not neighbours in it: (G, N, N) bool.

    Of what was rolled from the upper edge to the lower, and from the left to the right, each is strange to the rest.
    """
    lower = torch.arange(height, device=device) >= height - shift[0]  # (H,)
    right = torch.arange(width, device=device) >= width - shift[1]  # (W,)
    part = to_windows((2 * lower[:, None].int() + right)[None], side)[0]  # (H, W) -> (G, N)
    return part[:, :, None] != part[:, None]


class WindowAttention(nn.Module):
    """Multi-head attention within windows: (B, H, W, D) to (B, H, W, D).

    Args:
        width: D.
        heads: h, a divisor of D.
        window: M.
        shift: how far windows are moved down and to the right. A picture of one window's height or width is not shifted
            in that direction: all see each other as it is.

    Raises:
        InputError: the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, window: int, shift: int):
        if width < 1 or heads < 1 or width % heads:
            raise InputError(f"heads: {heads} do not divide the width, {width}")
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(window))

    def forward(self, x: Tensor) -> Tensor:
        """Let each place look at those of its window."""
        M, (H, W) = self.window, x.shape[1:3]
        down, right = -H % M, -W % M
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        padded = H + down, W + right
        shift = tuple(self.shift * (n > M) for n in padded)
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
        x = self.look(to_windows(x, M), padded, shift)  # (B, G, N, D)
        x = from_windows(x, *padded)
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        return x[:, :H, :W]

    def look(self, x: Tensor, size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
        """Return what the places of windows (B, G, N, D) find in them; the windows are of a picture of `size`, shifted."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # each (B, G, h, N, d)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, G, h, N, N)
        bias = self.relative_position_bias_table[self.relative_position_index]  # (N * N, h)
        bias = bias.view(*scores.shape[-2:], -1).permute(2, 0, 1)  # (h, N, N)
        if any(shift):  # none sees nobody: a place is no stranger to itself
            apart = strangers(*size, self.window, shift, x.device)
            bias = bias.masked_fill(apart[:, None], float("-inf"))  # (G, h, N, N)
        found = (scores + bias).softmax(dim=-1) @ v  # (B, G, h, N, d)
        return self.proj(found.transpose(2, 3).flatten(-2))  # (B, G, N, h, d) -> (B, G, N, D)


class SwinBlock(nn.Module):
    """Window attention, MLP, each behind a norm, and added: (B, H, W, D) to (B, H, W, D).

    Args:
        width, heads, window, shift: arguments of `WindowAttention`.
        drop: the share of the batch's pictures for which a step is left out in training (stochastic depth, Huang et al.
            2016); the others' is larger instead.
        mlp_ratio: the hidden layer's width, in D.
    """

    def __init__(self, width: int, heads: int, window: int, shift: int, drop: float = 0.0, mlp_ratio: float = 4.0):
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, shift)
        self.stochastic_depth = StochasticDepth(drop, "row")
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(  # the Identity stands where torchvision has a dropout, and so names fit
            nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Let places look at each other, and each think by itself."""
        x = x + self.stochastic_depth(self.attn(self.norm1(x)))
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Make one place of 2 x 2: (B, H, W, D) to (B, H / 2, W / 2, 2D), rounded up."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Put the four side by side, column by column, and mix them; an odd edge gets zeros beside it."""
        H, W = x.shape[1:3]
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H / 2, 2, W / 2, 2, D)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H / 2, W / 2, 4D)
        return self.reduction(self.norm(x)).to(x.dtype)  # not autocast's: see `Swin`


class Patches(nn.Sequential):
    """Cut images (B, C, H, W) into patches, and map each to D numbers: (B, H / patch, W / patch, D).

    Pixels behind the last whole patch are not looked at. Children have torchvision's names, which counts a permutation.
    """

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__(
            nn.Conv2d(channels, width, kernel_size=patch, stride=patch), nn.Identity(), nn.LayerNorm(width)
        )
        self.patch = patch

    def forward(self, images: Tensor) -> Tensor:
        """Map images to patches.

        Raises:
            InputError: they are smaller than a patch.
        """
        if min(images.shape[2:]) < self.patch:
            raise InputError(f"pictures of {tuple(images.shape[2:])} pixels are smaller than a patch of {self.patch}")
        x = self[0](images).permute(0, 2, 3, 1)  # (B, D, H, W) -> (B, H, W, D)
        return self[2](x.to(self[2].weight.dtype))  # not autocast's: see `Swin`


class Swin(ConvNet):
    """Swin Transformer; by default torchvision's `swin_t`.

    Under autocast what goes from block to block stays float32, as it does on a GPU by itself. On a CPU norms would be given
    bfloat16, and torch 2.15 then sums their gradients in bfloat16: of 25,000 places a fifth of the sum was left.

    Weights begin as the authors', N(0, 0.02^2) where the last stage is 768 wide, as it is in `swin_t`. At another width D the
    0.02 changes by sqrt(768 / D), so that sums over D inputs are as large: with 0.02, narrow networks begin too small.

    Args:
        num_classes: K.
        channels: C.
        patch: side of a patch, in pixels. Windows are of patches: with 28 x 28 pixels and patches of 2, the first stage has
            14 x 14, of 2 x 2 windows; with patches of 4 it has 7 x 7, a single window, and nothing to shift.
        width: D of the first stage; each has twice that of the one before.
        depths: blocks of each stage; every second one has shifted windows.
        heads: of each stage.
        window: M.
        mlp_ratio: width of the MLPs' hidden layers, in D.
        stochastic_depth: the share of pictures for which the last block is left out in training; earlier ones' are smaller,
            in a straight line from 0.
        convnet: arguments of `ConvNet`. Weight decay, if the optimiser has any, is of matrices only: not of norms, of biases,
            and of the tables of relative positions, as the authors have it.

    Raises:
        InputError: a size is below 1, or the heads do not divide a stage's width.
    """

    heads = ("head",)

    def __init__(
        self,
        num_classes: int = 1000,
        channels: int = 3,
        patch: int = 4,
        width: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4.0,
        stochastic_depth: float = 0.2,
        **convnet,
    ):
        super().__init__(num_classes=num_classes, **convnet)
        depths, heads = tuple(depths), tuple(heads)
        if not depths or len(depths) != len(heads):
            raise InputError(f"depths {list(depths)} and heads {list(heads)}: one of each for every stage")
        if min(channels, patch, width, window, *depths) < 1 or mlp_ratio * width < 1:
            raise InputError("channels, patch, width, depths, window and the MLPs' width start at 1")
        if not 0 <= stochastic_depth < 1:
            raise InputError(f"stochastic_depth: a share from 0 to below 1, got {stochastic_depth}")
        drops = iter([stochastic_depth * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        layers = [Patches(channels, width, patch)]
        for stage, (depth, h) in enumerate(zip(depths, heads, strict=True)):
            D = width * 2**stage
            if stage:
                layers.append(PatchMerging(D // 2))
            layers.append(
                nn.Sequential(
                    *(SwinBlock(D, h, window, i % 2 * (window // 2), next(drops), mlp_ratio) for i in range(depth))
                )
            )
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, num_classes)
        std = 0.02 * math.sqrt(768 / D)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        is_theirs = (channels, patch, window, mlp_ratio) == (3, 4, 7, 4.0)
        self.load_weights(ARCHITECTURES.get((width, depths, heads)) if is_theirs else None)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K).

        Raises:
            InputError: they are smaller than a patch.
        """
        x = self.norm(self.features(images))  # (B, H, W, D) of the last stage
        return self.head(x.mean(dim=(1, 2)))  # (B, D) -> (B, K)

    def parameter_groups(self) -> list[dict]:
        """Norms, biases and the tables of relative positions have no weight decay."""
        named = list(self.named_parameters())
        decays = [p.ndim > 1 and not name.endswith("relative_position_bias_table") for name, p in named]
        matrices = [p for (_, p), yes in zip(named, decays, strict=True) if yes]
        rest = [p for (_, p), yes in zip(named, decays, strict=True) if not yes]
        return [{"params": matrices, "name": "matrices"}, {"params": rest, "name": "vectors", "weight_decay": 0.0}]
