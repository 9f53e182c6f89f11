"""What data modules of one graph share: the graph as a batch, or what is sampled of it around some of its nodes.

Of a node's neighbours in the test set the network sees the features and the edges, and never the labels (Yang et al. 2016).

Shapes: N nodes, E edges, D features, B nodes of a batch.
"""

import functools
import hashlib

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.seeding import epoch_seed
from datamodules.in_memory import EpochShuffle, InMemoryDataModule, InMemoryDataset
from lit_models.gnn import Edges, Graph
from lit_models.graph_sage import NeighbourSampler
from runner.errors import InputError

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


def normalize_rows(features: Tensor) -> Tensor:
    """Divide each row of (N, D) by the sum of its absolute values; one of zeros stays so."""
    total = features.abs().sum(dim=1, keepdim=True)
    return features / total.where(total > 0, 1)
