"""Oxford-IIIT Pet: photographs of cats and dogs, and which pixels are the pet. 3,680 to train, 3,669 to test.

Source: Parkhi, Vedaldi, Zisserman, Jawahar 2012, Cats and Dogs (https://www.robots.ox.ac.uk/~vgg/data/pets/).
"""

from pathlib import Path
from typing import Literal

from datamodules.files import data_dir
from datamodules.mask_files import IGNORE, Coding
from datamodules.masks import DownloadedMasks


class Pets(DownloadedMasks):
    """Found under `DATA_DIR/oxford-iiit-pet` (default: `data`) as torchvision unpacks it, or downloaded there (0.8 GB).

    Its masks ("trimaps") tell the pet, the background, and an outline between them of pixels that were not classified.
    Pictures differ in size, so `image_size` or `crop` is to be given.

    Args:
        outline: whether the outline counts as nothing, or is a third class.
        files: arguments of `DownloadedMasks`.
    """

    title, images, masks = "Oxford-IIIT Pet", "images", "annotations/trimaps"
    lists = "annotations/trainval.txt", "annotations/test.txt"

    def __init__(self, outline: Literal["ignore", "class"] = "ignore", **files):
        super().__init__(**files)
        self.classes = ("background", "pet", "outline") if outline == "class" else ("background", "pet")
        self.coding = Coding({1: 1, 2: 0, 3: 2 if outline == "class" else IGNORE})

    @property
    def path(self) -> Path:
        """Where `images` and `annotations` are."""
        return data_dir() / "oxford-iiit-pet"

    @property
    def archives(self) -> str:
        """What there is to unpack, and where."""
        return f"images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets in {self.path}"

    def download(self) -> None:
        """Have torchvision download it. (It does not if there are both folders, whatever is in them.)"""
        from torchvision.datasets import OxfordIIITPet  # a second to import: only if it is needed

        OxfordIIITPet(str(data_dir()), download=True)
