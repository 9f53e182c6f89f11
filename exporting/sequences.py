"""Models of series and texts as functions of tensors.

Shapes: B batch, C channels, H height, W width, S symbols of a source, T of a target, V vocabulary, L layers, H' hidden units.
"""

import torch.nn.functional as F
from pytorch_lightning import LightningDataModule
from torch import Tensor

from datamodules.vocabulary import PAD
from exporting.network import Network
from lit_models.language_model import RecurrentLM


class Forecasts(Network):
    """Forecasters of a series."""

    inputs, outputs = ("x",), ("y",)
    says = "the values so far (B, T) to the next ones (B, horizon), normalised as the training part was"


class Texts(Network):
    """Classifiers of texts, which are padded to one length: it is the longest's of the data."""

    inputs, outputs = ("tokens",), ("logits",)
    says = "tokens (B, T), PAD (0) behind what is shorter, to logits (B, K)"

    def example(self, batch: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Pad the tokens."""
        return (to_length(batch[0], longest(self.data)),)


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


def longest(data: LightningDataModule) -> int:
    """Return how many symbols the longest sequence has that the data module knows."""
    return max(s.tensors[0].shape[1] for s in (data.train_set, data.val_set, data.test_set) if s is not None)


def to_length(tokens: Tensor, length: int) -> Tensor:
    """Return tokens (B, T) with PAD behind them, or cut off, to (B, length)."""
    return F.pad(tokens[:, :length], (0, max(length - tokens.shape[1], 0)), value=PAD)
