"""YOLO: every cell of the maps says at once whether an object is there, what it is, and where (Redmon et al. 2016).

No regions are proposed and cut out: one pass of the network gives all boxes, and a loss over all cells teaches it. From
YOLOv2 (Redmon and Farhadi 2017) come anchors, fitted to the data's boxes; from YOLOv3 (2018) three levels of maps, and a
class that is a probability of its own; from YOLOv4 (Bochkovskiy et al. 2020) the path aggregation, CSP blocks, the complete
IoU and the mosaic; from YOLOv5's documentation the equations of a box, and which cells are to find an object.

Shapes: B batch, H height, W width, D maps, h and w a level's height and width in cells, L = 3 levels, A anchors of a level,
K classes, N objects of all images, M cells (with an anchor) that are to find an object.

Departures: the network is smaller, without spatial pyramid pooling; the loss is not multiplied by the batch; of two objects
that one cell is to find, the objectness is that of the nearer, not of the last; there is neither an average of the weights
over the steps nor a warm-up of the biases; a mosaic is cut, not scaled.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from datamodules.mosaic import mosaic
from lit_models.backbones import Backbone
from lit_models.boxes import clip
from lit_models.convnet import initialise
from lit_models.detector import Detector
from lit_models.localizer import pairwise_iou
from runner.errors import InputError

LEVELS = 3
BALANCE = (4.0, 1.0, 0.4)  # of the levels' objectness: of few cells, as coarse maps have, each weighs more in the mean
NEIGHBOURS = ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1))  # the cell itself, and those beside it: x, y
PAPERS_CELLS = 80 * 80  # of the finest maps, of a picture of 640 x 640 with stride 8: what the weights were chosen for
PAPERS_CLASSES = 80


# -- network ---------------------------------------------------------------------------------------------------------------


class Conv(nn.Sequential):
    """Convolution, batch norm, SiLU: (B, D_in, H, W) to (B, D, H / stride, W / stride)."""

    def __init__(self, n_in: int, width: int, kernel_size: int = 1, stride: int = 1):
        conv = nn.Conv2d(n_in, width, kernel_size, stride, padding=kernel_size // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(width), nn.SiLU(inplace=True))


class CSPBlock(nn.Module):
    """Half of the maps go through two convolutions, half go past them (Wang et al. 2020): (B, D_in, H, W) to (B, D, H, W)."""

    def __init__(self, n_in: int, width: int):
        super().__init__()
        half = width // 2
        self.past, self.into = Conv(n_in, half), Conv(n_in, half)
        self.through = nn.Sequential(Conv(half, half), Conv(half, half, kernel_size=3))
        self.join = Conv(2 * half, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return both halves, joined."""
        return self.join(torch.cat([self.through(self.into(x)), self.past(x)], dim=1))


class PathAggregation(nn.Module):
    """Coarse maps are added to fine ones, then fine ones to coarse (Liu et al. 2018): each level knows what the others do.

    Maps (B, D_in, h, w), each level with half the side of the one before, to maps (B, D, h, w).

    Args:
        channels: D_in of each level.
        width: D, the same for all.
    """

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        self.laterals = nn.ModuleList(Conv(n_in, width) for n_in in channels)
        self.down = nn.ModuleList(CSPBlock(2 * width, width) for _ in channels[1:])  # to finer maps
        self.halve = nn.ModuleList(Conv(width, width, kernel_size=3, stride=2) for _ in channels[1:])
        self.up = nn.ModuleList(CSPBlock(2 * width, width) for _ in channels[1:])  # to coarser maps

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the aggregated maps, from large to small."""
        maps = [lateral(m) for lateral, m in zip(self.laterals, maps, strict=True)]
        for i in reversed(range(len(maps) - 1)):
            larger = F.interpolate(maps[i + 1], scale_factor=2.0, mode="nearest")
            maps[i] = self.down[i](torch.cat([maps[i], larger], dim=1))
        for i in range(len(maps) - 1):
            maps[i + 1] = self.up[i](torch.cat([maps[i + 1], self.halve[i](maps[i])], dim=1))
        return maps


class Matches(NamedTuple):
    """Which cells of a level are to find which object: M of them."""

    where: tuple[Tensor, Tensor, Tensor, Tensor]  # image, anchor, row, column: each (M,)
    boxes: Tensor  # (M, 4) of the object
    labels: Tensor  # (M,)


class YOLO(Detector):
    """Backbone, path aggregation, and a 1 x 1 convolution: for each cell and anchor tx, ty, tw, th, objectness, classes.

    With c the cell, p the anchor and s the sigmoid, in units of the level's stride:

        x = 2 s(tx) - 0.5 + cx    y = 2 s(ty) - 0.5 + cy    w = pw (2 s(tw))^2    h = ph (2 s(th))^2

    so that a centre may lie half a cell outside, and a side is at most 4 times the anchor's. The score of a class is
    objectness times the class's probability. The losses are documented in `losses`.

    Args:
        num_classes: K.
        backbone: with three layers of maps, each of half the side of the one before.
        width: D of the path aggregation.
        anchors: width and height in pixels of A anchors for each level, all in one list; None: fitted to the boxes of the
            training data when training begins. Checkpoints carry them.
        anchors_per_level: A, where they are fitted.
        largest_ratio: an anchor is to find the objects of which neither side is so many times its own, or it theirs.
        box_weight: of the box loss.
        objectness_weight: of the objectness loss of a picture with as many cells as the paper's.
        class_weight: of the class loss with as many classes as the paper's.
        mosaic: how probable it is that a training batch is made a mosaic.
        mosaic_off: share of the epochs, the last ones, without.
        candidates: boxes of a picture that suppression looks at, those with the highest scores.
        detector: arguments of `Detector`.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        width: int = 64,
        anchors: list[tuple[float, float]] | None = None,
        anchors_per_level: int = 3,
        largest_ratio: float = 4.0,
        box_weight: float = 0.05,
        objectness_weight: float = 1.0,
        class_weight: float = 0.5,
        mosaic: float = 0.0,
        mosaic_off: float = 0.2,
        candidates: int = 1000,
        **detector,
    ):
        super().__init__(num_classes=num_classes, **detector)
        strides = backbone.strides
        if len(strides) != LEVELS or strides != [strides[0] * 2**i for i in range(LEVELS)]:
            raise InputError(
                f"backbone: YOLO needs three layers, each of half the side of the last, got strides {strides}"
            )
        if width < 2 or anchors_per_level < 1 or candidates < 1 or largest_ratio <= 1:
            raise InputError("width starts at 2, anchors_per_level and candidates at 1, largest_ratio is above 1")
        if anchors is not None and (not anchors or len(anchors) % LEVELS or min(map(min, anchors)) <= 0):
            raise InputError(f"anchors: {LEVELS}, 6, 9, ... pairs of width and height above 0, got {anchors}")
        if not 0 <= mosaic <= 1 or not 0 <= mosaic_off <= 1:
            raise InputError(f"mosaic {mosaic} and mosaic_off {mosaic_off} must be shares")
        self.backbone, self.pretrained = backbone, backbone.pretrained
        self.largest_ratio, self.candidates = largest_ratio, candidates
        self.box_weight, self.objectness_weight, self.class_weight = box_weight, objectness_weight, class_weight
        self.mosaic, self.mosaic_off = mosaic, mosaic_off
        self.neck = PathAggregation(backbone.channels, width)
        initialise(self.neck)

        self.register_buffer("is_fitted", torch.tensor(anchors is not None))
        if anchors is None:  # until they are fitted: squares
            sides = [s * 2 * 2 ** (i / anchors_per_level) for s in strides for i in range(anchors_per_level)]
            anchors = [(side, side) for side in sides]
        self.register_buffer("anchors", by_level(torch.tensor(anchors, dtype=torch.float32)))  # (L, A, 2)

        per_cell = self.anchors.shape[1] * (5 + num_classes)
        self.heads = nn.ModuleList(nn.Conv2d(width, per_cell, kernel_size=1) for _ in strides)
        for head in self.heads:  # in the beginning nothing is probably anywhere, as of RetinaNet (Lin et al. 2017)
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            nn.init.constant_(head.bias.view(-1, 5 + num_classes)[:, 4], -math.log(99))  # p = 0.01

    def look(self, images: Tensor) -> list[Tensor]:
        """Return what each level says of images (B, 3, H, W): (B, A, h, w, 5 + K), in float32.

        The images are padded so that the maps' sides are whole, and two at least: batch norm needs more than one pixel.
        """
        stride = self.backbone.strides[-1]
        height, width = (max(math.ceil(side / stride), 2) * stride for side in images.shape[2:])
        images = F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
        maps = self.neck(self.backbone(images))
        said = [head(m).float() for head, m in zip(self.heads, maps, strict=True)]  # each (B, A * (5 + K), h, w)
        return [s.unflatten(1, (-1, 5 + self.num_classes)).permute(0, 1, 3, 4, 2) for s in said]

    def decode(self, offsets: Tensor, cells: Tensor, anchors: Tensor, level: int) -> Tensor:
        """Return boxes (..., 4) of tx, ty, tw, th (..., 4), for cells (..., 2), column and row, and anchors (..., 2)."""
        said = 2 * offsets.sigmoid()
        centres = (said[..., :2] - 0.5 + cells) * self.backbone.strides[level]
        sizes = anchors * said[..., 2:].square()
        return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=-1)

    # -- training ----------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Fit the anchors to the training data, unless they were given, or came with a checkpoint."""
        super().on_fit_start()
        if self.is_fitted:
            return
        data = self.trainer.datamodule
        sizes = object_sizes(data) if data else torch.zeros(0, 2)
        if not len(sizes):
            raise InputError("the training data has no objects that anchors could be fitted to: --model.anchors")
        anchors = fit_anchors(sizes, LEVELS * self.anchors.shape[1])
        self.anchors.copy_(by_level(anchors))
        self.is_fitted.fill_(True)
        recall = best_possible_recall(sizes, anchors, self.largest_ratio)
        pairs = ", ".join(f"{w:.0f} x {h:.0f}" for w, h in anchors.tolist())
        if self.trainer.is_global_zero:
            print(f"anchors fitted to {len(sizes):,} boxes: {pairs}; best possible recall {recall:.4f}", flush=True)

    def training_step(self, batch: tuple[Tensor, list[dict]], batch_idx: int) -> Tensor:
        """Return the sum of the losses, of a mosaic if it is to be one."""
        epochs = self.trainer.max_epochs  # -1: as many as it takes
        is_late = epochs > 0 and self.trainer.current_epoch >= (1 - self.mosaic_off) * epochs
        if not is_late and torch.rand(()) < self.mosaic:
            batch = mosaic(*batch)
        return super().training_step(batch, batch_idx)

    def assign(self, level: int, height: int, width: int, targets: list[dict]) -> Matches:
        """Return which cells of a level of h x w cells are to find an object.

        They are the cell in which its centre lies and the two nearest beside it, with each anchor that fits: whose sides
        are neither `largest_ratio` times the object's, nor the other way about. So an object has up to 3 A cells on each
        level, and an object that no anchor of a level fits is left to other levels.
        """
        boxes = torch.cat([target["boxes"] for target in targets]).float()  # (N, 4)
        labels = torch.cat([target["labels"] for target in targets])  # (N,)
        counts = torch.tensor([len(target["boxes"]) for target in targets])
        image = torch.arange(len(targets)).repeat_interleave(counts).to(boxes.device)  # (N,)
        fits = side_ratio(boxes[:, 2:] - boxes[:, :2], self.anchors[level]) < self.largest_ratio  # (N, A)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / self.backbone.strides[level]
        # half a cell from the centre to each side: what lies there is the cell itself, or one of the two nearest
        cells = (centres[:, None] + 0.5 * centres.new_tensor(NEIGHBOURS)).floor()  # (N, 5, 2)
        chosen = (cells != cells[:, :1]).any(dim=2)  # (N, 5)
        chosen[:, 0] = True
        chosen &= ((cells >= 0) & (cells < cells.new_tensor([width, height]))).all(dim=2)
        which, anchor, neighbour = (fits[:, :, None] & chosen[:, None]).nonzero().unbind(1)  # of (N, A, 5), each (M,)
        column, row = cells[which, neighbour].long().unbind(1)
        return Matches((image[which], anchor, row, column), boxes[which], labels[which])

    def losses(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Return the losses of boxes, objectness and classes, each a sum over levels.

        - `box_loss`: 1 - complete IoU with the object, the mean over the cells that are to find one.
        - `objectness_loss`: cross-entropy, the mean over all cells, for whether an object is there: the complete IoU of the
          box that is found, where one is, and else 0. The more cells the picture has, the more it weighs.
        - `class_loss`: cross-entropy of each class by itself, the mean over the cells that are to find an object. The more
          classes there are, the more it weighs.
        """
        said = self.look(images)
        box_loss, objectness_loss, class_loss = (images.new_zeros((), dtype=torch.float32) for _ in range(3))
        for level, (s, balance) in enumerate(zip(said, BALANCE, strict=True)):  # s: (B, A, h, w, 5 + K)
            matches = self.assign(level, *s.shape[2:4], targets)
            _, anchor, row, column = matches.where
            chosen = s[matches.where]  # (M, 5 + K)
            cells = torch.stack([column, row], dim=1)
            boxes = self.decode(chosen[:, :4], cells, self.anchors[level, anchor], level)
            overlaps = complete_iou(boxes, matches.boxes)  # (M,)
            box_loss = box_loss + (1 - overlaps).sum() / max(len(overlaps), 1)

            places = ravel(matches.where, s.shape[:4])
            wanted = torch.zeros_like(s[..., 4]).flatten()  # (B * A * h * w,)
            wanted.scatter_reduce_(0, places, overlaps.detach().clamp(min=0), "amax")
            loss = F.binary_cross_entropy_with_logits(s[..., 4].flatten(), wanted)
            objectness_loss = objectness_loss + balance * loss

            is_class = F.one_hot(matches.labels, self.num_classes).float()  # (M, K)
            loss = F.binary_cross_entropy_with_logits(chosen[:, 5:], is_class, reduction="sum")
            class_loss = class_loss + loss / max(is_class.numel(), 1)
        cells = said[0].shape[2] * said[0].shape[3]
        return {
            "box_loss": self.box_weight * box_loss,
            "objectness_loss": self.objectness_weight * cells / PAPERS_CELLS * objectness_loss,
            "class_loss": self.class_weight * self.num_classes / PAPERS_CLASSES * class_loss,
        }

    # -- detection ---------------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return what is found in each image: see `Detector`."""
        boxes, scores = [], []
        for level, s in enumerate(self.look(images)):  # (B, A, h, w, 5 + K)
            rows, columns = (torch.arange(n, device=s.device) for n in s.shape[2:4])
            cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=2)  # (h, w, 2)
            anchors = self.anchors[level, :, None, None]  # (A, 1, 1, 2)
            boxes.append(self.decode(s[..., :4], cells, anchors, level).flatten(1, 3))
            scores.append((s[..., 4:5].sigmoid() * s[..., 5:].sigmoid()).flatten(1, 3))
        found = []
        for b, s, target in zip(torch.cat(boxes, dim=1), torch.cat(scores, dim=1), targets, strict=True):
            best, place = s.flatten().topk(min(self.candidates, s.numel()))  # (cells of all levels, K) -> (P,)
            b = clip(b[place // self.num_classes], target["size"])
            found.append(self.keep_best(b, best, place % self.num_classes))
        return found

    def explain(self, images: Tensor, targets: list[dict]) -> list[tuple[str, str, list[dict[str, Tensor]]]]:
        """Return the anchors that are to find an object, each in its cell."""
        shown = [{"anchor": [], "object": target["boxes"]} for target in targets]
        for level, s in enumerate(self.look(images)):
            image, anchor, row, column = self.assign(level, *s.shape[2:4], targets).where
            offsets = s.new_zeros(len(image), 4)  # which are the anchor itself, in the middle of its cell
            cells = torch.stack([column, row], dim=1)
            boxes = self.decode(offsets, cells, self.anchors[level, anchor], level)
            for i, each in enumerate(shown):
                each["anchor"].append(boxes[image == i])
        shown = [each | {"anchor": torch.cat(each["anchor"])} for each in shown]
        ratio = f"{self.largest_ratio:g}"
        return [("matches", f"anchors that are to find an object: sides from 1/{ratio} to {ratio} of its own", shown)]


def ravel(where: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
    """Return the places (M,) in a flattened tensor of that shape, of indices (M,) in each dimension."""
    place = torch.zeros_like(where[0])
    for index, size in zip(where, shape, strict=True):
        place = place * size + index
    return place


def complete_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of each box in `a` (N, 4) with that in `b` (N, 4), less what tells apart boxes that do not overlap: (N,).

        CIoU = IoU - d^2 / c^2 - alpha v    v = 4 / pi^2 (atan(wb / hb) - atan(wa / ha))^2    alpha = v / (1 - IoU + v)

    d is the distance of the centres, c the diagonal of the smallest box around both (Zheng et al. 2020). As in the paper,
    no gradient goes through alpha.
    """
    overlaps = pairwise_iou(a, b)
    size_a, size_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    distance = ((a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) / 2).square().sum(dim=1)
    around = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    diagonal = around.square().sum(dim=1).clamp(min=1e-7)
    angle_a, angle_b = (torch.atan(size[:, 0] / size[:, 1].clamp(min=1e-6)) for size in (size_a, size_b))
    v = 4 / math.pi**2 * (angle_b - angle_a).square()
    with torch.no_grad():
        alpha = v / (1 - overlaps + v).clamp(min=1e-7)
    return overlaps - distance / diagonal - alpha * v


# -- anchors ---------------------------------------------------------------------------------------------------------------


def object_sizes(data: LightningDataModule) -> Tensor:
    """Return width and height of all training objects (N, 2), as the network gets them: scaled, and augmented once.

    Those without area are left out.
    """
    boxes = [target["boxes"] for _, targets in data.train_dataloader() for target in targets]
    boxes = torch.cat([torch.zeros(0, 4), *boxes])
    sizes = boxes[:, 2:] - boxes[:, :2]
    return sizes[(sizes > 0).all(dim=1)]


def fit_anchors(sizes: Tensor, count: int = 9, seed: int = 0, starts: int = 5, rounds: int = 100) -> Tensor:
    """Return `count` widths and heights (count, 2), by rising area, near those of the objects (N, 2), N from 1.

    By k-means with 1 - IoU, of boxes with one corner in common, for a distance (Redmon and Farhadi 2017): the Euclidean
    distance would be about large boxes only. The best of a few starts, each drawn as k-means++ does: a size is the more
    probable the farther it is from those drawn already.
    """
    sizes = sizes.double().cpu()
    for side in (1, 0):  # by width, then height: in whatever order they come, the same are drawn
        sizes = sizes[sizes[:, side].argsort(stable=True)]
    generator = torch.Generator().manual_seed(seed)
    best, best_distance = None, math.inf
    for _ in range(starts):
        anchors = sizes[torch.randint(len(sizes), (1,), generator=generator)]  # (1, 2)
        while len(anchors) < count:
            far = _distances(sizes, anchors).amin(dim=1).square() + 1e-12  # more than 0 if all are the same
            chosen = torch.multinomial(far, 1, generator=generator)
            anchors = torch.cat([anchors, sizes[chosen]])
        nearest = None
        for _ in range(rounds):
            before, nearest = nearest, _distances(sizes, anchors).argmin(dim=1)  # (N,)
            if before is not None and torch.equal(before, nearest):
                break
            members = F.one_hot(nearest, count).double()  # (N, count)
            counts = members.sum(dim=0)[:, None]
            anchors = torch.where(counts > 0, members.T @ sizes / counts.clamp(min=1), anchors)
        distance = _distances(sizes, anchors).amin(dim=1).mean().item()
        if distance < best_distance:
            best, best_distance = anchors, distance
    return best[best.prod(dim=1).argsort(stable=True)].float()


def _distances(sizes: Tensor, anchors: Tensor) -> Tensor:
    """1 - IoU of sizes (N, 2) with anchors (M, 2), upper left corners in one place: (N, M)."""
    shared = torch.minimum(sizes[:, None], anchors).prod(dim=2)
    return 1 - shared / (sizes.prod(dim=1)[:, None] + anchors.prod(dim=1) - shared)


def by_level(anchors: Tensor) -> Tensor:
    """Share out anchors (L * A, 2) to the levels, small ones to fine maps: (L, A, 2)."""
    return anchors[anchors.prod(dim=1).argsort(stable=True)].view(LEVELS, -1, 2)


def side_ratio(sizes: Tensor, anchors: Tensor) -> Tensor:
    """Return by how much sizes (N, 2) and anchors (M, 2) differ in width or height, whichever is larger: (N, M), from 1."""
    ratios = sizes[:, None] / anchors  # (N, M, 2)
    return torch.maximum(ratios, 1 / ratios).amax(dim=2)


def best_possible_recall(sizes: Tensor, anchors: Tensor, ratio: float) -> float:
    """Return the share of objects (N, 2) that an anchor (M, 2) fits: no other is ever learned from."""
    return (side_ratio(sizes, anchors) < ratio).any(dim=1).double().mean().item()
