"""Graphs are read as they are, or one line says what is wrong; runs on them resume, verify and leave pictures."""

import io
import os
import pickle
import shutil
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from conftest import REAL_DATA_DIR, write_planetoid
from test_resume import Stop, only_run, stop_at
from test_train import assert_same_run, receipt

import datamodules.graphs
import datamodules.planetoid
from callbacks.graphs import GraphPictures, tsne
from datamodules.edge_list import EdgeList
from datamodules.graphs import normalize_rows
from datamodules.karate import KarateClub
from datamodules.planetoid import Planetoid
from lit_models.gnn import GCN
from lit_models.graph_sage import GraphSAGE
from runner.errors import InputError
from runner.run import Run
from train import main

REAL_CORA = Path(REAL_DATA_DIR or "nowhere") / "Planetoid" / "Cora" / "raw"


def loaded(data):
    data.setup()
    return data


class TestKarateClub:
    def test_it_is_zacharys(self):
        data = loaded(KarateClub())
        assert data.sizes == {"train": 2, "val": 0, "test": 32}
        assert data.edges.shape == (2, 156)
        assert data.labels.bincount().tolist() == [17, 17]
        assert data.labels[[0, 8, 33]].tolist() == [0, 0, 1]
        assert sorted(data.train_set.tensors[0].tolist() + data.test_set.tensors[0].tolist()) == list(range(34))
        assert torch.equal(data.features, torch.eye(34))

    @pytest.mark.parametrize(
        ("labelled", "line"),
        [
            ((0, 1), "at least one member of each side"),
            ((), "at least one member"),
            ((0, 34), r"members are 0 to 33, got \[0, 34\]"),
            ((-1, 0), "members are 0 to 33"),
            (tuple(range(34)), "none to test"),
        ],
    )
    def test_labels_that_do_not_do_are_one_line(self, labelled, line):
        with pytest.raises(InputError, match=line):
            KarateClub(labelled=labelled).setup()

    def test_more_labels_leave_fewer_to_test(self):
        assert loaded(KarateClub(labelled=(33, 0, 2, 2))).sizes == {"train": 3, "val": 0, "test": 31}


class TestPlanetoid:
    @pytest.mark.parametrize(
        ("name", "features", "classes"), [("Cora", 1433, 7), ("CiteSeer", 50, 6), ("PubMed", 40, 3)]
    )
    def test_it_is_what_pytorch_geometric_reads(self, name, features, classes, tmp_path, monkeypatch):
        """Public split, permuted test papers, duplicates and self-loops, CiteSeer's gaps."""
        geometric = datamodules.planetoid._geometric()
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "ours"))
        raw = write_planetoid(tmp_path / "ours", name, features, classes)
        shutil.copytree(raw, tmp_path / "theirs" / name / "raw")
        normalize = geometric.transforms.NormalizeFeatures()
        theirs = geometric.datasets.Planetoid(str(tmp_path / "theirs"), name, transform=normalize)[0]
        data = loaded(Planetoid(name))
        torch.testing.assert_close(data.features, theirs.x)
        assert data.edges.tolist() == theirs.edge_index.tolist()
        assert torch.equal(data.labels, theirs.y)
        for part in ("train", "val", "test"):
            nodes, labels = getattr(data, f"{part}_set").tensors
            assert torch.equal(nodes, theirs[f"{part}_mask"].nonzero()[:, 0])
            assert torch.equal(labels, theirs.y[nodes])
        assert len(data.classes) == classes
        assert data.sizes == {"train": 2 * classes, "val": 500, "test": 23}
        alone = len(data.labels) - len(data.edges.unique())
        assert alone == (2 if name == "CiteSeer" else 0)

    def test_nothing_is_written_beside_the_files(self, small_data):
        loaded(Planetoid())
        assert os.listdir(small_data / "Planetoid" / "Cora") == ["raw"]

    def test_features_as_they_are(self):
        assert loaded(Planetoid(normalize=False)).features.unique().tolist() == [0, 1]

    @pytest.mark.skipif(not REAL_CORA.is_dir(), reason="no Cora here")
    def test_the_real_cora(self, monkeypatch):
        monkeypatch.setenv("DATA_DIR", REAL_DATA_DIR)
        data = loaded(Planetoid())
        assert data.sizes == {"train": 140, "val": 500, "test": 1000}
        assert (data.features.shape, data.edges.shape) == ((2708, 1433), (2, 10556))
        assert data.labels.bincount().tolist() == [351, 217, 418, 818, 426, 298, 180]
        assert data.graph.features.is_sparse
        assert os.listdir(REAL_CORA.parent) == ["raw"]

    def test_what_cannot_be_downloaded_is_one_line(self, tmp_path, monkeypatch, capsys):
        def fail(url):
            assert url.startswith("https://github.com/")
            raise urllib.error.URLError("no route to host")

        monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setattr("urllib.request.urlopen", fail)
        assert main(["experiments/cora_gcn.yaml"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"Cora is not in {tmp_path}/data/Planetoid/Cora/raw (<urlopen error no route to host>)" in err
        assert "put ind.cora.x, ind.cora.tx" in err
        assert not (tmp_path / "data").exists()

    def test_what_is_missing_is_downloaded(self, tmp_path, monkeypatch, small_data):
        there = small_data / "Planetoid" / "Cora" / "raw"
        asked = []

        def fetch(url):
            asked.append(url.rpartition("/")[2])
            return io.BytesIO((there / asked[-1]).read_bytes())

        monkeypatch.setattr("urllib.request.urlopen", fetch)
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        here = tmp_path / "Planetoid" / "Cora" / "raw"
        here.mkdir(parents=True)
        shutil.copy(there / "ind.cora.x", here)
        data = Planetoid()
        data.prepare_data()
        data.setup()
        assert len(asked) == 7
        assert "ind.cora.x" not in asked
        assert data.sizes["test"] == 23

    def test_a_folder_that_cannot_be_written_is_one_line(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "file" / "data"))
        data = Planetoid()
        data.prepare_data()
        with pytest.raises(InputError, match="Not a directory"):
            data.setup()

    @pytest.mark.parametrize(
        ("file", "content", "line"),
        [
            ("ind.cora.allx", b"\x80\x02", "ind.cora.allx is damaged: .*; delete it"),
            ("ind.cora.graph", b"", "ind.cora.graph is damaged"),
            ("ind.cora.graph", pickle.dumps({0: [99999]}), "raw are damaged"),
            ("ind.cora.test.index", b"12\nno\n", "raw are damaged"),
            ("ind.cora.test.index", b"1\n", "raw are damaged: .* do not fit"),
            ("ind.cora.test.index", b"520\n521\n", "raw are damaged: .* do not fit"),
        ],
    )
    def test_damaged_files_are_one_line(self, file, content, line, small_data, tmp_path, monkeypatch):
        shutil.copytree(small_data / "Planetoid", tmp_path / "Planetoid")
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        (tmp_path / "Planetoid" / "Cora" / "raw" / file).write_bytes(content)
        with pytest.raises(InputError, match=line) as caught:
            Planetoid().setup()
        assert "\n" not in str(caught.value)

    def test_files_that_would_run_code_are_refused(self, small_data, tmp_path, monkeypatch):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        shutil.copytree(small_data / "Planetoid", tmp_path / "Planetoid")
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        (tmp_path / "Planetoid" / "Cora" / "raw" / "ind.cora.y").write_bytes(pickle.dumps(Evil()))
        with pytest.raises(InputError, match=r"it would run posix\.mkdir"):
            Planetoid().setup()
        assert not (tmp_path / "made").exists()

    def test_without_pytorch_geometric_one_line_says_so(self, monkeypatch, capsys):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch_geometric"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "torch_geometric", None)
        assert main(["experiments/cora_gcn.yaml"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: the package torch_geometric")
        assert err.endswith(" is missing; try: pip install -r requirements.txt\n")


NODES = "a,b,label,split\n1,0,x,train\n0,1,y,train\n1,1,x,val\n0,.5,y,test\n-2,0,,\n"
EDGES = "0,1\n1,2\n2,3\n"


class TestEdgeList:
    @pytest.fixture
    def write(self, tmp_path):
        def call(edges: str = EDGES, nodes: str = NODES, **arguments) -> EdgeList:
            (tmp_path / "edges.csv").write_text(edges)
            (tmp_path / "nodes.csv").write_text(nodes)
            return EdgeList(str(tmp_path / "edges.csv"), str(tmp_path / "nodes.csv"), **arguments)

        return call

    def test_it_is_read_as_it_is(self, write, tmp_path):
        data = loaded(write())
        assert data.features.tolist() == [[1, 0], [0, 1], [1, 1], [0, 0.5], [-2, 0]]
        assert data.edges.t().tolist() == [[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2]]
        assert data.labels.tolist() == [0, 1, 0, 1, -1]
        assert data.classes == ("x", "y")
        assert data.sizes == {"train": 2, "val": 1, "test": 1}
        assert data.source == (
            f"5 nodes and 3 edges of {tmp_path}/edges.csv and {tmp_path}/nodes.csv (3 given one way, 1 node without edges)"
        )

    @pytest.mark.parametrize(
        ("edges", "ways", "told"),
        [
            ("0,1\n1,0\n", [[0, 1], [1, 0]], "3 nodes without edges"),
            ("0,1\n0,1\n1,0\n", [[0, 1], [1, 0]], "1 duplicate left out, 3 nodes without edges"),
            ("0,1\n", [[0, 1], [1, 0]], "1 given one way, 3 nodes without edges"),
            ("2,2\n2,2\n0,1\n1,0\n", [[0, 1], [1, 0]], "2 self-loops left out, 3 nodes without edges"),
            ("", [], "5 nodes without edges"),
            ("from,to\n", [], "5 nodes without edges"),
            ("from;to;since\n00;1;1999\n1;0;x\n", [[0, 1], [1, 0]], "3 nodes without edges"),
            ("\ufeff0\t1\n\n1\t0\n", [[0, 1], [1, 0]], "3 nodes without edges"),
        ],
    )
    def test_edges_of_all_kinds(self, write, edges, ways, told):
        data = loaded(write(edges))
        assert data.edges.shape[0] == 2
        assert data.edges.t().tolist() == ways
        assert data.source.endswith(f"({told})")

    def test_edges_may_have_a_direction(self, write):
        data = loaded(write("0,1\n3,2\n3,2\n", directed=True))
        assert data.edges.t().tolist() == [[0, 1], [3, 2]]
        assert "5 nodes and 2 edges of" in data.source
        assert "one way" not in data.source

    def test_nodes_may_have_names(self, write):
        nodes = "id,class,part,a,b\nann,10,train,1,2\nbob,9,train,3,4\nc d,9,test,5,6\n"
        names = {"id": "id", "label": "class", "split": "part"}
        data = loaded(write('who,whom\nann,bob\n"c d",ann\n', nodes, **names))
        assert data.edges.t().tolist() == [[0, 1], [0, 2], [1, 0], [2, 0]]
        assert data.classes == ("9", "10")
        assert data.labels.tolist() == [1, 0, 0]
        assert data.num_features == 2
        assert not data.val_dataloader()
        assert loaded(write("ann,bob\n", nodes, **names, features=["b"])).features.tolist() == [[2], [4], [6]]
        with pytest.raises(InputError, match=r"edges.csv:2: .*nodes.csv has no node 'bop'; did you mean 'bob'\?"):
            write("ann,bob\nann,bop\n", nodes, **names).setup()

    def test_a_column_that_is_there_twice_and_does_not_count_does_no_harm(self, write):
        nodes = "a,b,b,label,split\n1,x,y,k,train\n2,x,y,k,test\n"
        assert loaded(write("0,1\n", nodes, features=["a"])).features.tolist() == [[1], [2]]

    def test_rows_are_normalised_if_asked_for(self, write):
        assert loaded(write(normalize=True)).features.tolist() == [[1, 0], [0, 1], [0.5, 0.5], [0, 1], [-1, 0]]
        assert normalize_rows(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]

    @pytest.mark.parametrize(
        ("files", "line"),
        [
            ({"edges": "0,1\n1,5\n"}, r"edges.csv:2: .*nodes.csv has no node '5': they are 0 to 4"),
            ({"edges": "0,5\n"}, r"edges.csv:1: .* no node '5'"),
            ({"edges": "0,-1\n"}, r"edges.csv:1: .* no node '-1'"),
            ({"edges": "8,9\n"}, r"edges.csv:1: .* no node '8'"),
            ({"edges": "0,1\na,b\n"}, r"edges.csv:2: .* no node 'a'"),
            ({"edges": "0,1.0\n"}, r"edges.csv:1: .* no node '1.0'"),
            ({"edges": "0,1\n\n2\n"}, "edges.csv:3: expected two nodes, got '2'"),
            ({"nodes": ""}, "nodes.csv: no rows"),
            ({"nodes": "a,b,label,split\n"}, "nodes.csv:1: no rows below"),
            ({"nodes": "label,split\nx,train\n"}, "nodes.csv:1: no columns of features"),
            ({"nodes": NODES.replace("split", "spilt")}, "nodes.csv:1: no column 'split' .* did you mean 'spilt'"),
            ({"nodes": NODES.replace("b,", "label,")}, "nodes.csv:1: 2 columns 'label'"),
            ({"nodes": NODES.replace(".5", "big")}, "nodes.csv:5: expected a number in column 'b', got 'big'"),
            ({"nodes": NODES.replace(".5", "")}, "nodes.csv:5: expected a number in column 'b', got ''"),
            ({"nodes": NODES.replace(".5", "nan")}, "nodes.csv:5: expected a number"),
            ({"nodes": NODES.replace(".5", "-inf")}, "nodes.csv:5: expected a number"),
            ({"nodes": NODES.replace(".5", "1e39")}, "nodes.csv:5: expected a number in column 'b', got '1e39'"),
            ({"nodes": NODES.replace(",val", ",vel")}, "nodes.csv:4: split 'vel' is none of train, val, test; did you"),
            ({"nodes": NODES.replace("y,test", ",test")}, "nodes.csv:5: a node to test on, and no label"),
            ({"nodes": NODES.replace(",test", ",")}, "nodes.csv: no node has 'test' in its column 'split'"),
            ({"nodes": NODES.replace("train", "val")}, "nodes.csv: no node has 'train'"),
            ({"nodes": NODES + "1,1,x\n"}, "nodes.csv:7: 3 columns, and 4 names"),
            ({"nodes": NODES, "id": "a"}, "nodes.csv:4: a '1' stands on a line before"),
            ({"nodes": NODES.replace("-2", ""), "id": "a"}, "nodes.csv:4: a '1' stands"),
            ({"nodes": "n,a,label,split\n,1,x,train\n", "id": "n"}, "nodes.csv:2: n '' is no name"),
            ({"nodes": NODES.replace(",", ";").replace(".5", "0,5")}, "got '0,5': write decimals behind a point"),
            ({"features": ["c"]}, "nodes.csv:1: no column 'c'"),
            ({"nodes": NODES.replace("b,", "a,")}, "nodes.csv:1: 2 columns 'a' in its first line: give each its name"),
            ({"features": ["a", "b", "a"]}, "label, split, id and features name the column 'a' twice"),
            ({"features": ["a", "label"]}, "name the column 'label' twice"),
        ],
    )
    def test_what_cannot_be_used_is_one_line(self, write, files, line):
        with pytest.raises(InputError, match=line) as caught:
            write(**files).setup()
        assert "\n" not in str(caught.value)

    def test_files_that_are_not_there_are_one_line(self, write, tmp_path):
        data = write()
        (tmp_path / "edges.csv").rename(tmp_path / "edge.csv")
        with pytest.raises(InputError, match=r"edges .*edges.csv does not exist; did you mean 'edge.csv'\?"):
            data.setup()
        (tmp_path / "nodes.csv").write_bytes(b"\xff\xfe")
        with pytest.raises(InputError, match=r"nodes\.csv is not text in UTF-8"):
            data.setup()

    def test_a_class_that_nothing_teaches_is_told(self, write):
        with pytest.warns(UserWarning, match="no node to train on is of class z"):
            write(nodes=NODES.replace("y,test", "z,test")).setup()

    def test_any_change_is_another_fingerprint(self, write):
        prints = []
        for arguments in ({}, {"edges": "0,1\n1,2\n"}, {"nodes": NODES.replace(".5", ".6")}, {"directed": True},
                          {"nodes": NODES.replace(",val", ",")}, {"nodes": NODES.replace("y,test", "x,test")},
                          {"nodes": NODES.replace("x,val", "x,test").replace("y,test", "y,val")}):  # fmt: skip
            prints.append(loaded(write(**arguments)).fingerprint)
        assert len(set(prints)) == 7
        assert loaded(write()).fingerprint == prints[0]

    def test_a_run_from_start_to_verify(self, write, train, capsys, tmp_path):
        write()
        words = (f"--data.edges={tmp_path}/edges.csv", f"--data.nodes={tmp_path}/nodes.csv", "--data.normalize=false")
        run = train("--data=datamodules.edge_list.EdgeList", *words, "--model.sizes=[2,4,2]", "--trainer.max_epochs=3",
                    experiment="experiments/cora_gcn.yaml", tiny=())  # fmt: skip
        assert receipt(run)["data"] == {"name": "EdgeList", "train": 2, "val": 1, "test": 1, "source": receipt(run)["data"]["source"],
                                        "fingerprint": loaded(write()).fingerprint}  # fmt: skip
        assert main(["--verify", str(run / "receipt.json")]) == 0
        assert main([str(run / "config.yaml"), "--ckpt", str(run / "best.ckpt")]) == 0
        write(nodes=NODES.replace("x,train", "w,train").replace("x,val", "w,val"))
        capsys.readouterr()
        assert main([str(run / "config.yaml"), "--ckpt", str(run / "best.ckpt")]) == 2
        assert "tells apart x, y, but the data has w, y" in capsys.readouterr().err


class TestRuns:
    """On the small Cora, through train.py."""

    @pytest.mark.parametrize(("experiment", "model"), [("karate_gcn", GCN), ("cora_sage", GraphSAGE)])
    def test_a_stopped_and_resumed_run_ends_in_the_same_bits(self, experiment, model, train, monkeypatch, tmp_path):
        """Dropout, and what is sampled; some nodes are left over for a smaller batch."""
        words = [
            "--trainer.max_epochs=3",
            *(["--data.batch_size=5"] if model is GraphSAGE else ["--model.dropout=0.5"]),
        ]
        whole = train(*words, experiment=f"experiments/{experiment}.yaml", tiny=())
        whole = Path(shutil.move(whole, tmp_path / "whole"))
        with monkeypatch.context() as patch:
            stop_at(patch, epoch=2, batch=0, model=model)
            with pytest.raises(Stop):
                main([f"experiments/{experiment}.yaml", *words])
        torch.manual_seed(999)
        stopped = only_run(tmp_path)
        assert train("--resume", str(stopped), experiment="") == stopped
        assert_same_run(whole, stopped)
        assert receipt(whole)["tested"] == receipt(whole)["data"]["test"]

    def test_cora_in_miniature_is_learned(self, train):
        run = train("--trainer.max_epochs=25", experiment="experiments/cora_gcn.yaml", tiny=())
        assert receipt(run)["metrics"]["test/acc"] > 0.8
        assert receipt(run)["metrics"].keys() >= {"test/loss", "test_acc/Neural Networks", "test_acc/Theory"}
        assert receipt(run)["tested"] == receipt(run)["data"]["test"] == 23
        torch.load(run / "best.ckpt", weights_only=True)

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (["--data.fan_outs=[5,5]"], "degrees of the whole graph: --data.fan_outs null"),
            (["--model.sizes=[1433,16,6]"], "Planetoid has 1,433 and 7: --model.sizes '[1433, 16, 7]'"),
            (["--data.name=Cara"], "Cara"),
            (
                ["--data=datamodules.mnist.MNIST", "--data.val_size=53"],
                "GCN tells the nodes of a graph apart, and MNIST",
            ),
        ],
    )
    def test_what_does_not_fit_is_one_line_before_anything_is_written(self, words, line, capsys, tmp_path):
        assert main(["experiments/cora_gcn.yaml", *words]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert line in err
        assert not (tmp_path / "runs").exists()


class TestPictures:
    @pytest.mark.pictures
    def test_a_small_graph_is_drawn_with_what_was_told(self, train):
        run = train("--trainer.max_epochs=3", experiment="experiments/karate_gcn.yaml", tiny=())
        assert {p.name for p in (run / "pictures").iterdir()} == {"curves.png", "embeddings.png", "graph.png"}
        assert min(p.stat().st_size for p in (run / "pictures").iterdir()) > 10_000

    def test_of_a_large_graph_those_to_test_come_first(self, monkeypatch):
        drawn = []
        monkeypatch.setattr("callbacks.graphs._embeddings", lambda *arguments: drawn.append(arguments))
        for words in ({}, {"fan_outs": [3, 3], "eval_batch_size": 100}):
            torch.manual_seed(0)
            data, model = loaded(Planetoid(**words)), GraphSAGE().eval()
            trainer = type("Trainer", (), {"datamodule": data})
            run = type("NoRun", (), {"save_picture": lambda *_: None})()
            GraphPictures(run, most=60).on_test_end(trainer, model)
        points, labels, predicted, is_test, classes, title = drawn[0]
        assert points.shape == (60, 2)
        assert len(labels) == len(predicted) == len(is_test) == 60
        assert int(is_test.sum()) >= 23
        assert classes[0] == "Theory"
        assert "60 of 537 nodes" in title
        torch.testing.assert_close(drawn[1][2], predicted)

    @pytest.mark.pictures
    def test_a_graph_with_nothing_to_see_is_left_out(self, tmp_path):
        data = loaded(KarateClub())
        data.keep(torch.zeros(3, 34), torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 1, -1]),
                  {"train": torch.tensor([0]), "test": torch.tensor([1])})  # fmt: skip
        run = Run(tmp_path / "runs" / "x" / "y")
        run.folder.mkdir(parents=True)
        GraphPictures(run).on_test_end(type("Trainer", (), {"datamodule": data}), GCN((34, 2)).eval())
        assert [p.name for p in (run.folder / "pictures").iterdir()] == ["graph.png"]

    def test_points_that_are_all_the_same_have_no_map(self):
        assert tsne(torch.ones(50, 3)) is None
        assert tsne(torch.rand(3, 5)) is None
        assert tsne(torch.full((9, 2), float("nan"))) is None
        assert tsne(torch.rand(4, 5)).shape == (4, 2)
        assert torch.equal(tsne(torch.arange(40.0).view(20, 2)), tsne(torch.arange(40.0).view(20, 2)))


def test_sparse_is_what_has_few_numbers(monkeypatch):
    assert loaded(Planetoid()).graph.features.is_sparse
    monkeypatch.setattr(datamodules.graphs, "SPARSE", 0.0)
    dense = loaded(Planetoid())
    assert not dense.graph.features.is_sparse
    assert torch.equal(dense.features, loaded(Planetoid()).features)
