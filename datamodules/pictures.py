"""Picture files as arrays of pixels: read, whatever they are; checked before they are needed; resized; augmented.

Shapes: H height, W width; a picture is (H, W, 3), uint8, in the order red, green, blue.
"""

import contextlib
import hashlib
import inspect
import io
import os
import random
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from runner.errors import InputError, did_you_mean, one_line

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network for a newer version
import albumentations
import cv2

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what it cannot read is told by us, in one line

# First bytes of JPEG, PNG, BMP and WebP, which OpenCV reads to the same pixels as PIL, and faster. Of a GIF with
# transparency and a TIFF with alpha it makes other ones.
CV2_READS = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"RIFF")


class PictureError(InputError):
    """A picture cannot be used. It keeps its one line on the way from a DataLoader's worker.

    (The loader raises it again with the worker's traceback for a message, whose end is the line.)
    """

    def __init__(self, message: str):
        super().__init__(str(message).rpartition(f"{type(self).__name__}: ")[2].strip())


def read_picture(path: Path, enough: float = 0) -> np.ndarray:
    """Read a picture of any kind; one that its camera marked as turned is turned upright (EXIF).

    Grey and palettes become colours, 16 bits become the upper 8 of them, CMYK becomes RGB, of a moving picture it is
    the first frame. Transparency is dropped, and the colours beneath it are kept: what they are is the file's affair.

    Args:
        path: the file; its content tells its format, not its suffix.
        enough: if not 0, a large JPEG may come at 1/2, 1/4 or 1/8 of its size, so long as its shorter side has as many
            pixels as this. (JPEGs hold frequencies: leaving out the high ones is the mean of 2 x 2, 4 x 4 or 8 x 8
            pixels, and most of the decoding is saved.)

    Returns:
        (H, W, 3) uint8.

    Raises:
        PictureError: the file is not there, no picture, or damaged; names it.
    """
    image = None
    try:
        content = Path(path).read_bytes()
        if content.startswith(CV2_READS):
            with contextlib.suppress(cv2.error):
                image = cv2.imdecode(np.frombuffer(content, np.uint8), _cv2_flag(content, enough))
        return _read_with_pil(content) if image is None else image
    except Exception as error:  # PIL raises whatever there is: SyntaxError, struct.error, ...
        raise PictureError(f"{path} cannot be read: {_reason(error)}") from None


def check_picture(path: Path) -> tuple[str, str]:
    """Read a file once; return its SHA-256 (hexadecimal), and why it is no readable picture, or an empty string.

    The whole file is decoded, a JPEG at an eighth of its size: OpenCV may fill in what is missing, and not say so.
    (What it does not find is damage within a JPEG that still decodes to something.)
    """
    digest = ""
    try:
        content = Path(path).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if not content.startswith(CV2_READS):
            _read_with_pil(content)
        else:
            with warnings.catch_warnings(action="ignore"):
                image = Image.open(io.BytesIO(content))
                image.draft("L", (1, 1))  # the least that libjpeg can do and still see every byte
                image.load()
    except Exception as error:
        return digest, _reason(error)
    return digest, ""


def require_picture(path: Path) -> None:
    """Raise PictureError for a file that `check_picture` finds something wrong with."""
    if reason := check_picture(path)[1]:
        raise PictureError(f"{path} cannot be read: {reason}")


def check_pictures(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Return `check_picture` of each; with a progress bar, if there is a terminal, from the second second on."""
    # The filters of warnings belong to all threads: what each of them sets and resets gets mixed up, and is reset here
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        checks = pool.map(check_picture, paths)
        return list(tqdm(checks, "checking", len(paths), leave=False, disable=None, delay=2, unit=" pictures"))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) to (height, width, 3), bilinear and with antialiasing, as torchvision's transforms do.

    OpenCV's linear interpolation skips pixels when a picture shrinks. Its INTER_AREA does not, and took five times as
    long as this (1.1 ms and 0.2 ms, from 650 x 650 to 224 x 224).
    """
    # view, since unsqueeze's strides do not tell torch that this is channels_last: it would leave that, and come back
    pixels = torch.from_numpy(np.ascontiguousarray(image)).view(1, *image.shape)
    pixels = F.interpolate(pixels.permute(0, 3, 1, 2), (height, width), mode="bilinear", antialias=True)  # (1, 3, h, w)
    return np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())  # -> (h, w, 3)


class RandomResizedCrop(albumentations.RandomResizedCrop):
    """Albumentations' crop, resized with antialiasing, which is not in its linear interpolation."""

    def apply(self, img: np.ndarray, crop_coords: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Crop and resize; any other interpolation than the default is left to albumentations."""
        if self.interpolation != cv2.INTER_LINEAR or self.area_for_downscale:
            return super().apply(img, crop_coords, **params)
        left, top, right, bottom = crop_coords
        return resize(img[top:bottom, left:right], *self.size)

    @property
    def enough(self) -> float:
        """Pixels that a picture's shorter side needs for the smallest crop to be no smaller than what comes of it."""
        return max(self.size) * (max(max(self.ratio), 1 / min(self.ratio)) / max(self.scale[0], 1e-6)) ** 0.5


TRANSFORMS = {
    name: kind
    for name, kind in vars(albumentations).items()
    if isinstance(kind, type) and issubclass(kind, albumentations.BasicTransform | albumentations.BaseCompose)
} | {"RandomResizedCrop": RandomResizedCrop}


def make_augmentation(steps: list, bbox_params: dict[str, Any] | None = None) -> albumentations.Compose:
    """Make albumentations' transforms of what an experiment says: `Name`, or `{Name: {argument: value}}`, each.

    Args:
        steps: the transforms, in order.
        bbox_params: arguments of albumentations.BboxParams, for boxes transformed with the picture; None: no boxes.

    Raises:
        InputError: there is no such transform, it takes no such argument, or cannot be made with its value.
    """
    return albumentations.Compose([_make_transform(step) for step in steps], bbox_params=bbox_params)


def augmented(augment: albumentations.Compose, path: Path, seed: int, **data: Any) -> dict[str, Any]:
    """Return a picture, and what belongs to it, as the augmentation that comes from `seed` makes them.

    Args:
        augment: made by `make_augmentation`.
        path: of the picture, for an error.
        seed: of all draws.
        data: what albumentations takes: `image` (H, W, 3), `mask`, `bboxes`, ...

    Raises:
        PictureError: a transform fails, or leaves no uint8 picture.
    """
    # one pair of generators for all transforms: with Compose's `seed=` each gets the same draws as the others
    augment.set_random_state(np.random.default_rng(seed), random.Random(seed))
    try:
        drawn = augment(**data)
    except Exception as error:
        raise PictureError(f"augment: {path}: {one_line(error)}") from None
    if getattr(drawn["image"], "dtype", None) != np.uint8 or drawn["image"].ndim != 3:
        raise PictureError("augment must leave pixels uint8: leave Normalize and ToTensorV2 out of it")
    return drawn


def _make_transform(step: str | dict):
    if isinstance(step, str):
        step = {step: {}}
    name, arguments = next(iter(step.items())) if isinstance(step, dict) and len(step) == 1 else (None, None)
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise InputError(f"augment: expected a transform's name, or {{name: {{argument: value}}}}, got {step}")
    if name not in TRANSFORMS:
        raise InputError(f"augment: albumentations has no {name}{did_you_mean(name, TRANSFORMS)}")
    known = set(inspect.signature(TRANSFORMS[name].__init__).parameters) - {"self"}
    for argument in arguments:
        if argument not in known:  # albumentations itself warns, and goes on without
            raise InputError(f"augment: {name} takes no {argument}{did_you_mean(str(argument), known)}")
    if isinstance(arguments.get("transforms"), list):  # of OneOf, SomeOf, Sequential
        arguments = {**arguments, "transforms": [_make_transform(inner) for inner in arguments["transforms"]]}
    try:
        with warnings.catch_warnings(action="error", category=UserWarning):
            return TRANSFORMS[name](**arguments)
    except Exception as error:
        found = error.__cause__.errors()[0] if hasattr(error.__cause__, "errors") else None  # pydantic's
        reason = f"{'.'.join(map(str, found['loc']))}: {found['msg']}" if found else one_line(error)
        raise InputError(f"augment: {name}: {reason}") from None


def _read_with_pil(content: bytes) -> np.ndarray:
    if not content:
        raise ValueError("it is empty")
    with warnings.catch_warnings(action="ignore"):  # of transparency that gets lost, of a large picture
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if image.mode in ("I", "F"):
            raise ValueError("its pixels have 32 bits; save it with 8 or 16 a channel")
        if image.mode.startswith("I;16"):  # of which PIL would cut off what is above 255
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)  # (H, W) -> (H, W, 3)
        return np.array(image.convert("RGB"))


def _cv2_flag(content: bytes, enough: float) -> int:
    """Tell cv2 to decode as it is, or a large JPEG smaller. (Small files are not worth asking PIL for the size.)"""
    if enough and len(content) > 100_000 and content.startswith(CV2_READS[0]):
        with warnings.catch_warnings(action="ignore"):  # of a large picture
            short = min(Image.open(io.BytesIO(content)).size)
        for factor in (8, 4, 2):
            if short >= factor * enough:
                # with REDUCED_COLOR it would be blue, green, red
                return cv2.IMREAD_COLOR_RGB | getattr(cv2, f"IMREAD_REDUCED_GRAYSCALE_{factor}")
    return cv2.IMREAD_COLOR_RGB


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture, or of a kind that is not read here (HEIC, for one: convert it to JPEG)"
    return getattr(error, "strerror", None) or one_line(error) or type(error).__name__
