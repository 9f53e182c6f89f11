"""DETR: detection as translation from a picture to a set of objects (Carion et al. 2020).

No anchors, no places, no non-maximum suppression. A network's maps are read by a Transformer's encoder; a decoder is given Q
learned queries, which look at the picture and at each other, and each answers with one object, or with "none". In training
the objects are dealt out among the queries so that all answers together cost least (the Hungarian method): each object has
one query, so a second answer to the same object is wrong, and the network learns not to give it.

                 cost of an answer for an object = - probability of its class + 5 L1 + 2 (1 - generalised IoU)

Boxes are told as centre, width and height, each a share of the picture. Each layer of the decoder is taught as the last one.

Departures from the paper: one learning rate for all, as nothing comes from ImageNet here; positions are those of the places'
middles; Adam's rate and the number of queries are the experiment's. As in the authors' code, and unlike in `transformer.py`,
positions are added in every layer, to queries and keys and not to values. A picture with more objects than queries: see `DETR`.

Shapes: B batch, H, W height and width, h, w of the maps, S = h w places, D width, Q queries, L layers of the decoder, N objects
of a picture, K classes.
"""

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lit_models.attention import MultiHeadAttention
from lit_models.backbones import Backbone
from lit_models.boxes import clip
from lit_models.detector import Detector
from lit_models.transformer import Decoder, DecoderBlock, Encoder, EncoderBlock
from runner.errors import InputError

# -- the Transformer, with positions in every layer ----------------------------------------------------------------------


def look(
    attention: MultiHeadAttention,
    x: Tensor,
    at: Tensor,
    memory: Tensor,
    memory_at: Tensor,
    mask: Tensor | None = None,
    seen: list[Tensor] | None = None,
) -> Tensor:
    """Return what x (B, T, D), at positions (T, D), finds in memory (B, S, D), at (B, S, D): (B, T, D).

    Positions tell where to look; what is found has none.
    """
    query, key = x + at, memory + memory_at
    if seen is None:
        return attention(query, key, memory, mask)
    found, weights = attention(query, key, memory, mask, return_weights=True)
    seen.append(weights)
    return found


class PictureBlock(EncoderBlock):
    """Self-attention of places, MLP."""

    def forward(self, x: Tensor, at: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map places x (B, S, D) at positions (B, S, D) to (B, S, D); the mask says which are of the picture."""
        x = self.add(x, self.norm1, lambda y: look(self.attention, y, at, y, at, mask))
        return self.add(x, self.norm2, self.mlp)


class QueryBlock(DecoderBlock):
    """Self-attention of queries, their attention to places, MLP."""

    def forward(
        self,
        x: Tensor,
        queries: Tensor,
        memory: Tensor,
        at: Tensor,
        mask: Tensor | None = None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Map x (B, Q, D) to (B, Q, D).

        Args:
            x: what is known of each query's object.
            queries: their learned positions (Q, D).
            memory: the picture's places (B, S, D).
            at: their positions (B, S, D).
            mask: which of them are of the picture.
            seen: a list, to which the weights (B, heads, Q, S) on the places are added.
        """
        x = self.add(x, self.norm1, lambda y: look(self.attention, y, queries, y, queries))
        x = self.add(x, self.norm2, lambda y: look(self.cross_attention, y, queries, memory, at, mask, seen))
        return self.add(x, self.norm3, self.mlp)


class PictureEncoder(Encoder):
    """Blocks one behind the other. Arguments as for `Encoder`."""

    block = PictureBlock

    def forward(self, x: Tensor, at: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map places (B, S, D) to places that know of each other; the arguments are those of `PictureBlock.forward`."""
        for block in self.blocks:
            x = block(x, at, mask)
        return self.norm(x)


class QueryDecoder(Decoder):
    """Blocks one behind the other, each of whose results is an answer. Arguments as for `Encoder`."""

    block = QueryBlock

    def forward(
        self,
        queries: Tensor,
        memory: Tensor,
        at: Tensor,
        mask: Tensor | None = None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Return every block's result, behind the same norm: (L, B, Q, D); arguments as for `QueryBlock.forward`."""
        x = queries.new_zeros(len(memory), *queries.shape)  # nothing is known of the objects
        layers = []
        for block in self.blocks:
            x = block(x, queries, memory, at, mask, seen)
            layers.append(self.norm(x))
        return torch.stack(layers)


def sines(shares: Tensor, width: int) -> Tensor:
    """Return positions (..., width) of shares (...) of the picture's height or width: sines and cosines in turn.

    As `transformer.sinusoids`, of the share times 2 pi: the quickest goes round once.
    """
    rates = torch.exp(-math.log(10_000) / width * torch.arange(0, width, 2, device=shares.device))  # (width / 2,)
    angles = 2 * math.pi * shares[..., None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def places(
    maps: tuple[int, int], stride: int, sizes: list[tuple[int, int]], width: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return where the places of maps are.

    Args:
        maps: h, w.
        stride: pixels of the picture per place.
        sizes: height and width of each picture, without what pads it to the batch's.
        width: D, of which half tells the row, and half the column.
        device: of what is returned.

    Returns:
        positions (B, S, D), and a mask (B, 1, 1, S), True for places that begin inside the picture; None if all do.
    """
    sides, inside = [], []
    for i in range(2):  # rows, columns
        lengths = torch.tensor([size[i] for size in sizes], dtype=torch.float32, device=device)[:, None]  # (B, 1)
        begin = stride * torch.arange(maps[i], device=device)  # (h or w,)
        sides.append(sines((begin + stride / 2) / lengths, width // 2))  # (B, h or w, D / 2)
        inside.append(begin < lengths)  # (B, h or w)
    y, x = sides[0][:, :, None], sides[1][:, None]
    at = torch.cat([y.expand(-1, -1, maps[1], -1), x.expand(-1, maps[0], -1, -1)], dim=-1).flatten(1, 2)  # (B, S, D)
    if all(stride * (n - 1) < length for size in sizes for n, length in zip(maps, size, strict=True)):
        return at, None
    mask = inside[0][:, :, None] & inside[1][:, None]  # (B, h, w)
    return at, mask.flatten(1)[:, None, None]


# -- boxes, and who is to find what --------------------------------------------------------------------------------------


def to_corners(boxes: Tensor) -> Tensor:
    """Map centre x, centre y, width, height (..., 4) to x1, y1, x2, y2."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def to_shares(target: dict) -> Tensor:
    """Return a target's boxes as centre x, centre y, width, height (N, 4), in shares of the picture."""
    height, width = target["size"]
    boxes = target["boxes"].float() / target["boxes"].new_tensor([width, height, width, height], dtype=torch.float32)
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU less the share of the smallest box around both that neither covers (Rezatofighi et al. 2019), in [-1, 1].

    Args:
        a, b: corners (..., 4), which broadcast: (Q, 1, 4) and (N, 4) give all pairs. Two boxes without area give a finite
            number, and a finite gradient.

    Returns:
        (...).
    """
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])  # (..., 2)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    intersection, hull = overlap.clamp(min=0).prod(dim=-1), around.prod(dim=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (a, b)]
    union = areas[0] + areas[1] - intersection
    return intersection / union.where(union > 0, 1) - (hull - union) / hull.where(hull > 0, 1)


def assign(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Deal out objects among queries, so that the sum of the costs is the smallest there is (Kuhn 1955).

    Args:
        costs: (Q, N), on any device; what is no number costs more than anything else.

    Returns:
        queries and objects, min(Q, N) of each, int64 on the CPU: the first finds the first, and so on.
    """
    worst = torch.finfo(torch.float32).max / 1e6
    costs = costs.detach().float().cpu().nan_to_num(worst, worst, -worst)
    queries, objects = linear_sum_assignment(costs.double().numpy())
    return torch.from_numpy(queries), torch.from_numpy(objects)


class Answers(NamedTuple):
    """What every layer of the decoder says of a batch, in float32."""

    logits: Tensor  # (L, B, Q, K + 1), the last of "no object"
    boxes: Tensor  # (L, B, Q, 4): centre x, centre y, width, height, in shares of the picture


class DETR(Detector):
    """A set of answers, one of each query.

    A picture with more objects than queries teaches as many of them as there are queries, those that cost least (a warning
    says so, once): take more queries than a picture has objects.

    Args:
        num_classes: K.
        backbone: its last layer's maps are read.
        queries: Q.
        width: D, a multiple of 4.
        heads: of the attention.
        layers: of the encoder, and L of the decoder.
        hidden: width of the MLPs' hidden layer; None: 4 D.
        dropout: of the Transformer.
        norm_first: pre-norm, else post-norm, the paper's.
        no_object_weight: of queries that are to say "none", in the loss of the class: most are.
        box_weight, giou_weight: of L1 and of the generalised IoU, in cost and loss.
        score_threshold, max_detections: as in `Detector`, whose nms_threshold is of no use here.
        detector: arguments of `Detector`.

    Raises:
        InputError: a size is below 1, the width no multiple of 4 and of the heads, or a weight negative.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        queries: int = 100,
        width: int = 256,
        heads: int = 8,
        layers: int = 6,
        hidden: int | None = None,
        dropout: float = 0.1,
        norm_first: bool = False,
        no_object_weight: float = 0.1,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        score_threshold: float = 0.05,
        max_detections: int = 100,
        **detector,
    ):
        super().__init__(
            num_classes=num_classes, score_threshold=score_threshold, max_detections=max_detections, **detector
        )
        if queries < 1 or width < 4 or width % 4:
            raise InputError(f"queries start at 1, and the width is a multiple of 4: got {queries} and {width}")
        if min(no_object_weight, box_weight, giou_weight) < 0:
            raise InputError("no_object_weight, box_weight and giou_weight must be 0 or more")
        self.backbone, self.pretrained = backbone, backbone.pretrained
        self.box_weight, self.giou_weight = box_weight, giou_weight
        block = {"hidden": hidden, "dropout": dropout, "activation": "relu", "norm_first": norm_first}
        self.project = nn.Conv2d(backbone.channels[-1], width, kernel_size=1)
        self.encoder = PictureEncoder(layers, width, heads, **block)
        self.decoder = QueryDecoder(layers, width, heads, final_norm=True, **block)
        self.queries = nn.Embedding(queries, width)
        self.class_head = nn.Linear(width, num_classes + 1)
        self.box_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )
        weights = torch.ones(num_classes + 1)
        weights[-1] = no_object_weight
        self.register_buffer("class_weights", weights, persistent=False)
        for parameter in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def answer(self, images: Tensor, targets: list[dict], seen: list[Tensor] | None = None) -> Answers:
        """Return what the layers say of images (B, 3, H, W).

        Args:
            images: normalised.
            targets: only `size` is looked at.
            seen: a list, to which each layer of the decoder adds its weights (B, heads, Q, S) on the places.
        """
        maps = self.project(self.backbone(images)[-1])  # (B, D, h, w)
        sizes, width = [target["size"] for target in targets], maps.shape[1]
        at, mask = places(maps.shape[-2:], self.backbone.strides[-1], sizes, width, images.device)
        at = at.to(self.queries.weight.dtype)  # not autocast's: neighbours would differ too little
        x = maps.flatten(2).transpose(1, 2).to(at.dtype)  # (B, D, h, w) -> (B, D, S) -> (B, S, D); see `Swin`
        x = self.encoder(x, at, mask)
        x = self.decoder(self.queries.weight, x, at, mask, seen)  # (L, B, Q, D)
        with torch.autocast(x.device.type, enabled=False):  # a box in half precision misses by a pixel
            x = x.to(self.class_head.weight.dtype)
            return Answers(self.class_head(x).float(), self.box_head(x).float().sigmoid())

    # -- training ----------------------------------------------------------------------------------------------------

    def costs(self, answers: Answers, labels: Tensor, boxes: Tensor) -> Tensor:
        """Return what each answer costs for each of N objects: (L, B, Q, N).

        Args:
            answers: of the layers.
            labels: (N,).
            boxes: (N, 4), as the answers'.
        """
        probability = answers.logits.softmax(dim=-1)[..., labels]  # (L, B, Q, N)
        l1 = (answers.boxes[..., None, :] - boxes).abs().sum(dim=-1)
        giou = generalised_iou(to_corners(answers.boxes)[..., None, :], to_corners(boxes))
        return self.box_weight * l1 - probability + self.giou_weight * (1 - giou)

    @torch.no_grad()
    def match(self, answers: Answers, labels: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, ...]:
        """Deal out each picture's objects among the queries, in each layer for itself.

        Args:
            answers: of the layers.
            labels: (N,) of each picture.
            boxes: (N, 4) of each picture.

        Returns:
            layer, picture, query and object of each pair, (R,) int64 each; objects are counted through the batch.
        """
        costs = self.costs(answers, torch.cat(labels), torch.cat(boxes)).cpu()  # one copy, not one for each picture
        pairs, first = [], 0
        for image, n in enumerate(map(len, labels)):
            for layer in range(len(costs)):
                queries, objects = assign(costs[layer, image, :, first : first + n])
                where = torch.tensor([[layer], [image]]).expand(2, len(queries))
                pairs.append(torch.cat([where, queries[None], first + objects[None]]))  # (4, min(Q, N))
            first += n
        return torch.cat(pairs, dim=1).to(answers.logits.device).unbind(0)

    def losses(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Return the losses, weighted as they are added up, of the last layer, and those before it with its number behind.

        `class_loss` is the cross-entropy over all queries, weighted by class; `box_loss`, L1, and `giou_loss` are sums over
        the queries that are to find an object, divided by their number in the batch.
        """
        answers = self.answer(images, targets)
        labels, boxes = [t["labels"] for t in targets], [to_shares(t) for t in targets]
        L, _, Q, _ = answers.boxes.shape
        if any(len(each) > Q for each in labels):
            warnings.warn(
                f"a picture has more objects than the {Q} queries, which can find no more: --model.queries",
                stacklevel=2,
            )
        layer, image, query, number = self.match(answers, labels, boxes)
        labels, boxes = torch.cat(labels)[number], torch.cat(boxes)[number]  # (R,), (R, 4)
        wanted = torch.full_like(answers.logits[..., 0], self.num_classes, dtype=torch.int64)  # (L, B, Q): none
        wanted[layer, image, query] = labels
        found = answers.boxes[layer, image, query]  # (R, 4)
        l1 = (found - boxes).abs().sum(dim=1)
        giou = 1 - generalised_iou(to_corners(found), to_corners(boxes))
        count = max(len(number) // L, 1)  # each layer has as many pairs

        losses = {}
        for i in reversed(range(L)):
            name = "" if i == L - 1 else f"_{i + 1}"
            mine = layer == i
            losses |= {
                f"class_loss{name}": self.class_loss(answers.logits[i], wanted[i]),
                f"box_loss{name}": self.box_weight * l1[mine].sum() / count,
                f"giou_loss{name}": self.giou_weight * giou[mine].sum() / count,
            }
        return losses

    def class_loss(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropy of logits (B, Q, K + 1) for classes (B, Q): the weighted mean; 0 if nothing has a weight."""
        weights = self.class_weights.float()
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weights, reduction="sum")
        return each / weights[wanted].sum().clamp(min=1e-6)

    # -- detection ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return what is found in each image: see `Detector`. Nothing is suppressed."""
        return self.found(self.answer(images, targets), targets)

    def found(self, answers: Answers, targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return the last layer's answers that are no "none", best first."""
        scores, labels = answers.logits[-1].softmax(dim=-1)[..., :-1].max(dim=-1)  # (B, Q)
        found = []
        for boxes, score, label, target in zip(
            in_pixels(answers.boxes[-1], targets), scores, labels, targets, strict=True
        ):
            boxes = clip(boxes, target["size"])
            has_area = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) > 0.01
            kept = ((score > self.score_threshold) & has_area).nonzero()[:, 0]
            kept = kept[score[kept].argsort(descending=True, stable=True)][: self.max_detections]
            found.append({"boxes": boxes[kept], "scores": score[kept], "labels": label[kept]})
        return found

    def explain(self, images: Tensor, targets: list[dict]) -> list[tuple[str, str, list[dict[str, Tensor]]]]:
        """Return all queries' boxes, and what the surest query looks at in the last layer."""
        seen = []
        answers = self.answer(images, targets, seen)
        none = answers.logits[-1].argmax(dim=-1) == self.num_classes  # (B, Q)
        best = answers.logits[-1].softmax(dim=-1)[..., :-1].amax(dim=-1).argmax(dim=1)  # (B,)
        weights = seen[-1].float().mean(dim=1)  # (B, heads, Q, S) -> (B, Q, S)
        cells = grid(images.shape[-2:], self.backbone.strides[-1], weights.shape[-1], images.device)
        queries, looks = [], []
        for i, (boxes, target) in enumerate(zip(in_pixels(answers.boxes[-1], targets), targets, strict=True)):
            boxes = clip(boxes, target["size"])
            queries.append({"no object": boxes[none[i]], "object": boxes[~none[i]]})
            chosen = cells[half(weights[i, best[i]])]
            looks.append({"looked at": clip(chosen, target["size"]), "object": boxes[best[i]][None]})
        count = len(self.queries.weight)
        return [
            ("queries", f"the boxes of all {count} queries", queries),
            ("attention", "the surest query's box, and the fewest places that have half of its attention", looks),
        ]


def in_pixels(boxes: Tensor, targets: list[dict]) -> list[Tensor]:
    """Return corners (Q, 4) in pixels for each picture, of boxes (B, Q, 4) in shares of them."""
    sizes = [target["size"] for target in targets]
    return [to_corners(each) * each.new_tensor([w, h, w, h]) for each, (h, w) in zip(boxes, sizes, strict=True)]


def half(weights: Tensor) -> Tensor:
    """Return the indices of the fewest of the weights (S,) that have half of their sum."""
    values, order = weights.sort(descending=True)
    return order[: int((values.cumsum(dim=0) < values.sum() / 2).sum()) + 1]


def grid(images: tuple[int, int], stride: int, count: int, device: torch.device) -> Tensor:
    """Return the pixels of each of the `count` places of maps: boxes (S, 4), row by row."""
    columns = math.ceil(images[1] / stride)
    number = torch.arange(count, device=device)
    y, x = stride * (number // columns), stride * (number % columns)
    return torch.stack([x, y, x + stride, y + stride], dim=1).float()
