"""Proposals of many pictures: found in several processes, each picture's once, and kept in files.

Shapes: H height, W width of a picture; P proposals.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from datamodules.files import data_dir
from datamodules.image_folder import available_cpus
from runner.errors import InputError

FEW = 64  # pictures are not worth other processes, which take seconds to start

Image = np.ndarray | Callable[[], np.ndarray]  # (H, W, 3) uint8, or what reads it


def find_proposals(images: Sequence[Image], search: Callable, keys: Sequence[str] | None = None) -> list[np.ndarray]:
    """Return each picture's proposals (P, 4), with as many processes as there are CPUs.

    They are kept in `<DATA_DIR>/proposals/<settings>/<2 digits>/<key>.npy`, a picture's as soon as they are found:
    nothing is computed again in the next run, nor if this one is stopped.

    Args:
        images: (H, W, 3) uint8, or functions that read them, for instance `functools.partial(read_picture, path)`; they
            are sent to other processes, which a lambda cannot be.
        search: the method, from a picture (H, W, 3) to boxes (P, 4); its `settings` are a dict of plain values, which
            tells it apart from others.
        keys: of the pictures, `digest` or what else tells different ones apart; a picture whose proposals are kept
            is then not read.

    Raises:
        InputError: `search` has no settings.
    """
    if not isinstance(getattr(search, "settings", None), dict):
        raise InputError(
            f"proposals: {getattr(search, '__name__', type(search).__name__)} is no method with settings; there is "
            "lit_models.selective_search.SelectiveSearch"
        )
    settings = json.dumps(search.settings, sort_keys=True)
    folder = data_dir() / "proposals" / hashlib.sha256(settings.encode()).hexdigest()[:12]
    if keys is None:
        keys = [digest(image) if isinstance(image, np.ndarray) else None for image in images]
    known = {key: kept(folder, key) for key in keys if key}
    jobs = {}  # of pictures that are the same, one
    for number, (image, key) in enumerate(zip(images, keys, strict=True)):
        if known.get(key) is None:
            jobs.setdefault(key or number, (image, key))
    found, problem = dict(known), ""
    done = tqdm(_map(partial(_find, search=search, folder=folder), list(jobs.values())), "proposals", len(jobs),
                leave=False, disable=None, delay=2, unit=" pictures")  # fmt: skip
    for name, (boxes, not_written) in zip(jobs, done, strict=True):
        found[name], problem = boxes, problem or not_written
    if problem:
        warnings.warn(f"proposals cannot be kept in {folder}: {problem}", stacklevel=2)
    return [found[key or number] for number, key in enumerate(keys)]


def digest(image: np.ndarray) -> str:
    """Return the SHA-256 of a picture's pixels and shape."""
    return hashlib.sha256(f"{image.shape} {image.dtype} ".encode() + image.tobytes()).hexdigest()


def kept(folder: Path, key: str) -> np.ndarray | None:
    """Return the proposals of a picture that were found earlier; None if there are none, or the file is damaged."""
    try:
        with open(folder / key[:2] / f"{key}.npy", "rb") as file:
            boxes = np.lib.format.read_array(file, allow_pickle=False)
    except Exception:  # in as many ways as a file can be damaged
        return None
    return boxes if boxes.ndim == 2 and boxes.shape[1] == 4 and boxes.dtype == np.float32 else None


def _find(job: tuple[Image, str | None], search: Callable, folder: Path) -> tuple[np.ndarray, str]:
    """Return a picture's proposals, and why they could not be kept."""
    image, key = job
    image = image() if callable(image) else image
    if key is None:
        key = digest(image)
        if (boxes := kept(folder, key)) is not None:
            return boxes, ""
    boxes = search(image)
    file = folder / key[:2] / f"{key}.npy"
    temporary = file.with_name(f".{file.name}.{os.getpid()}")  # another run may write the same file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as opened:
            np.save(opened, boxes)
        os.replace(temporary, file)
    except OSError as error:
        return boxes, error.strerror or str(error)
    finally:
        with contextlib.suppress(OSError):  # moved, or never there
            temporary.unlink()
    return boxes, ""


def _map(function: Callable, jobs: list) -> Iterator:
    """Like `map`, in processes if there are jobs enough."""
    workers = min(available_cpus(), len(jobs))
    if workers < 2 or len(jobs) < FEW:
        yield from map(function, jobs)
        return
    # OpenCV's threads do not outlive a fork; and there are as many processes as CPUs
    with ProcessPoolExecutor(workers, initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        yield from pool.map(function, jobs, chunksize=4)  # when stopped, it does not compute the rest first
