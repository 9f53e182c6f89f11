"""Gated recurrent networks: what `rnn.py` has, with another cell.

LSTM (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000): beside the state h it has a memory c, to which a step
only adds, and of which it forgets some: where the forget gate is open, the gradient goes back through any number of
steps as it is.

    i, f, o = sigmoid(W x_t + U h_{t-1} + b)    g = tanh(...)      input, forget and output gate; what may be written
    c_t = f * c_{t-1} + i * g
    h_t = o * tanh(c_t)

GRU (Cho et al. 2014): no memory beside the state, and two gates.

    r, z = sigmoid(W x_t + U h_{t-1} + b)       n = tanh(W_n x_t + b_n + r * (U_n h_{t-1} + b'_n))
    h_t = (1 - z) * n + z * h_{t-1}

(In the paper, r is multiplied with h_{t-1} before U_n is; the library, and so this, does it after: one product less to
wait for.)

Shapes: B batch, H hidden units; each layer's weights are those of all gates below one another, (4 H, ...) or (3 H, ...).
"""

import torch
from torch import Tensor, nn

from lit_models.rnn import RNN


class LSTM(RNN):
    """Long short-term memory; its state is a tuple, h and c, each (L, B, H).

    Args:
        n_in, hidden, layers, dropout, fused, truncate: as in `RNN`.
        forget_bias: what the forget gates' bias begins with. 1 keeps them open at first, so that gradients go far from
            the start (Jozefowicz et al. 2015). None leaves it as the library draws it: near 0, so they begin half shut.
    """

    library = nn.LSTM
    states = 2

    def __init__(
        self,
        n_in: int,
        hidden: int,
        layers: int = 1,
        dropout: float = 0.0,
        fused: bool = False,
        truncate: int | None = None,
        forget_bias: float | None = None,
    ):
        super().__init__(n_in, hidden, layers, dropout, fused, truncate)
        if forget_bias is not None:
            for _, _, b_ih, b_hh in self.weights.all_weights:  # the library has two, which are added
                nn.init.constant_(b_ih.detach()[hidden : 2 * hidden], forget_bias)
                nn.init.zeros_(b_hh.detach()[hidden : 2 * hidden])

    def cell(self, x: Tensor, h: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the new h and c, each (B, H), from x and h (B, 4 H) and the old ones."""
        _, c = state
        i, f, g, o = (x + h).chunk(4, dim=1)  # each (B, H), in the library's order
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class GRU(RNN):
    """Gated recurrent units; arguments as in `RNN`."""

    library = nn.GRU

    def cell(self, x: Tensor, h: Tensor, state: tuple[Tensor]) -> tuple[Tensor]:
        """Return the new state (B, H), from x and h (B, 3 H) and the old one."""
        (old,) = state
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, dim=1), h.chunk(3, dim=1)  # each (B, H)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        return ((1 - z) * torch.tanh(x_n + r * h_n) + z * old,)
