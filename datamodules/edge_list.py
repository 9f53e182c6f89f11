"""A graph of your own, in two CSV files: one of its edges, one of its nodes.

Shapes: N nodes, E edges, D features.
"""

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.csv_rows import finite_number, read_rows
from datamodules.graphs import GraphDataModule, normalize_rows
from runner.errors import InputError, did_you_mean


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
        self.named = [label, split, *([id] if id else []), *(features or [])]
        if twice := [column for column in self.named if self.named.count(column) > 1]:
            raise InputError(f"label, split, id and features name the column {twice[0]!r} twice")
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
        """Return features (N, D), labels (N,), the nodes of each part, and each node's number by its name."""
        path, rows = self.nodes_file, read_rows(self.nodes_file, "nodes")
        if not rows:
            raise InputError(f"{path}: no rows: expected the names of columns, and a row for each node")
        (first, header), *rows = rows
        columns = self._feature_columns(f"{path}:{first}", header)
        if not rows:
            raise InputError(f"{path}:{first}: no rows below the names of columns")
        at = {name: header.index(name) for name in {*self.named, *columns}}
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
            table.append([_feature(where, column, row[at[column]]) for column in columns])
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

    def _feature_columns(self, where: str, header: list[str]) -> list[str]:
        """Return the names of the columns of features; no column that counts may be there twice, or not at all."""
        columns = self.columns or [name for name in header if name not in self.named]
        for name in (*self.named, *columns):
            if name not in header:
                raise InputError(f"{where}: no column {name!r} in its first line{did_you_mean(name, header)}")
            if header.count(name) > 1:
                raise InputError(
                    f"{where}: {header.count(name)} columns {name!r} in its first line: give each its name"
                )
        if not columns:
            raise InputError(f"{where}: no columns of features")
        return columns

    def _read_edges(self, names: dict[str, int]) -> tuple[Tensor, list[str]]:
        """Return the edges (2, E), and what was left out of them, in words."""
        path, pairs = self.edges_file, Counter()
        for i, (line, row) in enumerate(read_rows(path, "edges")):
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


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d+", text) is not None


def _plain(text: str) -> str:
    """Return a whole number as it is usually written: 7 for 007."""
    return str(int(text)) if _is_whole(text) else text


def _feature(where: str, column: str, cell: str) -> float:
    value = finite_number(cell, where, column)
    if abs(value) > torch.finfo(torch.float32).max:
        raise InputError(f"{where}: expected a number in column {column!r}, got {cell!r}, which is too large")
    return value


def _natural(text: str) -> tuple:
    """Return a key to sort by: whole numbers by their value, before other texts."""
    return (0, int(text), text) if _is_whole(text) else (1, 0, text)
