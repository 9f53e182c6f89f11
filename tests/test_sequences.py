"""The tasks on sequences: padding has no part in them, they learn, and they fit their data or say so."""

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule
from torch import nn

from datamodules.series import Series
from datamodules.vocabulary import Vocabulary, pad
from lit_models.lstm import GRU, LSTM
from lit_models.rnn import RNN
from lit_models.sequences import SequenceClassifier, SequenceRegressor
from runner.errors import InputError
from train import main

KINDS = pytest.mark.parametrize("kind", [RNN, LSTM, GRU])


def classifier(kind=LSTM, pool="last", **arguments) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(3, vocabulary=6, network=kind(4, 8), pool=pool, **arguments)


@KINDS
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_texts_logits_do_not_depend_on_what_it_is_batched_with(kind, pool):
    model = classifier(kind, pool).eval()
    texts = [[1, 2], [3], [5, 4, 3, 2, 1]]
    together = model(pad(texts))
    assert together.shape == (3, 3)
    for logits, text in zip(together, texts, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([text]))[0])
        torch.testing.assert_close(logits, model(F.pad(torch.tensor([text]), (0, 7)))[0])
    assert not torch.allclose(together[0], model(torch.tensor([[2, 1]]))[0]), "the order of the symbols matters"


def test_last_is_the_state_after_the_last_symbol_and_mean_that_of_all():
    for pool in ("last", "mean"):
        model = classifier(RNN, pool).eval()
        outputs, _ = model.network(model.embedding(torch.tensor([[1, 2, 3]])))
        seen = outputs[:, -1] if pool == "last" else outputs.mean(dim=1)
        torch.testing.assert_close(model(torch.tensor([[1, 2, 3, 0, 0]])), model.head(seen))


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_text_without_symbols_is_no_error(pool):
    logits = classifier(pool=pool).eval()(torch.tensor([[0, 0], [1, 2]]))
    assert logits.isfinite().all()


def test_dropout_is_in_training_only():
    model, tokens = classifier(dropout=0.5), torch.tensor([[1, 2, 3]])
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.embedding.weight[0], torch.zeros(4)), "PAD has no embedding"


@KINDS
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_classifier_memorises_a_batch(kind, pool):
    torch.manual_seed(0)
    tokens, labels = pad([[1, 2], [2, 1], [3], [1, 2, 3, 4], [4, 3, 2, 1], [5]]), torch.tensor([0, 1, 2, 1, 0, 2])
    model = classifier(kind, pool)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(100):
        loss, logits = model.training_loss(tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < 0.9 < losses[0]
    assert (logits.argmax(dim=1) == labels).all()


@KINDS
def test_a_regressor_memorises_a_batch(kind):
    torch.manual_seed(0)
    x, y = torch.randn(6, 5), torch.randn(6, 2)
    model = SequenceRegressor(kind(1, 16), horizon=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(250):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.03 < 0.5 < losses[0]


def test_series_of_one_number_a_step_or_of_more():
    model = SequenceRegressor(RNN(1, 4), horizon=3)
    x = torch.randn(2, 5)
    assert model(x).shape == (2, 3)
    torch.testing.assert_close(model(x.unsqueeze(2)), model(x))
    assert SequenceRegressor(RNN(7, 4))(torch.randn(2, 5, 7)).shape == (2, 1)
    assert model(torch.randn(1, 1)).shape == (1, 3)


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_forecast_goes_on_from_what_it_predicted(horizon):
    class Next(nn.Module):
        """A network that knows: what comes next is one more than the last."""

        hidden = 1

        def forward(self, x):
            assert x.shape[1] == 4, "it always sees as much as it was trained on"
            return x, None

    model = SequenceRegressor(Next(), horizon=horizon)
    with torch.no_grad():
        model.head.weight.fill_(1)
        model.head.bias.copy_(torch.arange(1, horizon + 1))
    x = torch.tensor([[0.0, 1, 2, 3], [10, 11, 12, 13]])
    assert model.forecast(x, 5).tolist() == [[4, 5, 6, 7, 8], [14, 15, 16, 17, 18]]
    assert not model.forecast(x, 5).requires_grad


class Known(LightningDataModule):
    vocabulary = Vocabulary("abcdefgh")
    horizon = 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: classifier(), "vocabulary of 6, but Known has 9 tokens: --model.vocabulary 9"),
        (lambda: SequenceRegressor(RNN(1, 2)), "predicts 1 value.s., but Known has 4: --model.horizon 4"),
        (lambda: classifier(dropout=1.0), "dropout is from 0 to below 1"),
        (lambda: SequenceClassifier(3, 1, RNN(2, 2)), "PAD and one token at least, got 1"),
        (lambda: SequenceRegressor(RNN(1, 2), horizon=0), "one value at least"),
    ],
)
def test_what_does_not_fit_is_one_line(model, message):
    class Trainer:
        datamodule = Known()

    def make_and_set_up():
        made = model()
        made._trainer = Trainer()
        made.setup("fit")

    with pytest.raises(InputError, match=message) as error:
        make_and_set_up()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("torch.nn.LSTM", "model.network: torch.nn.LSTM is no RNN; did you mean 'lit_models.lstm.LSTM'?"),
        ("lit_models.mlp.MLP", "model.network: lit_models.mlp.MLP is no RNN; did you mean 'lit_models."),
    ],
)
def test_a_network_of_another_kind_is_one_line(path, line, capsys):
    assert main(["experiments/series_lstm.yaml", f"--model.network={path}"]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


SERIES = ("--data.length=700", "--data.context=10", "--model.network.init_args.hidden=6")


@pytest.mark.pictures
def test_test_tells_baselines_and_skill_and_draws_a_forecast(train):
    from test_train import receipt

    options = (*SERIES, "--trainer.max_epochs=2", "--data.horizon=2", "--model.horizon=2")
    run = train(*options, experiment="experiments/series_lstm.yaml", tiny=())
    metrics = receipt(run)["metrics"]
    data = Series(length=700, context=10, horizon=2)
    data.setup()
    for name, value in data.baselines().items():
        assert metrics[f"test/mse_{name}"] == pytest.approx(value, rel=1e-5)
    least = min(metrics["test/mse_persistence"], metrics["test/mse_linear"])
    assert metrics["test/skill"] == pytest.approx(1 - metrics["test/mse"] / least, rel=1e-5)
    assert (run / "pictures" / "forecast.png").stat().st_size > 10_000


def test_a_network_beats_the_linear_autoregression(train):
    from test_train import receipt

    scheduler = "--model.lr_scheduler.init_args.total_steps=300"
    options = ("--data.length=4000", "--data.context=24", "--model.network.init_args.hidden=24", scheduler)
    run = train(*options, "--trainer.max_epochs=6", experiment="experiments/series_lstm.yaml", tiny=())
    assert receipt(run)["metrics"]["test/skill"] > 0.1
