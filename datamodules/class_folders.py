"""Folders of pictures, one for each class, in one for each part: `train/<class>/*.jpg`, `val/<class>/*.jpg`, `test/...`."""

import lzma
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from datamodules.files import data_dir
from runner.errors import InputError, did_you_mean, one_line
from runner.files import PICTURE_SUFFIXES, files_below

PARTS = ("train", "val", "test")
Found = dict[str, dict[str, list[Path]]]  # part -> class -> files
LAYOUT = "train/<class>/*.jpg and val/<class>/*.jpg"


def find_classes(folder: Path, url: str | None = None, download_error: str = "") -> Found:
    """Return the files of every class of every part there is, sorted; `train` tells which classes there are.

    Args:
        folder: with a folder for each part, and in these one for each class.
        url: where it was to be downloaded from, and `download_error`, why it could not be.

    Raises:
        InputError: a folder is missing, or of a class that train does not have.
    """
    if not folder.is_dir():
        if url:
            reason = download_error or "no download was tried"
            raise InputError(f"no {folder}, and {url} could not be had ({reason}): put {LAYOUT} into {folder}")
        names = [p.name for parent in {folder.parent, data_dir()} if parent.is_dir() for p in parent.glob("*/")]
        raise InputError(f"there is no folder {folder}, with {LAYOUT} in it{did_you_mean(folder.name, names)}")
    names = [p.name for p in folder.glob("*/")]
    if "train" not in names:
        raise InputError(f"{folder} has no train folder: expected {LAYOUT} in it{did_you_mean('train', names)}")
    if "val" not in names:
        raise InputError(
            f"{folder} has no val folder, to choose the best epoch by: move a fifth of the pictures from "
            f"train/<class> to val/<class>{did_you_mean('val', {*names} - {'train', 'test'})}"
        )
    ignored: Counter[str] = Counter()
    found = {part: _find_classes(folder / part, ignored) for part in PARTS if part in names}
    classes = list(found["train"])
    if len(classes) < 2:
        has = f"one class only, {classes[0]}" if classes else "no folders, one for each class"
        raise InputError(f"{folder / 'train'} has {has}: expected {LAYOUT} in {folder}")
    for part, its_classes in found.items():
        if not its_classes:
            raise InputError(f"{folder / part} has no folders, one for each class: {some(classes)}")
        for name in its_classes:
            if name not in classes:
                raise InputError(f"{folder / part / name}: train has no such class{did_you_mean(name, classes)}")
        if absent := [name for name in classes if name not in its_classes]:
            warnings.warn(f"{folder / part} has no {some(absent)}, which train has", stacklevel=3)
    if ignored:
        kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in ignored.most_common(5))
        warnings.warn(f"{folder}: in no class's folder, or no pictures by their names: {kinds}", stacklevel=3)
    return found


def leave_out(bad: dict[Path, str], found: Found, folder: Path, on_bad_image: str) -> None:
    """Take the files that cannot be read out of `found`, with a warning.

    Raises:
        InputError: there are some, and `on_bad_image` is `stop`; or nothing is left of a class.
    """
    if bad:
        named = some(f"{path} ({reason})" for path, reason in bad.items())
        message = f"{len(bad):,} of {len(files_of(found)):,} pictures cannot be read: {named}"
        if on_bad_image == "stop":
            raise InputError(f"{message}; mend or remove them, or leave them out: --data.on_bad_image skip")
        warnings.warn(f"{message}; left out", stacklevel=3)
    for part, classes in found.items():
        for name in classes:
            classes[name] = [file for file in classes[name] if file not in bad]
            if not classes[name]:
                raise InputError(
                    f"{folder / part / name} has no picture that can be read ({', '.join(PICTURE_SUFFIXES)}): "
                    "put some there, or remove the folder"
                )


def warn_of_leaks(found: Found, digests: dict[Path, str]) -> None:
    """Warn of pictures to validate or test on that are trained on."""
    known = {digests[file] for file in files_of({"train": found["train"]})}
    for part in PARTS[1:]:
        if leaks := [file for file in files_of({part: found.get(part, {})}) if digests[file] in known]:
            warnings.warn(f"{len(leaks)} of the pictures in {part} are in train, too: {some(leaks)}", stacklevel=3)


def fetch_archive(url: str, folder: Path) -> None:
    """Download a zip or tar, and make the folder in it that holds `train` to `folder`: whole, or not at all.

    Raises:
        OSError, RuntimeError: it cannot be had, or is no such archive.
    """
    from torchvision.datasets.utils import download_url  # a second to import: only if it is needed

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        archive, unpacked = Path(temporary, "archive"), Path(temporary, "unpacked")
        download_url(url, temporary, archive.name)
        try:
            if zipfile.is_zipfile(archive):
                zipfile.ZipFile(archive).extractall(unpacked)
            else:
                with tarfile.open(archive) as tar:
                    tar.extractall(unpacked, filter="data")
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError):
            raise RuntimeError("what came is no zip or tar, or not all of it") from None
        inside = [unpacked, *sorted(unpacked.glob("*/"))]
        found = [path for path in inside if (path / "train").is_dir()]
        if not found:
            raise RuntimeError(f"the archive has no train folder; in it: {some(p.name for p in unpacked.iterdir())}")
        found[0].rename(folder)


def _find_classes(folder: Path, ignored: Counter) -> dict[str, list[Path]]:
    """Return the picture files of each class, sorted; count others by suffix in `ignored`, hidden ones apart."""
    classes: dict[str, list[Path]] = {}
    ignored.update(p.suffix for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    for class_folder in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if not class_folder.name.isprintable():
            raise InputError(f"{folder} has a class whose name cannot be printed: {class_folder.name!a}")
        files = files_below(class_folder)
        classes[class_folder.name] = sorted(file for file in files if file.suffix.lower() in PICTURE_SUFFIXES)
        ignored.update(file.suffix for file in files if file.suffix.lower() not in PICTURE_SUFFIXES)
    return classes


def files_of(found: Found) -> list[Path]:
    """Return all files, part by part and class by class."""
    return [file for classes in found.values() for files in classes.values() for file in files]


def some(names) -> str:
    """Return the first three, and how many more there are."""
    names = [one_line(name) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
