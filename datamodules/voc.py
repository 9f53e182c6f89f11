"""Pictures with boxes in Pascal VOC's layout: `JPEGImages/*.jpg`, `Annotations/*.xml`, `ImageSets/Main/train.txt`.

Shapes: B batch; H, W height and width of the batch's largest picture, h, w of one picture; N objects, P proposals.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.class_folders import PARTS, some, warn_of_leaks
from datamodules.detections import BOXES, Detections, Sample, channel_values, collate, pad, read_scaled
from datamodules.files import data_dir, download
from datamodules.image_folder import IMAGENET, EndlessShuffle, check_arguments, make_loader
from datamodules.pictures import (
    check_pictures,
    make_augmentation,
    require_picture,
)
from datamodules.voc_annotations import Annotation, find_pictures, picture_size, read_annotations, read_names
from runner.errors import InputError, did_you_mean

LAYOUT = "Annotations/*.xml, JPEGImages/*.jpg and ImageSets/Main/train.txt, val.txt, test.txt"
# Pascal VOC's own, in the order of their labels
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class VOC(LightningDataModule):
    """Pictures in which objects are to be found: Pascal VOC itself, or your own in its layout.

    Every picture and annotation is read once before anything is trained. Without `ImageSets/Main/test.txt`, val is
    tested, and the receipt says so: the number is then of pictures that the best epoch was chosen by.

    A batch is (images, targets). From the loader, images is a list of B uint8 tensors (3, h, w); on the device it is a
    normalised tensor (B, 3, H, W), each picture in the upper left corner, zeros beyond it. targets is a list of B dicts:
    `boxes` (N, 4) float32, x1, y1, x2, y2 in pixels of the picture that the network gets; `labels` (N,) int64;
    `difficult` (N,) bool; `size` (h, w); with `proposals`, `proposals` (P, 4) float32, too. N may be 0.

    A picture's augmentation is drawn from (seed, epoch, picture): it is the same with any number of workers, and in a
    run that was stopped and resumed.

    Args:
        folder: a path; if it is relative and not there, it is looked for below `DATA_DIR` (default: `data`). None:
            `VOCdevkit/VOC<year>`.
        classes: names, in the order of their labels; None: with `year` Pascal VOC's 20, else those in the annotations of
            train, sorted.
        year: of Pascal VOC, which is downloaded to `DATA_DIR` (2007: 0.9 GB, 2012: 2 GB, whose test set is not public)
            if it is not there.
        image_size: pixels that a picture's shorter side is scaled to.
        max_size: pixels of the longer side at most, for which the shorter gets less; None: 5/3 of image_size.
        augment: albumentations' transforms for training, each `Name` or `{Name: {argument: value}}`. They get the
            scaled picture and must leave it uint8; its size may change. None: HorizontalFlip. An empty list: none.
            Boxes are cut at the picture's edge, and left out where less than 1 pixel is left of them.
        normalize: mean and standard deviation of red, green and blue, of pixels in [0, 1]; None leaves them there.
        batch_size: pictures in a training batch.
        eval_batch_size: pictures in a batch of validation and test.
        num_workers: processes that read pictures, for training and for validation; auto: one for each CPU,
            8 at most, and no more than there are whole batches.
        on_bad_annotation: whether an annotation that cannot be right stops the run, or is left out: a box if it is the
            box that is bad, the picture if it is the file.
        on_bad_image: whether a picture that cannot be read stops the run, or is left out.
        train_difficult: whether to train on objects marked `difficult`, which VOC's protocol leaves out. In val and
            test they are kept and marked.
        proposals: method that proposes boxes (P, 4) for a scaled picture (h, w, 3), such as
            `lit_models.selective_search.SelectiveSearch`; they are augmented with the picture.
    """

    train_set: "Detections | None" = None
    val_set: "Detections"
    test_set: "Detections"
    classes: tuple[str, ...] = ()  # known after `setup`
    source: str
    fingerprint: str
    left_out: dict[str, int]  # how many `pictures`, and how many `boxes` of those that are not

    def __init__(
        self,
        folder: str | None = None,
        classes: list[str] | None = None,
        year: Literal["2007", "2012", 2007, 2012] | None = None,
        image_size: int = 320,
        max_size: int | None = None,
        augment: list[str | dict[str, Any]] | None = None,
        normalize: tuple[tuple[float, float, float], tuple[float, float, float]] | None = IMAGENET,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int | Literal["auto"] = "auto",
        on_bad_annotation: Literal["stop", "skip"] = "stop",
        on_bad_image: Literal["stop", "skip"] = "stop",
        train_difficult: bool = False,
        proposals: Callable | None = None,
    ):
        super().__init__()
        if not folder and not year:
            raise InputError(f"folder or year must be given: where {LAYOUT} are, or which year of Pascal VOC")
        check_arguments(image_size, normalize, batch_size, eval_batch_size, num_workers)
        if max_size is not None and max_size < image_size:
            raise InputError(f"max_size must be at least image_size {image_size}, got {max_size}")
        if classes is not None and (not classes or len({*classes}) < len(classes)):
            raise InputError(f"classes must be different names, at least one, got {classes}")
        steps = ["HorizontalFlip"] if augment is None else augment
        with warnings.catch_warnings(action="ignore"):  # albumentations', of steps that leave boxes where they are
            self.augmentation = make_augmentation(steps, BOXES) if steps else None
        self.official = f"VOCdevkit/VOC{year}" if year else None
        self.folder, self.year, self.download_error = folder or self.official, str(year), ""
        self.image_size, self.max_size = image_size, max_size or image_size * 5 // 3
        self.mean, self.std = normalize or ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.on_bad_annotation, self.on_bad_image = on_bad_annotation, on_bad_image
        self.train_difficult, self.proposals = train_difficult, proposals
        self.given_classes = classes or ([*CLASSES] if year else None)
        self.has_test = True

    @property
    def path(self) -> Path:
        """Where the three folders are, or are unpacked to."""
        path = Path(self.folder).expanduser()
        return path if path.is_dir() else data_dir() / path

    def prepare_data(self) -> None:
        """Download Pascal VOC, if a year is given and it is not there whole; `setup` says what is missing."""
        if self.missing and not self.download_error and self.folder == self.official:
            self.download_error = download(f"Pascal VOC {self.year}", self.path, self._download)

    @property
    def missing(self) -> list[str]:
        """The files in ImageSets/Main that there must be, and are not."""
        # without 2007's test.txt, of a second archive, val would be tested: not what one who gives a year is after
        needed = [*PARTS] if self.year == "2007" and self.folder == self.official else ["train", "val"]
        return [name for name in needed if not self._split_file(name).is_file()]

    def setup(self, stage: str | None = None) -> None:
        """Find the pictures, and read each of them and its annotation once.

        Raises:
            InputError: something is missing, or cannot be used; names the file.
        """
        if self.train_set is not None:
            return
        self._require_folder()
        self.left_out = {"pictures": 0, "boxes": 0}
        self.has_test = self._split_file("test").is_file()
        parts = {part: read_names(self._split_file(part)) for part in PARTS if part != "test" or self.has_test}
        paths = find_pictures(self.path / "JPEGImages", [name for names in parts.values() for name in names])
        digests = self._check_pictures(paths)
        repeated = [
            f"{self._split_file(part)} names {name} more than once"
            for part, names in parts.items()
            for name, count in Counter(names).items()
            if count > 1
        ]
        found = read_annotations(self.path / "Annotations", paths, parts["train"], self.given_classes)
        annotations, self.classes, bad_files, bad_boxes = found
        self._leave_out(repeated + bad_files, bad_boxes)
        if not self.classes:
            raise InputError(f"no picture of {self._split_file('train')} has an object: there is no class to train")
        parts = {part: [n for n in dict.fromkeys(names) if n in annotations] for part, names in parts.items()}
        for part, names in parts.items():
            if not names:
                raise InputError(f"{self._split_file(part)}: none of its pictures can be used")
        warn_of_leaks({part: {"": [paths[name] for name in names]} for part, names in parts.items()}, digests)

        self.source = f"pictures in {self.path}{'' if self.has_test else ' (no test.txt: val is tested)'}"
        content = "".join(
            f"{part} {name} {digests[paths[name]]} {annotations[name].digest}\n"
            for part in parts
            for name in parts[part]
        )
        self.fingerprint = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()
        sets = {
            part: self._detections(part, [(paths[n], digests[paths[n]], annotations[n]) for n in names])
            for part, names in parts.items()
        }
        for dataset in sets.values() if self.proposals else ():
            dataset.find_proposals(self.proposals)
        self.val_set, self.test_set = sets["val"], sets.get("test", sets["val"])
        sets["train"][0]  # what is wrong with the augmentation shows before a run is begun
        self.train_set = sets["train"]

    # -- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Batches of all pictures in a new order, newly augmented, every epoch."""
        return self._loader(self.train_set, self.batch_size, sampler=EndlessShuffle(len(self.train_set)))

    def val_dataloader(self) -> DataLoader:
        """Batches in order."""
        return self._loader(self.val_set, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        """Batches in order."""
        return self._loader(self.test_set, self.eval_batch_size)

    def on_after_batch_transfer(self, batch: tuple[Any, list[dict]], dataloader_idx: int) -> tuple[Tensor, list[dict]]:
        """Turn uint8 pictures (3, h, w) to a batch of normalised floats (B, 3, H, W), on the device."""
        images, targets = batch
        # in older versions of torch, the loader's pinning of memory made lists of tuples
        targets = [{**target, "size": tuple(target["size"])} for target in targets]
        return self.normalized(images, self.trainer.lightning_module.dtype), targets

    def normalized(self, images: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return uint8 pictures (3, h, w) as a batch of normalised floats (B, 3, H, W), zeros beyond each picture."""
        mean, std = (channel_values(values, images[0].device, dtype) for values in (self.mean, self.std))
        return pad([image.to(dtype).sub_(mean).div_(std) for image in images])

    def read_input(self, path: Path) -> Tensor:
        """Read one picture, scaled as in evaluation: (3, h, w) uint8. It needs no `setup`, and no folder.

        Raises:
            PictureError: it cannot be read.
        """
        require_picture(path)
        image = read_scaled(path, *picture_size(path), self.image_size, self.max_size)
        return torch.from_numpy(image).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)

    # -- what receipts and checkpoints say ---------------------------------------------------------------------------

    def describe(self) -> dict:
        """What the receipt says of the data: name, source, sizes, and a fingerprint of every file in its place."""
        said = {"name": type(self).__name__, "source": self.source, "fingerprint": self.fingerprint, **self.sizes}
        said |= {} if self.has_test else {"test_split": "val: there is no ImageSets/Main/test.txt"}
        return said | ({"left_out": dict(self.left_out)} if any(self.left_out.values()) else {})

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints say of the data: what it was, and the names of the classes that the network tells apart."""
        return {"fingerprint": self.fingerprint, "source": self.source, "classes": list(self.classes)}

    @property
    def sizes(self) -> dict[str, int]:
        """Pictures in each set."""
        return {"train": len(self.train_set), "val": len(self.val_set), "test": len(self.test_set)}

    # -- what is there -----------------------------------------------------------------------------------------------

    def _split_file(self, part: str) -> Path:
        return self.path / "ImageSets" / "Main" / f"{part}.txt"

    def _download(self) -> None:
        from torchvision.datasets import VOCDetection  # a second to import: only if it is needed

        for image_set in ("trainval", "test") if self.year == "2007" else ("trainval",):
            VOCDetection(str(data_dir()), year=self.year, image_set=image_set, download=True)

    def _require_folder(self) -> None:
        if not self.missing:
            return
        if self.folder == self.official:
            reason = self.download_error or "no download was tried"
            raise InputError(
                f"Pascal VOC {self.year} is not in {self.path}, whole, and could not be had ({reason}): unpack its "
                f"archives in {data_dir()}, so that there is {self._split_file(self.missing[0])}"
            )
        if not self.path.is_dir():
            names = [p.name for parent in {self.path.parent, data_dir()} if parent.is_dir() for p in parent.glob("*/")]
            hint = did_you_mean(self.path.name, names)
            raise InputError(f"there is no folder {self.path}, with {LAYOUT} in it{hint}")
        raise InputError(f"there is no {self._split_file(self.missing[0])}: expected {LAYOUT} in {self.path}")

    def _check_pictures(self, paths: dict[str, Path]) -> dict[Path, str]:
        """Return the files' digests; take those that cannot be read out of `paths`."""
        checks = dict(zip(paths.values(), check_pictures([*paths.values()]), strict=True))
        if bad := {name: checks[path][1] for name, path in paths.items() if checks[path][1]}:
            message = f"{len(bad):,} of {len(paths):,} pictures cannot be read: "
            message += some(f"{paths[name]} ({reason})" for name, reason in bad.items())
            if self.on_bad_image == "stop":
                raise InputError(f"{message}; mend them, or leave them out: --data.on_bad_image skip")
            warnings.warn(f"{message}; left out", stacklevel=3)
            self.left_out["pictures"] += len(bad)
        for name in bad:
            del paths[name]
        return {path: digest for path, (digest, _) in checks.items()}

    def _leave_out(self, bad_files: list[str], bad_boxes: list[str]) -> None:
        """Stop, or warn, of annotations that cannot be used."""
        if bad := bad_files + bad_boxes:
            message = f"{len(bad_files):,} bad annotation files and {len(bad_boxes):,} bad boxes: {some(bad)}"
            if self.on_bad_annotation == "stop":
                raise InputError(f"{message}; mend them, or leave them out: --data.on_bad_annotation skip")
            warnings.warn(f"{message}; left out", stacklevel=3)
            self.left_out["pictures"] += len(bad_files)
            self.left_out["boxes"] += len(bad_boxes)

    def _detections(self, part: str, found: list[tuple[Path, str, Annotation]]) -> "Detections":
        samples = []
        for path, digest, annotation in found:
            objects = [o for o in annotation.objects if part != "train" or self.train_difficult or not o.difficult]
            boxes = np.array([o.box for o in objects], np.float64).reshape(-1, 4)
            labels = np.array([self.classes.index(o.name) for o in objects], np.int64)
            difficult = np.array([o.difficult for o in objects], bool)
            samples.append(Sample(path, digest, *annotation.size, boxes, labels, difficult))
        return Detections(samples, self.image_size, self.max_size, self.augmentation if part == "train" else None)

    def _loader(self, dataset: "Detections", batch_size: int, **arguments) -> DataLoader:
        return make_loader(dataset, batch_size, self.num_workers, collate_fn=collate, **arguments)
