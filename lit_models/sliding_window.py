"""Sliding window: a classifier of small windows, at every position and scale.

A picture of H x W pixels has H (H + 1) / 2 * W (W + 1) / 2 windows: 68 million of 128 x 128 pixels, each a pass of the
network. What makes it feasible: only square windows, a few pixels apart, on a few scales of the picture; and all windows of
a scale at once. The classifier has no padding, and its linear layers are 1 x 1 convolutions: then its maps for the whole
picture hold, at each place, just what it says of the window there (Sermanet et al. 2014, OverFeat).

Shapes: B batch, H height, W width, L windows of an image on all scales, N objects, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.boxes import NEGATIVE, clip, count_windows, iou, match
from lit_models.detector import Detector
from lit_models.rcnn import choose
from runner.errors import InputError


class WindowClassifier(nn.Sequential):
    """A window (B, C, 32, 32) to class scores (B, 1 + K, 1, 1), the first the background's; larger ones to a map of them.

    Args:
        num_classes: K.
        widths: maps of the three convolutions.
        channels: C.
    """

    side, stride = 32, 4  # of a window, and from one to the next, in pixels

    def __init__(self, num_classes: int, widths: tuple[int, int, int] = (16, 32, 128), channels: int = 3):
        first, second, third = widths
        super().__init__(
            nn.Conv2d(channels, first, kernel_size=5, bias=False),  # 32 -> 28
            nn.BatchNorm2d(first),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # -> 14
            nn.Conv2d(first, second, kernel_size=5, bias=False),  # -> 10
            nn.BatchNorm2d(second),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # -> 5
            nn.Conv2d(second, third, kernel_size=5),  # -> 1: a linear layer on all that there is of the window
            nn.ReLU(inplace=True),
            nn.Conv2d(third, 1 + num_classes, kernel_size=1),
        )


class SlidingWindow(Detector):
    """`WindowClassifier` run over scales of the image; windows that show an object, less those that others suppress.

    A window that overlaps an object by IoU `positive_iou` is to name its class, and so is the one that overlaps it most,
    however little; one below `negative_iou` is background; what is between counts as neither. Training sees all positives of a batch, and three times as many negatives: half of
    them drawn at random, half those that are most taken for objects (Felzenszwalb et al. 2010, hard negatives).

    Args:
        num_classes: K.
        windows: sides of the windows that are looked for, in pixels of the image: each is a scale.
        widths: maps of the classifier's convolutions.
        positive_iou, negative_iou: as above.
        detector: arguments of `Detector`.
    """

    def __init__(
        self,
        num_classes: int,
        windows: tuple[float, ...] = (20.0, 28.0, 40.0, 56.0, 80.0),
        widths: tuple[int, int, int] = (16, 32, 128),
        positive_iou: float = 0.5,
        negative_iou: float = 0.3,
        **detector,
    ):
        super().__init__(num_classes=num_classes, **detector)
        if not windows or min(windows) < 4:
            raise InputError(f"windows: sides in pixels, at least 4, got {list(windows)}")
        if not 0 <= negative_iou <= positive_iou <= 1:
            raise InputError(f"negative_iou {negative_iou} must not be above positive_iou {positive_iou}")
        self.windows, self.positive_iou, self.negative_iou = windows, positive_iou, negative_iou
        self.classifier = WindowClassifier(num_classes, widths)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores (B, L, 1 + K) of all windows of images (B, 3, H, W), and the windows (L, 4)."""
        scores, boxes = [], []
        for side in self.windows:
            scale = WindowClassifier.side / side
            height, width = (max(round(n * scale), WindowClassifier.side) for n in images.shape[2:])
            scaled = F.interpolate(images.float(), (height, width), mode="bilinear", antialias=True).to(images.dtype)
            maps = self.classifier(scaled).float()  # (B, 1 + K, h, w)
            scores.append(maps.flatten(2).transpose(1, 2))  # -> (B, h * w, 1 + K)
            corner = WindowClassifier.stride * torch.stack(
                torch.meshgrid(*(torch.arange(n, device=maps.device) for n in maps.shape[:1:-1]), indexing="xy"), dim=-1
            ).flatten(0, 1)  # (h * w, 2): x, y, in pixels of the scaled image
            unscale = torch.tensor([images.shape[3] / width, images.shape[2] / height], device=maps.device)
            boxes.append(torch.cat([corner * unscale, (corner + WindowClassifier.side) * unscale], dim=1))
        return torch.cat(scores, dim=1), torch.cat(boxes)

    def losses(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Return the cross-entropy over the windows chosen."""
        scores, windows = self.look(images)
        labels = torch.stack([self.labels(windows, target) for target in targets])  # (B, L)
        scores, labels = scores.flatten(0, 1), labels.flatten()  # (B * L, 1 + K), (B * L,)
        positive = (labels > 0).nonzero()[:, 0]
        half = 3 * max(len(positive), len(images)) // 2
        drawn = choose(labels == 0, half)
        taken = scores.detach().softmax(dim=1)[:, 0].masked_fill(labels != 0, 2)  # how much for background; 2 for none
        hard = taken.topk(min(half, len(taken)), largest=False).indices
        chosen = torch.cat([positive, drawn, hard[taken[hard] <= 1]])
        return {"class_loss": F.cross_entropy(scores[chosen], labels[chosen])}

    def labels(self, windows: Tensor, target: dict) -> Tensor:
        """Return what windows (L, 4) show: 0 background, k + 1 class k, -1 neither: (L,)."""
        matched = match(iou(windows, target["boxes"]), self.positive_iou, self.negative_iou, keep_best=True)
        labels = torch.full_like(matched, -1)
        labels[matched == NEGATIVE] = 0
        labels[matched >= 0] = target["labels"][matched[matched >= 0]] + 1
        return labels

    def forward(self, images: Tensor, targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return what is found in each image: see `Detector`."""
        scores, windows = self.look(images)
        scores = scores.softmax(dim=2)[..., 1:]  # (B, L, K)
        boxes = windows[:, None].expand(-1, self.num_classes, -1).flatten(0, 1)  # (L * K, 4)
        labels = torch.arange(self.num_classes, device=scores.device).repeat(len(windows))
        return [
            self.keep_best(clip(boxes, target["size"]), score.flatten(), labels)
            for score, target in zip(scores, targets, strict=True)
        ]

    def explain(self, images: Tensor, targets: list[dict]) -> list[tuple[str, str, list[dict[str, Tensor]]]]:
        """Return the windows that a training step takes for objects."""
        _, windows = self.look(images)
        shown = [
            {"positive": windows[self.labels(windows, target) > 0], "object": target["boxes"]} for target in targets
        ]
        height, width = images.shape[2:]
        title = f"of {count_windows(height, width):,} windows of a picture, {len(windows):,} are looked at; the positive ones"
        return [("windows", title, shown)]
