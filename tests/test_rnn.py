"""The recurrences written out agree with the library's layers, whatever the lengths; and gradients end where they should."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lit_models.lstm import GRU, LSTM
from lit_models.rnn import RNN
from runner.errors import InputError

KINDS = pytest.mark.parametrize("kind", [RNN, LSTM, GRU])
LENGTHS = {
    "none": None,
    "all the same": [6, 6, 6, 6],
    "in no order": [2, 6, 1, 4],
    "none as long as the batch": [2, 5, 1, 4],
}


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def drawn_state(kind, layers=2, batch=4, hidden=5):
    """A state to begin with, as the library takes it."""
    torch.manual_seed(2)
    state = tuple(torch.randn(layers, batch, hidden) for _ in range(kind.states))
    return state if kind.states > 1 else state[0]


def theirs(reference, x, lengths, state):
    """The library's outputs (B, T, H), and state."""
    if lengths is None:
        return reference(x, state)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    outputs, state = reference(packed, state)
    return pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])[0], state


@KINDS
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("with_state", [False, True])
def test_agrees_with_the_library_in_outputs_states_and_gradients(kind, fused, lengths, with_state):
    torch.manual_seed(0)
    reference = kind.library(3, 5, 2, batch_first=True)
    ours = kind(3, 5, layers=2, fused=fused)
    ours.weights.load_state_dict(reference.state_dict())
    x, lengths = torch.randn(4, 6, 3), None if lengths is None else torch.tensor(lengths)
    state = drawn_state(kind) if with_state else None
    outputs, end = ours(x, lengths, state)
    expected, expected_end = theirs(reference, x, lengths, state)
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=0)
    assert isinstance(end, tuple) == (kind is LSTM)
    for mine, other in zip(as_tuple(end), as_tuple(expected_end), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)

    weights = torch.randn_like(expected)
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, mine), other in zip(ours.weights.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5, msg=name)


@KINDS
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 4), (3, 1)])
def test_one_sequence_and_one_step(kind, batch, steps):
    torch.manual_seed(0)
    ours = kind(2, 4)
    x = torch.randn(batch, steps, 2)
    for lengths in (None, torch.ones(batch, dtype=torch.int64)):
        outputs, _ = ours(x, lengths)
        assert outputs.shape == (batch, steps, 4)
        torch.testing.assert_close(outputs, theirs(ours.weights, x, lengths, None)[0], atol=1e-6, rtol=0)


@KINDS
def test_a_checkpoint_of_the_one_loads_into_the_other(kind):
    written_out, fused = kind(3, 5, layers=2), kind(3, 5, layers=2, fused=True)
    fused.load_state_dict(written_out.state_dict())
    x, lengths = torch.randn(4, 6, 3), torch.tensor([2, 6, 1, 4])
    for mine, other in zip(written_out(x, lengths), fused(x, lengths), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


@KINDS
@pytest.mark.parametrize("fused", [False, True])
def test_what_stands_in_the_padding_does_not_matter(kind, fused):
    torch.manual_seed(0)
    network, x, lengths = kind(3, 5, layers=2, fused=fused), torch.randn(4, 6, 3), torch.tensor([2, 6, 1, 4])
    other = x.clone()
    for row, length in zip(other, lengths, strict=True):
        row[length:] = 1e6
    torch.testing.assert_close(network(other, lengths), network(x, lengths))
    alone, _ = network(x[2:3, :1])
    torch.testing.assert_close(network(x, lengths)[0][2:3, :1], alone, atol=1e-6, rtol=0)


@KINDS
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("truncate", [None, 2])
def test_a_sequence_of_no_steps_keeps_its_state(kind, fused, truncate):
    network, state = kind(3, 5, layers=2, fused=fused, truncate=truncate), drawn_state(kind)
    outputs, end = network(torch.randn(4, 6, 3), torch.tensor([2, 0, 6, 0]), state)
    assert not outputs[[1, 3]].any()
    for mine, other in zip(as_tuple(end), as_tuple(state), strict=True):
        torch.testing.assert_close(mine[:, [1, 3]], other[:, [1, 3]])
        assert (mine[:, [0, 2]] != other[:, [0, 2]]).all()


@KINDS
@pytest.mark.parametrize("fused", [False, True])
def test_two_halves_are_the_whole(kind, fused):
    network, x = kind(3, 5, layers=2, fused=fused), torch.randn(4, 6, 3)
    whole, end = network(x)
    first, state = network(x[:, :2])
    second, last = network(x[:, 2:], state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(last, end)


def test_dropout_is_between_layers_in_training_only():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3)
    network = RNN(3, 200, layers=2, dropout=0.5)
    trained, again = network(x)[0], network(x)[0]
    assert not torch.equal(trained, again)
    network.eval()
    torch.testing.assert_close(network(x)[0], theirs(network.weights, x, None, None)[0], atol=1e-5, rtol=0)
    # with weights that add up what the layer below hands on: half of 200 ones, each doubled; no input is left out
    network = RNN(1, 200, layers=2, dropout=0.5)
    for name, weight in network.weights.named_parameters():
        nn.init.constant_(weight, 100.0 if name == "weight_ih_l0" else 1e-3 if name == "weight_ih_l1" else 0.0)
    sums = network(torch.ones(2, 3, 1))[0].atanh() * 1e3  # (2, 3, 200): each unit's sum of the 200 below
    assert not (sums % 2 < 1.9).logical_and(sums % 2 > 0.1).any()
    assert 170 < sums.mean() < 230
    assert not (sums > 0.1).logical_not().any()


@KINDS
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("lengths", [None, [6, 3, 1]])
def test_truncated_gradients_end_after_k_steps_and_outputs_stay(kind, fused, lengths):
    torch.manual_seed(0)
    network, lengths = kind(3, 5, layers=2, fused=fused), None if lengths is None else torch.tensor(lengths)
    x = torch.randn(3, 6, 3, requires_grad=True)
    whole = network(x, lengths)
    network.truncate = 2
    outputs, end = network(x, lengths)
    torch.testing.assert_close((outputs, end), whole, atol=1e-6, rtol=0)
    for t in range(6):  # of the sequence that has all 6 steps
        (gradient,) = torch.autograd.grad(outputs[0, t].sum(), x, retain_graph=True)
        assert gradient[0].abs().sum(dim=1).gt(0).tolist() == [t // 2 * 2 <= s <= t for s in range(6)]
        assert not gradient[1:].any()


@KINDS
def test_truncation_at_the_end_or_behind_it_is_none(kind):
    torch.manual_seed(0)
    network, x = kind(3, 5, layers=2), torch.randn(2, 6, 3)
    gradients = []
    for truncate in (None, 6, 100, 5):
        network.truncate = truncate
        network.zero_grad()
        network(x)[0][:, -1].sum().backward()
        gradients.append(network.weights.weight_hh_l0.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    assert not torch.allclose(gradients[3], gradients[0])


def test_gradients_go_back_into_the_state_that_is_given():
    network, state = RNN(3, 5, truncate=2), torch.zeros(1, 2, 5, requires_grad=True)
    outputs, _ = network(torch.randn(2, 4, 3), state=state)
    assert torch.autograd.grad(outputs[:, 0].sum(), state, retain_graph=True)[0].any()
    assert not torch.autograd.grad(outputs[:, 2].sum(), state)[0].any()


@KINDS
@pytest.mark.parametrize("fused", [False, True])
def test_memorises_a_batch(kind, fused):
    """Tell which of 8 symbols came first, of sequences of different lengths."""
    torch.manual_seed(0)
    first, lengths = torch.arange(8), torch.tensor([6, 2, 4, 1, 3, 5, 6, 2])
    x = F.one_hot(torch.cat([first[:, None], torch.randint(8, (8, 5))], dim=1), 8).float()
    network, head = kind(8, 16, fused=fused), nn.Linear(16, 8)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=0.03)
    losses = []
    for _ in range(100):
        outputs, _ = network(x, lengths)
        logits = head(outputs[torch.arange(8), lengths - 1])
        loss = F.cross_entropy(logits, first)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < 1.5 < losses[0]
    assert (logits.argmax(dim=1) == first).all()


def test_under_autocast_both_ways_agree():
    torch.manual_seed(0)
    x, lengths = torch.randn(4, 6, 3), torch.tensor([2, 6, 1, 4])
    for kind in (RNN, LSTM, GRU):
        network = kind(3, 5)
        exact, _ = network(x, lengths)
        for fused in (False, True):
            network.fused = fused
            with torch.autocast("cpu", torch.bfloat16):
                outputs, _ = network(x, lengths)
            torch.testing.assert_close(outputs.float(), exact, atol=0.03, rtol=0)


def test_a_copy_has_weights_of_its_own():
    network = RNN(3, 5)
    copied = copy.deepcopy(network)
    nn.init.zeros_(copied.weights.weight_ih_l0)
    assert network.weights.weight_ih_l0.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_in": 0}, "start at 1"),
        ({"hidden": 0}, "start at 1"),
        ({"layers": 0}, "start at 1"),
        ({"dropout": 1.0}, "from 0 to below 1"),
        ({"truncate": 0}, "truncate: after one step at least"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    for kind in (RNN, LSTM, GRU):
        with pytest.raises(InputError, match=message):
            kind(**{"n_in": 2, "hidden": 3, **arguments})


def test_kinds_differ():
    x = torch.randn(2, 3, 4)
    outputs = []
    for kind in (RNN, LSTM, GRU):
        torch.manual_seed(0)
        outputs.append(kind(4, 5)(x)[0])
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(outputs, 2))


def test_the_benchmark_prints_a_ratio_for_each_kind_full_and_padded(capsys):
    from benchmarks import recurrent_speed

    assert recurrent_speed.main(["--rounds", "1", "--sizes", "2,3,1,4"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "2, 3, 1, 4" in line]
    assert [(row[0], row[5]) for row in rows] == [(k, n) for k in ("RNN", "LSTM", "GRU") for n in ("full", "padded")]
    assert all(float(cell) >= 0 for row in rows for cell in row[6:9])
