"""`receipt.json`: what was measured, on what, with what: enough to check the number by testing again."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from runner.files import write_whole
from runner.run import Run

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "numpy", "opencv-python-headless",
            "albumentations", "pillow", "faster-coco-eval", "scikit-image")  # fmt: skip
REPOSITORY = Path(__file__).parent.parent


class CountTested(Callback):
    """Counts the samples tested, and measures the seconds it takes."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self.samples, self.started = 0, time.perf_counter()

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the batch's samples: the length of what it holds first."""
        self.samples += len(batch[0])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.started


def write_receipt(
    run: Run, experiment, metrics: dict[str, float], trainer: Trainer, fit_seconds: float, count: CountTested
) -> dict:
    """Write the receipt of a tested run, and return it; the docstring of this file says what for."""
    best = run.folder / "best.ckpt"
    saved = torch.load(best, map_location="cpu", weights_only=True)
    definitions = getattr(experiment.model, "definitions", None)  # of metrics, where there are several by that name
    teacher = getattr(experiment.model, "teacher", None)  # whose answers it learned from
    receipt = {
        "experiment": experiment.name,
        "metrics": metrics,
        **({"definitions": definitions} if definitions else {}),
        "checkpoint": {
            "path": best.name,
            "sha256": sha256(best),
            "epoch": saved["epoch"],
            "step": saved["global_step"],
        },
        "epochs": trainer.current_epoch,
        "config_sha256": sha256(run.folder / "config.yaml"),
        "data": experiment.datamodule.describe(),
        "tested": count.samples,
        "seed": experiment.seed,
        "pretrained": experiment.model.pretrained,
        **({"teacher": teacher} if teacher else {}),
        "parameters": sum(p.numel() for p in experiment.model.parameters()),
        "precision": trainer.precision,
        "devices": {**describe_device(trainer), "count": trainer.world_size},
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "git": _git(),
        "seconds": {"fit": round(fit_seconds, 3), "test": round(count.seconds, 3)},
    }
    write_whole(run.folder / "receipt.json", f"{json.dumps(receipt, indent=2)}\n".encode())
    return receipt


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_device(trainer: Trainer) -> dict[str, str | int]:
    """What the last bits of a number depend on: the device, the instructions that a CPU has, and how many threads."""
    device = trainer.strategy.root_device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    return {"kind": kind, "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def _git() -> dict | None:
    """Return the repository's commit, and whether its code differs from it; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", "*.py")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
