"""Which patches a vision transformer's answer came from: attention rollout (Abnar and Zuidema 2020)."""

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from callbacks.pictures import ClassificationPictures, name_picture, new_figure, pixels


class AttentionRolloutPictures(ClassificationPictures):
    """`attention_rollout.png` beside the pictures of every classifier: a few test pictures, wrong ones first, and their maps."""

    count = 8

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        super().on_test_end(trainer, pl_module)
        shown = self.some(self.count, wrong=self.count // 2)
        images = torch.stack([image for image, _, _ in shown]).to(pl_module.device, pl_module.dtype)  # (N, C, H, W)
        with torch.no_grad():
            maps = pl_module.rollout(images).float().cpu()  # (N, h, w)
        maps = F.interpolate(maps.unsqueeze(1), images.shape[2:], mode="nearest")[:, 0]  # (N, H, W)
        classes = self.names(trainer, pl_module)
        figure = new_figure(1.75 * len(shown), 4.0)
        figure.suptitle(
            "where the answer came from (attention rollout): red most; below, the pictures alone", fontsize=11
        )
        grid = figure.subplots(2, len(shown), squeeze=False)
        for (above, below), heat, (image, predicted, label) in zip(grid.T, maps, shown, strict=True):
            for axis in (above, below):
                axis.imshow(pixels(image), cmap="gray")
                axis.axis("off")
            above.imshow(heat.numpy(), cmap="jet", alpha=0.45)  # from the picture's least to its most
            name_picture(above, classes, predicted, label)
        self.run.save_picture("attention_rollout", figure)


def roll_out(weights: list[Tensor]) -> Tensor:
    """Return how much of each first token is in each last one.

    A block's tokens are half what they were before it, half what attention brought: (A + 1) / 2, where A is the mean over the
    heads. The blocks' products carry that from the first to the last. (Values and MLPs are not looked at: it says what could
    flow where, not what was made of it.)

    Args:
        weights: of each block, (B, h, T, T), from the first to the last; rows sum to 1.

    Returns:
        (B, T, T), whose rows sum to 1.
    """
    rolled = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)  # (T, T)
    for block in weights:
        rolled = (block.mean(dim=1) + torch.eye(block.shape[-1], dtype=block.dtype, device=block.device)) / 2 @ rolled
    return rolled  # (B, T, T)
