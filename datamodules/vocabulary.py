"""From text to numbers and back: a vocabulary, and padding.

Shapes: B batch, T tokens of the longest sequence in it; tokens are int64.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from runner.errors import InputError

PAD = 0  # the token behind the end of a sequence that is shorter than the longest in its batch
IGNORE = -100  # the target that has no part in the loss: `cross_entropy`'s own ignore_index


class Vocabulary:
    """The symbols there are, each with a number: its place. The special ones come first, of these PAD, which is 0.

    Args:
        symbols: each once, in the order of their numbers; of one character each, unless there is a separator.
        pad: whether there is PAD, for sequences of different lengths.
        unknown: whether there is UNKNOWN, which stands for any symbol that is not here.
        ends: whether there are START and END, which stand at the two ends of what is to be written.
        separator: between two symbols in a text: " " for words; empty for characters.

    Attributes:
        symbols: as given, without the special ones; with the arguments this is all that a checkpoint has to keep.
        unknown, start, end: the numbers of the special symbols, None for those that are not here.

    Raises:
        InputError: there is no symbol, or one twice.
    """

    def __init__(
        self,
        symbols: Iterable[str],
        pad: bool = True,
        unknown: bool = False,
        ends: bool = False,
        separator: str = "",
    ):
        self.symbols, self.separator = list(symbols), separator
        if not self.symbols or len(set(self.symbols)) < len(self.symbols):
            raise InputError(f"a vocabulary needs symbols, each once, got {self.symbols[:20]}")
        special = ["PAD"] * pad + ["UNKNOWN"] * unknown + ["START", "END"] * ends
        self.unknown, self.start, self.end = (
            special.index(name) if name in special else None for name in ("UNKNOWN", "START", "END")
        )
        self.first = len(special)  # the number of the first symbol that is not special
        self.numbers = {symbol: self.first + i for i, symbol in enumerate(self.symbols)}

    @classmethod
    def of(cls, texts: Iterable[str], separator: str = "", **special: bool) -> "Vocabulary":
        """Return the vocabulary of all symbols in the texts, sorted; `special` as for the class."""
        found = {symbol for text in texts for symbol in (text.split(separator) if separator else text)}
        return cls(sorted(found), separator=separator, **special)

    def __len__(self) -> int:
        """How many numbers there are, the special symbols' included."""
        return self.first + len(self.symbols)

    def encode(self, text: str, ends: bool = False) -> list[int]:
        """Return the numbers of the symbols in a text; between START and END, if asked for.

        Raises:
            InputError: one is not here, and there is no UNKNOWN; names it.
        """
        found = []
        for symbol in text.split(self.separator) if self.separator else text:
            number = self.numbers.get(symbol, self.unknown)
            if number is None:
                what = "word" if self.separator else "character"
                some = self.separator.join(self.symbols[:40]) + ("" if len(self.symbols) <= 40 else " ...")
                raise InputError(f"the {what} {symbol!r} in {text[:40]!r} is not known; known are: {some!r}")
            found.append(number)
        return [self.start, *found, self.end] if ends else found

    def decode(self, numbers: Iterable[int] | Tensor) -> str:
        """Return the text of numbers, up to END if it is among them; PAD and START are nothing, UNKNOWN is U+FFFD."""
        found = []
        for number in numbers.tolist() if isinstance(numbers, Tensor) else numbers:
            if number == self.end:
                break
            if number >= self.first:
                found.append(self.symbols[number - self.first])
            elif number == self.unknown:
                found.append("\ufffd")
        return self.separator.join(found)


def pad(sequences: list[list[int]]) -> Tensor:
    """Put sequences of different lengths below one another, (B, T), PAD behind the shorter ones."""
    tokens = torch.full((len(sequences), max(map(len, sequences), default=0)), PAD)  # (B, T)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return tokens


def lengths(tokens: Tensor) -> Tensor:
    """Return the lengths (B,) of padded sequences (B, T): where the last token that is not PAD stands, counted from 1."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)  # (T,)
    return (places * (tokens != PAD)).amax(dim=1)
