"""Captioned pictures: what is said of them is what is in them."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.captions import COLOURS, Captions, draw_kinds, tell
from datamodules.scenes import CLASSES
from runner.errors import InputError

CIRCLE, SQUARE, TRIANGLE, STAR = range(4)
RED, GREEN, BLUE, YELLOW, GREY = range(5)


def small(**arguments):
    data = Captions(**{"train_size": 20, "val_size": 4, "test_size": 6, "batch_size": 8} | arguments)
    data.setup()
    return data


def drawn(count=150, size=64, most=3):
    return [draw_kinds(np.random.default_rng([3, i]), size, most) for i in range(count)]


@pytest.mark.parametrize(
    ("kinds", "sentence"),
    [
        ([(STAR, GREY)], "a star"),
        ([(CIRCLE, RED), (STAR, GREY), (CIRCLE, RED)], "two red circles and a star"),
        ([(TRIANGLE, BLUE)] * 3, "three blue triangles"),
        ([(STAR, RED), (STAR, GREEN)], "a red star and a green star"),
        ([(SQUARE, GREY), (SQUARE, YELLOW), (SQUARE, GREY)], "two squares and a yellow square"),
        ([(STAR, GREEN), (STAR, GREEN), (CIRCLE, RED)], "two green stars and a red circle"),
        ([(STAR, RED), (TRIANGLE, RED), (SQUARE, GREY)], "a square and a red triangle and a red star"),
    ],
)
def test_the_sentence_is_the_same_in_whatever_order_objects_come(kinds, sentence):
    assert {tell(list(order)) for order in permutations(kinds)} == {sentence}
    vocabulary = Captions.target_vocabulary
    assert vocabulary.decode(vocabulary.encode(sentence, ends=True)) == sentence


def test_no_two_pictures_contents_have_the_same_sentence():
    kinds = [(shape, colour) for shape in range(4) for colour in range(5)]
    contents = {tuple(sorted(some)) for a in kinds for b in kinds for some in ((a,), (a, b), (a, a, b), (a, b, b))}
    assert len({tell(list(some)) for some in contents}) == len(contents)


def is_like(pixels: np.ndarray, colour: int) -> np.ndarray:
    """Whether pixels (..., 3) have one of the five colours, by which of red, green and blue stand out."""
    r, g, b = (pixels[..., i].astype(int) for i in range(3))
    return {
        RED: (r > g + 70) & (r > b + 70),
        GREEN: (g > r + 50) & (g > b + 45),
        BLUE: (b > r + 60) & (b > g + 60),
        YELLOW: (r > b + 90) & (g > b + 90),
    }[colour]


def test_what_is_said_is_seen():
    """Of each colour that is said there are as many patches as there are objects, and of no other colour."""
    import cv2

    checked = 0
    for image, kinds in drawn():
        for colour in (RED, GREEN, BLUE, YELLOW):
            mask = cv2.medianBlur(is_like(image, colour).astype(np.uint8) * 255, 5)
            _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
            large = int((stats[1:, cv2.CC_STAT_AREA] > 30).sum())
            count = sum(c == colour for _, c in kinds)
            checked += count
            assert large <= count  # those that touch are one patch
            assert (large > 0) == (count > 0)
    assert checked > 150


def test_shapes_are_what_they_are_called():
    """The area of an object, as a share of the smallest turned box around it: of a square 1, of a triangle 1/2."""
    import cv2

    shares = {name: [] for name in CLASSES}
    for image, kinds in drawn(400, 128, 1):
        ((shape, colour),) = kinds
        if colour == GREY:
            continue
        mask = cv2.medianBlur(is_like(image, colour).astype(np.uint8) * 255, 5)
        (outline, *_) = sorted(cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0], key=len)[::-1]
        _, sides, _ = cv2.minAreaRect(outline)
        shares[CLASSES[shape]].append(cv2.contourArea(outline) / (sides[0] * sides[1]))
    medians = {name: float(np.median(values)) for name, values in shares.items()}
    assert medians["square"] > 0.93
    assert 0.72 < medians["circle"] < 0.84
    assert 0.45 < medians["triangle"] < 0.6
    assert medians["star"] < 0.48


def test_all_kinds_and_numbers_occur():
    kinds = [kinds for _, kinds in drawn(400)]
    assert np.bincount([len(k) for k in kinds]).tolist()[1:] == pytest.approx([133] * 3, rel=0.2)
    each = [shape * 5 + colour for k in kinds for shape, colour in k]
    assert np.bincount(each, minlength=20).min() > 15
    several = [tell(k) for k in kinds if len(set(k)) < len(k)]
    assert 100 < len(several) < 250
    assert any(sentence.startswith("three") for sentence in several)


@pytest.mark.parametrize("size", [48, 256])
def test_any_size(size):
    ((image, _),) = drawn(1, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8


def test_batches():
    data = small()
    assert data.sizes == {"train": 20, "val": 4, "test": 6}
    images, sentences = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 64, 64)
    assert images.dtype == torch.uint8
    assert (sentences[:, 0] == data.target_vocabulary.start).all()
    assert sentences.dtype == torch.int64
    assert len({data.target_vocabulary.decode(s) for s in sentences}) > 4


def test_the_longest_sentence_fits_the_experiments():
    longest = tell([(CIRCLE, RED), (SQUARE, RED), (STAR, RED)])
    assert len(Captions.target_vocabulary.encode(longest, ends=True)) - 1 == 12
    assert len(Captions.target_vocabulary) == 3 + len(("a", "two", "three", "and")) + len(COLOURS) - 1 + 2 * 4


def test_the_seed_of_the_scenes_alone_decides(monkeypatch):
    one = small()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    np.random.seed(7)
    torch.manual_seed(7)
    assert small().fingerprint == one.fingerprint
    assert small(scene_seed=1).fingerprint != one.fingerprint
    more = small(train_size=30)
    assert torch.equal(more.train_set.tensors[0][:20], one.train_set.tensors[0])
    assert torch.equal(more.test_set.tensors[0], one.test_set.tensors[0])
    assert not torch.equal(one.train_set.tensors[0][:4], one.val_set.tensors[0])
    images = one.train_set.tensors[0]
    one.setup()  # twice
    assert one.train_set.tensors[0] is images


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_training_pictures_are_mirrored_and_turned(flip, training):
    data = small(flip=flip)
    data.trainer = SimpleNamespace(training=training, lightning_module=SimpleNamespace(dtype=torch.float32))
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    torch.manual_seed(0)
    images, sentences = data.on_after_batch_transfer((image.expand(200, -1, -1, -1), torch.arange(200)[:, None]), 0)
    assert images.dtype == torch.float32
    assert float(images.min()) == -1
    assert float(images.max()) == 1
    plain = image.float() / 127.5 - 1
    ways = {(f, k): torch.rot90(plain.flip(3) if f else plain, k, (2, 3)) for f in (0, 1) for k in range(4)}
    found = {}
    for way, expected in ways.items():
        found[way] = int(torch.isclose(images, expected, atol=1e-6).flatten(1).all(dim=1).sum())
    assert sum(found.values()) == 200
    if flip and training:
        assert min(found.values()) > 10
    else:
        assert found[0, 0] == 200
    assert sentences[:, 0].tolist() == list(range(200))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"size": 40}, "size: pictures have 48 to 256 pixels a side, got 40"),
        ({"max_objects": 4}, "max_objects must be from 1 to 3, got 4"),
        ({"max_objects": 0}, "max_objects must be from 1 to 3, got 0"),
        ({"val_size": 0}, "train_size, val_size and test_size start at 1"),
        ({"scene_seed": -1}, "scene_seed must be 0 or more, got -1"),
        ({"batch_size": 0}, "batch sizes start at 1"),
    ],
)
def test_bad_arguments(arguments, line):
    with pytest.raises(InputError, match=line):
        Captions(**arguments)
