"""Translation with the Transformer (Vaswani et al. 2017), what it was made for: `transformer.py` has its two halves.

Instead of a state that goes from place to place, every token looks at every other one: the encoder's at all of the source,
the decoder's at what was written before them, and at the encoder's. So all steps of training are computed at once. When
the model writes on its own, one token after the other, a cache keeps the keys and values of those before it.

Shapes: B batch, S places of the source, T steps of the target, D width, h heads, V symbols; tokens as in `seq2seq.py`.
"""

from typing import NamedTuple

from torch import Tensor, nn

from datamodules.vocabulary import PAD
from lit_models.attention import KeyValueCache
from lit_models.seq2seq import Translator
from lit_models.transformer import Transformer, sinusoids
from runner.errors import InputError


class Progress(NamedTuple):
    """What the decoder needs to go on."""

    memory: Tensor  # of the encoder, (B, S, D)
    mask: Tensor  # where the source is: (B, 1, 1, S)
    cache: list[tuple[KeyValueCache, KeyValueCache]]  # of each block; it grows as the decoder writes


class TranslationTransformer(Translator):
    """Embeddings and positions, added; encoder and decoder, pre-norm; a linear map to the logits.

    The paper multiplies embeddings by sqrt(D); here they begin with variance 1, as they would be then.

    Args:
        sources: symbols of the sources, the special ones included.
        targets, max_length, label_smoothing, task: as in `Translator`.
        layers: blocks of the encoder, and of the decoder.
        width: D.
        heads: h, a divisor of D.
        hidden: width of the blocks' hidden layers; None: 4 D.
        dropout: of embeddings and blocks.

    Raises:
        InputError: a size makes no sense.
    """

    def __init__(
        self,
        sources: int,
        targets: int,
        layers: int = 2,
        width: int = 64,
        heads: int = 4,
        hidden: int | None = None,
        dropout: float = 0.0,
        max_length: int = 20,
        label_smoothing: float = 0.0,
        **task,
    ):
        if sources < 1:
            raise InputError(f"sources starts at 1, got {sources}")
        super().__init__(targets, max_length, label_smoothing, **task)
        self.sources = sources
        self.transformer = Transformer(layers, width, heads, hidden=hidden, dropout=dropout)
        self.source_embedding = nn.Embedding(sources, width, padding_idx=PAD)
        self.target_embedding = nn.Embedding(targets, width, padding_idx=PAD)
        self.logits = nn.Linear(width, targets)
        self.dropout = nn.Dropout(dropout)
        for name, parameter in self.transformer.named_parameters():
            if parameter.ndim > 1 and "in_proj" not in name:  # as the library's Transformer; the rest begins so
                nn.init.xavier_uniform_(parameter)

    def read(self, sources: Tensor) -> Progress:
        """Encode sources (B, S)."""
        mask = (sources != PAD)[:, None, None]
        memory = self.transformer.encoder(self._embed(self.source_embedding, sources), mask)
        return Progress(memory, mask, self.transformer.decoder.new_cache())

    def write(self, tokens: Tensor, state: Progress) -> tuple[Tensor, Progress, Tensor | None]:
        """Go on writing, see `Translator.write`. Where it looked is the mean over the last block's heads.

        The state's cache is added to. In training it does not tell where it looked: the fused attention does not know.
        """
        seen: list[Tensor] | None = None if self.training else []  # of each block, (B, h, T, S)
        x = self._embed(self.target_embedding, tokens, past=len(state.cache[0][0]))
        x = self.transformer.decoder(x, state.memory, memory_mask=state.mask, cache=state.cache, seen=seen)
        return self.logits(x), state, seen[-1].mean(dim=1) if seen else None

    def _embed(self, embedding: nn.Embedding, tokens: Tensor, past: int = 0) -> Tensor:
        """Return embeddings (B, T, D) of tokens (B, T), of which `past` were before these, with their positions."""
        x = embedding(tokens)
        return self.dropout(x + sinusoids(past + tokens.shape[1], x.shape[2])[past:].to(x))
