"""The Transformer: sequences without recurrence (Vaswani et al. 2017, "Attention is all you need").

A block is two steps, a decoder's three, and what a step finds is added to what it was given:

    attention         each token takes what it needs from others: the only place where tokens meet
    (cross-attention  a decoder's tokens take it from the encoder's)
    MLP               each token by itself: Linear, GELU or ReLU, Linear

    post-norm, as in the paper:    x = norm(x + step(x))
    pre-norm, as since GPT-2:      x = x + step(norm(x))        and one more norm behind the last block

With pre-norm there is a path from the last block to the first with nothing on it but additions, so gradients arrive as
they left (Xiong et al. 2020). Attention by itself does not know the order of tokens: their positions are added to them.

With copied weights equal to PyTorch's `nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer` and `nn.Transformer`.

Shapes: B batch, T tokens, S tokens of the source (or all that a token may look at), D width, h heads, V vocabulary. A mask
is bool, broadcastable to (B, h, T, S), and True where a token may look.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_models.attention import KeyValueCache, MultiHeadAttention
from lit_models.language_model import LanguageModel
from runner.errors import InputError


class Block(nn.Module):
    """What an encoder's and a decoder's block share: an MLP, and how a step is added.

    Args:
        width: D.
        heads: h, a divisor of D.
        hidden: width of the MLP's hidden layer; None: 4 D.
        dropout: share set to zero in training, of each step's result, of the hidden layer, and of attention's weights.
        activation: of the hidden layer.
        norm_first: pre-norm, else post-norm.
        bias: whether linear maps and norms have one.
        eps: what norms add to the variance.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int | None = None,
        dropout: float = 0.0,
        activation: Literal["gelu", "relu"] = "gelu",
        norm_first: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__()
        hidden = 4 * width if hidden is None else hidden
        self.norm_first = norm_first
        self.attention = MultiHeadAttention(width, heads, dropout, bias)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden, bias=bias),
            nn.GELU() if activation == "gelu" else nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width, bias=bias),
        )
        self.norm1 = nn.LayerNorm(width, eps=eps, bias=bias)
        self.norm2 = nn.LayerNorm(width, eps=eps, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def add(self, x: Tensor, norm: nn.LayerNorm, step: Callable[[Tensor], Tensor]) -> Tensor:
        """Return x (B, T, D) with a step's result added to it."""
        if self.norm_first:
            return x + self.dropout(step(norm(x)))
        return norm(x + self.dropout(step(x)))


def look(
    attention: MultiHeadAttention,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    causal: bool = False,
    cache: KeyValueCache | None = None,
    seen: list[Tensor] | None = None,
) -> Tensor:
    """Return what x (B, T, D) finds in memory (B, S, D): (B, T, D); add the weights (B, h, T, S) to `seen`, if it is there."""
    if seen is None:
        return attention(x, memory, memory, mask, causal, cache=cache)
    found, weights = attention(x, memory, memory, mask, causal, return_weights=True, cache=cache)
    seen.append(weights)
    return found


class EncoderBlock(Block):
    """Self-attention, MLP. With `causal`, which lets a token see only those before it, this is GPT's block."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Map x (B, T, D) to (B, T, D); the arguments are those of `Encoder.forward`."""
        x = self.add(x, self.norm1, lambda y: look(self.attention, y, y, mask, causal, cache, seen))
        return self.add(x, self.norm2, self.mlp)


class DecoderBlock(Block):
    """Self-attention, by default causal; attention to the encoder's tokens; MLP.

    Args:
        width, heads, hidden, dropout, bias, eps, block: arguments of `Block`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        eps: float = 1e-5,
        **block: Any,
    ):
        super().__init__(width, heads, hidden, dropout, bias=bias, eps=eps, **block)
        self.cross_attention = MultiHeadAttention(width, heads, dropout, bias)
        self.norm3 = nn.LayerNorm(width, eps=eps, bias=bias)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        causal: bool = True,
        cache: tuple[KeyValueCache, KeyValueCache] | None = None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Map x (B, T, D) and memory (B, S, D) to (B, T, D); the arguments are those of `Decoder.forward`."""
        own, other = cache or (None, None)
        x = self.add(x, self.norm1, lambda y: look(self.attention, y, y, mask, causal, own))
        x = self.add(
            x, self.norm2, lambda y: look(self.cross_attention, y, memory, memory_mask, cache=other, seen=seen)
        )
        return self.add(x, self.norm3, self.mlp)


class Encoder(nn.Module):
    """Blocks one behind the other.

    Args:
        layers: how many.
        width: D.
        heads: h.
        final_norm: whether one more norm comes behind the last block; None: with pre-norm.
        norm_first, bias, eps, block: arguments of `Block`.
    """

    block: type[Block] = EncoderBlock

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        final_norm: bool | None = None,
        norm_first: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        **block: Any,
    ):
        super().__init__()
        if layers < 1:
            raise InputError(f"layers: at least 1, got {layers}")
        block |= {"norm_first": norm_first, "bias": bias, "eps": eps}
        self.blocks = nn.ModuleList(self.block(width, heads, **block) for _ in range(layers))
        has_norm = norm_first if final_norm is None else final_norm
        self.norm = nn.LayerNorm(width, eps=eps, bias=bias) if has_norm else nn.Identity()

    def new_cache(self) -> list[KeyValueCache]:
        """Return an empty cache for each block."""
        return [KeyValueCache() for _ in self.blocks]

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: list[KeyValueCache] | None = None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Map tokens to tokens that know of each other.

        Args:
            x: (B, T, D).
            mask: where a token may look.
            causal: whether it sees only itself and what is before it.
            cache: of the tokens before x, from `new_cache`; those of x are added to it.
            seen: a list, to which each block adds its weights (B, h, T, S).

        Returns:
            (B, T, D).
        """
        for i, block in enumerate(self.blocks):
            x = block(x, mask, causal, cache[i] if cache else None, seen)
        return self.norm(x)


class Decoder(Encoder):
    """Blocks with attention to an encoder's tokens. Arguments as for `Encoder`."""

    block = DecoderBlock

    def new_cache(self) -> list[tuple[KeyValueCache, KeyValueCache]]:
        """Return for each block an empty cache of its own tokens, and one of the encoder's."""
        return [(KeyValueCache(), KeyValueCache(grows=False)) for _ in self.blocks]

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        causal: bool = True,
        cache: list[tuple[KeyValueCache, KeyValueCache]] | None = None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Map tokens to tokens that know of those before them, and of the encoder's.

        Args:
            x: (B, T, D).
            memory: of the encoder, (B, S, D).
            mask: where a token may look among x.
            memory_mask: where it may look in the memory: `(sources != PAD)[:, None, None]`.
            causal: whether it sees only itself and what is before it, of x.
            cache: of the tokens before x, from `new_cache`; those of x are added to it.
            seen: a list, to which each block adds its weights on the memory (B, h, T, S).

        Returns:
            (B, T, D).
        """
        for i, block in enumerate(self.blocks):
            x = block(x, memory, mask, memory_mask, causal, cache[i] if cache else None, seen)
        return self.norm(x)


class Transformer(nn.Module):
    """The paper's two halves: an encoder of what is read, and a decoder of what is written about it.

    Args:
        layers: of each half.
        width: D.
        heads: h.
        block: more arguments of `Encoder` and `Block`.
    """

    def __init__(self, layers: int, width: int, heads: int, **block: Any):
        super().__init__()
        self.encoder = Encoder(layers, width, heads, **block)
        self.decoder = Decoder(layers, width, heads, **block)

    def forward(self, sources: Tensor, targets: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Map sources (B, S, D) and targets (B, T, D) to (B, T, D), each of which knows the targets before it.

        Args:
            sources, targets: embedded, with their positions.
            source_mask: broadcastable to (B, h, T or S, S), such as `(sources != PAD)[:, None, None]`.
        """
        return self.decoder(targets, self.encoder(sources, source_mask), memory_mask=source_mask)


def sinusoids(length: int, width: int) -> Tensor:
    """Return the paper's positions (length, D), which are added to embeddings and not learned.

    Numbers 2i and 2i + 1 of position t are sin and cos of t / 10000^(2i / D): clocks, from quick to slow hands.
    """
    rates = torch.exp(-math.log(10_000) / width * torch.arange(0, width, 2))  # (D / 2,)
    angles = torch.arange(length).unsqueeze(1) * rates  # (length, D / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]  # (length, D)


class TransformerLM(LanguageModel):
    """GPT: what comes next, from the tokens before it (Radford et al. 2019, in nanoGPT's form).

    Embeddings of tokens and of positions are added, pre-norm blocks with a causal mask follow, and a last norm; a linear
    map, whose matrix may be the tokens' embeddings again, gives the logits. Weights begin as GPT-2's: N(0, 0.02^2) at its
    width of 768, and those that add to the path from block to block smaller by sqrt(2 * layers), as there are so many of
    them. At another width the 0.02 changes by sqrt(768 / D), so that the sums over D inputs are as large as GPT-2's.
    (nanoGPT keeps 0.02 at every width: at 128 the network then begins too small, and learns more slowly.)

    Args:
        vocabulary: V.
        context: how many tokens it sees at most.
        layers: blocks.
        heads: h.
        width: D.
        dropout: of embeddings and blocks.
        bias: whether linear maps and norms have one.
        tied: whether the last linear map's matrix is that of the embeddings (Press and Wolf 2017).
        task: arguments of `Task`. Weight decay, if the optimiser has any, is of matrices only, not of norms and biases.

    Raises:
        InputError: a size is below 1, or the heads do not divide the width.
    """

    def __init__(
        self,
        vocabulary: int = 128,
        context: int = 64,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
        bias: bool = False,
        tied: bool = True,
        **task,
    ):
        super().__init__(vocabulary, **task)
        if context < 1:
            raise InputError(f"context: at least 1 token, got {context}")
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(layers, width, heads, dropout=dropout, bias=bias)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        initialise(self)

    def forward(
        self, tokens: Tensor, state: list[KeyValueCache] | None = None
    ) -> tuple[Tensor, list[KeyValueCache] | None]:
        """Map tokens (B, T) to logits (B, T, V) of those that follow each.

        Args:
            tokens: int64.
            state: of the tokens before, from `self.encoder.new_cache()`; these are added to it. None: there are none, and
                none are kept.

        Raises:
            InputError: there are more of them than the context.
        """
        past = len(state[0]) if state else 0
        end = past + tokens.shape[1]
        if end > self.context:
            raise InputError(f"{end} tokens are more than the model's context of {self.context}")
        x = self.embedding(tokens) + self.positions.weight[past:end]  # (B, T, D) + (T, D)
        x = self.encoder(self.dropout(x), causal=True, cache=state)
        return self.head(x), state

    def setup(self, stage: str) -> None:
        """Check the data's windows, too."""
        super().setup(stage)
        windows = getattr(self.trainer.datamodule, "context", 0)
        if windows > self.context:
            raise InputError(
                f"the text's windows have {windows} tokens, and the model's context is {self.context}: "
                f"--data.context {self.context}, or --model.context {windows}"
            )

    def parameter_groups(self) -> list[dict]:
        """Norms and biases have no weight decay."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        return [{"params": matrices, "name": "matrices"}, {"params": vectors, "name": "vectors", "weight_decay": 0.0}]

    def next_logits(self, text: Tensor, state: list[KeyValueCache] | None) -> tuple[Tensor, list[KeyValueCache]]:
        """As in `LanguageModel`. When the context is full, its older quarter is forgotten, and the rest is read again.

        (A token's keys and values depend on its position, so that none of them can be kept when the window moves. It
        moves by a quarter at once: by one token each, all would be computed for every token, as without a cache.)
        """
        if state is None:
            new, state = text[:, -self.context :], self.encoder.new_cache()
        elif len(state[0]) == self.context:
            new, state = text[:, -max(1, 3 * self.context // 4) :], self.encoder.new_cache()
        else:
            new = text[:, -1:]
        logits, state = self(new, state)
        return logits[:, -1], state


def initialise(model: TransformerLM) -> None:
    """Draw the weights as GPT-2's are; see `TransformerLM`."""
    std, steps = 0.02 * math.sqrt(768 / model.embedding.embedding_dim), 2 * len(model.encoder.blocks)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            adds = name.endswith(("out_proj.weight", "mlp.3.weight"))
            nn.init.normal_(parameter, std=std / math.sqrt(steps) if adds else std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class WarmupCosineTo(LambdaLR):
    """Up in a straight line, then down along half a cosine, not to nothing but to a share of the highest learning rate.

    Step t of the warm-up has (t + 1) / (warmup_steps + 1) of the optimiser's learning rate, as in nanoGPT.

    Args:
        optimizer: whose learning rates are the highest; several keep their ratio.
        warmup_steps: how many steps (or epochs, with `lr_interval: epoch`) go up.
        total_steps: how many there are of training; what comes after has the lowest rate.
        end: the lowest, as a share of the highest.

    Raises:
        InputError: nothing is left to cool down, or `end` is no share.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int, end: float = 0.1):
        if not 0 <= warmup_steps < total_steps:
            raise InputError(f"warmup_steps must be from 0 to below total_steps {total_steps}, got {warmup_steps}")
        if not 0 <= end <= 1:
            raise InputError(f"end: a share of the learning rate from 0 to 1, got {end}")

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            done = min(1, (step - warmup_steps) / (total_steps - warmup_steps))
            return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2

        super().__init__(optimizer, factor)
        self.total_steps = total_steps
