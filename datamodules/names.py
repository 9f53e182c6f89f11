"""Surnames, and the language that each is from: text files `<folder>/<language>.txt`, a name a line, in UTF-8.

The data is that of the PyTorch tutorial "Classifying names with a character-level RNN" (18 languages; more than half of
the names are Russian). It has many names twice or more: here each counts once in its language, or the same name would be
learnt and tested. A name that is in several languages stays in all of them: no network can tell all of these right.

Names are of different lengths, and a batch is a tensor: PAD stands behind the shorter ones. To have little of it, names
of about the same length come together (`Buckets`), and a batch is as wide as its longest name (`Sequences`).

Shapes: B batch, T symbols of the longest name in it, N names; tokens (B, T) and labels (B,), int64.
"""

import string
import tempfile
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from callbacks.seeding import epoch_seed
from datamodules.files import data_dir, download
from datamodules.in_memory import EpochShuffle, InMemoryDataModule, InMemoryDataset
from datamodules.vocabulary import Vocabulary, lengths, pad
from runner.errors import InputError, did_you_mean

ASCII = string.ascii_letters + " '-.,"
MANY_UNKNOWN = 0.1  # share of a language's characters


class Names(InMemoryDataModule):
    """Names of each language to train (80 %), to validate and to test (10 % each), always the same ones.

    Args:
        folder: with a file for each language; if it is relative and not there, it is looked for below `DATA_DIR`
            (default: `data`).
        url: of a zip archive with these files in one of its folders; it is unpacked to `<DATA_DIR>/<folder>` if there
            is none.
        fold: whether marks are taken off letters, as in the tutorial ("Ślusàrski" is "Slusarski"), and the symbols are
            those of ASCII that are in names; False: all characters of the training names, as they are. What is none of
            the symbols is the token UNKNOWN.
        bucket: how many batches' names are sorted by length together; 1: none are.
        batch_size: names in a training batch.
        eval_batch_size: names in a batch of validation and test.
    """

    classes: tuple[str, ...] = ()  # the languages, known after `setup`
    vocabulary: Vocabulary | None = None

    def __init__(
        self,
        folder: str = "names",
        url: str | None = None,
        fold: bool = True,
        bucket: int = 50,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
    ):
        super().__init__(batch_size, eval_batch_size)
        if bucket < 1:
            raise InputError(f"bucket: one batch at least, got {bucket}")
        if url and not url.startswith(("https://", "http://")):
            raise InputError(f"url must start with https://, got {url}")
        self.folder, self.url, self.fold, self.bucket = folder, url, fold, bucket
        self.download_error = ""
        if fold:
            self.vocabulary = Vocabulary(ASCII, unknown=True)

    @property
    def path(self) -> Path:
        """Where the files are, or are unpacked to."""
        path = Path(self.folder).expanduser()
        return path if path.is_dir() else data_dir() / path

    def prepare_data(self) -> None:
        """Download and unpack the archive, if there is one and no folder; `setup` says what is missing."""
        if self.url and not self.path.exists() and not self.download_error:
            self.download_error = download(self.folder, self.path, lambda: fetch_texts(self.url, self.path))

    def setup(self, stage: str | None = None) -> None:
        """Read the files, and part the names of each language.

        Raises:
            InputError: there are no files, or one is not UTF-8 or has too few names.
        """
        if self.train_set is not None:
            return
        files = self._files()
        random = torch.Generator().manual_seed(0)  # not the run's seed
        parts: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
        for label, file in enumerate(files):
            names = list(dict.fromkeys(self.clean(line) for line in read_lines(file)))
            names = [name for name in names if name]
            if len(names) < 3:
                raise InputError(f"{file} has {len(names)} name(s): there must be 3, to train, to validate and to test")
            tenth = max(1, round(len(names) / 10))
            for place, i in enumerate(torch.randperm(len(names), generator=random).tolist()):
                part = "test" if place < tenth else "val" if place < 2 * tenth else "train"
                parts[part].append((names[i], label))
        self.classes = tuple(file.stem for file in files)
        if not self.fold:
            self.vocabulary = Vocabulary.of((name for name, _ in parts["train"]), unknown=True)
        self.source = f"names in {self.path}"
        sets = {part: self._encoded(pairs, random) for part, pairs in parts.items()}
        self.val_set, self.test_set, self.train_set = sets["val"], sets["test"], sets["train"]
        self._warn_of_unknown(files, self.train_set)

    def _warn_of_unknown(self, files: list[Path], dataset: "Sequences") -> None:
        """Say so if names are in letters that `fold` makes all alike: of such names a network sees no more than the length."""
        tokens, labels = dataset.tensors  # (N, T), (N,)
        unknown, symbols = (tokens == self.vocabulary.unknown).sum(dim=1), dataset.lengths  # (N,)
        shares = {file: float(unknown[labels == k].sum() / symbols[labels == k].sum()) for k, file in enumerate(files)}
        file = max(shares, key=shares.get)
        if shares[file] > MANY_UNKNOWN:
            warnings.warn(
                f"{shares[file]:.0%} of the characters in {file} are none of those that the network knows"
                + (", letters of ASCII: --data.fold false" if self.fold else ""),
                stacklevel=3,
            )

    def clean(self, line: str) -> str:
        """Return a name as the network knows it: one space between words, and if so asked, no marks on letters."""
        line = " ".join(line.split())
        if not self.fold:
            return unicodedata.normalize("NFC", line)  # a letter with a mark can be written in two ways
        letters = unicodedata.normalize("NFD", line)  # each mark a character of its own
        return "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")

    def read_line(self, line: str) -> Tensor:
        """Return any name as tokens (T,). It needs no `setup`, but if `fold` is off, a checkpoint's symbols.

        Raises:
            InputError: there is nothing in it.
        """
        name = self.clean(line)
        if not name:
            raise InputError("an empty line is no name")
        return torch.tensor(self.vocabulary.encode(name))

    # -- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Batches of names of about the same length, other ones every epoch."""
        batches = Buckets(self.train_set.lengths, self.batch_size, self.bucket)
        return DataLoader(self.train_set, batch_sampler=batches, collate_fn=_as_it_is)

    # -- what checkpoints say ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints say of the data: with languages and symbols a model can tell names without it."""
        return super().state_dict() | {"classes": list(self.classes), "symbols": self.vocabulary.symbols}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's symbols, if there is no data.

        Raises:
            InputError: there is, and it has others.
        """
        if self.vocabulary is None:
            self.vocabulary = Vocabulary(state["symbols"], unknown=True)
        elif self.vocabulary.symbols != state["symbols"]:
            raise InputError(f"the checkpoint was trained on names of other characters than those in {self.path}")

    def _files(self) -> list[Path]:
        path = self.path
        if not path.is_dir():
            if self.url:
                reason = self.download_error or "no download was tried"
                raise InputError(
                    f"no {path}, and {self.url} could not be had ({reason}): put <language>.txt files into {path}"
                )
            names = [p.name for parent in {path.parent, data_dir()} if parent.is_dir() for p in parent.glob("*/")]
            raise InputError(f"there is no folder {path}, with <language>.txt in it{did_you_mean(path.name, names)}")
        files = sorted(file for file in path.glob("*.txt") if not file.name.startswith("."))
        if len(files) < 2:
            raise InputError(f"{path} has {len(files)} file(s) <language>.txt: there must be two languages at least")
        return files

    def _encoded(self, pairs: list[tuple[str, int]], random: torch.Generator) -> "Sequences":
        order = torch.randperm(len(pairs), generator=random).tolist()  # not language by language
        names, labels = zip(*(pairs[i] for i in order), strict=True)
        return Sequences(pad([self.vocabulary.encode(name) for name in names]), torch.tensor(labels))


class Sequences(InMemoryDataset):
    """Padded sequences (N, T), and what belongs to each; a batch of them is as wide as its longest.

    Attributes:
        lengths: of the sequences, (N,).
    """

    def __init__(self, tokens: Tensor, *others: Tensor):
        super().__init__(tokens, *others)
        self.lengths = lengths(tokens)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        tokens, *others = super().__getitems__(indices)
        longest = int(self.lengths[indices].max())
        return tokens[:, :longest], *others  # (B, T) -> (B, longest)


class Buckets(Sampler[list[int]]):
    """Batches of sequences of about the same length, in an order that is drawn from (seed, epoch).

    All are shuffled; then so many batches' sequences as a bucket holds are sorted by length, and cut into batches; and the
    batches are shuffled. So what is in a batch is other every epoch, and short ones do not come first.

    Args:
        lengths: of the sequences, (N,).
        batch_size: sequences in a batch; the last one may have fewer.
        batches: in a bucket.

    Attributes:
        sampler: the order before the buckets; Lightning tells it the epoch.
    """

    def __init__(self, lengths: Tensor, batch_size: int, batches: int):
        self.lengths, self.batch_size, self.batches = lengths, batch_size, batches
        self.sampler = EpochShuffle(len(lengths))

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.tensor(list(self.sampler))
        if self.batches > 1:
            buckets = order.split(self.batch_size * self.batches)
            order = torch.cat([bucket[self.lengths[bucket].argsort(stable=True)] for bucket in buckets])
        batches = order.split(self.batch_size)
        generator = torch.Generator().manual_seed(epoch_seed(self.sampler.epoch, 1))
        # A generator draws nothing before it is asked: of a resumed run, Lightning makes it before it tells the epoch
        yield from (batches[i].tolist() for i in torch.randperm(len(batches), generator=generator))


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text in UTF-8, without their ends.

    Raises:
        InputError: it cannot be read, or is not UTF-8; names file and line.
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not text in UTF-8: save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def fetch_texts(url: str, folder: Path) -> None:
    """Download a zip, and make the folder in it that has most `*.txt` to `folder`: whole, or not at all.

    Raises:
        OSError, RuntimeError: it cannot be had, is no zip, or has no such files.
    """
    from torchvision.datasets.utils import download_url  # a second to import: only if it is needed

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        archive, unpacked = Path(temporary, "archive"), Path(temporary, "unpacked")
        download_url(url, temporary, archive.name)
        try:
            zipfile.ZipFile(archive).extractall(unpacked)
        except (zipfile.BadZipFile, zlib.error, EOFError):
            raise RuntimeError("what came is no zip, or not all of it") from None
        folders = {text.parent for text in unpacked.rglob("*.txt")}
        if not folders:
            raise RuntimeError("the archive has no *.txt files")
        max(folders, key=lambda found: len(list(found.glob("*.txt")))).rename(folder)


def _as_it_is(batch):
    return batch
