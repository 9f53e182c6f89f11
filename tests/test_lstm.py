"""What gates add: see test_rnn.py for their agreement with the library's layers."""

import pytest
import torch

from lit_models.lstm import GRU, LSTM
from lit_models.rnn import RNN


def test_the_lstms_formula():
    torch.manual_seed(0)
    network, x = LSTM(2, 3), torch.randn(1, 2, 2)
    outputs, (h_end, c_end) = network(x)
    w_ih, w_hh, b_ih, b_hh = network.weights.all_weights[0]
    h = c = torch.zeros(3)
    for t in range(2):
        i, f, g, o = (w_ih @ x[0, t] + b_ih + w_hh @ h + b_hh).view(4, 3)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        torch.testing.assert_close(outputs[0, t], h)
    torch.testing.assert_close(h_end[0, 0], h)
    torch.testing.assert_close(c_end[0, 0], c)


@pytest.mark.parametrize("fused", [False, True])
def test_forget_bias_is_what_the_forget_gate_begins_with(fused):
    network = LSTM(2, 3, layers=2, forget_bias=1.0, fused=fused)
    for _, _, b_ih, b_hh in network.weights.all_weights:
        assert (b_ih + b_hh)[3:6].tolist() == [1.0, 1.0, 1.0]
        assert b_ih.requires_grad
        assert (b_ih + b_hh)[[0, 1, 2, 6, 7, 8, 9, 10, 11]].abs().min() > 0
        assert not ((b_ih + b_hh)[[0, 1, 2, 6, 7, 8, 9, 10, 11]] == 1).any()
    assert not ((LSTM(2, 3).weights.bias_ih_l0 + LSTM(2, 3).weights.bias_hh_l0)[3:6] == 1).any()


def test_open_gates_carry_the_gradient_where_a_plain_network_loses_it():
    def gradient(network) -> float:
        """Of the last state by the first input, 60 steps before."""
        torch.manual_seed(1)
        x = torch.randn(8, 60, 4, requires_grad=True)
        outputs, _ = network(x)
        return float(torch.autograd.grad(outputs[:, -1].sum(), x)[0][:, 0].norm())

    torch.manual_seed(0)
    plain, gated = gradient(RNN(4, 32)), gradient(LSTM(4, 32, forget_bias=5.0))
    assert gated > 1e-2
    assert gated > 1e4 * plain


def test_a_gru_that_keeps_its_state():
    network = GRU(2, 3)
    with torch.no_grad():
        network.weights.bias_ih_l0[3:6] = 100.0  # the gate z
    state = torch.randn(1, 4, 3)
    outputs, end = network(torch.randn(4, 5, 2), state=state)
    torch.testing.assert_close(end, state)
    torch.testing.assert_close(outputs[:, -1], state[0])
