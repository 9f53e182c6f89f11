"""Write a model in a format, run the file, hold it against the model, and say what came of it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from exporting.about import describe
from exporting.formats import FORMATS, Format
from exporting.network import Network, sample_batch
from exporting.networks import network_of
from lit_models.pretrained import from_checkpoint
from runner.checkpoints import check_classes, read_checkpoint
from runner.errors import InputError, one_line
from runner.files import write_whole

COMPARED = 16  # test samples
TRACED = 2  # of them a graph is made with; a batch of 1 would be taken for the only one there is


def hand_on(experiment, checkpoint: Path, name: str, output: Path | None = None) -> int:
    """Write the file, if its outputs are those of the model.

    Args:
        experiment: of the run.
        checkpoint: of it.
        name: of the format.
        output: the file; None: beside the checkpoint.

    Returns:
        The exit code: 0, or 1 if they are not.

    Raises:
        InputError: the format cannot hold the model, or there is nothing to try it on.
    """
    form = FORMATS[name]
    output = output or checkpoint.with_name(checkpoint.stem + form.suffix)
    saved = read_checkpoint(checkpoint, experiment.model)
    why_not = network_of(experiment.model, experiment.datamodule).why_not
    if form.is_graph and why_not:
        raise InputError(
            f"{type(experiment.model).__name__} has no {name}: {why_not}; safetensors and state_dict hold its weights"
        )
    network = prepared(experiment, checkpoint, saved)
    with torch.no_grad():
        inputs = network.example(sample_batch(experiment.datamodule, COMPARED))
        batches = [inputs]
        if why_not is None:
            inputs = repeated(network, inputs)
            batches = [inputs, part(network, inputs, 1)]
        wanted = [list(network(*batch)) for batch in batches]
    about = describe(experiment, checkpoint, saved, network, inputs, wanted[0])
    content = written(form, name, network, inputs, about)

    temporary = output.with_name(f".{output.name}.tmp")
    try:
        write_whole(temporary, content)
        found = run_file(form, temporary, batches, lambda: anew(experiment))
        differences = [compare(a, b) for a, b in zip(found, wanted, strict=True)]
        if not all(difference <= form.tolerance for _, difference in differences):  # nor if one is NaN
            print(told(form, batches, differences, network))
            print(f"not written: the outputs of {output.name} are not the model's")
            return 1
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    if name == "state_dict":
        write_whole(output.with_name(f"{output.name}.json"), f"{json.dumps(about, indent=2)}\n".encode())
    print_about(about)
    print(told(form, batches, differences, network))
    print(f"written      {output} ({len(content) / 1e6:.1f} MB)")
    return 0


def prepared(experiment, checkpoint: Path, saved: dict) -> Network:
    """Return the run's network with the checkpoint's weights, on the CPU, and set up its data.

    Raises:
        InputError: the data is not there, or is other data than the checkpoint was trained on.
    """
    data, config = experiment.datamodule, experiment.config["trainer"]
    trainer = experiment.trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        devices=1,
        num_nodes=1,
        strategy="auto",
        precision="64-true"
        if str(config["precision"]) in ("64", "64-true")
        else "32-true",  # mixed weights are of 32 bits
    )
    model = experiment.model
    trainer.strategy.connect(model)
    trainer.datamodule, data.trainer, model.trainer = data, trainer, trainer
    model.load_state_dict(saved["state_dict"])
    try:
        experiment.load_data()
        check_classes(checkpoint, saved, data)
    except InputError as error:
        raise InputError(f"the file is to be tried on test data of the run's own: {error}") from error
    if isinstance(state := saved.get(type(data).__qualname__), dict):  # a vocabulary, for instance
        data.load_state_dict(state)
    return network_of(model, data)


def anew(experiment) -> Network:
    """Return the network as its class makes it, with weights that have not been trained."""
    with from_checkpoint():
        model = experiment.parser.instantiate_classes(experiment.config)["model"]
    model = model.to(experiment.model.dtype)
    model.trainer = experiment.model.trainer
    return network_of(model, experiment.datamodule)


def written(form: Format, name: str, network: Network, inputs: tuple, about: dict) -> bytes:
    """Return the file's content.

    Raises:
        InputError: the format has no such operation, or the model does what no graph can.
    """
    try:
        few = part(network, inputs, TRACED) if form.is_graph else inputs
        return form.write(network, few, about)
    except (InputError, OSError, ModuleNotFoundError):
        raise
    except Exception as error:  # of many kinds, by tracing
        why = one_line(error)[:200]
        raise InputError(f"{type(network.model).__name__} cannot be made a graph for {name}: {why}") from error


@torch.no_grad()
def run_file(form: Format, path: Path, batches: list[tuple], make: Callable[[], Network]) -> list[list[Tensor]]:
    """Return what the file gives for each batch.

    Raises:
        InputError: it cannot be run.
    """
    try:
        run = form.run(path, make)
        return [run(batch) for batch in batches]
    except (InputError, OSError, ModuleNotFoundError):
        raise
    except Exception as error:  # of many kinds, by onnxruntime for instance
        raise InputError(f"what was written cannot be run: {one_line(error)[:200]}") from error


# -- batches -------------------------------------------------------------------------------------------------------------


def part(network: Network, inputs: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """Return the first so many samples of a batch."""
    dims = [network.batch_dim.get(name, 0) for name in network.inputs]
    return tuple(tensor.narrow(dim, 0, count).contiguous() for dim, tensor in zip(dims, inputs, strict=True))


def repeated(network: Network, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a batch of more samples than a graph is traced with; of too few, with copies of the first."""
    dims = [network.batch_dim.get(name, 0) for name in network.inputs]
    if inputs[0].shape[dims[0]] > TRACED:
        return inputs
    return tuple(tensor.repeat_interleave(TRACED + 1, dim) for dim, tensor in zip(dims, inputs, strict=True))


def compare(found: list[Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    """Return the largest difference between outputs, as it is, and as a share of the largest output (of 1, if less)."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in wanted]:
        return float("inf"), float("inf")
    largest = [0.0, 0.0]
    for a, b in zip(found, wanted, strict=True):
        if a.numel() and not torch.equal(a, b):
            difference = (a.double() - b.double()).abs().max().item()
            size = max(1.0, b.double().abs().max().item())
            largest = [max(difference, largest[0]), max(difference / size, largest[1])]
            if difference != difference:  # max() would pass over NaN
                return difference, difference
    return largest[0], largest[1]


# -- what is said --------------------------------------------------------------------------------------------------------


def told(form: Format, batches: list[tuple], differences: list[tuple[float, float]], network: Network) -> str:
    """Return the line with the largest difference."""
    sizes = [batch[0].shape[network.batch_dim.get(network.inputs[0], 0)] for batch in batches]
    on = " and ".join(f"{size}" for size in sizes)
    allowed = "none" if not form.tolerance else f"{form.tolerance:g} of the largest output, or of 1"
    largest, share = (max(values, key=lambda v: (v != v, v)) for values in zip(*differences, strict=True))  # NaN first
    return (
        f"difference   {largest:.3g}, {share:.3g} of the largest output (allowed: {allowed}), on test batches of {on}"
    )


def print_about(about: dict) -> None:
    """Print what one has to know to use the file."""
    print(f"model        {about['model']}, of {about['experiment']}, epoch {about['checkpoint']['epoch'] + 1}")
    print(f"sha256       {about['checkpoint']['sha256']} of {about['checkpoint']['file']}")
    print(f"function     {about['function']}")
    for kind in ("inputs", "outputs"):
        shapes = (f"{e['name']} ({', '.join(map(str, e['shape']))}) {e['dtype']}" for e in about[kind])
        print(f"{kind:12} {'; '.join(shapes) or 'no tensors alone'}")
    if normalised := about["normalisation"]:
        print(f"normalised   {normalised['of']}: minus {normalised['mean']}, divided by {normalised['std']}")
    if classes := about["classes"]:
        print(f"classes      {', '.join(classes[:20])}{' ...' if len(classes) > 20 else ''}")
    for name in ("vocabulary", "source_vocabulary", "target_vocabulary"):
        if name in about:
            print(f"{name.partition('_')[0]:12} {len(about[name])} symbols")
    if limits := about.get("detections"):
        print(f"detections   {', '.join(f'{key} {value}' for key, value in limits.items())}")
