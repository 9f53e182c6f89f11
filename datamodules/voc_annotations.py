"""Annotations in Pascal VOC's layout: an XML file for each picture says where its objects are; read, and checked.

VOC counts pixels from 1, and the last one belongs to the box. Here a box that covers column 0 only is x1 = 0, x2 = 1:
x1 = xmin - 1, x2 = xmax. (Everingham et al. 2010, The Pascal Visual Object Classes Challenge, IJCV 88.)
"""

import contextlib
import hashlib
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from datamodules.class_folders import some
from runner.errors import InputError, did_you_mean, one_line
from runner.files import PICTURE_SUFFIXES

ORIENTATION = 0x0112  # EXIF's tag; 5 to 8: turned by a quarter
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Object(NamedTuple):
    """One object of a picture."""

    number: int  # among its file's objects, from 1
    name: str  # of its class
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the picture
    difficult: bool


class Annotation(NamedTuple):
    """What a file says of its picture."""

    path: Path
    objects: list[Object]
    bad: list[str]  # of each object that cannot be used: why, with the file's name
    size: tuple[int, int]  # the picture's width and height
    said_size: tuple[int, int] | None  # those that stand in the file, if they do
    digest: str  # SHA-256 of the file, hexadecimal


def read_names(file: Path) -> list[str]:
    """Return the names of a split's pictures, one a line, as they stand there.

    Raises:
        InputError: the file cannot be read, or names none.
    """
    try:
        names = [name for line in file.read_text("utf-8-sig").splitlines() if (name := line.strip())]
    except OSError as error:
        hint = did_you_mean(file.stem, (p.stem for p in file.parent.glob("*.txt")))
        raise InputError(f"{file} cannot be read: {error.strerror}{hint}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is no text in UTF-8: expected a picture's name in each line") from None
    if not names:
        raise InputError(f"{file} is empty: expected a picture's name in each line, without .jpg")
    return names


def find_pictures(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return each name's picture: its .jpg, or another kind of picture if there is only that, whether there or not.

    Raises:
        InputError: there is no such folder, or it cannot be read.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}; expected the pictures in it") from None
    found = {file.stem: file for file in files if file.suffix.lower() in PICTURE_SUFFIXES}
    found |= {file.stem: file for file in files if file.suffix == ".jpg"}
    return {name: found.get(name, folder / f"{name}.jpg") for name in names}


def picture_size(path: Path) -> tuple[int, int]:
    """Return a readable picture's width and height, as `read_picture` turns it, without decoding it."""
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # of a large picture
        width, height = image.size
        with contextlib.suppress(Exception):  # PIL raises whatever there is; what it cannot read turns nothing
            if image.getexif().get(ORIENTATION) in (5, 6, 7, 8):
                return height, width
    return width, height


def read_annotations(
    folder: Path, paths: dict[str, Path], train: Sequence[str], classes: Sequence[str] | None
) -> tuple[dict[str, Annotation], tuple[str, ...], list[str], list[str]]:
    """Read the annotations of pictures; warn of those that say another size than the picture has.

    Args:
        folder: with an XML file for each.
        paths: of the pictures, by name; each can be read.
        train: names of those to train on.
        classes: None: those in the annotations of `train`.

    Returns:
        Annotations by name, without what is bad; the classes; a line for each bad file; a line for each bad box.
    """
    annotations, bad_files, bad_boxes, other_sizes = {}, [], [], []
    for name, path in paths.items():
        try:
            annotations[name] = found = read_annotation(folder / f"{name}.xml", *picture_size(path))
        except InputError as error:
            bad_files.append(str(error))
            continue
        if found.said_size not in (None, found.size):
            said, size = (" x ".join(map(str, size)) for size in (found.said_size, found.size))
            other_sizes.append(f"{found.path} ({said}, the picture {size})")
    if other_sizes:  # not an error: there may be some in Pascal VOC itself, and their boxes are checked, too
        message = f"{len(other_sizes):,} annotations tell another size than their picture has: {some(other_sizes)}"
        warnings.warn(f"{message}; the picture's is used, so look whether its boxes fit", stacklevel=3)
    trained = [annotations[name] for name in train if name in annotations]
    classes = tuple(classes or sorted({found.name for annotation in trained for found in annotation.objects}))
    for name, annotation in annotations.items():
        bad_boxes += annotation.bad
        for found in annotation.objects:
            if found.name not in classes:
                hint = did_you_mean(found.name, classes)
                bad_boxes.append(f"{annotation.path}: object {found.number}: there is no class {found.name}{hint}")
        known = [found for found in annotation.objects if found.name in classes]
        annotations[name] = annotation._replace(objects=known)
    return annotations, classes, bad_files, bad_boxes


def read_annotation(path: Path, width: int, height: int) -> Annotation:
    """Read a picture's objects; those whose box cannot be right are told apart.

    A box may reach one pixel beyond the picture, and is clipped: so do those of tools that count from 0.

    Args:
        path: the XML file.
        width: of the picture in pixels; what the file says of it may be wrong, and is only returned.
        height: likewise.

    Raises:
        InputError: there is no such file, or it is no annotation.
    """
    try:
        content = path.read_bytes()
        root = ET.fromstring(content)
    except OSError as error:
        hint = "; ImageSets name pictures without suffix" if Path(path.stem).suffix.lower() in PICTURE_SUFFIXES else ""
        raise InputError(f"{path} cannot be read: {error.strerror}{hint}") from None
    except (ET.ParseError, ValueError, LookupError) as error:  # the latter two: of its encoding
        raise InputError(f"{path} is no XML: {one_line(error)}") from None
    if root.tag != "annotation":
        raise InputError(f"{path} is no annotation of Pascal VOC's: it begins with <{root.tag}>, not <annotation>")
    objects, bad = [], []
    for number, element in enumerate(root.findall("object"), start=1):
        name = one_line(element.findtext("name") or "")
        try:
            box = _read_box(element, width, height)
            if not name:
                raise ValueError("it has no name")
        except ValueError as error:
            bad.append(f"{path}: object {number}{f' ({name})' if name else ''}: {error}")
        else:
            objects.append(Object(number, name, box, (element.findtext("difficult") or "").strip() == "1"))
    return Annotation(path, objects, bad, (width, height), _read_size(root), hashlib.sha256(content).hexdigest())


def _read_box(element: ET.Element, width: int, height: int) -> tuple[float, float, float, float]:
    """Return x1, y1, x2, y2 in pixels; raise ValueError with what is wrong."""
    corners = []
    for name in CORNERS:
        text = element.findtext(f"bndbox/{name}")
        try:
            corners.append(float(text or ""))
        except ValueError:
            raise ValueError(f"its bndbox has no {name}" if text is None else f"{name} is no number: {text}") from None
    said = ", ".join(f"{name} {corner:g}" for name, corner in zip(CORNERS, corners, strict=True))
    xmin, ymin, xmax, ymax = corners
    if not (xmin <= xmax and ymin <= ymax):  # NaN neither
        raise ValueError(f"its box has no area: {said}")
    x1, y1, x2, y2 = max(xmin - 1, 0.0), max(ymin - 1, 0.0), min(xmax, float(width)), min(ymax, float(height))
    beyond = max(x1 - (xmin - 1), y1 - (ymin - 1), xmax - x2, ymax - y2)
    if beyond > 1 or x2 <= x1 or y2 <= y1:
        raise ValueError(f"its box is outside the picture of {width} x {height}: {said}")
    return x1, y1, x2, y2


def _read_size(root: ET.Element) -> tuple[int, int] | None:
    try:
        width, height = (int(float(root.findtext(f"size/{name}") or "")) for name in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width and height else None  # some tools write 0 x 0
