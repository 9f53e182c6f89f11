"""Detectors as functions of tensors: all candidates of a picture, whatever there is in it.

Shapes: B batch, H height, W width, K classes, N candidates of a picture, A anchors.
"""

import torch
from torch import Tensor

from exporting.network import Batches, Network
from lit_models.boxes import decode
from lit_models.detr import DETR, to_corners
from lit_models.fcos import FCOS, from_sides
from lit_models.localizer import Localizer
from lit_models.retinanet import RetinaNet
from lit_models.sliding_window import SlidingWindow
from lit_models.yolo import YOLO


class Boxes(Network):
    """Detectors that say something of every place, whatever there is: all of it, before anything is dropped."""

    inputs, outputs = ("images",), ("boxes", "scores")
    says = (
        "images (B, 3, H, W) to all candidates before non-maximum suppression: boxes (B, N, 4), x1, y1, x2, y2 in pixels, not "
        "clipped to the picture, and scores (B, N, K), from 0 to 1"
    )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the candidates."""
        of_kind = next(function for kind, function in CANDIDATES.items() if isinstance(self.model, kind))
        return of_kind(self.model, images)


def sliding_windows(model: SlidingWindow, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows (B, N, 4) and their scores (B, N, K)."""
    scores, windows = model.look(images)
    return windows.expand(images.shape[0], -1, -1), scores.softmax(dim=2)[..., 1:]


def one_object(model: Localizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the box (B, 1, 4) and its scores (B, 1, K)."""
    logits, boxes = model.heads(images)
    height, width = images.shape[2:]
    scale = torch.tensor([width, height, width, height])
    return (boxes * scale)[:, None], logits.softmax(dim=1)[:, None]


def moved_anchors(model: RetinaNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the boxes (B, N, 4) of all anchors and their scores (B, N, K)."""
    logits, offsets, anchors = (torch.cat(parts, dim=-2) for parts in model.look(images))
    boxes = decode(offsets.transpose(0, 1), anchors).transpose(0, 1)  # (N, B, 4): B boxes of each anchor
    return boxes, logits.sigmoid()


def places(model: FCOS, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the boxes (B, N, 4) of all places and their scores (B, N, K)."""
    logits, distances, centerness, cells = (torch.cat(parts, dim=-2) for parts in model.look(images))
    every = cells.expand(images.shape[0], -1, -1).flatten(0, 1)  # (N, 4) -> (B N, 4)
    boxes = from_sides(distances.flatten(0, 1), every).unflatten(0, (images.shape[0], cells.shape[0]))
    return boxes, (logits.sigmoid() * centerness.sigmoid()).sqrt()


def cells(model: YOLO, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the boxes (B, N, 4) of all cells with each anchor, and their scores (B, N, K)."""
    boxes, scores = [], []
    for level, said in enumerate(model.look(images)):  # (B, A, h, w, 5 + K)
        rows, columns = (torch.arange(n) for n in said.shape[2:4])
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=2)  # (h, w, 2)
        anchors = model.anchors[level, :, None, None]  # (A, 1, 1, 2)
        boxes.append(model.decode(said[..., :4], places, anchors, level).flatten(1, 3))
        scores.append((said[..., 4:5].sigmoid() * said[..., 5:].sigmoid()).flatten(1, 3))
    return torch.cat(boxes, dim=1), torch.cat(scores, dim=1)


def answers(model: DETR, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the boxes (B, N, 4) of all queries, and their scores (B, N, K)."""
    height, width = images.shape[2:]
    said = model.answer(images, [{"size": (height, width)}])  # of all: pictures without padding
    boxes = to_corners(said.boxes[-1]) * torch.tensor([width, height, width, height])
    return boxes, said.logits[-1].softmax(dim=-1)[..., :-1]


CANDIDATES = {
    SlidingWindow: sliding_windows,
    Localizer: one_object,
    RetinaNet: moved_anchors,
    FCOS: places,
    YOLO: cells,
    DETR: answers,
}


class Found(Batches):
    """Detectors whose candidates are not known here."""

    inputs = ("images",)
    says = "pictures and targets to what is found in each"
    why_not = "what it finds in a picture is not of one shape; what it says of every place would be: see exporting/detectors.py"

    def forward(self, images: Tensor, targets: list[dict]) -> tuple[Tensor, ...]:
        """Return what was found, picture by picture."""
        return tuple(tensor for found in self.model(images, targets) for _, tensor in sorted(found.items()))


class TwoStages(Found):
    """Detectors that look again at what they, or a method of the data's, have proposed."""

    why_not = "it looks again at as many regions as were proposed for a picture: the shapes in its graph depend on the picture"
