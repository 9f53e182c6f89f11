"""Attention: a query looks at all keys, and takes the mean of their values, weighted by how well each key fits it.

                     weights = softmax(scores of the query with every key),    output = sum of weights * values

Ways to score a query q and a key k, both learned linear maps of what the network computed so far:

- scaled dot product (Vaswani et al. 2017, "Attention is all you need"): q . k / sqrt(d). Without the square root, the
  scores of wide vectors were so large that the softmax would put all weight on one key, and have no gradient.
  `MultiHeadAttention` does it with several narrow queries at once, each with keys and values of its own.
- additive (Bahdanau et al. 2015, "Neural machine translation by jointly learning to align and translate"):
  v . tanh(W q + U k), a network with one hidden layer.
- dot, general (Luong et al. 2015, "Effective approaches to attention-based neural machine translation"): q . k, q . W k.

Shapes: B batch, T queries, S keys (and as many values), D width, h heads, d = D / h width of a head, A width of the
additive score's hidden layer. A mask is bool and says True where a query may look. A query that may look nowhere gets
weights and output 0, not NaN: a sequence of padding only is harmless.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.errors import InputError


def masked_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension of scores (..., T, S), 0 where the mask (broadcastable) is False.

    The lowest number stands for minus infinity: a row of minus infinities would have softmax 0 / 0.
    """
    if mask is None:
        return scores.softmax(dim=-1)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(~mask, 0.0)


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Written out, what `F.scaled_dot_product_attention` computes.

    Args:
        q: queries (..., T, d).
        k: keys (..., S, d).
        v: values (..., S, D).
        mask: broadcastable to (..., T, S).
        dropout: share of the weights set to zero on their way to the values.

    Returns:
        outputs (..., T, D), and weights (..., T, S) as they were before dropout.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, d) x (..., d, S) -> (..., T, S)
    weights = masked_softmax(scores, mask)
    return F.dropout(weights, dropout, training=dropout > 0) @ v, weights  # (..., T, S) x (..., S, D) -> (..., T, D)


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Mask (T, S): the queries are the last T of S positions, and each sees itself and what is before it."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class KeyValueCache:
    """What one attention layer need not compute again for the next token: keys and values (B, h, S, d).

    Args:
        grows: in self-attention, each call adds its tokens' keys and values to those kept. In cross-attention
            (False), the first call's are kept, and later calls do not look at the keys and values that they are given.
    """

    def __init__(self, grows: bool = True):
        self.grows, self.keys, self.values = grows, None, None

    def __len__(self) -> int:
        """Positions S that are kept."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values (B, h, T, d) behind those there are."""
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values


class MultiHeadAttention(nn.Module):
    """h attentions side by side, each on d = D / h numbers of its own; a linear layer mixes what they find.

    Parameters are named and shaped as in `nn.MultiheadAttention`: `load_state_dict` takes its `state_dict()`.
    `in_proj_weight` (3D, D) is the queries', the keys' and the values' matrix, so that self-attention does one
    multiplication; a head takes d of each one's outputs.

    Args:
        width: D.
        heads: h, a divisor of D.
        dropout: share of the weights set to zero in training.
        bias: whether the linear maps have one.

    Raises:
        InputError: the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, bias: bool = True):
        if width < 1 or heads < 1 or width % heads:
            raise InputError(f"heads: {heads} do not divide the width, {width}")
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width)) if bias else None
        self.out_proj = nn.Linear(width, width, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        return_weights: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Let every query look at the keys.

        Args:
            query: (B, T, D).
            key: (B, S, D); in self-attention the very tensor that `query` is.
            value: (B, S, D).
            mask: broadcastable to (B, h, T, S): `(tokens != PAD)[:, None, None]` hides padding among the keys.
            causal: each query sees only itself and what is before it; with a cache, the queries are the newest tokens.
            return_weights: also return what each head looked at; it takes more time and memory.
            cache: S then counts what is kept, too.

        Returns:
            (B, T, D), and if asked for, the weights (B, h, T, S).
        """
        if cache is not None and not cache.grows and len(cache):
            q, k, v = self._heads(query, 0), cache.keys, cache.values
        else:
            q, k, v = self._project(query, key, value)  # each (B, h, T or S, d)
            if cache is not None:
                cache.append(k, v)
                k, v = cache.keys, cache.values
        T, S = q.shape[2], k.shape[2]
        dropout = self.dropout if self.training else 0.0
        if causal and (mask is not None or return_weights or 1 < T < S):
            mask, causal = causal_mask(T, S, q.device) if mask is None else mask & causal_mask(T, S, q.device), False
        causal = causal and T > 1  # one query is the newest token, which sees everything
        if return_weights:
            output, weights = scaled_dot_product(q, k, v, mask, dropout)
        elif mask is None:
            output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        else:  # what the library gives a query that may look nowhere depends on its version and device
            somewhere = mask.any(dim=-1, keepdim=True)
            output = F.scaled_dot_product_attention(q, k, v, mask | ~somewhere, dropout_p=dropout) * somewhere
        output = self.out_proj(output.transpose(1, 2).flatten(2))  # (B, h, T, d) -> (B, T, h, d) -> (B, T, D)
        return (output, weights) if return_weights else output

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries (B, h, T, d), keys and values (B, h, S, d)."""
        if query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)  # 3 x (B, T, D)
            return [self._split(x) for x in projected]
        return [self._heads(x, i) for i, x in enumerate((query, key, value))]

    def _heads(self, x: Tensor, i: int) -> Tensor:
        """Map x (B, T, D) by the queries' (i = 0), the keys' (1) or the values' (2) matrix to (B, h, T, d)."""
        bias = None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[i]
        return self._split(F.linear(x, self.in_proj_weight.chunk(3)[i], bias))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, T, h, d) -> (B, h, T, d)


class AdditiveAttention(nn.Module):
    """Bahdanau et al.'s: the score of query q with key k is v . tanh(W q + U k).

    The keys' half, U k, is the same for every query: `keys` computes it, once.

    Args:
        query_width: of q.
        memory_width: of what is looked at.
        width: A, of the hidden layer.
    """

    def __init__(self, query_width: int, memory_width: int, width: int):
        super().__init__()
        self.keys = nn.Linear(memory_width, width)  # U, and the hidden layer's bias
        self.query = nn.Linear(query_width, width, bias=False)  # W
        self.score = nn.Linear(width, 1, bias=False)  # v

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor, mask: Tensor | None = None):
        """Let every query look at the memory.

        Args:
            query: (B, T, query_width).
            keys: `keys(memory)`, (B, S, A).
            memory: (B, S, memory_width), also the values.
            mask: broadcastable to (B, T, S).

        Returns:
            outputs (B, T, memory_width), and weights (B, T, S).
        """
        hidden = (self.query(query).unsqueeze(2) + keys.unsqueeze(1)).tanh()  # (B, T, 1, A) + (B, 1, S, A)
        weights = masked_softmax(self.score(hidden).squeeze(-1), mask)  # (B, T, S, A) -> (B, T, S)
        return weights @ memory, weights


class DotAttention(nn.Module):
    """Luong et al.'s: the score of query q with key k is q . k (`dot`), or q . W k (`general`).

    Args:
        query_width: of q.
        memory_width: of what is looked at; with `dot`, it must be the queries'.
        score: `dot` or `general`.

    Raises:
        InputError: `dot` with different widths.
    """

    def __init__(self, query_width: int, memory_width: int, score: Literal["dot", "general"] = "general"):
        if score not in ("dot", "general"):
            raise InputError(f"score: dot or general, got {score!r}")
        if score == "dot" and query_width != memory_width:
            raise InputError(f"score: dot needs queries as wide as the memory, got {query_width} and {memory_width}")
        super().__init__()
        self.keys = nn.Identity() if score == "dot" else nn.Linear(memory_width, query_width, bias=False)  # W

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor, mask: Tensor | None = None):
        """As `AdditiveAttention`'s, with keys (B, S, query_width)."""
        weights = masked_softmax(query @ keys.transpose(1, 2), mask)  # (B, T, D) x (B, D, S) -> (B, T, S)
        return weights @ memory, weights
