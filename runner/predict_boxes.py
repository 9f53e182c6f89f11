"""Find objects in pictures, with nothing but a checkpoint and the YAML that it was trained by.

In the folder that one is in: `predictions.json` in COCO's format, with all boxes, in pixels of the picture as it is, and
their scores; `predictions/`, the pictures with the boxes that are likely. From a model that finds masks, too: in the file
as `segmentation`, run lengths at the picture's size (`faster_coco_eval.core.mask.decode`), and drawn.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from faster_coco_eval.core import mask as run_lengths
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from callbacks.detections import COLORS, opacity
from datamodules.pictures import read_picture
from lit_models.mask_rcnn import paste
from runner.errors import InputError
from runner.files import write_whole
from runner.picture_files import PictureFiles

FILE, FOLDER = Path("predictions.json"), Path("predictions")
LIKELY = 0.5  # score of what is drawn and printed


class BoxFiles(PictureFiles):
    """Pictures from files for a detector, a batch at a time; with proposals, if the experiment's data has a method."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sizes: list[tuple[int, int]] = []  # height and width of each picture as the network gets it

    @property
    def proposals(self):
        """The data's method for proposals, or None."""
        return getattr(self.data, "proposals", None)

    def batch(self, images: list[Tensor]) -> tuple[list[Tensor], list[dict]]:
        """Make a batch of what was read: images (3, h, w) uint8 of different sizes, and what is known of them."""
        targets: list[dict] = [{"size": tuple(image.shape[1:])} for image in images]
        for image, target in zip(images, targets, strict=True):
            if self.proposals:
                target["proposals"] = torch.from_numpy(self.proposals(image.permute(1, 2, 0).contiguous().numpy()))
        self.sizes += [target["size"] for target in targets]
        return images, targets


def tell_boxes(pictures: BoxFiles, found: list[dict[str, Tensor]]) -> None:
    """Print what is likely to be in the pictures that were read; draw it; write all that was found."""
    count = max([int(f["labels"].max()) + 1 for f in found if len(f["labels"])], default=0)
    classes = pictures.classes or [str(k) for k in range(count)]
    said = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes, start=1)],
    }
    width = max(len(str(path)) for path in pictures.read)
    try:
        FOLDER.mkdir(exist_ok=True)
        for number, (path, (h, w), f) in enumerate(zip(pictures.read, pictures.sizes, found, strict=True), start=1):
            picture = Image.fromarray(read_picture(path))
            scale = torch.tensor([picture.width / w, picture.height / h] * 2)  # from the network's picture to this one
            boxes = f["boxes"].float().cpu() * scale
            objects = list(zip(boxes.tolist(), f["labels"].tolist(), f["scores"].tolist(), strict=True))
            said["images"].append(
                {"id": number, "file_name": str(path), "width": picture.width, "height": picture.height}
            )
            masks = encode(f["mask_probabilities"].cpu(), boxes, picture.size) if "mask_probabilities" in f else []
            for i, ((x1, y1, x2, y2), label, score) in enumerate(objects):
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                if masks:
                    box |= {"area": int(run_lengths.area(masks[i])), "segmentation": masks[i]}
                about = {
                    "id": len(said["annotations"]) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "score": score,
                }
                said["annotations"].append(about | box)
            likely = [o for o in objects if o[2] >= LIKELY]  # the first ones: they come best first
            for rle, (_, label, _) in reversed(list(zip(masks, likely, strict=False))):
                opaque = 255 * opacity(torch.from_numpy(run_lengths.decode(rle)).bool())  # (H, W)
                picture.paste(COLORS[label % len(COLORS)], mask=Image.fromarray(opaque.astype(np.uint8)))
            draw(picture, likely, classes).save(FOLDER / f"{number:0{len(str(len(found)))}d}_{path.stem}.png")
            told = ", ".join(f"{classes[label]} {score:.2f}" for _, label, score in likely) or "nothing likely"
            print(f"{path!s:{width}}  {told}".encode(errors="replace").decode())
        write_whole(FILE, json.dumps(said).encode())
    except OSError as error:
        raise InputError(f"{Path(error.filename or FILE).absolute()} cannot be written: {error.strerror}") from None
    print(f"\nall boxes: {FILE.absolute()}\ndrawn, from a score of {LIKELY}: {FOLDER.absolute()}", file=sys.stdout)


def encode(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict]:
    """Return COCO's run lengths of masks (M, S, S) pasted at boxes (M, 4) into a picture of `size`, width and height.

    (One after the other: those of a large picture would fill the memory.)
    """
    encoded = []
    for mask, box in zip(masks.split(1), boxes.split(1), strict=True):
        pixels = paste(mask, box, (size[1], size[0]))[0].numpy()  # (H, W)
        rle = run_lengths.encode(np.asfortranarray(pixels, dtype=np.uint8))
        encoded.append({"size": list(rle["size"]), "counts": rle["counts"].decode()})
    return encoded


def draw(picture: Image.Image, objects: list[tuple[list[float], int, float]], classes: list[str]) -> Image.Image:
    """Return the picture with boxes (x1, y1, x2, y2), their classes and scores."""
    if picture.width < 400:  # letters would hide it
        factor = 400 / picture.width
        picture = picture.resize((400, max(round(picture.height * factor), 1)), Image.Resampling.NEAREST)
        objects = [([v * factor for v in box], label, score) for box, label, score in objects]
    line = max(2, round(max(picture.size) / 300))
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(6 * line + 2)
    for (x1, y1, x2, y2), label, score in reversed(objects):  # the best on top
        color, text = COLORS[label % len(COLORS)], f"{classes[label]} {score:.2f}"
        canvas.rectangle((x1, y1, x2, y2), outline=color, width=line)
        left, top, right, bottom = canvas.textbbox((x1, max(y1 - 7 * line - 4, 0)), text, font=font)
        canvas.rectangle((left - line, top - line, right + line, bottom + line), fill=color)
        canvas.text((x1, max(y1 - 7 * line - 4, 0)), text, fill="white", font=font)
    return picture
