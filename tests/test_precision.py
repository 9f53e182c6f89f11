"""Precisions other than Lightning leaves them: clipped gradients in bfloat16, and metrics whose sums lose nothing."""

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins.precision import HalfPrecision, MixedPrecision
from test_language_model import SMALL_GPT, TEXT
from test_train import receipt
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from runner.errors import InputError
from runner.precision import check_clipping, put_right
from train import main


@pytest.fixture
def own(tmp_path):
    """A file of 13,200 characters."""
    file = tmp_path / "own.txt"
    file.write_text(TEXT * 300)
    return file


def fused(parameter: nn.Parameter, is_fused: bool = True) -> torch.optim.Optimizer:
    return torch.optim.Adam([parameter], fused=is_fused)


def test_in_bfloat16_a_fused_optimisers_gradients_are_clipped():
    plugin, parameter = MixedPrecision("bf16-mixed", "cpu"), nn.Parameter(torch.zeros(4))
    put_right(plugin)
    parameter.grad = torch.full((4,), 5.0)
    plugin.clip_gradients(fused(parameter), 1.0)
    assert float(parameter.grad.norm()) == pytest.approx(1, abs=1e-5)


def test_an_experiment_that_clips_trains_in_bfloat16(train, own):
    settings = (*SMALL_GPT, f"--data.file={own}", "--trainer.max_epochs=1", "--trainer.precision=bf16-mixed")
    run = train(*settings, experiment="experiments/text_transformer.yaml", tiny=())
    assert receipt(run)["precision"] == "bf16-mixed"


@pytest.mark.parametrize(("clip", "is_fused", "refused"), [(1.0, True, True), (1.0, False, False), (None, True, False)])
def test_what_is_scaled_is_not_clipped_by_a_fused_optimiser(clip, is_fused, refused):
    plugin = MixedPrecision("16-mixed", "cpu")
    optimizer = fused(nn.Parameter(torch.zeros(1)), is_fused)
    if refused:
        with pytest.raises(InputError, match=r"bf16-mixed, or --model.optimizer.fused false"):
            check_clipping(plugin, clip, optimizer)
    else:
        check_clipping(plugin, clip, optimizer)
    check_clipping(MixedPrecision("bf16-mixed", "cpu"), clip, optimizer)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_sums_stay_in_single_precision_and_counts_are_whole_numbers(precision):
    model, plugin = LightningModule(), HalfPrecision(precision)
    model.layer, model.mean, model.counts = nn.Linear(2, 2), MeanMetric(), MulticlassConfusionMatrix(3)
    put_right(plugin)
    for _ in range(2):  # the Trainer does it again
        model = plugin.convert_module(model)
    assert model.layer.weight.dtype == plugin._desired_input_dtype
    model.mean.reset()
    for i in range(1000):
        model.mean.update(torch.tensor(float(i)))
    assert float(model.mean.compute()) == pytest.approx(499.5)
    assert model.counts.confmat.dtype == torch.int64


def test_a_loss_in_bfloat16_does_not_depend_on_the_size_of_batches(train, own, capsys):
    settings = (*SMALL_GPT, f"--data.file={own}", "--data.val_share=0.5", "--trainer.max_epochs=1")
    run = train(*settings, experiment="experiments/text_transformer.yaml", tiny=())
    capsys.readouterr()
    words = [str(run / "config.yaml"), f"--ckpt={run / 'best.ckpt'}", "--trainer.precision=bf16-true"]
    assert main([*words, "--data.eval_batch_size=1"]) == 0
    table = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("test/"))
    assert float(table["test/loss"]) == pytest.approx(receipt(run)["metrics"]["test/loss"], rel=3e-3)
