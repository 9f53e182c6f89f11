"""GraphSAGE: a node's own features and the mean of its neighbours', of which only a sample need be looked at.

Shapes: N nodes, E edges, D features, F outputs of a layer, K classes, B nodes of a batch.

Source: Hamilton et al. 2017, with the mean aggregator and minibatches (its algorithm 2).

Departures from the paper: a node with fewer neighbours than its fan-out gives them all, each once, where the paper draws
with replacement; and the last layer gives the logits.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.gnn import Edges, NodeClassifier, linear, multiply


class GraphSAGE(NodeClassifier):
    """Layers x_i' = W [x_i, mean of x_j over the neighbours j] + b, with ReLU between them.

    Args:
        sizes: the width of each layer, the features first and the classes last.
        dropout: share of each layer's inputs that are set to zero in training.
        normalize: whether each node's outputs of a hidden layer are scaled to length 1, as in the paper.
        classifier: arguments of `Classifier`, without `num_classes`.
    """

    def __init__(
        self, sizes: tuple[int, ...] = (1433, 16, 7), dropout: float = 0.5, normalize: bool = True, **classifier
    ):
        super().__init__(sizes, dropout, **classifier)
        self.normalize = normalize
        self.layers = nn.ModuleList(MeanAggregator(*ends) for ends in pairwise(sizes))

    def activate(self, x: Tensor) -> Tensor:
        """What comes after each layer but the last."""
        x = F.relu(x)
        return F.normalize(x, dim=1) if self.normalize else x


class MeanAggregator(nn.Module):
    """W [x_i, mean of x_j] + b, with W kept in two parts, for a node itself and for its neighbours."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.own = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_out, n_in)))
        self.others = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_out, n_in)))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, edges: Edges) -> Tensor:
        """Map (n_in, D), dense or sparse, to (n_out, F)."""
        others = multiply(edges.mean, linear(x, self.others))  # the mean after W, where it is F wide, not D
        return linear(x, self.own)[: edges.n_out] + others + self.bias


class NeighbourSampler:
    """Draws what a network needs to see of a graph for some of its nodes, however large the graph is.

    Args:
        index: (2, E), the graph's edges, from and to.
        n: N.
    """

    def __init__(self, index: Tensor, n: int):
        source, target = index
        self.sources = source[target.argsort(stable=True)]  # (E,), those that send to node 0 first, then to node 1, ...
        self.degree = target.bincount(minlength=n)  # (N,)
        self.start = self.degree.cumsum(0) - self.degree  # (N,): where each node's begin
        self.place = torch.zeros(n, dtype=torch.int64)  # of each node among those of a batch; only theirs is looked at

    def sample(
        self, nodes: Tensor, fan_outs: list[int | None], generator: torch.Generator | None = None
    ) -> tuple[Tensor, list[Edges]]:
        """Return the nodes (n,) whose features are needed, the asked ones (B,) first, and the edges of each layer.

        Args:
            nodes: (B,), none of them twice.
            fan_outs: how many neighbours each node hears from, from the asked nodes outwards, so the last layer's first;
                None: all of them.
            generator: what they are drawn by.
        """
        layers: list[Edges] = []
        for fan_out in fan_outs:
            source, target = self.draw(nodes, fan_out, generator)  # (E',) of N, (E',) of the nodes so far
            everyone = torch.cat([nodes, source[~torch.isin(source, nodes)].unique()])
            self.place[everyone] = torch.arange(len(everyone))
            layers.insert(0, Edges(torch.stack([self.place[source], target]), len(everyone), len(nodes)))
            nodes = everyone
        return nodes, layers

    def draw(self, nodes: Tensor, fan_out: int | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return neighbours (E',), and for each of them which of `nodes` (its place there) it sends to."""
        degree = self.degree[nodes]
        target = torch.arange(len(nodes)).repeat_interleave(degree)  # (E',)
        rank = torch.arange(len(target)) - (degree.cumsum(0) - degree)[target]  # 0, 1, ... among a node's neighbours
        source = self.sources[self.start[nodes][target] + rank]
        if fan_out is None:
            return source, target
        chance = torch.rand(
            len(target), dtype=torch.float64, generator=generator
        )  # each node's neighbours in any order
        kept = rank < fan_out
        return source[(target + chance).argsort()][kept], target[kept]
