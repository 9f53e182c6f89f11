"""What `torch.export` cannot follow as it is, changed for as long as it looks."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from lit_models.rnn import RNN


@contextlib.contextmanager
def traceable(network: nn.Module) -> Iterator[None]:
    """Within it, `torch.export` can follow a network, and what it finds holds for batches of any length.

    Recurrent networks compute step by step, since the library's packed sequences are in no graph. `len` of a tensor, which in
    Python is a number, and with it that of the batch at hand, is a length of the graph's. And so with `take_along_dim`.
    """
    fused = [module for module in network.modules() if isinstance(module, RNN)]
    ours = [module for name, module in sys.modules.items() if name.startswith("lit_models.")]
    with contextlib.ExitStack() as changed:
        for module in fused:
            changed.enter_context(patch.object(module, "fused", False))
        for module in ours:
            changed.enter_context(patch.object(module, "len", length, create=True))
        changed.enter_context(patch.object(Tensor, "take_along_dim", take_along_dim))
        yield


def length(x: Any) -> int:
    """Return `len(x)`."""
    return x.shape[0] if isinstance(x, Tensor) else len(x)


def take_along_dim(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Return `x.take_along_dim(index, dim)`, where the index is as long as x, or 1, in the other dimensions."""
    return x.gather(dim, index.expand(*x.shape[:dim], index.shape[dim], *x.shape[dim + 1 :]))
