"""Every kind of model as a function of tensors, and which kind a model is.

Shapes: B batch, C channels, H height, W width, D features, K classes, Z noise.
"""

from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from exporting.detectors import CANDIDATES, Boxes, Found, TwoStages
from exporting.network import Batches, Network
from exporting.sequences import Forecasts, Step, Texts, Tokens, Translations
from lit_models.autoencoder import Autoencoder, draws_of
from lit_models.detector import Detector
from lit_models.gan import GAN
from lit_models.gnn import NodeClassifier
from lit_models.language_model import LanguageModel, RecurrentLM
from lit_models.rcnn import RCNN
from lit_models.segmenter import Segmenter
from lit_models.seq2seq import Translator
from lit_models.sequences import SequenceClassifier, SequenceRegressor
from lit_models.tasks import Classifier, Regressor


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
