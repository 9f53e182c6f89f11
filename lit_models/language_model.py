"""Language models: how probable is each token that may come next, given those before it?

    log p(text) = log p(x_1) + log p(x_2 | x_1) + log p(x_3 | x_1, x_2) + ...

The loss is minus one of these terms, in nats; its mean over all tokens, divided by log 2, is how many bits a token takes
when the text is compressed with the model (Shannon 1948), and exp of it, the perplexity, of how many equally probable
tokens one would have to guess. What is sampled from the probabilities, one token after the other, is new text.

Here are the task, and a recurrent network (Mikolov et al. 2010; Karpathy 2015, "The unreasonable effectiveness of
recurrent neural networks"); `transformer.py` has GPT.

Shapes: B batch, T tokens, V vocabulary, D width of the embedding, L layers, H hidden units.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from callbacks.language import LanguagePictures
from datamodules.vocabulary import IGNORE, Vocabulary
from lit_models.rnn import RNN, State
from lit_models.tasks import Task
from runner.errors import InputError


class LanguageModel(Task):
    """Tokens to logits of the next ones.

    Batches are (inputs (B, T), targets (B, T)), int64; the target is the token behind the input, or IGNORE.
    `train/loss` is in nats a token since the last log; `val/loss` and `test/loss` are the sum over all tokens of the text
    divided by their number. `test/perplexity` is exp of it, `test/bits` the same in bits a token.

    Args:
        vocabulary: V; more than the data has is no mistake, the rest just never comes.
        task: arguments of `Task`.
    """

    tag = "language"
    pictures = LanguagePictures

    def __init__(self, vocabulary: int, **task):
        if vocabulary < 2:
            raise InputError(f"vocabulary: 2 at least, or there is nothing to predict; got {vocabulary}")
        super().__init__(**task)
        self.vocabulary = vocabulary
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def forward(self, tokens: Tensor, state=None) -> tuple[Tensor, object]:
        """Map tokens (B, T), and a state that knows of those before them, to logits (B, T, V) and the new state."""
        raise NotImplementedError

    def read(self, inputs: Tensor, stage: str) -> Tensor:
        """Map a batch's inputs (B, T) to logits (B, T, V), in stage `train`, `val` or `test`."""
        return self(inputs)[0]

    # -- steps -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that the model has numbers for all of the data's symbols.

        Raises:
            InputError: it has not.
        """
        data = self.trainer.datamodule
        symbols = len(getattr(data, "vocabulary", ()))
        if symbols > self.vocabulary:
            raise InputError(
                f"{type(self).__name__} has a vocabulary of {self.vocabulary}, but {type(data).__name__} has {symbols} "
                f"symbols: --model.vocabulary {symbols}"
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the batch's tokens."""
        inputs, targets = batch
        logits = self.read(inputs, "train")
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)  # (B T, V), (B T,)
        count = (targets != IGNORE).sum()
        self.log_train(batch_idx, count, loss=loss * count)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to `val/loss`."""
        self._evaluate(batch, "val", self.val_loss)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Add a batch to `test/loss`; return each token's loss (B, T), 0 where the target is IGNORE, for the pictures."""
        return self._evaluate(batch, "test", self.test_loss)

    def on_test_epoch_end(self) -> None:
        """Say the same as perplexity and in bits."""
        loss = self.test_loss.compute()
        self.log_dict({"test/perplexity": loss.exp(), "test/bits": loss / math.log(2)})

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, metric: MeanMetric) -> Tensor:
        inputs, targets = batch
        logits = self.read(inputs, stage).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        metric.update(losses, (targets != IGNORE).flatten().float())
        self.log(f"{stage}/loss", metric, batch_size=len(inputs))
        return losses.view_as(targets)

    # -- new text ----------------------------------------------------------------------------------------------------

    def next_logits(self, text: Tensor, state) -> tuple[Tensor, object]:
        """Return logits (B, V) of what follows the text, and the state for the next call.

        Args:
            text: (B, n), what there is so far.
            state: from the call before, which saw all but the last token; None: nothing was seen.
        """
        logits, state = self(text if state is None else text[:, -1:], state)
        return logits[:, -1], state

    @torch.inference_mode()
    def sample(
        self,
        prompt: Tensor,
        count: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        symbols: int | None = None,
    ) -> Tensor:
        """Draw tokens that follow a prompt, each given all before it.

        Args:
            prompt: (B, n), at least one token.
            count: tokens to draw.
            temperature: logits are divided by it: below 1 the probable becomes more so; 0 takes the most probable.
            top_k: only the k most probable may be drawn; None: all.
            generator: of the draws, on the CPU: the same seed draws the same.
            symbols: only the first so many of the vocabulary may be drawn, as there are no more in the text; None: all.

        Returns:
            (B, count).

        Raises:
            InputError: the prompt is empty, or a setting is out of its range.
        """
        if prompt.ndim != 2 or not prompt.shape[1]:
            raise InputError("the prompt is empty: one token at least")
        if not 0 <= temperature < math.inf or count < 0 or (top_k is not None and top_k < 1):
            raise InputError(f"temperature and length start at 0, top_k at 1; got {temperature}, {count} and {top_k}")
        was_training, state, text = self.training, None, prompt.to(self.device)
        self.eval()
        for _ in range(count):
            logits, state = self.next_logits(text, state)
            logits = logits[:, :symbols].float()  # (B, V) -> (B, symbols)
            if temperature == 0:
                token = logits.argmax(dim=1, keepdim=True)
            else:
                if top_k is not None and top_k < logits.shape[1]:
                    least = logits.topk(top_k).values[:, -1:]  # (B, 1)
                    logits = logits.masked_fill(logits < least, -math.inf)
                probabilities = ((logits - logits.amax(dim=1, keepdim=True)) / temperature).softmax(dim=1)
                token = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(text.device)
            text = torch.cat([text, token], dim=1)  # (B, n + 1)
        self.train(was_training)
        return text[:, prompt.shape[1] :]

    def write(self, prompt: str, vocabulary: Vocabulary, count: int, **how) -> str:
        """Return text that continues a prompt; `how` are arguments of `sample`.

        Raises:
            InputError: the prompt is empty, or has a character that is not in the vocabulary.
        """
        tokens = torch.tensor([vocabulary.encode(prompt)], dtype=torch.int64)  # (1, n)
        return vocabulary.decode(self.sample(tokens, count, symbols=len(vocabulary), **how)[0])


class RecurrentLM(LanguageModel):
    """Embedding, recurrent network, linear layer.

    Validation and test carry the state along the text: it is 0 only at the start of the parallel streams that the data
    module reads. So does training if the data module reads streams (`order: streams`), from batch to batch, without its
    gradient: truncated backpropagation through time. Else a training window begins with state 0.

    Args:
        vocabulary: V.
        network: `{class_path: lit_models.lstm.LSTM, init_args: {n_in: D, hidden: H}}`; its n_in is the embedding's width.
        dropout: share of the embedding, and of the last layer's outputs, set to zero in training.
        task: arguments of `Task`.
    """

    def __init__(self, vocabulary: int, network: RNN, dropout: float = 0.0, **task):
        super().__init__(vocabulary, **task)
        self.embedding = nn.Embedding(vocabulary, network.n_in)
        self.network = network
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(network.hidden, vocabulary)
        self.carried: dict[str, State] = {}

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Map tokens (B, T) and a state (L, B, H) to logits (B, T, V) and the new state."""
        x = self.dropout(self.embedding(tokens))  # (B, T, D)
        outputs, state = self.network(x, state=state)  # (B, T, H)
        return self.head(self.dropout(outputs)), state

    def read(self, inputs: Tensor, stage: str) -> Tensor:
        """As in `LanguageModel`; with the state that the batch before has left, where the data goes on."""
        if stage not in getattr(self.trainer.datamodule, "streams", ()):
            return self(inputs)[0]
        state = self.carried.get(stage)
        if state is not None:
            state = _map(state, lambda s: s[:, : len(inputs)])  # the last streams may be shorter
        logits, state = self(inputs, state)
        self.carried[stage] = _map(state, Tensor.detach)
        return logits

    def on_train_epoch_start(self) -> None:
        """Begin the text anew."""
        super().on_train_epoch_start()
        self.carried.pop("train", None)

    def on_validation_epoch_start(self) -> None:
        """Begin the text anew."""
        self.carried.pop("val", None)

    def on_test_epoch_start(self) -> None:
        """Begin the text anew."""
        self.carried.pop("test", None)


def _map(state: State, function) -> State:
    return function(state) if isinstance(state, Tensor) else tuple(map(function, state))
