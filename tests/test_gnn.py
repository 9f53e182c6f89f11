"""Graph networks: each agrees with PyTorch Geometric's, learns, sees what it should and nothing else, survives its edge cases."""

import functools

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer

from datamodules.graphs import GraphDataModule
from datamodules.karate import KarateClub
from lit_models.gnn import GAT, GCN, Edges, Graph, GraphAttention, GraphConvolution, softmax_by_target
from lit_models.graph_sage import GraphSAGE, MeanAggregator, NeighbourSampler
from runner.errors import InputError

ADAM = functools.partial(torch.optim.Adam, lr=0.02)
MODELS = {
    "gcn": functools.partial(GCN, sizes=(5, 16, 3), optimizer=ADAM),
    "gat": functools.partial(GAT, sizes=(5, 8, 3), heads=(4, 1), optimizer=ADAM),
    "sage": functools.partial(GraphSAGE, sizes=(5, 16, 3), optimizer=ADAM),
}


def random_edges(n: int, e: int, seed: int = 0) -> torch.Tensor:
    """(2, E), both ways, none twice, no self-loops; the last node has none."""
    pairs = torch.randint(0, n - 1, (e, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    ways = {(a, b) for a, b in pairs if a != b}
    return torch.tensor(sorted(ways | {(b, a) for a, b in ways})).t().contiguous()


class Small(GraphDataModule):
    """A graph drawn at random, whose labels can only be learned by heart."""

    source, classes = "drawn", ("a", "b", "c")

    def __init__(self, n: int = 12, e: int = 20, train: int = 6, share: float = 1.0, edges=None, **data):
        super().__init__(**data)
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(n, 5, generator=generator) * (torch.rand(n, 5, generator=generator) < share)
        labels = torch.randint(0, 3, (n,), generator=generator)
        nodes = torch.randperm(n, generator=generator)  # those that train are not the first ones
        split = {"train": nodes[:train], "val": nodes[train : train + 2], "test": nodes[train + 2 :]}
        if len(split["test"]) == 0:
            split["test"] = nodes
        self.keep(features, random_edges(n, e) if edges is None else edges, labels, split)


def fit(model, data, epochs: int = 1, **trainer) -> Trainer:
    trainer = Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0, **trainer)  # fmt: skip
    trainer.fit(model, data)
    return trainer


class TestAgreesWithPyTorchGeometric:
    """With copied weights, on one-way and duplicate edges, self-loops, and nodes that have none."""

    index = torch.cat([torch.randint(0, 9, (2, 40), generator=torch.Generator().manual_seed(0)),
                       torch.tensor([[3, 5, 5], [3, 5, 5]])], dim=1)  # fmt: skip
    graphs = {  # noqa: RUF012
        "all of it": (12, index),
        "both ways": (12, random_edges(12, 30)),
        "no edges": (4, index[:, :0]),
        "one node": (1, index[:, :0]),
        "one node with a loop": (1, torch.zeros(2, 1, dtype=torch.int64)),
    }

    @pytest.fixture(autouse=True)
    def reference(self):
        return pytest.importorskip("torch_geometric.nn")

    def compare(self, ours, theirs, pairs, n, index, sparse):
        """Copy the weights, then compare outputs and the gradients of all weights and features."""
        with torch.no_grad():
            for mine, other in pairs:
                mine.normal_()
                other.copy_(mine.view(other.shape))
        x = torch.randn(n, 6, generator=torch.Generator().manual_seed(2))
        x = x.relu() if sparse else x
        a = x.to_sparse().coalesce() if sparse else x.clone().requires_grad_()
        b = x.clone().requires_grad_()
        out, expected = ours(a, Edges(index, n, n)), theirs(b, index)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        for mine, other in pairs if sparse else [*pairs, (a, b)]:
            torch.testing.assert_close(mine.grad.view(other.shape), other.grad, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("graph", graphs)
    def test_gcn(self, graph, sparse, reference):
        ours, theirs = GraphConvolution(6, 4), reference.GCNConv(6, 4)
        pairs = [(ours.weight, theirs.lin.weight), (ours.bias, theirs.bias)]
        self.compare(ours, theirs, pairs, *self.graphs[graph], sparse)

    @pytest.mark.parametrize(("heads", "concat"), [(1, True), (3, True), (3, False)])
    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("graph", graphs)
    def test_gat(self, graph, sparse, heads, concat, reference):
        ours, theirs = GraphAttention(6, 4, heads, concat), reference.GATConv(6, 4, heads, concat)
        pairs = [(ours.weight, theirs.lin.weight), (ours.from_source, theirs.att_src),
                 (ours.from_target, theirs.att_dst), (ours.bias, theirs.bias)]  # fmt: skip
        self.compare(ours, theirs, pairs, *self.graphs[graph], sparse)

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("graph", graphs)
    def test_sage(self, graph, sparse, reference):
        ours, theirs = MeanAggregator(6, 4), reference.SAGEConv(6, 4)
        pairs = [(ours.others, theirs.lin_l.weight), (ours.own, theirs.lin_r.weight), (ours.bias, theirs.lin_l.bias)]
        self.compare(ours, theirs, pairs, *self.graphs[graph], sparse)

    def test_gat_as_a_whole(self, reference):
        """Two layers, ELU between them, heads side by side, then their mean."""
        ours = GAT((6, 4, 3), (2, 5), dropout=0.6).eval()
        theirs = [reference.GATConv(6, 4, 2), reference.GATConv(8, 3, 5, concat=False)]
        with torch.no_grad():
            for mine, other in zip(ours.layers, theirs, strict=True):
                other.lin.weight.copy_(mine.weight)
                other.att_src.copy_(mine.from_source[None])
                other.att_dst.copy_(mine.from_target[None])
        n, index = self.graphs["all of it"]
        x = torch.randn(n, 6)
        expected = theirs[1](F.elu(theirs[0](x, index)), index)
        torch.testing.assert_close(ours(Graph(x, [Edges(index, n, n)])), expected, atol=1e-5, rtol=1e-5)


def test_attention_of_any_size_is_a_softmax():
    target = torch.tensor([0, 0, 2, 2, 2])
    scores = torch.tensor([[1e4], [1e4 - 1], [-1e4], [-1e4], [-1e4]])
    a = softmax_by_target(scores, target, 3)[:, 0]
    torch.testing.assert_close(a, torch.tensor([0.7311, 0.2689, 1 / 3, 1 / 3, 1 / 3]), atol=1e-4, rtol=0)


class TestModels:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("share", [1.0, 0.05])
    def test_the_training_nodes_are_memorised(self, name, share):
        """Of sparse features, too."""
        torch.manual_seed(0)
        data = Small(n=40, e=30, train=6, share=share)
        if share < 0.1:
            data.keep(torch.eye(40), data.edges, data.labels, {"train": torch.arange(34, 40), "test": torch.arange(34)})
        assert data.graph.features.is_sparse == (share < 0.1)
        model = MODELS[name](sizes=(data.num_features, 16, 3), dropout=0.0)
        losses = []
        model.log_train = lambda batch_idx, samples, loss, acc: losses.append(float(loss.detach()) / samples)
        fit(model, data, 100, limit_val_batches=0)
        assert losses[0] > 0.8
        assert losses[-1] < 0.1

    @pytest.mark.parametrize("name", MODELS)
    def test_labels_that_do_not_train_are_not_seen(self, name):
        trained = []
        for other in (0, 1):
            torch.manual_seed(0)
            data, model = Small(), MODELS[name]()
            data.labels[6:] = (data.labels[6:] + other) % 3
            data.keep(data.features, data.edges, data.labels, {"train": torch.arange(6), "test": torch.arange(6, 12)})
            fit(model, data, 3)
            trained.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert torch.equal(*trained)

    @pytest.mark.parametrize("name", MODELS)
    def test_nodes_have_no_order(self, name):
        """Numbered anew, each keeps its logits."""
        torch.manual_seed(0)
        model, index, x = MODELS[name]().eval(), random_edges(12, 20), torch.randn(12, 5)
        order = torch.randperm(12)
        place = order.argsort()
        moved = model(Graph(x[order], [Edges(place[index], 12, 12)]))
        torch.testing.assert_close(moved, model(Graph(x, [Edges(index, 12, 12)]))[order])

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("fan_outs", [None, [2, None]])
    @pytest.mark.parametrize("graph", [{"n": 1, "train": 1}, {"n": 5, "train": 2}])
    def test_a_graph_of_one_node_and_one_without_edges(self, name, fan_outs, graph):
        if name == "gcn" and fan_outs:
            return
        model, data = MODELS[name](), Small(**graph, edges=torch.zeros(2, 0, dtype=torch.int64), fan_outs=fan_outs)
        trainer = fit(model, data, 2)
        (metrics,) = trainer.test(model, data, verbose=False)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert 0 <= metrics["test/acc"] <= 1

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_other_precisions_learn(self, name, precision):
        torch.manual_seed(0)
        club = KarateClub()
        club.setup()
        for data in (club, Small(fan_outs=None if name == "gcn" else [3, 3])):  # sparse features, and dense ones
            model = MODELS[name](sizes=(data.num_features, 16, len(data.classes)), dropout=0.1)
            losses = []
            model.log_train = lambda batch_idx, samples, loss, acc, losses=losses: losses.append(
                float(loss.detach()) / samples
            )
            trainer = fit(model, data, 20, precision=precision, limit_val_batches=0)
            assert losses[-1] < 0.8 * losses[0]
            trainer.test(model, data, verbose=False)
            kind = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
            assert {p.dtype for p in model.parameters()} == {kind}

    def test_only_the_first_graph_convolution_decays(self):
        optimizer = functools.partial(torch.optim.Adam, weight_decay=0.1)
        groups = GCN((5, 4, 4, 3), optimizer=optimizer).configure_optimizers().param_groups
        assert [(g["weight_decay"], sum(p.numel() for p in g["params"])) for g in groups] == [(0.1, 24), (0.0, 35)]
        assert len(GCN((5, 3), optimizer=optimizer).configure_optimizers().param_groups) == 1

    def test_dropout_of_sparse_features_is_that_of_dense_ones(self):
        model = GCN((400, 3), dropout=0.6)
        x = (torch.rand(300, 400) < 0.05).float()
        dropped = model.drop(x.to_sparse().coalesce()).to_dense()
        assert ((dropped != 0) <= (x != 0)).all()
        assert dropped.unique().tolist() == [0.0, 2.5]
        assert float(dropped.sum() / x.sum()) == pytest.approx(1.0, abs=0.1)
        sparse = x.to_sparse().coalesce()
        assert model.eval().drop(sparse) is sparse

    def test_hidden_layers_of_graph_sage_have_length_1(self):
        graph = Graph(torch.randn(12, 5), [Edges(random_edges(12, 20), 12, 12)])
        lengths = GraphSAGE((5, 16, 3)).eval().embed(graph).norm(dim=1)
        assert torch.allclose(lengths[lengths > 0], torch.ones(()))
        lengths = GraphSAGE((5, 16, 3), normalize=False).eval().embed(graph).norm(dim=1)
        assert not torch.allclose(lengths[lengths > 0], torch.ones(()))

    @pytest.mark.parametrize(
        ("make", "line"),
        [
            (lambda: GCN((5,)), r"sizes: .* got \[5\]"),
            (lambda: GraphSAGE((5, 0, 3)), "each at least 1"),
            (lambda: GCN(dropout=1.0), "dropout must be from 0 to below 1, got 1.0"),
            (lambda: GAT((5, 8, 3), (8,)), r"heads: at least 1 for each of 2 layers, got \[8\]"),
            (lambda: GAT((5, 8, 3), (8, 0)), "heads: at least 1"),
            (lambda: Small(fan_outs=[]), "fan_outs: at least 1 neighbour"),
            (lambda: Small(fan_outs=[3, 0]), "fan_outs: at least 1 neighbour"),
            (lambda: Small(batch_size=0), "batch sizes start at 1"),
            (lambda: fit(MODELS["gcn"](), Small(fan_outs=[2, 2])), "degrees of the whole graph: --data.fan_outs null"),
            (lambda: fit(MODELS["gat"](), Small(fan_outs=[2])), r"one for each of GAT's 2 layers, got \[2\]"),
            (
                lambda: fit(GCN((1433, 16, 7)), Small()),
                r"takes 1,433 features .* 7 classes .* Small has 5 and 3: --model.sizes '\[5, 16, 3\]'",
            ),
        ],
    )
    def test_what_does_not_fit_is_one_line(self, make, line):
        with pytest.raises(InputError, match=line) as caught:
            make()
        assert "\n" not in str(caught.value)


INDEX = random_edges(60, 400)  # the last node has no edges
NEIGHBOURS = [set(INDEX[0][INDEX[1] == i].tolist()) for i in range(60)]


class TestSampling:
    sampler = NeighbourSampler(INDEX, 60)

    @pytest.mark.parametrize("name", ["gat", "sage"])
    @pytest.mark.parametrize("share", [1.0, 0.05])
    @pytest.mark.parametrize("fan_outs", [[60, 60], [None, None]])
    def test_with_all_neighbours_a_sample_is_the_whole(self, name, share, fan_outs):
        torch.manual_seed(0)
        data, model = Small(60, 100, share=share, fan_outs=fan_outs), MODELS[name]().eval()
        nodes = torch.tensor([7, 59, 0, 33])
        graph = data.around(nodes, fan_outs, torch.Generator())
        assert len(graph.features) < 60
        assert graph.features.is_sparse == (share < 0.1)
        torch.testing.assert_close(model(graph), model(data.graph)[nodes])

    def test_gradients_are_those_of_the_whole(self):
        gradients = []
        for fan_outs in (None, [60, 60]):
            torch.manual_seed(0)
            data, model = Small(60, 100, train=20, fan_outs=fan_outs), GraphSAGE((5, 16, 3), dropout=0.0)
            (nodes, labels, graph) = next(iter(data.train_dataloader()))
            model.loss(model(graph)[nodes], labels).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("fan_out", [1, 3, None])
    def test_each_node_hears_from_so_many_different_neighbours(self, fan_out):
        nodes = torch.tensor([5, 59, 2, 41])
        source, target = self.sampler.draw(nodes, fan_out, torch.Generator().manual_seed(0))
        for place, node in enumerate(nodes.tolist()):
            mine = source[target == place].tolist()
            assert len(mine) == len(set(mine)) == min(fan_out or 99, len(NEIGHBOURS[node]))
            assert set(mine) <= NEIGHBOURS[node]

    def test_what_is_sampled_is_part_of_the_graph(self):
        nodes, edges = self.sampler.sample(torch.tensor([5, 59, 2]), [2, 3], torch.Generator().manual_seed(0))
        assert nodes[:3].tolist() == [5, 59, 2]
        assert len(nodes.unique()) == len(nodes) == edges[0].n_in
        assert [edges[0].n_out, edges[1].n_in, edges[1].n_out] == [edges[1].n_in, edges[0].n_out, 3]
        for layer, fan_out in zip(edges, (3, 2), strict=True):
            for source, target in nodes[layer.index].t().tolist():
                assert source in NEIGHBOURS[target]
            counts = layer.index[1].bincount(minlength=layer.n_out)
            assert counts.tolist() == [min(fan_out, len(NEIGHBOURS[i])) for i in nodes[: layer.n_out].tolist()]

    def test_all_neighbours_are_as_likely(self):
        node = torch.tensor([int(self.sampler.degree.argmax())])
        generator = torch.Generator().manual_seed(0)
        counts = torch.zeros(60)
        for _ in range(1000):
            counts[self.sampler.draw(node, 2, generator)[0]] += 1
        drawn = counts[counts > 0]
        assert len(drawn) == self.sampler.degree.max()
        expected = 2000 / len(drawn)
        assert ((drawn - expected).abs() < 5 * expected**0.5).all()

    def test_draws_come_from_seed_and_epoch(self, monkeypatch):
        def drawn(epoch: int, seed: str = "0", train: int = 1) -> list:
            monkeypatch.setenv("PL_GLOBAL_SEED", seed)
            loader = Small(60, 400, train=train, fan_outs=[3, 3], batch_size=8).train_dataloader()
            loader.sampler.set_epoch(epoch)
            return [
                (labels.tolist(), graph.features.tolist(), graph.edges[0].index.tolist()) for _, labels, graph in loader
            ]

        for train in (1, 20):  # of one node the order is always the same: only its neighbours are drawn
            assert drawn(3, train=train) == drawn(3, train=train)
            assert drawn(3, train=train) != drawn(4, train=train)
            assert drawn(3, train=train) != drawn(3, seed="1", train=train)

    def test_an_epoch_has_every_training_node_once(self):
        data = Small(60, 400, train=20, fan_outs=[2, 2], batch_size=8)
        batches = list(data.train_dataloader())
        assert [len(nodes) for nodes, _, _ in batches] == [8, 8, 4]
        seen = torch.cat([graph.features[nodes] for nodes, _, graph in batches])
        assert sorted(seen.tolist()) == sorted(data.features[data.train_set.tensors[0]].tolist())
        assert [len(batch[0]) for batch in Small(60, fan_outs=[2, 2], eval_batch_size=25).test_dataloader()] == [
            25,
            25,
            2,
        ]
        assert [len(batch[0]) for batch in Small(60).test_dataloader()] == [52]

    @pytest.mark.parametrize("name", ["gat", "sage"])
    def test_it_learns(self, name):
        torch.manual_seed(0)
        model, data = MODELS[name](dropout=0.0), Small(40, 60, train=9, fan_outs=[3, 3], batch_size=4)
        losses = []
        model.log_train = lambda batch_idx, samples, loss, acc: losses.append(float(loss.detach()) / samples)
        trainer = fit(model, data, 30)
        assert sum(losses[-3:]) < sum(losses[:3]) / 2
        assert trainer.global_step == 90

    @pytest.mark.parametrize("name", ["gat", "sage"])
    def test_validation_and_test_do_not_depend_on_how_they_are_batched(self, name):
        torch.manual_seed(0)
        model, told = MODELS[name](), []
        for data in (Small(40), Small(40, fan_outs=[1, 1], eval_batch_size=7)):
            trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_model_summary=False)
            told.append(trainer.test(model, data, verbose=False)[0])
        assert told[0] == pytest.approx(told[1], rel=1e-5)
        assert told[0].keys() >= {"test/acc", "test/loss", "test_acc/a", "test_acc/b", "test_acc/c"}


def test_a_whole_graph_is_moved_only_once():
    graph = Small().graph
    assert graph.to("cpu", torch.float32) is graph
    double = graph.to("cpu", torch.float64)
    assert graph.to("cpu", torch.float64) is double
    assert (double.features.dtype, double.edges[0].normalized.dtype) == (torch.float64, torch.float64)
    half = graph.to("cpu", torch.bfloat16)
    assert (half.features.dtype, half.edges[0].normalized.dtype) == (torch.bfloat16, torch.float32)
    assert graph.edges[0].normalized is graph.edges[0].normalized
