"""Pictures of graph networks: where nodes lie in the last hidden layer, and a small graph with what was told of it."""

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.detections import COLORS
from callbacks.pictures import GREY, new_figure
from runner.run import Run


class GraphPictures(Callback):
    """`embeddings.png`: nodes by t-SNE of the last hidden layer. `graph.png`, of a small graph: the graph with its classes.

    Args:
        run: where the pictures go.
        most: nodes of `embeddings.png`; of a larger graph those of the test and training set come first.
        small: nodes of a graph that `graph.png` is drawn of, at most.
    """

    def __init__(self, run: Run, most: int = 1500, small: int = 150):
        self.run, self.most, self.small = run, most, small

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        data = trainer.datamodule
        classes = [str(name).replace("$", r"\$") for name in data.classes]
        n = len(data.labels)
        train, test = data.train_set.tensors[0], data.test_set.tensors[0]
        if n <= self.small:
            _, predicted = look(pl_module, data, torch.arange(n))
            wrong = int((data.labels[test] != predicted[test]).sum())
            title = f"{wrong} of {len(test)} to test told wrong: filled with what was told, ringed with what it is"
            self.run.save_picture("graph", _graph(data.edges, data.labels, predicted, train, classes, title))

        random = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        order = torch.cat([test[: self.most // 2], train[: self.most // 4], random])
        nodes = torch.tensor(list(dict.fromkeys(order.tolist()))[: self.most])
        hidden, predicted = look(pl_module, data, nodes)
        if (points := tsne(hidden)) is not None:
            is_test = torch.isin(nodes, test)
            title = f"{hidden.shape[1]} numbers of the last hidden layer as two (t-SNE), {len(nodes):,} of {n:,} nodes"
            self.run.save_picture(
                "embeddings", _embeddings(points, data.labels[nodes], predicted, is_test, classes, title)
            )


@torch.inference_mode()
def look(model: LightningModule, data, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last hidden layer (M, F), or the features where there is none, and the predicted classes (M,), of nodes (M,)."""
    hidden, predicted = [], []
    for part in nodes.split(data.eval_batch_size if data.fan_outs else len(nodes)):
        places, _, graph = data.batch_of(part)
        graph = graph.to(model.device, model.dtype)
        x = model.embed(graph).cpu()
        hidden.append((x.to_dense() if x.is_sparse else x)[places].float())
        predicted.append(model(graph).cpu()[places].argmax(dim=1))
    return torch.cat(hidden), torch.cat(predicted)


def tsne(points: Tensor) -> Tensor | None:
    """Return (N, 2) for (N, F), such that neighbours stay neighbours (van der Maaten & Hinton 2008); None if there is nothing to see."""
    if len(points) < 4 or not points.isfinite().all() or not points.std(dim=0).max() > 0:
        return None
    from sklearn.manifold import TSNE  # a second: only if it is needed

    perplexity = min(30.0, (len(points) - 1) / 3)
    made = TSNE(perplexity=perplexity, max_iter=500, init="random", random_state=0, n_jobs=1)
    return torch.from_numpy(made.fit_transform(points.numpy()))


def _embeddings(points: Tensor, labels: Tensor, predicted: Tensor, is_test: Tensor, classes: list[str], title: str):
    """Draw nodes coloured by class: those of the test set large, with a ring if they were taken for another class."""
    figure = new_figure(8.6, 6.4)
    axis = figure.subplots()
    large, small = (26, 9) if len(points) > 200 else (80, 28)
    for k, name in enumerate(classes):
        color, mine = COLORS[k % len(COLORS)], labels == k
        axis.scatter(*points[mine & ~is_test].T, s=small, color=color, alpha=0.35, lw=0)
        axis.scatter(*points[mine & is_test].T, s=large, color=color, lw=0, label=name)
    axis.scatter(*points[(labels < 0)].T, s=small, color=GREY, alpha=0.35, lw=0)
    wrong = is_test & (labels != predicted)
    axis.scatter(
        *points[wrong].T, s=1.3 * large, facecolors="none", edgecolors="black", lw=0.9, label="to test, told wrong"
    )
    axis.set(xticks=[], yticks=[], title=f"{title}\nlarge: to test; small: all others")
    axis.spines[:].set_color(GREY)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _graph(edges: Tensor, labels: Tensor, predicted: Tensor, train: Tensor, classes: list[str], title: str):
    """Draw the graph: what was told fills a node, its class is the ring, and squares were trained on."""
    import networkx
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    graph = networkx.Graph(edges.T.tolist())
    graph.add_nodes_from(range(len(labels)))
    place = networkx.spring_layout(graph, seed=3, iterations=200)
    points = torch.tensor([list(map(float, place[i])) for i in range(len(labels))])  # (N, 2)
    figure = new_figure(8.2, 6.6)
    axis = figure.subplots()
    axis.add_collection(LineCollection(points[edges.T].tolist(), colors=GREY, lw=0.7, alpha=0.5, zorder=1))
    colors = [COLORS[k % len(COLORS)] for k in range(len(classes))]
    is_train = torch.isin(torch.arange(len(labels)), train)
    for shape, mask in (("s", is_train), ("o", ~is_train)):
        shown = mask.nonzero()[:, 0].tolist()
        fill = [colors[k] for k in predicted[shown].tolist()]
        ring = [colors[k] if k >= 0 else GREY for k in labels[shown].tolist()]
        axis.scatter(*points[shown].T, s=330, marker=shape, c=fill, edgecolors=ring, lw=3.5, zorder=2)
    for i, (x, y) in enumerate(points.tolist()):
        axis.text(x, y, str(i), ha="center", va="center", fontsize=8, color="white", zorder=3)
    axis.set_title(title)
    axis.margins(0.06)
    axis.axis("off")
    key = [
        Line2D([], [], ls="", marker="o", ms=11, color=c, label=name) for c, name in zip(colors, classes, strict=True)
    ]
    key += [Line2D([], [], ls="", marker="s", ms=11, color=GREY, label="trained on")]
    figure.legend(handles=key, loc="outside lower center", ncols=4, frameon=False)
    return figure
