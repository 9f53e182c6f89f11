"""Nats a character over all characters, a state that is carried along the text, and sampling by the book."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from test_train import receipt

from callbacks.language import LanguagePictures, draw_samples
from datamodules.text import Text
from datamodules.vocabulary import IGNORE, Vocabulary
from lit_models.language_model import LanguageModel, RecurrentLM
from lit_models.lstm import GRU, LSTM
from lit_models.rnn import RNN
from lit_models.transformer import TransformerLM
from runner.errors import InputError
from runner.history import read_history
from runner.run import Run
from train import main

pytestmark = pytest.mark.filterwarnings("ignore:Attribute 'network' is an instance")  # train.py silences it, too

TEXT = "the quick brown fox jumps over the lazy dog\n"
SMALL_LSTM = (
    "--data.context=16",
    "--data.batch_size=8",
    "--data.eval_batch_size=7",
    "--model.network.init_args.n_in=8",
    "--model.network.init_args.hidden=16",
    "--model.network.init_args.layers=1",
)
SMALL_GPT = (
    "--data.context=16",
    "--data.batch_size=8",
    "--data.windows_per_epoch=40",
    "--model.context=16",
    "--model.layers=1",
    "--model.width=8",
    "--model.heads=2",
    "--model.lr_scheduler=null",
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def own(tmp_path):
    """A file of 1,100 characters, 28 different ones."""
    file = tmp_path / "own.txt"
    file.write_text(TEXT * 25)
    return file


def network(kind=LSTM, **settings):
    return kind(**{"n_in": 6, "hidden": 10, **settings})


def by_hand(model, data: Text) -> float:
    """Mean loss of the validation text, read as one, character by character for a recurrent model, else by windows."""
    text, model = data.val_set.text.long(), model.eval()
    if isinstance(model, TransformerLM):
        total, T = 0.0, data.context
        for start in range(0, len(text) - 1, T):
            window = text[start : start + T + 1]
            total += float(F.cross_entropy(model(window[None, :-1])[0][0], window[1:], reduction="sum").detach())
        return total / (len(text) - 1)
    with torch.no_grad():
        return float(F.cross_entropy(model(text[None, :-1])[0][0], text[1:]))


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.31])
def test_nats_a_character_are_of_all_characters(train, own, share):
    """Windows cut short and batches that are not full weigh what they have, no more."""
    run = train(*SMALL_GPT, f"--data.file={own}", "--data.source=python", f"--data.val_share={share}",
                "--data.eval_batch_size=3", "--trainer.max_epochs=1",
                experiment="experiments/text_transformer.yaml", tiny=())  # fmt: skip
    model = TransformerLM(128, context=16, layers=1, width=8, heads=2)
    model.load_state_dict(torch.load(run / "best.ckpt", weights_only=True)["state_dict"])
    data = Text(file=str(own), context=16, val_share=share)
    data.setup()
    loss, metrics = by_hand(model, data), receipt(run)["metrics"]
    assert metrics["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["test/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert metrics["test/bits"] == pytest.approx(loss / math.log(2), rel=1e-5)
    rows = {row["metric"]: row["value"] for row in read_history(run / "metrics.csv")}
    assert rows["val/loss"] == metrics["test/loss"]
    assert 2 < rows["train/loss"] < 6


@pytest.mark.parametrize("streams", [1, 7])
def test_a_recurrent_models_state_is_carried_along_the_text(train, own, streams):
    run = train(*SMALL_LSTM, f"--data.file={own}", f"--data.eval_batch_size={streams}", "--trainer.max_epochs=2",
                "--data.val_share=0.3", experiment="experiments/text_lstm.yaml", tiny=())  # fmt: skip
    model = RecurrentLM(128, LSTM(8, 16))
    model.load_state_dict(torch.load(run / "best.ckpt", weights_only=True)["state_dict"])
    data = Text(file=str(own), context=16, val_share=0.3)
    data.setup()
    loss = by_hand(model, data)
    if streams == 1:
        assert receipt(run)["metrics"]["test/loss"] == pytest.approx(loss, rel=1e-5)
    else:  # begins anew in a few places
        assert receipt(run)["metrics"]["test/loss"] != pytest.approx(loss, rel=1e-5)
        assert receipt(run)["metrics"]["test/loss"] == pytest.approx(loss, rel=0.05)


class Watching(RecurrentLM):
    """Notes the states that it is given."""

    def forward(self, tokens, state=None):
        self.given = state
        return super().forward(tokens, state)


@pytest.mark.parametrize("kind", [RNN, LSTM, GRU])
def test_in_training_the_state_goes_on_and_the_gradient_does_not(kind):
    model = Watching(11, network(kind))
    model._trainer = SimpleNamespace(datamodule=SimpleNamespace(streams=("train", "val", "test")))
    model.on_train_epoch_start()
    tokens = torch.randint(11, (3, 12))
    first, second = tokens.split([6, 6], dim=1)
    model.read(first, "train")
    assert model.given is None
    expected, state = RecurrentLM.forward(model, second, RecurrentLM.forward(model, first)[1])
    logits = model.read(second, "train")
    torch.testing.assert_close(logits, expected)
    given = (model.given,) if isinstance(model.given, torch.Tensor) else model.given
    assert not any(s.requires_grad for s in given)
    model.read(second[:2], "val")
    assert model.given is None, "validation has a state of its own"
    model.read(second[:1], "val")  # the other stream has ended
    model.read(first, "train")
    torch.testing.assert_close(model.given[0] if kind is LSTM else model.given, state[0] if kind is LSTM else state)
    model.on_train_epoch_start()
    model.on_validation_epoch_start()
    model.read(first, "train")
    assert model.given is None
    model.read(first, "val")
    assert model.given is None
    model.trainer.datamodule.streams = ("val", "test")
    model.read(first, "train")
    model.read(second, "train")
    assert model.given is None, "random windows do not go on"


def test_train_loss_is_of_the_characters_since_the_last_log(own):
    model, told = TransformerLM(28, context=16, layers=1, width=8, heads=2), []
    model.is_log_step = lambda batch_idx: batch_idx % 2 == 1
    model.log = lambda name, value, **_: told.append((name, float(value)))
    batches = [(torch.randint(28, (b, 5)), torch.randint(28, (b, 5))) for b in (1, 7, 2, 2)]
    batches[0][1][0, 2:] = IGNORE
    losses = [model.training_step(batch, i).detach() for i, batch in enumerate(batches)]
    assert told[0] == ("train/loss", pytest.approx(float(2 * losses[0] + 35 * losses[1]) / 37))
    assert told[1][1] == pytest.approx(float(losses[2] + losses[3]) / 2)


# -- learning ----------------------------------------------------------------------------------------------------------


def test_learns_a_text_by_heart_and_writes_it():
    vocabulary = Vocabulary(sorted(set(TEXT)), pad=False)
    tokens = torch.tensor([vocabulary.encode(TEXT * 2)])
    model = RecurrentLM(len(vocabulary), network(n_in=16, hidden=48, fused=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        loss = F.cross_entropy(model(tokens[:, :-1])[0][0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    assert model.write("the quick", vocabulary, 44, temperature=0) == (TEXT * 2)[9:53]


def test_dropout_is_of_training_only():
    model, tokens = RecurrentLM(11, network(), dropout=0.5), torch.randint(11, (2, 5))
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


# -- sampling ----------------------------------------------------------------------------------------------------------


class Fixed(LanguageModel):
    """The same logits after every token."""

    def __init__(self, logits):
        super().__init__(len(logits))
        self.logits = torch.tensor(logits)

    def forward(self, tokens, state=None):
        return self.logits.expand(*tokens.shape, -1), state


def shares(model, **how) -> list[float]:
    drawn = model.sample(torch.zeros(400, 1, dtype=torch.int64), 10, generator=torch.Generator().manual_seed(0), **how)
    return (torch.bincount(drawn.flatten(), minlength=model.vocabulary) / drawn.numel()).tolist()


def test_samples_have_the_models_probabilities():
    logits = [1.0, 0.0, -1.0, 2.0]
    for temperature in (1.0, 0.5, 3.0):
        expected = (torch.tensor(logits) / temperature).softmax(dim=0).tolist()
        assert shares(Fixed(logits), temperature=temperature) == pytest.approx(expected, abs=0.03)


def test_top_k_leaves_out_the_rest():
    logits = [1.0, 0.0, -1.0, 2.0]
    expected = torch.tensor([1.0, -math.inf, -math.inf, 2.0]).softmax(dim=0).tolist()
    assert shares(Fixed(logits), top_k=2) == pytest.approx(expected, abs=0.03)
    assert shares(Fixed(logits), top_k=1) == [0, 0, 0, 1]
    assert shares(Fixed(logits), top_k=9) == shares(Fixed(logits))


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-40])
def test_the_coldest_take_the_most_probable(temperature):
    assert shares(Fixed([1.0, 0.0, -1.0, 2.0]), temperature=temperature) == [0, 0, 0, 1]


def test_only_symbols_of_the_text_are_drawn():
    assert shares(Fixed([1.0, 0.0, 9.0, 9.0]), symbols=2)[2:] == [0, 0]


@pytest.mark.parametrize("make", [lambda: TransformerLM(11, 12, 1, 2, 8), lambda: RecurrentLM(11, network())])
def test_the_same_seed_draws_the_same_and_training_goes_on_as_it_was(make):
    model, prompt = make(), torch.randint(11, (1, 3))
    model.train()
    a, b, c = (model.sample(prompt, 30, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (1, 30)
    assert model.training
    assert model.sample(prompt, 0).shape == (1, 0)
    state = torch.get_rng_state()
    model.sample(prompt, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_recurrent_models_samples_carry_the_state():
    model, prompt = RecurrentLM(11, network()), torch.randint(11, (2, 3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    text = prompt
    for _ in range(20):
        text = torch.cat([text, model(text)[0][:, -1:].argmax(dim=2)], dim=1)
    assert torch.equal(model.sample(prompt, 20, temperature=0), text[:, 3:])


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"temperature": -1.0}, "temperature and length start at 0, top_k at 1; got -1.0, 5 and None"),
        ({"temperature": math.nan}, "got nan"),
        ({"top_k": 0}, "top_k at 1; got 1.0, 5 and 0"),
    ],
)
def test_a_setting_out_of_range_is_one_line(how, line):
    with pytest.raises(InputError, match=line):
        TransformerLM(11).sample(torch.zeros(1, 1, dtype=torch.int64), 5, **how)


def test_an_empty_prompt_is_one_line():
    with pytest.raises(InputError, match="the prompt is empty"):
        TransformerLM(11).write("", Vocabulary("abc", pad=False), 5)


# -- through train.py --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "argv", "line"),
    [
        (
            "text_transformer",
            ["--model.vocabulary=50"],
            "TransformerLM has a vocabulary of 50, but Text has 1[01]. symbols: --model.vocabulary 1",
        ),
        ("text_transformer", ["--data.context=65"], "windows have 65 tokens, and the model's context is 64"),
        ("text_lstm", ["--data.file=nowhere.txt"], "file nowhere.txt does not exist"),
        ("text_transformer", ["--model.heads=3"], "heads: 3 do not divide the width, 128"),
        ("text_transformer", ["--model.lr_scheduler.total_steps=110"], "WarmupCosineTo plans 110 steps"),
    ],
)
def test_a_mistake_is_one_line(experiment, argv, line, capsys, tmp_path):
    assert main([f"{REPOSITORY}/experiments/{experiment}.yaml", *argv]) == 2
    err = capsys.readouterr().err
    assert re.search(line, err), err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("experiment", ["text_lstm", "text_transformer"])
def test_a_resumed_run_ends_in_the_same_bits(train, own, experiment):
    small = SMALL_LSTM if experiment == "text_lstm" else SMALL_GPT
    settings = (*small, f"--data.file={own}", "--model.dropout=0.2")
    both = {"experiment": f"experiments/{experiment}.yaml", "tiny": ()}
    whole = train(*settings, "--trainer.max_epochs=3", **both)
    part = train(*settings, "--trainer.max_epochs=2", **both)
    resumed = train(f"--resume={part}", "--trainer.max_epochs=3", experiment="", tiny=())
    assert resumed == part
    a, b = (torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, part))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert receipt(whole)["metrics"] == receipt(part)["metrics"]


def test_a_checkpoint_tests_another_text(train, own, tmp_path, capsys):
    run = train(*SMALL_GPT, f"--data.file={own}", "--trainer.max_epochs=1",
                experiment="experiments/text_transformer.yaml", tiny=())  # fmt: skip
    other = tmp_path / "other.txt"
    other.write_text("over the dog\n" * 50)
    command = [str(run / "config.yaml"), f"--ckpt={run / 'best.ckpt'}", f"--data.file={other}"]
    assert main(command) == 0
    assert "test/loss" in capsys.readouterr().out
    other.write_text("Over the dog\n" * 50)
    assert main(command) == 2
    assert "does not know: 'O'" in capsys.readouterr().err


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.pictures
@pytest.mark.parametrize("experiment", ["text_lstm", "text_transformer"])
def test_pictures_and_samples_of_a_run(train, own, experiment):
    from matplotlib.image import imread

    small = SMALL_LSTM if experiment == "text_lstm" else SMALL_GPT
    settings = (*small, f"--data.file={own}", "--trainer.max_epochs=1")
    runs = [train(*settings, experiment=f"experiments/{experiment}.yaml", tiny=()) for _ in range(2)]
    texts = [(run / "pictures" / "samples.txt").read_text() for run in runs]
    assert texts[0] == texts[1], "the same run writes the same"
    for temperature in ("0.5", "0.8", "1.0"):
        assert f"-- temperature {temperature} --\n" in texts[0]
    known = set(TEXT) | set("-temperature 0123456789.\n")
    assert set(texts[0]) <= known
    assert len(texts[0]) > 1200
    for name in ("samples", "context", "curves"):
        assert imread(runs[0] / "pictures" / f"{name}.png")[..., :3].std() > 0.02, f"{name} is blank"


@pytest.mark.pictures
def test_the_context_curve_is_the_mean_at_each_place(tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(Run, "save_picture", lambda self, name, figure: figures.setdefault(name, figure))
    vocabulary = Vocabulary("ab\n", pad=False)
    trainer = SimpleNamespace(datamodule=SimpleNamespace(vocabulary=vocabulary, streams=("test",)))
    callback, model = LanguagePictures(Run(tmp_path), length=5), TransformerLM(3, 4, 1, 1, 4)
    callback.on_test_start(trainer, model)
    two = math.log(2)
    for losses, targets in (
        ([[3 * two, two, two]] * 2, [[1, 1, 1]] * 2),
        ([[6 * two, 4 * two, 0.0]], [[1, 1, IGNORE]]),
    ):
        callback.on_test_batch_end(trainer, model, torch.tensor(losses), (None, torch.tensor(targets)), 0)
    callback.on_test_end(trainer, model)
    curve, mean = figures["context"].axes[0].lines
    assert curve.get_ydata().tolist() == pytest.approx([4, 2, 1])
    assert mean.get_ydata()[0] == pytest.approx(20 / 8)
    assert "nothing is known of what was before" in figures["context"].axes[0].get_title()


@pytest.mark.pictures
def test_signs_that_matplotlib_would_read_are_drawn_as_they_are(tmp_path):
    figure = draw_samples({0.5: "$x^2 \\frac{ $$ \t" * 30, 1.0: "\n" * 100})
    figure.savefig(tmp_path / "a.png", dpi=50)
    assert figure.axes[0].texts[0].get_text().startswith("$x^2")
