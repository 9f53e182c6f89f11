"""A text as windows: each character predicted once, in streams that go on, and the same windows for the same seed."""

import hashlib
import http.client
import io
import itertools
import urllib.error

import pytest
import torch

from datamodules import text as text_module
from datamodules.text import InOrder, Text, Windows
from datamodules.vocabulary import IGNORE
from runner.errors import InputError

SENTENCE = "the quick brown fox jumps over the lazy dog\n"


def made(tmp_path, content: str | bytes = SENTENCE * 20, **settings) -> Text:
    """A data module of a file with this content, ready."""
    file = tmp_path / "own.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    data = Text(file=str(file), **{"context": 8, **settings})
    data.prepare_data()
    data.setup()
    return data


def whole(data: Text, name: str) -> str:
    """The text of a set."""
    return data.vocabulary.decode(getattr(data, f"{name}_set").text)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_the_first_nine_tenths_train_and_the_rest_validates_as_nanogpt_has_it(tmp_path):
    text = "".join(chr(97 + i % 23) for i in range(1007))
    data = made(tmp_path, text)
    assert whole(data, "train") == text[: int(0.9 * 1007)]
    assert whole(data, "val") == text[int(0.9 * 1007) :]
    assert data.test_set is data.val_set
    assert "the validation text is tested on: there is no other" in data.source


def test_with_a_share_to_test_there_are_three_parts(tmp_path):
    text = "".join(chr(97 + i % 23) for i in range(1000))
    data = made(tmp_path, text, val_share=0.2, test_share=0.1)
    assert (whole(data, "train"), whole(data, "val"), whole(data, "test")) == (text[:700], text[700:900], text[900:])
    assert "the last 10% to test" in data.source


def test_setup_can_be_called_twice(tmp_path):
    data = made(tmp_path)
    first = data.train_set
    data.setup()
    assert data.train_set is first


def test_any_alphabet_of_any_size(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 300))) * 3 + "🙂é" * 40
    data = made(tmp_path, text)
    assert len(data.vocabulary) == 302
    assert whole(data, "train") + whole(data, "val") == text


def test_a_byte_order_mark_and_windows_lines_are_no_characters(tmp_path):
    data = made(tmp_path, b"\xef\xbb\xbf" + b"a line\r\nand one\r\n" * 20)
    assert whole(data, "train").startswith("a line\nand one\n")
    assert not {"\ufeff", "\r"} & set(data.vocabulary.symbols)


# -- windows -----------------------------------------------------------------------------------------------------------


def test_targets_are_the_characters_behind_the_inputs(tmp_path):
    data = made(tmp_path, batch_size=5)
    for inputs, targets in itertools.chain(data.train_dataloader(), data.val_dataloader()):
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape
        for x, y in zip(inputs, targets, strict=True):
            text = data.vocabulary.decode(x) + data.vocabulary.decode(y[-1:])
            assert text[: 1 + int((y != IGNORE).sum())] in SENTENCE * 2
            assert torch.equal(x[1:][y[:-1] != IGNORE], y[:-1][y[:-1] != IGNORE])


@pytest.mark.parametrize("streams", [1, 2, 3, 5, 7, 64])
@pytest.mark.parametrize("length", [2, 7, 8, 9, 16, 17, 18, 41, 64, 65, 100])
def test_each_character_is_predicted_once_and_streams_go_on(length, streams):
    text = torch.arange(length)
    dataset = Windows(text, 8)
    streams = min(streams, len(dataset))
    starts = InOrder(len(dataset), streams, 8)
    assert len(starts) == len(dataset)
    told, last = [], {}
    for batch in batches_of(starts, streams):
        inputs, targets = dataset.__getitems__(batch)
        for s, (x, y) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
            known = [t for t in y if t != IGNORE]
            assert known == list(range(x[0] + 1, x[0] + 1 + len(known)))
            assert x[: len(known)] == [t - 1 for t in known]
            assert y[len(known) :] == [IGNORE] * (8 - len(known))
            assert x[0] == last.get(s, x[0]), "a stream goes on where it has ended"
            last[s] = known[-1]
            told += known
    assert sorted(told) == list(range(1, length))


def batches_of(values, n: int) -> list[list[int]]:
    values = list(values)
    return [values[i : i + n] for i in range(0, len(values), n)]


def test_streams_take_all_the_time_they_need_and_no_more():
    batches = batches_of(InOrder(10, 4, 8), 4)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert batches[0] == [0, 24, 48, 64]


def test_sizes_are_windows(tmp_path):
    data = made(tmp_path, "ab" * 500, context=8)
    assert data.sizes == {"train": 113, "val": 13, "test": 13}  # 899 and 99 characters to predict
    assert sum(len(x) for x, _ in data.test_dataloader()) == 13
    assert sum(int((y != IGNORE).sum()) for _, y in data.test_dataloader()) == 99


def test_random_windows_come_from_seed_and_epoch(tmp_path, monkeypatch):
    def windows(epoch: int, seed: str = "0") -> torch.Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        loader = made(tmp_path, batch_size=10, windows_per_epoch=30).train_dataloader()
        loader.sampler.set_epoch(epoch)
        batches = [inputs for inputs, _ in loader]
        assert [len(batch) for batch in batches] == [10] * 3
        return torch.cat(batches)

    assert torch.equal(windows(3), windows(3))
    assert not torch.equal(windows(3), windows(4))
    assert not torch.equal(windows(3), windows(3, seed="1"))


def test_random_windows_start_everywhere(tmp_path):
    data = made(tmp_path, "".join(map(chr, range(200, 240))), context=8, windows_per_epoch=3000)
    starts = {int(inputs[0]) for batch in data.train_dataloader() for inputs in batch[0]}
    assert starts == set(range(36 - 8))  # of 36 characters to train on


@pytest.mark.parametrize("batch_size", [1, 3])
def test_training_streams_go_on_from_batch_to_batch(tmp_path, batch_size):
    text = "".join(map(chr, range(200, 600)))
    data = made(tmp_path, text, order="streams", batch_size=batch_size)
    assert data.streams == ("train", "val", "test")
    firsts = set()
    for epoch in range(20):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        batches = [inputs for inputs, _ in loader]
        assert {len(batch) for batch in batches} == {batch_size}
        assert sum(map(len, batches)) == data.sizes["train"]
        for before, after in itertools.pairwise(batches):
            assert torch.equal(after[:, 0], before[:, -1] + 1)
        firsts.add(int(batches[0][0, 0]))
        seen = torch.cat(batches).flatten()
        assert len(seen.unique()) == len(seen) >= 360 - 8 * batch_size - 8
    assert firsts <= set(range(8))
    assert len(firsts) > 4


# -- where texts are from ----------------------------------------------------------------------------------------------


def test_pythons_own_text_needs_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "nothing"))
    data = Text(source="python")
    data.prepare_data()
    data.setup()
    assert not (tmp_path / "nothing").exists()
    assert 300_000 < len(data.text) < 1_000_000
    assert 90 < len(data.vocabulary) < 128
    assert 'The "if" statement' in data.text
    assert "Python 3." in data.source


def test_shakespeare_from_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(SENTENCE * 30)
    monkeypatch.setattr(text_module, "urlopen", lambda *_: pytest.fail("it is there"))
    data = Text()
    data.prepare_data()
    data.setup()
    assert data.text == SENTENCE * 30


def test_shakespeare_is_downloaded_where_it_is_not(tmp_path, monkeypatch):
    file = tmp_path / "web.txt"
    file.write_text(SENTENCE * 30)
    asked = []
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(text_module, "urlopen", lambda url: asked.append(url) or file.open("rb"))
    monkeypatch.setattr(text_module, "SHAKESPEARE_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    data = Text()
    data.prepare_data()
    data.setup()
    assert data.text == SENTENCE * 30
    assert asked == ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"]
    assert (tmp_path / "data" / "tinyshakespeare" / "input.txt").read_text() == SENTENCE * 30


class Broken(io.BytesIO):
    """An answer that breaks off."""

    def read(self):
        raise http.client.IncompleteRead(b"First Cit", 1_000_000)


def unreachable(url):
    raise urllib.error.URLError("no route to host")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (unreachable, "no route to host"),
        (lambda url: Broken(), r"IncompleteRead\(9 bytes read"),
        (lambda url: io.BytesIO(b"<html>log in first"), "sent 18 bytes of something else"),
    ],
    ids=["unreachable", "broken off", "another page"],
)
def test_no_download_is_one_line_that_tells_of_other_texts(tmp_path, monkeypatch, answer, reason):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(text_module, "urlopen", answer)
    data = Text()
    data.prepare_data()
    with pytest.raises(InputError, match=rf"{reason}.*--data.source python, or --data.file FILE") as error:
        data.setup()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


# -- what a checkpoint keeps -------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_text_and_where_it_is_cut(tmp_path):
    fingerprint = made(tmp_path).fingerprint
    assert made(tmp_path).fingerprint == fingerprint
    assert made(tmp_path, batch_size=3, order="streams").fingerprint == fingerprint
    upper = made(tmp_path, SENTENCE.upper() * 20)  # the same numbers, other characters
    assert torch.equal(upper.train_set.text, made(tmp_path).train_set.text)
    assert upper.fingerprint != fingerprint
    assert made(tmp_path, test_share=0.1).fingerprint != fingerprint
    assert len(fingerprint) == len(hashlib.sha256().hexdigest())


def test_another_text_is_read_with_a_checkpoints_vocabulary(tmp_path):
    state = made(tmp_path).state_dict()
    other = made(tmp_path, "over the dog\n" * 50)
    inputs, _ = next(iter(other.val_dataloader()))
    other.load_state_dict(state)
    assert other.vocabulary.symbols == state["vocabulary"] == sorted(set(SENTENCE))
    same, _ = next(iter(other.val_dataloader()))
    assert not torch.equal(inputs, same)
    assert other.vocabulary.decode(same[0]) in "over the dog\n" * 3


def test_another_text_with_other_characters_is_one_line(tmp_path):
    state = made(tmp_path).state_dict()
    with pytest.raises(InputError, match=r"does not know: 'O', 'é'; it was trained on a text without them"):
        made(tmp_path, "Over the dégo\n" * 50).load_state_dict(state)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "settings", "line"),
    [
        (b"caf\xe9 au lait" * 50, {}, "own.txt is not text in UTF-8 (byte 3 of it cannot be read)"),
        (b"", {}, "own.txt has 0 characters, 0 of them to train: too few for 1 window(s) of 8"),
        ("a", {}, "1 characters, 0 of them"),
        ("abcdefghi", {}, "9 characters, 8 of them to train: too few for 1 window(s) of 8"),
        ("abcdefghij", {"context": 8}, "val_share 0.1 and test_share 0.0 of them leave too few to predict one"),
        ("ab" * 100, {"order": "streams", "batch_size": 30}, "too few for 30 window(s) of 8"),
        ("ab" * 10, {"context": 4, "val_share": 0.2, "test_share": 0.05}, "leave too few to predict one"),
        ("ab", {"context": 0}, "context: a window has at least 1 character, got 0"),
        ("ab", {"val_share": 0.0}, "val_share 0.0"),
        ("ab", {"val_share": 0.6, "test_share": 0.4}, "the rest of which is to train on"),
        ("ab", {"test_share": -0.1}, "test_share -0.1"),
        ("ab", {"windows_per_epoch": 0}, "windows_per_epoch: at least 1"),
        ("ab", {"windows_per_epoch": 5, "order": "streams"}, "of order random"),
        ("ab", {"batch_size": 0}, "batch sizes start at 1"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, content, settings, line):
    with pytest.raises(InputError) as error:
        made(tmp_path, content, **settings)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    data = Text(file=str(tmp_path / "mime.txt"))
    data.prepare_data()
    with pytest.raises(InputError, match=r"mime.txt does not exist; did you mean 'mine.txt'\?"):
        data.setup()


def test_the_least_text_that_works(tmp_path):
    data = made(tmp_path, "abcdefghijklmnopqrst", context=17)  # 18 to train on, 2 to validate
    assert data.sizes == {"train": 1, "val": 1, "test": 1}
    ((inputs, _),) = data.train_dataloader()
    assert inputs.tolist() == [list(range(17))]
    data = made(tmp_path, "abcdefghijklmnopqrst", context=3, order="streams", batch_size=5)
    (batch,) = data.train_dataloader()
    assert batch[0].shape == (5, 3)
