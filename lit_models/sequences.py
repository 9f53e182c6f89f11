"""Tasks on sequences for any recurrent network: the next values of a series, and the class of a text.

    x_1 ... x_T -> network -> h_1 ... h_T -> linear layer on the last, or on their mean

Shapes: B batch, T steps or symbols of the longest sequence, D numbers a step, E embedding, H hidden units, K classes.

Sources: lectures on recurrent networks, embeddings, and time series with LSTM.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.sequences import SeriesPictures, TextClassPictures
from datamodules.vocabulary import PAD, lengths
from lit_models.rnn import RNN
from lit_models.tasks import Classifier, Regressor
from runner.errors import InputError


class SequenceRegressor(Regressor):
    """The next values of a series from the values before them, by squared error.

    Batches are (values (B, T) or (B, T, D), next values (B, horizon)). Tested on data with `baselines`, it also tells
    theirs: `test/mse_persistence` (tomorrow is like today), `test/mse_linear` (linear autoregression); and `test/skill`,
    the share of the better one's error that it does without: 0 is as good, below 0 worse, 1 without error.

    Args:
        network: `{class_path: lit_models.lstm.LSTM, init_args: {n_in: D, hidden: H}}`.
        horizon: how many values to predict at once.
        task: arguments of `Regressor`.
    """

    pictures = SeriesPictures

    def __init__(self, network: RNN, horizon: int = 1, **task):
        super().__init__(**task)
        if horizon < 1:
            raise InputError(f"horizon: one value at least, got {horizon}")
        self.horizon, self.network = horizon, network
        self.head = nn.Linear(network.hidden, horizon)

    def forward(self, x: Tensor) -> Tensor:
        """Map a series (B, T) or (B, T, D) to its next values (B, horizon)."""
        outputs, _ = self.network(x if x.ndim == 3 else x.unsqueeze(2))  # (B, T, H)
        return self.head(outputs[:, -1])

    @torch.no_grad()
    def forecast(self, x: Tensor, steps: int) -> Tensor:
        """Run free from a series (B, T): what it predicts is what it goes on from. Returns (B, steps)."""
        T = x.shape[1]
        while x.shape[1] < T + steps:
            x = torch.cat([x, self(x[:, -T:]).to(x.dtype)], dim=1)
        return x[:, T : T + steps]

    def setup(self, stage: str) -> None:
        """Check that the data has as many values to predict.

        Raises:
            InputError: it has not.
        """
        data = self.trainer.datamodule
        if getattr(data, "horizon", self.horizon) != self.horizon:
            raise InputError(
                f"{type(self).__name__} predicts {self.horizon} value(s), but {type(data).__name__} has {data.horizon}: "
                f"--model.horizon {data.horizon}"
            )

    def on_test_epoch_end(self) -> None:
        """Log what needs no network, and by how much the model beats it."""
        if baselines := getattr(self.trainer.datamodule, "baselines", None):
            errors = baselines()
            self.log_dict({f"test/mse_{name}": error for name, error in errors.items()})
            least = min(errors.values())
            self.log("test/skill", 1 - self.test_mse.compute() / least if least else float("nan"))


class SequenceClassifier(Classifier):
    """Texts to one of K classes: embedding, recurrent network, linear layer.

    Batches are (tokens (B, T) int64, PAD behind the shorter ones, labels (B,)). Padding changes nothing: the network
    stands still in it, and neither the last state nor the mean has a part of it.

    Args:
        num_classes: K.
        vocabulary: how many different tokens there are, PAD included.
        network: `{class_path: lit_models.lstm.LSTM, init_args: {n_in: E, hidden: H}}`; its n_in is the embedding's width.
        pool: whether the class is told from the state after the last symbol, or from the mean of the states.
        dropout: share of the embeddings, and of what the linear layer gets, set to zero in training.
        classifier: arguments of `Classifier`.
    """

    pictures = TextClassPictures

    def __init__(
        self,
        num_classes: int,
        vocabulary: int,
        network: RNN,
        pool: Literal["last", "mean"] = "last",
        dropout: float = 0.0,
        **classifier,
    ):
        super().__init__(num_classes=num_classes, **classifier)
        if vocabulary < 2 or not 0 <= dropout < 1:
            raise InputError(
                f"vocabulary: PAD and one token at least, got {vocabulary}; dropout is from 0 to below 1, got {dropout}"
            )
        self.vocabulary, self.pool, self.dropout = vocabulary, pool, dropout
        self.embedding = nn.Embedding(vocabulary, network.n_in, padding_idx=PAD)
        self.network = network
        self.head = nn.Linear(network.hidden, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to logits (B, K)."""
        count = lengths(tokens)  # (B,)
        x = F.dropout(self.embedding(tokens), self.dropout, self.training)  # (B, T) -> (B, T, E)
        outputs, _ = self.network(x, count)  # (B, T, H), 0 in the padding
        if self.pool == "mean":
            seen = outputs.sum(dim=1) / count.clamp(min=1)[:, None]  # (B, H)
        else:
            seen = outputs[torch.arange(len(tokens), device=tokens.device), (count - 1).clamp(min=0)]  # (B, H)
        return self.head(F.dropout(seen, self.dropout, self.training))

    def setup(self, stage: str) -> None:
        """Check classes and vocabulary.

        Raises:
            InputError: the data has others.
        """
        super().setup(stage)
        data = self.trainer.datamodule
        known = getattr(data, "vocabulary", None)
        if known and len(known) != self.vocabulary:
            raise InputError(
                f"{type(self).__name__} has a vocabulary of {self.vocabulary}, but {type(data).__name__} has "
                f"{len(known)} tokens: --model.vocabulary {len(known)}"
            )
