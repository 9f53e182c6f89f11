"""Attention, written out, against the library's and against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_models.attention import (
    AdditiveAttention,
    DotAttention,
    KeyValueCache,
    MultiHeadAttention,
    causal_mask,
    masked_softmax,
    scaled_dot_product,
)
from runner.errors import InputError

B, T, S, D, H = 3, 5, 7, 12, 4
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def some_mask(*shape: int) -> torch.Tensor:
    """A mask in which every query may look somewhere."""
    mask = torch.rand(*shape) < 0.6
    mask[..., 0] = True
    return mask


# -- scaled dot product ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, some_mask(T, S), some_mask(B, 1, 1, S), some_mask(B, H, T, S)])
def test_the_written_out_product_is_the_librarys(mask):
    q, k, v = torch.randn(B, H, T, 6), torch.randn(B, H, S, 6), torch.randn(B, H, S, 9)
    output, weights = scaled_dot_product(q, k, v, mask)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v, mask), **CLOSE)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B, H, T))
    if mask is not None:
        assert (weights[~mask.expand_as(weights)] == 0).all()


def test_the_product_is_what_the_formula_says():
    q, k, v = torch.randn(T, 4), torch.randn(S, 4), torch.randn(S, 3)
    output, _ = scaled_dot_product(q, k, v)
    for t in range(T):
        scores = torch.tensor([float(sum(q[t] * k[s])) / math.sqrt(4) for s in range(S)])
        shares = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(output[t], sum(shares[s] * v[s] for s in range(S)), **CLOSE)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_query_that_may_look_nowhere_gets_zeros_and_harms_no_gradient(dtype):
    scores = torch.randn(2, T, S, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, T, S, dtype=torch.bool)
    mask[1, 2] = False
    with torch.autograd.detect_anomaly(check_nan=True):
        weights = masked_softmax(scores, mask)
        assert (weights[1, 2] == 0).all()
        (weights**2).sum().backward()
    assert scores.grad.isfinite().all()
    assert (scores.grad[1, 2] == 0).all()
    torch.testing.assert_close(weights[0], scores[0].softmax(dim=-1))


def test_scores_as_low_as_floats_go_are_not_mistaken_for_hidden_ones():
    scores = torch.tensor([[-1e30, -1e30, 0.0]])
    weights = masked_softmax(scores, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0]]))


def test_causal_masks():
    assert causal_mask(3, 3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert causal_mask(1, 3).all()


# -- several heads -----------------------------------------------------------------------------------------------------


def pair(bias: bool = True) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    """Ours and the library's, with the same weights, none of them 0."""
    theirs = nn.MultiheadAttention(D, H, bias=bias, batch_first=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = MultiHeadAttention(D, H, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_self_attention_is_the_librarys(bias, causal, padded):
    ours, theirs = pair(bias)
    x = torch.randn(B, S, D)
    seen = torch.arange(S) < torch.tensor([S, 4, 1])[:, None]  # (B, S)
    expected, shares = theirs(
        x, x, x,
        key_padding_mask=~seen if padded else None,
        attn_mask=~causal_mask(S, S) if causal else None,
        average_attn_weights=False,
    )  # fmt: skip
    mask = seen[:, None, None] if padded else None
    torch.testing.assert_close(ours(x, x, x, mask, causal), expected, **CLOSE)
    output, weights = ours(x, x, x, mask, causal, return_weights=True)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(weights, shares, **CLOSE)


@pytest.mark.parametrize("same", [True, False])
def test_cross_attention_is_the_librarys(same):
    ours, theirs = pair()
    x, key = torch.randn(B, T, D), torch.randn(B, S, D)
    value = key if same else torch.randn(B, S, D)
    mask = some_mask(B, H, T, S)
    expected, shares = theirs(x, key, value, attn_mask=~mask.flatten(0, 1), average_attn_weights=False)
    torch.testing.assert_close(ours(x, key, value, mask), expected, **CLOSE)
    output, weights = ours(x, key, value, mask, return_weights=True)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(weights, shares, **CLOSE)


def test_gradients_are_the_librarys():
    ours, theirs = pair()
    x = torch.randn(B, S, D)
    for network, arguments in ((ours, {"causal": True}), (theirs, {"attn_mask": ~causal_mask(S, S)})):
        output = network(x, x, x, **arguments)
        (output[0] if network is theirs else output).square().sum().backward()
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("return_weights", [True, False])
def test_a_sequence_of_padding_only_is_harmless(return_weights):
    ours, _ = pair()
    x = torch.randn(B, S, D, requires_grad=True)
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
    mask[1] = False
    output = ours(x, x, x, mask, return_weights=return_weights)
    output = output[0] if return_weights else output
    torch.testing.assert_close(output[1], ours.out_proj.bias.expand(S, D))
    torch.testing.assert_close(output[0], ours(x[:1], x[:1], x[:1])[0], **CLOSE)
    output.sum().backward()
    assert x.grad.isfinite().all()


def test_what_is_hidden_does_not_matter():
    ours, _ = pair()
    x = torch.randn(1, S, D)
    changed = x.clone()
    changed[:, 4:] = 1e4
    mask = (torch.arange(S) < 4)[None, None, None]
    torch.testing.assert_close(ours(x, x, x, mask)[:, :4], ours(changed, changed, changed, mask)[:, :4])
    torch.testing.assert_close(ours(x, x, x, causal=True)[:, :4], ours(changed, changed, changed, causal=True)[:, :4])


def test_one_token_alone():
    ours, theirs = pair()
    x = torch.randn(1, 1, D)
    torch.testing.assert_close(ours(x, x, x, causal=True), theirs(x, x, x)[0], **CLOSE)


def test_it_begins_as_the_librarys():
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(600, 4)
    torch.manual_seed(4)
    ours = MultiHeadAttention(600, 4)
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert float(mine.std()) == pytest.approx(float(other.std()), rel=0.02), name
        assert float(mine.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.02), name


def test_dropout_is_for_training_only():
    ours = MultiHeadAttention(D, H, dropout=0.5)
    x = torch.randn(B, S, D)
    for return_weights in (True, False):
        ours.train()
        one, two = (ours(x, x, x, return_weights=return_weights) for _ in range(2))
        assert not torch.equal(one[0], two[0])
        ours.eval()
        one, two = (ours(x, x, x, return_weights=return_weights) for _ in range(2))
        assert torch.equal(one[0], two[0])
    kept = torch.cat([scaled_dot_product(x, x, torch.ones(B, S, 1), dropout=0.5)[0].flatten() for _ in range(400)])
    assert float(kept.mean()) == pytest.approx(1, abs=0.05)  # what is left is scaled up


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(InputError, match="heads: 5 do not divide the width, 12"):
        MultiHeadAttention(12, 5)
    with pytest.raises(InputError, match="heads: 0"):
        MultiHeadAttention(12, 0)


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[1] * 6, [4, 1, 1], [2, 3, 1], [6]])
@pytest.mark.parametrize("return_weights", [True, False])
def test_token_by_token_with_a_cache_is_all_at_once(parts, return_weights):
    ours, _ = pair()
    x, cache = torch.randn(B, 6, D), KeyValueCache()
    outputs = []
    for part in x.split(parts, dim=1):
        output = ours(part, part, part, causal=True, return_weights=return_weights, cache=cache)
        outputs.append(output[0] if return_weights else output)
    assert len(cache) == 6
    torch.testing.assert_close(torch.cat(outputs, dim=1), ours(x, x, x, causal=True), **CLOSE)


def test_a_cache_with_a_mask_over_all_that_is_kept():
    ours, _ = pair()
    x, cache = torch.randn(B, 6, D), KeyValueCache()
    seen = torch.ones(B, 6, dtype=torch.bool)
    seen[1, :2] = False
    expected = ours(x, x, x, seen[:, None, None], causal=True)
    ours(x[:, :4], x[:, :4], x[:, :4], seen[:, None, None, :4], causal=True, cache=cache)
    last = x[:, 4:]
    output = ours(last, last, last, seen[:, None, None], causal=True, cache=cache)
    torch.testing.assert_close(output, expected[:, 4:], **CLOSE)


def test_cross_attention_keeps_its_keys():
    ours, _ = pair()
    x, memory, cache = torch.randn(B, T, D), torch.randn(B, S, D), KeyValueCache(grows=False)
    expected = ours(x, memory, memory)
    for t in range(T):
        given = memory if t == 0 else None  # not looked at again
        output = ours(x[:, t : t + 1], given, given, cache=cache)
        torch.testing.assert_close(output, expected[:, t : t + 1], **CLOSE)
    assert len(cache) == S


# -- additive and dot --------------------------------------------------------------------------------------------------


def by_loops(score, query, memory, mask):
    """Attention of every query in turn, with the score of one query vector and one memory vector."""
    outputs, weights = torch.zeros(B, T, memory.shape[2]), torch.zeros(B, T, S)
    for b in range(B):
        for t in range(T):
            places = [s for s in range(S) if mask is None or mask[b, 0, s]]
            shares = torch.stack([score(query[b, t], memory[b, s]) for s in places]).exp()
            for s, share in zip(places, shares / shares.sum(), strict=True):
                weights[b, t, s] = share
                outputs[b, t] += share * memory[b, s]
    return outputs, weights


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", ["additive", "dot", "general"])
def test_scores_are_what_the_papers_say(kind, padded):
    query, memory = torch.randn(B, T, 6), torch.randn(B, S, 6 if kind == "dot" else 4)
    mask = (torch.arange(S) < torch.tensor([S, 4, 1])[:, None])[:, None] if padded else None  # (B, 1, S)
    if kind == "additive":
        attention = AdditiveAttention(6, 4, 8)
        W, U, v = attention.query.weight, attention.keys.weight, attention.score.weight[0]

        def score(q, k):
            return v @ (W @ q + U @ k + attention.keys.bias).tanh()
    elif kind == "dot":
        attention = DotAttention(6, 6, "dot")

        def score(q, k):
            return q @ k
    else:
        attention = DotAttention(6, 4)

        def score(q, k):
            return q @ attention.keys.weight @ k

    outputs, weights = attention(query, attention.keys(memory), memory, mask)
    expected_outputs, expected_weights = by_loops(score, query, memory, mask)
    torch.testing.assert_close(outputs, expected_outputs, **CLOSE)
    torch.testing.assert_close(weights, expected_weights, **CLOSE)


@pytest.mark.parametrize("attention", [AdditiveAttention(6, 6, 8), DotAttention(6, 6)], ids=["additive", "general"])
def test_nothing_to_look_at_gives_zeros(attention):
    query, memory = torch.randn(2, 1, 6, requires_grad=True), torch.randn(2, S, 6)
    mask = torch.tensor([[[True] * S], [[False] * S]])
    outputs, weights = attention(query, attention.keys(memory), memory, mask)
    assert (outputs[1] == 0).all()
    assert (weights[1] == 0).all()
    outputs.sum().backward()
    assert query.grad.isfinite().all()


def test_dot_needs_the_same_width():
    with pytest.raises(InputError, match="dot needs queries as wide as the memory, got 6 and 4"):
        DotAttention(6, 4, "dot")
    with pytest.raises(InputError, match="dot or general, got 'cosine'"):
        DotAttention(6, 4, "cosine")
