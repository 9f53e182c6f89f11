"""Your own pictures: every kind is read as PIL reads it, mistakes are one line, and what is random can be repeated."""

import hashlib
import http.server
import io
import os
import pickle
import random
import re
import shutil
import sys
import tarfile
import threading
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image, ImageOps
from pytorch_lightning import Trainer
from test_resume import Stop, only_run, stop_at
from test_train import assert_same_run, receipt
from torchvision.transforms import v2

from datamodules.image_folder import IMAGENET, ImageFolder
from datamodules.pictures import PictureError, check_picture, check_pictures, make_augmentation, read_picture
from lit_models.softmax_regression import SoftmaxRegression
from runner.errors import InputError
from train import main

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import image_folder_speed

S = 16


def photo(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    """Colours that change slowly, as decoders of JPEG agree on them; a red corner that tells how it is turned."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, seed * 37 % 256)], axis=2).astype(np.uint8)
    rgb[: height // 4, : width // 4] = (250, 10, 10)
    return Image.fromarray(rgb)


def write_folder(root: Path, classes=("ants", "bees"), train: int = 6, val: int = 3, test: int = 0) -> Path:
    """Write PNGs in the layout, each another one."""
    seed = 0
    for part, n in (("train", train), ("val", val), ("test", test)):
        for name in classes if n else ():
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                photo(24 + seed % 3, 30, seed).save(root / part / name / f"{i}.png")
                seed += 1
    return root


def damage(path: Path) -> Path:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "pictures")


def ready(folder: Path, **arguments) -> ImageFolder:
    data = ImageFolder(str(folder), **{"image_size": S, "batch_size": 4, "num_workers": 0, **arguments})
    data.setup()
    return data


def batches(data: ImageFolder, epoch: int = 0) -> list:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def pixels(data: ImageFolder, epoch: int = 0) -> torch.Tensor:
    return torch.cat([images for images, _ in batches(data, epoch)])


# -- reading -----------------------------------------------------------------------------------------------------------


def with_alpha() -> Image.Image:
    image = np.array(photo().convert("RGBA"))
    image[:20, :, 3] = 0
    image[20:30, :, 3] = 100
    return Image.fromarray(image)


PALETTE = photo().quantize(32)
KINDS = {
    "colours.jpg": (photo(), {}),
    "progressive.jpg": (photo(), {"progressive": True}),
    "no subsampling.JPG": (photo(), {"subsampling": 0}),
    "grey.jpg": (photo().convert("L"), {}),
    "cmyk.jpg": (photo().convert("CMYK"), {}),
    "cmyk.tif": (photo().convert("CMYK"), {}),
    "colours.png": (photo(), {}),
    "grey.png": (photo().convert("L"), {}),
    "one bit.png": (photo().convert("1"), {}),
    "palette.png": (PALETTE, {}),
    "palette, one colour transparent.png": (PALETTE, {"transparency": 3}),
    "palette, several transparent.png": (PALETTE, {"transparency": bytes([0, 128] + [255] * 30)}),
    "grey, one transparent.png": (photo().convert("L"), {"transparency": 100}),
    "alpha.png": (with_alpha(), {}),
    "grey and alpha.png": (with_alpha().convert("LA"), {}),
    "alpha.webp": (with_alpha(), {"lossless": True, "exact": True}),
    "alpha.tif": (with_alpha(), {}),
    "lossy.webp": (photo(), {}),
    "colours.tif": (photo(), {}),
    "lzw.tiff": (photo(), {"compression": "tiff_lzw"}),
    "palette.tif": (PALETTE, {}),
    "one bit.tif": (photo().convert("1"), {}),
    "colours.bmp": (photo(), {}),
    "palette.bmp": (PALETTE, {}),
    "one bit.bmp": (photo().convert("1"), {}),
    "colours.gif": (photo(), {}),
    "transparent.gif": (PALETTE, {"transparency": 3}),
    "moving.gif": (PALETTE, {"save_all": True, "append_images": [ImageOps.flip(photo()).quantize(32)]}),
    "moving.webp": (photo(), {"save_all": True, "append_images": [ImageOps.flip(photo())], "lossless": True}),
}


def as_pil(path: Path) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"):
        return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_as_pil_reads_it(tmp_path, name):
    image, arguments = KINDS[name]
    path = tmp_path / name
    image.save(path, **arguments)
    found = read_picture(path)
    assert (found.dtype, found.shape) == (np.uint8, (40, 60, 3))
    assert np.abs(found - as_pil(path)).max() <= (3 if path.suffix.lower() in (".jpg", ".webp") else 0)
    assert check_picture(path) == (hashlib.sha256(path.read_bytes()).hexdigest(), "")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_a_turned_picture_is_turned_upright(tmp_path, suffix):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        path = tmp_path / f"{orientation}{suffix}"
        photo().save(path, exif=exif)
        found = read_picture(path)
        assert found.shape == ((40, 60, 3) if orientation <= 4 else (60, 40, 3))
        assert np.abs(found - as_pil(path)).max() <= 3


@pytest.mark.parametrize("adobes_transform", [None, 0, 2], ids=["no marker", "CMYK", "YCCK"])
def test_the_ways_to_write_cmyk_in_a_jpeg(tmp_path, adobes_transform):
    path = tmp_path / "1.jpg"
    photo().convert("CMYK").save(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"Adobe")  # at the start of its segment: marker, length, Adobe, ..., transform
    if adobes_transform is None:
        del content[at - 4 : at + 12]
    else:
        content[at + 11] = adobes_transform
    path.write_bytes(content)
    assert np.abs(read_picture(path) - as_pil(path)).max() <= 3


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_of_16_bits_the_upper_8_are_taken(tmp_path, suffix):
    grey = np.asarray(photo().convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(tmp_path / f"1{suffix}")
    assert np.array_equal(read_picture(tmp_path / f"1{suffix}"), np.stack([grey] * 3, axis=2))
    assert check_picture(tmp_path / f"1{suffix}")[1] == ""


def test_a_large_jpeg_may_come_smaller_and_is_the_mean_of_its_pixels(tmp_path):
    noise = np.random.default_rng(0).normal(0, 20, (1000, 1400, 3))
    exif = Image.Exif()
    exif[0x112] = 6
    image = Image.fromarray(np.clip(np.asarray(photo(1000, 1400)) + noise, 0, 255).astype(np.uint8))
    image.save(tmp_path / "1.jpg", quality=95, exif=exif)
    whole = read_picture(tmp_path / "1.jpg")
    for enough, shape in (
        (0, (1400, 1000)),
        (501, (1400, 1000)),
        (500, (700, 500)),
        (250, (350, 250)),
        (9, (175, 125)),
    ):
        found = read_picture(tmp_path / "1.jpg", enough)
        assert found.shape == (*shape, 3)
        means = cv2.resize(whole, shape[::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(found.astype(int) - means).mean() < 4
    Image.open(tmp_path / "1.jpg").save(tmp_path / "1.png")
    assert read_picture(tmp_path / "1.png", 9).shape == (1000, 1400, 3)


def bomb() -> bytes:
    """A small PNG that says it has 400 million pixels."""
    content = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(content, "png")
    return content.getvalue()


def saved(image: Image.Image, kind: str, **arguments) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **arguments)
    return content.getvalue()


def half(image: Image.Image, kind: str, **arguments) -> bytes:
    content = saved(image, kind, **arguments)
    return content[: len(content) // 2]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"This is no picture.", "it is no picture"),
        (b"\xff\xd8\xff\xe0 nor is this", "Truncated"),
        (half(photo(400, 600), "jpeg"), "truncated"),
        (half(photo(400, 600), "jpeg", progressive=True), "truncated"),
        (half(photo(400, 600), "png"), "truncated"),
        (half(photo(400, 600), "bmp"), "truncated"),
        (half(photo(400, 600), "gif"), "truncated"),
        (half(photo(400, 600), "webp"), "decoder"),
        (half(photo(400, 600), "tiff", compression="tiff_lzw"), "it is no picture"),
        (saved(photo().convert("F"), "tiff"), "32 bits"),
        (bomb(), "400000000 pixels"),
        (None, "No such file"),
    ],
    ids=["empty", "text", "header only", "jpeg", "progressive jpeg", "png", "bmp", "gif", "webp", "tiff", "floats", "bomb", "gone"],
)  # fmt: skip
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, content, reason, capfd):
    path = tmp_path / "1.jpg"
    path.write_bytes(content) if content is not None else path.symlink_to(tmp_path / "gone")
    digest, found = check_picture(path)
    assert digest == (hashlib.sha256(content).hexdigest() if content is not None else "")
    assert reason in found
    assert "\n" not in found
    assert [(digest, found)] * 3 == check_pictures([path] * 3)
    data = ImageFolder("nowhere", image_size=S)
    with pytest.raises(PictureError, match=reason) as raised:
        data.read_input(path)
    assert str(raised.value).startswith(str(path))
    assert capfd.readouterr() == ("", "")


def test_a_file_without_permission(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert check_picture(tmp_path / "1.jpg") == ("", "Permission denied")
    with pytest.raises(PictureError, match=r"1\.jpg cannot be read: Permission denied$"):
        read_picture(tmp_path / "1.jpg")


# -- augmentation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["HorizontalFlp"], "albumentations has no HorizontalFlp; did you mean 'HorizontalFlip'?"),
        ([{"RandomResizedCrop": {"sise": [8, 8]}}], "RandomResizedCrop takes no sise; did you mean 'size'?"),
        ([{"RandomResizedCrop": {"size": 8}}], "RandomResizedCrop: size: Input should be a valid tuple"),
        ([{"RandomResizedCrop": None}], "RandomResizedCrop: size: "),
        ([{"HorizontalFlip": {"p": 2}}], "HorizontalFlip: p: Input should be less than or equal to 1"),
        ([{"OneOf": {"transforms": ["Blurr"]}}], "albumentations has no Blurr; did you mean 'Blur'?"),
        ([{"class_path": "albumentations.Blur", "init_args": {}}], "expected a transform's name, or {name: {arg"),
        ([{"Blur": [3]}], "expected a transform's name, or"),
        ([7], "expected a transform's name, or"),
    ],
)
def test_a_mistake_in_augment_is_one_line(steps, message):
    with pytest.raises(InputError, match=f"^augment: .*{re.escape(message)}") as raised:
        ImageFolder("nowhere", augment=steps)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["HorizontalFlip"], f"makes 24 x 30 x 3 of .* and image_size is {S}: add"),
        ([{"RandomResizedCrop": {"size": [8, 8]}}], f"makes 8 x 8 x 3 of .* and image_size is {S}"),
        ([{"RandomCrop": {"height": 99, "width": 99}}], r"0\.png: Crop size .* exceeds image dimensions"),
        ([{"RandomResizedCrop": {"size": [S, S]}}, "Normalize"], "must leave pixels uint8: leave Normalize"),
        ([{"RandomResizedCrop": {"size": [S, S]}}, "ToTensorV2"], "must leave pixels uint8"),
    ],
)
def test_what_augment_makes_is_looked_at_before_anything_runs(folder, steps, message):
    with pytest.raises(InputError, match=f"^augment.*{message}"):
        ready(folder, augment=steps)


def test_crops_are_resized_with_antialiasing_as_torchvisions_are():
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    crop = make_augmentation([{"RandomResizedCrop": {"size": [S, S], "scale": [1, 1], "ratio": [1.33, 1.34]}}])
    found = crop(image=image)["image"]
    theirs = v2.functional.resize(torch.from_numpy(image).permute(2, 0, 1), [S, S], antialias=True).permute(1, 2, 0)
    assert np.abs(found.astype(int) - theirs.numpy()).mean() < 1.5  # the crop leaves out a column or two
    assert found.std() < 10 < 60 < image.std()
    nearest = {"size": [S, S], "scale": [1, 1], "interpolation": cv2.INTER_NEAREST}  # as asked for
    assert make_augmentation([{"RandomResizedCrop": nearest}])(image=image)["image"].std() > 60


def test_only_before_a_crop_that_is_scaled_may_a_picture_be_read_smaller(folder):
    crop = {"RandomResizedCrop": {"size": [S, S], "scale": [0.25, 1], "ratio": [1, 1]}}
    assert ready(folder, augment=[crop]).train_set.enough == 2 * S  # its smallest crop is half as high
    assert ready(folder, augment=["HorizontalFlip", crop]).train_set.enough == 0


def test_two_flips_do_not_coincide(tmp_path):
    folder = write_folder(tmp_path / "pictures", train=50, val=1)
    shrink = {"Resize": {"height": S, "width": S}}
    data = ready(folder, augment=[shrink, "HorizontalFlip", "VerticalFlip"])
    plain = ready(folder, augment=[shrink, {"HorizontalFlip": {"p": 0}}])
    kinds = []
    for (flipped, _), (image, _) in zip(data.train_set, plain.train_set, strict=True):
        ways = {"none": image, "h": image[:, ::-1], "v": image[::-1], "both": image[::-1, ::-1]}
        kinds += [name for name, way in ways.items() if np.array_equal(way, flipped)]
    assert len(kinds) == 100
    assert min(kinds.count(name) for name in ("none", "h", "v", "both")) > 10


def test_epochs_pictures_and_seeds_draw_differently_and_a_repeated_run_the_same(folder, monkeypatch):
    draws = {}
    for seed in ("1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        for epoch in (0, 1):
            random.seed(0)  # what else is drawn does not matter
            draws[seed, epoch] = pixels(ready(folder), epoch)
            np.random.default_rng().random(7)
            assert torch.equal(draws[seed, epoch], pixels(ready(folder), epoch))
    for name, a in draws.items():
        sums = a.flatten(1).sum(1)
        assert len(sums.unique()) == 12
        for other, b in draws.items():
            assert name == other or not set(sums.tolist()) & set(b.flatten(1).sum(1).tolist())


def test_the_number_of_workers_changes_nothing(folder):
    steps = [{"RandomResizedCrop": {"size": [S, S]}}, {"OneOf": {"transforms": [{"Blur": None}, "RandomGamma"]}}]
    alone, two = ready(folder, augment=steps), ready(folder, augment=steps, num_workers=2)
    loader = two.train_dataloader()  # the same one for all epochs, as the Trainer has it: its workers go on
    epochs = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        epochs.append(list(loader))
        for (a, a_labels), (b, b_labels) in zip(batches(alone, epoch), epochs[-1], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a_labels, b_labels)
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])


def test_without_augmentation_training_pictures_are_those_of_evaluation(folder):
    data = ready(folder, augment=[])
    assert not data.is_random
    assert ready(folder).is_random
    shutil.rmtree(folder / "val")
    shutil.copytree(folder / "train", folder / "val")
    with pytest.warns(
        UserWarning, match="12 of the pictures in val are in train, too: .*0.png, .*1.png, .* and 9 more"
    ):
        same = ready(folder, augment=[])
    in_order = torch.cat([images for images, _ in same.val_dataloader()])
    for epoch in (0, 1):
        assert sorted(pixels(data, epoch).flatten(1).sum(1).tolist()) == sorted(in_order.flatten(1).sum(1).tolist())


# -- what is found -----------------------------------------------------------------------------------------------------


def test_classes_are_the_folders_of_train_and_pictures_may_lie_deeper(tmp_path):
    folder = write_folder(tmp_path / "meine Fotos, 写真", classes=("große Ameisen", "蜂", "Zebra"), train=2, val=1)
    deep = folder / "train" / "蜂" / "2024" / "juin été"
    deep.mkdir(parents=True)
    photo(seed=90).save(deep / "naïve ПЧЕЛА.JPEG", "jpeg")
    for hidden in (".DS_Store", "._0.png", ".thumbnails/1.png", ".ipynb_checkpoints/0.png"):
        (deep / hidden).parent.mkdir(exist_ok=True)
        (deep / hidden).write_bytes(b"no picture")
    (folder / "train" / ".git").mkdir()
    data = ready(folder)
    assert data.classes == ("Zebra", "große Ameisen", "蜂")
    assert data.sizes == {"train": 7, "val": 3, "test": 3}
    assert [label for _, label in data.train_set.pairs] == [0, 0, 1, 1, 2, 2, 2]
    assert deep / "naïve ПЧЕЛА.JPEG" in [path for path, _ in data.train_set.pairs]
    assert [label for _, label in data.val_set] == [0, 1, 2]
    assert pickle.loads(pickle.dumps(data.state_dict())) == data.state_dict()
    assert data.state_dict()["classes"] == ["Zebra", "große Ameisen", "蜂"]


def test_what_is_no_picture_by_its_name_is_counted(folder):
    for name in ("train/ants/1.heic", "train/ants/2.heic", "val/bees/notes", "train/lost.jpg"):
        (folder / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="no pictures by their names: 2 .heic, 1 .jpg, 1 without suffix"):
        assert ready(folder).sizes["train"] == 12


def test_a_relative_folder_is_looked_for_below_data_dir(tmp_path, monkeypatch):
    write_folder(tmp_path / "data" / "mine")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    assert ready(Path("mine")).path == tmp_path / "data" / "mine"
    monkeypatch.chdir(tmp_path / "data")
    assert ready(Path("mine")).path == Path("mine")


def test_setup_can_be_called_twice_and_the_fingerprint_tells_every_change(folder):
    data = ready(folder)
    first = data.train_set
    data.setup("fit")
    assert data.train_set is first
    prints = [data.fingerprint, ready(folder, augment=[], image_size=8).fingerprint]
    assert prints[0] == prints[1]  # of the files; how they are prepared is the configuration's
    path = folder / "train" / "ants" / "3.png"
    for change in (
        lambda: path.rename(path.with_name("9.png")),
        lambda: path.with_name("9.png").rename(folder / "train" / "bees" / "9.png"),
        lambda: photo(seed=77).save(folder / "val" / "bees" / "0.png"),
        lambda: shutil.copytree(folder / "val", folder / "test"),
    ):
        change()
        prints.append(ready(folder).fingerprint)
    assert len(set(prints)) == 5


@pytest.mark.filterwarnings("ignore:.*are in train, too")
def test_without_a_test_folder_val_is_tested_and_the_receipt_says_so(folder):
    said = ready(folder).describe()
    assert said["source"] == f"pictures in {folder} (no test folder: val is tested)"
    assert said["test_folder"] == "val: there is no test folder"
    assert (said["name"], said["train"], said["val"], said["test"]) == ("ImageFolder", 12, 6, 6)
    write_folder(folder.parent / "other", test=2)
    shutil.move(folder.parent / "other" / "test", folder)
    said = ready(folder).describe()
    assert said["source"] == f"pictures in {folder}"
    assert said["test"] == 4
    assert "test_folder" not in said


def no_folder(folder):
    shutil.rmtree(folder)
    (folder.parent / "picture").mkdir()


def one_class(folder):
    shutil.rmtree(folder / "train" / "ants")


def no_classes(folder):
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    photo().save(folder / "train" / "1.jpg")


def empty_class(folder):
    (folder / "train" / "wasps").mkdir()
    (folder / "train" / "wasps" / "notes.txt").write_text("none")


@pytest.mark.filterwarnings("ignore:.*no pictures by their names")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_folder, "no folder {0}, with train/<class>/*.jpg and val/<class>/*.jpg in it; did you mean 'picture'?"),
        (lambda f: (f / "train").rename(f / "training"), "{0} has no train folder: expected train/<class>/*.jpg"),
        (lambda f: (f / "train").rename(f / "training"), "; did you mean 'training'?"),
        (lambda f: shutil.rmtree(f / "val"), "no val folder, to choose the best epoch by: move a fifth of the pictures"),
        (lambda f: (f / "val").rename(f / "valid"), "no val folder, .*; did you mean 'valid'?"),
        (one_class, "{0}/train has one class only, bees"),
        (no_classes, "{0}/train has no folders, one for each class"),
        (empty_class, "{0}/train/wasps has no picture that can be read (.jpg, "),
        (lambda f: (f / "val" / "ants").rename(f / "val" / "ant"), "{0}/val/ant: train has no such class; did you mean 'ants'?"),
        (lambda f: [shutil.rmtree(p) for p in (f / "val").iterdir()], "{0}/val has no folders, one for each class: ants, bees"),
        (lambda f: damage(f / "val" / "ants" / "1.png"), "1 of 18 pictures cannot be read: {0}/val/ants/1.png (image file is trunc"),
        (lambda f: damage(f / "val" / "ants" / "1.png"), "mend or remove them, or leave them out: --data.on_bad_image skip"),
        (lambda f: [damage(p) for p in f.glob("train/*/*")], "12 of 18 pictures cannot be read: .*0.png .*1.png .*2.png .* and 9 more;"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_folders_is_one_line(folder, change, message):
    change(folder)
    pattern = re.escape(message.format(folder)).replace(re.escape(".*"), ".*")
    with pytest.raises(InputError, match=pattern) as raised:
        ready(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"image_size": 0},
        {"resize": S - 1},
        {"num_workers": -1},
        {"url": "file:///etc"},
        {"normalize": ((0, 0, 0), (1, 0, 1))},
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_refused(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        ready(Path("nowhere"), **arguments)


def test_skip_leaves_out_what_cannot_be_read_and_says_so(folder):
    bad = [damage(folder / "train" / "ants" / "2.png"), folder / "train" / "bees" / "7.jpg"]
    bad[1].write_text("no picture")
    with pytest.warns(
        UserWarning, match=r"2 of 19 pictures cannot be read: .*2\.png \(.*7\.jpg \(it is no.*; left out"
    ):
        data = ready(folder, on_bad_image="skip")
    assert data.sizes == {"train": 11, "val": 6, "test": 6}
    assert data.describe()["left_out"] == 2
    for path in bad:
        path.unlink()
    clean = ready(folder)
    assert clean.fingerprint == data.fingerprint
    assert "left_out" not in clean.describe()
    for path in (folder / "val" / "ants").iterdir():
        damage(path)
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(InputError, match="val/ants has no picture"):
        ready(folder, on_bad_image="skip")


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 60), (61, 33), (300, 219), (9, 12), (30, 400)])
def test_evaluation_is_what_torchvisions_transforms_give(tmp_path, size):
    photo(*size).save(tmp_path / "1.png")
    data = ImageFolder("nowhere", image_size=S)
    assert data.resize == 18
    found = data.read_input(tmp_path / "1.png")  # without folder or setup
    theirs = v2.Compose([v2.PILToTensor(), v2.Resize(18), v2.CenterCrop(S)])(Image.open(tmp_path / "1.png"))
    assert (found.dtype, found.shape) == (torch.uint8, (3, S, S))
    assert (found.int() - theirs.int()).abs().max() <= 1


def test_a_very_long_strip_needs_no_more_memory_than_a_picture(tmp_path):
    Image.new("RGB", (20_000, 1), "red").save(tmp_path / "1.png")
    assert ImageFolder("nowhere").read_input(tmp_path / "1.png").shape == (3, 224, 224)


def test_batches_are_uint8_and_channels_last(folder):
    data = ready(folder, batch_size=5)
    (images, labels), *_ = batches(data)
    assert (images.dtype, images.shape) == (torch.uint8, (5, 3, S, S))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (labels.dtype, labels.shape) == (torch.int64, (5,))
    assert [len(y) for _, y in data.val_dataloader()] == [6]


@pytest.mark.parametrize(("batch_size", "sizes"), [(11, [11]), (5, [5, 5, 2]), (1, [1] * 12), (12, [12]), (40, [12])])
def test_a_last_training_batch_of_one_is_left_out(folder, batch_size, sizes):
    assert [len(labels) for _, labels in batches(ready(folder, batch_size=batch_size))] == sizes


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
@pytest.mark.parametrize("normalize", [IMAGENET, None])
def test_pixels_are_normalised_as_torchvision_does_it(folder, normalize, precision):
    data = ready(folder, normalize=normalize)
    data.trainer = Trainer(logger=False, accelerator="cpu", precision=precision, enable_progress_bar=False)
    model = data.trainer.precision_plugin.convert_module(SoftmaxRegression(3 * S * S, 2))
    data.trainer.strategy.connect(model)
    images, labels = next(iter(data.val_dataloader()))
    steps = [v2.ToDtype(torch.float32, scale=True), *([v2.Normalize(*normalize)] if normalize else [])]
    expected = v2.Compose(steps)(images.contiguous())
    for given in (images, images.contiguous()):
        with torch.inference_mode():
            found, rest = data.on_after_batch_transfer((given, labels), 0)
        assert rest is labels
        assert found.dtype == model.dtype
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05 if precision[0] == "b" else 1e-5)
        found, rest = data.on_after_batch_transfer([given, ["a name", None]], 0)  # also what inference made is used
        assert rest == ["a name", None]
        assert (model(found).sum() / 7).requires_grad


def test_what_spawned_workers_are_given_can_be_sent_to_them(folder):
    data = ready(folder)
    again = pickle.loads(pickle.dumps(data.train_set))
    assert np.array_equal(again[17][0], data.train_set[17][0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")
def test_auto_takes_no_more_workers_than_there_are_whole_batches(folder, monkeypatch):
    monkeypatch.setattr("datamodules.image_folder.available_cpus", lambda: 16)
    data = ready(folder, num_workers="auto", batch_size=1)
    assert data.train_dataloader().num_workers == 8
    assert data.val_dataloader().num_workers == 0  # 6 in a batch of up to 64


# -- downloads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path):
    """Serve a folder on this machine: (the folder, its url)."""
    (tmp_path / "www").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path / "www")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz"])
@pytest.mark.parametrize("outer", ["", "hymenoptera_data/"])
def test_an_archive_is_downloaded_and_unpacked(tmp_path, monkeypatch, served, folder, kind, outer, capfd):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    www, url = served
    if kind == "zip":
        with zipfile.ZipFile(www / "a.zip", "w") as archive:
            archive.writestr(f"__MACOSX/{outer}._train", b"what macOS adds")
            for path in folder.rglob("*.png"):
                archive.write(path, f"{outer}{path.relative_to(folder)}")
    else:
        with tarfile.open(www / f"a.{kind}", f"w:{kind[4:]}") as archive:
            archive.add(folder, outer or ".")
    data = ImageFolder("ants/and bees", url=f"{url}/a.{kind}", image_size=S, num_workers=0)
    data.prepare_data()
    data.setup()
    assert data.path == tmp_path / "data" / "ants" / "and bees"
    assert data.fingerprint == ready(folder).fingerprint
    assert os.listdir(data.path.parent) == ["and bees"]
    (www / f"a.{kind}").unlink()
    ImageFolder("ants/and bees", url=f"{url}/a.{kind}").prepare_data()  # it is there: nothing is asked for
    assert capfd.readouterr().out.count("downloading") == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "404"),
        (b"<html>log in first</html>", "what came is no zip or tar, or not all of it"),
        (b"PK\3\4 cut off", "what came is no zip or tar"),
        ("photos.zip", "the archive has no train folder; in it: photos"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, served, content, reason):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    www, url = served
    if isinstance(content, bytes):
        (www / "a.zip").write_bytes(content)
    elif content:
        with zipfile.ZipFile(www / "a.zip", "w") as archive:
            archive.writestr("photos/1.jpg", b"")
    data = ImageFolder("mine", url=f"{url}/a.zip", image_size=S)
    data.prepare_data()
    with pytest.raises(InputError, match=re.escape(reason)) as raised:
        data.setup()
    message = str(raised.value)
    assert f"{url}/a.zip could not be had" in message
    assert f"put train/<class>/*.jpg and val/<class>/*.jpg into {tmp_path / 'data' / 'mine'}" in message
    assert "\n" not in message
    assert not (tmp_path / "data").exists()


# -- train.py ----------------------------------------------------------------------------------------------------------

EXPERIMENT = f"""\
model:
  class_path: lit_models.softmax_regression.SoftmaxRegression
  init_args: {{num_inputs: {3 * S * S}, num_classes: 2}}
data:
  class_path: datamodules.image_folder.ImageFolder
  init_args:
    folder: FOLDER
    image_size: {S}
    augment: [{{RandomResizedCrop: {{size: [{S}, {S}]}}}}, HorizontalFlip, {{OneOf: {{transforms: [Blur, {{D4: null}}]}}}}]
    batch_size: 4
checkpoint: {{monitor: val/acc, mode: max}}
trainer: {{max_epochs: 3}}
"""


@pytest.fixture
def experiment(tmp_path, folder) -> str:
    path = tmp_path / "my_pictures.yaml"
    path.write_text(EXPERIMENT.replace("FOLDER", str(folder)))
    return str(path)


def test_a_run_a_repeated_one_and_a_resumed_one_end_in_the_same_bits(experiment, train, monkeypatch, tmp_path, capsys):
    whole = train(experiment=experiment, tiny=())  # with workers, as many as there are CPUs
    assert receipt(whole)["data"]["test_folder"] == "val: there is no test folder"
    assert (receipt(whole)["tested"], receipt(whole)["data"]["train"]) == (6, 12)
    assert "12 to train, 6 to validate, 6 to test: pictures in" in capsys.readouterr().out
    checkpoint = torch.load(whole / "best.ckpt", weights_only=True)
    assert checkpoint["ImageFolder"]["classes"] == ["ants", "bees"]
    assert main(["--verify", str(whole / "receipt.json")]) == 0
    whole = Path(shutil.move(whole, tmp_path / "whole"))

    again = train(experiment=str(whole / "config.yaml"), tiny=())
    assert (again / "config.yaml").read_text() == (whole / "config.yaml").read_text()
    assert_same_run(whole, again)
    shutil.rmtree(again)

    with monkeypatch.context() as patch:
        stop_at(patch, epoch=1, batch=1, model=SoftmaxRegression)
        with pytest.raises(Stop):
            main([experiment])
    run = only_run(tmp_path)
    assert main(["--resume", str(run)]) == 0
    assert_same_run(whole, run)


def test_other_pictures_are_noticed(experiment, train, folder, capsys):
    run = train("--data.num_workers=0", "--trainer.max_epochs=1", experiment=experiment, tiny=())
    photo(seed=99).save(folder / "val" / "ants" / "0.png")
    assert main(["--verify", str(run / "receipt.json")]) == 1
    assert "not verified: data altered" in capsys.readouterr().out
    assert main(["--resume", str(run), "--trainer.max_epochs=2"]) == 2
    assert "began with other data" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_vanishes_while_training_ends_the_run_with_a_line_that_names_it(
    experiment, folder, workers, monkeypatch, capsys
):
    step = SoftmaxRegression.training_step

    def vanish(self, batch, batch_idx):
        if self.current_epoch == 1:
            (folder / "train" / "ants" / "3.png").unlink(missing_ok=True)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SoftmaxRegression, "training_step", vanish)
    assert main([experiment, f"--data.num_workers={workers}"]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {folder}/train/ants/3.png cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--data.augment=[{RandomResizedCrop: {sise: [9, 9]}}]",
            "RandomResizedCrop takes no sise; did you mean 'size'?",
        ),
        ("--data.augment=HorizontalFlip", "data.augment: expected list, got HorizontalFlip"),
        ("--data.on_bad_image=ignore", "data.on_bad_image: expected one of 'stop', 'skip', got ignore"),
        ("--data.num_workers=some", "data.num_workers: expected int or one of 'auto', got some"),
        ("--data.folder=/nowhere", "there is no folder /nowhere, with train/<class>/*.jpg"),
        ("--model.num_classes=3", "has 3 classes, but ImageFolder has 2"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(experiment, override, message, capsys):
    assert main([experiment, override]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


# -- the benchmark -----------------------------------------------------------------------------------------------------


def test_the_benchmark_runs_and_a_mistake_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(image_folder_speed, "LONG_SIDES", {64: 8})
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert image_folder_speed.main([str(folder), "--workers", "0", "--rounds", "1", "--pictures", "32"]) == 0
    out = capsys.readouterr().out
    for words in ("A  this project", "B  torchvision", "C  torchvision", "A / B", "A / C"):
        assert all(
            any(words in line for line in out.splitlines() if name in line) for name in ("as they are", "64 pixels")
        )
    assert image_folder_speed.main([str(folder / "nowhere")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: there is no folder")
    assert err.count("\n") == 1


def test_a_checkpoint_is_not_tested_on_other_classes(experiment, folder, train, tmp_path, capsys):
    """As many of them, and in the same places: the labels would stand for others without a word."""
    run = train("--trainer.max_epochs=1", experiment=experiment, tiny=())
    shutil.copytree(folder, tmp_path / "other")
    for part in ("train", "val"):
        (tmp_path / "other" / part / "bees").rename(tmp_path / "other" / part / "wasps")
    words = [experiment, "--ckpt", str(run / "best.ckpt")]
    assert main(words) == 0
    assert main([*words, f"--data.folder={tmp_path / 'other'}"]) == 2
    assert "tells apart ants, bees, but the data has ants, wasps" in capsys.readouterr().err
