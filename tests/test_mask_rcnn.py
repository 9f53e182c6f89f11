"""Mask R-CNN: it agrees with torchvision's, learns masks, survives any picture, and its masks reach metrics, pictures, files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import test_detectors
import torch
from faster_coco_eval import COCO
from faster_coco_eval.core import mask as run_lengths
from PIL import Image
from pytorch_lightning import Trainer
from test_detectors import ADAM
from test_faster_rcnn import EVERYTHING, LAYERS, UNCHANGED, WIDTHS, pyramid, same_detections, shake
from torch import nn
from torchvision.models.detection import MaskRCNN as TheirMaskRCNN
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss, paste_masks_in_image
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from callbacks.detections import COLORS, draw_boxes
from datamodules.scenes import CLASSES
from datamodules.shapes import Shapes
from datamodules.voc import VOC
from lit_models.backbones import Backbone, SmallFeatures
from lit_models.faster_rcnn import FasterRCNN
from lit_models.fpn import FeaturePyramid
from lit_models.mask_rcnn import MaskHead, MaskRCNN, from_torchvision, mask_loss, paste
from runner.errors import InputError
from runner.predict_boxes import BoxFiles, tell_boxes
from train import main

SMALL = {"hidden": 64, "regions": 32, "before_nms": (100, 50), "after_nms": (50, 50), "optimizer": ADAM}

CASES = [n for n in dir(test_detectors.TestEdgeCases) if n.startswith("test_") and n != "test_no_proposals"]


def small(**arguments) -> MaskRCNN:
    sizes = {"anchor_sizes": ((16,), (32,), (64,)), "canonical_size": 56, "aligned": True}
    masks = {"mask_size": 7, "mask_widths": (16, 16)}
    return MaskRCNN(4, pyramid("none", 32, (16, 32, 64, 64)), **sizes | masks | SMALL | arguments)


def ellipses(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return masks (N, h, w) of ellipses that fill the boxes."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    x1, y1, x2, y2 = boxes[..., None, None].unbind(1)
    return ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1


def target(boxes: list, size: tuple[int, int], labels: list | None = None) -> dict:
    made = plain_target(boxes, size, labels)
    return made | {"masks": ellipses(made["boxes"], size)}


def scenes(count: int = 4, size: int = 80) -> tuple[torch.Tensor, list[dict]]:
    shapes = Shapes(size=size, target="instances", train_size=count, val_size=1, test_size=1, batch_size=count)
    shapes.setup()
    images, targets = next(iter(shapes.train_dataloader()))
    return images / 127.5 - 1, targets


plain_target = test_detectors.target


@pytest.fixture(autouse=True)
def seeded(monkeypatch, tmp_path):
    torch.manual_seed(0)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setitem(test_detectors.DETECTORS, "mask_rcnn", small)
    monkeypatch.setattr(test_detectors, "target", target)


# -- from the mask of a region to that of the picture, and back -----------------------------------------------------------


def some_boxes(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Return boxes of all sizes, as detections are: inside the picture, some at its edges, some a pixel or less."""
    corners = torch.rand(count, 2, 2).sort(dim=1).values * torch.tensor([size[1], size[0]])
    boxes = corners.flatten(1)
    boxes[::7, 2:] = boxes[::7, :2] + torch.rand(len(boxes[::7]), 2)
    boxes[1::7, :2] = 0
    return torch.minimum(boxes, torch.tensor([size[1], size[0]] * 2))


class TestPaste:
    @pytest.mark.parametrize("side", [28, 14, 3])
    def test_rounded_it_is_torchvisions(self, side):
        size = (90, 120)
        boxes, masks = some_boxes(200, size), torch.rand(200, side, side)
        theirs = paste_masks_in_image(masks[:, None], boxes, size)[:, 0]
        sure = (theirs - 0.5).abs() > 1e-4
        assert sure.float().mean() > 0.999
        ours = paste(masks, boxes, size, rounded=True)
        assert ours.dtype == torch.bool
        assert ours.any(dim=(1, 2)).float().mean() > 0.9
        assert torch.equal(ours[sure], (theirs > 0.5)[sure])

    def test_a_full_mask_is_the_pixels_whose_middle_is_in_the_box(self):
        size = (60, 70)
        boxes = torch.cat([some_boxes(50, size), torch.tensor([[10.0, 20, 11, 21], [0, 0, 70, 60]])])
        y, x = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(70) + 0.5, indexing="ij")
        x1, y1, x2, y2 = boxes[..., None, None].unbind(1)
        pasted = paste(torch.full((52, 28, 28), 1 - 1e-6), boxes, size)
        inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
        from_edges = [torch.minimum((x - x1).abs(), (x - x2).abs()), torch.minimum((y - y1).abs(), (y - y2).abs())]
        in_corner = (from_edges[0] < (x2 - x1) / 28) & (from_edges[1] < (y2 - y1) / 28)  # which are round, by a place
        assert not (pasted & ~inside).any()
        assert pasted[inside & ~in_corner].all()
        assert pasted[50].nonzero().tolist() == [[20, 10]]

    def test_what_is_cut_out_and_pasted_is_what_it_was(self):
        model = small(mask_size=14)
        _, targets = scenes(8, 128)
        overlaps = []
        for t in targets:
            cut = model.cut_out(t["masks"], torch.arange(len(t["labels"])), t["boxes"])
            pasted = paste(cut, t["boxes"], t["size"])
            overlaps += ((pasted & t["masks"]).sum(dim=(1, 2)) / (pasted | t["masks"]).sum(dim=(1, 2))).tolist()
        assert len(overlaps) > 10
        assert min(overlaps) > 0.95

    def test_half_precision_changes_nothing(self):
        boxes, masks = some_boxes(30, (64, 64)), torch.rand(30, 28, 28)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pasted = paste(masks, boxes, (64, 64))
        assert torch.equal(pasted, paste(masks, boxes, (64, 64)))

    @pytest.mark.parametrize("rounded", [False, True])
    def test_none_and_boxes_without_area(self, rounded):
        assert paste(torch.rand(0, 28, 28), torch.zeros(0, 4), (5, 7), rounded).shape == (0, 5, 7)
        flat = torch.tensor([[3.0, 3, 3, 3], [2, 1, 2, 4]])
        assert paste(torch.ones(2, 28, 28), flat, (5, 7), rounded).shape == (2, 5, 7)


# -- parity with torchvision's ---------------------------------------------------------------------------------------------


def shake_masks(theirs: nn.Module) -> None:
    shake(theirs)
    nn.init.normal_(theirs.roi_heads.mask_predictor.mask_fcn_logits.weight, std=0.5)
    nn.init.normal_(theirs.roi_heads.mask_predictor.mask_fcn_logits.bias, std=0.1)


def pair() -> tuple[nn.Module, MaskRCNN]:
    """Return torchvision's detector of 4 classes and ours, with the same weights."""
    body = BackboneWithFPN(
        SmallFeatures(WIDTHS), {name: str(i) for i, name in enumerate(LAYERS)}, list(WIDTHS[1:]), 16, LastLevelMaxPool()
    )
    sizes, names = ((16,), (32,), (48,), (64,)), ["0", "1", "2"]
    theirs = TheirMaskRCNN(
        body, rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4), **UNCHANGED, num_classes=5,
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2, canonical_scale=56),
        mask_roi_pool=MultiScaleRoIAlign(names, 5, 2, canonical_scale=56),
        mask_head=MaskRCNNHeads(16, (8, 12), 1),
        rpn_pre_nms_top_n_train=60, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_train=80, rpn_post_nms_top_n_test=70,
        rpn_batch_size_per_image=EVERYTHING, box_batch_size_per_image=EVERYTHING,
    )  # fmt: skip
    theirs.roi_heads.mask_predictor = MaskRCNNPredictor(12, 12, 5)
    shake_masks(theirs)
    ours = MaskRCNN(4, pyramid(), mask_size=5, mask_widths=(8, 12), anchor_sizes=sizes, canonical_size=56,
                    before_nms=(60, 50), after_nms=(80, 70), anchors=EVERYTHING, regions=EVERYTHING)  # fmt: skip
    left = ours.load_state_dict(from_torchvision(theirs.state_dict()))
    assert not left.missing_keys
    assert not left.unexpected_keys
    return theirs, ours


def pictures() -> tuple[list[torch.Tensor], torch.Tensor, list[dict]]:
    """Return pictures of two sizes, the same padded, and their targets."""
    sizes = [(128, 96), (96, 128)]
    images = [torch.rand(3, *size) for size in sizes]
    padded = torch.zeros(2, 3, 128, 128)
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    boxes = [[5.0, 6, 30, 40], [20, 20, 90, 120], [50, 3, 61, 9]], [[60.0, 10, 125, 80]]
    return images, padded, [target(b, s) for b, s in zip(boxes, sizes, strict=True)]


def same_masks(ours: MaskRCNN, theirs: nn.Module) -> None:
    """Hold boxes, scores, labels and masks against torchvision's: probabilities, and what is pasted."""
    images, padded, targets = pictures()
    before = []  # what comes out of the heads, ahead of pasting
    theirs.roi_heads.register_forward_hook(lambda module, given, made: before.extend(dict(m) for m in made[0]))
    with torch.no_grad():
        wanted = theirs.eval()(images)
        probabilities = ours.eval().predict_step((padded, targets), 0)
        pasted = ours(padded, targets)
    same_detections(pasted, wanted)
    same_detections(probabilities, wanted)
    for b, w, p, m in zip(before, wanted, probabilities, pasted, strict=True):
        assert b["masks"].std() > 0.05
        torch.testing.assert_close(p["mask_probabilities"], b["masks"][:, 0], rtol=0, atol=1e-4)
        sure = (w["masks"][:, 0] - 0.5).abs() > 1e-3
        assert sure.float().mean() > 0.99
        assert 0.01 < m["masks"].float().mean() < 0.99
        assert torch.equal(m["masks"][sure], (w["masks"][:, 0] > 0.5)[sure])
        assert "mask_probabilities" not in m


class TestParity:
    def test_losses(self):
        """With all anchors and all regions, so that nothing is chosen at random."""
        theirs, ours = pair()
        images, padded, targets = pictures()
        given = [{"boxes": t["boxes"], "labels": t["labels"] + 1, "masks": t["masks"].byte()} for t in targets]
        wanted = theirs.train()(images, given)
        made = ours.train().losses(padded, targets)
        names = {"objectness_loss": "loss_objectness", "rpn_box_loss": "loss_rpn_box_reg", "class_loss": "loss_classifier",
                 "box_loss": "loss_box_reg", "mask_loss": "loss_mask"}  # fmt: skip
        assert set(made) == set(names)
        for name, their_name in names.items():
            assert wanted[their_name] > 1e-4
            torch.testing.assert_close(made[name], wanted[their_name], rtol=1e-4, atol=1e-6)
        sum(made.values()).backward()
        sum(wanted.values()).backward()
        for a, b in (
            (ours.mask_head.convs[1], theirs.roi_heads.mask_head[1][0]),
            (ours.mask_head.up, theirs.roi_heads.mask_predictor.conv5_mask),
            (ours.rpn.conv, theirs.rpn.head.conv[0][0]),
        ):
            torch.testing.assert_close(a.weight.grad, b.weight.grad, rtol=1e-3, atol=1e-5)

    def test_the_mask_loss_is_torchvisions(self):
        """Of regions that overlap their objects, reach beyond them, and are a pixel wide."""
        model = MaskRCNN(4, pyramid())
        objects = target([[5.0, 6, 30, 40], [20, 20, 90, 70], [50, 3, 51, 9]], (80, 96))
        boxes = torch.tensor([[4.0, 7, 28, 41], [0, 0, 96, 80], [49.5, 3, 51, 10], [20, 20, 90, 70]])
        matched = torch.tensor([0, 1, 2, 1])
        logits = torch.randn(4, 5, 28, 28)
        labels = objects["labels"] + 1
        wanted = maskrcnn_loss(logits, [boxes], [objects["masks"].byte()], [labels], [matched])
        said = logits[torch.arange(4), labels[matched]]
        cut = model.cut_out(objects["masks"], matched, boxes)
        torch.testing.assert_close(mask_loss(said, cut), wanted)

    def test_detections_and_masks(self):
        theirs, ours = pair()
        same_masks(ours, theirs)


def resnet50(**arguments) -> MaskRCNN:
    layers = ["layer1", "layer2", "layer3", "layer4"]
    return MaskRCNN(backbone=FeaturePyramid(Backbone("resnet50", layers, frozen_norm=True), extra="pool"), **arguments)


@pytest.fixture(scope="module")
def coco():
    torch.manual_seed(0)
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91, **UNCHANGED).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # as torchvision sets it for these weights
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
    with torch.no_grad():  # so that scores are neither 0 nor 1
        levels = theirs.backbone(torch.rand(1, 3, 128, 128)).values()
        for (conv,), level in zip(theirs.backbone.fpn.layer_blocks, levels, strict=False):
            conv.weight /= level.std()
    shake_masks(theirs)
    theirs.roi_heads.score_thresh = 0.005
    theirs.roi_heads.detections_per_img = 20
    return theirs


@pytest.fixture(scope="module")
def folder(coco, tmp_path_factory):
    """A DATA_DIR with the weights, under the names of torchvision's file, which are older than its code."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "weights").mkdir()

    def old(name: str) -> str:
        name = re.sub(r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", name)
        return re.sub(r"(inner_blocks\.\d|layer_blocks\.\d|head\.conv)(?:\.0)+\.", r"\1.", name)

    state = {old(n): t for n, t in coco.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert {"roi_heads.mask_head.mask_fcn4.weight", "rpn.head.conv.bias"} <= set(state)
    torch.save(state, folder / "weights" / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth")
    return folder


class TestWeights:
    def test_torchvisions_detector_is_ours(self, coco, folder, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(folder))
        ours = resnet50(num_classes=90, weights="COCO_V1", score_threshold=0.005, max_detections=20).eval()
        assert ours.pretrained["file"] == "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
        assert {norm.eps for norm in ours.backbone.backbone.norms} == {0.0}
        assert sum(p.numel() for p in coco.parameters()) - sum(p.numel() for p in ours.parameters()) == (
            4 * (1024 + 1) + 256 + 1  # the background's boxes and mask
        )
        same_masks(ours, coco)

    def test_for_other_classes_the_last_layers_begin_anew(self, coco, folder, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(folder))
        ours = resnet50(num_classes=3, weights="COCO_V1")
        assert torch.equal(ours.mask_head.convs[3].weight, coco.roi_heads.mask_head[3][0].weight)
        assert torch.equal(ours.mask_head.up.bias, coco.roi_heads.mask_predictor.conv5_mask.bias)
        assert ours.mask_head.logits.weight.shape == (3, 256, 1, 1)
        assert ours.mask_head.logits.weight.std().item() == pytest.approx(0.001, rel=0.2)

    def test_without_the_file_one_line_says_where_to_put_it(self, monkeypatch):
        def offline(*_):
            raise OSError("no network")

        monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
        words = r"fetch https://.*maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth and put it into"
        with pytest.raises(InputError, match=words):
            MaskRCNN(4, pyramid(), weights="COCO_V1")


# -- training ------------------------------------------------------------------------------------------------------------


class TestLearns:
    def test_it_memorises_a_batch(self):
        images, targets = scenes()
        model = small().train()
        optimizer = model.configure_optimizers()
        for step in range(100):
            losses = model.losses(images, targets)
            if step == 0:
                assert losses["mask_loss"].item() == pytest.approx(np.log(2), abs=0.01)  # every pixel begins at 0.5
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        assert losses["mask_loss"] < 0.3
        overlaps = []
        for found, t in zip(model.eval()(images, targets), targets, strict=True):
            assert found["masks"].shape == (len(found["labels"]), 80, 80)
            both = (found["masks"][:, None] & t["masks"]).sum(dim=(2, 3))  # (M, N)
            either = (found["masks"][:, None] | t["masks"]).sum(dim=(2, 3))
            right = (found["labels"][:, None] == t["labels"]) & (found["scores"][:, None] > 0.5)
            overlaps += (both / either * right).amax(dim=0).tolist()
        assert len(overlaps) >= 6
        assert sum(o > 0.7 for o in overlaps) >= 0.8 * len(overlaps)

    def test_only_the_mask_of_the_objects_class_learns(self):
        model = small()
        model.losses(torch.rand(1, 3, 64, 64), [target([[3, 3, 30, 30]] * 2, (64, 64), [2, 2])])["mask_loss"].backward()
        assert model.mask_head.logits.bias.grad.nonzero().tolist() == [[2]]

    def test_two_objects_with_one_box_have_masks_of_their_own(self):
        """Regions that are two objects' box are to find the first of them, and its mask."""
        model = small()
        both = target([[8, 8, 40, 40]] * 2, (64, 64), [1, 3])
        both["masks"][1] = False
        with torch.no_grad():
            model.mask_head.logits.bias.fill_(20.0)  # all pixels are the object's
        full = model.losses(torch.rand(1, 3, 64, 64), [both | {"masks": torch.ones(2, 64, 64, dtype=torch.bool)}])
        first = model.losses(torch.rand(1, 3, 64, 64), [both])
        assert full["mask_loss"] < 1e-3
        assert 1 < first["mask_loss"] < 15  # neither all of what is looked at nor nothing

    def test_losses_of_faster_rcnn_are_the_same(self):
        """Whoever has chosen the regions."""
        ours = small().train()
        plain = without_masks(ours)
        images, targets = scenes(2)
        torch.manual_seed(1)
        made = ours.losses(images, targets)
        torch.manual_seed(1)
        wanted = plain.losses(images, targets)
        assert set(made) == {*wanted, "mask_loss"}
        for name, loss in wanted.items():
            torch.testing.assert_close(made[name], loss)


def without_masks(model: MaskRCNN) -> FasterRCNN:
    plain = FasterRCNN(4, pyramid("none", 32, (16, 32, 64, 64)), anchor_sizes=((16,), (32,), (64,)), canonical_size=56,
                       aligned=True, **SMALL)  # fmt: skip
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("mask_head.")})
    return plain.train()


class TestEdgeCases:
    @pytest.mark.parametrize("case", CASES)
    def test_as_all_detectors(self, case):
        getattr(test_detectors.TestEdgeCases(), case)("mask_rcnn")

    def test_masks_are_as_large_as_each_picture(self):
        targets = [target([[2, 3, 30, 31]], size) for size in ((101, 40), (33, 77))]
        found = small(score_threshold=0.0, max_detections=9).eval()(torch.rand(2, 3, 101, 77), targets)
        assert [f["masks"].shape for f in found] == [(9, 101, 40), (9, 33, 77)]

    def test_nothing_found(self):
        model = small(score_threshold=0.999).eval()
        for found in model(torch.rand(2, 3, 64, 64), [target([], (64, 64))] * 2):
            assert found["masks"].shape == (0, 64, 64)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_without_objects_and_with_a_hundred(self, dtype):
        model = small()
        hundred = [[x, y, x + 6, y + 5] for x in range(0, 60, 6) for y in range(0, 60, 6)]
        for boxes in ([], hundred):
            model.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                losses = model.losses(torch.rand(1, 3, 64, 64), [target(boxes, (64, 64))])
            assert losses["mask_loss"].dtype == torch.float32
            assert (losses["mask_loss"] > 0) == bool(boxes)
            sum(losses.values()).backward()  # also of a loss that is 0: all processes of a run wait for all gradients
            for parameter in model.mask_head.parameters():
                assert torch.isfinite(parameter.grad).all()
                assert parameter.grad.any() == bool(boxes)

    def test_in_double_precision(self):
        images, targets = scenes(2)
        sum(small().double().losses(images.double(), targets).values()).backward()

    @pytest.mark.parametrize("arguments", [{"mask_size": 0}, {"mask_widths": ()}, {"mask_widths": (8, 0)}])
    def test_what_cannot_be_used(self, arguments):
        with pytest.raises(InputError, match=r"mask_size .* and mask_widths .* must be 1 or more"):
            small(**arguments)

    def test_the_heads_shape(self):
        assert MaskHead(8, (6, 4), 3)(torch.rand(5, 8, 7, 7)).shape == (5, 3, 14, 14)


# -- what comes of the masks -----------------------------------------------------------------------------------------------


class Known(MaskRCNN):
    """A detector that knows all boxes, and of each mask the part above a row."""

    def __init__(self, row: int):
        super().__init__(4, Backbone(SmallFeatures((16,)), ["stage1"]), hidden=4, size=1, mask_widths=(4,))
        self.row = row

    def detect(self, seen, targets):
        found = []
        for t in targets:
            masks = t["masks"].clone()
            masks[:, self.row :] = False
            found.append({n: t[n] for n in ("boxes", "labels")} | {"scores": torch.ones(len(masks)), "masks": masks})
        return found


class TestMetrics:
    def metrics_of(self, row: int) -> dict[str, float]:
        data = Shapes(size=64, target="instances", train_size=2, val_size=10, test_size=10, eval_batch_size=4)
        trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
        (test,) = trainer.test(Known(row), data, verbose=False)
        (val,) = trainer.validate(Known(row), data, verbose=False)
        return test | val

    def test_a_detector_that_knows_has_1(self):
        metrics = self.metrics_of(64)
        for name in ("map", "map_50", "map_75", "mask_map", "mask_map_50", "mask_map_75"):
            assert metrics[f"test/{name}"] == metrics[f"val/{name}"] == pytest.approx(1, abs=1e-5)
        for name in CLASSES:
            assert metrics[f"test_mask_ap/{name}"] == pytest.approx(1)

    def test_right_boxes_with_wrong_masks(self):
        metrics = self.metrics_of(20)  # of 64: the masks of most objects end too early
        assert metrics["test/map"] == metrics["val/map"] == pytest.approx(1, abs=1e-5)
        assert 0 < metrics["test/mask_map_75"] <= metrics["test/mask_map_50"] < 0.7
        assert 0 < metrics["val/mask_map"] < 0.7

    def test_difficult_objects_count_neither_way(self):
        model = small()
        there = target([[0, 0, 40, 40], [50, 0, 60, 10]], (64, 64), [1, 1]) | {"difficult": torch.tensor([True, False])}
        found = {"boxes": there["boxes"], "scores": torch.tensor([0.9, 0.8]), "labels": there["labels"]}
        model.update_map(model.test_mask_map, [found | {"masks": there["masks"]}], [there])
        assert float(model.test_mask_map.compute()["map"]) == pytest.approx(1)


def test_masks_are_drawn_in_the_colours_of_their_classes():
    from matplotlib.colors import to_rgb

    there = target([[2, 2, 30, 30], [10, 10, 60, 60]], (64, 64), [2, 0])
    figure = draw_boxes([(torch.rand(3, 64, 64), {"": there})], "", 1, list(CLASSES))
    picture, layer = (image.get_array() for image in figure.axes[0].images)
    assert picture.shape == (64, 64, 3)
    assert layer[8, 16, :3].tolist() == pytest.approx(to_rgb(COLORS[2]))
    assert layer[40, 40, :3].tolist() == pytest.approx(to_rgb(COLORS[0]))
    assert there["masks"][:, 22, 22].all()
    assert layer[22, 22, :3].tolist() == pytest.approx(to_rgb(COLORS[2]))  # the first is on top
    assert set(np.unique(layer[..., 3])) == {0, 0.5, 1}
    assert layer[8, 16, 3] == 0.5
    assert layer[2, 16, 3] == 1  # its edge
    assert np.array_equal(layer[..., 3] > 0, there["masks"].any(dim=0).numpy())
    figure = draw_boxes(
        [(torch.rand(3, 64, 64), {"": {n: there[n] for n in ("boxes", "labels")}})], "", 1, list(CLASSES)
    )
    assert len(figure.axes[0].images) == 1


def test_masks_in_predictions(tmp_path, monkeypatch):
    """At the picture's own size, in COCO's run lengths, and drawn where they are likely."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (480, 400), "white").save("wide.png")
    pictures = BoxFiles([Path("wide.png")], None, ["cat", "dog"], False)
    pictures.read, pictures.sizes = [Path("wide.png")], [(200, 240)]  # the network saw it at half its size
    left = torch.zeros(2, 28, 28)
    left[0, :, :14] = 1
    left[1] = 1
    found = {"boxes": torch.tensor([[20.0, 30, 60, 70], [150, 100, 200, 180]]), "scores": torch.tensor([0.9, 0.3]),
             "labels": torch.tensor([1, 0]), "mask_probabilities": left}  # fmt: skip
    tell_boxes(pictures, [found])
    first, second = json.loads(Path("predictions.json").read_text())["annotations"]
    assert first["segmentation"]["size"] == [400, 480]
    pixels = run_lengths.decode(first["segmentation"])
    assert pixels[70:130, 44:78].all()  # the left half of 40 to 120, corners being round
    assert not pixels[:, 81:].any()
    assert not pixels[:, :40].any()
    assert first["area"] == pixels.sum() == pytest.approx(40 * 80, rel=0.02)
    assert second["area"] == pytest.approx(100 * 160, rel=0.02)
    with Image.open(Path("predictions", "1_wide.png")) as drawn:
        drawn = np.asarray(drawn.convert("RGB")).astype(int)
    colour = np.array([int(COLORS[1][i : i + 2], 16) for i in (1, 3, 5)])
    assert np.abs(drawn[100, 60] - (colour + 255) / 2).max() <= 2  # half of it is the picture
    assert (drawn[100, 100] == 255).all()  # in its box, and not of the object
    assert (drawn[280, 350] == 255).all()  # not likely


TINY_SCENES = ("--data.size=64", "--data.train_size=12", "--data.val_size=4", "--data.test_size=5",
               "--trainer.max_epochs=1", "--model.after_nms=[50,20]")  # fmt: skip


class TestRun:
    def test_from_training_to_predictions(self, train, tmp_path, monkeypatch, capsys):
        from test_train import receipt

        run = train(*TINY_SCENES, "--model.score_threshold=0", experiment="experiments/shapes_mask_rcnn.yaml", tiny=())
        assert "detections" in {file.stem for file in (run / "pictures").iterdir()}
        metrics = receipt(run)["metrics"]
        assert {"test/map", "test/map_voc", "test/mask_map", "test/mask_map_50", "test/mask_map_75"} <= set(metrics)
        history = (run / "metrics.csv").read_text()
        assert all(name in history for name in ("train/mask_loss", "val/mask_map_50", "val/map_50"))
        Image.new("RGB", (100, 50), "red").save(tmp_path / "wide.png")
        monkeypatch.chdir(tmp_path)
        assert main([str(run / "config.yaml"), "--ckpt", str(run / "best.ckpt"), "--predict", "wide.png"]) == 0
        coco = COCO("predictions.json")
        assert coco.anns
        for annotation in coco.anns.values():
            assert coco.annToMask(annotation).shape == (50, 100)

    def test_scenes_without_masks_are_one_line(self, capsys):
        assert main(["experiments/shapes_mask_rcnn.yaml", *TINY_SCENES, "--data.target=boxes"]) == 2
        assert "MaskRCNN needs a mask of each object: --data.target instances" in capsys.readouterr().err

    def test_data_that_has_no_masks(self, small_data, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(small_data))
        trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
        with pytest.raises(InputError, match="MaskRCNN needs a mask of each object, and VOC has none"):
            trainer.validate(small(), VOC("BCCD", ["Platelets", "RBC", "WBC"], num_workers=0))
