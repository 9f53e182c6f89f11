"""`--prompt` continues a text with a checkpoint and nothing else, and draws the same with the same seed."""

import re
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from datamodules.text import Text
from datamodules.vocabulary import Vocabulary
from lit_models.language_model import RecurrentLM
from lit_models.lstm import LSTM
from runner import arguments
from runner.arguments import Prompt
from train import main

TEXT = "the quick brown fox jumps over the lazy dog\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run of the LSTM on a small text."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "own.txt").write_text(TEXT * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_DIR", str(folder))
        patch.setenv("WANDB_MODE", "disabled")
        small = ("--model.network.init_args.n_in=8", "--model.network.init_args.hidden=32", "--model.optimizer.lr=0.02",
                 "--data.context=16", "--data.batch_size=4", "--data.eval_batch_size=4", "--trainer.max_epochs=4",
                 "--model.network.init_args.layers=1")  # fmt: skip
        assert main([f"{REPOSITORY}/experiments/text_lstm.yaml", f"--data.file={folder / 'own.txt'}", *small]) == 0
        (run,) = folder.glob("text_lstm/*")
        (folder / "own.txt").unlink()  # the checkpoint keeps what is needed of it
        return run


@pytest.fixture(autouse=True)
def nothing_else(tmp_path, monkeypatch):
    """No data, no network."""

    def refuse(*_, **__):
        raise OSError("what has no part in a prediction")

    monkeypatch.setenv("DATA_DIR", str(tmp_path / "nothing"))
    monkeypatch.setattr(Text, "prepare_data", refuse)
    monkeypatch.setattr(Text, "setup", refuse)
    yield
    assert not (tmp_path / "nothing").exists()
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def told(run, capsys):
    """Call train.py with a prompt; returns what it prints."""

    def call(*words: str) -> str:
        capsys.readouterr()
        assert main([str(run / "config.yaml"), f"--ckpt={run / 'best.ckpt'}", *words]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        return said.out

    return call


@pytest.fixture
def refused(run, capsys):
    """Call train.py with a mistake; returns the one line it says."""

    def call(*words: str) -> str:
        capsys.readouterr()
        assert main([str(run / "config.yaml"), *words]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        return err

    return call


def test_continues_the_prompt_as_the_model_does(told, run):
    out = told("--predict", "--prompt", "the qui", "--length", "60", "--temperature", "0")
    checkpoint = torch.load(run / "best.ckpt", weights_only=True)
    model = RecurrentLM(128, LSTM(8, 32))
    model.load_state_dict(checkpoint["state_dict"])
    assert checkpoint["Text"]["vocabulary"] == sorted(set(TEXT))
    text = model.write("the qui", Vocabulary(sorted(set(TEXT)), pad=False), 60, temperature=0)
    assert out == f"the qui{text}\n"
    assert len(text) == 60
    assert "the " in text, "for this test the net must have learned something"


def test_the_same_seed_writes_the_same(told):
    a, b = (told("--prompt=fox", "--seed_everything", "3") for _ in range(2))
    c = told("--prompt=fox", "--seed_everything", "4")
    d = told("--prompt=fox")
    assert a == b
    assert len({a, c, d}) == 3
    assert len(a) == 3 + 500 + 1
    assert told("--prompt=fox") == d, "the run's own seed"


def test_temperature_and_top_k_reach_the_model(told):
    greedy = told("--prompt=fox", "--temperature=0")
    assert told("--prompt=fox", "--top_k=1") == greedy
    assert told("--prompt=fox", "--top_k=2") != greedy
    assert told("--prompt=fox", "--temperature=0.5") != told("--prompt=fox", "--temperature=1.5")


def test_a_prompt_may_look_like_anything(told):
    assert told("--prompt", "a\nb", "--length=1").startswith("a\nb")
    assert told("--prompt=" + TEXT * 3, "--length=1").startswith(TEXT * 3)


def test_the_readmes_command_has_options_that_there_are(told):
    (line,) = (line for line in (REPOSITORY / "README.md").read_text().splitlines() if "--prompt TEXT" in line)
    options = re.findall(r"\[(--\w+) (\w+)\]", line)
    assert len(options) == 3
    words = [word.replace("500", "5").replace("K", "2") for option in options for word in option]
    assert len(told("--prompt=fox", *words)) == 3 + 5 + 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prompt", "Was für ein Fuchs?\x07"], r"does not know 'W', '\xfc', 'F', '?', '\x07'"),
        (["--prompt", ""], "--prompt is empty: give it one character at least"),
        (["--prompt"], "--prompt needs a value"),
        (["--prompt", "fox", "--length", "many"], "--length: a whole number from 1, got 'many'"),
        (["--prompt", "fox", "--length", "0"], "--length: a whole number from 1, got '0'"),
        (["--prompt", "fox", "--temperature", "-1"], "--temperature: a number from 0, got '-1'"),
        (["--prompt", "fox", "--temperature", "nan"], "--temperature: a number from 0, got 'nan'"),
        (["--prompt", "fox", "--temperature", "inf"], "--temperature: a number from 0, got 'inf'"),
        (["--prompt", "fox", "--top_k", "1.5"], "--top_k: a whole number from 1, got '1.5'"),
        (["--length", "5"], "--length is about a text to continue: it goes with --prompt TEXT"),
        (["--prompt", "a", "--prompt", "b"], "--prompt is given twice"),
        (["--predict", "README.md"], "continues a text: give it --prompt TEXT in place of files"),
    ],
)
def test_a_mistake_is_one_line(refused, run, words, line):
    assert line in refused(f"--ckpt={run / 'best.ckpt'}", *words)


def test_a_prompt_needs_a_checkpoint_and_nothing_else(refused, run):
    assert "--prompt needs a trained model: give it --ckpt" in refused("--prompt", "fox")
    assert "--prompt needs a trained model" in refused("--prompt", "fox", "--resume", str(run))
    both = ("--prompt", "fox", "--ckpt", str(run / "best.ckpt"), "--predict=README.md")
    assert "and nothing else to do" in refused(*both)


def test_other_models_take_no_prompt(run, capsys):
    words = ["experiments/mnist_mlp.yaml", "--prompt=fox", f"--ckpt={run / 'best.ckpt'}"]
    assert main(words) == 2
    assert "a text for a language model to continue, and mnist_mlp (MLP on MNIST) is none" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_one_line(refused, run):
    line = refused(f"--ckpt={run / 'best.ckpt'}", "--prompt=fox", "--model.network.init_args.hidden=16")
    assert "does not fit lit_models.language_model.RecurrentLM as configured" in line


def test_what_is_asked_for_is_read_without_torch():
    ckpt = "--ckpt=nowhere.ckpt"
    with pytest.raises(arguments.InputError, match=r"nowhere.ckpt"):
        arguments.parse(["experiments/mnist_mlp.yaml", ckpt, "--prompt=x"])
    assert Prompt("x") == Prompt("x", 500, 1.0, None)
