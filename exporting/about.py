"""What one has to know to use an exported file: what goes in and out, how pictures are normalised, which classes there are."""

from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning import LightningDataModule
from torch import Tensor

from callbacks.receipt import sha256
from datamodules.vocabulary import Vocabulary
from exporting.network import Network
from exporting.networks import Codes, Samples


def describe(experiment, checkpoint: Path, saved: dict, network: Network, inputs: tuple, outputs: list[Tensor]) -> dict:
    """Return it, of plain types.

    Args:
        experiment: with its data set up.
        checkpoint: the file.
        saved: its content.
        network: of the model.
        inputs, outputs: of a batch.
    """
    data, model = experiment.datamodule, experiment.model
    config = yaml.safe_load(experiment.config_yaml())["model"]
    about: dict[str, Any] = {
        "experiment": experiment.name,
        "task": getattr(model, "tag", ""),
        "model": config["class_path"],
        "init_args": config.get("init_args") or {},
        "function": network.says,
        "inputs": [told(network, name, value) for name, value in zip(network.inputs, inputs, strict=False)],
        "outputs": [told(network, name, value) for name, value in zip(network.outputs, outputs, strict=False)],
        "normalisation": normalisation(data, network),
        "classes": list(getattr(data, "classes", None) or ()),
    }
    for name in ("vocabulary", "source_vocabulary", "target_vocabulary"):
        if isinstance(vocabulary := getattr(data, name, None), Vocabulary):
            about[name] = symbols(vocabulary)
    if hasattr(model, "nms_threshold"):
        about["detections"] = {
            key: getattr(model, key) for key in ("score_threshold", "nms_threshold", "max_detections")
        }
    about["checkpoint"] = {"file": checkpoint.name, "sha256": sha256(checkpoint), "epoch": saved["epoch"]}
    about["torch"] = torch.__version__
    return about


def told(network: Network, name: str, value: Tensor) -> dict:
    """Return name, shape and dtype of an input or an output."""
    shape: list[int | str] = list(value.shape)
    shape[network.batch_dim.get(name, 0)] = "batch"
    return {"name": name, "shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}


def symbols(vocabulary: Vocabulary) -> list[str]:
    """Return what each number stands for, the special symbols by their names."""
    special = {vocabulary.unknown: "UNKNOWN", vocabulary.start: "START", vocabulary.end: "END"}
    return [special.get(i, "PAD") for i in range(vocabulary.first)] + vocabulary.symbols


def normalisation(data: LightningDataModule, network: Network) -> dict | None:
    """Return mean and standard deviation that the data module normalises by, of pixels in [0, 1] if it has pixels.

    What it does to a batch of bytes is tried on a black and on a white one: no two modules say it in the same way.
    """
    if isinstance(network, Samples):
        return None
    if isinstance(network, Codes):
        return {"of": "pixels in [0, 1]", "mean": [0.0], "std": [1.0]}
    batch = next(iter(data.test_dataloader()))
    images = batch[0]
    first = images[0]
    if first.dtype != torch.uint8:
        if not hasattr(data, "std"):
            return None
        return {"of": "values", "mean": data.mean, "std": data.std}
    ends = []
    for value in (0, 255):
        flat = (
            torch.full_like(images, value)
            if isinstance(images, Tensor)
            else [torch.full_like(i, value) for i in images]
        )
        ends.append(data.on_after_batch_transfer((flat, *batch[1:]), 0)[0][0, :, 0, 0].double())
    black, white = ends  # (C,)
    std = 1 / (white - black)
    return {
        "of": "pixels in [0, 1]",
        "mean": [round(m, 5) for m in (0.0 - black * std).tolist()],
        "std": [round(s, 5) for s in std.tolist()],
    }
