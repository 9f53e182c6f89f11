"""Translators: what they write, how it is counted, and the networks that read and write."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_train import receipt
from torch import nn

from callbacks.translations import TranslationPictures, grid_of, symbols
from datamodules.dates import Dates
from datamodules.vocabulary import PAD, Vocabulary, lengths, pad
from lit_models.seq2seq import END, START, AttentionSeq2Seq, BidirectionalEncoder, Translator, reverse
from lit_models.translation_transformer import TranslationTransformer
from runner.errors import InputError
from train import main

V = 9  # PAD, START, END and six symbols


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def recurrent(**arguments) -> AttentionSeq2Seq:
    return AttentionSeq2Seq(**{"sources": V, "targets": V, "width": 8, "hidden": 16, "max_length": 6} | arguments)


def transformer(**arguments) -> TranslationTransformer:
    small = {"sources": V, "targets": V, "layers": 2, "width": 16, "heads": 2, "hidden": 32, "max_length": 6}
    return TranslationTransformer(**small | arguments)


MODELS = {
    "additive": recurrent,
    "dot": lambda **a: recurrent(attention="dot", **a),
    "general": lambda **a: recurrent(attention="general", **a),
    "lstm": lambda **a: recurrent(cell="lstm", **a),
    "by hand": lambda **a: recurrent(fused=False, **a),
    "transformer": transformer,
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def some_pairs(n: int = 12, longest: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources of different lengths, one of them 1, and as targets the same the other way round."""
    counts = [1, longest, *torch.randint(1, longest + 1, (n - 2,)).tolist()]
    sources = [torch.randint(3, V, (count,)).tolist() for count in counts]
    return pad(sources), pad([[START, *source[::-1], END] for source in sources])


class Parrot(Translator):
    """Writes what a list says, whatever it is given: for each step, a symbol for each sample."""

    def __init__(self, says: list[list[int]], **arguments):
        super().__init__(V, **arguments)
        self.says, self.steps = torch.tensor(says), []

    def read(self, sources):
        return 0

    def write(self, tokens, state):
        T = tokens.shape[1]
        self.steps.append(tokens)
        logits = torch.zeros(len(tokens), T, V)
        logits[..., PAD], logits[..., START] = 5, 4  # what it would like best
        for t in range(T):
            logits[torch.arange(len(tokens)), t, self.says[(state + t) % len(self.says)]] = 3
        return logits, state + T, torch.full((len(tokens), T, 2), float(state))


# -- greedy decoding ---------------------------------------------------------------------------------------------------


def test_decoding_stops_when_all_have_ended_and_writes_padding_behind_an_end():
    parrot = Parrot([[5, END], [6, 7], [END, 8], [4, 4]], max_length=9)
    tokens, looks = parrot.translate(torch.zeros(2, 3))
    assert tokens.tolist() == [[5, 6, END], [END, PAD, PAD]]
    assert [given.tolist() for given in parrot.steps] == [[[START], [START]], [[5], [END]], [[6], [PAD]]]
    assert looks.shape == (2, 3, 2)
    assert looks[:, :, 0].tolist() == [[0, 1, 2]] * 2  # in their order


def test_decoding_without_an_end_stops_at_the_longest():
    tokens, looks = Parrot([[5, END]], max_length=4).translate(torch.zeros(2, 3))
    assert tokens.tolist() == [[5, 5, 5, 5], [END, PAD, PAD, PAD]]
    assert looks.shape == (2, 4, 2)


def test_decoding_of_one_sample_that_ends_at_once():
    tokens, _ = Parrot([[END]], max_length=4).translate(torch.zeros(1, 3))
    assert tokens.tolist() == [[END]]


@each_model
@pytest.mark.parametrize("training", [True, False])
def test_symbol_by_symbol_is_all_at_once(make, training):
    model = make().train(training)  # without dropout
    sources, targets = some_pairs()
    all_at_once = model(sources, targets[:, :-1])
    state, found = model.read(sources), []
    for tokens in targets[:, :-1].split(1, dim=1):
        logits, state, _ = model.write(tokens, state)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1), all_at_once, rtol=1e-5, atol=1e-5)


@each_model
def test_greedy_decoding_is_what_follows_from_its_own_words(make):
    model = make().eval()
    sources, _ = some_pairs()
    tokens, _ = model.translate(sources)
    given = F.pad(tokens, (1, 0), value=START)  # START before them
    logits = model(sources, given[:, :-1])
    logits[..., [PAD, START]] = -torch.inf
    best = logits.argmax(dim=2)
    written = tokens != PAD
    assert torch.equal(best[written], tokens[written])


@each_model
def test_no_symbol_depends_on_those_behind_it(make):
    model = make().eval()
    sources, targets = some_pairs()
    changed = targets.clone()
    changed[:, 3:] = 4
    torch.testing.assert_close(model(sources, targets)[:, :3], model(sources, changed)[:, :3])
    assert not torch.allclose(model(sources, targets)[:, 3:], model(sources, changed)[:, 3:])


@each_model
def test_what_pads_a_source_does_not_matter(make):
    """One in a batch with longer ones gets what it gets alone, and looks at nothing behind its end."""
    model = make().eval()
    sources, targets = some_pairs()
    together = model(sources, targets[:, :-1])
    tokens, looks = model.translate(sources)
    for i in (0, 1, 2):
        alone = sources[i : i + 1, : int(lengths(sources[i : i + 1]))]
        torch.testing.assert_close(model(alone, targets[i : i + 1, :-1])[0], together[i], rtol=1e-5, atol=1e-5)
        own, _ = model.translate(alone)
        n = own.shape[1]
        assert torch.equal(own[0], tokens[i, :n])
        torch.testing.assert_close(looks[i].sum(dim=1), torch.ones(len(looks[i])))
        assert (looks[i, :, alone.shape[1] :] == 0).all()


@each_model
def test_a_source_of_padding_only_is_harmless(make):
    model = make()
    sources, targets = some_pairs()
    sources[3] = PAD
    _, loss = model._teach(sources, targets)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    tokens, _ = model.eval().translate(sources)
    assert (tokens[3] != PAD).any()


# -- networks ----------------------------------------------------------------------------------------------------------


def test_reversing_keeps_the_padding_where_it_is():
    x = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0]])[..., None]
    reversed_ = reverse(x, torch.tensor([3, 1, 4, 0]))[..., 0]
    assert reversed_.tolist() == [[3, 2, 1, 0], [4, 0, 0, 0], [8, 7, 6, 5], [0, 0, 0, 0]]
    assert torch.equal(reverse(reverse(x, torch.tensor([3, 1, 4, 0])), torch.tensor([3, 1, 4, 0])), x)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_encoder_is_the_librarys_bidirectional_one(cell, fused):
    ours = BidirectionalEncoder(V, 8, 12, cell, fused=fused)
    theirs = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](8, 6, batch_first=True, bidirectional=True)
    weights = ours.ahead.weights.state_dict() | {
        f"{name}_reverse": w for name, w in ours.back.weights.state_dict().items()
    }
    theirs.load_state_dict(weights)
    sources, _ = some_pairs()
    packed = nn.utils.rnn.pack_padded_sequence(
        ours.embedding(sources), lengths(sources), batch_first=True, enforce_sorted=False
    )
    outputs, last = theirs(packed)
    outputs, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)
    last = last[0] if cell == "lstm" else last  # (2, B, 6)
    memory, summary = ours(sources)
    torch.testing.assert_close(memory, outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(summary, last.transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-5)


def test_the_decoder_is_what_its_formulas_say():
    """One sample, step by step, with the papers' letters; the library's cell is the reference of the recurrence."""
    model = recurrent().eval()
    encoder, decoder = model.encoder, model.decoder
    sources, targets = some_pairs()
    source, target = sources[1:2], targets[1:2, :-1]
    memory, summary = encoder(source)
    cell = nn.GRUCell(8 + 16, 16)
    cell.load_state_dict({n.removesuffix("_l0"): w for n, w in decoder.cell.weights.state_dict().items()})
    s = decoder.start(summary[0]).tanh()
    for t, logits in enumerate(model(source, target)[0]):
        scores = torch.stack(
            [
                decoder.attention.score.weight[0]
                @ (decoder.attention.query.weight @ s + decoder.attention.keys(h)).tanh()
                for h in memory[0]
            ]
        )
        c = sum(share * h for share, h in zip(scores.softmax(dim=0), memory[0], strict=True))
        s = cell(torch.cat([decoder.embedding(target[0, t]), c])[None], s[None])[0]
        torch.testing.assert_close(decoder.logits(torch.cat([s, c])), logits, rtol=1e-5, atol=1e-5)


@each_model
def test_dropout_is_for_training_only(make):
    model = make(dropout=0.5)
    sources, targets = some_pairs()
    assert not torch.equal(model.train()(sources, targets), model(sources, targets))
    assert torch.equal(model.eval()(sources, targets), model(sources, targets))


@each_model
def test_a_batch_is_learned_by_heart(make):
    model = make()
    sources, targets = some_pairs()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = None
    for step in range(250):
        sums, loss = model._teach(sources, targets)
        first = first or float(loss.detach())
        optimizer.zero_grad()
        (loss / sums["count"]).backward()
        optimizer.step()
        if step % 10 == 0 and float(loss.detach()) < 0.02 * first:
            break
    tokens, looks = model.eval().translate(sources)
    assert model.is_exact(tokens, targets).all()
    assert looks.shape == (12, tokens.shape[1], sources.shape[1])


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_exact_is_the_whole_output_end_included():
    targets = pad([[START, 5, 6, END], [START, 5, END], [START, 5, 6, 7, END], [START, END]])
    right = torch.tensor([[5, 6, END, PAD], [5, END, PAD, PAD], [5, 6, 7, END], [END, PAD, PAD, PAD]])
    assert Translator.is_exact(right, targets).all()
    assert Translator.is_exact(F.pad(right, (0, 3)), targets).all()  # more padding than the targets have
    for wrong in ([5, 6, PAD, PAD], [5, 6, 7, END], [5, PAD, 6, END], [6, 5, END, PAD], [5, END, PAD, PAD]):
        assert not Translator.is_exact(torch.tensor([wrong]), targets[:1]).any()
    assert not Translator.is_exact(torch.tensor([[5, 6]]), targets[:1]).any()  # stopped before its END
    assert Translator.is_exact(right[:2, :3], targets[:2]).all()  # fewer columns than the targets


def test_loss_and_accuracy_are_over_symbols_not_over_batches():
    parrot = Parrot([[5, 6], [6, END], [END, 4]])
    targets = pad([[START, 5, 6, END], [START, 6, END]])
    sums, loss = parrot._teach(torch.zeros(2, 3), targets)
    assert int(sums["count"]) == 5
    assert int(sums["acc"]) == 0  # it would like PAD best
    logits = torch.zeros(V)
    logits[PAD], logits[START], logits[5] = 5, 4, 3
    assert float(loss) == pytest.approx(5 * float(-logits.log_softmax(dim=0)[5]), rel=1e-5)


class Dropper(Parrot):
    """Does not like PAD and START."""

    def write(self, tokens, state):
        logits, state, looks = super().write(tokens, state)
        logits[..., :2] = -9
        return logits, state, looks


def test_metrics_of_a_set_do_not_depend_on_its_batches():
    """Batches of different sizes and lengths: sums over all, then a division."""
    says = torch.randint(2, V, (6, 1)).tolist()
    targets = pad([[START, *torch.randint(3, V, (n,)).tolist(), END] for n in (1, 5, 2, 4, 3, 1, 2)])
    targets[2, 1:4] = torch.tensor([says[0][0], says[1][0], END])  # all right but perhaps for the end
    seen = []
    for parts in ([7], [1, 6], [3, 3, 1]):
        model = Dropper([[s[0]] for s in says], max_length=8)
        model.log = lambda *_, **__: None
        for part in targets.split(parts):
            parrot_says = model.says
            model.says = parrot_says.expand(-1, len(part))
            model._evaluate((torch.zeros(len(part), 3), part), "val")
            model.says = parrot_says
        seen.append({name: float(model.means[f"val_{name}"].compute()) for name in ("loss", "acc", "exact")})
    for others in seen[1:]:
        assert others == pytest.approx(seen[0], rel=1e-5)
    assert 0 < seen[0]["acc"] < 1


def test_label_smoothing_is_for_training_only():
    model = recurrent(label_smoothing=0.3)
    sources, targets = some_pairs()
    _, plain = model._teach(sources, targets)
    _, smooth = model._teach(sources, targets, model.label_smoothing)
    logits = model(sources, targets[:, :-1]).flatten(0, 1)
    counted = targets[:, 1:].flatten() != PAD
    expected = F.cross_entropy(logits[counted], targets[:, 1:].flatten()[counted], label_smoothing=0.3, reduction="sum")
    smooth, plain, expected = (float(x.detach()) for x in (smooth, plain, expected))
    assert smooth == pytest.approx(expected, rel=1e-5)
    assert smooth != pytest.approx(plain, rel=1e-3)


def test_targets_longer_than_the_longest_output_are_told():
    model = recurrent(max_length=4)
    with pytest.raises(InputError, match="max_length: 4, but there are targets of 6: --model"):
        model._evaluate(some_pairs(), "val")


@pytest.mark.parametrize(
    ("make", "arguments", "line"),
    [
        (recurrent, {"targets": 3}, "targets: PAD, START, END and a symbol at least, got 3"),
        (recurrent, {"max_length": 0}, "max_length starts at 1, got 0"),
        (recurrent, {"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1, got 1.0"),
        (recurrent, {"hidden": 15}, "an even number, got 15"),
        (recurrent, {"width": 0}, "sources and width start at 1, got 9 and 0"),
        (transformer, {"heads": 3}, "heads: 3 do not divide the width, 16"),
        (transformer, {"sources": 0}, "sources starts at 1, got 0"),
    ],
)
def test_bad_arguments(make, arguments, line):
    with pytest.raises(InputError, match=line):
        make(**arguments)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_symbols_end_with_the_end():
    vocabulary = Vocabulary("ab", ends=True)
    assert symbols(torch.tensor([3, 4, END, PAD]), vocabulary) == ["a", "b", "END"]
    assert symbols(torch.tensor([3, 4, 3]), vocabulary) == ["a", "b", "a"]
    assert symbols(torch.tensor([END]), vocabulary) == ["END"]


def test_weights_of_a_grid_lie_where_they_belong():
    weights = torch.zeros(16)
    weights[1 * 4 + 2] = 0.5  # second row, third column
    light = grid_of(weights, (64, 64))
    assert light.shape == (64, 64)
    assert float(light.max()) == 1
    row, column = divmod(int(light.argmax()), 64)
    assert 16 <= row < 32
    assert 32 <= column < 48


@pytest.mark.pictures
@pytest.mark.parametrize("right", [0, 1, 5])
def test_pictures_of_right_and_wrong_ones(right, tmp_path):
    saved = {}
    run = SimpleNamespace(save_picture=lambda name, figure: saved.update({name: figure}))
    data = Dates(train=5, val=1, test=5)
    data.setup()
    sources, targets = data.test_set.tensors
    tokens = targets[:, 1:].clone()
    tokens[right:, 0] = 3  # no year begins with -
    weights = torch.rand(5, tokens.shape[1], sources.shape[1]).softmax(dim=2)
    pictures, model = TranslationPictures(run), recurrent()
    pictures.on_test_start(None, model)
    pictures.on_test_batch_end(None, model, (tokens, weights), (sources, targets), 0)
    pictures.on_test_end(SimpleNamespace(datamodule=data), model)
    figure = saved["translations"]
    assert figure.get_suptitle().startswith(f"{5 - right} of 5 test samples wrong")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert len(titles) == 5
    assert sum("(" in title for title in titles) == 5 - right
    figure.savefig(tmp_path / "a.png")


def test_a_model_that_does_not_tell_where_it_looks_has_no_picture():
    pictures = TranslationPictures(SimpleNamespace(save_picture=None))
    pictures.on_test_start(None, None)
    pictures.on_test_batch_end(None, None, (torch.zeros(2, 3), None), (None, None), 0)
    pictures.on_test_end(None, None)


# -- through train.py --------------------------------------------------------------------------------------------------

SMALL = ("--data.train=64", "--data.val=10", "--data.test=12", "--trainer.max_epochs=1")


@pytest.mark.parametrize("name", ["dates_attention", "dates_transformer"])
def test_metrics_have_the_names_that_are_promised(name, train):
    run = train(*SMALL, experiment=f"experiments/{name}.yaml", tiny=())
    said = receipt(run)
    assert set(said["metrics"]) == {"test/loss", "test/acc", "test/exact"}
    assert said["tested"] == 12
    history = (run / "metrics.csv").read_text()
    assert all(metric in history for metric in ("train/loss", "train/acc", "val/loss", "val/acc", "val/exact"))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--model.sources=60"], "AttentionSeq2Seq has 60 source symbols, but Dates has 68: --model.sources 68"),
        (["--model.targets=20"], "AttentionSeq2Seq has 20 target symbols, but Dates has 14: --model.targets 14"),
        (["--model.max_length=10"], "max_length: 10, but there are targets of 11: --model.max_length"),
    ],
)
def test_model_and_data_that_do_not_fit_are_one_line(argv, line, capsys, tmp_path):
    assert main(["experiments/dates_attention.yaml", *SMALL, *argv]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_lines_of_ones_own_are_translated(train, tmp_path, monkeypatch, capsys):
    run = train(*SMALL, experiment="experiments/dates_transformer.yaml", tiny=())
    (tmp_path / "dates.txt").write_text("3 May 1979\n\nTuesday, May 3rd 1979\n3 März 1979\n")
    monkeypatch.chdir(tmp_path)
    argv = [str(run / "config.yaml"), "--ckpt", str(run / "best.ckpt"), "--predict", str(tmp_path / "dates.txt")]
    assert main(argv) == 0
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines[0] == "file,line,text,output,error"
    assert len(lines) == 4
    for row in lines[1:3]:
        assert set(row.rpartition(",")[0].rpartition(",")[2]) <= set("-0123456789")
    assert "the character 'ä'" in lines[3]
