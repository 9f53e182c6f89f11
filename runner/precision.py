"""What Lightning's precisions get wrong, put right: gradients that could be clipped, and sums that lose their addends."""

import functools

from pytorch_lightning.plugins.precision import HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torchmetrics import Metric

from runner.errors import InputError


def put_right(plugin: Precision) -> None:
    """Change a Trainer's precision.

    - `bf16-mixed` scales no loss, so that there is nothing for a fused optimiser to unscale. Lightning refuses to clip its
      gradients all the same.
    - `bf16-true` and `16-true` turn the sums of metrics into 16 bits with the model. In bfloat16 256 + 1 is 256: of a test
      set in many batches, the later ones would not count.
    """
    if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
        plugin.clip_gradients = functools.partial(Precision.clip_gradients, plugin)
    if isinstance(plugin, HalfPrecision):
        convert = plugin.convert_module
        plugin.convert_module = lambda module: _with_exact_sums(convert(module))


def check_clipping(plugin: Precision, clip: float | None, optimizer: object) -> None:
    """Check that an optimiser's gradients can be clipped, if they are to be.

    Raises:
        InputError: with `16-mixed`, a fused optimiser unscales them, which is too late.
    """
    is_scaled = getattr(plugin, "scaler", None) is not None
    if is_scaled and clip and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise InputError(
            "trainer: 16-mixed scales gradients, and a fused optimiser unscales them too late to clip them: "
            "--trainer.precision bf16-mixed, or --model.optimizer.fused false"
        )


def _with_exact_sums(module: nn.Module) -> nn.Module:
    for metric in module.modules():
        if isinstance(metric, Metric):
            metric._apply(_single)  # set_dtype would turn counts, which are integers, into floats as well
    return module


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
