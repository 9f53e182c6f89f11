"""`export.py` writes what others can run: what comes out of the file is what comes out of the model."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import torch
from conftest import REPOSITORY, TINY
from safetensors.torch import load_file

from datamodules.mnist import read_idx
from datamodules.vocabulary import PAD
from export import FORMATS as NAMES
from export import main
from exporting import formats
from exporting.about import normalisation
from exporting.formats import FORMATS, trace, write_onnx
from exporting.hand_on import compare, part
from exporting.network import Network
from exporting.networks import network_of
from lit_models.airbench import Airbench
from lit_models.autoencoder import Autoencoder
from lit_models.backbones import Backbone, SmallFeatures
from lit_models.captioning import ShowAttendTell
from lit_models.dcgan import DCGAN
from lit_models.detector import Detector
from lit_models.detr import DETR
from lit_models.faster_rcnn import FasterRCNN
from lit_models.fcos import FCOS
from lit_models.fpn import FeaturePyramid
from lit_models.gnn import GCN
from lit_models.language_model import RecurrentLM
from lit_models.localizer import Localizer
from lit_models.lstm import GRU, LSTM
from lit_models.mlp import MLP
from lit_models.retinanet import RetinaNet
from lit_models.seq2seq import START, AttentionSeq2Seq
from lit_models.sequences import SequenceClassifier, SequenceRegressor
from lit_models.sliding_window import SlidingWindow
from lit_models.transformer import TransformerLM
from lit_models.translation_transformer import TranslationTransformer
from lit_models.unet import UNet
from lit_models.vit import ViT
from lit_models.yolo import YOLO
from train import main as train_main

NORMALIZE = (0.13, 0.31)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_data) -> Path:
    """The folder of a run on the small MNIST."""
    with pytest.MonkeyPatch.context() as patch:
        runs = tmp_path_factory.mktemp("runs")
        patch.setenv("RUNS_DIR", str(runs))
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("DATA_DIR", str(small_data))
        patch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, dpi: path.write_bytes(b""))
        patch.setattr("runner.run.RunWandbLogger.log_image", lambda *_: None)
        small = ("--model.sizes=[784, 16, 10]", f"--data.normalize={list(NORMALIZE)}", "--trainer.max_epochs=1")
        assert train_main([str(REPOSITORY / "experiments" / "mnist_mlp.yaml"), *TINY, *small]) == 0
        (run,) = runs.glob("mnist_mlp/*")
        return run


@pytest.fixture
def export(run, tmp_path, capsys):
    """Export the run's best checkpoint; returns the file and what was printed."""

    def call(name: str) -> tuple[Path, str]:
        output = tmp_path / f"model{FORMATS[name].suffix}"
        assert main([str(run / "best.ckpt"), "--format", name, "--output", str(output)]) == 0
        return output, capsys.readouterr().out

    return call


@pytest.fixture
def refused(capsys):
    """Call export.py with a mistake; returns the one line it says."""

    def call(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        return err

    return call


@pytest.fixture(scope="module")
def tested(small_data, run) -> tuple[np.ndarray, torch.Tensor]:
    """The test set's pictures (N, 1, 28, 28) uint8, and what the model says of them: logits (N, 10)."""
    pixels = read_idx(small_data / "MNIST" / "raw" / "t10k-images-idx3-ubyte", 3)[:, None]
    model = MLP.load_from_checkpoint(run / "best.ckpt", weights_only=True).eval()
    with torch.no_grad():
        return pixels.numpy(), model((pixels / 255 - NORMALIZE[0]) / NORMALIZE[1])


def normalised(pixels: np.ndarray, about: dict) -> np.ndarray:
    """What the file is to be given, by what is said beside or in it."""
    assert about["normalisation"]["of"] == "pixels in [0, 1]"
    mean, std = (np.array(about["normalisation"][key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    return (pixels.astype(np.float32) / 255 - mean) / std


def is_complete(about: dict, run: Path) -> None:
    """What is to be known of a file is in its metadata."""
    assert (about["experiment"], about["model"]) == ("mnist_mlp", "lit_models.mlp.MLP")
    assert about["inputs"] == [{"name": "images", "shape": ["batch", 1, 28, 28], "dtype": "float32"}]
    assert about["outputs"] == [{"name": "logits", "shape": ["batch", 10], "dtype": "float32"}]
    assert about["classes"] == list("0123456789")
    assert about["init_args"]["sizes"] == [784, 16, 10]
    assert about["checkpoint"]["sha256"] == json.loads((run / "receipt.json").read_text())["checkpoint"]["sha256"]


# -- each format, used as somebody without this repository would -------------------------------------------------------


class TestFormats:
    @pytest.mark.parametrize("name", ["state_dict", "safetensors"])
    def test_weights_and_what_is_to_be_known_of_them(self, export, run, tested, name):
        file, said = export(name)
        if name == "state_dict":
            weights = torch.load(file, weights_only=True)
            about = json.loads(file.with_name(f"{file.name}.json").read_text())
        else:
            weights = load_file(file)
            with safetensors.safe_open(file, "pt") as opened:
                about = opened.metadata()
            about = {k: json.loads(v) if v[:1] in '[{"' else v for k, v in about.items()}
        is_complete(about, run)
        model = MLP(tuple(about["init_args"]["sizes"])).eval()
        model.load_state_dict(weights)
        pixels, logits = tested
        found = model(torch.from_numpy(normalised(pixels, about)))
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)  # mean and std are told with five digits
        assert "difference   0, 0 of" in said

    def test_onnx_takes_batches_of_any_size(self, export, run, tested):
        file, said = export("onnx")
        onnx.checker.check_model(onnx.load(file), full_check=True)
        session = onnxruntime.InferenceSession(file)
        assert session.get_inputs()[0].shape == ["batch", 1, 28, 28]
        texts = session.get_modelmeta().custom_metadata_map
        about = {k: json.loads(v) if v[:1] in "[{" else v for k, v in texts.items()}
        is_complete(about, run)
        pixels, logits = tested
        for n in (1, 2, 103):
            (found,) = session.run(["logits"], {"images": normalised(pixels[:n], about)})
            torch.testing.assert_close(torch.from_numpy(found), logits[:n], rtol=1e-4, atol=1e-4)
        assert "images (batch, 1, 28, 28) float32" in said
        assert "on test batches of 16 and 1" in said

    def test_torch_export_runs_in_another_process_without_this_repository(self, export, run, tested, tmp_path):
        file, _ = export("torch_export")
        code = (
            "import json, sys, torch\n"
            "about = {'metadata.json': ''}\n"
            f"graph = torch.export.load({str(file)!r}, extra_files=about).module()\n"
            "images = torch.load('images.pt')\n"
            "torch.save([graph(images[:n]) for n in (1, 2, 103)], 'logits.pt')\n"
            "print(about['metadata.json'])\n"
            "assert not any(name.startswith(('lit_models', 'pytorch_lightning')) for name in sys.modules)\n"
        )
        pixels, logits = tested
        about = {"normalisation": {"of": "pixels in [0, 1]", "mean": [NORMALIZE[0]], "std": [NORMALIZE[1]]}}
        torch.save(torch.from_numpy(normalised(pixels, about)), tmp_path / "images.pt")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        is_complete(json.loads(done.stdout), run)
        for (found,), n in zip(torch.load(tmp_path / "logits.pt"), (1, 2, 103), strict=True):
            torch.testing.assert_close(found, logits[:n], rtol=1e-5, atol=1e-5)

    def test_it_lies_beside_the_checkpoint_and_nothing_else_does(self, run, capsys):
        before = set(run.iterdir())
        assert main([str(run / "best.ckpt"), "--format", "safetensors"]) == 0
        assert set(run.iterdir()) - before == {run / "best.safetensors"}
        (run / "best.safetensors").unlink()
        assert f"written      {run / 'best.safetensors'}" in capsys.readouterr().out


def test_the_command_line_and_the_readme_know_all_formats():
    readme = (REPOSITORY / "README.md").read_text()
    assert set(NAMES) == set(FORMATS)
    assert set(re.findall(r"python export.py RUN/best.ckpt --format (\w+)", readme)) == set(FORMATS)


class TestRefusals:
    @pytest.mark.parametrize("spoil", [lambda y: y + 0.01, lambda y: y * float("nan"), lambda y: y[:1]])
    def test_a_file_with_other_outputs_is_not_written(self, run, tmp_path, monkeypatch, capsys, spoil):
        (tmp_path / "model.st").write_text("what was there")
        right = FORMATS["safetensors"]

        def run_wrongly(path, anew):
            run = right.run(path, anew)
            return lambda inputs: [spoil(output) for output in run(inputs)]

        monkeypatch.setitem(formats.FORMATS, "safetensors", dataclasses.replace(right, run=run_wrongly))
        assert main([str(run / "best.ckpt"), "--format", "safetensors", "--output", str(tmp_path / "model.st")]) == 1
        said = capsys.readouterr().out
        assert "not written: the outputs of model.st are not the model's" in said
        assert "difference   0," not in said
        assert {p.name for p in tmp_path.iterdir()} == {"model.st"}
        assert (tmp_path / "model.st").read_text() == "what was there"

    def test_data_that_is_gone(self, run, refused, tmp_path, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "nothing"))
        config = (run / "config.yaml").read_text()
        moved = tmp_path / "run"
        moved.mkdir()
        (moved / "best.ckpt").write_bytes((run / "best.ckpt").read_bytes())
        (moved / "config.yaml").write_text(config.replace("offline_fallback: true", "offline_fallback: false"))
        monkeypatch.setattr("datamodules.mnist.MNIST.prepare_data", lambda self: None)
        said = refused(moved / "best.ckpt", "--format", "onnx")
        assert "test data of the run's own: MNIST is not in" in said
        assert not list(moved.glob("*.onnx*"))

    def test_what_can_be_found_wrong_at_once(self, run, refused, tmp_path):
        best = run / "best.ckpt"
        assert "invalid choice: 'onyx'" in refused(best, "--format", "onyx")
        assert "--format" in refused(best)
        assert "does not exist; did you mean 'best.ckpt'?" in refused(run / "bst.ckpt", "--format", "onnx")
        assert "is a folder: name a file" in refused(best, "--format", "onnx", "--output", tmp_path)
        assert "no folder" in refused(best, "--format", "onnx", "--output", tmp_path / "no" / "x.onnx")
        for own in ("best.ckpt", "config.yaml", "receipt.json", "metrics.csv"):
            assert "another name" in refused(best, "--format", "onnx", "--output", run / own)
        (tmp_path / "best.ckpt").write_bytes(best.read_bytes())
        assert f"{tmp_path / 'config.yaml'} does not exist" in refused(tmp_path / "best.ckpt", "--format", "onnx")

    def test_what_has_no_graph_has_weights(self, train, refused, capsys):
        run = train(experiment="experiments/karate_gcn.yaml", tiny=("--trainer.max_epochs=1",))
        for name in ("onnx", "torch_export"):
            assert f"GCN has no {name}: it multiplies by the sparse" in refused(run / "best.ckpt", "--format", name)
        assert main([str(run / "best.ckpt"), "--format", "state_dict"]) == 0
        said = capsys.readouterr().out
        assert "difference   0, 0 of" in said
        assert "inputs       nodes (batch) int64\noutputs      no tensors alone" in said

    def test_the_kinds_that_have_no_graph(self):
        backbone = Backbone(SmallFeatures(), ["stage4"])
        assert "as many regions" in network_of(FasterRCNN(3, backbone, hidden=8), None).why_not
        assert "not of one shape" in network_of(Detector(3), None).why_not
        assert "sparse" in network_of(GCN((4, 2)), None).why_not


# -- every kind of model: the graph, made with a batch of 2, gives what the model gives for others -------------------------


def backbone(*layers: str) -> Backbone:
    return Backbone(SmallFeatures((8, 8, 16, 16)), list(layers))


def pyramid() -> FeaturePyramid:
    return FeaturePyramid(backbone("stage3", "stage4"), 16)


DETECTORS = {
    "sliding window": lambda: SlidingWindow(3, windows=(20.0, 40.0), widths=(4, 4, 8)),
    "localizer": lambda: Localizer(3, backbone("stage4"), hidden=8),
    "RetinaNet": lambda: RetinaNet(3, pyramid(), depth=1),
    "FCOS": lambda: FCOS(3, pyramid(), depth=1, groups=4),
    "YOLO": lambda: YOLO(3, backbone("stage2", "stage3", "stage4"), width=8),
    "DETR": lambda: DETR(3, backbone("stage4"), queries=5, width=16, heads=2, layers=1),
}
TOKENS = torch.randint(3, 9, (5, 4), generator=torch.Generator().manual_seed(0))
TOKENS[0, 2:] = TOKENS[3, 1:] = PAD
PIXELS = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WRITTEN = torch.cat([torch.full((5, 1), START), TOKENS], dim=1)  # (5, 5)
KINDS = {
    "vision transformer": lambda: (
        ViT(num_classes=4, image_size=32, patch=8, channels=3, width=16, layers=1, heads=2),
        PIXELS,
    ),
    "views of a picture": lambda: (Airbench(4, (8, 8, 8)), PIXELS),
    "segmenter": lambda: (UNet(3, 3, features=(4, 8)), PIXELS),
    "generator by class": lambda: (
        DCGAN(width=8, noise=4, num_classes=10),
        torch.rand(5, 1, 28, 28),
        torch.arange(5),
    ),
    "forecaster": lambda: (SequenceRegressor(GRU(1, 4, fused=True)), torch.rand(5, 4)),
    "texts": lambda: (SequenceClassifier(4, 9, LSTM(4, 4, fused=True)), TOKENS),
    "recurrent language model": lambda: (RecurrentLM(9, LSTM(4, 4, fused=True)), TOKENS),
    "Transformer language model": lambda: (TransformerLM(9, 4, 1, 2, 8), TOKENS),
    "attention": lambda: (AttentionSeq2Seq(9, 9, 4, 4, max_length=3), TOKENS, WRITTEN),
    "translation": lambda: (TranslationTransformer(9, 9, 1, 8, 2, max_length=3), TOKENS, WRITTEN),
    "captions": lambda: (ShowAttendTell(9, backbone("stage4"), 4, 4, max_length=3), PIXELS, WRITTEN),
}


def network_and_inputs(model: torch.nn.Module, *batch: torch.Tensor) -> tuple[Network, tuple]:
    """A network with batch norms that have seen something, and what it is given."""
    sets = dict.fromkeys(("train_set", "val_set", "test_set"), SimpleNamespace(tensors=batch))
    network = network_of(model.eval(), SimpleNamespace(**sets))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    with torch.no_grad():
        return network, network.example(batch)


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_graph_for_any_batch(self, kind):
        torch.manual_seed(0)
        network, inputs = network_and_inputs(*KINDS[kind]())
        graph = trace(network, part(network, inputs, 2)).module()
        with torch.no_grad():
            for n in (1, 5):
                batch = part(network, inputs, n)
                wanted = network(*batch)
                assert len(wanted) == len(network.outputs)
                assert compare(list(graph(*batch)), list(wanted))[1] < 1e-5
        assert len(inputs) == len(network.inputs)

    @pytest.mark.parametrize("kind", DETECTORS)
    def test_the_candidates_are_those_that_detections_are_made_of(self, kind):
        torch.manual_seed(0)
        model = DETECTORS[kind]()
        network, inputs = network_and_inputs(model, 2 * torch.rand(3, 3, 64, 64) - 1)
        graph = trace(network, part(network, inputs, 2)).module()
        with torch.no_grad():
            boxes, scores = graph(*inputs)
            model.score_threshold = float(scores.flatten().quantile(0.9))
            found = model(inputs[0], [{"size": (64, 64)}] * 3)
        assert sum(len(f["boxes"]) for f in found) >= 3
        for b, s, f in zip(boxes, scores, found, strict=True):
            for box, score, label in zip(f["boxes"], f["scores"], f["labels"], strict=True):
                distances = (b.clamp(0, 64) - box).abs().amax(dim=1) + (s[:, label] - score).abs()
                assert distances.min() < 1e-4

    def test_onnx_of_a_step_with_a_state(self, tmp_path):
        """The state's batch is its second dimension; a text is read token by token."""
        model, tokens = KINDS["recurrent language model"]()
        network, inputs = network_and_inputs(model, tokens)
        (tmp_path / "step.onnx").write_bytes(write_onnx(network, part(network, inputs, 2), {}))
        session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
        state = [np.zeros((1, 5, 4), np.float32)] * 2
        logits = []
        for token in tokens.split(1, dim=1):
            given = {"token": token.numpy(), "state0": state[0], "state1": state[1]}
            said, *state = session.run(["logits", "new_state0", "new_state1"], given)
            logits.append(torch.from_numpy(said))
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens)[0], rtol=1e-4, atol=1e-5)

    def test_an_autoencoder_takes_pixels_whatever_the_data_is_normalised_to(self):
        encoder, decoder = torch.nn.Flatten(), torch.nn.Unflatten(1, (1, 4, 4))
        encoder.code_size = decoder.code_size = 16
        model = Autoencoder(encoder, decoder)
        model._trainer = SimpleNamespace(datamodule=SimpleNamespace(mean=0.5, std=0.25))
        pixels = torch.rand(2, 1, 4, 4)
        network = network_of(model, None)
        (given,) = network.example(((pixels - 0.5) / 0.25,))
        torch.testing.assert_close(given, pixels)
        assert normalisation(None, network)["std"] == [1.0]

    def test_a_difference_that_is_none_is_found(self):
        y = torch.tensor([1.0, -200.0])
        assert compare([y], [y]) == (0.0, 0.0)
        assert compare([y + 1], [y]) == (1.0, 1 / 200)
        assert compare([y[:1]], [y])[0] == float("inf")
        assert np.isnan(compare([y * float("nan")], [y])[1])
        assert compare([y[:0]], [y[:0]]) == (0.0, 0.0)
