"""Pictures and masks as files: read, and checked before they are needed.

A mask tells each pixel's class: number 0 is the background; a pixel of number IGNORE counts neither in losses nor in metrics.

Shapes: h, w height and width of a picture; C channels, 3 or 1.
"""

import hashlib
import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from datamodules.class_folders import some
from datamodules.pictures import PictureError, check_picture, read_picture, resize
from datamodules.voc_annotations import picture_size
from lit_models.segmenter import IGNORE
from runner.errors import InputError, one_line

NO_CLASS = 254
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")  # formats that may not keep a pixel's value


class Coding(NamedTuple):
    """What a mask's pixels mean."""

    classes: dict[int, int]  # the class of each number that a pixel may have
    # whether that number is 0 of black pixels, and 1 of all others; else palettes count as indices
    by_color: bool = False
    is_guess: bool = False  # nobody said so: then there must be one value beside black


class Pair(NamedTuple):
    """A picture and its mask."""

    name: str
    image: Path
    mask: Path
    height: int = 0  # of both in pixels, known once they are checked
    width: int = 0


def read_image(path: Path, height: int, width: int, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """Read a picture of known height and width, scaled to `size`: (h, w, C) uint8."""
    # a JPEG may come at half its size or less, if that is 1.5 times of what it is scaled to
    enough = 1.5 * max(size[0] / height, size[1] / width) * min(height, width) if size else 0
    image = read_picture(path, enough)
    if channels == 1:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]  # (h, w, 3) -> (h, w, 1)
    return resize(image, *size) if size else image


def read_mask(path: Path, coding: Coding, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read the classes of a mask's pixels, (h, w) uint8, scaled to `size`: a pixel's class is that of the nearest one.

    Raises:
        PictureError: the file cannot be read, or tells no classes; names it.
    """
    try:
        numbers, table = _decode(Path(path).read_bytes(), coding)
        if size:  # _EXACT: as torchvision and PIL do, from the middle of pixels; INTER_NEAREST is half a pixel off
            numbers = cv2.resize(numbers, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        classes = cv2.LUT(numbers, table)
        if (none := classes == NO_CLASS).any():
            known = coding.classes.keys() - {IGNORE}
            raise ValueError(f"it has pixels of class {numbers[none][0]}; there are {min(known)} to {max(known)}")
    except Exception as error:  # PIL raises whatever there is: SyntaxError, struct.error, ...
        no_picture = isinstance(error, UnidentifiedImageError)
        reason = "it is no picture" if no_picture else getattr(error, "strerror", None) or one_line(error)
        raise PictureError(f"{path} cannot be used: {reason or type(error).__name__}") from None
    return classes


def _decode(content: bytes, coding: Coding) -> tuple[np.ndarray, np.ndarray]:
    """Return a number for each pixel, (h, w) uint8, and what they mean: (256,) uint8, NO_CLASS where it is nothing."""
    if not content:
        raise ValueError("it is empty")
    with warnings.catch_warnings(action="ignore"):  # of a large picture
        opened = Image.open(io.BytesIO(content))
        image = ImageOps.exif_transpose(opened)
        pixels = np.asarray(image)
    if image.mode in ("LA", "RGB", "RGBA"):
        *colors, last = np.moveaxis(pixels, 2, 0)
        if image.mode == "RGB":
            colors.append(last)
        elif last.min() < 255:
            raise ValueError("it is transparent; save each pixel's class as grey, or as a palette's index")
        if not all(np.array_equal(colors[0], color) for color in colors):
            raise ValueError("it has colours, but no palette; save each pixel's class as grey, or as a palette's index")
        pixels = colors[0]
    if pixels.ndim != 2 or pixels.dtype.kind not in "bui":
        raise ValueError(f"its pixels are of a kind that tells no classes ({image.mode}): save it as a grey PNG")
    if pixels.dtype.itemsize > 1:  # of 16 or 32 bits
        if pixels.min() < 0:
            raise ValueError(f"it has pixels of {pixels.min()}")
        if not coding.by_color and pixels.max() > 255:
            raise ValueError(f"it has pixels of class {pixels.max()}")
        pixels = np.minimum(pixels, 255)
    numbers = np.ascontiguousarray(pixels, dtype=np.uint8)

    table = np.full(256, NO_CLASS, np.uint8)
    table[[*coding.classes]] = [*coding.classes.values()]
    if coding.by_color:
        is_bright = np.arange(256) > 0
        if opened.format in LOSSY:
            is_bright = np.arange(256) >= 128
        elif image.mode == "P":
            palette = np.array(image.getpalette()).reshape(-1, 3)
            is_bright[: len(palette)] = palette.any(axis=1)
        elif coding.is_guess and len(values := np.unique(numbers[numbers > 0])) > 1:
            raise ValueError(
                f"it has pixels of {values[0]} and of {values[-1]}: say whether mask_values are binary (all but black is "
                "foreground), or index (255 then counts as nothing)"
            )
        table = table[is_bright.astype(int)]
    elif opened.format in LOSSY:
        raise ValueError(f"{opened.format} does not keep classes as they are: save it as PNG")
    return numbers, table


def check_pairs(pairs: Sequence[Pair], coding: Coding) -> list[tuple[Pair, str, str, np.ndarray]]:
    """Read every picture and mask; return the pairs with their sizes, the SHA-256 of both files, and the classes there are.

    Raises:
        InputError: some cannot be used, or differ in size; tells how many, and names the first.
    """
    # The filters of warnings belong to all threads: what each of them sets and resets gets mixed up, and is reset here
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        checks = pool.map(partial(_check_pair, coding=coding), pairs)
        checked = list(tqdm(checks, "checking", len(pairs), leave=False, disable=None, delay=2, unit=" pictures"))
    if bad := [check for check in checked if isinstance(check, str)]:
        raise InputError(f"{len(bad):,} of {len(pairs):,} pictures with their masks cannot be used: {some(bad)}")
    return checked


def _check_pair(pair: Pair, coding: Coding) -> tuple[Pair, str, str, np.ndarray] | str:
    digest, reason = check_picture(pair.image)
    if reason:
        return f"{pair.image} cannot be read: {reason}"
    try:
        mask = read_mask(pair.mask, coding)
        height, width = mask.shape
        mask_digest = hashlib.sha256(pair.mask.read_bytes()).hexdigest()
    except (PictureError, OSError) as error:
        return str(error)
    size = picture_size(pair.image)
    if size != (width, height):
        return f"{pair.mask} has {width} x {height} pixels, and {pair.image} {size[0]} x {size[1]}"
    return pair._replace(height=height, width=width), digest, mask_digest, np.bincount(mask.ravel(), minlength=256) > 0
