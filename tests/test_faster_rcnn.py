"""Anchors, feature pyramids and Faster R-CNN: they agree with torchvision's, learn, and survive any picture."""

import re

import pytest
import test_detectors
import torch
import torchvision
from test_detectors import ADAM, scenes, target
from torch import nn
from torchvision.models.detection import FasterRCNN as TheirFasterRCNN
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from lit_models.anchors import Anchors, places
from lit_models.backbones import Backbone, SmallFeatures
from lit_models.boxes import NEGATIVE, iou
from lit_models.faster_rcnn import FasterRCNN, Objectness, from_torchvision
from lit_models.fpn import FeaturePyramid
from runner.errors import InputError

WIDTHS = (8, 16, 24, 32)
LAYERS = ["stage2", "stage3", "stage4"]
EVERYTHING = 10**6  # of a random choice, so that there is none


def pyramid(extra: str = "pool", channels: int = 16, widths: tuple[int, ...] = WIDTHS) -> FeaturePyramid:
    return FeaturePyramid(Backbone(SmallFeatures(widths), LAYERS), channels, extra)


def one_map() -> Backbone:
    return Backbone(SmallFeatures((16, 32, 64)), ["stage3"])


SMALL = {"hidden": 64, "regions": 32, "before_nms": (100, 50), "after_nms": (50, 50), "optimizer": ADAM}
FASTER = {
    "faster_rcnn": lambda **a: FasterRCNN(4, one_map(), anchor_sizes=((16, 32, 64),), **SMALL, **a),
    "faster_rcnn_fpn": lambda **a: FasterRCNN(
        4, pyramid("none", 32, (16, 32, 64, 64)), anchor_sizes=((16,), (32,), (64,)), canonical_size=56,
        **SMALL, **a,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_seed(monkeypatch):
    torch.manual_seed(0)
    for name, make in FASTER.items():
        monkeypatch.setitem(test_detectors.DETECTORS, name, make)


class TestAnchors:
    @pytest.mark.parametrize("size", [(128, 128), (101, 77), (600, 833), (20, 16)])
    def test_they_are_torchvisions(self, size):
        sizes, ratios = ((32, 40.3, 50.8), (64, 81, 101), (23, 47, 91)), (0.5, 1.0, 2.0)
        maps = [torch.zeros(2, 1, -(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 32)]
        theirs = AnchorGenerator(sizes, (ratios,) * 3)(ImageList(torch.zeros(2, 3, *size), [size] * 2), maps)
        ours = Anchors(sizes, ratios)
        made = ours(maps, size)
        assert ours.counts == [9, 9, 9]
        assert [len(level) for level in made] == [9 * m.shape[2] * m.shape[3] for m in maps]
        assert all(level.dtype == torch.float32 for level in made)
        assert torch.equal(torch.cat(made), theirs[0])

    def test_half_precision_leaves_them_as_they_are(self):
        maps = [torch.zeros(1, 1, 3, 3)]
        made = Anchors([(512, 724)])
        assert torch.equal(made(maps, (900, 900))[0], made.to(torch.bfloat16)(maps, (900, 900))[0])

    def test_what_convolutions_say_is_in_their_order(self):
        """A network that says of each anchor where it is."""
        made = Anchors([(16, 32), (64, 128)], (0.5, 2.0))
        maps = [torch.zeros(2, 1, 5, 7), torch.zeros(2, 1, 3, 4)]
        for level, anchors in zip(maps, made(maps, (40, 56)), strict=True):
            h, w = level.shape[2:]
            said = anchors.view(h, w, 4 * 4).permute(2, 0, 1).expand(2, -1, -1, -1)  # (B, A * 4, h, w), channels of one
            assert torch.equal(places(said, 4), anchors.expand(2, -1, -1))  # anchor side by side, as Conv2d's view is

    @pytest.mark.parametrize("sizes", [[], [()], [(0,)]])
    def test_what_cannot_be_used(self, sizes):
        with pytest.raises(InputError, match="each level needs sizes"):
            Anchors(sizes)

    def test_other_levels_than_maps(self):
        with pytest.raises(InputError, match="sizes for 1 levels, and maps of 2"):
            Anchors([(8,)])([torch.zeros(1, 1, 2, 2)] * 2, (8, 8))


class TestFeaturePyramid:
    @pytest.mark.parametrize(("extra", "strides"), [("none", []), ("pool", [32]), ("p6p7", [32, 64])])
    @pytest.mark.parametrize("size", [(64, 64), (101, 77), (33, 130)])
    def test_it_is_torchvisions(self, extra, strides, size):
        blocks = {"none": None, "pool": LastLevelMaxPool(), "p6p7": LastLevelP6P7(16, 16)}[extra]
        theirs = FeaturePyramidNetwork(list(WIDTHS[1:]), 16, blocks)
        ours = pyramid(extra).eval()
        state = {name.removeprefix("backbone."): t for name, t in
                 from_torchvision({f"backbone.fpn.{name}": t for name, t in theirs.state_dict().items()}).items()}  # fmt: skip
        left = ours.load_state_dict(state, strict=False)
        assert not left.unexpected_keys
        assert all(name.startswith("backbone.") for name in left.missing_keys)
        images = torch.randn(2, 3, *size)
        wanted = theirs({str(i): level for i, level in enumerate(ours.backbone(images))})
        made = ours(images)
        assert ours.strides == [4, 8, 16, *strides]
        assert ours.channels == [16] * len(made)
        assert ours.levels == 3
        for a, b in zip(made, wanted.values(), strict=True):
            torch.testing.assert_close(a, b)

    def test_it_begins_as_torchvisions(self):
        """Uniform with the variance 1 / inputs, and no bias."""
        made = pyramid("p6p7", 64)
        for layer in (*made.lateral, *made.output, made.p6, made.p7):
            assert layer.weight.std().item() == pytest.approx(layer.weight[0].numel() ** -0.5, rel=0.1)
            assert not layer.bias.any()

    def test_a_config_makes_it(self):
        from jsonargparse import ArgumentParser

        network = {"class_path": "lit_models.backbones.SmallFeatures", "init_args": {"widths": [8, 16]}}
        inner = {"class_path": "lit_models.backbones.Backbone", "init_args": {"network": network, "layers": ["stage2"]}}
        outer = {"class_path": "lit_models.fpn.FeaturePyramid", "init_args": {"backbone": inner, "channels": 8}}
        parser = ArgumentParser()
        parser.add_class_arguments(FasterRCNN, "model")
        for given, kind in ((outer, FeaturePyramid), (inner, Backbone)):
            config = parser.parse_object({"model": {"num_classes": 4, "backbone": given}})
            assert isinstance(parser.instantiate_classes(config).model.backbone, kind)

    def test_no_channels(self):
        with pytest.raises(InputError, match="channels"):
            pyramid(channels=0)


# -- parity with torchvision's Faster R-CNN --------------------------------------------------------------------------------

PICTURES = [(128, 96), (96, 128)]  # padded to 128 x 128
UNCHANGED = {"min_size": 96, "max_size": 128, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def shake(theirs: nn.Module) -> None:
    """Give the last layers weights with which scores and boxes differ."""
    for layer, gain in (
        (theirs.rpn.head.conv[0][0], 1),
        (theirs.rpn.head.cls_logits, 2),
        (theirs.rpn.head.bbox_pred, 0.5),
        (theirs.roi_heads.box_predictor.cls_score, 16),
        (theirs.roi_heads.box_predictor.bbox_pred, 16),
    ):
        nn.init.normal_(layer.weight, std=gain / layer.weight[0].numel() ** 0.5)
        nn.init.normal_(layer.bias, std=0.1)


def pair(has_pyramid: bool, **both) -> tuple[nn.Module, FasterRCNN]:
    """Return torchvision's detector of 4 classes and ours, with the same weights."""
    network = SmallFeatures(WIDTHS)
    if has_pyramid:
        layers = {name: str(i) for i, name in enumerate(LAYERS)}
        body = BackboneWithFPN(network, layers, list(WIDTHS[1:]), 16, LastLevelMaxPool())
        sizes, names, backbone = ((16,), (32,), (48,), (64,)), ["0", "1", "2"], pyramid()
    else:
        body = nn.Sequential(network)
        body.out_channels = WIDTHS[-1]
        sizes, names, backbone = ((16, 32, 64),), ["0"], Backbone(SmallFeatures(WIDTHS), ["stage4"])
    theirs = TheirFasterRCNN(
        body, 5, rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)), **UNCHANGED,
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2, canonical_scale=56),
        rpn_pre_nms_top_n_train=60, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_train=80, rpn_post_nms_top_n_test=70,
        rpn_batch_size_per_image=EVERYTHING, box_batch_size_per_image=EVERYTHING,
    )  # fmt: skip
    shake(theirs)
    ours = FasterRCNN(4, backbone, anchor_sizes=sizes, canonical_size=56, before_nms=(60, 50), after_nms=(80, 70),
                      anchors=EVERYTHING, regions=EVERYTHING)  # fmt: skip
    state = {re.sub(r"^backbone\.0\.", "backbone.body.", name): t for name, t in theirs.state_dict().items()}
    left = ours.load_state_dict(from_torchvision(state) if has_pyramid else {
        name.replace("backbone.backbone.", "backbone."): t for name, t in from_torchvision(state).items()
    })  # fmt: skip
    assert not left.missing_keys
    assert not left.unexpected_keys
    return theirs, ours


def pictures() -> tuple[list[torch.Tensor], torch.Tensor, list[dict]]:
    images = [torch.rand(3, *size) for size in PICTURES]
    padded = torch.zeros(2, 3, 128, 128)
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    boxes = [[5.0, 6, 30, 40], [20, 20, 90, 120], [50, 3, 61, 9]], [[60.0, 10, 125, 80]]
    return images, padded, [target(b, s) for b, s in zip(boxes, PICTURES, strict=True)]


def same_detections(ours: list[dict], theirs: list[dict]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert len(b["boxes"]) >= 5
        assert b["scores"].std() > 1e-3
        torch.testing.assert_close(a["scores"], b["scores"], rtol=0, atol=1e-4)
        torch.testing.assert_close(a["boxes"], b["boxes"], rtol=0, atol=1e-2)
        assert torch.equal(a["labels"], b["labels"] - 1)


@pytest.mark.parametrize("has_pyramid", [False, True], ids=["one_map", "pyramid"])
class TestParity:
    def test_proposals(self, has_pyramid):
        theirs, ours = pair(has_pyramid)
        images, padded, targets = pictures()
        for mode, count in ((True, 60), (False, 50)):
            theirs.train(mode)
            ours.train(mode)
            seen = theirs.transform(images)[0]
            maps = theirs.backbone(seen.tensors)
            maps = maps if has_pyramid else {"0": maps}
            wanted, _ = theirs.rpn(seen, maps, [{"boxes": t["boxes"]} for t in targets])
            made = ours.look(padded, targets)[2]
            for a, b in zip(made, wanted, strict=True):
                assert count / 3 < len(b) <= 80
                torch.testing.assert_close(a["proposals"], b, rtol=0, atol=1e-3)
                assert not a["proposals"].requires_grad

    def test_losses(self, has_pyramid):
        """With all anchors and all regions, so that nothing is chosen at random."""
        theirs, ours = pair(has_pyramid)
        images, padded, targets = pictures()
        wanted = theirs.train()(images, [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets])
        made = ours.train().losses(padded, targets)
        names = {"objectness_loss": "loss_objectness", "rpn_box_loss": "loss_rpn_box_reg",
                 "class_loss": "loss_classifier", "box_loss": "loss_box_reg"}  # fmt: skip
        assert set(made) == set(names)
        for name, their_name in names.items():
            assert wanted[their_name] > 1e-4
            torch.testing.assert_close(made[name], wanted[their_name], rtol=1e-4, atol=1e-6)
        sum(made.values()).backward()
        sum(wanted.values()).backward()
        torch.testing.assert_close(
            ours.rpn.conv.weight.grad, theirs.rpn.head.conv[0][0].weight.grad, rtol=1e-3, atol=1e-5
        )

    def test_detections(self, has_pyramid):
        theirs, ours = pair(has_pyramid)
        images, padded, targets = pictures()
        with torch.no_grad():
            same_detections(ours.eval()(padded, targets), theirs.eval()(images))

    @pytest.mark.parametrize("pool", ["roi_align", "roi_pool"])
    def test_one_level_is_fast_rcnns(self, has_pyramid, pool):
        """Of a pyramid, where all regions are of its finest level."""
        ours = FasterRCNN(4, pyramid() if has_pyramid else one_map(), pool=pool, aligned=True, canonical_size=1e4)
        boxes = [t["proposals"] for t in pictures()[2]]
        maps = ours.eval().see(torch.rand(2, 3, 128, 128))
        wanted = {"roi_align": lambda: torchvision.ops.roi_align(maps[0], boxes, 7, 1 / ours.backbone.strides[0], 2, True),
                  "roi_pool": lambda: torchvision.ops.roi_pool(maps[0], boxes, 7, 1 / ours.backbone.strides[0])}[pool]()  # fmt: skip
        torch.testing.assert_close(ours.features(maps, boxes), wanted)


def test_regions_come_from_the_levels_that_torchvisions_do():
    ours = FasterRCNN(4, pyramid("p6p7")).eval()
    sides = torch.tensor([1e-3, 1, 50, 111.9, 112, 112.1, 223.9, 224, 224.1, 300, 447, 448, 500])
    boxes = [torch.stack([torch.zeros(13), torch.zeros(13), sides, sides], dim=1), torch.zeros(0, 4),
             torch.tensor([[30.0, 40, 254, 264], [100, 7, 300, 19]])]  # fmt: skip
    maps = [torch.randn(3, 16, 512 // s, 512 // s) for s in ours.backbone.strides]
    wanted = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)({str(i): m for i, m in enumerate(maps)}, boxes, [(512, 512)] * 3)
    torch.testing.assert_close(ours.features(maps, boxes), wanted)
    assert ours.features(maps, [torch.zeros(0, 4)] * 3).shape == (0, 16, 7, 7)


def resnet50(**arguments) -> FasterRCNN:
    layers = ["layer1", "layer2", "layer3", "layer4"]
    return FasterRCNN(
        backbone=FeaturePyramid(Backbone("resnet50", layers, frozen_norm=True), extra="pool"), **arguments
    )


@pytest.fixture(scope="module")
def coco():
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91, **UNCHANGED).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # as torchvision sets it for these weights
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    with torch.no_grad():  # so that scores are neither 0 nor 1
        levels = theirs.backbone(torch.rand(1, 3, 128, 128)).values()
        for (conv,), level in zip(theirs.backbone.fpn.layer_blocks, levels, strict=False):
            conv.weight /= level.std()
    shake(theirs)
    return theirs


@pytest.fixture(scope="module")
def folder(coco, tmp_path_factory):
    """A DATA_DIR with the weights, under the names of torchvision's file, which are older than its code."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "weights").mkdir()
    old = {re.sub(r"(inner_blocks\.\d|layer_blocks\.\d|head\.conv)(?:\.0)+\.", r"\1.", name): t
           for name, t in coco.state_dict().items() if not name.endswith("num_batches_tracked")}  # fmt: skip
    assert {"backbone.fpn.inner_blocks.0.weight", "rpn.head.conv.bias"} <= set(old)
    torch.save(old, folder / "weights" / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    return folder


class TestWeights:
    def test_torchvisions_detector_is_ours(self, coco, folder, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(folder))
        ours = resnet50(num_classes=90, weights="COCO_V1", score_threshold=0.005).eval()
        coco.roi_heads.score_thresh = 0.005
        assert ours.pretrained["file"] == "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
        assert {norm.eps for norm in ours.backbone.backbone.norms} == {0.0}
        images, padded, targets = pictures()
        with torch.no_grad():
            same_detections(ours(padded, targets), coco(images))

    def test_for_other_classes_the_last_layers_begin_anew(self, coco, folder, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(folder))
        ours = resnet50(num_classes=3, weights=["weights/none.pth", "COCO_V1"])
        assert torch.equal(ours.heads.fc2.weight, coco.roi_heads.box_head.fc7.weight)
        assert torch.equal(ours.backbone.output[3].bias, coco.backbone.fpn.layer_blocks[3][0].bias)
        assert ours.heads.scores.weight.shape == (4, 1024)
        assert ours.heads.scores.weight.std().item() == pytest.approx(0.01, rel=0.2)

    def test_a_checkpoint_looks_for_no_file_and_has_the_same_norms(self):
        from lit_models.pretrained import from_checkpoint

        with from_checkpoint():
            ours = resnet50(num_classes=3, weights="COCO_V1")
        assert {norm.eps for norm in ours.backbone.backbone.norms} == {0.0}
        assert ours.pretrained is None

    def test_weights_of_ours_of_another_number_of_classes(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        before = FASTER["faster_rcnn_fpn"]()
        torch.save(before.state_dict(), tmp_path / "ours.pth")
        made = FasterRCNN(7, pyramid("none", 32, (16, 32, 64, 64)), weights="ours.pth", hidden=64)
        assert torch.equal(made.rpn.conv.weight, before.rpn.conv.weight)
        assert torch.equal(made.backbone.lateral[1].weight, before.backbone.lateral[1].weight)
        assert len(made.heads.scores.weight) == 8

    def test_weights_that_do_not_fit(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        torch.save(FASTER["faster_rcnn"]().state_dict(), tmp_path / "other.pth")
        with pytest.raises(InputError, match=r"other.pth do not fit: .* is .* there and .* here"):
            FasterRCNN(4, pyramid(), weights="other.pth")

    def test_without_the_file_one_line_says_where_to_put_it(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(tmp_path))

        def offline(*_):
            raise OSError("no network")

        monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
        with pytest.raises(
            InputError, match=r"fetch https://.*fasterrcnn_resnet50_fpn_coco-258fb6c6.pth and put it into"
        ):
            FasterRCNN(4, pyramid(), weights="COCO_V1")


class TestRegionProposals:
    def said(self, model: FasterRCNN) -> Objectness:
        anchors = torch.cat(model.rpn.anchors(model.see(torch.zeros(1, 3, 128, 128)), (128, 128)))
        scores = torch.zeros(1, len(anchors), requires_grad=True)
        return Objectness(scores, torch.zeros(1, len(anchors), 4, requires_grad=True), anchors, [len(anchors)])

    def test_what_a_step_looks_at(self):
        model = FASTER["faster_rcnn_fpn"](anchors=40, positive_anchors=0.25)
        said, boxes = self.said(model), target([[10, 10, 42, 42], [50, 60, 113, 120], [1, 1, 3, 3]], (128, 128))
        overlaps = iou(said.anchors, boxes["boxes"])
        sum(model.rpn.losses(said, [boxes]).values()).backward()
        looked = said.scores.grad[0].nonzero()[:, 0]
        positive = (said.scores.grad[0] < 0).nonzero()[:, 0]
        assert len(looked) == 40
        assert 3 <= len(positive) <= 10
        best = (overlaps == overlaps.amax(dim=0)).any(dim=1)
        assert ((overlaps.amax(dim=1) >= 0.7) | best)[positive].all()
        negative = looked[~torch.isin(looked, positive)]
        assert (overlaps[negative].amax(dim=1) < 0.3).all()
        moved = said.offsets.grad[0].any(dim=1).nonzero()[:, 0]
        assert set(moved.tolist()) <= set(positive.tolist())

    def test_each_object_has_an_anchor_however_small(self):
        model = FASTER["faster_rcnn"]()
        matched = model.rpn.match(self.said(model), target([[70, 70, 72, 72], [10, 10, 100, 40]], (128, 128)))
        assert {0, 1} <= set(matched.tolist())
        assert (matched == NEGATIVE).any()

    def test_proposals_are_the_best_and_inside_the_picture(self):
        model = FASTER["faster_rcnn"]().eval()
        said = self.said(model)
        with torch.no_grad():
            said.scores[0, 100] = 5
            said.scores[0, 7] = 9
        (boxes,) = model.rpn.propose(said, [(90, 70)])
        assert len(boxes) <= 50
        wanted = said.anchors[[7, 100]].clamp(min=0)
        wanted = torch.minimum(wanted, torch.tensor([70.0, 90, 70, 90]))
        torch.testing.assert_close(boxes[:2], wanted, rtol=0, atol=1e-3)
        assert (boxes[:, 2] <= 70).all()
        assert (boxes[:, 3] <= 90).all()

    def test_a_picture_without_any_proposal(self):
        model = FASTER["faster_rcnn_fpn"]().eval()
        said = self.said(model)
        with torch.no_grad():
            said.offsets[..., 0] = 1e6  # far outside
        (boxes,) = model.rpn.propose(said, [(128, 128)])
        assert boxes.shape == (0, 4)
        maps = model.see(torch.zeros(1, 3, 128, 128))
        for train in (True, False):
            model.train(train)
            nothing = target([], (128, 128)) | {"proposals": boxes}
            assert all(torch.isfinite(loss) for loss in model.region_losses(maps, [nothing]).values())
            assert len(model.detect(maps, [nothing])[0]["boxes"]) == 0


class TestArguments:
    def test_default_anchors(self):
        def sides(model):
            boxes = [
                level[:, 2:] - level[:, :2]
                for level in model.rpn.anchors(model.see(torch.zeros(1, 3, 256, 256)), (256, 256))
            ]
            return [level.prod(dim=1).sqrt().max().item() for level in boxes]

        assert sides(FasterRCNN(4, pyramid()).eval()) == pytest.approx([32, 64, 128, 256], rel=0.03)
        assert sides(FasterRCNN(4, Backbone(SmallFeatures(WIDTHS), ["stage4"])).eval()) == pytest.approx(
            [512], rel=0.03
        )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"anchor_sizes": ((8,),)}, "the backbone has 4 levels"),
            ({"anchor_sizes": ((8,), (8,), (8,), (8, 16))}, "the same number of sizes"),
            ({"before_nms": (0, 100)}, "start at 1"),
            ({"proposal_nms_threshold": 0.0}, "must be shares"),
            ({"backbone": Backbone(SmallFeatures(WIDTHS), LAYERS)}, "a FeaturePyramid makes them alike"),
        ],
    )
    def test_what_cannot_be_used(self, arguments, words):
        with pytest.raises(InputError, match=words):
            FasterRCNN(**({"num_classes": 4, "backbone": pyramid()} | arguments))


# -- as all detectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FASTER)
class TestDetector:
    def test_it_memorises_a_batch(self, name):
        test_detectors.TestLearns().test_it_memorises_a_batch(name)

    @pytest.mark.parametrize("case", [n for n in dir(test_detectors.TestEdgeCases) if n.startswith("test_")])
    def test_edge_cases(self, name, case):
        if case != "test_no_proposals":  # it makes its own
            getattr(test_detectors.TestEdgeCases(), case)(name)

    def test_explained(self, name):
        model = FASTER[name]().eval()
        images, targets = scenes(3)
        for t in targets:
            del t["proposals"]
        explained = {name: boxes for name, _, boxes in model.explain(images, targets)}
        assert set(explained) == {"proposals", "matches", "anchors"}
        for t, proposals, anchors in zip(targets, explained["proposals"], explained["anchors"], strict=True):
            assert len(proposals["proposal"])
            assert torch.equal(anchors["object"], t["boxes"])
            assert (len(anchors["positive anchor"]) > 0) == (len(t["boxes"]) > 0)


class TestRun:
    @pytest.mark.pictures
    def test_pictures_and_receipt(self, train):
        from test_train import receipt

        run = train(*test_detectors.TINY_SCENES, "--model.after_nms=[50,20]",
                    experiment="experiments/shapes_faster_rcnn.yaml", tiny=())  # fmt: skip
        assert {file.stem for file in (run / "pictures").iterdir()} == {
            "curves", "detections", "precision_recall", "proposals", "matches", "anchors"}  # fmt: skip
        assert 0 <= receipt(run)["metrics"]["proposals/recall"] <= 1
        losses = (run / "metrics.csv").read_text()
        assert all(f"train/{name}_loss" in losses for name in ("objectness", "rpn_box", "class", "box"))
