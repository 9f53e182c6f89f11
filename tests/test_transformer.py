"""The Transformer equals PyTorch's with the same weights, GPT equals itself with a cache, and learns."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_models.transformer import (
    Decoder,
    DecoderBlock,
    Encoder,
    EncoderBlock,
    Transformer,
    TransformerLM,
    WarmupCosineTo,
    sinusoids,
)
from runner.errors import InputError

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
NAMES = {
    "self_attn.": "attention.",
    "multihead_attn.": "cross_attention.",
    "linear1.": "mlp.0.",
    "linear2.": "mlp.3.",
    "layers.": "blocks.",
}


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Give ours the weights of theirs, norms and biases drawn anew: they begin with 1 and 0, which hides mistakes."""
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5)
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        state[name] = value
    ours.load_state_dict(state)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def padding():
    """True where there is padding, (3, 7): one sequence has none."""
    return torch.arange(7) >= torch.tensor([[7], [4], [1]])


# -- blocks equal to the library's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("mode", ["train", "eval"])
class TestEqualToTorch:
    def layers(self, ours: type, theirs: type, norm_first: bool, activation: str, mode: str, **sizes):
        ours = ours(16, 4, 24, activation=activation, norm_first=norm_first, eps=1e-3)
        args = {"dropout": 0.0, "activation": activation, "batch_first": True, "norm_first": norm_first}
        theirs = theirs(16, 4, 24, layer_norm_eps=1e-3, **args)
        copy_weights(ours, theirs)
        return ours.train(mode == "train"), theirs.train(mode == "train")

    def test_encoder_block(self, norm_first, activation, mode, padding):
        ours, theirs = self.layers(EncoderBlock, nn.TransformerEncoderLayer, norm_first, activation, mode)
        x = torch.randn(3, 7, 16)
        causal = torch.ones(7, 7, dtype=torch.bool).triu(1)  # theirs: True may not be looked at
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
        torch.testing.assert_close(ours(x, causal=True), theirs(x, src_mask=causal), **CLOSE)
        torch.testing.assert_close(ours(x, ~causal), theirs(x, src_mask=causal), **CLOSE)
        there = ~padding  # what theirs gives in the padding is of no use, in eval 0
        for mask in (None, causal):
            expected = theirs(x, src_mask=mask, src_key_padding_mask=padding)
            got = ours(x, ~padding[:, None, None], causal=mask is not None)
            torch.testing.assert_close(got[there], expected[there], **CLOSE)

    def test_decoder_block(self, norm_first, activation, mode, padding):
        ours, theirs = self.layers(DecoderBlock, nn.TransformerDecoderLayer, norm_first, activation, mode)
        x, memory = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        torch.testing.assert_close(ours(x, memory, causal=False), theirs(x, memory), **CLOSE)
        expected = theirs(x, memory, tgt_mask=causal, memory_key_padding_mask=padding)
        got = ours(x, memory, memory_mask=~padding[:, None, None])
        torch.testing.assert_close(got, expected, **CLOSE)
        own = torch.arange(5) >= torch.tensor([[5], [3], [1]])
        expected = theirs(x, memory, tgt_mask=causal, tgt_key_padding_mask=own)
        torch.testing.assert_close(ours(x, memory, ~own[:, None, None]), expected, **CLOSE)


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_encoder_and_gradients(norm_first):
    ours = Encoder(3, 16, 2, hidden=32, activation="relu", norm_first=norm_first)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    theirs = nn.TransformerEncoder(layer, 3, nn.LayerNorm(16) if norm_first else None, enable_nested_tensor=False)
    copy_weights(ours, theirs)
    x = torch.randn(2, 6, 16)
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b, **CLOSE)
    a.square().mean().backward()
    b.square().mean().backward()
    theirs_by_size = sorted(float(p.grad.norm()) for p in theirs.parameters())
    assert sorted(float(p.grad.norm()) for p in ours.parameters()) == pytest.approx(theirs_by_size, rel=1e-4, abs=1e-6)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_transformer(norm_first, padding):
    ours = Transformer(2, 16, 2, hidden=32, activation="relu", norm_first=norm_first, final_norm=True)
    theirs = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    copy_weights(ours, theirs)
    sources, targets = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    how = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    expected = theirs(sources, targets, tgt_mask=causal, **how)
    torch.testing.assert_close(ours(sources, targets, ~padding[:, None, None]), expected, **CLOSE)


def test_torchvisions_vit_block():
    """Issue 10 builds on this: another eps, and biases everywhere."""
    from torchvision.models.vision_transformer import EncoderBlock as ViTBlock

    theirs = ViTBlock(4, 16, 32, dropout=0.0, attention_dropout=0.0).eval()
    ours = EncoderBlock(16, 4, 32, eps=1e-6)
    pairs = {"ln_1": "norm1", "ln_2": "norm2", "self_attention": "attention"}
    ours.load_state_dict(
        {
            name.replace(name.split(".")[0], pairs.get(name.split(".")[0], "mlp")): v
            for name, v in theirs.state_dict().items()
        }
    )
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_dropout_is_of_training_only_and_in_every_place_that_torch_has_it():
    ours, x = EncoderBlock(16, 2, dropout=0.5), torch.randn(2, 5, 16)
    assert torch.equal(ours.eval()(x), ours(x))
    assert not torch.equal(ours.train()(x), ours(x))
    assert ours.attention.dropout == ours.mlp[2].p == ours.dropout.p == 0.5
    assert DecoderBlock(16, 2, None, 0.5).cross_attention.dropout == 0.5


def test_without_biases_there_is_none():
    for block in (EncoderBlock(16, 2, bias=False), DecoderBlock(16, 2, bias=False), Encoder(2, 16, 2, bias=False)):
        assert not any("bias" in name for name, _ in block.named_parameters())


def test_a_block_is_a_step_of_its_own_without_attention_to_others():
    """What a token sees of another comes through attention alone, and not from behind it if causal."""
    encoder, x = Encoder(2, 16, 2).eval(), torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, 4] += 1
    differs = (encoder(x, causal=True) != encoder(changed, causal=True)).any(dim=2)[0]
    assert differs.tolist() == [False] * 4 + [True] * 2
    assert (encoder(x) != encoder(changed)).any(dim=2).all()


def test_weights_are_seen_of_each_block():
    seen = []
    encoder = Encoder(3, 16, 4).eval()
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(encoder(x, causal=True, seen=seen), encoder(x, causal=True), **CLOSE)
    assert [w.shape for w in seen] == [(2, 4, 5, 5)] * 3
    seen, decoder = [], Decoder(2, 16, 4).eval()
    decoder(x, torch.randn(2, 7, 16), seen=seen)
    assert [w.shape for w in seen] == [(2, 4, 5, 7)] * 2
    torch.testing.assert_close(torch.stack(seen).sum(dim=-1), torch.ones(2, 2, 4, 5))


def test_decoder_with_a_cache_equals_one_without():
    decoder = Decoder(2, 16, 4).eval()
    x, memory = torch.randn(3, 6, 16), torch.randn(3, 7, 16)
    mask = (torch.arange(7) < torch.tensor([[7], [4], [1]]))[:, None, None]
    whole, cache = decoder(x, memory, memory_mask=mask), decoder.new_cache()
    parts = [decoder(part, memory, memory_mask=mask, cache=cache) for part in x.split([1, 2, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


def test_sinusoids_are_the_papers():
    table = sinusoids(50, 6)
    for t, i in ((0, 0), (3, 0), (49, 2), (7, 4)):
        angle = t / 10_000 ** (i / 6)
        assert table[t, i] == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[t, i + 1] == pytest.approx(math.cos(angle), abs=1e-5)
    assert sinusoids(3, 5).shape == (3, 5)


# -- GPT ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpt():
    return TransformerLM(11, context=12, layers=2, heads=2, width=16)


def spread_out(model):
    """Weights so large that tokens matter: at first GPT-2's are small, and all logits nearly alike."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_nanogpts_size_on_shakespeare():
    assert sum(p.numel() for p in TransformerLM(65).parameters()) == 804_096  # 0.80M, as it prints, with 64 positions


@pytest.mark.parametrize(("width", "expected"), [(192, 0.04), (48, 0.08)])
def test_weights_begin_as_gpt2s(width, expected):
    model = TransformerLM(65, layers=2, width=width, bias=True)
    std = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.ndim > 1}
    assert std["embedding.weight"] == pytest.approx(expected, rel=0.05)
    assert std["encoder.blocks.1.attention.in_proj_weight"] == pytest.approx(expected, rel=0.05)
    assert std["encoder.blocks.1.mlp.0.weight"] == pytest.approx(expected, rel=0.05)
    assert std["encoder.blocks.1.mlp.3.weight"] == pytest.approx(expected / 2, rel=0.05)
    assert std["encoder.blocks.1.attention.out_proj.weight"] == pytest.approx(expected / 2, rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    tokens = torch.randint(65, (4, 64))
    loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), torch.randint(65, (256,)))
    assert float(loss.detach()) == pytest.approx(math.log(65), abs=0.5)


def test_weight_decay_is_of_matrices_only():
    model = TransformerLM(11, width=16, bias=True, optimizer=lambda p: torch.optim.AdamW(p, weight_decay=0.3))
    optimizer = model.configure_optimizers()
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one(tied):
    model = TransformerLM(11, width=16, tied=tied)
    assert (model.head.weight is model.embedding.weight) == tied
    other = TransformerLM(11, width=16, tied=tied)
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(11, (2, 5))
    assert torch.equal(model.eval()(tokens)[0], other.eval()(tokens)[0])


def test_what_comes_later_does_not_matter(gpt):
    spread_out(gpt).eval()
    tokens = torch.randint(11, (2, 9))
    torch.testing.assert_close(gpt(tokens[:, :5])[0], gpt(tokens)[0][:, :5], **CLOSE)
    assert not torch.allclose(gpt(tokens.flip(1))[0][:, -1], gpt(tokens)[0][:, -1])


@pytest.mark.parametrize("parts", [[12], [1] * 12, [5, 1, 1, 3, 2], [11, 1]], ids=str)
def test_with_a_cache_equal_to_without(gpt, parts):
    spread_out(gpt).eval()
    tokens, cache = torch.randint(11, (3, 12)), gpt.encoder.new_cache()
    logits = torch.cat([gpt(part, cache)[0] for part in tokens.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(logits, gpt(tokens)[0], **CLOSE)


def without_cache(self, text, start):
    """`next_logits` that reads the same window from its start each time; the state is where it starts."""
    size = self.context
    if start is None:
        start = max(0, text.shape[1] - size)
    elif text.shape[1] - start > size:  # the last one was full
        start = text.shape[1] - max(1, 3 * size // 4)
    return self(text[:, start:])[0][:, -1], start


@pytest.mark.parametrize("prompt", [1, 5, 11, 12, 13, 30])
@pytest.mark.parametrize("context", [12, 4, 2, 1])
def test_sampled_text_is_that_of_no_cache_also_when_the_window_moves(prompt, context):
    model = spread_out(TransformerLM(11, context=context, layers=2, heads=2, width=16))
    tokens = torch.randint(11, (2, prompt))
    kept = []

    def keeping(self, text, state):
        logits, state = TransformerLM.next_logits(self, text, state)
        kept.append(logits)
        return logits, state

    model.next_logits = types.MethodType(keeping, model)
    a = model.sample(tokens, 40, generator=torch.Generator().manual_seed(1))
    model.next_logits = types.MethodType(without_cache, model)
    b = model.sample(tokens, 40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    text, start = tokens, None
    for i, logits in enumerate(kept):
        expected, start = without_cache(model.eval(), torch.cat([text, a[:, :i]], dim=1), start)
        torch.testing.assert_close(logits, expected, **CLOSE)


def test_one_token_in_and_batches_of_one(gpt):
    logits, state = gpt(torch.zeros(1, 1, dtype=torch.int64))
    assert logits.shape == (1, 1, 11)
    assert state is None


def test_more_than_the_context_is_one_line(gpt):
    with pytest.raises(InputError, match="13 tokens are more than the model's context of 12"):
        gpt(torch.zeros(1, 13, dtype=torch.int64))
    cache = gpt.encoder.new_cache()
    gpt(torch.zeros(1, 12, dtype=torch.int64), cache)
    with pytest.raises(InputError, match="13 tokens"):
        gpt(torch.zeros(1, 1, dtype=torch.int64), cache)


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ({"context": 0}, "context: at least 1"),
        ({"heads": 3}, "heads: 3 do not divide the width, 16"),
        ({"layers": 0}, "layers: at least 1"),
        ({"vocabulary": 1}, "vocabulary: 2 at least"),
    ],
)
def test_a_bad_size_is_one_line(sizes, line):
    with pytest.raises(InputError, match=line):
        TransformerLM(**{"vocabulary": 11, "width": 16, "heads": 2, **sizes})


def test_learns_a_batch_by_heart(gpt):
    tokens = torch.randint(11, (4, 13))
    optimizer = torch.optim.AdamW(gpt.parameter_groups(), lr=0.01)
    for _ in range(120):
        loss = F.cross_entropy(gpt(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.4  # each line's first tokens do not tell which line it is
    written = gpt.sample(tokens[:, :6], 7, temperature=0)
    assert (written == tokens[:, 6:]).float().mean() > 0.9


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_the_schedule_is_nanogpts():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 2e-3}], lr=1e-3)  # fmt: skip
    schedule = WarmupCosineTo(optimizer, warmup_steps=100, total_steps=2000, end=0.1)
    rates = []
    for _ in range(2010):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    first = [rate for rate, _ in rates]
    assert first[0] == pytest.approx(1e-3 / 101)
    assert first[50] == pytest.approx(1e-3 * 51 / 101)
    assert first[100] == pytest.approx(1e-3)
    assert first[1050] == pytest.approx(0.55e-3)
    assert first[2000] == first[2009] == pytest.approx(1e-4)
    assert [second for _, second in rates] == pytest.approx([2 * rate for rate in first])


@pytest.mark.parametrize("arguments", [(10, 10), (-1, 10), (1, 10, 1.5)])
def test_a_schedule_that_cannot_be_is_one_line(arguments):
    with pytest.raises(InputError):
        WarmupCosineTo(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), *arguments)


# -- the benchmark -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_benchmark_compares_equal_models_and_prints_the_ratios(capsys):
    from benchmarks import transformer_speed

    assert transformer_speed.main(["--context", "8", "--rounds", "1", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    for said in ("sampling     7 tokens: ", "sampling    32 tokens: ", "times as fast", "training step: ", "as long"):
        assert said in out
