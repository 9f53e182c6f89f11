"""Series made by code, anyone's, and broken ones; parts that are never mixed; baselines."""

import math

import numpy as np
import pytest
import torch

from datamodules.series import Series, read_column
from runner.errors import InputError
from train import main


def made(**arguments) -> Series:
    data = Series(**{"length": 400, "context": 12, **arguments})
    data.setup()
    return data


def test_parts_are_consecutive_and_normalised_by_the_training_part():
    data = made(horizon=3, val_share=0.2, test_share=0.1)
    series = data.make()
    normalised = (series - series[:280].mean()) / series[:280].std()
    assert data.sizes == {"train": 280 - 14, "val": 80 - 14, "test": 40 - 14}
    for dataset, start in ((data.train_set, 0), (data.val_set, 280), (data.test_set, 360)):
        inputs, targets = dataset.tensors
        assert inputs.dtype == torch.float32
        for i in (0, len(inputs) - 1):
            at = start + i
            np.testing.assert_allclose(inputs[i], normalised[at : at + 12], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(targets[i], normalised[at + 12 : at + 15], rtol=1e-5, atol=1e-6)
    last = data.train_set.tensors[1][-1, -1]
    assert float(last) == pytest.approx(normalised[279], rel=1e-5), "no window reaches into the next part"


def test_the_same_seed_makes_the_same_series_whatever_else_is_drawn():
    np.random.seed(1)
    first = Series().make()
    expected = np.random.rand()
    np.random.seed(1)
    assert np.random.rand() == expected
    np.testing.assert_array_equal(Series().make(), first)
    assert not np.array_equal(Series(data_seed=1).make(), first)
    assert np.isfinite(first).all()
    assert made().fingerprint == made().fingerprint != made(data_seed=1).fingerprint


def test_setup_twice_and_shuffled_batches_of_training_alone():
    data = made()
    before = data.train_set
    data.setup()
    assert data.train_set is before
    (inputs, targets), *_ = data.train_dataloader()
    assert inputs.shape == (64, 12)
    assert targets.shape == (64, 1)
    assert not torch.equal(inputs, data.train_set.tensors[0][:64])
    (tested, _), *_ = data.test_dataloader()
    assert torch.equal(tested, data.test_set.tensors[0])


def test_what_the_network_has_to_learn_is_not_linear_and_not_noise():
    """The linear autoregression beats persistence, and leaves much more than the noise."""
    data = Series()
    data.setup()
    errors = data.baselines()
    noise = (data.noise / data.std) ** 2
    assert errors["persistence"] > 2 * errors["linear"] > 12 * noise


def test_baselines_on_series_whose_best_predictions_are_known(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("y\n" + "".join(f"{math.sin(t / 3)!r}\n" for t in range(200)))
    errors = made(file=str(file), context=6).baselines()
    assert errors["linear"] < 1e-10, "a sine follows from its last two values"
    test = made(file=str(file), context=6).test_set.tensors
    steps = np.diff(np.concatenate([test[0][:1, -1], test[1][:, 0]]))
    assert errors["persistence"] == pytest.approx((steps**2).mean(), rel=1e-4)

    file.write_text("".join(f"{math.sin(t / (3 if t < 170 else 2))!r}\n" for t in range(200)))
    assert made(file=str(file), context=6).baselines()["linear"] > 1e-3, "it is fitted to the training part"

    random = np.random.default_rng(0).standard_normal(3000)
    file.write_text("".join(f"{value!r}\n" for value in random.tolist()))
    errors = made(file=str(file), context=2).baselines()
    assert errors["linear"] == pytest.approx(1, abs=0.15), "of noise the mean is best"
    assert errors["persistence"] == pytest.approx(2, abs=0.3)


def test_baselines_predict_the_whole_horizon():
    data = made(horizon=4)
    inputs, targets = data.test_set.tensors
    assert data.baselines()["persistence"] == pytest.approx(float((inputs[:, -1:] - targets).square().mean()), rel=1e-5)
    assert data.baselines()["linear"] > made(horizon=1).baselines()["linear"]


TABLE = "day;temperature;2020\nmonday;1.5;7\ntuesday;-2e1;8\n"


@pytest.mark.parametrize(
    ("text", "column", "values", "name"),
    [
        (TABLE, "temperature", [1.5, -20], "temperature"),
        (TABLE, 2, [1.5, -20], "temperature"),
        (TABLE, 2020, [7, 8], "2020"),
        (TABLE, "2020", [7, 8], "2020"),
        (TABLE, 3, [2020, 7, 8], "3"),  # a first line that has a number there is taken for one of numbers
        (TABLE, None, [2020, 7, 8], "3"),
        ("1\n2\n", None, [1, 2], "1"),
        ("1,5\n2,6\n", 1, [1, 2], "1"),
        ("\ufeffy\r\n1\r\n\r\n2\r\n", "y", [1, 2], "y"),
        ('"a, b",c\n1,2\n', "a, b", [1], "a, b"),
        ("a\tb\n1\t2\n", "b", [2], "b"),
        ("day;warmth, C\n1;2.5\n", None, [2.5], "warmth, C"),
    ],
)
def test_a_column_of_anyones_file(tmp_path, text, column, values, name):
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert read_column(tmp_path / "a.csv", column) == (values, name)


@pytest.mark.parametrize(
    ("text", "column", "line"),
    [
        ("", None, "a.csv has no rows"),
        ("y\n", None, "a.csv:1: no rows below the names"),
        (TABLE, "temprature", "a.csv:1: no column 'temprature' among its 3; did you mean 'temperature'?"),
        (TABLE, 4, "a.csv:1: no column 4 among its 3"),
        (TABLE, 0, "a.csv:1: no column 0 among its 3"),
        (TABLE, -1, "a.csv:1: no column -1"),
        (TABLE, 1, "a.csv:2: expected a number in column 1, got 'monday'"),
        ("y\n1\nx\n", None, "a.csv:3: expected a number in column 1, got 'x'"),
        ("y\n1\n\n\n1_0\n", None, "a.csv:5: expected a number in column 1, got '1_0'"),
        ("a,b\n1,2\n3\n", None, "a.csv:3: expected a number in column 2, got ''"),
        ("y\n1\nnan\n", None, "a.csv:3: expected a number in column 1, got 'nan': drop the row, or fill it in"),
        ("y\n1\ninf\n", None, "a.csv:3: expected a number in column 1, got 'inf': drop"),
        ("1;2,5\n2;3,7\n", None, "a.csv:1: expected a number in column 2, got '2,5': write decimals behind a point"),
        ("day;y\n1,5;2,5\n", 1, "a.csv:2: expected a number in column 1, got '1,5': write decimals behind a point"),
        (b"\xff\xfe\x00", None, "a.csv is not text in UTF-8"),
        ('y\n"1\n' + 20_000 * "5,6,7,8\n", None, "a.csv:2: field larger than field limit"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_line(tmp_path, text, column, line):
    (tmp_path / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read_column(tmp_path / "a.csv", column)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context and horizon: one value at least"),
        ({"horizon": 0}, "context and horizon: one value at least"),
        ({"val_share": 0.5, "test_share": 0.5}, "must leave some to train on"),
        ({"test_share": 0.0}, "must leave some to train on"),
        ({"periods": (1.0,)}, "periods are of two steps at least"),
        ({"periods": ()}, "there must be a period"),
        ({"noise": -1.0}, "noise is not below 0"),
        ({"gain": float("nan")}, "be numbers"),
        ({"column": 1}, "name the file, too"),
        ({"length": 60}, "has 60 value(s), and 9 of them are to val: too short for one window of context 12 and horizon 1"),
        ({"length": 1}, "too short for one window"),
        ({"batch_size": 0}, "batch sizes start at 1"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(InputError) as error:
        made(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shortest_series_there_can_be():
    data = made(length=10, context=1, val_share=0.2, test_share=0.2)
    assert data.sizes == {"train": 5, "val": 1, "test": 1}
    with pytest.raises(InputError, match=r"9 value.s., and 1 of them are to test"):
        made(length=9, context=1, val_share=0.2, test_share=0.15)


def test_a_series_that_stands_still_is_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("5\n" * 300)
    with pytest.raises(InputError, match=r"a\.csv is 5 in all that is to train: there is nothing to forecast"):
        made(file=str(tmp_path / "a.csv"))


def test_a_file_of_ones_own_in_the_data_folder_trains_to_the_end(train, tmp_path, monkeypatch):
    from test_train import receipt

    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    rows = "".join(f"day {t},{20 + 5 * np.sin(t / 4) + t % 3}\n" for t in range(300))
    (tmp_path / "own.csv").write_text(f"day,warmth\n{rows}")
    options = ("--data.file=own.csv", "--data.column=warmth", "--data.context=8", "--trainer.max_epochs=1")
    run = train(*options, experiment="experiments/series_rnn.yaml", tiny=())
    said = receipt(run)["data"]
    assert said["source"] == f"column warmth of {tmp_path / 'own.csv'}"
    assert said["train"] == 210 - 8
    assert receipt(run)["tested"] == said["test"] == 45 - 8


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--data.file=nowhere.csv"], "nowhere.csv does not exist"),
        (
            ["--data.file={bad}", "--data.column=warmt"],
            "bad.csv:1: no column 'warmt' among its 1; did you mean 'warmth'?",
        ),
        (["--data.horizon=2"], "--model.horizon 2"),
        (["--data.length=100"], "too short for one window of context 48 and horizon 1"),
    ],
)
def test_through_train_py(argv, line, tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("warmth\n1\n2\n")
    assert main(["experiments/series_rnn.yaml", *(word.format(bad=tmp_path / "bad.csv") for word in argv)]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
