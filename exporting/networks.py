"""What is handed on of each kind of model: tensors in, tensors out, and what they mean.

A model's own forward pass may take more than tensors (targets with the sizes of pictures), give more (as many boxes as there
are), or keep something from call to call. Here each kind of model is one function, of tensors whose first dimension, the
batch, may have any length; all others are those of the run's own test data.

Shapes: B batch, C channels, H height, W width, K classes, N candidates of a picture, S symbols of a source, T of a target,
V vocabulary, L layers, H' hidden units.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from datamodules.vocabulary import PAD
from lit_models.autoencoder import Autoencoder, draws_of
from lit_models.boxes import decode
from lit_models.detector import Detector
from lit_models.detr import DETR, to_corners
from lit_models.fcos import FCOS, from_sides
from lit_models.gan import GAN
from lit_models.gnn import NodeClassifier
from lit_models.language_model import LanguageModel, RecurrentLM
from lit_models.localizer import Localizer
from lit_models.rcnn import RCNN
from lit_models.retinanet import RetinaNet
from lit_models.rnn import RNN
from lit_models.segmenter import Segmenter
from lit_models.seq2seq import Translator
from lit_models.sequences import SequenceClassifier, SequenceRegressor
from lit_models.sliding_window import SlidingWindow
from lit_models.tasks import Classifier, Regressor
from lit_models.yolo import YOLO


class Network(nn.Module):
    """A model as a function of tensors; this one of what comes first in a batch.

    Args:
        model: in evaluation mode.
        data: that it was trained on, set up.

    Attributes:
        inputs, outputs: names.
        says: what the inputs and outputs are.
        why_not: why neither ONNX nor torch.export can hold it; None: they can.
        batch_dim: which dimension of an input or output is the batch, where it is not the first.
    """

    inputs: tuple[str, ...] = ("inputs",)
    outputs: tuple[str, ...] = ("outputs",)
    says = "inputs (B, ...) to outputs (B, ...)"
    why_not: str | None = None
    batch_dim: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, model: nn.Module, data: LightningDataModule):
        super().__init__()
        self.model, self.data = model, data

    def example(self, batch: Any) -> tuple[Any, ...]:
        """Return what `forward` is given for a batch of the data module's."""
        return (batch[0],)

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Return the outputs."""
        return (self.model(*inputs),)


class Pictures(Network):
    """Classifiers and segmenters."""

    inputs, outputs = ("images",), ("logits",)
    says = "images (B, C, H, W) to logits (B, K), whose softmax is the classes' probabilities"


class Masks(Pictures):
    """Segmenters."""

    def __init__(self, model: Segmenter, data: LightningDataModule):
        super().__init__(model, data)
        which = "(B, 1, H, W), whose sigmoid is the foreground's probability"
        if model.num_classes > 1:
            which = "(B, K, H, W), whose softmax is the probabilities of each pixel's classes"
        self.says = f"images (B, C, H, W) to logits {which}"


class Numbers(Network):
    """Regressors."""

    inputs, outputs = ("x",), ("y",)
    says = "x (B, D) to y (B, K)"


class Forecasts(Numbers):
    """Forecasters of a series."""

    says = "the values so far (B, T) to the next ones (B, horizon), normalised as the training part was"


class Texts(Network):
    """Classifiers of texts, which are padded to one length: it is the longest's of the data."""

    inputs, outputs = ("tokens",), ("logits",)
    says = "tokens (B, T), PAD (0) behind what is shorter, to logits (B, K)"

    def example(self, batch: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Pad the tokens."""
        return (to_length(batch[0], longest(self.data)),)


class Codes(Network):
    """Autoencoders."""

    inputs, outputs = ("images",), ("images_again",)
    says = "images (B, C, H, W), pixels in [0, 1], to what becomes of them, the same"

    def example(self, batch: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Return pixels in [0, 1], with the noise of a test where there is some."""
        return (self.model.corrupt(self.model.pixels(batch), draws_of(0)),)


class Samples(Network):
    """Generators: what they are tested by is noise, too."""

    inputs, outputs = ("noise",), ("images",)
    says = "noise (B, Z) from N(0, 1) to images (B, C, H, W), pixels in [0, 1]"

    def __init__(self, model: GAN, data: LightningDataModule):
        super().__init__(model, data)
        if model.num_classes is not None:
            self.inputs = ("noise", "labels")
            self.says = "noise (B, Z) from N(0, 1) and classes (B,) to images (B, C, H, W), pixels in [0, 1]"

    def example(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Draw the noise, always the same; the classes are the batch's."""
        images, labels = batch
        noise = torch.randn(len(images), self.model.noise, generator=torch.Generator().manual_seed(0)).to(images.dtype)
        return (noise,) if self.model.num_classes is None else (noise, labels)


# -- sequences -----------------------------------------------------------------------------------------------------------


class Tokens(Network):
    """Transformers that go on with a text: a window of it, as long as the data's are."""

    inputs, outputs = ("tokens",), ("logits",)
    says = (
        "tokens (B, T) to logits (B, T, V) of those that follow each; what is behind a token does not change its logits"
    )

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        """Read a text from its beginning."""
        return (self.model(tokens)[0],)


class Step(Network):
    """Recurrent networks that go on with a text: a token of it, and the state that knows of those before."""

    inputs, outputs = ("token", "state0"), ("logits", "new_state0")
    says = "a token (B, 1) and the state (L, B, H') to logits (B, 1, V) of the next, and the state to go on with; it begins as 0"
    batch_dim = {"state0": 1, "state1": 1, "new_state0": 1, "new_state1": 1}  # noqa: RUF012

    def __init__(self, model: RecurrentLM, data: LightningDataModule):
        super().__init__(model, data)
        states = [f"state{i}" for i in range(model.network.states)]
        self.inputs, self.outputs = ("token", *states), ("logits", *(f"new_{name}" for name in states))

    def example(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the last token of each window, and the state that those before it have left."""
        tokens = batch[0]
        _, state = self.model(tokens[:, :-1])
        return tokens[:, -1:], *((state,) if isinstance(state, Tensor) else state)

    def forward(self, token: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Take a step."""
        logits, state = self.model(token, state)
        return logits, *((state,) if isinstance(state, Tensor) else state)


class Translations(Network):
    """Sources, and what was written so far, of fixed lengths with PAD behind: the next symbol's logits are what one needs."""

    inputs, outputs = ("sources", "tokens"), ("logits",)
    says = (
        "sources (B, S), or images (B, C, H, W), and what was written (B, T), START (1) first, both with PAD (0) behind, to "
        "logits (B, T, V) of what comes behind each; what is behind a token does not change its logits"
    )

    def example(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sources, and what should be written."""
        sources, targets = batch
        if sources.ndim == 2:
            sources = to_length(sources, longest(self.data))
        return sources, to_length(targets[:, :-1], self.model.max_length)


# -- boxes ---------------------------------------------------------------------------------------------------------------


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
    return to_corners(said.boxes[-1]) * torch.tensor([width, height, width, height]), said.logits[-1].softmax(-1)[
        ..., :-1
    ]


CANDIDATES = {
    SlidingWindow: sliding_windows,
    Localizer: one_object,
    RetinaNet: moved_anchors,
    FCOS: places,
    YOLO: cells,
    DETR: answers,
}


# -- what has no graph ---------------------------------------------------------------------------------------------------


class Batches(Network):
    """Models whose forward pass is no function of tensors alone: only what comes first in a batch has a name."""

    outputs = ()

    def example(self, batch: Any) -> tuple[Any, ...]:
        """Return all of the batch."""
        return tuple(batch)


class Found(Batches):
    """Detectors whose candidates are not known here."""

    inputs = ("images",)
    says = "pictures and targets to what is found in each"
    why_not = "what it finds in a picture is not of one shape; what it says of every place would be: see exporting/networks.py"

    def forward(self, images: Tensor, targets: list[dict]) -> tuple[Tensor, ...]:
        """Return what was found, picture by picture."""
        return tuple(tensor for found in self.model(images, targets) for _, tensor in sorted(found.items()))


class TwoStages(Found):
    """Detectors that look again at what they, or a method of the data's, have proposed."""

    why_not = "it looks again at as many regions as were proposed for a picture: the shapes in its graph depend on the picture"


class Nodes(Batches):
    """Graph networks."""

    inputs = ("nodes",)
    says = "nodes and a graph to logits of each node"
    why_not = (
        "it multiplies by the sparse matrices of a whole graph, which these formats do not have, and there is no batch"
    )

    def forward(self, nodes: Tensor, labels: Tensor, graph: Any) -> tuple[Tensor]:
        """Return the nodes' logits."""
        return (self.model(graph)[nodes],)


KINDS = (  # of which the first that fits counts
    (NodeClassifier, Nodes),
    (SequenceClassifier, Texts),
    (Classifier, Pictures),
    (SequenceRegressor, Forecasts),
    (Regressor, Numbers),
    (Segmenter, Masks),
    (tuple(CANDIDATES), Boxes),
    (RCNN, TwoStages),
    (Detector, Found),
    (RecurrentLM, Step),
    (LanguageModel, Tokens),
    (Translator, Translations),
    (GAN, Samples),
    (Autoencoder, Codes),
    (nn.Module, Network),
)


def network_of(model: nn.Module, data: LightningDataModule) -> Network:
    """Return the model as a function of tensors, in evaluation mode."""
    kind = next(kind for models, kind in KINDS if isinstance(model, models))
    return kind(model, data).eval()


# -- test inputs ---------------------------------------------------------------------------------------------------------


def sample_batch(data: LightningDataModule, count: int) -> Any:
    """Return the first test batch as the model gets it, of at most so many samples; the data module has a trainer."""
    if hasattr(data, "num_workers"):
        data.num_workers = 0  # for one batch
    batch = next(iter(data.test_dataloader()))
    if not any(hasattr(part, "edges") for part in batch):  # a graph is whole
        batch = tuple(part[:count] for part in batch)
    return data.on_after_batch_transfer(batch, 0)


def longest(data: LightningDataModule) -> int:
    """Return how many symbols the longest sequence has that the data module knows."""
    return max(s.tensors[0].shape[1] for s in (data.train_set, data.val_set, data.test_set) if s is not None)


def to_length(tokens: Tensor, length: int) -> Tensor:
    """Return tokens (B, T) with PAD behind them, or cut off, to (B, length)."""
    return F.pad(tokens[:, :length], (0, max(length - tokens.shape[1], 0)), value=PAD)


@contextlib.contextmanager
def traceable(network: nn.Module) -> Iterator[None]:
    """Within it, `torch.export` can follow a network, and what it finds holds for batches of any length.

    Recurrent networks compute step by step, since the library's packed sequences are in no graph. `len` of a tensor, which in
    Python is a number, and with it that of the batch at hand, is a length of the graph's. And so with `take_along_dim`.
    """
    fused = [module for module in network.modules() if isinstance(module, RNN)]
    ours = [module for name, module in sys.modules.items() if name.startswith("lit_models.")]
    with contextlib.ExitStack() as changed:
        for module in fused:
            changed.enter_context(patch.object(module, "fused", False))
        for module in ours:
            changed.enter_context(patch.object(module, "len", length, create=True))
        changed.enter_context(patch.object(Tensor, "take_along_dim", take_along_dim))
        yield


def length(x: Any) -> int:
    """Return `len(x)`."""
    return x.shape[0] if isinstance(x, Tensor) else len(x)


def take_along_dim(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Return `x.take_along_dim(index, dim)`, where the index is as long as x, or 1, in the other dimensions."""
    return x.gather(dim, index.expand(*x.shape[:dim], index.shape[dim], *x.shape[dim + 1 :]))
