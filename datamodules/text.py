"""A text, character by character, for language models: what comes next?

Shapes: B batch, T characters of a window; inputs (B, T) and targets (B, T), int64: the target is the character behind the
input, or IGNORE behind the end of the text.

Sources: Karpathy 2015 (tiny Shakespeare, 1.1 MB of plays); his nanoGPT, whose split this is.
"""

import hashlib
import platform
import sys
from collections.abc import Iterator
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from callbacks.seeding import epoch_seed
from datamodules.files import data_dir, download
from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from datamodules.vocabulary import IGNORE, Vocabulary
from runner.errors import InputError, existing_file
from runner.files import write_whole

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


class Text(InMemoryDataModule):
    """Consecutive parts of one text: the first 90 % to train, the last 10 % to validate, as nanoGPT has it.

    Without a `test_share` the test text is the validation text, so that the number is the one that others report; the best
    checkpoint was then chosen by the very text that it is tested on, and the receipt says so.

    Windows to validate and test on cover the text: each character is predicted once, but for the first of all. They come as
    parallel streams: the text is cut into `eval_batch_size` pieces, and batch j has the j-th window of each, so that a
    recurrent model may go on where the batch before has ended. The last window is cut short: behind it stand IGNOREs.

    The vocabulary is all characters of the whole text, sorted, so none is unknown in validation; that a few of them were
    not there to train on costs some loss, as it should. A checkpoint keeps it: another text is read with it, which must
    then have no other characters.

    Args:
        file: any text in UTF-8; None: `source`.
        source: `shakespeare`, which is looked for in `DATA_DIR/tinyshakespeare/input.txt` and else downloaded there; or
            `python`, the language's documentation as Python itself brings it along (half a megabyte, differs a little
            from version to version; no network needed).
        context: T.
        order: of training windows. `random`: at random places, drawn from (seed, epoch); `streams`: the text is read in
            `batch_size` parallel streams, each from window to window, for models that carry a state. An epoch is then
            the text once, and begins at a random one of its first T characters.
        windows_per_epoch: of order `random`; None: as many as cover the text once.
        val_share, test_share: of the text.
        batch_size: windows in a training batch.
        eval_batch_size: windows in a batch of validation and test.

    Attributes:
        vocabulary: the characters, once the text is read.
        streams: the stages, of `train`, `val` and `test`, whose batches each go on where the one before has ended.
    """

    vocabulary: Vocabulary

    def __init__(
        self,
        file: str | None = None,
        source: Literal["shakespeare", "python"] = "shakespeare",
        context: int = 64,
        order: Literal["random", "streams"] = "random",
        windows_per_epoch: int | None = None,
        val_share: float = 0.1,
        test_share: float = 0.0,
        batch_size: int = 12,
        eval_batch_size: int = 64,
    ):
        super().__init__(batch_size, eval_batch_size)
        if context < 1:
            raise InputError(f"context: a window has at least 1 character, got {context}")
        if not 0 < val_share < 1 or not 0 <= test_share < 1 or val_share + test_share >= 1:
            raise InputError(
                f"val_share {val_share} and test_share {test_share}: of the text, the rest of which is to train on"
            )
        if windows_per_epoch is not None and (windows_per_epoch < 1 or order == "streams"):
            raise InputError(f"windows_per_epoch: at least 1, and of order random; got {windows_per_epoch}")
        self.file, self.which = file, source
        self.context, self.order, self.windows_per_epoch = context, order, windows_per_epoch
        self.shares = (val_share, test_share)
        self.streams = ("val", "test") if order == "random" else ("train", "val", "test")
        self.download_error = ""

    @property
    def path(self) -> Path | None:
        """The file that is read; None for what Python brings along."""
        if self.file:
            return Path(self.file)
        return data_dir() / "tinyshakespeare" / "input.txt" if self.which == "shakespeare" else None

    def prepare_data(self) -> None:
        """Download what is missing; leave it to `setup` to say what could not be had."""
        if self.file or self.path is None or self.path.exists() or self.download_error:
            return
        self.download_error = download("tiny Shakespeare", self.path.parent, lambda: _fetch(self.path))

    def setup(self, stage: str | None = None) -> None:
        """Read the text into memory, and cut it.

        Raises:
            InputError: it is not there, not UTF-8, or too short.
        """
        if self.train_set is not None:
            return
        self.text, where = self._read()
        val, test = self.shares
        n = len(self.text)
        self.cuts = [0, int(n * (1 - val - test)), int(n * (1 - test)), n]
        train, evaluated, tested = (end - start for start, end in pairwise(self.cuts))
        windows = self.batch_size if self.order == "streams" else 1
        if train < windows * self.context + (self.context if self.order == "streams" else 1):
            raise InputError(
                f"{where} has {n:,} characters, {train:,} of them to train: too few for {windows} window(s) of "
                f"{self.context} and what follows; take a smaller context or batch_size, or more text"
            )
        if evaluated < 2 or tested == 1:
            raise InputError(
                f"{where} has {n:,} characters: val_share {val} and test_share {test} of them leave too few to predict one"
            )
        self.vocabulary = Vocabulary(sorted(set(self.text)), pad=False)
        test_text = f"the last {test:.0%} to test" if test else "the validation text is tested on: there is no other"
        self.source = (
            f"windows of {self.context} characters; {n:,} characters, {len(self.vocabulary)} different ones, of {where}; "
            f"{test_text}"
        )
        self.fingerprint = hashlib.sha256(f"{self.cuts}\n{self.text}".encode()).hexdigest()
        self._encode()

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints say of the data: with the vocabulary a model can continue a text without this one."""
        return super().state_dict() | {"vocabulary": self.vocabulary.symbols}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read the text with a checkpoint's vocabulary.

        Raises:
            InputError: the text has other characters.
        """
        if state["vocabulary"] != self.vocabulary.symbols:
            self.vocabulary = Vocabulary(state["vocabulary"], pad=False)
            self._encode()

    def train_dataloader(self) -> DataLoader:
        """Batches of windows at random places, or in parallel streams."""
        n, T = len(self.train_set.text), self.context
        if self.order == "random":
            sampler = RandomStarts(len(self.train_set), n - T)
        else:
            sampler = StreamStarts(self.batch_size, len(self.train_set) // self.batch_size, T)
        return self._loader(self.train_set, self.batch_size, sampler)

    def val_dataloader(self) -> DataLoader:
        """Windows in order, in parallel streams."""
        return self._in_order(self.val_set)

    def test_dataloader(self) -> DataLoader:
        """Windows in order, in parallel streams."""
        return self._in_order(self.test_set)

    def _in_order(self, dataset: "Windows") -> DataLoader:
        streams = min(self.eval_batch_size, len(dataset))
        return self._loader(dataset, streams, InOrder(len(dataset), streams, self.context))

    def _read(self) -> tuple[str, str]:
        """Return the text, and where it is from."""
        path = self.path
        if path is None:
            from pydoc_data.topics import topics  # what help("if") prints

            return "\n".join(
                topics[name] for name in sorted(topics)
            ), f"Python {platform.python_version()}'s help topics"
        if not self.file and not path.exists():
            raise InputError(
                f"{path} is not there ({self.download_error or 'no download was tried'}): put {SHAKESPEARE} there, set "
                "DATA_DIR, or take another text: --data.source python, or --data.file FILE"
            )
        try:
            return existing_file(path, "file", ".txt").read_text(encoding="utf-8-sig"), str(path)
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not text in UTF-8 (byte {error.start:,} of it cannot be read)") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None

    def _encode(self) -> None:
        """Turn the text into numbers, by a table of all characters that there are, and make the sets."""
        symbols = self.vocabulary.symbols
        table = np.full(sys.maxunicode + 1, -1, dtype=np.int16 if len(symbols) < 2**15 else np.int32)
        table[list(map(ord, symbols))] = np.arange(len(symbols))
        numbers = table[np.frombuffer(self.text.encode("utf-32-le"), dtype="<u4")]  # (N,)
        if (numbers < 0).any():
            others = sorted(set(self.text) - set(symbols))
            raise InputError(
                f"the text has characters that the checkpoint's model does not know: {', '.join(map(repr, others[:10]))}"
                f"{' ...' if others[10:] else ''}; it was trained on a text without them"
            )
        tokens = torch.from_numpy(numbers)
        T, (_, train, val, _) = self.context, self.cuts
        windows = self.windows_per_epoch or -(-(train - 1) // T)
        if self.order == "streams":
            windows = (train - T) // (T * self.batch_size) * self.batch_size
        self.val_set = Windows(tokens[train:val], T)
        self.test_set = Windows(tokens[val:], T) if self.shares[1] else self.val_set
        self.train_set = Windows(tokens[:train], T, windows)


class Windows(InMemoryDataset):
    """Windows of a text, asked for by where they start.

    Args:
        text: (N,), integers.
        context: T.
        count: how many windows an epoch has; None: as many as cover the text, in which the first character is no target.
    """

    def __init__(self, text: Tensor, context: int, count: int | None = None):
        super().__init__(text)
        self.text, self.count = text, -(-(len(text) - 1) // context) if count is None else count
        padded = torch.cat([text, torch.full((context,), IGNORE, dtype=text.dtype)])  # (N + T,)
        self.windows = padded.unfold(0, context + 1, 1)  # (N, T + 1), a view: row i starts at character i

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([start])
        return inputs[0], targets[0]

    def __getitems__(self, starts: list[int]) -> tuple[Tensor, Tensor]:
        rows = self.windows[torch.as_tensor(starts)].long()  # (B, T + 1)
        return rows[:, :-1].clamp(min=0), rows[:, 1:]  # an input behind the end is any token: its target is IGNORE


class RandomStarts(Sampler[int]):
    """Random places from 0 to below `end`, drawn from (seed, epoch). Lightning calls `set_epoch` before each."""

    def __init__(self, length: int, end: int):
        self.length, self.end, self.epoch = length, end, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose places the next iteration has."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.epoch))
        return iter(torch.randint(self.end, (self.length,), generator=generator).tolist())


class StreamStarts(RandomStarts):
    """The windows of so many streams in turn: the first of each, the second of each, ...; all equally long.

    Args:
        streams: how many.
        windows: of each stream.
        context: T; the first stream starts at a place below it, drawn from (seed, epoch).
    """

    def __init__(self, streams: int, windows: int, context: int):
        super().__init__(streams * windows, context)
        first = torch.arange(streams) * windows  # each stream's first window
        self.starts = context * (first + torch.arange(windows).unsqueeze(1)).flatten()  # (windows, streams), flat

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.epoch))
        return iter((self.starts + torch.randint(self.end, (1,), generator=generator)).tolist())


class InOrder(Sampler[int]):
    """Where windows start that cover a text, of so many streams in turn; the last streams may be one window shorter."""

    def __init__(self, windows: int, streams: int, context: int):
        rows = -(-windows // streams)  # of the longest streams
        longer = windows - (rows - 1) * streams  # how many of them there are
        first = [s * (rows - 1) + min(s, longer) for s in range(streams)]  # each stream's first window
        self.starts = [
            context * (first[s] + j) for j in range(rows) for s in range(streams if j < rows - 1 else longer)
        ]

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[int]:
        return iter(self.starts)


def _fetch(path: Path) -> None:
    """Download tiny Shakespeare: whole, or not at all.

    Raises:
        OSError, RuntimeError: it cannot be had, or is another text.
    """
    try:
        with urlopen(SHAKESPEARE) as answer:
            content = answer.read()
    except HTTPException as error:  # it broke off
        raise OSError(error) from error
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise RuntimeError(f"{SHAKESPEARE} sent {len(content):,} bytes of something else")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
