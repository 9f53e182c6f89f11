"""Pascal VOC's segmentation: the class of each pixel, 20 kinds of objects and the background.

Source: Everingham et al. 2010, The Pascal Visual Object Classes Challenge, IJCV 88.
"""

from pathlib import Path
from typing import Literal

from datamodules.files import data_dir
from datamodules.mask_files import IGNORE, Coding
from datamodules.masks import DownloadedMasks
from datamodules.voc import CLASSES


class VOCSegmentation(DownloadedMasks):
    """Found under `DATA_DIR/VOCdevkit/VOC<year>` (default: `data`), or downloaded there (2012: 2 GB).

    Its masks are palettes: an index is a class, and 255, outlines and what was too difficult, counts as nothing. The
    official validation set (1,449 pictures in 2012) is tested, as in most papers, since the masks of 2012's test set are
    not public; what is validated on is drawn from the training set (1,464 pictures). They have up to 500 x 500 pixels.

    Args:
        year: 2012 or 2007.
        files: arguments of `DownloadedMasks`.
    """

    images, masks = "JPEGImages", "SegmentationClass"
    lists = "ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"
    classes = ("background", *CLASSES)
    coding = Coding({k: k for k in range(len(CLASSES) + 1)} | {IGNORE: IGNORE})

    def __init__(self, year: Literal["2007", "2012", 2007, 2012] = 2012, **files):
        super().__init__(**files)
        self.year, self.title = str(year), f"Pascal VOC {year}"

    @property
    def path(self) -> Path:
        """Where `JPEGImages`, `SegmentationClass` and `ImageSets` are."""
        return data_dir() / "VOCdevkit" / f"VOC{self.year}"

    @property
    def archives(self) -> str:
        """What there is to unpack, and where."""
        return f"VOCtrainval's archive in {data_dir()}"

    def download(self) -> None:
        """Have torchvision download it."""
        from torchvision.datasets import VOCSegmentation as Download  # a second to import: only if it is needed

        Download(str(data_dir()), year=self.year, image_set="trainval", download=True)
