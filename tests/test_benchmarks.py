"""The benchmarks run; what they measure is in the README."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from lit_models.backbones import Backbone, SmallFeatures
from lit_models.faster_rcnn import FasterRCNN
from lit_models.fcos import FCOS
from lit_models.fpn import FeaturePyramid
from lit_models.retinanet import RetinaNet


def test_epoch_time_pairs_the_epochs_and_prints_the_ratios():
    command = [sys.executable, "benchmarks/epoch_time.py", "--epochs", "2", "--data.val_size=100"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("A ") and "B " in line and "C " in line for line in lines) == 2
    for ratio in ("A / B", "C / A", "D / A"):
        assert any(line.startswith(ratio) for line in lines), done.stdout


def test_startup_time_ends_at_the_first_step(monkeypatch, capsys):
    sys.path.insert(0, str(REPOSITORY))
    from benchmarks import startup_time

    ended = []
    monkeypatch.setattr(startup_time.os, "_exit", ended.append)
    startup_time.EndAfterFirstStep().on_train_batch_end(None)
    assert ended == [0]
    monkeypatch.setattr(startup_time, "seconds", lambda *command: 2.0 if "train.py" in command else 1.0)
    startup_time.main()
    assert "first step after 2.00 s, import 1.00 s, A / B 2.00" in capsys.readouterr().out


@pytest.mark.parametrize("values", [[1.0, 3.0, 2.0]])
def test_spread(values):
    from benchmarks.epoch_time import spread

    assert spread(values) == "2.00 (1.00 to 3.00)"


# -- detectors ---------------------------------------------------------------------------------------------------------

TINY = ["--data.size=64", "--data.train_size=8", "--data.val_size=6", "--data.test_size=6", "--data.batch_size=4"]


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """They import each other by name; what is drawn is drawn elsewhere."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.chdir(REPOSITORY)


def test_detectors_beside_torchvisions_and_what_map_takes(benchmarks, capsys):
    import detector_speed

    told = ["shapes_retinanet", "--torchvision", "--share", "--rounds", "1", "--batches", "1", *TINY]
    assert detector_speed.main(told) == 0
    out = capsys.readouterr().out
    for what in ("train", "test"):
        ratio = (
            rf"^{what} +shapes_retinanet \(torchvision\) .* shapes_retinanet takes (\d+\.\d\d) \(.*\) times as long$"
        )
        assert float(re.search(ratio, out, flags=re.M)[1]) > 0, out
    assert re.search(r"^share .* mAP of 6 pictures with 300\.0 boxes each \(random.* s: [\d.]+ %$", out, flags=re.M), (
        out
    )


def test_what_torchvision_has_not(benchmarks, capsys):
    import detector_speed

    assert detector_speed.main(["shapes_yolo", "--torchvision", "--batches", "1", *TINY]) == 2
    assert "YOLO is not compared" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet", "fcos"])
def test_torchvisions_has_our_weights_and_settings(benchmarks, name):
    """So that at the beginning both find the same losses, or (of what torchvision has no other way) nearly."""
    from torchvision_detectors import TorchvisionDetector

    torch.manual_seed(0)
    backbone = FeaturePyramid(Backbone(SmallFeatures((8, 16, 32)), ["stage2", "stage3"]), 64, "pool")
    everything = 10**6  # of a random choice, so that there is none
    ours = {
        "faster_rcnn": lambda: FasterRCNN(4, backbone, hidden=16, anchors=everything, regions=everything),
        "retinanet": lambda: RetinaNet(4, backbone, depth=2),
        "fcos": lambda: FCOS(4, backbone, depth=1, groups=16),
    }[name]()
    theirs = TorchvisionDetector(ours, 64)
    images = torch.randn(2, 3, 64, 64)
    boxes = torch.tensor([[3.0, 5, 30, 41], [20, 10, 61, 60]])
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 3]), "size": (64, 64)}] * 2
    made = sum(ours.train().losses(images, targets).values())
    wanted = sum(theirs.train().losses(images, targets).values())
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-4)
    count, background = (sum(p.numel() for p in model.parameters()) for model in (ours, theirs))
    assert background - count == (4 * (16 + 1) if name == "faster_rcnn" else 0)  # boxes of the background
    assert len(theirs.eval()(images, targets)) == 2


def record(experiment: str, seed: int, key: str, map_50: float, fit: float) -> dict:
    return {
        "experiment": experiment, "seed": seed, "key": key, "parameters": 1234567,
        "metrics": {"test/map_50": map_50, "test/map": map_50 / 2}, "seconds": {"fit": fit},
    }  # fmt: skip


SPEED = {
    "images_per_second": {"shapes_rcnn": 4.56, "shapes_yolo": 321.4}, "proposals_ms": 17.7, "cpus": 2, "rounds": 5,
    "batch_size": 50, "trained": True,
}  # fmt: skip


def rows(text: str) -> dict[str, list[str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: line[1:] for line in lines}


def test_detectors_table(benchmarks):
    from detectors_table import table

    records = [
        record("shapes_rcnn", 1, "old", 0.1, 60),  # counts no more
        record("shapes_rcnn", 1, "new", 0.2, 60),  # measured twice
        record("shapes_rcnn", 1, "new", 0.8, 150),
        record("shapes_rcnn", 2, "new", 0.9, 120),
        record("bccd_yolo", 1, "new", 0.5, 600),
        {**record("shapes_fcos", 1, "new", 0.5, 600), "metrics": {}},
    ]
    text = table(records, SPEED)
    made, nothing = rows(text), "not measured"
    assert made["R-CNN"] == ["0.850", "0.425", "1.23 M", "2.0", "4.6 ¹", "–", "–", "–"]
    assert made["YOLO"] == [nothing, nothing, nothing, nothing, "321", "0.500", "0.250", "10.0"]
    assert made["FCOS"] == [nothing] * 8
    assert "18 ms a picture more" in text
    assert "2 CPU cores, batches of 50, trained networks" in text
    assert rows(table([], {}))["RetinaNet"] == [nothing] * 8


def test_detectors_table_is_written_between_its_marks(benchmarks, tmp_path, monkeypatch, capsys):
    import detectors_table

    readme, speed = tmp_path / "README.md", tmp_path / "detectors.json"
    monkeypatch.setattr(detectors_table, "README", readme)
    monkeypatch.setattr(detectors_table, "SPEED", speed)
    readme.write_text("before\n")
    assert detectors_table.main(["--write"]) == 2
    assert "<!-- detectors -->" in capsys.readouterr().err
    readme.write_text("before\n<!-- detectors -->\nold\n<!-- /detectors -->\nafter\n")
    speed.write_text(json.dumps(SPEED))
    for _ in range(2):
        assert detectors_table.main(["--write"]) == 0
        text = readme.read_text()
        assert text.startswith("before\n<!-- detectors -->\n| detector |")
        assert text.endswith("more.\n<!-- /detectors -->\nafter\n")
        assert "old" not in text
        assert rows(text)["YOLO"][4] == "321"
