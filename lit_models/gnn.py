"""Graph networks that tell the classes of nodes: graph convolution (GCN) and graph attention (GAT).

Shapes: N nodes, E edges, D features, F outputs of a layer (of one head, where it has several), H heads, K classes, B nodes
of a batch.

Sources: Kipf & Welling 2017, Velickovic et al. 2018.
"""

import functools
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.graphs import GraphPictures
from lit_models.tasks import Classifier
from runner.errors import InputError


class Edges:
    """The edges along which a layer passes messages, and the matrices that models make of them, each made once.

    Args:
        index: (2, E), from (first row) and to (second row). Self-loops count where a model's formula says so.
        n_in: nodes that messages come from.
        n_out: nodes that they go to, which are the first of the `n_in`: all of them in a whole graph.
    """

    def __init__(self, index: Tensor, n_in: int, n_out: int, dtype: torch.dtype = torch.float32):
        self.index, self.n_in, self.n_out, self.dtype = index, n_in, n_out, dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> "Edges":
        """Return the same edges there, whose matrices are to be of that kind."""
        return Edges(self.index.to(device), self.n_in, self.n_out, dtype)

    @functools.cached_property
    def with_loops(self) -> Tensor:
        """(2, E'), with exactly one self-loop at every node that messages go to."""
        others = self.index[:, self.index[0] != self.index[1]]
        loops = torch.arange(self.n_out, device=self.index.device).expand(2, -1)
        return torch.cat([others, loops], dim=1)

    @functools.cached_property
    def normalized(self) -> Tensor:
        """D^-1/2 (A + I) D^-1/2 of a whole graph, (N, N), sparse: what GCN multiplies with."""
        source, target = self.with_loops
        scale = target.bincount(minlength=self.n_out).to(self.dtype).rsqrt()  # (N,), of degrees of 1 and more
        return self._matrix(source, target, scale[source] * scale[target])

    @functools.cached_property
    def mean(self) -> Tensor:
        """D^-1 A, (n_out, n_in), sparse: it takes the mean over a node's neighbours, and gives 0 where there are none."""
        source, target = self.index
        return self._matrix(source, target, target.bincount(minlength=self.n_out).to(self.dtype).reciprocal()[target])

    def _matrix(self, source: Tensor, target: Tensor, values: Tensor) -> Tensor:
        size = (self.n_out, self.n_in)
        return torch.sparse_coo_tensor(torch.stack([target, source]), values, size, check_invariants=False).coalesce()


class Graph:
    """What a network is given: a whole graph, or what was sampled of one around the nodes of a batch.

    Args:
        features: (N, D), dense, or sparse (COO, coalesced).
        edges: one, of a whole graph, which all layers see; or one for each layer, the first layer's first.
    """

    def __init__(self, features: Tensor, edges: list[Edges]):
        self.features, self.edges = features, edges
        self._moved: dict[tuple, Graph] = {}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Graph":
        """Return the graph on a device, in a precision; made once for each, so that a whole graph is copied only once.

        Sparse matrices stay in float32 or above: torch has no products of others.
        """
        device, dtype = torch.device(device or self.features.device), dtype or self.features.dtype
        wide = dtype if dtype == torch.float64 else torch.float32
        of_features = wide if self.features.is_sparse else dtype
        if (self.features.device, self.features.dtype, self.edges[0].dtype) == (device, of_features, wide):
            return self
        if (device, dtype) not in self._moved:
            edges = [e.to(device, wide) for e in self.edges]
            self._moved[device, dtype] = Graph(self.features.to(device, of_features), edges)
        return self._moved[device, dtype]


class NodeClassifier(Classifier):
    """Nodes to one of K classes. A subclass makes `layers`, each from features (n_in, F) and `Edges` to (n_out, F').

    A batch is (nodes, labels, graph): nodes (B,), where in the network's output those stand that count; labels (B,); and a
    `Graph`, of which everything else is seen, but not its labels. So `train/loss` is over the training nodes alone.

    Args:
        sizes: the width of each layer, the features first and the classes last.
        dropout: share of each layer's inputs that are set to zero in training.
        classifier: arguments of `Classifier`, without `num_classes`.
    """

    pictures = GraphPictures
    can_be_sampled = True  # whether it may see only some neighbours of a node
    layers: nn.ModuleList

    def __init__(self, sizes: tuple[int, ...], dropout: float, **classifier):
        if len(sizes) < 2 or min(sizes) < 1:
            raise InputError(f"sizes: features, hidden layers if any, and classes, each at least 1; got {list(sizes)}")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be from 0 to below 1, got {dropout}")
        super().__init__(num_classes=sizes[-1], **classifier)
        self.sizes, self.dropout = sizes, dropout

    def embed(self, graph: Graph) -> Tensor:
        """Return what the last layer is given: the last hidden layer (n, F), or the features where there is none."""
        x = graph.features
        for layer, edges in zip(self.layers[:-1], self.edges(graph), strict=False):
            x = self.activate(layer(self.drop(x), edges))  # (n_in, F) -> (n_out, F')
        return x

    def forward(self, graph: Graph) -> Tensor:
        """Return logits: (N, K) of a whole graph, (B, K) of one that was sampled around B nodes."""
        return self.layers[-1](self.drop(self.embed(graph)), self.edges(graph)[-1])

    def activate(self, x: Tensor) -> Tensor:
        """What comes after each layer but the last."""
        return F.relu(x)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout; of a sparse matrix, of what is not zero anyway."""
        if not x.is_sparse:
            return F.dropout(x, self.dropout, self.training)
        if not self.training or not self.dropout:
            return x
        values = F.dropout(x.values(), self.dropout)
        return torch.sparse_coo_tensor(x.indices(), values, x.shape, is_coalesced=True, check_invariants=False)

    def edges(self, graph: Graph) -> list[Edges]:
        """Return the edges of each layer."""
        return graph.edges * len(self.layers) if len(graph.edges) == 1 else graph.edges

    def setup(self, stage: str) -> None:
        """Check the data.

        Raises:
            InputError: it is no graph, has other features or classes, or is sampled where this cannot be.
        """
        data, name = self.trainer.datamodule, type(self).__name__
        if not hasattr(data, "num_features"):
            raise InputError(f"{name} tells the nodes of a graph apart, and {type(data).__name__} has no graph")
        has, takes = (data.num_features, len(data.classes)), (self.sizes[0], self.sizes[-1])
        if has != takes:
            fits = [has[0], *self.sizes[1:-1], has[1]]
            raise InputError(
                f"{name} takes {takes[0]:,} features and tells {takes[1]} classes apart, but {type(data).__name__} has "
                f"{has[0]:,} and {has[1]}: --model.sizes '{fits}'"
            )
        fan_outs = data.fan_outs
        if fan_outs is not None and not self.can_be_sampled:
            raise InputError(f"{name} weighs neighbours by the degrees of the whole graph: --data.fan_outs null")
        if fan_outs is not None and len(fan_outs) != len(self.layers):
            raise InputError(f"fan_outs: one for each of {name}'s {len(self.layers)} layers, got {list(fan_outs)}")

    def training_step(self, batch: tuple[Tensor, Tensor, Graph], batch_idx: int) -> Tensor:
        """Return the loss."""
        nodes, labels, graph = batch
        logits = self(graph)[nodes]  # (B, K)
        loss = self.loss(logits, labels, self.label_smoothing)
        right = (logits.detach().argmax(dim=1) == labels).sum()
        self.log_train(batch_idx, len(labels), loss=loss * len(labels), acc=right)
        return loss

    def _evaluate(self, batch: tuple[Tensor, Tensor, Graph], stage: str, accuracy) -> Tensor:
        nodes, labels, graph = batch
        logits = self(graph)[nodes]  # (B, K)
        accuracy.update(logits, labels)
        self.log(f"{stage}/loss", self.loss(logits, labels), batch_size=len(labels))
        self.log(f"{stage}/acc", accuracy, batch_size=len(labels))
        return logits


class GCN(NodeClassifier):
    """Graph convolutions: X' = ReLU(A^ X W + b), with A^ = D^-1/2 (A + I) D^-1/2.

    The optimiser's weight decay is for the first layer only, as in the paper.

    Args:
        sizes: the width of each layer, the features first and the classes last.
        dropout: share of each layer's inputs that are set to zero in training.
        classifier: arguments of `Classifier`, without `num_classes`.
    """

    can_be_sampled = False

    def __init__(self, sizes: tuple[int, ...] = (1433, 16, 7), dropout: float = 0.5, **classifier):
        super().__init__(sizes, dropout, **classifier)
        self.layers = nn.ModuleList(GraphConvolution(*ends) for ends in pairwise(sizes))

    def parameter_groups(self) -> list[dict]:
        """The first layer's parameters, and the others', which do not decay."""
        first, *others = self.layers
        rest = [parameter for layer in others for parameter in layer.parameters()]
        groups = [{"params": list(first.parameters())}]
        return [*groups, {"params": rest, "weight_decay": 0.0}] if rest else groups


class GraphConvolution(nn.Module):
    """A^ X W + b, (N, D) -> (N, F). (The paper's code has no b.)"""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_out, n_in)))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, edges: Edges) -> Tensor:
        """Map (N, D), dense or sparse, to (N, F)."""
        return multiply(edges.normalized, linear(x, self.weight)) + self.bias


class GAT(NodeClassifier):
    """Graph attention: a node takes the mean of its neighbours and itself, by weights that it finds from both ends.

    Args:
        sizes: the width of each layer's heads, the features first and the classes last: hidden layers put their heads side
            by side, the last one takes their mean.
        heads: of each layer, one less than `sizes`; in the paper the last layer has 8 for Pubmed.
        dropout: share of each layer's inputs, and of the weights, that are set to zero in training.
        classifier: arguments of `Classifier`, without `num_classes`.

    Raises:
        InputError: `heads` does not fit `sizes`.
    """

    def __init__(
        self,
        sizes: tuple[int, ...] = (1433, 8, 7),
        heads: tuple[int, ...] = (8, 1),
        dropout: float = 0.6,
        **classifier,
    ):
        super().__init__(sizes, dropout, **classifier)
        if len(heads) != len(sizes) - 1 or min(heads) < 1:
            raise InputError(f"heads: at least 1 for each of {len(sizes) - 1} layers, got {list(heads)}")
        widths = [sizes[0], *(n * h for n, h in zip(sizes[1:], heads, strict=True))]  # what goes into each layer
        last = len(heads) - 1
        self.layers = nn.ModuleList(
            GraphAttention(widths[i], sizes[i + 1], heads[i], concat=i < last, dropout=dropout) for i in range(last + 1)
        )

    def activate(self, x: Tensor) -> Tensor:
        """What comes after each layer but the last."""
        return F.elu(x)


class GraphAttention(nn.Module):
    """Each head: h_i' = sum over j of a_ij W h_j, with a_ij = softmax over j of LeakyReLU(a . [W h_j, W h_i]), and a bias.

    j are the neighbours of i, and i itself.

    Args:
        n_in: D.
        n_out: F, of each head.
        heads: H.
        concat: whether the heads' outputs are put side by side, (N, H * F), or their mean is taken, (N, F).
        dropout: share of the weights a that are set to zero in training.
    """

    def __init__(self, n_in: int, n_out: int, heads: int = 1, concat: bool = True, dropout: float = 0.0):
        super().__init__()
        self.concat, self.dropout = concat, dropout
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads * n_out, n_in)))
        # a, for its two halves: the formula's scalar product is a sum of two, one for each end of an edge
        self.from_source = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, n_out)))
        self.from_target = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, n_out)))
        self.bias = nn.Parameter(torch.zeros(heads * n_out if concat else n_out))

    def forward(self, x: Tensor, edges: Edges) -> Tensor:
        """Map (N, D), dense or sparse, to (N, H * F) or (N, F)."""
        source, target = edges.with_loops  # (E,), (E,)
        h = linear(x, self.weight).unflatten(1, self.from_source.shape)  # (N, H, F)
        scores = (h * self.from_source).sum(dim=2)[source] + (h * self.from_target).sum(dim=2)[target]  # (E, H)
        a = softmax_by_target(F.leaky_relu(scores, 0.2), target, edges.n_out)
        a = F.dropout(a, self.dropout, self.training)
        out = sum_by_target(a.unsqueeze(2) * h[source], target, edges.n_out)  # (E, H, F) -> (N, H, F)
        return (out.flatten(start_dim=1) if self.concat else out.mean(dim=1)) + self.bias


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply (N, D), dense or sparse, with a weight (F, D): (N, F)."""
    return multiply(x, weight.t()) if x.is_sparse else F.linear(x, weight)


def multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply sparse (M, N) with dense (N, F): (M, F), also where x is of half precision, which sparse ones have not."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.sparse.mm(matrix, x.to(matrix.dtype)).to(x.dtype)


def softmax_by_target(scores: Tensor, target: Tensor, n: int) -> Tensor:
    """Softmax of scores (E, H) over the edges that have the same target (E,), one of n nodes."""
    where = target.unsqueeze(1).expand_as(scores)  # (E, H)
    with torch.no_grad():  # less the greatest, so that no exponential overflows: it changes nothing else
        greatest = scores.new_zeros(n, scores.shape[1]).scatter_reduce(0, where, scores, "amax", include_self=False)
    e = (scores - greatest[target]).float().exp()
    return (e / sum_by_target(e, target, n)[target]).to(scores.dtype)


def sum_by_target(messages: Tensor, target: Tensor, n: int) -> Tensor:
    """Sum messages (E, ...) over the edges that have the same target (E,): (n, ...)."""
    flat = messages.flatten(start_dim=1)
    where = target.unsqueeze(1).expand_as(flat)  # scatter_add is twice as fast on a CPU as index_add
    return flat.new_zeros(n, flat.shape[1]).scatter_add(0, where, flat).view(n, *messages.shape[1:])
