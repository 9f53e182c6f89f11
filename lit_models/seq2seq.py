"""Sequence to sequence with attention (Bahdanau et al. 2015; Sutskever et al. 2014): one network reads, another writes.

The reader's last state alone would have to hold the whole source. So it leaves a state at every place of it, and before
each symbol that the writer writes, it looks where it likes: attention's weights say how much it looked at each place.

    memory = states of the encoder at all places of the source           s_0 = tanh(W its last ones)
    c_t = attention(s_{t-1}, memory)                                     what it saw
    s_t = cell([embedding of y_{t-1}, c_t], s_{t-1})
    p(y_t) = softmax(W [s_t, c_t])                                       y_0 = START; it ends with END

In training, y_{t-1} is the symbol that is right (teacher forcing), whatever the model would have written there. When it
writes on its own, it is the most likely one of the step before (greedy decoding).

Shapes: B batch, S places of the longest source, T steps of the longest target, E width of the embeddings, H hidden units,
M width of the memory, V symbols; tokens are int64, PAD (0) behind the shorter sequences.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from callbacks.translations import TranslationPictures
from datamodules.vocabulary import PAD, lengths
from lit_models.attention import AdditiveAttention, DotAttention
from lit_models.lstm import GRU, LSTM
from lit_models.tasks import Task
from runner.errors import InputError

START, END = 1, 2  # of target vocabularies: they have PAD and ends, and no UNKNOWN
CELLS = {"gru": GRU, "lstm": LSTM}


class Translator(Task):
    """Sources to sequences of symbols.

    Batches are (sources, targets (B, T)); a target is START, its symbols, END, and PAD behind it. A subclass has `read` and
    `write`. Of `val` and `test`, over the whole set:

    - `exact`: share of the samples whose whole output is right, in greedy decoding: the model gets nothing but the source.
    - `loss`: nats a symbol, and `acc`: share of the symbols that are right, both with all symbols before it given, END
      counted and PAD not.

    `train/loss` and `train/acc` are the same over the symbols since the last log, in training.

    Args:
        targets: V, the special symbols included.
        max_length: symbols after which decoding stops, END included.
        label_smoothing: how much of a training symbol's weight is shared out among all symbols (Szegedy et al. 2016).
        task: arguments of `Task`.

    Raises:
        InputError: one of them makes no sense.
    """

    tag = "translation"
    pictures = TranslationPictures

    def __init__(self, targets: int, max_length: int = 20, label_smoothing: float = 0.0, **task):
        if targets <= END + 1:
            raise InputError(f"targets: PAD, START, END and a symbol at least, got {targets}")
        if max_length < 1:
            raise InputError(f"max_length starts at 1, got {max_length}")
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must be from 0 to below 1, got {label_smoothing}")
        super().__init__(**task)
        self.targets, self.max_length, self.label_smoothing = targets, max_length, label_smoothing
        self.means = nn.ModuleDict(
            {f"{stage}_{name}": MeanMetric() for stage in ("val", "test") for name in ("loss", "acc", "exact")}
        )

    def read(self, sources: Tensor) -> Any:
        """Return all that `write` needs to know of sources (B, ...) to begin."""
        raise NotImplementedError

    def write(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        """Go on writing.

        Args:
            tokens: the last ones that were written, (B, T), START first; the model has not seen them yet.
            state: what `read`, or the `write` before, returned.

        Returns:
            logits (B, T, V) of what comes behind each token, the state to go on from, and where the model looked,
            (B, T, S), if it tells.
        """
        raise NotImplementedError

    def forward(self, sources: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits (B, T, V) of what comes behind each of the tokens (B, T), START first: teacher forcing."""
        return self.write(tokens, self.read(sources))[0]

    def translate(self, sources: Tensor) -> tuple[Tensor, Tensor | None]:
        """Write the most likely symbol, time and again, until all have ended or `max_length` is reached.

        Returns:
            tokens (B, T), without START; behind END there is PAD, and where there is no END, the model came to none. And
            where it looked before it wrote each, (B, T, S), if it tells.
        """
        state = self.read(sources)
        tokens = torch.full((len(sources), 1), START, device=sources.device)  # (B, 1)
        has_ended = torch.zeros_like(tokens, dtype=torch.bool)
        written, looks = [], []
        for _ in range(self.max_length):
            logits, state, weights = self.write(tokens, state)  # (B, 1, V)
            logits[..., [PAD, START]] = -torch.inf  # nothing that is ever to be written
            tokens = logits.argmax(dim=2).masked_fill(has_ended, PAD)  # (B, 1)
            written.append(tokens)
            looks.append(weights)
            has_ended |= tokens == END
            if has_ended.all():
                break
        return torch.cat(written, dim=1), None if looks[0] is None else torch.cat(looks, dim=1)

    @staticmethod
    def is_exact(tokens: Tensor, targets: Tensor) -> Tensor:
        """Whether what was written (B, T), without START, is all that should have been: (B,) bool.

        Args:
            tokens: from `translate`.
            targets: with START; PAD behind either counts as nothing.
        """
        targets = targets[:, 1:]
        width = max(tokens.shape[1], targets.shape[1])
        tokens, targets = (F.pad(t, (0, width - t.shape[1]), value=PAD) for t in (tokens, targets))
        return (tokens == targets).all(dim=1)

    # -- steps -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that the data's vocabularies are as large as the model's."""
        data = self.trainer.datamodule
        for name in ("source", "target"):
            size = getattr(self, f"{name}s", None)
            vocabulary = getattr(data, f"{name}_vocabulary", None)
            if size and vocabulary and len(vocabulary) != size:
                raise InputError(
                    f"{type(self).__name__} has {size} {name} symbols, but {type(data).__name__} has "
                    f"{len(vocabulary)}: --model.{name}s {len(vocabulary)}"
                )
        vocabulary = getattr(data, "target_vocabulary", None)
        if vocabulary and (vocabulary.start, vocabulary.end) != (START, END):
            raise InputError(f"{type(data).__name__}: a target vocabulary begins with PAD, START, END")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss, nats a symbol."""
        sums, loss = self._teach(*batch, self.label_smoothing)
        count = sums.pop("count")
        self.log_train(batch_idx, count, **sums)
        return loss / count

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation's metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor | None]:
        """Add a batch to the test's metrics; return what was written and where it looked, as `translate` does."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return what is written for a batch of (sources, ...): (B, T)."""
        return self.translate(batch[0])[0]

    def _teach(
        self, sources: Tensor, targets: Tensor, label_smoothing: float = 0.0
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return sums over the symbols, `loss`, `acc` and their `count`; and the loss to be minimised, a sum as well."""
        logits = self(sources, targets[:, :-1]).flatten(0, 1)  # (B, T - 1, V) -> (B (T - 1), V)
        symbols = targets[:, 1:].flatten()  # (B (T - 1),)
        loss = F.cross_entropy(logits, symbols, ignore_index=PAD, reduction="sum", label_smoothing=label_smoothing)
        counts = symbols != PAD
        right = (logits.detach().argmax(dim=1) == symbols) & counts
        return {"loss": loss, "acc": right.sum(), "count": counts.sum()}, loss

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> tuple[Tensor, Tensor | None]:
        sources, targets = batch
        longest = int(lengths(targets).max()) - 1
        if longest > self.max_length:
            raise InputError(f"max_length: {self.max_length}, but there are targets of {longest}: --model.max_length")
        sums, _ = self._teach(sources, targets)
        count = sums.pop("count")
        means = {name: (value / count, count) for name, value in sums.items()}
        tokens, weights = self.translate(sources)
        means["exact"] = (self.is_exact(tokens, targets).float().mean(), len(targets))
        for name, (value, weight) in means.items():
            metric = self.means[f"{stage}_{name}"]
            metric.update(value.float(), weight)
            self.log(f"{stage}/{name}", metric, batch_size=len(targets), prog_bar=name == "exact")
        return tokens, weights


# -- the networks ------------------------------------------------------------------------------------------------------


class BidirectionalEncoder(nn.Module):
    """Two recurrent networks, one of which reads from right to left: each place's states know what is on both its sides.

    Args:
        symbols: in sources, the special ones included.
        width: E.
        hidden: M, units of both networks together.
        cell: `gru` or `lstm`.
        dropout: share of the embeddings' numbers set to zero in training.
        fused: whether the library's layer computes, see `RNN`.
    """

    def __init__(self, symbols: int, width: int, hidden: int, cell: str, dropout: float = 0.0, fused: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width, padding_idx=PAD)
        self.ahead = CELLS[cell](width, hidden // 2, fused=fused)
        self.back = CELLS[cell](width, hidden // 2, fused=fused)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens (B, S) to the memory (B, S, M), 0 where there is PAD, and both networks' last states (B, M)."""
        x, places = self.dropout(self.embedding(tokens)), lengths(tokens)  # (B, S, E), (B,)
        ahead, last = self.ahead(x, places)  # (B, S, M / 2)
        back, first = self.back(reverse(x, places), places)
        states = [state if isinstance(state, Tensor) else state[0] for state in (last, first)]  # each (1, B, M / 2)
        return torch.cat([ahead, reverse(back, places)], dim=2), torch.cat(states, dim=2)[0]


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Turn sequences (B, S, D) round, each within its length (B,); what is behind it stays where it is."""
    places = torch.arange(x.shape[1], device=x.device)  # (S,)
    places = torch.where(places < lengths[:, None], lengths[:, None] - 1 - places, places)  # (B, S)
    return x.take_along_dim(places[..., None], dim=1)


class Reading(NamedTuple):
    """Where a decoder is."""

    memory: Tensor  # (B, S, M)
    keys: Tensor  # of it, (B, S, A)
    mask: Tensor | None  # where there is something to look at: (B, 1, S)
    output: Tensor  # s_{t-1}: (B, 1, H)
    cells: tuple[Tensor, ...]  # s_{t-1} as the cell wants it: (1, B, H), of an LSTM two of them


class AttentionDecoder(nn.Module):
    """A recurrent network that looks at a memory before each step; the formulas are at the top of this file.

    (Whatever the score, it looks before the cell's step, as in Bahdanau et al.; in Luong et al. it looks after it.)

    Args:
        symbols: V.
        memory: M.
        width: E.
        hidden: H.
        cell: `gru` or `lstm`.
        attention: `additive`, `dot` or `general`: see `attention.py`.
        dropout: share of the embeddings' numbers, and of those that the logits are made of, set to zero in training.
        fused: whether the library's layer computes, see `RNN`.
    """

    def __init__(
        self,
        symbols: int,
        memory: int,
        width: int,
        hidden: int,
        cell: str,
        attention: str,
        dropout: float = 0.0,
        fused: bool = True,
    ):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width, padding_idx=PAD)
        self.start = nn.Linear(memory, hidden)
        if attention == "additive":
            self.attention = AdditiveAttention(hidden, memory, hidden)
        else:
            self.attention = DotAttention(hidden, memory, attention)
        self.cell = CELLS[cell](width + memory, hidden, fused=fused)
        self.logits = nn.Linear(hidden + memory, symbols)
        self.dropout = nn.Dropout(dropout)

    def begin(self, memory: Tensor, summary: Tensor, mask: Tensor | None = None) -> Reading:
        """Return where to begin, with a memory (B, S, M), its summary (B, M), and where one may look (B, S)."""
        output = self.start(summary).tanh()  # (B, H)
        cells = (output[None], *[torch.zeros_like(output[None])] * (self.cell.states - 1))
        return Reading(
            memory, self.attention.keys(memory), None if mask is None else mask[:, None], output[:, None], cells
        )

    def forward(self, tokens: Tensor, state: Reading) -> tuple[Tensor, Reading, Tensor]:
        """Take a step for each of the tokens (B, T): see `Translator.write`."""
        found, looks = [], []
        for x in self.dropout(self.embedding(tokens)).split(1, dim=1):  # each (B, 1, E)
            seen, weights = self.attention(state.output, state.keys, state.memory, state.mask)  # (B, 1, M), (B, 1, S)
            output, cells = self.cell(torch.cat([x, seen], dim=2), state=state.cells)  # (B, 1, H)
            state = state._replace(output=output, cells=cells if isinstance(cells, tuple) else (cells,))
            found.append(torch.cat([output, seen], dim=2))
            looks.append(weights)
        logits = self.logits(self.dropout(torch.cat(found, dim=1)))  # (B, T, H + M) -> (B, T, V)
        return logits, state, torch.cat(looks, dim=1)


class AttentionSeq2Seq(Translator):
    """A bidirectional encoder, and a decoder that looks at what it left.

    Args:
        sources: symbols of the sources, the special ones included.
        targets, max_length, label_smoothing, task: as in `Translator`.
        width: E, of both embeddings.
        hidden: M and H, which are the same: units of the encoder's two networks together, and of the decoder.
        cell: of all three networks.
        attention: how a place of the source is scored, see `attention.py`.
        dropout: see `AttentionDecoder`.
        fused: whether the library's layer computes, see `RNN`.

    Raises:
        InputError: a size makes no sense.
    """

    def __init__(
        self,
        sources: int,
        targets: int,
        width: int = 64,
        hidden: int = 128,
        cell: Literal["gru", "lstm"] = "gru",
        attention: Literal["additive", "dot", "general"] = "additive",
        dropout: float = 0.0,
        fused: bool = True,
        max_length: int = 20,
        label_smoothing: float = 0.0,
        **task,
    ):
        if min(sources, width) < 1:
            raise InputError(f"sources and width start at 1, got {sources} and {width}")
        if hidden < 2 or hidden % 2:
            raise InputError(
                f"hidden: half of the units read from the left, half from the right: an even number, got {hidden}"
            )
        super().__init__(targets, max_length, label_smoothing, **task)
        self.sources = sources
        self.encoder = BidirectionalEncoder(sources, width, hidden, cell, dropout, fused)
        self.decoder = AttentionDecoder(targets, hidden, width, hidden, cell, attention, dropout, fused)

    def read(self, sources: Tensor) -> Reading:
        """Read sources (B, S)."""
        memory, summary = self.encoder(sources)
        return self.decoder.begin(memory, summary, sources != PAD)

    def write(self, tokens: Tensor, state: Reading) -> tuple[Tensor, Reading, Tensor]:
        """Go on writing, see `Translator.write`."""
        return self.decoder(tokens, state)
