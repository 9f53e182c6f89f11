"""Your own pictures with masks, paired by their names: Carvana's cars (`x.jpg` and `x_mask.gif`), cell membranes, ...

Carvana: https://www.kaggle.com/c/carvana-image-masking-challenge, `train_images/x.jpg`, `train_masks/x_mask.gif`.
"""

import glob
from collections import Counter
from pathlib import Path
from typing import Literal

from datamodules.class_folders import some
from datamodules.files import data_dir
from datamodules.mask_files import IGNORE, NO_CLASS, Coding, Pair
from datamodules.masks import MaskFiles, split
from runner.errors import InputError, did_you_mean

PARTS = ("train", "val", "test")


class ImageMasks(MaskFiles):
    """Pictures in one folder and their masks in another, or in the same.

    Masks are PNG, GIF, TIFF or BMP: grey, with a palette, or of 1 bit. (What writes GIFs may number a palette anew: binary
    masks go by its colours, but for others PNG is the safer.) Of a JPEG, which is not exact, a binary mask is read as
    black or white, whichever is nearer. What cannot be paired, read or understood is one error, before training.

    Args:
        images: pattern of the training pictures, with a star: `train_images/*.jpg`. A relative folder that is not there
            is looked for below `DATA_DIR` (default: `data`).
        masks: pattern of their masks, with `{}` for what the star stands for: `train_masks/{}_mask.gif`.
        val_images: pattern of pictures to validate on; None: some of the training pictures, which `val_size` tells.
        val_masks: pattern of their masks.
        test_images: pattern of pictures to test on; None: some of the training pictures, if `test_size` is given, else
            those of validation are tested, and the receipt says so: the best epoch was chosen by them.
        test_masks: pattern of their masks.
        val_size: how many of the training pictures to validate on, or, below 1, which share of them.
        test_size: how many to test on, or which share; None: none.
        split_seed: of the generator that draws them; not the run's seed.
        classes: names of the classes, the background's first.
        mask_values: `binary`: what is black is background, all else is foreground; `index`: a pixel's grey value, or its
            index in the palette, is the number of its class, 255 of none. None: binary if there are two classes, and all
            grey masks have one value beside black.
        invert: whether in binary masks black is the foreground.
        files: arguments of `MaskFiles`.
    """

    def __init__(
        self,
        images: str,
        masks: str,
        val_images: str | None = None,
        val_masks: str | None = None,
        test_images: str | None = None,
        test_masks: str | None = None,
        val_size: int | float = 0.1,
        test_size: int | float | None = None,
        split_seed: int = 0,
        classes: tuple[str, ...] = ("background", "foreground"),
        mask_values: Literal["binary", "index"] | None = None,
        invert: bool = False,
        **files,
    ):
        super().__init__(**files)
        patterns = (images, masks), (val_images, val_masks), (test_images, test_masks)
        for part, (of_images, of_masks) in zip(PARTS, patterns, strict=True):
            prefix = "" if part == "train" else f"{part}_"
            if bool(of_images) != bool(of_masks):
                raise InputError(f"{prefix}images and {prefix}masks must be given together")
            if of_images and of_images.count("*") != 1:
                raise InputError(
                    f"{prefix}images: expected a pattern with one *, as train_images/*.jpg, got {of_images}"
                )
            if of_masks and of_masks.count("{}") != 1:
                message = f"{prefix}masks: expected a pattern with {{}} for what * stands for, as train_masks/{{}}.png"
                raise InputError(f"{message}, got {of_masks}")
            if of_images and of_images.replace("*", "{}") == of_masks:
                raise InputError(f"{prefix}images and {prefix}masks are the same files: {of_images}")
        if not 2 <= len(classes) <= NO_CLASS or len({*classes}) < len(classes):
            raise InputError(f"classes must be 2 to {NO_CLASS} different names, the background's first, got {classes}")
        if test_images and test_size is not None:
            raise InputError("test_images or test_size, not both")
        binary = (mask_values or ("binary" if len(classes) == 2 else "index")) == "binary"
        if binary and len(classes) != 2:
            raise InputError(f"mask_values: binary masks have 2 classes, not {len(classes)}")
        if invert and not binary:
            raise InputError(
                "invert is for binary masks: with mask_values index, the order of classes tells what is what"
            )
        self.patterns = {part: pattern for part, pattern in zip(PARTS, patterns, strict=True) if pattern[0]}
        self.val_size, self.test_size, self.split_seed = val_size, test_size, split_seed
        self.classes = tuple(classes)
        indices = {k: k for k in range(len(classes))} | {IGNORE: IGNORE}
        by_color = Coding({0: int(invert), 1: int(not invert)}, by_color=True, is_guess=mask_values is None)
        self.coding = by_color if binary else Coding(indices)

    def find(self) -> dict[str, list[Pair]]:
        """Pair the files, and draw what is to be validated or tested on, if it is not given."""
        parts, images, masks, roots = {}, {}, {}, {}
        for part, (of_images, of_masks) in self.patterns.items():
            images[part], roots[of_images] = find_files(of_images, "*")
            masks[part], roots[of_masks] = find_files(of_masks, "{}")
            parts[part] = [
                Pair(star, path, masks[part][star]) for star, path in images[part].items() if star in masks[part]
            ]
        used = {path for pairs in parts.values() for pair in pairs for path in (pair.image, pair.mask)}
        for part, (of_images, of_masks) in self.patterns.items():  # in the same folder, * may stand for masks, too
            for found, what, other, pattern in (
                (masks[part], "masks have no picture", "*", of_images),
                (images[part], "pictures have no mask", "{}", of_masks),
            ):
                if alone := [star for star, path in found.items() if path not in used]:
                    names = (f"{found[star]} (there is no {pattern.replace(other, star)})" for star in alone)
                    raise InputError(f"{len(alone):,} of {len(found):,} {what}: {some(names)}")
        self.source = "files in " + ", ".join(dict.fromkeys(map(str, roots.values())))
        drawn = {"val": None if "val" in parts else self.val_size, "test": None if "test" in parts else self.test_size}
        parts |= split(parts["train"], drawn["val"], drawn["test"], self.split_seed)
        self.no_test = "" if "test" in parts else "there are no test pictures"
        return {part: parts[part] for part in PARTS if part in parts}


def find_files(pattern: str, mark: str) -> tuple[dict[str, Path], Path]:
    """Return the files that a pattern finds, by what its mark, `*` or `{}`, stands for, and the folder they are below.

    Raises:
        InputError: there are none; says what there is.
    """
    *folders, _ = Path(pattern.partition(mark)[0] + mark).parts  # those in front of the mark
    root = Path(*folders).expanduser()
    root = root if root.is_dir() else data_dir() / root
    rest = Path(pattern).relative_to(Path(*folders)).as_posix()
    if not root.is_dir():
        near = [path.name for path in root.parent.glob("*/")]
        raise InputError(f"there is no folder {root}, where {pattern} should be{did_you_mean(root.name, near)}")
    before, _, after = rest.partition(mark)
    found = {}
    for path in sorted(root.glob(f"{glob.escape(before)}*{glob.escape(after)}")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not path.name.startswith("."):
            found[name[len(before) : len(name) - len(after)]] = path
    if not found:
        kinds = Counter(path.suffix or "no suffix" for path in root.iterdir() if path.is_file())
        there = ", ".join(f"{count:,} of {kind}" for kind, count in kinds.most_common(5)) or "no files"
        raise InputError(f"nothing in {root} matches {rest}; there are {there}")
    return found, root
