"""Training pictures a second, from files to normalised batches, three ways, in turns: A B C A B C ... in one process.

A  this project's: datamodules.image_folder
B  the ordinary way: torchvision's ImageFolder, PIL, and v2 transforms down to Normalize, in a DataLoader
C  torchvision at its fastest: PIL, uint8 tensors before they are cut, and whole batches normalised, as A's are

(A decodes a JPEG at half its size or less where the smallest crop keeps pixels enough even so; so it is with large ones.)

All of them decode, cut out a RandomResizedCrop of 224 (antialiased), flip, and make batches of 32, with the same number
of worker processes. A and C then normalise whole batches, which in training happens on the device. The pictures are
hymenoptera's, in `DATA_DIR` (default: `data`), else generated ones; and the same, enlarged to what cameras make.

    python benchmarks/image_folder_speed.py
    python benchmarks/image_folder_speed.py path/to/pictures --workers 0 --rounds 9
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from datamodules.files import data_dir
from datamodules.image_folder import IMAGENET, ImageFolder, available_cpus
from runner.errors import InputError

Way = tuple[DataLoader, Callable[[Tensor], Tensor]]  # the second makes a batch what the network gets
BATCH, SIZE = 32, 224
WAYS = {"A": "this project", "B": "torchvision, ordinary", "C": "torchvision, uint8"}
LONG_SIDES = {1024: 1000, 4000: 100}  # of the enlarged pictures, and how many of them an epoch has


def ours(folder: Path, workers: int, pictures: int) -> Way:
    """A: the data module's own loader."""
    data = ImageFolder(str(folder), image_size=SIZE, batch_size=BATCH, num_workers=workers)
    data.setup()
    data.train_set.pairs = repeated(data.train_set.pairs, pictures)
    return data.train_dataloader(), lambda images: data.normalized(images, torch.float32)


def ordinary(folder: Path, workers: int, pictures: int) -> Way:
    """B: PIL pictures, and floats from the workers."""
    steps = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return theirs(folder, workers, pictures, transform=v2.Compose([*steps, v2.Normalize(*IMAGENET)])), lambda x: x


def fastest(folder: Path, workers: int, pictures: int) -> Way:
    """C: uint8 tensors. (Its decode_image is faster than PIL, and deprecated since 0.29.)"""
    steps = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()])
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return theirs(folder, workers, pictures, transform=steps), lambda images: images.float().sub_(mean).div_(std)


def theirs(folder: Path, workers: int, pictures: int, **arguments) -> DataLoader:
    """Return a DataLoader of torchvision's ImageFolder."""
    dataset = torchvision.datasets.ImageFolder(folder / "train", **arguments)
    dataset.samples = repeated(dataset.samples, pictures)
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def repeated(items: list, length: int) -> list:
    """Return the items over and over, until there are so many."""
    return (items * (length // len(items) + 1))[:length]


def epoch_seconds(loader: DataLoader, normalize: Callable[[Tensor], Tensor]) -> float:
    """Go through an epoch, to the floats that a network gets, and return the seconds."""
    start = time.perf_counter()
    for images, _ in loader:
        images = normalize(images)
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert images.is_floating_point()
    return time.perf_counter() - start


def measure(name: str, folder: Path, pictures: int, workers: int, rounds: int) -> dict[str, list[float]]:
    """Return pictures a second of each way, a value for each round; an epoch of each warms up."""
    loaders = {way: make(folder, workers, pictures) for way, make in zip("ABC", (ours, ordinary, fastest), strict=True)}
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(rounds + 1):
        for way, loader in loaders.items():
            rates[way].append(pictures / epoch_seconds(*loader))
        told = "  ".join(f"{way} {values[-1]:,.0f}" for way, values in rates.items())
        print(f"{name}: round {i} of {rounds}: {told} pictures a second{'' if i else ' (does not count)'}", flush=True)
    return {way: values[1:] for way, values in rates.items()}


def enlarged(source: Path, folder: Path, long_side: int, pictures: int) -> Path:
    """Write the training pictures, so many of them at most, with a longer side of so many pixels; return the folder."""
    paths = sorted(source.glob("train/*/*"))
    for path in paths[:: max(1, -(-len(paths) // pictures))]:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        size = [round(side * long_side / max(image.size)) for side in image.size]
        for part in ("train", "val"):  # a data module wants to validate
            target = folder / part / path.parent.name / path.with_suffix(".jpg").name
            target.parent.mkdir(parents=True, exist_ok=True)
            if part == "train":
                image.resize(size, Image.Resampling.BICUBIC).save(target, quality=92)
            elif not any(target.parent.iterdir()):
                image.save(target)
    return folder


def generated(folder: Path) -> Path:
    """Write 2 x 100 JPEGs of 340 x 256 pixels with some of a photograph's detail, and a few to validate on."""
    random = np.random.default_rng(0)
    for part, n in (("train", 100), ("val", 2)):
        for kind in ("one", "other"):
            (folder / part / kind).mkdir(parents=True)
            for i in range(n):
                layers = [random.normal(0, 28, (34 // k, 25 // k, 3)) for k in (1, 4)]
                layers = [Image.fromarray(np.clip(layer + 128, 0, 255).astype(np.uint8)) for layer in layers]
                image = sum(np.asarray(layer.resize((340, 256), Image.Resampling.BICUBIC), float) for layer in layers)
                image = np.clip(image / 2 + random.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / part / kind / f"{i}.jpg", quality=90)
    return folder


def table(name: str, rates: dict[str, list[float]]) -> Iterator[str]:
    """Yield the lines of a table: each way, and what A is to the others in the same round."""
    for way, what in WAYS.items():
        yield f"{name:>12}  {way}  {what:22}  {spread(rates[way], ',.0f')}"
    for other in list(WAYS)[1:]:
        ratios = [a / b for a, b in zip(rates["A"], rates[other], strict=True)]
        yield f"{name:>12}  A / {other:21}  {spread(ratios, '.2f')}"


def spread(values: list[float], digits: str) -> str:
    """Return the median, and the least and the most."""
    return f"{statistics.median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def main(argv: list[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="with train/<class>/*.jpg and val/<class>/*.jpg")
    parser.add_argument("--workers", type=int, default=available_cpus(), help="processes (default: the CPUs)")
    parser.add_argument("--rounds", type=int, default=7, help="that count (default: 7)")
    parser.add_argument("--pictures", type=int, default=1000, help="in an epoch, at most (default: 1000)")
    arguments = parser.parse_args(argv)
    found, lines = data_dir() / "hymenoptera", []
    torch.set_num_threads(1)  # the workers have one, too; more of them only wait for each other
    try:
        if min(arguments.rounds, arguments.pictures) < 1:
            raise InputError("--rounds and --pictures start at 1")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(arguments.folder or (found if found.is_dir() else generated(Path(temporary, "generated"))))
            work = {"as they are": (folder, arguments.pictures)}
            for long_side, pictures in LONG_SIDES.items():
                pictures = min(pictures, arguments.pictures)
                print(f"enlarging to {long_side} pixels", flush=True)
                work[f"{long_side} pixels"] = (
                    enlarged(folder, Path(temporary, str(long_side)), long_side, pictures),
                    pictures,
                )
            for name, (path, pictures) in work.items():
                lines += table(name, measure(name, path, pictures, arguments.workers, arguments.rounds))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\npictures a second, with {arguments.workers} workers on {os.cpu_count()} CPUs: median (least to most)")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
