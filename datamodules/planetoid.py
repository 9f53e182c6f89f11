"""Citation networks: Cora, CiteSeer and PubMed.

Sources: Sen et al. 2008, split as by Yang et al. 2016 (https://github.com/kimiyoung/planetoid).
"""

import pickle
import urllib.request
import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.files import data_dir, download
from datamodules.graphs import GraphDataModule, normalize_rows
from runner.errors import InputError, one_line
from runner.files import write_whole

CORA = (  # in the order of the files, told by their counts: 351, 217, 418, 818, 426, 298, 180
    "Theory",
    "Reinforcement Learning",
    "Genetic Algorithms",
    "Neural Networks",
    "Probabilistic Methods",
    "Case Based",
    "Rule Learning",
)
KNOWN = (
    ("numpy", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("scipy", "csr_matrix"),
    ("collections", "defaultdict"),
    ("builtins", "list"),
    ("__builtin__", "list"),
    ("_codecs", "encode"),
)


class Planetoid(GraphDataModule):
    """Papers that cite each other, the words in them, and the field of each, in the public split of Yang et al. 2016.

    20 papers of each class train, 500 validate, 1,000 test, the same ones everywhere; the rest have no labels that count.
    The files are those of PyTorch Geometric, in `DATA_DIR` (default: `data`) below `Planetoid/<name>/raw`; they are
    downloaded if they are not there. Nothing else is written.

    Args:
        name: Cora: 2,708 papers on machine learning, 1,433 features (whether a word occurs), 7 classes. CiteSeer: 3,327, 3,703
            and 6. PubMed: 19,717 on diabetes, 500 (TF-IDF) and 3.
        normalize: whether each paper's features are divided by their sum.
        data: arguments of `GraphDataModule`.
    """

    def __init__(self, name: Literal["Cora", "CiteSeer", "PubMed"] = "Cora", normalize: bool = True, **data):
        super().__init__(**data)
        self.name, self.normalize = name, normalize
        self.download_error = ""
        self.classes = CORA if name == "Cora" else tuple("012345" if name == "CiteSeer" else "012")

    @property
    def folder(self) -> Path:
        """Where the eight files are, or are downloaded to."""
        return data_dir() / "Planetoid" / self.name / "raw"

    @property
    def files(self) -> list[str]:
        """Their names."""
        parts = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
        return [f"ind.{self.name.lower()}.{part}" for part in parts]

    @property
    def missing(self) -> list[str]:
        """Those that are not there."""
        return [file for file in self.files if not (self.folder / file).is_file()]

    def prepare_data(self) -> None:
        """Download what is missing; leave it to `setup` to say what could not be had."""
        if self.download_error or not self.missing:
            return
        url = _geometric().datasets.Planetoid.url

        def fetch() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in self.missing:
                with urllib.request.urlopen(f"{url}/{file}") as content:
                    write_whole(self.folder / file, content.read())

        self.download_error = download(self.name, self.folder, fetch)

    def setup(self, stage: str | None = None) -> None:
        """Read the files into memory.

        Raises:
            InputError: one is missing, or damaged.
        """
        if self.train_set is not None:
            return
        if self.missing:
            raise InputError(
                f"{self.name} is not in {self.folder} ({self.download_error or 'no download was tried'}): put "
                f"{', '.join(self.missing)} there, from torch_geometric.datasets.Planetoid(root, {self.name!r}) on a "
                "machine with a network, or set DATA_DIR"
            )
        said = [_read_pickle(self.folder / file) for file in self.files[:-1]]
        read = _geometric().io.read_planetoid_data
        try:
            with warnings.catch_warnings(action="ignore"):  # of old names in the files
                graph = read(str(self.folder), self.name)
            edges = graph.edge_index.contiguous()
            split = {part: graph[f"{part}_mask"].nonzero()[:, 0] for part in ("train", "val", "test")}
            nodes = torch.cat(list(split.values()))
            papers = len(graph.x) if len(nodes.unique()) == len(nodes) and len(split["test"]) == said[1].shape[0] else 0
            if edges.max() >= papers or graph.y.max() >= len(self.classes):
                raise ValueError("features, labels, citations and split do not fit together")
        except Exception as error:  # of many kinds
            raise InputError(
                f"the files in {self.folder} are damaged: {one_line(error)[:100]}; delete them to download them again"
            ) from None
        self.keep(normalize_rows(graph.x) if self.normalize else graph.x, edges, graph.y, split)
        self.source = f"files in {self.folder}"


def _geometric():
    """Return PyTorch Geometric. The import takes a second: only if it is needed."""
    with warnings.catch_warnings(action="ignore"):  # of what torch is going to remove
        import torch_geometric.datasets
        import torch_geometric.io
    return torch_geometric


class _Unpickler(pickle.Unpickler):
    """Arrays, sparse matrices and a dictionary of lists are all that these files hold: what else could be called is refused."""

    def find_class(self, module: str, name: str):
        package = module.partition(".")[0]
        if (package, name) in KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def _read_pickle(path: Path) -> Any:
    """Return what is in a file; raise InputError if it is no pickle, or would run something when it is read."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            return _Unpickler(file, encoding="latin1").load()
    except Exception as error:  # unpickling raises many kinds
        raise InputError(f"{path} is damaged: {one_line(error)[:80]}; delete it to download it again") from None
