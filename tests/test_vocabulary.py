"""Text to numbers and back; padding."""

import pytest
import torch

from datamodules.vocabulary import PAD, Vocabulary, lengths, pad
from runner.errors import InputError


@pytest.mark.parametrize(
    ("special", "numbers", "unknown", "start", "end"),
    [
        ({}, [2, 1], None, None, None),
        ({"pad": False}, [1, 0], None, None, None),
        ({"unknown": True}, [3, 2], 1, None, None),
        ({"ends": True}, [4, 3], None, 1, 2),
        ({"unknown": True, "ends": True}, [5, 4], 1, 2, 3),
        ({"pad": False, "unknown": True}, [2, 1], 0, None, None),
    ],
)
def test_special_symbols_come_first_and_pad_is_0(special, numbers, unknown, start, end):
    vocabulary = Vocabulary("ab", **special)
    assert PAD == 0
    assert vocabulary.encode("ba") == numbers
    assert (vocabulary.unknown, vocabulary.start, vocabulary.end) == (unknown, start, end)
    assert len(vocabulary) == max(numbers) + 1


def test_back_to_text_is_the_text():
    vocabulary = Vocabulary.of(["hello", "wörld\n "], ends=True)
    assert vocabulary.symbols == sorted("helo\n wörld"[:4] + "\n wörd")
    numbers = vocabulary.encode("lö wd", ends=True)
    assert numbers[0] == vocabulary.start
    assert numbers[-1] == vocabulary.end
    assert vocabulary.decode(numbers) == "lö wd"
    assert vocabulary.decode(torch.tensor(numbers)) == "lö wd"
    assert vocabulary.encode("") == []
    assert vocabulary.decode([]) == ""


def test_back_to_text_ends_at_end_and_leaves_padding_out():
    vocabulary = Vocabulary("ab", unknown=True, ends=True)
    a, b = vocabulary.encode("ab")
    assert vocabulary.decode([vocabulary.start, a, PAD, b, vocabulary.end, a, a, PAD]) == "ab"
    assert vocabulary.decode([a, vocabulary.unknown, b]) == "a\ufffdb"


def test_words_are_symbols_too():
    vocabulary = Vocabulary.of(["two red circles", "a red star"], separator=" ")
    assert vocabulary.symbols == ["a", "circles", "red", "star", "two"]
    assert vocabulary.decode(vocabulary.encode("a star two")) == "a star two"
    with pytest.raises(InputError, match="the word 'blue' in 'a blue star' is not known"):
        vocabulary.encode("a blue star")


def test_what_is_not_known_is_unknown_or_one_line():
    assert Vocabulary("ab", unknown=True).encode("axb") == [2, 1, 3]
    with pytest.raises(InputError, match="the character 'x' in 'axb' is not known; known are: 'ab'") as error:
        Vocabulary("ab").encode("axb")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("symbols", ["", "aba"])
def test_no_symbols_or_one_twice(symbols):
    with pytest.raises(InputError, match="each once"):
        Vocabulary(symbols)


def test_padding_and_lengths():
    tokens = pad([[5], [], [7, 8, 9]])
    assert tokens.tolist() == [[5, 0, 0], [0, 0, 0], [7, 8, 9]]
    assert tokens.dtype == torch.int64
    assert lengths(tokens).tolist() == [1, 0, 3]
    assert pad([[]]).shape == (1, 0)
    assert lengths(torch.tensor([[0, 3, 0]])).tolist() == [2]  # what stands within is no padding
