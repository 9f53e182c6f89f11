"""Small files of pictures with masks, in the layouts of the datasets: in each picture something bright on something dark."""

from pathlib import Path

import numpy as np
from PIL import Image

VOC_PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, *[64] * (251 * 3), 224, 224, 192]  # of 0 to 3, ..., 255


def blob(number: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return noise (h, w, 3) uint8 with a bright ellipse, and where that is (h, w) bool."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width]
    middle, radii = rng.uniform(0.35, 0.65, 2) * (height, width), rng.uniform(0.15, 0.3, 2) * (height, width)
    inside = ((y - middle[0]) / radii[0]) ** 2 + ((x - middle[1]) / radii[1]) ** 2 < 1
    pixels = rng.integers(0, 60, (height, width, 3)) + 180 * inside[..., None]
    return pixels.astype(np.uint8), inside


def with_palette(classes: np.ndarray, palette: list[int] = VOC_PALETTE) -> Image.Image:
    """Return a picture whose pixels' indices in the palette are (h, w) classes."""
    image = Image.fromarray(classes.astype(np.uint8)).convert("P")
    image.putpalette(palette)
    return image


def write_carvana(root: Path, n: int = 10, height: int = 64, width: int = 96) -> Path:
    """Write Carvana's layout: JPEGs, and GIFs of two colours. Return its folder."""
    folder = root / "carvana"
    for name in ("train_images", "train_masks"):
        (folder / name).mkdir(parents=True)
    for i in range(n):
        pixels, inside = blob(i, height, width)
        Image.fromarray(pixels).save(folder / "train_images" / f"car_{i:02d}.jpg", quality=95)
        mask = with_palette(inside, [0, 0, 0, 255, 255, 255])
        mask.save(folder / "train_masks" / f"car_{i:02d}_mask.gif")
    return folder


def write_membrane(root: Path, n: int = 12, side: int = 64) -> Path:
    """Write the membrane pictures' layout: grey PNGs, and labels in which the membrane is black. Return its folder."""
    folder = root / "membrane"
    for name in ("image", "label"):
        (folder / name).mkdir(parents=True)
    for i in range(n):
        pixels, inside = blob(i, side, side)
        Image.fromarray(255 - pixels[..., 0]).save(folder / "image" / f"{i}.png")
        Image.fromarray(np.where(inside, 0, 255).astype(np.uint8)).save(folder / "label" / f"{i}.png")
    return folder


def write_pets(root: Path, train: int = 8, test: int = 3) -> Path:
    """Write Oxford-IIIT Pet's layout, pictures of different sizes. Return its folder."""
    folder = root / "oxford-iiit-pet"
    for name in ("images", "annotations/trimaps"):
        (folder / name).mkdir(parents=True)
    number = 0
    for part, n in (("trainval", train), ("test", test)):
        lines = []
        for _ in range(n):
            number += 1
            pixels, inside = blob(number, 40 + number, 60)
            trimap = np.where(inside, 1, 2).astype(np.uint8)
            trimap[:-1][inside[1:] != inside[:-1]] = 3
            Image.fromarray(pixels).save(folder / "images" / f"Abyssinian_{number}.jpg")
            Image.fromarray(trimap).save(folder / "annotations" / "trimaps" / f"Abyssinian_{number}.png")
            lines.append(f"Abyssinian_{number} 1 1 1\n")
        (folder / "annotations" / f"{part}.txt").write_text("".join(lines))
    return folder


def write_voc_segmentation(root: Path, train: int = 8, val: int = 3) -> Path:
    """Write Pascal VOC's layout: an object of class 1, 2 or 3 in each picture, with an outline of 255. Return its folder."""
    folder = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    number = 0
    for part, n in (("train", train), ("val", val)):
        names = []
        for _ in range(n):
            number += 1
            pixels, inside = blob(number, 48, 50 + number)
            classes = inside * (1 + number % 3)
            classes[:-1][inside[1:] != inside[:-1]] = 255
            names.append(f"2007_{number:06d}")
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{names[-1]}.jpg")
            with_palette(classes).save(folder / "SegmentationClass" / f"{names[-1]}.png")
        (folder / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
    return folder
