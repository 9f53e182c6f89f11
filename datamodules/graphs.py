"""Graphs whose nodes are told apart: Zachary's karate club, citation networks (Cora, CiteSeer, PubMed), and your own.

Of a node's neighbours in the test set the network sees the features and the edges, and never the labels (Yang et al. 2016).

Sources: Zachary 1977; Sen et al. 2008, split as by Yang et al. 2016 (https://github.com/kimiyoung/planetoid).

Shapes: N nodes, E edges, D features, B nodes of a batch.
"""

import csv
import functools
import hashlib
import math
import pickle
import re
import urllib.request
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.seeding import epoch_seed
from datamodules.files import data_dir, download
from datamodules.in_memory import EpochShuffle, InMemoryDataModule, InMemoryDataset
from lit_models.gnn import Edges, Graph
from lit_models.graph_sage import NeighbourSampler
from runner.errors import InputError, did_you_mean, existing_file, one_line
from runner.files import write_whole

SPARSE = 0.1  # features of which fewer than that share are not zero are kept as a sparse matrix: so are bags of words
Batch = tuple[Tensor, Tensor, Graph]


class GraphDataModule(InMemoryDataModule):
    """A batch is (nodes, labels, graph): nodes (B,), where in the network's output those stand that count; labels (B,).

    The graph is the whole one, or what is sampled of it around the batch's nodes: in training by (seed, epoch), in
    validation and test with all neighbours, so that nothing there is left to chance.

    A subclass's `setup` calls `keep`, and sets `source` and, unless it is known before, `classes`.

    Args:
        fan_outs: how many neighbours a node hears from in training, from the batch's nodes outwards, one for each layer; null
            in the list is all of them; null in its place gives the whole graph as a batch.
        batch_size: training nodes in a batch of what is sampled.
        eval_batch_size: the same in validation and test.
    """

    classes: tuple[str, ...]

    def __init__(self, fan_outs: list[int | None] | None = None, batch_size: int = 32, eval_batch_size: int = 500):
        super().__init__(batch_size, eval_batch_size)
        if fan_outs is not None and (not fan_outs or min(n or 1 for n in fan_outs) < 1 or 0 in fan_outs):
            raise InputError(f"fan_outs: at least 1 neighbour, or null, for each layer, got {fan_outs}")
        self.fan_outs = fan_outs

    def keep(self, features: Tensor, edges: Tensor, labels: Tensor, split: dict[str, Tensor]) -> None:
        """Take over a graph.

        Args:
            features: (N, D).
            edges: (2, E), from and to; none twice, and no self-loops.
            labels: (N,), -1 where there is none.
            split: the nodes of `train`, `test` and, if there are any, `val`, all with labels.
        """
        self.features, self.edges, self.labels = features, edges, labels
        is_sparse = features.count_nonzero() < SPARSE * features.numel()
        self._features = features.to_sparse().coalesce() if is_sparse else features
        self.graph = Graph(self._features, [Edges(edges, len(features), len(features))])
        self._sampler = NeighbourSampler(edges, len(features))
        sets = {name: InMemoryDataset(nodes, labels[nodes]) for name, nodes in split.items() if len(nodes)}
        self.val_set, self.test_set, self.train_set = sets.get("val"), sets["test"], sets["train"]

    @property
    def num_features(self) -> int:
        """D."""
        return self.features.shape[1]

    def train_dataloader(self) -> DataLoader:
        """The whole graph as a batch, or shuffled batches of nodes with what is sampled around them."""
        if self.fan_outs is None:
            return self._whole(self.train_set)
        order = EpochShuffle(len(self.train_set))

        def sample(batch: tuple[Tensor, Tensor]) -> Batch:
            nodes, labels = batch  # (B,), (B,)
            generator = torch.Generator().manual_seed(epoch_seed(order.epoch, 1, int(nodes[0])))
            return torch.arange(len(nodes)), labels, self.around(nodes, self.fan_outs, generator)

        return DataLoader(self.train_set, self.batch_size, sampler=order, collate_fn=sample)

    def val_dataloader(self) -> DataLoader | list:
        """The whole graph, or batches of nodes with all that bears on them; an empty list leaves validation out."""
        return self._exact(self.val_set) if self.val_set else []

    def test_dataloader(self) -> DataLoader:
        """The whole graph, or batches of nodes with all that bears on them."""
        return self._exact(self.test_set)

    def _exact(self, dataset: InMemoryDataset) -> DataLoader:
        if self.fan_outs is None:
            return self._whole(dataset)
        return DataLoader(dataset, self.eval_batch_size, collate_fn=lambda batch: self.batch_of(*batch))

    def _whole(self, dataset: InMemoryDataset) -> DataLoader:
        return DataLoader(dataset, len(dataset), collate_fn=lambda batch: (*batch, self.graph))

    def batch_of(self, nodes: Tensor, labels: Tensor | None = None) -> Batch:
        """Return a batch of nodes (B,) with all that bears on them: the whole graph, or all neighbours in so many steps."""
        labels = self.labels[nodes] if labels is None else labels
        if self.fan_outs is None:
            return nodes, labels, self.graph
        return torch.arange(len(nodes)), labels, self.around(nodes, [None] * len(self.fan_outs))

    def around(self, nodes: Tensor, fan_outs: list[int | None], generator: torch.Generator | None = None) -> Graph:
        """Return what is sampled around nodes (B,)."""
        needed, edges = self._sampler.sample(nodes, fan_outs, generator)
        features = self._features.index_select(0, needed)
        return Graph(features.coalesce() if features.is_sparse else features, edges)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn floats to the model's kind of float."""
        nodes, labels, graph = batch
        return nodes, labels, graph.to(dtype=self.trainer.lightning_module.dtype)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of features, edges, labels and split."""
        digest = hashlib.sha256()
        for tensor in (self.features, self.edges, self.labels):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().numpy())
        for dataset in (self.train_set, self.val_set, self.test_set):
            digest.update(f"{dataset.tensors[0].tolist() if dataset else []}".encode())
        return digest.hexdigest()


class KarateClub(GraphDataModule):
    """34 members of a karate club, who was friends with whom, and with whom each went when it split in two (Zachary 1977).

    There is nothing else to know of a member: feature i is 1 for member i, and 0 for all others. It comes with networkx
    (whose weights, in how many places two friends met, are left out), and has no validation set.

    Args:
        labelled: the members that are trained on; all others test. 0 is the instructor and 33 the officer who fell out.
        data: arguments of `GraphDataModule`.
    """

    classes = ("Mr. Hi", "Officer")

    def __init__(self, labelled: tuple[int, ...] = (0, 33), **data):
        super().__init__(**data)
        self.labelled = labelled

    def setup(self, stage: str | None = None) -> None:
        """Read the graph.

        Raises:
            InputError: not each of the two has a labelled member, or there is no such member.
        """
        if self.train_set is not None:
            return
        import networkx

        club = networkx.karate_club_graph()
        labels = torch.tensor([self.classes.index(club.nodes[i]["club"]) for i in range(len(club))])  # (34,)
        train = torch.tensor(sorted(set(self.labelled)), dtype=torch.int64)
        if len(train) and not 0 <= train.min() <= train.max() < len(club):
            raise InputError(f"labelled: members are 0 to {len(club) - 1}, got {list(self.labelled)}")
        if len(labels[train].unique()) < len(self.classes):
            raise InputError(f"labelled: at least one member of each side, such as 0 and 33, got {list(self.labelled)}")
        if len(train) == len(club):
            raise InputError("labelled: all members: that leaves none to test")
        test = torch.tensor([i for i in range(len(club)) if i not in self.labelled])
        edges = torch.tensor(sorted(club.to_directed().edges)).t().contiguous()  # (2, E): both ways
        self.keep(torch.eye(len(club)), edges, labels, {"train": train, "test": test})
        self.source = "Zachary's karate club, of the package networkx"


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


CORA = (  # in the order of the files, told by their counts: 351, 217, 418, 818, 426, 298, 180
    "Theory",
    "Reinforcement Learning",
    "Genetic Algorithms",
    "Neural Networks",
    "Probabilistic Methods",
    "Case Based",
    "Rule Learning",
)


def _geometric():
    """Return PyTorch Geometric. The import takes a second: only if it is needed."""
    with warnings.catch_warnings(action="ignore"):  # of what torch is going to remove
        import torch_geometric.datasets
        import torch_geometric.io
    return torch_geometric


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


def normalize_rows(features: Tensor) -> Tensor:
    """Divide each row of (N, D) by the sum of its absolute values; one of zeros stays so."""
    total = features.abs().sum(dim=1, keepdim=True)
    return features / total.where(total > 0, 1)


class EdgeList(GraphDataModule):
    """A graph of your own, in two CSV files (comma, semicolon or tab between columns).

        edges.csv       nodes.csv
        from,to         age,visits,label,split
        0,1             31,4,member,train
        0,2             47,0,guest,val

    A node is named by its row in the second file, the first being 0, or by what stands in a column there. Edges that are
    given more than once count once; self-loops are left out, since every model sees a node itself anyway; nodes without
    edges are kept. How many there were of each is told by `source`.

    Args:
        edges: the file of edges; its first two columns are read. A first line that names no nodes is taken for a header.
        nodes: the file of nodes, with names in its first line.
        label, split: its columns for the class, any text, and for `train`, `val` or `test`; an empty split leaves the node
            in the graph, and its label out.
        id: its column for the nodes' names; null: they are numbered.
        features: its columns of numbers; null takes all others.
        directed: whether messages pass only from the first to the second; else an edge given one way goes both ways.
        normalize: whether each node's features are divided by the sum of their absolute values.
        data: arguments of `GraphDataModule`.
    """

    def __init__(
        self,
        edges: str,
        nodes: str,
        label: str = "label",
        split: str = "split",
        id: str | None = None,
        features: list[str] | None = None,
        directed: bool = False,
        normalize: bool = False,
        **data,
    ):
        super().__init__(**data)
        self.edges_file, self.nodes_file = Path(edges), Path(nodes)
        self.label, self.split, self.id, self.columns = label, split, id, features
        self.directed, self.normalize = directed, normalize

    def setup(self, stage: str | None = None) -> None:
        """Read the files.

        Raises:
            InputError: what is in them cannot be used; names file and line.
        """
        if self.train_set is not None:
            return
        features, labels, split, names = self._read_nodes()
        index, told = self._read_edges(names)
        n = len(features)
        alone = n - len(index.unique())
        told += [f"{alone} node{'s' * (alone > 1)} without edges"] * (alone > 0)
        self.keep(normalize_rows(features) if self.normalize else features, index, labels, split)
        count = index.shape[1] if self.directed else index.shape[1] // 2
        files = f"{self.edges_file} and {self.nodes_file}"
        self.source = f"{n:,} nodes and {count:,} edges of {files}" + (f" ({', '.join(told)})" if told else "")

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints say of the data: what it was, and the names of the classes that the network tells apart."""
        return {**super().state_dict(), "classes": list(self.classes)}

    def _read_nodes(self) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, int]]:
        path = self.nodes_file
        (first, header), *rows = _read_table(path, "nodes")
        named = [self.label, self.split, *([self.id] if self.id else []), *(self.columns or [])]
        for column in named:
            if header.count(column) != 1:
                why = f"{header.count(column)} columns" if column in header else "no column"
                raise InputError(f"{path}:{first}: {why} {column!r} in its first line{did_you_mean(column, header)}")
        columns = self.columns or [name for name in header if name not in named]
        if not rows or not columns:
            raise InputError(
                f"{path}:{first}: no {'columns of features' if rows else 'rows below the names of columns'}"
            )
        at = {name: header.index(name) for name in {*named, *columns}}
        parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        names, texts, table = {}, [], []
        for i, (line, row) in enumerate(rows):
            where = f"{path}:{line}"
            if len(row) != len(header):
                raise InputError(f"{where}: {len(row)} columns, and {len(header)} names of columns in the first line")
            name, part, text = row[at[self.id]] if self.id else str(i), row[at[self.split]], row[at[self.label]]
            if part and part not in parts:
                raise InputError(
                    f"{where}: {self.split} {part!r} is none of train, val, test{did_you_mean(part, parts)}"
                )
            if part and not text:
                raise InputError(f"{where}: a node to {part} on, and no {self.label}")
            if name in names or not name:
                raise InputError(f"{where}: {self.id} {name!r} {'stands on a line before' if name else 'is no name'}")
            names[name] = i
            texts.append(text if part else "")
            table.append([_number(where, column, row[at[column]]) for column in columns])
            if part:
                parts[part].append(i)
        for part in ("train", "test"):
            if not parts[part]:
                raise InputError(f"{path}: no node has {part!r} in its column {self.split!r}")
        kinds = sorted({text for text in texts if text}, key=_natural)
        self.classes = tuple(kinds)
        labels = torch.tensor([kinds.index(text) if text else -1 for text in texts])
        if unseen := set(kinds) - {texts[i] for i in parts["train"]}:
            warnings.warn(f"{path}: no node to train on is of class {', '.join(sorted(unseen))}", stacklevel=2)
        split = {part: torch.tensor(nodes, dtype=torch.int64) for part, nodes in parts.items()}
        return torch.tensor(table), labels, split, names

    def _read_edges(self, names: dict[str, int]) -> tuple[Tensor, list[str]]:
        """Return the edges (2, E), and what was left out of them, in words."""
        path, pairs = self.edges_file, Counter()
        for i, (line, row) in enumerate(_read_table(path, "edges")):
            if len(row) < 2:
                raise InputError(f"{path}:{line}: expected two nodes, got {','.join(row)!r}")
            ends = row[:2] if self.id else [_plain(cell) for cell in row[:2]]
            unknown = [cell for cell, end in zip(row, ends, strict=False) if end not in names]
            if unknown and i == 0 and len(unknown) == 2 and (self.id or not any(map(_is_whole, row[:2]))):
                continue  # a header
            if unknown:
                hint = did_you_mean(unknown[0], names) if self.id else f": they are 0 to {len(names) - 1}"
                raise InputError(f"{path}:{line}: {self.nodes_file} has no node {unknown[0]!r}{hint}")
            pairs[names[ends[0]], names[ends[1]]] += 1
        loops = sum(count for (a, b), count in pairs.items() if a == b)
        ways = {(a, b) for a, b in pairs if a != b}
        duplicates = sum(pairs.values()) - loops - len(ways)
        one_way = sum((b, a) not in ways for a, b in ways)
        if not self.directed:
            ways |= {(b, a) for a, b in ways}
        counts = {"self-loop": loops, "duplicate": duplicates}
        told = [f"{n:,} {what}{'s' * (n > 1)} left out" for what, n in counts.items() if n]
        told += [f"{one_way:,} given one way"] * (one_way > 0 and not self.directed)
        return torch.tensor(sorted(ways), dtype=torch.int64).view(-1, 2).t().contiguous(), told


def _read_table(path: Path, what: str) -> list[tuple[int, list[str]]]:
    """Return the rows of a CSV file with the lines that they begin on; empty ones are left out.

    Raises:
        InputError: it does not exist, or is no table.
    """
    path = existing_file(path, what, ".csv")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    lines = text.splitlines()
    head = re.sub(r'"[^"]*"', "", next((line for line in lines if line.strip()), ""))
    reader = csv.reader(lines, delimiter=next((mark for mark in ",;\t" if mark in head), ","))
    rows, line = [], 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((line, [cell.strip() for cell in row]))
            line = reader.line_num + 1  # a quoted cell can go over several lines
    except csv.Error as error:
        raise InputError(f"{path}:{line}: {error}") from None
    if not rows and what == "nodes":
        raise InputError(f"{path}: no rows: expected the names of columns, and a row for each node")
    return rows


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d+", text) is not None


def _plain(text: str) -> str:
    """Return a whole number as it is usually written: 7 for 007."""
    return str(int(text)) if _is_whole(text) else text


def _number(where: str, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= torch.finfo(torch.float32).max:  # nor is nan, of which this is false, too
        raise InputError(f"{where}: expected a number in column {column!r}, got {text!r}")
    return value


def _natural(text: str) -> tuple:
    """Return a key to sort by: whole numbers by their value, before other texts."""
    return (0, int(text), text) if _is_whole(text) else (1, 0, text)
