"""The benchmark of the U-Net's step runs; what it measures is in the README."""

import re

import torch

from benchmarks import unet_speed

TINY = ["--size", "16", "24", "--batch", "2", "--features", "4", "8", "--rounds", "2"]


def test_it_prints_each_round_and_the_ratios(capsys):
    assert unet_speed.main([*TINY, "--precision", "bf16"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^  round \d: ours bf16 [\d.]+  notes bf16 [\d.]+  notes 32 [\d.]+", out, flags=re.M)) == 3
    for other in ("notes bf16", "notes 32"):
        assert re.search(rf"^ours bf16 / {other}  [\d.]+ \([\d.]+ to [\d.]+\)$", out, flags=re.M)
    assert unet_speed.main(TINY) == 0
    assert "notes bf16" not in capsys.readouterr().out


def test_both_learn_the_same():
    """Or the benchmark would compare two different things."""
    batch = torch.randn(2, 3, 16, 32), torch.randint(0, 2, (2, 16, 32))
    notes = unet_speed.NotesUNet(features=(4, 8))
    ours, theirs = (kind(notes, [4, 8], "32", batch) for kind in (unet_speed.Ours, unet_speed.Notes))
    assert ours.model is not theirs.model
    for _ in range(3):
        ours.seconds()
        theirs.seconds()
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_used(capsys):
    assert unet_speed.main([*TINY, "--rounds", "0"]) == 2
    assert "start at 1" in capsys.readouterr().err
