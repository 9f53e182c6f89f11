"""Training pictures with masks a second, from files to batches, two ways, in turns: A B A B ... in one process.

A  this project's: datamodules.carvana, which augments with albumentations
B  torchvision's: PIL decodes, transforms.v2 does the rest to tv_tensors.Image and Mask, in a DataLoader

Both decode, scale (antialiased; masks to the nearest pixel), rotate by up to 35 degrees (bilinear; masks nearest), flip
left to right half of the time and upside down a tenth, and make batches of 16, uint8 pictures and int64 masks, with the
same number of worker processes. (A decodes a JPEG at half its size or less where that leaves pixels enough.)

The pictures are drawn, as large as Carvana's (1918 x 1280, JPEG and GIF), and scaled to 160 x 240; and the membranes of
`DATA_DIR/membrane` (512 x 512, PNG), if they are there, scaled to 256 x 256.

    python benchmarks/masks_speed.py
    python benchmarks/masks_speed.py --workers 0 --rounds 9
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from datamodules.carvana import ImageMasks
from datamodules.files import data_dir
from datamodules.image_folder import available_cpus
from datamodules.mask_files import IGNORE, Pair
from runner.errors import InputError

BATCH = 16
WAYS = {"A": "this project", "B": "torchvision v2"}
AUGMENT = [{"Rotate": {"limit": 35, "p": 1.0}}, "HorizontalFlip", {"VerticalFlip": {"p": 0.1}}]


class Theirs(Dataset):
    """B: pictures (3, h, w) uint8 and classes (h, w) uint8."""

    def __init__(self, pairs: list[Pair], size: tuple[int, int]):
        self.pairs = pairs
        self.transform = v2.Compose([
            v2.Resize(size, antialias=True),
            v2.RandomRotation(35, v2.InterpolationMode.BILINEAR, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomVerticalFlip(0.1),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = tv_tensors.Image(v2.functional.pil_to_tensor(Image.open(self.pairs[i].image).convert("RGB")))
        mask = tv_tensors.Mask(torch.from_numpy((np.asarray(Image.open(self.pairs[i].mask)) > 0).astype(np.uint8)))
        return self.transform(image, mask)


def ours(images: str, masks: str, size: tuple[int, int], workers: int, pictures: int) -> DataLoader:
    """A: the data module's own loader, of so many pictures."""
    data = ImageMasks(
        images, masks, val_size=1, image_size=size, augment=AUGMENT, batch_size=BATCH, num_workers=workers
    )
    data.setup()
    pairs = data.train_set.pairs
    data.train_set.pairs = (pairs * (pictures // len(pairs) + 1))[:pictures]
    return data.train_dataloader()


def theirs(pairs: list[Pair], size: tuple[int, int], workers: int) -> DataLoader:
    """B: an ordinary loader of the same pictures."""
    return DataLoader(Theirs(pairs, size), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def epoch_seconds(loader: DataLoader, size: tuple[int, int]) -> float:
    """Go through an epoch, and return the seconds."""
    start = time.perf_counter()
    for images, masks in loader:
        masks = masks.long()
        assert (images.shape[1:], images.dtype, masks.shape[1:]) == ((3, *size), torch.uint8, size)
    return time.perf_counter() - start


def measure(name: str, images: str, masks: str, size: tuple[int, int], arguments) -> dict[str, list[float]]:
    """Return pictures a second of each way, a value for each round; an epoch of each warms up."""
    loader = ours(images, masks, size, arguments.workers, arguments.pictures)
    loaders = {"A": loader, "B": theirs(loader.dataset.pairs, size, arguments.workers)}
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(arguments.rounds + 1):
        for way, loader in loaders.items():
            rates[way].append(arguments.pictures / epoch_seconds(loader, size))
        told = "  ".join(f"{way} {values[-1]:,.0f}" for way, values in rates.items())
        counts = "" if i else " (does not count)"
        print(f"{name}: round {i} of {arguments.rounds}: {told} pictures a second{counts}", flush=True)
    return {way: values[1:] for way, values in rates.items()}


def draw(folder: Path, pictures: int, width: int, height: int) -> None:
    """Write cars, of a kind: JPEGs with some of a photograph's detail, and GIFs of two colours."""
    rng = np.random.default_rng(0)
    for i in range(pictures):
        layers = [rng.normal(128, 40, (height // k, width // k, 3)).clip(0, 255).astype(np.uint8) for k in (4, 64)]
        layers = [Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC) for layer in layers]
        box = [
            int(v) for v in (*rng.uniform(0.1, 0.4, 2) * (width, height), *rng.uniform(0.6, 0.9, 2) * (width, height))
        ]
        image, mask = Image.blend(*layers, 0.7), Image.new("P", (width, height))
        mask.putpalette([0, 0, 0, 255, 255, 255])
        ImageDraw.Draw(image).ellipse(box, fill="red")
        ImageDraw.Draw(mask).ellipse(box, fill=1)
        image.save(folder / f"{i}.jpg", quality=92)
        mask.save(folder / f"{i}_mask.gif")


def spread(values: list[float], digits: str) -> str:
    """Return the median, and the least and the most."""
    return f"{statistics.median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def main(argv: list[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=available_cpus(), help="processes (default: the CPUs)")
    parser.add_argument("--rounds", type=int, default=7, help="that count (default: 7)")
    parser.add_argument("--pictures", type=int, default=160, help="in an epoch (default: 160)")
    parser.add_argument("--width", type=int, default=1918, help="of the pictures that are drawn (default: 1918)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # the workers have one, too; more of them only wait for each other
    lines = []
    try:
        if min(arguments.rounds, arguments.pictures, arguments.width) < 1 or arguments.workers < 0:
            raise InputError("--rounds, --pictures and --width start at 1, --workers at 0")
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder), min(arguments.pictures, 32) + 1, arguments.width, arguments.width * 1280 // 1918)
            work = {"drawn": (f"{folder}/*.jpg", f"{folder}/{{}}_mask.gif", (160, 240))}
            if (membrane := data_dir() / "membrane").is_dir():
                work["membrane"] = (f"{membrane}/image/*.png", f"{membrane}/label/{{}}.png", (256, 256))
            for name, files in work.items():
                rates = measure(name, *files, arguments)
                lines += [f"{name:>9}  {way}  {what:15} {spread(rates[way], ',.0f')}" for way, what in WAYS.items()]
                ratios = [a / b for a, b in zip(rates["A"], rates["B"], strict=True)]
                lines.append(f"{name:>9}  A / {'B':15} {spread(ratios, '.2f')}")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\npictures a second, with {arguments.workers} workers on {os.cpu_count()} CPUs: median (least to most)")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
