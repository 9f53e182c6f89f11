"""RetinaNet and FCOS: the same losses and detections as torchvision's with the same weights; they learn; edge cases."""

import functools
import math
import re

import pytest
import test_detectors
import torch
import torchvision
from torch import nn
from torchvision.models.detection import _utils as theirs_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from lit_models.backbones import Backbone, SmallFeatures
from lit_models.boxes import NEGATIVE, NEUTRAL
from lit_models.fcos import FCOS, centerness_of, from_sides, giou_loss, to_sides
from lit_models.fpn import FeaturePyramid
from lit_models.pretrained import from_checkpoint
from lit_models.retinanet import RetinaNet, Tower, best, focal_loss
from runner.errors import InputError

WIDTHS = (16, 32, 48, 64)
LAYERS = ("stage2", "stage3", "stage4")  # strides 4, 8, 16


def pyramid(channels: int = 64, extra: str = "p6p7", frozen_norm: bool = False) -> FeaturePyramid:
    return FeaturePyramid(Backbone(SmallFeatures(WIDTHS), list(LAYERS), frozen_norm=frozen_norm), channels, extra)


ADAM = functools.partial(torch.optim.Adam, lr=2e-3)
DETECTORS = {
    "retinanet": lambda **a: RetinaNet(4, pyramid(32, "none"), depth=1, optimizer=ADAM, **a),
    "fcos": lambda **a: FCOS(4, pyramid(32, "none"), depth=1, groups=8, optimizer=ADAM, **a),
}


@pytest.fixture(autouse=True)
def beside_the_others(monkeypatch, tmp_path):
    """What is asked of every detector finds these by name."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    for name, make in DETECTORS.items():
        monkeypatch.setitem(test_detectors.DETECTORS, name, make)


@pytest.mark.parametrize("name", DETECTORS)
class TestAsEveryDetector:
    def test_it_memorises_a_batch(self, name):
        test_detectors.TestLearns().test_it_memorises_a_batch(name)

    @pytest.mark.parametrize(
        "case",
        [case for case in vars(test_detectors.TestEdgeCases) if case.startswith("test_") and "proposals" not in case],
    )
    def test_edge_cases(self, name, case):
        getattr(test_detectors.TestEdgeCases(), case)(name)


# -- torchvision's -----------------------------------------------------------------------------------------------------


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make scores and boxes differ; torchvision's class 0, which nothing is trained to be, says nothing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return std * torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):  # so small that the epsilon beside it matters
                tensor.copy_(1e-4 * (1 + torch.rand(tensor.shape, generator=generator)))
                weight = model.state_dict()[name.replace("running_var", "weight")]
                weight.copy_(tensor.sqrt() * (0.2 if "bn3" in name else 1.0))  # what blocks add does not pile up
            elif tensor.ndim == 4:
                reach = math.sqrt(3 * 1.5 / tensor[0].numel())  # 1.5 lies between what ReLU needs and what it does not
                tensor.uniform_(-reach, reach, generator=generator)
            elif tensor.ndim == 1:
                tensor.copy_(normal(tensor, 0.1) + name.endswith("weight"))
        head = model.head.classification_head.cls_logits
        classes = len(head.bias) // model.anchor_generator.num_anchors_per_location()[0]
        bias = normal(head.bias, 0.3) - 2.5
        bias[::classes] = -200.0
        head.bias.copy_(bias)
        box = model.head.regression_head.bbox_reg
        box.weight.mul_(0.3)
        box.bias.copy_(normal(box.bias, 0.1) + (1.5 if isinstance(model, torchvision.models.detection.FCOS) else 0))
    return model


def same_transform(size: int) -> dict:
    return {"min_size": size, "max_size": size, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def theirs_of(name: str, size: int = 96, classes: int = 5) -> nn.Module:
    """Return torchvision's detector on a small network."""
    fpn = BackboneWithFPN(
        SmallFeatures(WIDTHS),
        {layer: str(i) for i, layer in enumerate(LAYERS)},
        list(WIDTHS[1:]),
        64,
        LastLevelP6P7(64, 64),
    )
    strides = (4, 8, 16, 32, 64)
    if name == "retinanet":
        sizes = tuple(tuple(int(4 * s * 2 ** (i / 3)) for i in range(3)) for s in strides)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        cls = torchvision.models.detection.RetinaNet
    else:
        anchors = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * 5)
        cls = torchvision.models.detection.FCOS
    return randomise(cls(fpn, classes, anchor_generator=anchors, detections_per_img=1000, **same_transform(size)))


def ours_of(name: str, weights: str | None, classes: int = 4, **arguments) -> RetinaNet | FCOS:
    return {"retinanet": RetinaNet, "fcos": FCOS}[name](classes, pyramid(), weights=weights, **arguments)


def saved(model: nn.Module, path) -> str:
    path.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)
    return str(path)


def old_names(state: dict) -> dict:
    """As torchvision's files have them, which were saved before blocks had numbers and without counts of batches."""
    state = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    state = {re.sub(r"(inner_blocks|layer_blocks)\.(\d+)\.0\.", r"\1.\2.", k): v for k, v in state.items()}
    return {
        re.sub(r"_head\.conv\.(\d+)\.0\.", lambda m: f"_head.conv.{2 * int(m[1])}.", k): v for k, v in state.items()
    }


def assert_same(found: list[dict], expected: list[dict], least: int) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        has_area = (theirs["boxes"][:, 2:] - theirs["boxes"][:, :2]).amin(dim=1) > 0.01
        theirs = {name: value[has_area][: len(ours["boxes"])] for name, value in theirs.items()}  # ours leave these out
        assert len(ours["scores"]) == len(theirs["scores"]) >= least
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-2)
        assert ours["labels"].tolist() == (theirs["labels"] - 1).tolist()
        assert len(set(ours["labels"].tolist())) > 1


def drawn_targets(size: int, count: int, seed: int) -> dict:
    """Objects of all sizes at uneven places."""
    generator = torch.Generator().manual_seed(seed)
    centres = size * (0.2 + 0.6 * torch.rand(count, 2, generator=generator))
    sides = size * torch.linspace(0.1, 0.7, count)[:, None] * (0.7 + 0.6 * torch.rand(count, 2, generator=generator))
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1).clamp(0.1, size - 0.1)
    return {"boxes": boxes, "labels": torch.arange(count) % 4, "size": (size, size)}


def made_of_torchvisions_defaults(name: str) -> AnchorGenerator:
    if name == "retinanet":
        return _default_anchorgen()
    return AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)


@pytest.mark.parametrize("name", DETECTORS)
class TestAsTorchvisions:
    def test_detections(self, name, tmp_path):
        theirs = theirs_of(name).eval()
        ours = ours_of(name, saved(theirs, tmp_path / "weights" / "theirs.pth"), max_detections=300).eval()
        images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = theirs(list(images))
            found = ours(images, [{"size": (96, 96)}] * 3)
        assert_same(found, expected, least=30)
        assert found[0]["scores"].max() - found[0]["scores"].min() > 0.1

    def test_losses(self, name, tmp_path):
        theirs = theirs_of(name).train()
        ours = ours_of(name, saved(theirs, tmp_path / "weights" / "theirs.pth")).train()
        images = torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(1))
        targets = [drawn_targets(96, count, seed) for seed, count in enumerate((5, 1, 0, 8))]
        expected = theirs(list(images), [t | {"labels": t["labels"] + 1} for t in targets])
        found = ours.losses(images, targets)
        names = {"classification": "class_loss", "bbox_regression": "box_loss", "bbox_ctrness": "centerness_loss"}
        assert set(found) == {names[name] for name in expected}
        for key, value in expected.items():
            assert value > 0
            torch.testing.assert_close(found[names[key]], value, rtol=1e-4, atol=1e-5)
        sum(found.values()).backward()
        sum(expected.values()).backward()
        for tower, head in ((ours.class_head.tower, "classification"), (ours.box_head.tower, "regression")):
            conv = next(m for m in getattr(theirs.head, f"{head}_head").conv.modules() if isinstance(m, nn.Conv2d))
            torch.testing.assert_close(tower[0].weight.grad, conv.weight.grad, rtol=1e-3, atol=1e-4)

    def test_weights_of_coco_by_name(self, name, tmp_path):
        """The whole of torchvision's network, written where its weights would be downloaded to, with their old names."""
        architecture = f"{name}_resnet50_fpn"
        with torch.device("meta"):  # its first weights take seconds to draw
            theirs = torchvision.models.get_model(
                architecture, weights=None, weights_backbone=None, **same_transform(64)
            )
        theirs = theirs.to_empty(device="cpu")
        theirs.detections_per_img = 1000
        theirs.anchor_generator = made_of_torchvisions_defaults(name)
        randomise(theirs).eval()
        if name == "retinanet":  # as torchvision does when it loads these
            for module in theirs.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 0.0
        url = torchvision.models.get_model_weights(architecture).COCO_V1.url
        (tmp_path / "weights").mkdir()
        torch.save(old_names(theirs.state_dict()), tmp_path / "weights" / url.rpartition("/")[2])

        network = Backbone("resnet50", ["layer2", "layer3", "layer4"], frozen_norm=True)
        cls = {"retinanet": RetinaNet, "fcos": FCOS}[name]
        ours = cls(90, FeaturePyramid(network, 256, "p6p7"), weights="COCO_V1").eval()
        assert ours.pretrained["file"] == url.rpartition("/")[2]
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert_same(ours(images, [{"size": (64, 64)}]), theirs(list(images)), least=30)

    def test_another_number_of_classes_begins_anew(self, name, tmp_path):
        weights = saved(theirs_of(name), tmp_path / "weights" / "theirs.pth")
        same, other = ours_of(name, weights), ours_of(name, weights, classes=5)  # 5: as many as torchvision counts
        torch.testing.assert_close(other.box_head.state_dict(), same.box_head.state_dict())
        torch.testing.assert_close(other.class_head.tower.state_dict(), same.class_head.tower.state_dict())
        torch.testing.assert_close(
            other.class_head.logits.bias, torch.full_like(other.class_head.logits.bias, -4.59512)
        )

    def test_our_own_checkpoint_is_taken_as_it_is(self, name, tmp_path):
        first = ours_of(name, None)
        weights = saved(first, tmp_path / "weights" / "ours.pth")
        torch.testing.assert_close(ours_of(name, weights).state_dict(), first.state_dict())

    def test_weights_of_another_pyramid_do_not_fit(self, name, tmp_path):
        weights = saved(theirs_of(name), tmp_path / "weights" / "theirs.pth")
        with pytest.raises(InputError, match=r"theirs\.pth do not fit"):
            type(ours_of(name, None))(4, pyramid(extra="none"), weights=weights)

    def test_without_the_file_one_line_says_where_to_put_it(self, name, tmp_path, monkeypatch):
        def offline(*_):
            raise OSError("no network")

        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
        with pytest.raises(InputError, match=rf"fetch https\S*{name}_resnet50_fpn_coco\S*\.pth and put it into"):
            ours_of(name, "COCO_V1")


def test_norms_have_the_epsilon_of_cocos_weights_in_a_checkpoint_that_brings_the_weights_too():
    with from_checkpoint():
        models = [
            RetinaNet(90, pyramid(64, "p6p7", frozen_norm=True), weights=weights)
            for weights in ("COCO_V1", ["weights/retinanet_resnet50_fpn_coco-eeacb38b.pth", "COCO_V1"], None)
        ]
    assert [{norm.eps for norm in model.backbone.backbone.norms} for model in models] == [{0.0}, {0.0}, {1e-5}]


class TestFocalLoss:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.75, 5.0)])
    def test_is_torchvisions(self, dtype, alpha, gamma):
        generator = torch.Generator().manual_seed(0)
        logits = (4 * torch.randn(500, 7, generator=generator)).to(dtype)
        targets = (torch.rand(500, 7, generator=generator) < 0.3).to(dtype)
        ours = logits.clone().requires_grad_()
        theirs = logits.float().requires_grad_()
        loss = focal_loss(ours, targets, alpha, gamma)
        expected = sigmoid_focal_loss(theirs, targets.float(), alpha, gamma)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        loss.sum().backward()
        expected.sum().backward()
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=tolerance, atol=1e-6)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
    def test_is_finite_where_the_answer_is_certain_or_as_wrong_as_can_be(self, gamma):
        logits = torch.tensor([-6e4, -120.0, -20.0, 0.0, 20.0, 120.0, 6e4]).half().repeat(2).requires_grad_()
        targets = torch.tensor([0.0] * 7 + [1.0] * 7)
        loss = focal_loss(logits, targets, gamma=gamma)
        loss.mean().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(logits.grad).all()
        assert (loss >= 0).all()
        assert loss[6] > 1e4  # wrong
        assert loss[13] == 0  # right

    def test_easy_ones_count_a_hundredth(self):
        logit = torch.tensor([math.log(9)])  # p_t = 0.9
        share = focal_loss(logit, torch.ones(1)) / focal_loss(logit, torch.ones(1), gamma=0)
        torch.testing.assert_close(share, torch.tensor([0.01]))


class TestGIoU:
    def test_is_torchvisions(self):
        generator = torch.Generator().manual_seed(0)
        a, b = (50 * torch.rand(2, 200, 2, 2, generator=generator).sort(dim=2).values).flatten(2)
        a[0], a[1], a[2] = b[0], b[1] + 60, torch.tensor([7.0, 7, 7, 7])  # the same, far off, without area
        ours, theirs = a.clone().requires_grad_(), a.clone().requires_grad_()
        loss, expected = giou_loss(ours, b), generalized_box_iou_loss(theirs, b)
        torch.testing.assert_close(loss, expected)
        loss.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        assert abs(loss[0]) < 1e-6
        assert 1 < loss[1] < 2

    def test_two_boxes_without_area_at_the_same_place_have_a_gradient_that_is_finite(self):
        a = torch.full((1, 4), 3.0, requires_grad=True)
        giou_loss(a, torch.full((1, 4), 3.0)).sum().backward()
        assert torch.isfinite(a.grad).all()

    def test_half_precision_does_not_overflow(self):
        a = torch.tensor([[0.0, 0, 1000, 1000]]).half()
        torch.testing.assert_close(giou_loss(a, a), torch.zeros(1), atol=1e-6, rtol=0)


class TestRetinaNet:
    def test_matching_is_torchvisions(self):
        model = ours_of("retinanet", None)
        matcher = theirs_utils.Matcher(0.5, 0.4, allow_low_quality_matches=True)
        anchors = torch.cat(model.anchors(model.backbone(torch.zeros(1, 3, 96, 96)), (96, 96)))
        target = drawn_targets(96, 12, 0)
        expected = matcher(torchvision.ops.box_iou(target["boxes"], anchors))
        matched = model.match(anchors, target)
        assert torch.equal(matched, expected)
        assert set(range(12)) | {NEGATIVE, NEUTRAL} >= set(matched.tolist()) >= {NEGATIVE, NEUTRAL}

    def test_neutral_anchors_teach_nothing(self, monkeypatch):
        """Logits of neutral anchors have no gradient, and all others have one."""
        torch.manual_seed(0)
        model = DETECTORS["retinanet"]()
        images, target = torch.rand(1, 3, 64, 64), test_detectors.target([[7, 5, 39, 45], [30, 30, 50, 44]], (64, 64))
        levels = model.look(images)
        leaves = [logit.detach().requires_grad_() for logit in levels.logits]
        monkeypatch.setattr(model, "look", lambda _: levels._replace(logits=leaves))
        model.losses(images, [target])["class_loss"].backward()
        touched = torch.cat([leaf.grad[0] for leaf in leaves]).abs().sum(dim=1) > 0
        matched = model.match(torch.cat(levels.anchors), target)
        assert (matched == NEUTRAL).any()
        assert torch.equal(touched, matched != NEUTRAL)

    def test_a_new_network_says_one_in_a_hundred_of_everything(self):
        torch.manual_seed(0)
        model = DETECTORS["retinanet"]().eval()
        scores = torch.cat([logits.sigmoid().flatten() for logits in model.look(torch.rand(2, 3, 64, 64)).logits])
        assert abs(scores.mean() - 0.01) < 0.003

    def test_heads_are_shared_over_levels(self):
        model = DETECTORS["retinanet"]().eval()
        maps = torch.rand(1, 32, 8, 8)
        first, second = model.class_head([maps, maps])
        assert torch.equal(first, second)
        assert first.shape == (1, 8 * 8 * 9, 4)

    @pytest.mark.parametrize("depth", [0, 1, 3])
    def test_width_and_depth_of_the_towers(self, depth):
        model = RetinaNet(4, pyramid(32, "none"), width=24, depth=depth)
        assert [m.out_channels for m in model.class_head.tower if isinstance(m, nn.Conv2d)] == [24] * depth
        assert model.eval()(torch.rand(1, 3, 64, 64), [{"size": (64, 64)}])

    def test_towers_keep_the_size_of_what_passes_through(self):
        torch.manual_seed(0)
        maps = torch.randn(1, 64, 32, 32).relu()
        assert 0.3 < Tower(64, 64, 4)(maps).std() / maps.std() < 3

    def test_best(self):
        scores = torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.7, 0.3]])
        values, rows, columns = best(scores, 0.2, 3)
        torch.testing.assert_close(values, torch.tensor([0.9, 0.7, 0.5]))
        assert (rows.tolist(), columns.tolist()) == ([0, 2, 1], [1, 0, 0])
        assert [len(x) for x in best(scores, 0.95, 3)] == [0, 0, 0]
        assert len(best(scores, 0.2, 10)[0]) == 4  # above, not at

    def test_what_it_explains(self):
        images, targets = test_detectors.scenes(3, size=96)
        model = DETECTORS["retinanet"]().eval()
        ((name, title, drawn),) = model.explain(images, targets)
        assert name == "anchors"
        assert title.startswith(f"of {9 * (24**2 + 12**2 + 6**2):,} anchors")
        for each, target in zip(drawn, targets, strict=True):
            if len(target["boxes"]):
                overlaps = torchvision.ops.box_iou(each["positive"], target["boxes"]).amax(dim=0)
                assert (overlaps > 0.3).all()  # every object has one
                assert each["neutral"].shape[1] == 4

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"negative_iou": 0.6}, "negative_iou 0.6 must not be above positive_iou 0.5"),
            ({"anchor_scale": 0.0}, "anchors: each level needs sizes, and ratios, above 0"),
            ({"ratios": ()}, "anchors: each level needs sizes, and ratios, above 0"),
            ({"ratios": (-1.0,)}, "anchors: each level needs sizes, and ratios, above 0"),
        ],
    )
    def test_what_cannot_be_used(self, arguments, words):
        with pytest.raises(InputError, match=words):
            RetinaNet(4, pyramid(32, "none"), **arguments)


class TestFCOS:
    def model(self, **arguments) -> FCOS:
        return DETECTORS["fcos"](**arguments).eval()  # strides 4, 8, 16

    def cells(self, model: FCOS, size: int = 128) -> list[torch.Tensor]:
        return model.cells([torch.zeros(1, 1, size // s, size // s) for s in (4, 8, 16)], (size, size))

    def test_places_are_the_corners_of_their_pixels_and_cells_have_them_in_their_middle(self):
        for stride, cells in zip((4, 8, 16), self.cells(self.model()), strict=True):
            middles = (cells[:, :2] + cells[:, 2:]) / 2
            assert middles[1].tolist() == [stride, 0]
            assert middles[128 // stride].tolist() == [0, stride]
            assert ((cells[:, 2:] - cells[:, :2]) == stride).all()

    @pytest.mark.parametrize(("side", "level"), [(20, 0), (70, 1), (200, 2)])
    def test_an_object_is_found_in_the_level_of_its_size_and_near_its_centre(self, side, level):
        model = self.model()
        cells = self.cells(model, 256)
        x1, x2 = 127.7 - side / 2, 127.7 + side / 2
        matched = model.match(cells, test_detectors.target([[x1, x1, x2, x2]], (256, 256)))
        by_level = matched.split([len(c) for c in cells])
        assert [bool((m >= 0).any()) for m in by_level] == [i == level for i in range(3)]
        stride, found = (4, 8, 16)[level], cells[level][by_level[level] >= 0]
        distance = ((found[:, :2] + found[:, 2:]) / 2 - 127.7).abs()
        assert len(found) == 9
        assert distance.max() < 1.5 * stride

    @pytest.mark.parametrize(("reach", "counts"), [(4.0, [9, 0]), (2.0, [0, 9])])
    def test_with_half_the_reach_an_object_is_found_a_level_higher(self, reach, counts):
        model = self.model(reach=reach)
        cells = self.cells(model)
        matched = model.match(cells, test_detectors.target([[43.7, 43.7, 83.7, 83.7]], (128, 128)))
        assert [(m >= 0).sum() for m in matched.split([len(c) for c in cells])[:2]] == counts

    def test_the_smallest_of_several_objects_is_found(self):
        model = self.model()
        boxes = [[40, 40, 70, 71], [44, 44, 66, 66.01], [44, 44, 66, 66], [45, 43, 67, 66]]
        matched = model.match(self.cells(model), test_detectors.target(boxes, (128, 128)))
        assert set(matched.tolist()) == {NEGATIVE, 2}

    def test_a_place_exactly_between_two_levels_ranges_is_of_the_coarser(self):
        model = self.model()
        cells = self.cells(model)
        matched = model.match(cells, test_detectors.target([[32, 32, 96, 96]], (128, 128)))  # 64 is 32 from each side
        place = [(c[:, :2] + c[:, 2:] == 128).all(dim=1).nonzero().item() for c in cells]
        assert [m[p].item() for m, p in zip(matched.split([len(c) for c in cells]), place, strict=True)] == [-1, 0, -1]

    def test_no_place_outside_of_an_object_is_positive(self):
        model = self.model()
        cells = self.cells(model)
        box = torch.tensor([[60.2, 10.3, 63.9, 120.1]])  # narrow: no place of the coarse levels
        matched = model.match(cells, {"boxes": box, "labels": torch.tensor([0])})
        assert (matched == NEGATIVE).all()

    def test_distances_there_and_back(self):
        model = self.model()
        cells = self.cells(model)[1]
        boxes = torch.tensor([[3.0, 4, 90, 100]]).expand(len(cells), -1)
        middles = (cells[:, :2] + cells[:, 2:]) / 2
        coder = theirs_utils.BoxLinearCoder(normalize_by_size=True)
        torch.testing.assert_close(to_sides(middles, boxes) / 8, coder.encode(cells, boxes))
        torch.testing.assert_close(from_sides(to_sides(middles, boxes) / 8, cells), boxes)

    def test_centerness(self):
        distances = torch.tensor([[5.0, 7, 5, 7], [1, 7, 4, 7], [1, 2, 4, 8], [1e-4, 7, 9, 7]])
        expected = torch.tensor([1, math.sqrt(1 / 4), 1 / 4, math.sqrt(1e-4 / 9)])
        torch.testing.assert_close(centerness_of(distances), expected)

    def test_score_is_the_root_of_class_times_centerness(self, monkeypatch):
        model = self.model(score_threshold=0.3)
        levels = model.look(torch.zeros(1, 3, 64, 64))
        logits = [torch.full_like(x, -20.0) for x in levels.logits]
        centerness = [torch.full_like(x, -20.0) for x in levels.centerness]
        logits[1][0, 8 * 4 + 4, 2], centerness[1][0, 8 * 4 + 4] = math.log(4), math.log(1 / 4)  # 0.8, 0.2
        levels = levels._replace(logits=logits, centerness=centerness)
        levels.distances[1][0, 8 * 4 + 4] = torch.tensor([1.0, 2, 3, 4])
        monkeypatch.setattr(model, "look", lambda _: levels)
        (found,) = model(torch.zeros(1, 3, 64, 64), [{"size": (64, 60)}])
        torch.testing.assert_close(found["scores"], torch.tensor([0.4]))
        assert found["labels"].tolist() == [2]
        assert found["boxes"].tolist() == [[32 - 8, 32 - 16, 32 + 24, 32 + 32]]

    def test_losses_are_divided_by_the_batchs_positives(self):
        torch.manual_seed(0)
        model = self.model()
        images, target = torch.rand(1, 3, 64, 64), test_detectors.target([[10, 10, 30, 30]], (64, 64))
        once = model.losses(images, [target])
        twice = model.losses(images.repeat(2, 1, 1, 1), [target, target])
        for key, value in once.items():
            torch.testing.assert_close(twice[key], value, rtol=1e-4, atol=1e-6)

    def test_what_it_explains(self):
        images, targets = test_detectors.scenes(3, size=96)
        ((name, title, drawn),) = self.model().explain(images, targets)
        assert name == "places"
        assert title.startswith(f"of {24**2 + 12**2 + 6**2} places")
        assert all(bool(len(each["positive"])) == bool(len(t["boxes"])) for each, t in zip(drawn, targets, strict=True))

    @pytest.mark.parametrize("arguments", [{"reach": 0.0}, {"radius": -1.0}])
    def test_what_must_be_above_0(self, arguments):
        with pytest.raises(InputError, match=r"reach .* and radius .* must be above 0"):
            self.model(**arguments)

    @pytest.mark.parametrize("arguments", [{"groups": 0}, {"groups": 48}, {"width": 32}])
    def test_groups_that_do_not_divide_the_width(self, arguments):
        with pytest.raises(InputError, match=r"groups \d+ must divide the heads' width"):
            FCOS(4, pyramid(64, "none"), **arguments)

    def test_one_small_picture_has_coarse_maps_of_one_place(self):
        model = FCOS(4, pyramid(64, "p6p7"), depth=1).train()
        losses = model.losses(torch.rand(1, 3, 33, 20), [test_detectors.target([[2, 3, 19, 30]], (33, 20))])
        assert all(torch.isfinite(loss) for loss in losses.values())
