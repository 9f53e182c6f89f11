"""Which data the experiments want, and whether it is there: for `python train.py --doctor`.

The data modules know that too, but need torch for it; a test holds what is said here against them. Nothing is downloaded.
"""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from datamodules.files import data_dir
from runner.files import read_yaml

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
SECONDS = 0.3  # to add up a folder's files: of a large one on a slow disk, the sum is of a part of them

IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
PLANETOID = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
MADE = (  # by code, or what comes with Python or a package
    "curves.NoisyPolynomial", "lines.Line", "random_pairs.RandomPairs", "series.Series", "shapes.Shapes",
    "captions.Captions", "dates.Dates", "graphs.KarateClub", "text.Text",
)  # fmt: skip
MEGABYTES = {  # to download
    "MNIST": 12, "FashionMNIST": 31, "CIFAR-10": 170, "hymenoptera": 47, "names": 3, "Cora": 1, "tiny Shakespeare": 1,
    "Oxford-IIIT Pet": 800, "VOC2007": 900, "VOC2012": 2000, "VOC2012 masks": 2000,
    "weights mobilenet_v2": 14, "weights resnet50": 103, "weights vit_b_16": 346,
}  # fmt: skip
BY_HAND = {
    "BCCD": "github.com/Shenggan/BCCD_Dataset",
    "membrane": "github.com/zhixuhao/unet",
    "carvana": "kaggle.com/c/carvana-image-masking-challenge",
}


@dataclass(frozen=True)
class Data:
    """What an experiment reads.

    Attributes:
        name: what the report calls it.
        places: each the paths that must all be there, below `DATA_DIR`; one such place is enough.
        folder: its folder, if one of that name in the working folder is taken first.
        has_download: whether a run downloads it.
    """

    name: str
    places: tuple[tuple[str, ...], ...]
    folder: str = ""
    has_download: bool = True

    def root(self) -> Path:
        """Return the folder that `places` are below."""
        return Path() if self.folder and Path(self.folder).expanduser().is_dir() else data_dir()

    def found(self) -> list[Path]:
        """Return the paths of the first place that is whole; none if there is none."""
        for place in self.places:
            paths = [(self.root() / path) for path in place]
            if all(path.exists() for path in paths):
                return paths
        return []

    def top(self) -> Path:
        """Return the file, or the folder of all that was found."""
        return Path(os.path.commonpath(self.found()))

    def missing(self) -> list[Path]:
        """Return what is missing of a place that is there in part; nothing if there is nothing of it."""
        for place in self.places:
            paths = [self.root() / path for path in place]
            if any(path.exists() for path in paths):
                return [path for path in paths if not path.exists()]
        return []


def wanted_by(experiment: dict) -> list[Data]:
    """Return what an experiment reads: its data, if it is not made by code, and weights of networks trained elsewhere.

    Raises:
        LookupError: its data is of a kind that is not known here.
    """
    data = experiment["data"]
    return [*_data(data["class_path"].removeprefix("datamodules."), data.get("init_args", {})),
            *_weights(experiment["model"])]  # fmt: skip


def _data(kind: str, given: dict) -> list[Data]:
    folder, url = given.get("folder", ""), bool(given.get("url"))
    if kind in ("series.Series", "text.Text") and (file := given.get("file")):
        return [Data(file, ((file,), (str(Path(file).absolute()),)), has_download=False)]
    if kind == "text.Text" and given.get("source") == "shakespeare":
        return [Data("tiny Shakespeare", (("tinyshakespeare/input.txt",),))]
    if kind in MADE:
        return []
    if kind in ("mnist.MNIST", "mnist.FashionMNIST"):
        name = kind.partition(".")[2]
        return [Data(name, (tuple(f"{name}/raw/{file}" for file in IDX),))]
    if kind in ("cifar10.CIFAR10", "cifar10.RandAugmentCIFAR10"):
        return [Data("CIFAR-10", (("cifar-10-batches-py",), ("cifar10",), ("cifar10.tar.gz",)))]
    if kind == "graphs.Planetoid":
        name = given.get("name", "Cora")
        return [Data(name, (tuple(f"Planetoid/{name}/raw/ind.{name.lower()}.{part}" for part in PLANETOID),))]
    if kind == "image_folder.ImageFolder":
        return [Data(folder, ((folder, f"{folder}/train"),), folder, url)]
    if kind == "names.Names":
        return [Data(folder, ((folder,),), folder, url)]
    if kind == "carvana.ImageMasks":
        masks = (_folder_of(given["images"]), _folder_of(given["masks"]))
        return [Data(masks[0].partition("/")[0], (masks,), masks[0], has_download=False)]
    if kind == "pets.Pets":
        parts = ("images", "annotations/trimaps", "annotations/trainval.txt", "annotations/test.txt")
        return [Data("Oxford-IIIT Pet", (tuple(f"oxford-iiit-pet/{part}" for part in parts),))]
    if kind == "voc_segmentation.VOCSegmentation":
        year = given.get("year", 2012)
        lists = (f"ImageSets/Segmentation/{part}.txt" for part in ("train", "val"))
        parts = ("JPEGImages", "SegmentationClass", *lists)
        return [Data(f"VOC{year} masks", (tuple(f"VOCdevkit/VOC{year}/{part}" for part in parts),))]
    if kind == "voc.VOC":
        year = given.get("year")
        lists = ("train", "val", *(("test",) if str(year) == "2007" and not folder else ()))
        folder = folder or f"VOCdevkit/VOC{year}"
        parts = ("Annotations", "JPEGImages", *(f"ImageSets/Main/{part}.txt" for part in lists))
        places = (tuple(f"{folder}/{part}" for part in parts),)
        return [Data(folder.rpartition("/")[2], places, folder, bool(year))]
    raise LookupError(f"data of a kind that is not known here: {kind}")


def _folder_of(pattern: str) -> str:
    """carvana/train_images/*.jpg -> carvana/train_images."""
    return str(Path(pattern.partition("*")[0].partition("{")[0] + "x").parent)


def _weights(node: object) -> list[Data]:
    """Return the files of weights that a model's settings name, at any depth."""
    if isinstance(node, list):
        return [data for item in node for data in _weights(item)]
    if not isinstance(node, dict):
        return []
    inner = [data for item in node.values() for data in _weights(item)]
    given = node.get("init_args") or {}
    names = given.get("weights") or []
    names = [names] if isinstance(names, str) else names
    if not names:
        return inner
    network = given.get("network") or given.get("backbone")
    network = network if isinstance(network, str) else "vit_b_16"  # lit_models.vit.ViT's
    files = [name for name in names if "/" in name or "." in name]
    has_download = len(files) < len(names)
    places = [(place,) for name in files for place in (str(Path(name).absolute()), name)]
    if has_download:  # under a name that ends in the first digits of its hash
        cache = Path(os.environ.get("TORCH_HOME") or "~/.cache/torch").expanduser() / "hub" / "checkpoints"
        places += [
            (str(f),) for folder in (data_dir() / "weights", cache) for f in folder.absolute().glob(f"{network}-*.pth")
        ]
    return [*inner, Data(f"weights {network}", tuple(places), has_download=has_download)]


def experiments_by_data() -> tuple[dict[Data, int], int, list[str]]:
    """Return how many experiments read each data, how many need none, and what could not be understood."""
    counts: Counter[Data] = Counter()
    made, odd = 0, []
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        try:
            wanted = wanted_by(read_yaml(path))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            odd.append(f"{path.name}: {error}")
            continue
        counts.update(wanted)
        made += not wanted
    return (
        dict(sorted(counts.items(), key=lambda item: (item[0].name.startswith("weights"), item[0].name.lower()))),
        made,
        odd,
    )


def size_of(path: Path) -> str:
    """Return how large a file or folder is, as a person reads it; `at least` where adding up took too long."""
    end, total, waiting = time.monotonic() + SECONDS, 0, [str(path)]
    while waiting and time.monotonic() < end:
        path = waiting.pop()
        try:
            if os.path.isdir(path):
                waiting += [entry.path for entry in os.scandir(path)]
            else:
                total += os.path.getsize(path)
        except OSError:
            continue
    return ("at least " if waiting else "") + bytes_text(total)


def bytes_text(n: float) -> str:
    """Return a number of bytes as a person reads it: 1,234,567 is 1.2 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.1f} {unit}" if n < 10 * size else f"{n / size:,.0f} {unit}"
    return f"{n / 1e3:.0f} kB"
