"""FCN: torchvision's with the same weights; what each way of enlarging does; skips; pictures of any size; it learns."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import REPOSITORY
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN as TheirFCN
from torchvision.models.segmentation.fcn import FCNHead

from lit_models import fcn as fcn_file
from lit_models.backbones import Backbone, SmallFeatures
from lit_models.fcn import FCN, Bilinear, MaxUnpool, Transposed
from lit_models.segmenter import IGNORE
from runner.errors import InputError

WAYS = ("bilinear", "unpool", "transposed")
LAYERS = ["stage1", "stage2", "stage3"]  # strides 2, 4, 8


def small(classes: int = 3, widths=(8, 12, 16), **arguments) -> FCN:
    torch.manual_seed(0)
    arguments = {"optimizer": functools.partial(torch.optim.Adam, lr=1e-2), **arguments}
    return FCN(classes, Backbone(SmallFeatures(widths), LAYERS[: len(widths)]), **arguments)


def randomise(model: FCN) -> FCN:
    """Give the skips' scores a say, which they have not in the beginning."""
    for score in model.scores:
        nn.init.normal_(score.weight)
        nn.init.normal_(score.bias)
    return model


class TestAsTorchvisions:
    def test_fcn_resnet50(self):
        """The same outputs, all parameters and buffers copied; in training too, where dropout is off."""
        torch.manual_seed(0)
        network = resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
        theirs = TheirFCN(IntermediateLayerGetter(network, {"layer4": "out"}), FCNHead(2048, 21), None)
        ours = FCN(21, Backbone(resnet50(replace_stride_with_dilation=[False, True, True]), ["layer4"]),
                   skips=0, upsample="bilinear", hidden=512, dropout=0.0)  # fmt: skip
        assert ours.backbone.strides == [8]
        state = {
            k.replace("backbone.", "backbone.body.").replace("classifier.", "head."): v
            for k, v in theirs.state_dict().items()
        }
        assert set(state) == {k for k in ours.state_dict() if k.startswith(("backbone.", "head."))}
        ours.load_state_dict(state, strict=False)
        theirs.classifier[3].p = 0.0
        images = torch.randn(2, 3, 48, 64)
        with torch.no_grad():
            for training in (True, False):
                a, b = ours.train(training)(images), theirs.train(training)(images)["out"]
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
                assert b.std() > 0.01

    def test_parameters_are_torchvisions(self):
        count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
        ours = small(widths=(8, 16, 32), skips=0, hidden=8)
        theirs = TheirFCN(SmallFeatures((8, 16, 32)), FCNHead(32, 3), None)
        assert count(theirs) == count(ours) - sum(p.numel() for p in ours.to_picture.parameters())


class TestUpsampling:
    @pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
    def test_a_transposed_convolution_begins_as_bilinear_interpolation(self, factor):
        scores = torch.randn(2, 3, 6, 7)
        ours, wanted = Transposed(factor, 3)(scores), F.interpolate(scores, scale_factor=factor, mode="bilinear")
        assert ours.shape == wanted.shape == (2, 3, 6 * factor, 7 * factor)
        edge = slice(factor, -factor)  # beyond it the convolution sees zeros
        torch.testing.assert_close(ours[:, :, edge, edge], wanted[:, :, edge, edge])

    @pytest.mark.parametrize("factor", [2, 4])
    def test_max_unpooling_by_hand(self, factor):
        torch.manual_seed(0)
        up = MaxUnpool(factor, 2)
        scores, finer = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3 * factor, 4 * factor)
        sparse = torch.zeros_like(finer)
        for b in range(2):
            for k in range(2):
                for y in range(3):
                    for x in range(4):
                        window = finer[b, k, factor * y : factor * (y + 1), factor * x : factor * (x + 1)]
                        row, column = divmod(window.argmax().item(), factor)
                        sparse[b, k, factor * y + row, factor * x + column] = scores[b, k, y, x]
        torch.testing.assert_close(up(scores, finer), up.fill(sparse))

    @pytest.mark.parametrize("factor", [2, 3, 4])
    def test_after_max_unpooling_every_pixel_knows_its_score(self, factor):
        """Wherever the maxima are: the farthest place is the other corner."""
        up, finer = MaxUnpool(factor, 1), torch.zeros(1, 1, 4 * factor, 4 * factor)
        nn.init.ones_(up.fill.weight)
        nn.init.zeros_(up.fill.bias)
        finer[:, :, factor - 1 :: factor, factor - 1 :: factor] = 1
        assert (up(torch.ones(1, 1, 4, 4), finer) > 0).all()

    def test_the_last_is_fixed_and_those_between_are_learned(self):
        for way in WAYS:
            model = randomise(small(upsample=way, skips=2))
            model.loss(model(torch.randn(2, 3, 32, 32)), torch.randint(0, 3, (2, 32, 32))).backward()
            for p in model.to_picture.parameters():
                assert not p.requires_grad
                assert p.grad is None
            for p in model.ups.parameters():
                assert p.grad.abs().max() > 0
        assert isinstance(model.to_picture, Transposed)
        assert isinstance(small(upsample="unpool").to_picture, Bilinear)


class TestSkips:
    def test_the_sum_by_hand(self):
        model = randomise(small(skips=2, upsample="bilinear")).eval()
        images = torch.randn(2, 3, 32, 48)
        first, second, third = model.backbone(images)
        enlarged = functools.partial(F.interpolate, mode="bilinear")
        scores = model.scores[0](second) + enlarged(model.head(third), size=(8, 12))
        scores = model.scores[1](first) + enlarged(scores, size=(16, 24))
        torch.testing.assert_close(model(images), enlarged(scores, size=(32, 48)))

    def test_in_the_beginning_it_says_what_the_coarsest_map_says(self):
        """As in the paper, in which the skips' scores begin at zero."""
        model, images = small(skips=2).eval(), torch.randn(1, 3, 64, 64)
        scores = model.head(model.backbone(images)[-1])
        torch.testing.assert_close(model(images), model.to_picture(model.ups[1](model.ups[0](scores))))

    @pytest.mark.parametrize("skips", [0, 1, 2])
    def test_only_the_maps_asked_for_have_a_say(self, skips):
        model = randomise(small(skips=skips, upsample="bilinear"))
        assert len(model.scores) == len(model.ups) == skips
        assert model.to_picture.factor == (8, 4, 2)[skips]
        assert [score.in_channels for score in model.scores] == [12, 8][:skips]


class TestSizes:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("size", [(61, 83), (8, 8), (17, 23), (1, 1), (5, 90)])
    def test_any_size_and_a_batch_of_one_in_training(self, way, size):
        model = randomise(small(upsample=way, skips=1, hidden=8)).train()
        images = torch.randn(1, 3, *size)
        logits = model(images)
        assert logits.shape == (1, 3, *size)
        model.loss(logits, torch.zeros(1, *size, dtype=torch.int64)).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert model.eval()(images).shape == (1, 3, *size)

    def test_padding_repeats_the_edges_and_is_cut_off_again(self):
        model = randomise(small()).eval()
        images = torch.randn(2, 3, 21, 30)
        padded = F.pad(images, (0, 2, 0, 3), mode="replicate")
        torch.testing.assert_close(model(images), model(padded)[:, :, :21, :30])

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"skips": 3}, "skips: the backbone has maps of 3 layers, so 0 to 2, got 3"),
            ({"skips": -1}, "so 0 to 2, got -1"),
            ({"skips": 0, "upsample": "unpool"}, "unpool needs finer maps to tell the place: --model.skips 1"),
            ({"hidden": -1}, "hidden starts at 0"),
            ({"dropout": 1.0}, "dropout is a share, got 0 and 1.0"),
        ],
    )
    def test_what_cannot_be_used(self, arguments, words):
        with pytest.raises(InputError, match=words):
            small(**arguments)

    def test_maps_whose_sides_are_no_multiples(self):
        network = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1, stride=3))
        with pytest.raises(InputError, match=r"strides are \[2, 3\]; each must be a multiple"):
            FCN(3, Backbone(network, ["0", "2"]), skips=1)

    def test_maps_of_one_size(self):
        """As of a network that is dilated."""
        network = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(4, 4, 1))
        for way in WAYS:
            model = FCN(3, Backbone(network, ["0", "1"]), skips=1, upsample=way)
            assert model(torch.randn(1, 3, 9, 8)).shape == (1, 3, 9, 8)


class TestLearns:
    @pytest.mark.parametrize(
        ("way", "classes", "loss"), [("bilinear", 1, "bce_dice"), ("unpool", 3, "ce"), ("transposed", 3, "ce_dice")]
    )
    def test_it_memorises_a_batch(self, way, classes, loss):
        y, x = torch.meshgrid(torch.arange(36), torch.arange(40), indexing="ij")
        masks = torch.stack(
            [((y - 14) ** 2 + (x - 9 * i) ** 2 < 90).long() * (1 + i % max(classes - 1, 1)) for i in range(3)]
        )
        masks[:, :2] = IGNORE
        torch.manual_seed(1)
        images = torch.randn(3, 3, 36, 40) + masks.masked_fill(masks == IGNORE, 0)[:, None]
        model = (
            small(classes, upsample=way, loss=loss, hidden=16, dropout=0.0)
            .to(memory_format=torch.channels_last)
            .train()
        )
        optimizer, first = model.configure_optimizers(), None
        for _ in range(50):
            value = model.loss(model(images), masks)
            first = first or value.item()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        assert value.item() < 0.35 * first
        right = (model.classes_of(model(images)) == masks)[masks != IGNORE]
        assert right.float().mean() > 0.93

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, way, dtype):
        model = randomise(small(upsample=way)).train()
        with torch.autocast("cpu", dtype=dtype):
            loss = model.loss(model(torch.randn(2, 3, 30, 31)), torch.randint(0, 3, (2, 30, 31)))
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_run_another_way_of_enlarging(self, train):
        from test_segmenter import TINY_SCENES
        from test_train import receipt

        run = train(*TINY_SCENES, "--model.upsample=unpool", experiment="experiments/shapes_fcn.yaml", tiny=())
        assert receipt(run)["tested"] == 5
        hyper = torch.load(run / "best.ckpt", weights_only=True)["hyper_parameters"]
        assert hyper["upsample"] == "unpool"
        assert hyper["backbone"]["class_path"] == "lit_models.backbones.Backbone"


def test_the_docstring_tells_what_a_sliding_window_costs():
    """For the network of the experiment, as it is."""
    given = yaml.safe_load((REPOSITORY / "experiments" / "shapes_fcn.yaml").read_text())["model"]["init_args"]
    inner = given["backbone"]["init_args"]
    backbone = Backbone(SmallFeatures(inner["network"]["init_args"]["widths"]), inner["layers"])
    model = FCN(given["num_classes"], backbone, **{k: given[k] for k in ("skips", "upsample", "hidden")}).eval()
    millions = []
    for side in (64, 128):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, side, side))
        millions.append(counter.get_total_flops() / 2 / 1e6)  # of multiply-adds
    crop, once = millions
    passes = 128 * 128
    text = re.sub(r"\s+", " ", fcn_file.__doc__)
    assert f"{passes:,} passes of {crop:.1f} million multiply-adds {passes * crop / 1000:.0f} billion" in text
    assert f"1 pass {once:.1f} million, 1/{passes * crop / once:,.0f} of it" in text
