"""Surnames: read, parted, padded and put into buckets; and told by a checkpoint, line by line."""

import csv
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from test_train import assert_same_run, receipt

import datamodules.names
from datamodules.names import Buckets, Names, Sequences
from datamodules.vocabulary import lengths, pad
from lit_models.lstm import LSTM
from lit_models.sequences import SequenceClassifier
from runner.errors import InputError
from train import main

EXPERIMENT = str(REPOSITORY / "experiments" / "names_lstm.yaml")
SMALL = ("--model.num_classes=3", "--model.network.init_args.hidden=16", "--data.batch_size=16", "--data.bucket=2")
ENDINGS = {"Dutch": "sen", "English": "ton", "Polish": "ski"}


def write(folder: Path, **names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for language, lines in names.items():
        (folder / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_languages(folder: Path, count: int = 40) -> Path:
    """Three languages, each with an ending of its own, and names of different lengths."""
    stems = [f"{'bcdfghklmp'[i % 10].upper()}{'aeiou'[i // 10]}{'rn' * (i % 4)}" for i in range(count)]
    return write(folder, **{language: [stem + end for stem in stems] for language, end in ENDINGS.items()})


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    return write_languages(tmp_path / "names")


def loaded(**arguments) -> Names:
    data = Names(**arguments)
    data.prepare_data()
    data.setup()
    return data


def in_part(data: Names, dataset: Sequences) -> list[tuple[str, str]]:
    """The names in a part, each with its language."""
    tokens, labels = dataset.tensors
    texts = [data.vocabulary.decode(row) for row in tokens]
    return [(text, data.classes[label]) for text, label in zip(texts, labels.tolist(), strict=True)]


# -- parts ---------------------------------------------------------------------------------------------------------------


def test_a_tenth_of_each_language_validates_and_a_tenth_tests(folder):
    data = loaded()
    assert data.classes == ("Dutch", "English", "Polish")
    parts = {name: in_part(data, dataset) for name, dataset in
             (("train", data.train_set), ("val", data.val_set), ("test", data.test_set))}  # fmt: skip
    for name, count in (("train", 32), ("val", 4), ("test", 4)):
        assert [sum(language == c for _, language in parts[name]) for c in data.classes] == [count] * 3
    all_names = [pair for part in parts.values() for pair in part]
    assert len(set(all_names)) == len(all_names) == 120
    assert all(text.endswith(ENDINGS[language]) for text, language in all_names)
    assert len({language for _, language in parts["test"][:6]}) > 1, "the languages are mixed"


def test_the_same_names_are_tested_whatever_the_seed(folder, monkeypatch):
    first = loaded()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    torch.manual_seed(7)
    second = loaded()
    assert in_part(first, first.test_set) == in_part(second, second.test_set)
    assert first.fingerprint == second.fingerprint
    second.setup()
    assert second.sizes == {"train": 96, "val": 12, "test": 12}


def test_a_name_counts_once_in_its_language_and_in_each_that_has_it(tmp_path):
    folder = write(
        tmp_path / "own", Arabic=["Ali", "Ali ", "Áli", "", "Noor", "Omar", "Ali"], Dutch=["Ali", "Jan", "Piet"]
    )
    data = loaded(folder=str(folder))
    pairs = [p for d in (data.train_set, data.val_set, data.test_set) for p in in_part(data, d)]
    assert sorted(pairs) == [("Ali", "Arabic"), ("Ali", "Dutch"), ("Jan", "Dutch"), ("Noor", "Arabic"), ("Omar", "Arabic"),
                             ("Piet", "Dutch")]  # fmt: skip
    assert len(data.val_set) == len(data.test_set) == 2, "one of each language"


@pytest.mark.parametrize(
    ("line", "folded", "kept"),
    [
        ("Ślusàrski", "Slusarski", "Ślusàrski"),
        ("S\u0301lusa\u0300rski", "Slusarski", "Ślusàrski"),
        ("  O'Néàl\t", "O'Neal", "O'Néàl"),
        ("Ter\u00a0 Avest", "Ter Avest", "Ter Avest"),
    ],
)
def test_marks_are_taken_off_letters_or_kept(line, folded, kept):
    assert Names().clean(line) == folded
    assert Names(fold=False).clean(line) == kept


def test_what_is_none_of_the_symbols_is_unknown(tmp_path):
    data = Names()
    tokens = data.read_line("Strauß李")
    assert (tokens == data.vocabulary.unknown).tolist() == [False] * 5 + [True] * 2
    folder = write(tmp_path / "own", A=["Strauß", "Bär", "Ute"], B=["Xu", "Yi", "Zou"])
    data = loaded(folder=str(folder), fold=False)
    trained = "".join(text for text, _ in in_part(data, data.train_set))
    assert data.vocabulary.symbols == sorted(set(trained)), "of what is trained alone"
    assert data.read_line("q").tolist() == [data.vocabulary.unknown]
    with pytest.raises(InputError, match="an empty line is no name"):
        data.read_line(" \t")


# -- padding and buckets -------------------------------------------------------------------------------------------------


def test_a_batch_is_as_wide_as_its_longest_name():
    dataset = Sequences(pad([[1], [1, 2, 3], [1, 2], [1, 2, 3, 4, 5]]), torch.arange(4))
    tokens, labels = dataset.__getitems__([2, 0])
    assert tokens.tolist() == [[1, 2], [1, 0]]
    assert labels.tolist() == [2, 0]
    assert dataset.__getitems__([0])[0].tolist() == [[1]]
    assert dataset.__getitems__([0, 3])[0].shape == (2, 5)
    assert dataset.lengths.tolist() == [1, 3, 2, 5]


@pytest.mark.parametrize(("n", "batch_size", "batches"), [(103, 8, 3), (103, 8, 1), (5, 8, 3), (1, 1, 50), (24, 8, 3)])
def test_buckets_have_every_sample_once_an_epoch(n, batch_size, batches):
    buckets = Buckets(torch.randint(1, 20, (n,)), batch_size, batches)
    found = list(buckets)
    assert len(found) == len(buckets)
    assert sorted(i for batch in found for i in batch) == list(range(n))
    assert sorted(map(len, found))[1:] == [batch_size] * (len(found) - 1)


def test_buckets_hold_names_of_about_the_same_length_in_an_order_that_is_not_by_length():
    torch.manual_seed(0)
    n = torch.randint(1, 20, (800,))
    spread = {batches: sum(int(n[b].max() - n[b].min()) for b in Buckets(n, 8, batches)) / 100 for batches in (1, 100)}
    assert spread[100] < 0.5 < 10 < spread[1]
    means = torch.stack([n[batch].float().mean() for batch in Buckets(n, 8, 100)])
    assert means[:50].mean() == pytest.approx(float(means[50:].mean()), abs=4)
    assert not torch.equal(means, means.sort().values)


def test_an_epochs_order_comes_from_seed_and_epoch(monkeypatch):
    n = torch.arange(50) % 7

    def order(seed: int, epoch: int) -> list[list[int]]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.manual_seed(len(os.environ))  # of no concern
        buckets = Buckets(n, 8, 3 if n.max() < 8 else 10)
        buckets.sampler.set_epoch(epoch)
        return list(buckets)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert {tuple(sorted(b)) for b in order(1, 0)} != {tuple(sorted(b)) for b in order(1, 1)}, "other batches, too"

    n = torch.arange(48)  # all in one bucket, and no two of the same length: only the order of the batches is left
    assert sorted(order(1, 0)) == sorted(order(1, 1))
    assert order(1, 0) != order(1, 1)


def test_the_loaders_batches(folder):
    data = loaded(batch_size=16)
    for tokens, labels in data.train_dataloader():
        assert tokens.shape == (16, int(lengths(tokens).max()))
        assert tokens.dtype == labels.dtype == torch.int64
    (tokens, labels), *rest = data.test_dataloader()
    assert len(tokens) == 12
    assert not rest
    assert torch.equal(labels, data.test_set.tensors[1])


# -- files ---------------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))

    def refused(folder: str = "names", **arguments) -> str:
        with pytest.raises(InputError) as error:
            loaded(folder=folder, **arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    write_languages(tmp_path / "names")
    assert "no folder" in refused("nmaes")
    assert "did you mean 'names'?" in refused("nmaes")
    (tmp_path / "names" / "Polish.txt").write_bytes("Nowak\nW\u00f3jcik\n".encode("latin-1"))
    assert f"{tmp_path / 'names' / 'Polish.txt'}:2: not text in UTF-8" in refused()
    (tmp_path / "names" / "Polish.txt").write_text("\n \n")
    assert "Polish.txt has 0 name(s): there must be 3" in refused()
    (tmp_path / "names" / "Polish.txt").write_text("Nowak\nKowalski\nNowak\n")
    assert "Polish.txt has 2 name(s): there must be 3" in refused()
    (tmp_path / "names" / "Polish.txt").write_text("\ufeffNowak\r\nKowalski\r\nLis\r\n", encoding="utf-8")
    assert loaded().sizes["train"] == 32 + 32 + 1
    (tmp_path / "one").mkdir()
    assert "has 0 file(s) <language>.txt: there must be two languages" in refused("one")
    write(tmp_path / "one", Dutch=["a", "b", "c"])
    assert "has 1 file(s)" in refused("one")
    assert "bucket: one batch at least" in refused(bucket=0)
    assert "url must start with https://" in refused(url="ftp://x")


def test_download_unpacks_the_folder_with_the_texts(tmp_path, monkeypatch):
    archive = tmp_path / "data.zip"
    source = write_languages(tmp_path / "source")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data/eng-fra.txt", "Go.\tVa !\n")
        for text in source.iterdir():
            file.write(text, f"data/names/{text.name}")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))

    def fetch(url, root, filename):
        Path(root, filename).write_bytes(archive.read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    assert loaded(url="https://host/data.zip").sizes["train"] == 96
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["names"]
    monkeypatch.setattr("torchvision.datasets.utils.download_url", None)
    assert loaded(url="https://host/data.zip").sizes["train"] == 96, "it is there: nothing is downloaded"


@pytest.mark.parametrize("content", [None, b"<html>", b"PK\x03\x04 cut short"])
def test_without_a_network_or_a_whole_archive_it_is_one_line(tmp_path, monkeypatch, content):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))

    def fetch(url, root, filename):
        if content is None:
            raise OSError("no network")
        Path(root, filename).write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    with pytest.raises(InputError, match=r"could not be had .*: put <language>.txt files into") as error:
        loaded(url="https://host/data.zip")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "data").glob("*")), "nothing is left behind"


# -- runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run on the three languages, that has learnt their endings."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("names_run")
        write_languages(root / "data" / "names")
        patch.setenv("DATA_DIR", str(root / "data"))
        patch.setenv("RUNS_DIR", str(root / "runs"))
        patch.setenv("WANDB_MODE", "disabled")
        schedule = ("--model.lr_scheduler.init_args.total_steps=120", "--model.lr_scheduler.init_args.max_lr=0.02")
        assert main([EXPERIMENT, *SMALL, *schedule, "--trainer.max_epochs=20"]) == 0
        (run,) = (root / "runs").glob("names_lstm/2*")
        return run


def test_it_learns_and_tells_the_accuracy_of_each_language(run):
    metrics = receipt(run)["metrics"]
    assert metrics["test/acc"] > 0.9
    assert {name for name in metrics if name.startswith("test_acc/")} == {f"test_acc/{c}" for c in ENDINGS}
    assert receipt(run)["tested"] == 12


@pytest.mark.pictures
def test_it_draws_names_with_their_languages(folder, train):
    run = train(*SMALL, "--trainer.max_epochs=1", experiment=EXPERIMENT, tiny=())
    for name in ("predictions", "confusion_matrix", "classes"):
        assert (run / "pictures" / f"{name}.png").stat().st_size > 5_000


def test_a_stopped_and_resumed_run_ends_in_the_same_bits(folder, train, monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    def crash(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (2, 1):
            raise Stop
        return step(self, batch, batch_idx)

    options = (*SMALL, "--trainer.max_epochs=3")
    whole = train(*options, experiment=EXPERIMENT, tiny=())
    whole = whole.rename(tmp_path / "whole")
    step = SequenceClassifier.training_step
    with monkeypatch.context() as patch:
        patch.setattr(SequenceClassifier, "training_step", crash)
        with pytest.raises(Stop):
            main([EXPERIMENT, *options])
    (stopped,) = (tmp_path / "runs").glob("names_lstm/2*")
    assert_same_run(whole, train("--resume", str(stopped), experiment=""))


def test_other_numbers_of_languages_or_symbols_are_one_line(folder, capsys):
    for option, line in (
        ("--model.num_classes=18", "--model.num_classes 3"),
        ("--data.fold=false", "--model.vocabulary "),
    ):
        assert main([EXPERIMENT, *SMALL, option]) == 2
        err = capsys.readouterr().err
        assert line in err
        assert err.count("\n") == 1


# -- lines of one's own --------------------------------------------------------------------------------------------------


@pytest.fixture
def tell(run, tmp_path, monkeypatch, capsys):
    """Predict with the run's best checkpoint, where there is no data: exit code, the table's rows, what is printed."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "nothing"))

    def refuse(*_, **__):
        raise OSError("what has no part in a prediction")

    monkeypatch.setattr(Names, "prepare_data", refuse)
    monkeypatch.setattr(Names, "setup", refuse)

    def call(content: bytes, *options: str):
        file = Path("lines.txt")
        file.write_bytes(content)
        code = main([str(run / "config.yaml"), "--ckpt", str(run / "best.ckpt"), "--predict", str(file), *options])
        said = capsys.readouterr()
        rows = []
        if Path("predictions.csv").exists():
            with open("predictions.csv", newline="") as table:
                rows = list(csv.DictReader(table))
        return code, rows, said.out.splitlines(), said.err

    return call


LINES = ["Bortonski", "Xylosen", "Ü-ton李", "Kaski", "Piton"]


def test_the_table_says_what_the_model_says_of_each_line(tell, run):
    code, rows, out, err = tell("\n".join(["", *LINES, "  "]).encode(), "--data.eval_batch_size=2")
    assert (code, err) == (0, "")
    assert list(rows[0]) == ["file", "line", "text", "class", "probability", *(f"p_{c}" for c in ENDINGS), "error"]
    assert [(row["file"], row["line"], row["text"]) for row in rows] == [
        ("lines.txt", str(i), line) for i, line in enumerate(LINES, start=2)
    ]
    model = SequenceClassifier(3, 59, LSTM(64, 16), pool="mean").eval()
    model.load_state_dict(torch.load(run / "best.ckpt", weights_only=True)["state_dict"])
    with torch.no_grad():
        right = torch.cat([model(Names().read_line(line)[None]) for line in LINES]).softmax(dim=1)
    each = torch.tensor([[float(row[f"p_{c}"]) for c in ENDINGS] for row in rows])
    torch.testing.assert_close(each, right, rtol=0, atol=1e-5)
    assert [row["class"] for row in rows] == [list(ENDINGS)[k] for k in right.argmax(dim=1)]
    assert len({row["class"] for row in rows}) > 1, "for this test it must have learnt something"
    assert [float(row["probability"]) for row in rows] == each.max(dim=1).values.tolist()
    assert out[-1] == f"all of it: {Path('predictions.csv').absolute()}"
    for line, row in zip(out, rows, strict=False):
        assert line.split() == [row["text"], row["class"], f"{float(row['probability']):.4f}"]


def test_windows_ends_and_one_line(tell):
    assert [row["text"] for row in tell(b"\xef\xbb\xbfAda\r\n\r\nBob\r\n")[1]] == ["Ada", "Bob"]
    assert [row["text"] for row in tell(b"A")[1]] == ["A"]


def test_a_line_that_cannot_be_read_is_told_and_the_others_are_not_lost(tell, monkeypatch):
    def read_line(self, line):
        if line == "Bob":
            raise InputError("Bob is no surname")
        return original(self, line)

    original = Names.read_line
    monkeypatch.setattr(datamodules.names.Names, "read_line", read_line)
    code, rows, _, err = tell(b"Ada\nBob\nEve\n")
    assert code == 0
    assert err == "warning: lines.txt:2: Bob is no surname\n"
    assert [(row["text"], bool(row["class"]), row["error"]) for row in rows] == [
        ("Ada", True, ""), ("Bob", False, "Bob is no surname"), ("Eve", True, "")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "lines.txt has no lines"),
        (b" \n\n", "lines.txt has no lines"),
        (b"Ada\nBj\xf6rn\n", "lines.txt:2: not text in UTF-8"),
    ],
)
def test_a_file_without_lines_is_one_line(tell, content, line):
    code, rows, _, err = tell(content)
    assert code == 2
    assert line in err
    assert err.count("\n") == 1
    assert not rows


def test_symbols_of_ones_own_come_from_the_checkpoint(folder, train, tmp_path, monkeypatch, capsys):
    (folder / "Polish.txt").write_text("\n".join(f"{c}łŻó" for c in "abcdefghijklmnopqrstuvwxyz"), encoding="utf-8")
    data = loaded(fold=False)
    size = f"--model.vocabulary={len(data.vocabulary)}"
    run = train(*SMALL, "--data.fold=false", size, "--trainer.max_epochs=1", experiment=EXPERIMENT, tiny=())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "nothing"))
    Path("lines.txt").write_text("ałŻó\n", encoding="utf-8")
    config = str(run / "config.yaml")
    assert main([config, "--ckpt", str(run / "best.ckpt"), "--predict", "lines.txt"]) == 0
    assert "ałŻó" in Path("predictions.csv").read_text(encoding="utf-8")
    other = Names(fold=False)
    other.load_state_dict(data.state_dict())
    assert other.read_line("ałŻó").tolist() == data.read_line("ałŻó").tolist()
    with pytest.raises(InputError, match="names of other characters"):
        Names().load_state_dict(data.state_dict())


@pytest.mark.parametrize(("fold", "told"), [(True, True), (False, False)])
def test_letters_that_folding_makes_all_alike_are_told(tmp_path, fold, told, recwarn):
    russian = [first + second + "ов" for first in ("Ива", "Пет", "Сид") for second in "абвгд"]
    folder = write(tmp_path / "own", English=["Smith", "Jones", "Brown", "Naïve"], Russian=russian)
    Names(folder=str(folder), fold=fold).setup()
    line = f"100% of the characters in {folder / 'Russian.txt'} are none of those that the network knows"
    assert [str(w.message).startswith(line) for w in recwarn] == [True] * told
    assert not told or "--data.fold false" in str(recwarn[0].message)
