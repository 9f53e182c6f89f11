"""Recurrent network (Elman 1990): one layer of weights, used again at every step, and a state that remembers.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)        h_0 = 0

The same W_hh is multiplied with at every step, so the gradient of a late loss by an early state is a product of many
similar factors: it vanishes or explodes with the distance (Bengio et al. 1994). Against exploding the Trainer clips
gradients (Pascanu et al. 2013): `trainer: {gradient_clip_val: 1.0}`. (With `16-mixed` the optimiser must then not be fused.)
Against vanishing there are gates: `lstm.py`.

Shapes: B batch, T steps of the longest sequence, D inputs, H hidden units, L layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from runner.errors import InputError

State = Tensor | tuple[Tensor, ...]  # (L, B, H); of an LSTM two of them


class RNN(nn.Module):
    """Layers of recurrent units: the first one's inputs are the sequence, the next one's the states of the one below.

    The weights lie in the library's layer, under its names (`weight_ih_l0` (H, D), `weight_hh_l0` (H, H), `bias_ih_l0`,
    `bias_hh_l0` (H,), ...), whoever computes with them: a checkpoint of the one loads into the other.

    Args:
        n_in: D.
        hidden: H.
        layers: L.
        dropout: share of a layer's outputs set to zero in training on their way to the next layer; none behind the last.
        fused: whether the library's layer computes, all steps in one call; else it is done here, step by step.
        truncate: steps after which gradients end, in truncated backpropagation through time (Williams & Peng 1990): the
            state goes on into the next `truncate` steps, the gradient does not come back. None: they go all the way.
    """

    library: type[nn.RNNBase] = nn.RNN
    states = 1  # tensors that are handed on from step to step

    def __init__(
        self,
        n_in: int,
        hidden: int,
        layers: int = 1,
        dropout: float = 0.0,
        fused: bool = False,
        truncate: int | None = None,
    ):
        super().__init__()
        if min(n_in, hidden, layers) < 1 or not 0 <= dropout < 1:
            raise InputError(
                f"n_in, hidden and layers start at 1, and dropout is from 0 to below 1; got {n_in}, {hidden}, {layers} "
                f"and {dropout}"
            )
        if truncate is not None and truncate < 1:
            raise InputError(f"truncate: after one step at least, or null for never, got {truncate}")
        self.n_in, self.hidden, self.layers, self.dropout = n_in, hidden, layers, dropout
        self.fused, self.truncate = fused, truncate
        self.weights = self.library(n_in, hidden, layers, batch_first=True, dropout=dropout)

    def cell(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return a layer's new state; the first of its tensors (B, H) is the layer's output.

        Args:
            x: W_ih x_t + b_ih, (B, H).
            h: W_hh h_{t-1} + b_hh, (B, H).
            state: the old one.
        """
        return (torch.tanh(x + h),)

    def forward(self, x: Tensor, lengths: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """Map sequences to the last layer's states.

        Args:
            x: (B, T, D).
            lengths: steps (B,) of each sequence; those behind it are padding. None: all T.
            state: what to begin with, (L, B, H); None: zeros.

        Returns:
            The outputs (B, T, H), 0 in the padding, and each layer's state (L, B, H) after the last step of each sequence.
        """
        if state is None:
            state = (x.new_zeros(self.layers, x.shape[0], self.hidden),) * self.states
        elif isinstance(state, Tensor):
            state = (state,)
        run = self.run_library if self.fused else self.run
        outputs, start = [], 0
        for part in x.split(self.truncate or x.shape[1], dim=1):  # each (B, t, D)
            left = None if lengths is None else (lengths - start).clamp(0, part.shape[1])  # (B,)
            if start:
                state = tuple(s.detach() for s in state)
            output, state = run(part, left, state)
            outputs.append(output)
            start += part.shape[1]
        return torch.cat(outputs, dim=1), state if self.states > 1 else state[0]

    def run(self, x: Tensor, lengths: Tensor | None, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute layer by layer, and each step by step."""
        is_on = None
        if lengths is not None:
            is_on = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]  # (B, T)
        ends = []
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(self.weights.all_weights):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            now = tuple(s[layer] for s in state)  # each (B, H)
            outputs = []
            for t, x_t in enumerate(F.linear(x, w_ih, b_ih).unbind(dim=1)):  # no step has to wait for this product
                new = self.cell(x_t, F.linear(now[0], w_hh, b_hh), now)
                if is_on is None:
                    now = new
                    outputs.append(new[0])
                else:  # behind a sequence's end its state stands still
                    on = is_on[:, t, None]  # (B, 1)
                    now = tuple(torch.where(on, n, old) for n, old in zip(new, now, strict=True))
                    outputs.append(new[0] * on)
            x = torch.stack(outputs, dim=1)  # (B, T, H)
            ends.append(now)
        return x, tuple(torch.stack(s) for s in zip(*ends, strict=True))

    def run_library(
        self, x: Tensor, lengths: Tensor | None, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Let the library compute, on packed sequences: it leaves out what is padding."""
        given = state if self.states > 1 else state[0]
        if lengths is None:
            outputs, ends = self.weights(x, given)
            return outputs, ends if self.states > 1 else (ends,)
        # A sequence of no steps cannot be packed: it is given one, which is then forgotten
        packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        outputs, ends = self.weights(packed, given)
        outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])
        is_on = lengths.to(x.device)[:, None] > 0  # (B, 1)
        ends = ends if self.states > 1 else (ends,)
        return outputs * is_on[:, None], tuple(torch.where(is_on, e, s) for e, s in zip(ends, state, strict=True))
