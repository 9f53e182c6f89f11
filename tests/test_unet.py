"""U-Net: the same outputs as the notes' network with the same weights; pictures of any size; it learns."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unet_speed import NotesUNet, copy_weights, pairs
from lit_models.segmenter import IGNORE
from lit_models.unet import UNet
from runner.errors import InputError


def pair(n_out: int = 2, features=(4, 8, 16), **arguments) -> tuple[UNet, NotesUNet]:
    """Return our network and the notes' with the same weights, and statistics that are not 0 and 1."""
    torch.manual_seed(0)
    notes = NotesUNet(3, n_out, features)
    notes(torch.randn(4, 3, 64, 64) + 0.3)
    ours = UNet(n_out, features=features, **arguments)
    copy_weights(ours, notes)
    return ours, notes


class TestAsTheNotes:
    def test_parameters(self):
        count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
        with torch.device("meta"):
            assert count(UNet()) == count(NotesUNet()) == 31_037_633
            assert count(UNet(5, channels=1)) == count(NotesUNet(1, 5))

    @pytest.mark.parametrize("fit", ["pad", "resize"])
    @pytest.mark.parametrize("training", [True, False])
    def test_outputs_and_gradients_where_sides_halve_to_whole_numbers(self, fit, training):
        ours, notes = pair(fit=fit)
        images = torch.randn(2, 3, 48, 64)
        a, b = ours.train(training)(images), notes.train(training)(images)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        a.square().mean().backward()
        b.square().mean().backward()
        for mine, theirs in pairs(ours, notes):
            for p, wanted in zip(mine.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p.grad, wanted.grad, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("size", [(161, 241), (33, 47), (18, 35)])
    def test_resize_is_what_the_notes_do_with_other_sizes(self, size):
        ours, notes = pair(fit="resize")
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(ours.eval()(images), notes.eval()(images), rtol=1e-4, atol=1e-5)
        padded = pair(fit="pad")[0].eval()(images)
        assert padded.shape == ours(images).shape
        assert (padded - ours(images)).abs().max() > 1e-3


class TestSizes:
    @pytest.mark.parametrize("fit", ["pad", "resize"])
    @pytest.mark.parametrize("size", [(161, 241), (17, 23), (32, 32), (5, 200), (1, 1), (16, 16)])
    def test_any_size_and_a_batch_of_one_in_training(self, fit, size):
        torch.manual_seed(0)
        model = UNet(3, features=(4, 6, 8, 10), fit=fit).train()
        images = torch.randn(1, 3, *size)
        logits = model(images)
        assert logits.shape == (1, 3, *size)
        model.loss(logits, torch.zeros(1, *size, dtype=torch.int64)).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert model.eval()(images).shape == (1, 3, *size)

    def test_padding_repeats_the_edges_and_is_cut_off_again(self):
        model = pair()[0].eval()
        images = torch.randn(2, 3, 21, 30)
        padded = F.pad(images, (0, 2, 0, 3), mode="replicate")  # three levels: multiples of 8
        torch.testing.assert_close(model(images), model(padded)[:, :, :21, :30])

    def test_what_is_far_away_changes_nothing(self):
        """As it does with `resize`: a row dropped on a level moves all of the picture."""
        whole = torch.randn(1, 3, 88, 88)
        moved = {}
        for fit in ("pad", "resize"):
            model = pair(features=(4, 8), fit=fit)[0].eval()
            a, b = (model(images)[:, :, :32, :32] for images in (whole, whole[:, :, :83, :83]))
            moved[fit] = ((a - b).abs().max() / a.std()).item()
        assert moved["pad"] < 1e-4 < 0.001 < moved["resize"]

    def test_one_channel_and_one_level(self):
        assert UNet(2, channels=1, features=(4,)).eval()(torch.randn(2, 1, 9, 7)).shape == (2, 2, 9, 7)

    def test_levels_need_not_double(self):
        assert UNet(2, features=(4, 6, 5)).eval()(torch.randn(2, 3, 9, 7)).shape == (2, 2, 9, 7)

    @pytest.mark.parametrize("arguments", [{"features": ()}, {"features": (8, 0)}, {"channels": 0}])
    def test_what_cannot_be_used(self, arguments):
        with pytest.raises(InputError, match="maps of one level at least"):
            UNet(2, **arguments)


class TestLearns:
    @pytest.mark.parametrize(("classes", "loss"), [(1, "bce_dice"), (3, "ce"), (3, "dice")])
    def test_it_memorises_a_batch(self, classes, loss):
        torch.manual_seed(0)
        y, x = torch.meshgrid(torch.arange(25), torch.arange(31), indexing="ij")
        masks = torch.stack(
            [((y - 9) ** 2 + (x - 5 * i) ** 2 < 30).long() * (1 + i % max(classes - 1, 1)) for i in range(3)]
        )
        masks[:, :2] = IGNORE
        images = torch.randn(3, 3, 25, 31) + masks.masked_fill(masks == IGNORE, 0)[:, None]
        model = UNet(classes, features=(8, 16), loss=loss, optimizer=functools.partial(torch.optim.Adam, lr=1e-2))
        model.to(memory_format=torch.channels_last).train()
        optimizer, first = model.configure_optimizers(), None
        for _ in range(60):
            value = model.loss(model(images), masks)
            first = first or value.item()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        assert value.item() < 0.2 * first
        right = (model.classes_of(model(images)) == masks)[masks != IGNORE]
        assert right.float().mean() > 0.97

    def test_channels_last_changes_nothing(self):
        model = pair()[0].eval()
        images = torch.randn(2, 3, 40, 24)
        before = model(images)
        torch.testing.assert_close(model.to(memory_format=torch.channels_last)(images), before, rtol=1e-4, atol=1e-5)

    def test_in_the_beginning_every_class_is_as_probable(self):
        torch.manual_seed(0)
        model, masks = UNet(4, features=(16, 32)), torch.randint(0, 4, (2, 32, 32))
        assert model.loss(model(torch.randn(2, 3, 32, 32)), masks).item() == pytest.approx(math.log(4), abs=0.5)
        assert isinstance(model.last, nn.Conv2d)
