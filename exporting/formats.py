"""The formats: how a network is written to a file, and how the file is run, by nothing but what is in it."""

import io
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from exporting.network import Network
from exporting.tracing import traceable

Run = Callable[[tuple[Tensor, ...]], list[Tensor]]  # from inputs to outputs


@dataclass(frozen=True)
class Format:
    """One of them.

    Attributes:
        suffix: in place of the checkpoint's `.ckpt`.
        tolerance: how far outputs may be from the model's, as a share of the largest output (of 1, if that is less).
        is_graph: whether the file is a function of tensors, which runs without this repository; else weights.
        write: from the network, inputs to trace it with, and what is to be known of it, to the file's content.
        run: from the file, and a function that makes the network anew, to one that runs it.
    """

    suffix: str
    tolerance: float
    is_graph: bool
    write: Callable[[Network, tuple, dict], bytes]
    run: Callable[[Path, Callable[[], Network]], Run]


# -- weights -------------------------------------------------------------------------------------------------------------


def weights_of(network: Network) -> dict[str, Tensor]:
    """Return the model's weights and buffers by name, each with memory of its own, on the CPU."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.model.state_dict().items()}


def write_state_dict(network: Network, inputs: tuple, about: dict) -> bytes:
    """Return a file of `torch.save`; what is to be known of it goes into a file beside it."""
    content = io.BytesIO()
    torch.save(weights_of(network), content)
    return content.getvalue()


def write_safetensors(network: Network, inputs: tuple, about: dict) -> bytes:
    """Return a file of names and tensors, which has no place for code, with what is to be known in its header."""
    from safetensors.torch import save

    return save(weights_of(network), metadata=as_texts(about))


def run_state_dict(path: Path, anew: Callable[[], Network]) -> Run:
    """Load the weights into a network that was made anew."""
    return _loaded(anew(), torch.load(path, weights_only=True))


def run_safetensors(path: Path, anew: Callable[[], Network]) -> Run:
    """Load the weights into a network that was made anew."""
    from safetensors.torch import load_file

    return _loaded(anew(), load_file(path))


def _loaded(network: Network, weights: dict[str, Tensor]) -> Run:
    network.model.load_state_dict(weights)
    return lambda inputs: list(network(*inputs))


# -- graphs --------------------------------------------------------------------------------------------------------------


def trace(network: Network, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Return the network as a graph of tensor operations, for batches of any length."""
    batch = torch.export.Dim("batch")
    shapes = tuple({network.batch_dim.get(name, 0): batch} for name in network.inputs)
    with traceable(network), torch.no_grad(), warnings.catch_warnings(action="ignore"):
        return torch.export.export(_Graph(network), inputs, dynamic_shapes=(shapes,), strict=False)


class _Graph(nn.Module):
    """The network with one signature for all kinds, which `dynamic_shapes` is told by."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.network(*inputs)


def write_torch_export(network: Network, inputs: tuple, about: dict) -> bytes:
    """Return an archive of `torch.export.save`: the graph, the weights, and what is to be known as `metadata.json`."""
    content = io.BytesIO()
    torch.export.save(trace(network, inputs), content, extra_files={"metadata.json": json.dumps(about, indent=2)})
    return content.getvalue()


def write_onnx(network: Network, inputs: tuple, about: dict) -> bytes:
    """Return an ONNX model, with what is to be known among its metadata."""
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # of what they do not simplify
        logging.getLogger(name).setLevel(logging.ERROR)
    names = {"input_names": list(network.inputs), "output_names": list(network.outputs)}
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(trace(network, inputs), dynamo=True, verbose=False, **names)
    program.model.metadata_props.update(as_texts(about))
    model = program.model_proto
    name_batch(model.graph, network.batch_dim.get(network.inputs[0], 0))
    return model.SerializeToString()


def name_batch(graph, dim: int) -> None:
    """Call the batch's length `batch` in an ONNX graph, of whose first input it is that dimension; torch calls it `s21` or so."""
    name = graph.input[0].type.tensor_type.shape.dim[dim].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:  # which may be a product
                side.dim_param = side.dim_param.replace(name, "batch")


def run_torch_export(path: Path, anew: Callable[[], Network]) -> Run:
    """Load the graph."""
    graph = torch.export.load(path).module()
    return lambda inputs: list(graph(*inputs))


def run_onnx(path: Path, anew: Callable[[], Network]) -> Run:
    """Load the graph, for a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run


def as_texts(about: dict) -> dict[str, str]:
    """Return a dictionary of texts: what is none becomes JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}


FORMATS = {
    "state_dict": Format(".state_dict.pt", 0.0, False, write_state_dict, run_state_dict),
    "safetensors": Format(".safetensors", 0.0, False, write_safetensors, run_safetensors),
    "onnx": Format(".onnx", 1e-4, True, write_onnx, run_onnx),
    "torch_export": Format(".pt2", 1e-4, True, write_torch_export, run_torch_export),
}
