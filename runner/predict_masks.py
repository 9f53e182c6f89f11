"""Tell the class of each pixel of pictures, with nothing but a checkpoint and the YAML that it was trained by.

In the folder that one is in: `predictions/`, a mask for each picture, of its size, as PNG: each pixel is the number of its
class, with a palette of colours; where there are two classes it is 0 or 255. `predictions/overlays/`, the pictures with
their masks; `predictions.csv`, with which shares of a picture's pixels the classes have:

    file,mask,share_background,share_membrane,error
    pictures/1.png,predictions/1_1.png,0.7875,0.2125,
    pictures/2.png,,,,pictures/2.png cannot be read: it is no picture
"""

import csv
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning import Callback
from torch import Tensor

from callbacks.segmentation import class_colors, overlay
from datamodules.pictures import read_picture
from runner.errors import InputError
from runner.files import write_whole
from runner.picture_files import PictureFiles

TABLE, FOLDER, OVERLAYS = Path("predictions.csv"), Path("predictions"), Path("predictions/overlays")


class UnmaskedFiles(PictureFiles):
    """Pictures from files for a segmenter, a batch at a time; one by one if they are not scaled to one size.

    (What pads a picture to the batch's size would change what is said at its edge; and large ones take memory.)
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        # height and width of each picture as the network gets it
        self.sizes: list[tuple[int, int]] = []

    @property
    def batch_size(self) -> int:
        """Pictures in a batch."""
        return super().batch_size if getattr(self.data, "image_size", None) else 1

    def batch(self, images: list[Tensor]) -> tuple[Tensor | list[Tensor], None]:
        """Make a batch of what was read: images (C, h, w) uint8."""
        sizes = [tuple(image.shape[1:]) for image in images]
        self.sizes += sizes
        return torch.stack(images) if len(set(sizes)) == 1 else images, None


class WriteMasks(Callback):
    """Writes masks and overlays a batch at a time: those of all pictures together could fill the memory.

    Args:
        pictures: what is predicted.

    Attributes:
        told: of each picture so far, its mask's file and each class's share of the pixels.
        classes: their names, or numbers.
    """

    def __init__(self, pictures: UnmaskedFiles):
        self.pictures = pictures
        self.told: dict[Path, tuple[Path, list[float]]] = {}

    def on_predict_start(self, trainer, pl_module) -> None:
        """Learn how many classes there are; a single output tells two apart."""
        self.classes = self.pictures.classes or [str(k) for k in range(max(pl_module.num_classes, 2))]

    def on_predict_batch_end(
        self, trainer, pl_module, outputs: Tensor, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write classes (B, H, W), of which what pads a picture is cut off."""
        done = slice(len(self.told), len(self.told) + len(outputs))  # more may have been read
        pictures = zip(self.pictures.read[done], self.pictures.sizes[done], outputs, strict=True)
        try:
            OVERLAYS.mkdir(parents=True, exist_ok=True)
            for path, (h, w), classes in pictures:
                self._write(path, classes[:h, :w].to("cpu", torch.uint8).numpy())
        except OSError as error:
            raise InputError(
                f"{Path(error.filename or FOLDER).absolute()} cannot be written: {error.strerror}"
            ) from None

    def _write(self, path: Path, classes: np.ndarray) -> None:
        """Write one picture's classes (h, w) uint8."""
        image, number = read_picture(path), f"{len(self.told) + 1:0{len(str(len(self.pictures.paths)))}d}"
        size = image.shape[1::-1]
        classes = np.array(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))
        shares = np.bincount(classes.ravel(), minlength=len(self.classes)) / classes.size  # (K,)
        if is_binary := len(self.classes) == 2:
            mask = Image.fromarray(255 * classes)
        else:
            mask = Image.fromarray(classes)
            mask.putpalette(class_colors(256).tobytes())
        drawn, colors = Image.fromarray(overlay(image, classes)), class_colors(len(self.classes)).tolist()
        there = {self.classes[k]: tuple(colors[k]) for k in shares.nonzero()[0].tolist() if k}
        name = f"{number}_{path.stem}.png"
        mask.save(FOLDER / name)
        (drawn if is_binary else with_legend(drawn, there)).save(OVERLAYS / name)
        self.told[path] = (FOLDER / name, shares.tolist())


def tell_masks(masks: WriteMasks) -> None:
    """Print which shares of each picture the classes have, the largest first, and write the table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "mask", *(f"share_{name}" for name in masks.classes), "error"])
    for path in masks.pictures.paths:
        if path in masks.told:
            file, shares = masks.told[path]
            writer.writerow([path, file, *shares, ""])  # floats with all their digits
        else:
            writer.writerow([path, *[""] * (1 + len(masks.classes)), masks.pictures.errors[path]])
    try:
        write_whole(TABLE, text.getvalue().encode(errors="surrogateescape"))  # a file's name need not be UTF-8
    except OSError as error:
        raise InputError(f"{TABLE.absolute()} cannot be written: {error.strerror}") from None
    finally:
        background, *foreground = masks.classes
        width = max(len(str(path)) for path in masks.told)
        for path, (_, shares) in masks.told.items():
            found = sorted(zip(shares[1:], foreground, strict=True), key=lambda pair: -pair[0])
            said = ", ".join(f"{name} {100 * share:.1f} %" for share, name in found if share >= 0.0005)
            print(f"{path!s:{width}}  {said or f'nothing but {background}'}".encode(errors="replace").decode())
    print(f"\nmasks: {FOLDER.absolute()}\noverlays: {OVERLAYS.absolute()}\nshares of all classes: {TABLE.absolute()}")


def with_legend(picture: Image.Image, colors: dict[str, tuple[int, int, int]]) -> Image.Image:
    """Return the picture with the names of its classes below it, beside their colours."""
    if picture.width < 400:  # too narrow for words
        height = max(round(picture.height * 400 / picture.width), 1)
        picture = picture.resize((400, height), Image.Resampling.NEAREST)
    size = max(14, round(picture.width / 50))
    font, places, x, y = ImageFont.load_default(size), [], size // 2, picture.height + size // 2
    for name in colors:
        width = 1.5 * size + font.getlength(name)
        if places and x + width > picture.width:
            x, y = size // 2, y + round(1.5 * size)
        places.append((x, y))
        x += round(width + size)
    whole = Image.new("RGB", (picture.width, y + round(1.5 * size) if colors else picture.height), "white")
    whole.paste(picture)
    canvas = ImageDraw.Draw(whole)
    for (x, y), (name, color) in zip(places, colors.items(), strict=True):
        canvas.rectangle((x, y, x + size, y + size), fill=color)
        canvas.text((x + 1.5 * size, y + size / 2), name, fill="black", font=font, anchor="lm")
    return whole
