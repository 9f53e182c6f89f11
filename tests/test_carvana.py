"""Pictures with masks: paired by name, told apart in one line where that fails, and augmented as one."""

import io
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from mask_files import blob, with_palette, write_carvana, write_membrane
from PIL import Image
from test_resume import Stop, only_run, stop_at
from test_train import assert_same_run, receipt
from torchvision.transforms import v2

from datamodules.carvana import ImageMasks, find_files
from datamodules.mask_files import Coding, Pair, read_image, read_mask
from datamodules.masks import pad_masks, split
from datamodules.pictures import PictureError
from lit_models.segmenter import IGNORE
from lit_models.unet import UNet
from runner.errors import InputError
from train import main

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import masks_speed

BINARY = Coding({0: 0, 1: 1}, by_color=True)
INDEX = Coding({0: 0, 1: 1, 2: 2, IGNORE: IGNORE})
# of which a nearest pixel's value can be told again, in the picture as in the mask
EXACT = [
    "D4",
    {"Rotate": {"limit": 35, "p": 0.7, "interpolation": cv2.INTER_NEAREST}},
    {"OneOf": {"transforms": [{"Affine": {"scale": [0.6, 1.4], "interpolation": cv2.INTER_NEAREST}}, "Transpose"]}},
    "VerticalFlip",
]


@pytest.fixture
def cars(tmp_path) -> Path:
    return write_carvana(tmp_path, height=20, width=30)


def ready(folder: Path, **arguments) -> ImageMasks:
    patterns = {"images": f"{folder}/train_images/*.jpg", "masks": f"{folder}/train_masks/{{}}_mask.gif"}
    data = ImageMasks(**{**patterns, "num_workers": 0, "batch_size": 4, "augment": [], **arguments})
    data.setup()
    return data


def refused(folder: Path, **arguments) -> str:
    """The one line that it ends in."""
    with pytest.raises(InputError) as raised:
        ready(folder, **arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def names(data: ImageMasks) -> dict[str, list[str]]:
    sets = {"train": data.train_set, "val": data.val_set, "test": data.test_set}
    return {part: [pair.name for pair in dataset.pairs] for part, dataset in sets.items()}


def epoch_of(data: ImageMasks, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An epoch's training pictures and masks, in their order; all of one size."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return tuple(torch.cat(parts) for parts in zip(*loader, strict=True))


# -- masks -------------------------------------------------------------------------------------------------------------

WHERE = np.zeros((12, 16), bool)
WHERE[2:7, 3:11] = True
GREY = Image.fromarray(WHERE.astype(np.uint8) * 255)
BLACK_IS_1 = with_palette(~WHERE, [255, 255, 255, 0, 0, 0])
BINARY_MASKS = {
    "grey.png": GREY,
    "0 and 1.png": Image.fromarray(WHERE.astype(np.uint8)),
    "one bit.png": Image.fromarray(WHERE),
    "one bit.tif": Image.fromarray(WHERE),
    "one bit.gif": Image.fromarray(WHERE),
    "palette.gif": with_palette(WHERE, [0, 0, 0, 255, 255, 255]),
    "palette, black is 1.gif": BLACK_IS_1,
    "palette, black is 1.png": BLACK_IS_1,
    "palette, dark blue.png": with_palette(WHERE, [0, 0, 0, 0, 0, 1]),
    "palette.bmp": with_palette(WHERE, [0, 0, 0, 255, 255, 255, 9, 9, 9]),
    "colours.png": GREY.convert("RGB"),
    "opaque.png": GREY.convert("RGBA"),
    "grey, opaque.png": GREY.convert("LA"),
    "16 bits.png": Image.fromarray(WHERE.astype(np.uint16) * 256),
    "lossy.jpg": GREY,
    "lossy.jpeg": GREY.convert("RGB"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BINARY_MASKS)
def test_binary_masks_of_every_kind(tmp_path, name):
    BINARY_MASKS[name].save(tmp_path / name)
    found = read_mask(tmp_path / name, BINARY)
    assert found.dtype == np.uint8
    assert np.array_equal(found, WHERE)
    assert np.array_equal(read_mask(tmp_path / name, Coding({0: 1, 1: 0}, by_color=True)), ~WHERE)


CLASSES = np.zeros((12, 16), np.uint8)
CLASSES[:4], CLASSES[4:8, 5:], CLASSES[10:] = 1, 2, 255
INDEX_MASKS = {
    "grey.png": Image.fromarray(CLASSES),
    "palette.png": with_palette(CLASSES),
    "palette.tif": with_palette(CLASSES),
    "16 bits.png": Image.fromarray(CLASSES.astype(np.uint16)),
    "colours.png": Image.fromarray(CLASSES).convert("RGB"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", INDEX_MASKS)
def test_masks_of_classes(tmp_path, name):
    INDEX_MASKS[name].save(tmp_path / name)
    assert np.array_equal(read_mask(tmp_path / name, INDEX), CLASSES)


def test_a_palettes_index_is_the_class_in_a_gif_too(tmp_path):
    ramp = np.arange(3, dtype=np.uint8).repeat(8).reshape(3, 8)
    with_palette(ramp, [9, 9, 9, 0, 0, 0, 200, 0, 0]).save(tmp_path / "1.gif")
    assert np.array_equal(read_mask(tmp_path / "1.gif", INDEX), ramp)


def test_a_turned_mask_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(CLASSES).save(tmp_path / "1.png", exif=exif)
    assert np.array_equal(read_mask(tmp_path / "1.png", INDEX), np.rot90(CLASSES, -1))


TRANSPARENT = GREY.convert("RGBA")
TRANSPARENT.putpixel((0, 0), (0, 0, 0, 254))


@pytest.mark.parametrize(
    ("image", "suffix", "coding", "message"),
    [
        (Image.fromarray(CLASSES + 1), "png", INDEX, "it has pixels of class 3; there are 0 to 2"),
        (Image.fromarray(CLASSES.astype(np.uint16) + 1), "png", INDEX, "it has pixels of class 256"),
        (
            Image.fromarray(blob(0, 12, 16)[0]),
            "png",
            INDEX,
            "it has colours, but no palette; save each pixel's class as",
        ),
        (Image.fromarray(blob(0, 12, 16)[0]), "png", BINARY, "it has colours, but no palette"),
        (TRANSPARENT, "png", BINARY, "it is transparent; save each pixel's class as grey"),
        (Image.fromarray(CLASSES), "jpg", INDEX, "JPEG does not keep classes as they are: save it as PNG"),
        (
            Image.fromarray(CLASSES.astype(np.float32)),
            "tif",
            INDEX,
            "its pixels are of a kind that tells no classes (F)",
        ),
        (Image.fromarray(blob(0, 12, 16)[0]).convert("CMYK"), "tif", BINARY, "its pixels are of a kind that tells no"),
        (b"", "png", INDEX, "it is empty"),
        (b"text", "png", INDEX, "it is no picture"),
        (None, "png", INDEX, "No such file or directory"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_mask_that_tells_no_classes_is_one_line(tmp_path, image, suffix, coding, message):
    path = tmp_path / f"1.{suffix}"
    if isinstance(image, Image.Image):
        image.save(path)
    elif image is not None:
        path.write_bytes(image)
    with pytest.raises(PictureError, match=re.escape(f"{path} cannot be used: {message}")) as raised:
        read_mask(path, coding)
    assert "\n" not in str(raised.value)


def test_a_mask_cut_in_half_is_told(tmp_path):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (99, 99), np.uint8)).save(content, "png")
    (tmp_path / "1.png").write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    with pytest.raises(PictureError, match="truncated"):
        read_mask(tmp_path / "1.png", INDEX)


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (24, 48), (31, 17)])
def test_scaling_is_torchvisions_for_pictures_and_to_the_nearest_pixel_for_masks(tmp_path, size):
    pixels, _ = blob(0, 12, 16)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(CLASSES).save(tmp_path / "mask.png")
    image = read_image(tmp_path / "image.png", 12, 16, size, 3)
    theirs = v2.functional.resize(torch.from_numpy(pixels).permute(2, 0, 1), size, antialias=True)
    assert np.abs(image.astype(int) - theirs.permute(1, 2, 0).numpy()).max() <= 1
    mask = read_mask(tmp_path / "mask.png", INDEX, size)
    nearest = v2.functional.resize(torch.from_numpy(CLASSES)[None], size, v2.InterpolationMode.NEAREST_EXACT)
    assert np.array_equal(mask, nearest[0].numpy())


def test_a_large_jpeg_comes_smaller_and_nearly_the_same(tmp_path):
    pixels = cv2.resize(blob(0, 128, 192)[0], (960, 640), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(pixels).save(tmp_path / "1.jpg", quality=97)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    assert (tmp_path / "1.jpg").stat().st_size > 100_000
    large, whole = (read_image(tmp_path / f"1.{kind}", 640, 960, (160, 240), 3) for kind in ("jpg", "png"))
    assert np.abs(large.astype(int) - whole).mean() < 2


def test_one_channel_is_the_brightness(cars):
    data = ready(cars, channels=1, image_size=(10, 10), augment=["D4"])
    colours = ready(cars, image_size=(10, 10), augment=["D4"])
    (grey, masks), (images, same) = epoch_of(data), epoch_of(colours)
    assert grey.shape == (9, 1, 10, 10)
    assert torch.equal(masks, same)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert (grey[:, 0] - (images * weights).sum(dim=1)).abs().max() <= 2
    assert data.read_input(cars / "train_images" / "car_00.jpg").shape == (1, 10, 10)
    assert data.mean == (pytest.approx(0.449, abs=1e-3),)


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_cars_and_membranes_are_paired(tmp_path, cars):
    data = ready(cars, val_size=2, test_size=3)
    assert data.sizes == {"train": 5, "val": 2, "test": 3}
    assert data.classes == ("background", "foreground")
    for pair in data.train_set.pairs + data.val_set.pairs + data.test_set.pairs:
        assert (pair.image.name, pair.mask.name) == (f"{pair.name}.jpg", f"{pair.name}_mask.gif")
    for dataset in (data.train_set, data.val_set, data.test_set):
        for image, mask in dataset:
            assert np.array_equal(image[..., 0] > 120, mask)  # what is bright is the foreground
    folder = write_membrane(tmp_path, side=16)
    membrane = ImageMasks(f"{folder}/image/*.png", f"{folder}/label/{{}}.png", invert=True, num_workers=0, augment=[])
    membrane.setup()
    for image, mask in membrane.train_set:
        assert image.shape == (16, 16, 3)
        assert np.array_equal(image[..., 0] < 130, mask)  # what is dark is the membrane
        assert 0 < mask.mean() < 0.5


def test_what_macos_leaves_beside_a_file_is_no_picture(cars):
    fingerprint = ready(cars).fingerprint
    for name in ("train_images/._car_00.jpg", "train_masks/._car_00_mask.gif", "train_images/._car_77.jpg"):
        (cars / name).write_bytes(b"\0\5\x16\7")
    (cars / "train_images" / "folder.jpg").mkdir()
    assert ready(cars).fingerprint == fingerprint


def test_relative_patterns_are_looked_for_below_data_dir(tmp_path, cars, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    patterns = {"images": "carvana/train_images/*.jpg", "masks": "carvana/train_masks/{}_mask.gif"}
    data = ready(cars, **patterns)
    assert data.train_set.pairs[0].image.is_relative_to(tmp_path / "carvana")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", "nowhere")
    assert ready(cars, **patterns).fingerprint == data.fingerprint


def test_the_star_may_be_a_folder_or_in_the_middle(tmp_path):
    for i in range(3):
        (tmp_path / "scans" / f"[p] {i} [a]").mkdir(parents=True)
        pixels, inside = blob(i, 8, 8)
        Image.fromarray(pixels).save(tmp_path / "scans" / f"[p] {i} [a]" / "image.png")
        Image.fromarray(inside).save(tmp_path / "scans" / f"[p] {i} [a]" / "mask.png")
    Image.new("1", (8, 8)).save(tmp_path / "scans" / ".hidden.png")
    patterns = {"images": f"{tmp_path}/scans/*/image.png", "masks": f"{tmp_path}/scans/{{}}/mask.png"}
    assert sum(ready(tmp_path, **patterns, val_size=1).sizes.values()) == 4  # of which 1 is val, and test
    patterns = {"images": f"{tmp_path}/scans/[p] * [a]/image.png", "masks": f"{tmp_path}/scans/[p] {{}} [a]/mask.png"}
    data = ready(tmp_path, **patterns, val_size=1)
    assert sorted(names(data)["train"] + names(data)["val"]) == ["0", "1", "2"]
    assert str(find_files(patterns["images"], "*")[1]) == str(tmp_path / "scans")


@pytest.mark.parametrize("pattern", ["{}_mask.png", "{}.gif", "mask_{}.png"])
@pytest.mark.parametrize("image", ["*.png", "*_image.png"])
def test_pictures_and_masks_in_one_folder(tmp_path, image, pattern):
    for i in range(3):
        pixels, inside = blob(i, 8, 8)
        Image.fromarray(pixels).save(tmp_path / image.replace("*", str(i)))
        Image.fromarray(inside).save(tmp_path / pattern.format(i))
    data = ready(tmp_path, images=f"{tmp_path}/{image}", masks=f"{tmp_path}/{pattern}", val_size=1)
    assert sorted(names(data)["train"] + names(data)["val"]) == ["0", "1", "2"]


def test_folders_of_their_own_for_validation_and_test(tmp_path, cars):
    for part, numbers in (("val", (1, 4)), ("test", (7,))):
        (cars / f"{part}_images").mkdir()
        for i in numbers:
            shutil.move(cars / "train_images" / f"car_{i:02d}.jpg", cars / f"{part}_images")
    given = {f"{part}_images": f"{cars}/{part}_images/*.jpg" for part in ("val", "test")}
    given |= {f"{part}_masks": f"{cars}/train_masks/{{}}_mask.gif" for part in ("val", "test")}  # one folder of masks
    data = ready(cars, **given)
    assert data.sizes == {"train": 7, "val": 2, "test": 1}
    assert names(data)["val"] == ["car_01", "car_04"]
    assert "test_split" not in data.describe()
    del given["test_images"], given["test_masks"]
    assert "1 of 10 masks have no picture" in refused(cars, **given)


def test_the_split_is_always_the_same(cars, monkeypatch):
    data = ready(cars, val_size=2, test_size=3)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert names(ready(cars, val_size=2, test_size=3)) == names(data)
    for sizes in ((0.2, 0.3), (2.0, 3.0)):  # the latter is what the command line may make of 2 and 3
        assert names(ready(cars, val_size=sizes[0], test_size=sizes[1])) == names(data)
    assert names(data) == {
        "train": ["car_00", "car_02", "car_06", "car_08", "car_09"],
        "val": ["car_01", "car_04"],
        "test": ["car_03", "car_05", "car_07"],
    }
    assert names(ready(cars, val_size=2, test_size=3, split_seed=1)) != names(data)


def test_the_membranes_split():
    """Of 30, always these: on other machines, too."""
    pairs = [Pair(str(i), Path(), Path()) for i in range(30)]
    parts = {part: [int(pair.name) for pair in found] for part, found in split(pairs, 4, 6, seed=0).items()}
    assert parts["val"] == [13, 14, 23, 27]
    assert parts["test"] == [4, 6, 9, 21, 25, 29]
    assert {part: len(found) for part, found in parts.items()} == {"train": 20, "val": 4, "test": 6}
    assert sorted(i for numbers in parts.values() for i in numbers) == list(range(30))
    assert len(split(pairs, 0.01, None, seed=0)["val"]) == 1


def test_without_test_pictures_val_is_tested_and_the_receipt_says_so(cars):
    data = ready(cars, val_size=3)
    assert data.test_set is data.val_set
    assert data.describe()["test_split"] == "val: there are no test pictures"
    assert "val is tested" in data.source
    assert data.state_dict()["classes"] == ["background", "foreground"]
    data.setup()
    assert data.sizes == {"train": 7, "val": 3, "test": 3}


def test_the_fingerprint_is_of_pictures_and_masks_in_their_places(tmp_path, cars):
    data = ready(cars)
    moved = Path(shutil.move(cars, tmp_path / "elsewhere"))
    assert ready(moved).fingerprint == data.fingerprint
    assert ready(moved, split_seed=3).fingerprint != data.fingerprint
    with_palette(np.ones((20, 30)), [0, 0, 0, 9, 9, 9]).save(moved / "train_masks" / "car_03_mask.gif")
    assert ready(moved).fingerprint != data.fingerprint


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: remove(f, "train_masks/car_03_mask.gif"),
         "1 of 10 pictures have no mask: {0}/train_images/car_03.jpg (there is no {0}/train_masks/car_03_mask.gif)"),
        (lambda f: remove(f, *(f"train_masks/car_0{i}_mask.gif" for i in range(5))),
         "5 of 10 pictures have no mask: {0}/train_images/car_00.jpg (.*, {0}/train_images/car_01.jpg (.* and 2 more"),
        (lambda f: remove(f, "train_images/car_03.jpg"),
         "1 of 10 masks have no picture: {0}/train_masks/car_03_mask.gif (there is no {0}/train_images/car_03.jpg)"),
        (lambda f: Image.new("1", (31, 20)).save(f / "train_masks" / "car_03_mask.gif"),
         "1 of 10 pictures with their masks cannot be used: {0}/train_masks/car_03_mask.gif has 31 x 20 pixels, and "
         "{0}/train_images/car_03.jpg 30 x 20"),
        (lambda f: damage(f / "train_images" / "car_03.jpg"), "cannot be used: {0}/train_images/car_03.jpg cannot be read:"),
        (lambda f: damage(f / "train_masks" / "car_03_mask.gif"), "{0}/train_masks/car_03_mask.gif cannot be used: "),
        (lambda f: [(f / "train_masks" / f"car_0{i}_mask.gif").write_text("no") for i in range(9)],
         "9 of 10 pictures with their masks cannot be used: {0}/train_masks/car_00_mask.gif cannot be used: it is no "
         "picture, .* and 6 more"),
        (lambda f: shutil.rmtree(f / "train_masks"), "there is no folder {0}/train_masks, where {0}/train_masks/{{}}_mask"),
        (lambda f: [path.rename(path.with_suffix(".jpeg")) for path in (f / "train_images").iterdir()],
         "nothing in {0}/train_images matches *.jpg; there are 10 of .jpeg"),
        (lambda f: [path.unlink() for path in (f / "train_images").iterdir()], "matches *.jpg; there are no files"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_that_names_the_file(cars, change, message):
    change(cars)
    pattern = re.escape(message.format(cars)).replace(re.escape(".*"), ".*")
    assert re.search(pattern, refused(cars))


def test_a_folder_without_permission(cars, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))  # as it does where it may not look
    assert refused(cars) == f"{cars}/train_images cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": "cars/x.jpg"}, "images: expected a pattern with one *, as train_images/*.jpg, got cars/x.jpg"),
        ({"masks": "cars/*.gif"}, "masks: expected a pattern with {} for what * stands for, as train_masks/{}.png, got"),
        ({"images": "a/*.png", "masks": "a/{}.png"}, "images and masks are the same files: a/*.png"),
        ({"val_images": "a/*.jpg"}, "val_images and val_masks must be given together"),
        ({"test_masks": "a/{}.jpg"}, "test_images and test_masks must be given together"),
        ({"val_size": 0}, "val_size is how many pictures, from 1, or a share below 1, got 0"),
        ({"val_size": 1.5}, "val_size is how many pictures"),
        ({"test_size": -1}, "test_size is how many pictures"),
        ({"val_size": 4, "test_size": 6}, "of 10 pictures, 4 to val and 6 to test leave none to train on"),
        ({"classes": ["one"]}, "classes must be 2 to 254 different names"),
        ({"classes": ["one", "one"]}, "classes must be 2 to 254 different names"),
        ({"classes": ["a", "b", "c"], "mask_values": "binary"}, "binary masks have 2 classes, not 3"),
        ({"classes": ["a", "b", "c"], "invert": True}, "invert is for binary masks"),
        ({"batch_size": 0}, "batch sizes start at 1"),
        ({"image_size": (0, 5)}, "image_size must be at least 1"),
        ({"crop": (5, 0)}, "crop: height and width must be at least 1"),
        ({"repeat": 0}, "repeat must be at least 1"),
        ({"num_workers": -1}, "num_workers"),
        ({"normalize": ((0, 0, 0), (1, 0, 1))}, "normalize"),
        ({"augment": ["Rotat"]}, "albumentations has no Rotat; did you mean 'Rotate'?"),
        ({"augment": [{"Rotate": {"limits": 3}}]}, "Rotate takes no limits; did you mean 'limit'?"),
        ({"augment": [{"Rotate": {"mask_interpolation": 1}}]}, "augment: Rotate: mask_interpolation would mix classes"),
        ({"augment": [{"OneOf": {"transforms": [{"Affine": {"mask_interpolation": 2}}]}}]}, "would mix classes"),
        ({"augment": [3]}, "augment: expected a transform's name"),
        ({"augment": ["ToFloat"]}, "augment must leave pixels uint8"),
        ({"augment": [{"RandomCrop": {"height": 64, "width": 64}}]}, "augment: .*car_.*: Crop size"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_are_refused(cars, arguments, message):
    assert re.search(re.escape(message).replace(re.escape(".*"), ".*"), refused(cars, **arguments))


def test_a_class_that_is_not_there_is_told_with_its_file(cars):
    for path in (cars / "train_masks").iterdir():
        image = np.asarray(Image.open(path)) * (2 if "03" in path.name else 1)
        Image.fromarray(image).save(path.with_suffix(".png"))
    patterns = {"masks": f"{cars}/train_masks/{{}}_mask.png", "mask_values": "index"}
    message = refused(cars, **patterns)
    assert f"1 of 10 pictures with their masks cannot be used: {cars}/train_masks/car_03_mask.png cannot be" in message
    assert "it has pixels of class 2; there are 0 to 1" in message
    data = ready(cars, **patterns, classes=["road", "car", "bus"])
    assert data.classes == ("road", "car", "bus")
    assert {k for _, mask in data.train_set for k in np.unique(mask)} == {0, 1, 2}


def test_the_same_picture_on_both_sides_is_warned_of(cars):
    for kind in ("train_images/car_{}.jpg", "train_masks/car_{}_mask.gif"):
        for i in range(1, 10):
            shutil.copy(cars / kind.format("00"), cars / kind.format(f"{i:02d}"))
    with pytest.warns(UserWarning, match="1 of the pictures in val are in train, too"):
        ready(cars)


# -- augmentation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [None, (14, 18), (40, 24)])
def test_a_picture_and_its_mask_are_augmented_as_one(cars, crop):
    data = ready(cars, augment=EXACT, crop=crop, repeat=4)
    assert len(data.train_set) == 4 * 9
    seen, filled = set(), 0
    for number in range(3 * len(data.train_set)):
        image, mask = data.train_set[number]
        known = mask != IGNORE
        assert np.array_equal(image[..., 0][known] > 120, mask[known])
        assert (image[~known] == 0).all()  # what came in from outside
        assert {*np.unique(mask)} <= {0, 1, IGNORE}
        filled += (~known).sum()
        seen.add(mask.tobytes())
        if crop:
            assert {*image.shape[:2]} == {*crop}
    assert filled > 0
    assert len(seen) > 60


def test_what_comes_in_from_outside_can_be_background(cars):
    turn = {"limit": [30, 30], "p": 1.0}
    (_, ignored), (_, filled) = (
        ready(cars, augment=[{"Rotate": turn | more}]).train_set[0] for more in ({}, {"fill_mask": 0})
    )
    assert (ignored == IGNORE).mean() > 0.1
    assert np.array_equal(np.where(ignored == IGNORE, 0, ignored), filled)
    holes = {"CoarseDropout": {"num_holes_range": [9, 9], "p": 1.0}}
    assert (ready(cars, augment=[holes]).train_set[0][1] != IGNORE).all()  # of which the mask is known


def test_without_an_augmentation_pictures_are_flipped(cars):
    data = ready(cars, augment=None)
    assert [type(step).__name__ for step in data.augmentation.transforms] == ["HorizontalFlip"]
    plain = ready(cars)
    assert plain.augmentation is None
    for i in range(4):
        assert any(
            np.array_equal(data.train_set[i][1], mask)
            for mask in (plain.train_set[i][1], plain.train_set[i][1][:, ::-1])
        )


def test_an_epoch_is_the_same_again_and_another_is_not(cars):
    data = ready(cars, augment=EXACT, image_size=(16, 16), repeat=2)
    images, masks = epoch_of(data, 1)
    assert len(images) == 18
    again = ready(cars, augment=EXACT, image_size=(16, 16), repeat=2)
    assert all(map(torch.equal, (images, masks), epoch_of(again, 1)))
    others = epoch_of(data, 2)
    assert not torch.equal(masks, others[1])
    assert len({mask.numpy().tobytes() for mask in torch.cat([masks, others[1]])}) > 26  # no two are drawn alike


def test_the_number_of_workers_does_not_matter(cars):
    settings = {"augment": ["D4", "RandomBrightnessContrast"], "crop": (12, 12), "repeat": 2}
    expected = [epoch_of(ready(cars, **settings), epoch) for epoch in (0, 1)]
    for more in ({"num_workers": 2}, {"num_workers": 1, "in_memory": True}, {"in_memory": True}):
        data = ready(cars, **settings, **more)
        loader, found = data.train_dataloader(), []
        for epoch in (0, 1):  # as the Trainer does, with workers that go on
            loader.sampler.set_epoch(epoch)
            found.append(tuple(torch.cat(parts) for parts in zip(*loader, strict=True)))
        for batch, same in zip(found, expected, strict=True):
            assert all(map(torch.equal, batch, same))


def test_a_mask_that_vanishes_later_is_told_in_a_line(cars):
    data = ready(cars)
    remove(cars, "train_masks/car_03_mask.gif")
    with pytest.raises(PictureError) as raised:
        epoch_of(data)
    assert str(raised.value) == f"{cars}/train_masks/car_03_mask.gif cannot be used: No such file or directory"


def test_what_is_in_memory_is_not_changed(cars):
    data = ready(cars, in_memory=True, augment=["D4", "RandomBrightnessContrast"], image_size=(16, 16))
    before = pickle.dumps(data.train_set.kept)
    epoch_of(data)
    assert pickle.dumps(data.train_set.kept) == before
    assert len(data.val_set.kept) == 1
    shutil.rmtree(cars)
    assert len(epoch_of(data, 1)[0]) == 9


def test_what_spawned_workers_are_given_can_be_sent_to_them(cars):
    data = ready(cars, augment=EXACT)
    again = pickle.loads(pickle.dumps(data.train_set))
    assert all(map(np.array_equal, again[25], data.train_set[25]))


# -- batches -----------------------------------------------------------------------------------------------------------


def on_device(data: ImageMasks, batch: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(dtype=torch.float32))
    return data.on_after_batch_transfer(batch, 0)


def test_a_batch_is_uint8_channels_last_and_masks_of_classes(cars):
    data = ready(cars, image_size=(8, 12), normalize=((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), val_size=3)
    images, masks = next(iter(data.val_dataloader()))
    assert (images.shape, images.dtype) == ((3, 3, 8, 12), torch.uint8)
    assert (masks.shape, masks.dtype) == ((3, 8, 12), torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    normalised, same = on_device(data, (images, masks))
    assert same is masks
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    torch.testing.assert_close(normalised, (images / 255 - mean) / std)
    plain = ready(cars, image_size=(8, 12), normalize=None, val_size=3)
    torch.testing.assert_close(on_device(plain, (images, None))[0], images / 255)


def test_pictures_of_several_sizes_are_padded_with_what_does_not_count(cars):
    pixels, inside = blob(5, 25, 11)
    Image.fromarray(pixels).save(cars / "train_images" / "tall.jpg")
    Image.fromarray(inside).save(cars / "train_masks" / "tall_mask.gif")
    data = ready(cars, batch_size=16, split_seed=1)
    batch = next(iter(data.train_dataloader()))
    images, masks = on_device(data, batch)
    assert (images.shape, masks.shape) == ((10, 3, 25, 30), (10, 25, 30))
    assert {tuple(mask.shape) for mask in batch[1]} == {(20, 30), (25, 11)}
    for image, mask, small_image, small_mask in zip(images, masks, *batch, strict=True):
        h, w = small_mask.shape
        assert torch.equal(mask[:h, :w], small_mask)
        assert (mask[h:] == IGNORE).all()
        assert (mask[:, w:] == IGNORE).all()
        assert not image[:, h:].any()
        assert not image[:, :, w:].any()
        assert torch.equal(image[:, :h, :w], data.normalized(small_image[None], torch.float32)[0])
    found = on_device(data, (batch[0], None))  # a user's, without masks
    assert torch.equal(found[0], images)
    assert found[1] is None
    assert pad_masks([torch.zeros(2, 3, dtype=torch.long)]).sum() == 0


def test_a_users_picture_is_prepared_as_in_evaluation(cars, tmp_path):
    path = cars / "train_images" / "car_00.jpg"
    for size in (None, (9, 14)):
        data = ready(cars, image_size=size)
        image = data.read_input(path)
        index = names(data)["train"].index("car_00")
        assert torch.equal(image, torch.from_numpy(data.train_set[index][0]).permute(2, 0, 1))
    data = ImageMasks("nowhere/*.jpg", "nowhere/{}.png")  # without folder or setup
    assert data.read_input(path).shape == (3, 20, 30)
    damage(path)
    with pytest.raises(PictureError, match=r"car_00\.jpg cannot be read"):
        data.read_input(path)


def test_sizes_count_each_picture_once(cars):
    data = ready(cars, repeat=3, val_size=2)
    assert data.sizes["train"] == 8
    assert len(data.train_dataloader()) == 6
    assert len(data.val_dataloader().dataset) == 2


# -- train.py ----------------------------------------------------------------------------------------------------------

EXPERIMENT = """\
model:
  class_path: lit_models.unet.UNet
  init_args: {num_classes: 1, features: [4]}
data:
  class_path: datamodules.carvana.ImageMasks
  init_args:
    images: FOLDER/train_images/*.jpg
    masks: FOLDER/train_masks/{}_mask.gif
    val_size: 2
    image_size: [16, 24]
    crop: [12, 12]
    augment: [{Rotate: {limit: 35, p: 1.0}}, HorizontalFlip, {VerticalFlip: {p: 0.1}}]
    batch_size: 3
    num_workers: 1
checkpoint: {monitor: val/dice, mode: max}
trainer: {max_epochs: 2}
"""


@pytest.fixture
def experiment(tmp_path, cars) -> str:
    path = tmp_path / "my_masks.yaml"
    path.write_text(EXPERIMENT.replace("FOLDER", str(cars)))
    return str(path)


def test_a_stopped_and_resumed_run_ends_in_the_same_bits(experiment, train, monkeypatch, tmp_path):
    whole = train(experiment=experiment, tiny=())
    assert receipt(whole)["data"]["test_split"] == "val: there are no test pictures"
    assert (receipt(whole)["tested"], receipt(whole)["data"]["train"]) == (2, 8)
    assert torch.load(whole / "best.ckpt", weights_only=True)["ImageMasks"]["classes"] == ["background", "foreground"]
    assert main(["--verify", str(whole / "receipt.json")]) == 0
    whole = Path(shutil.move(whole, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_at(patch, epoch=1, batch=1, model=UNet)
        with pytest.raises(Stop):
            main([experiment])
    run = only_run(tmp_path)
    assert main(["--resume", str(run)]) == 0
    assert_same_run(whole, run)


def test_a_mistake_is_one_line_on_the_command_line(experiment, cars, capsys):
    remove(cars, "train_masks/car_03_mask.gif")
    assert main([experiment]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 1 of 10 pictures have no mask")
    assert err.count("\n") == 1


# -- the benchmark -----------------------------------------------------------------------------------------------------


def test_the_benchmark_pairs_the_ways_and_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    write_membrane(tmp_path, n=3)
    assert masks_speed.main(["--workers", "0", "--rounds", "1", "--pictures", "3", "--width", "480"]) == 0
    out = capsys.readouterr().out
    for name in ("drawn", "membrane"):
        for words in ("A  this project", "B  torchvision v2", "A / B"):
            assert any(name in line and words in line for line in out.splitlines())
    assert masks_speed.main(["--rounds", "0"]) == 2
    assert capsys.readouterr().err == "error: --rounds, --pictures and --width start at 1, --workers at 0\n"


# -- what would be wrong without a word --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        {"RandomScale": {"scale_limit": [-0.5, 1.0], "p": 1}},
        {"RandomResizedCrop": {"size": [50, 70], "scale": [0.5, 1]}},
        {"Resize": {"height": 33, "width": 90}},
    ],
)
def test_a_resized_mask_lies_on_its_picture(tmp_path, step):
    rows, columns = np.mgrid[:96, :128]
    disc = ((rows - 47) ** 2 + (columns - 60) ** 2 < 30**2).astype(np.uint8)
    for folder, suffix in (("train_images", ".jpg"), ("train_masks", "_mask.gif")):
        (tmp_path / folder).mkdir()
        for i in range(8):
            Image.fromarray(255 * disc).save(
                tmp_path / folder / f"{i}{suffix}", **({"quality": 100} if "jpg" in suffix else {})
            )
    data = ready(tmp_path, augment=[step], repeat=4)
    off = []
    for image, mask in data.train_set:
        places = [np.argwhere(there).mean(axis=0) for there in (image[..., 0] > 127, mask == 1)]
        off.append(places[0] - places[1])
    assert np.abs(np.mean(off, axis=0)).max() < 0.15  # plain INTER_NEAREST: 0.5


def test_what_mixes_classes_is_refused(cars):
    said = refused(cars, augment=[{"Resize": {"height": 9, "width": 9, "area_for_downscale": "image_mask"}}])
    assert "area_for_downscale image_mask would mix classes" in said


def test_a_class_that_augmentation_makes_up_is_told(cars):
    with pytest.raises(PictureError, match=r"makes pixels of class 7 in .*_mask\.gif: see its fill_mask"):
        epoch_of(ready(cars, augment=[{"Rotate": {"limit": [30, 35], "p": 1, "fill_mask": 7}}]))


class TestMeaning:
    """Two classes, and nobody said what the masks' values mean."""

    def of(self, folder: Path, *values: int) -> str:
        pixels = np.resize(np.array(values, np.uint8), (20, 30))
        for mask in (folder / "train_masks").iterdir():
            Image.fromarray(pixels).save(mask.with_suffix(".png"))
            mask.unlink()
        return refused(folder, masks=f"{folder}/train_masks/{{}}_mask.png")

    def test_void_is_not_foreground(self, cars):
        said = self.of(cars, 0, 1, 255)
        assert "pixels of 1 and of 255: say whether mask_values are binary" in said

    def test_classes_counted_from_1_leave_no_background(self, cars):
        assert "no mask of train has a pixel of background" in self.of(cars, 2)

    def test_masks_that_are_black(self, cars):
        assert "no mask of train has a pixel of foreground" in self.of(cars, 0)

    def test_said_they_are_read(self, cars):
        self.of(cars, 0, 1, 255)
        data = ready(cars, masks=f"{cars}/train_masks/{{}}_mask.png", mask_values="index")
        assert {0, 1, IGNORE} == {*np.unique(data.train_set[0][1])}


def test_a_lossy_webp_is_read_as_the_nearer(tmp_path):
    soft = cv2.GaussianBlur(WHERE.astype(np.uint8) * 255, (3, 3), 0)
    Image.fromarray(soft).save(tmp_path / "mask.webp", quality=80)
    found = read_mask(tmp_path / "mask.webp", BINARY)
    assert 0.7 < found.sum() / WHERE.sum() < 1.3
    with pytest.raises(PictureError, match="WEBP does not keep classes"):
        read_mask(tmp_path / "mask.webp", INDEX)


def test_pictures_to_test_on_are_told_once(cars):
    said = refused(
        cars, test_images=f"{cars}/train_images/*.jpg", test_masks=f"{cars}/train_masks/{{}}_mask.gif", test_size=2
    )
    assert said == "test_images or test_size, not both"
