"""Lines from CSV files: ours, anyone's, and broken ones."""

import numpy as np
import pytest
import torch
from test_train import receipt

from datamodules.lines import Line, read_columns
from runner.errors import InputError
from train import main


def test_the_points_are_numpys_and_survive_the_file_to_the_last_bit(small_data):
    data = Line(slope=2, intercept=3, noise=1, seed=0)
    data.prepare_data()
    data.setup()
    np.random.seed(0)
    x = np.random.rand(100)
    y = 2 * x + 3 + np.random.randn(100)
    for dataset, part in ((data.train_set, slice(0, 80)), (data.test_set, slice(80, 100))):
        np.testing.assert_array_equal(dataset.tensors[0].numpy()[:, 0], x[part])
        np.testing.assert_array_equal(dataset.tensors[1].numpy()[:, 0], y[part])
    assert data.path.is_relative_to(small_data)
    assert data.val_dataloader() == []


def test_drawing_leaves_the_global_generators_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    Line().prepare_data()
    assert np.random.rand() == expected


def test_no_two_lines_share_a_file():
    paths = {Line(slope=slope).path for slope in (1234567, 1234568, 1.0, 1.0000001)}
    assert len(paths) == 4


@pytest.mark.parametrize(
    ("text", "columns", "rows"),
    [
        ("x,y\n1,2\n3,4\n", None, [(1, 2), (3, 4)]),
        ("1,2\n3,4\n", None, [(1, 2), (3, 4)]),
        ("1,2", None, [(1, 2)]),
        ("\ufeffx;y\r\n1;2\r\n\r\n3;-4e2\r\n", None, [(1, 2), (3, -400)]),
        ("x\ty\n 1\t2 \n", None, [(1, 2)]),
        ('"height, m","weight"\n1,2\n', ("weight", "height, m"), [(2, 1)]),
        ("name,x,y\nAda,1,2\n", ("x", "y"), [(1, 2)]),
        ("\n\nx;y\n1;2\n", None, [(1, 2)]),
        ('"height, m";weight\n1;2\n', None, [(1, 2)]),
        ("x,2020\n1,2\n", ("x", "2020"), [(1, 2)]),
    ],
)
def test_two_columns_of_anyones_file(tmp_path, text, columns, rows):
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert read_columns(tmp_path / "a.csv", columns) == rows


@pytest.mark.parametrize(
    ("text", "columns", "line"),
    [
        ("", None, "a.csv:1: no rows"),
        ("\n\n", None, "a.csv:1: no rows"),
        ("x,y\n", None, "a.csv:1: no rows below the names"),
        ("x,y\n1,2\n3\n", None, "a.csv:3: column 2 is missing: expected two numbers, got '3'"),
        ("x\n1\n", None, "a.csv:2: column 2 is missing"),
        ("x,y\n1,2\n\n3,four\n", None, "a.csv:4: expected a number in column 2, got 'four'"),
        ("x,y\n1,2\n3,\n", None, "a.csv:3: expected a number in column 2, got ''"),
        ("1,5;2,5\n3;4\n", None, "a.csv:1: expected a number in column 1, got '1,5': write decimals behind a point"),
        ("x;y\n1;2\n3;-4,0\n", None, "a.csv:3: expected a number in column 2, got '-4,0': write decimals behind"),
        ("x,y\n1,2\nnan,4\n", None, "a.csv:3: expected a number in column 1, got 'nan': drop the row, or fill it in"),
        ("x,y\n1,inf\n", None, "a.csv:2: expected a number in column 2, got 'inf': drop"),
        (
            "height,weight\n1,2\n",
            ("hight", "weight"),
            "a.csv:1: no column 'hight' in its first line; did you mean 'height'?",
        ),
        ("1,2\n", ("x", "y"), "a.csv:1: no column 'x' in its first line"),
        ("x,x\n1,2\n", ("x", "y"), "a.csv:1: 2 columns 'x' in its first line"),
        ("x,y\n1,2\n", ("x", "x"), "the input's and the target's, two different ones, got ['x', 'x']"),
        ("x,y\n1_0,2\n", None, "a.csv:2: expected a number in column 1, got '1_0'"),
        ('x,y\n1,2\n"3,4\n5,6\n7,8\n', None, "a.csv:3: expected a number in column 1"),
        ('x,y\n1,2\n"3,4\n' + 20_000 * "5,6,7,8\n", None, "a.csv:3: field larger than field limit"),
        (b"\xff\xfe\x00", None, "a.csv is not text in UTF-8"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_line(tmp_path, text, columns, line):
    (tmp_path / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read_columns(tmp_path / "a.csv", columns)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--data.file=nowhere.csv"], "file nowhere.csv does not exist"),
        (["--data.file={bad}"], "bad.csv:2: expected a number in column 2, got 'b'"),
        (["--data.file={one}"], "one.csv has 1 row(s): train_share 0.8 of them leaves none to test"),
        (["--data.train_share=1.5"], "train_share must be between 0 and 1, got 1.5"),
        (["--data.points=1"], "one to train and one to test at least, got 1"),
        (["--data.batch_size=0"], "batch sizes start at 1"),
    ],
)
def test_through_train_py(argv, line, tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("x,y\n1,b\n")
    (tmp_path / "one.csv").write_text("1,2\n")
    argv = [word.format(bad=tmp_path / "bad.csv", one=tmp_path / "one.csv") for word in argv]
    assert main(["experiments/line_by_hand.yaml", *argv]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "file"))
    assert main(["experiments/line_by_hand.yaml"]) == 2
    err = capsys.readouterr().err
    assert "cannot write" in err
    assert "set DATA_DIR" in err


def test_a_file_of_ones_own_trains_to_the_end(train, tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("a,b,c\n" + "".join(f"{i / 10},x,{i / 5 + 1}\n" for i in range(10)))
    run = train(f"--data.file={file}", "--data.columns=[a, c]", "--trainer.max_epochs=300", "--model.lr=0.5",
                experiment="experiments/line_by_hand.yaml", tiny=())  # fmt: skip
    assert receipt(run)["data"]["source"] == f"rows of {file}"
    assert receipt(run)["tested"] == 2
    weights = torch.load(run / "best.ckpt", weights_only=True)["state_dict"]
    assert float(weights["w"]) == pytest.approx(2, abs=1e-6)
    assert float(weights["b"]) == pytest.approx(1, abs=1e-6)
