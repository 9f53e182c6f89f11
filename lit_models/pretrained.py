"""Weights that were trained elsewhere: found on this machine, else downloaded, and held against the network they go into."""

import contextlib
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn

from datamodules.files import data_dir, download
from runner.errors import InputError, did_you_mean, one_line

OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=\d)")  # norm.1 in torchvision's files, norm1 in its code

_from_checkpoint = ContextVar("from_checkpoint", default=False)


@contextlib.contextmanager
def from_checkpoint() -> Iterator[None]:
    """Within it, networks are made without looking for their weights: a checkpoint is about to bring all of them."""
    token = _from_checkpoint.set(True)
    try:
        yield
    finally:
        _from_checkpoint.reset(token)


def load_pretrained(
    network: nn.Module,
    weights: str | list[str] | None,
    architecture: str | None,
    prefix: str = "",
    heads: tuple[str, ...] = (),
    rename: Callable[[str], str] = str,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = OrderedDict,
) -> dict | None:
    """Load weights into a network whose names are torchvision's.

    Args:
        network: to load them into.
        weights: a file of weights (of torchvision, or a checkpoint of ours), as it is or below `DATA_DIR`; the name of
            torchvision's, such as `IMAGENET1K_V1` or `DEFAULT`; a list of such, of which the first that is on this
            machine counts, else the last of torchvision's is downloaded; or None.
        architecture: torchvision's name of the network, such as `resnet18`; None if it has no such network.
        prefix: stands before torchvision's names in ours, where ours begin so.
        heads: names of last layers: left as they are if the file lacks them, or was trained for other classes.
        rename: from a name in the file to torchvision's.
        convert: from the file's state dict to another, before all else: where renaming does not do.

    Returns:
        What the receipt says of them: file and its SHA-256; None if nothing was to be loaded.

    Raises:
        InputError: they cannot be had, or do not fit.
    """
    if weights is None or _from_checkpoint.get():
        return None
    file = find_weights([weights] if isinstance(weights, str) else weights, architecture)
    ours = network.state_dict()
    content = read_weights(file)
    metadata = getattr(content, "_metadata", None)  # versions, by which some of torchvision's rename
    content = convert(content)
    theirs = OrderedDict((rename(OLD_NAME.sub(r"\1", name)), tensor) for name, tensor in content.items())
    theirs = OrderedDict((prefix * (prefix + name in ours) + name, tensor) for name, tensor in theirs.items())
    theirs._metadata = metadata
    heads = tuple(f"{head}." for head in heads)
    odd = [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
    for name in [name for name in odd if name.startswith(heads)]:
        del theirs[name]
    odd = [name for name in odd if name in theirs]
    left = network.load_state_dict(theirs, strict=False) if not odd else None
    missing = [n for n in left.missing_keys if not n.startswith(heads)] if left else []
    unknown = [n for n in left.unexpected_keys if not n.startswith(heads)] if left else []
    missing = [n for n in missing if not n.endswith("num_batches_tracked")]  # which old files lack
    if odd or missing or unknown:
        name = (odd or missing or unknown)[0]
        shapes = [tuple(d[name].shape) if name in d else "missing" for d in (theirs, ours)]
        raise InputError(
            f"weights {file} do not fit: {name} is {shapes[0]} there and {shapes[1]} here "
            f"({len(odd)} of other shape, {len(missing)} missing, {len(unknown)} unknown)"
        )
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def find_weights(wanted: list[str], architecture: str | None) -> Path:
    """Return the file of the first of the `wanted` weights that is here; else download the last that has a URL."""
    import torchvision  # its models are slow to import: only here

    looked, url = [], ""
    for name in wanted:
        for path in (Path(name), data_dir() / name):
            if path.is_file():
                return path
        if "/" in name or "." in name:
            looked.append(str(data_dir() / name))
            continue
        url = weights_url(torchvision, name, architecture)
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        file = url.rpartition("/")[2]
        for folder in (data_dir() / "weights", cache):
            if (folder / file).is_file():
                return folder / file
        looked.append(str(data_dir() / "weights" / file))
    if not wanted or not url:
        raise InputError(f"weights are not there: put them into {' or '.join(looked)}, or set DATA_DIR")
    path = data_dir() / "weights" / url.rpartition("/")[2]
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)  # of what should come, in its name

    def fetch() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest and digest[1])

    error = download(f"weights of {architecture}", path.parent, fetch)
    if error:
        raise InputError(f"weights cannot be downloaded ({error}): fetch {url} and put it into {path.parent}")
    return path


def weights_url(torchvision, name: str, architecture: str | None) -> str:
    """Return the address of torchvision's weights of that name."""
    if architecture is None:
        raise InputError(
            f"weights: {name!r} must be a file: by name there are those of torchvision's own networks only"
        )
    known = torchvision.models.get_model_weights(architecture).__members__
    if name not in known:
        raise InputError(f"weights: {architecture} has no {name!r}{did_you_mean(name, known)}; nor is it a file")
    return known[name].value.url


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return a file's state dict; nothing in it is run.

    Raises:
        InputError: it holds something else.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"weights {file} cannot be read: {one_line(error)[:120]}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # a checkpoint's
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise InputError(f"weights {file}: expected names and tensors (a state dict)")
    return content
