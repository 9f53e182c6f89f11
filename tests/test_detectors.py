"""Detectors: they learn, agree with their definitions, and survive pictures with nothing, with much, of any size."""

import functools

import pytest
import torch
from torch import nn

from datamodules.scenes import CLASSES
from datamodules.shapes import Shapes
from lit_models.backbones import Backbone, SmallFeatures
from lit_models.boxes import count_windows, iou
from lit_models.fast_rcnn import FastRCNN
from lit_models.localizer import Localizer, pairwise_iou
from lit_models.rcnn import RCNN, choose
from lit_models.resnet import ResNetFeatures
from lit_models.roi_pooling import roi_align as roi_align_by_hand
from lit_models.roi_pooling import roi_pool as roi_pool_by_hand
from lit_models.sliding_window import SlidingWindow, WindowClassifier
from runner.errors import InputError


def backbone(stages: int = 3) -> Backbone:
    return Backbone(SmallFeatures((16, 32, 64)[:stages]), [f"stage{stages}"])


ADAM = functools.partial(torch.optim.Adam, lr=2e-3)
DETECTORS = {
    "localizer": lambda **a: Localizer(4, backbone(), size=8, hidden=64, optimizer=ADAM, **a),
    "sliding_window": lambda **a: SlidingWindow(4, widths=(8, 16, 32), optimizer=ADAM, **a),
    "rcnn": lambda **a: RCNN(4, backbone(), size=5, hidden=64, optimizer=ADAM, **a),
    "fast_rcnn": lambda **a: FastRCNN(4, backbone(), hidden=64, optimizer=ADAM, **a),
    "fast_rcnn_pool": lambda **a: FastRCNN(4, backbone(), hidden=64, pool="roi_pool", optimizer=ADAM, **a),
}
OF_MANY = [name for name in DETECTORS if name != "localizer"]


def around(boxes: torch.Tensor, size: tuple[int, int], count: int = 40, seed: int = 0) -> torch.Tensor:
    """Return boxes near the given ones, and others, as a method of proposals would: (P, 4)."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    shaken = boxes.repeat(4, 1) + 3 * torch.randn(4 * len(boxes), 4, generator=generator)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([width, height])
    boxes = torch.cat([shaken, corners.flatten(1)]).clamp(min=0)  # x1, y1, x2, y2
    boxes = torch.minimum(boxes, torch.tensor([width, height, width, height]))
    return boxes[(boxes[:, 2:] - boxes[:, :2]).amin(dim=1) > 1]


def scenes(count: int = 4, single: bool = False, size: int = 80) -> tuple[torch.Tensor, list[dict]]:
    """Return a batch of drawn scenes, with proposals."""
    shapes = Shapes(size=size, single_object=single, train_size=count, val_size=1, test_size=1, batch_size=count)
    shapes.setup()
    images, targets = next(iter(shapes.train_dataloader()))
    for target in targets:
        target["proposals"] = around(target["boxes"], target["size"])
    return images / 127.5 - 1, targets


def target(boxes: list, size: tuple[int, int], labels: list | None = None) -> dict:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor(labels if labels is not None else [i % 4 for i in range(len(boxes))], dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "size": size, "proposals": around(boxes, size)}


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))


@pytest.mark.parametrize("name", DETECTORS)
class TestLearns:
    def test_it_memorises_a_batch(self, name):
        torch.manual_seed(0)
        images, targets = scenes(6, single=True) if name == "localizer" else scenes()
        model = DETECTORS[name]().train()
        optimizer = model.configure_optimizers()
        first = None
        for _ in range(100):
            loss = sum(model.losses(images, targets).values())
            first = first or loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.35 * first
        found = model.eval()(images, targets)
        hits = total = 0
        for f, t in zip(found, targets, strict=True):
            assert f["scores"].tolist() == sorted(f["scores"].tolist(), reverse=True)
            kept = f["scores"] > 0.5
            overlaps = iou(t["boxes"], f["boxes"][kept]) * (t["labels"][:, None] == f["labels"][kept])
            hits += int((overlaps > 0.5).any(dim=1).sum()) if kept.any() else 0
            total += len(t["labels"])
        assert total >= 6
        assert hits >= 0.8 * total


@pytest.mark.parametrize("name", OF_MANY)
class TestEdgeCases:
    def steps(self, name, images, targets):
        """Train a step, test; return what was found."""
        torch.manual_seed(0)
        model = DETECTORS[name](score_threshold=0.0).train()
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                losses = model.losses(images, targets)
            sum(losses.values()).backward()
            assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        with torch.no_grad():
            found = model.eval()(images, targets)
        for f, t in zip(found, targets, strict=True):
            height, width = t["size"]
            assert len(f["boxes"]) == len(f["scores"]) == len(f["labels"]) <= model.max_detections
            assert torch.isfinite(f["boxes"]).all()
            assert (f["boxes"] >= 0).all()
            assert (f["boxes"][:, 2:] <= torch.tensor([width, height])).all()
            assert ((f["boxes"][:, 2:] - f["boxes"][:, :2]) > 0).all()
            assert f["labels"].dtype == torch.int64
        return found

    def test_no_boxes(self, name):
        self.steps(name, torch.rand(2, 3, 64, 64), [target([], (64, 64)), target([], (64, 64))])

    def test_no_boxes_beside_some(self, name):
        self.steps(name, torch.rand(2, 3, 64, 64), [target([], (64, 64)), target([[3, 4, 40, 50]], (64, 64))])

    def test_two_hundred_boxes(self, name):
        boxes = [[x, y, x + 6, y + 5] for x in range(0, 120, 6) for y in range(0, 60, 6)]
        assert len(boxes) == 200
        self.steps(name, torch.rand(1, 3, 128, 128), [target(boxes, (128, 128))])

    def test_one_pixel_wide(self, name):
        boxes = [[10, 5, 11, 60], [0, 63, 64, 64], [63, 63, 64, 64]]
        self.steps(name, torch.rand(1, 3, 64, 64), [target(boxes, (64, 64))])

    def test_mixed_sizes(self, name):
        images = torch.zeros(3, 3, 101, 77)
        sizes = [(101, 40), (33, 77), (64, 64)]
        for image, (h, w) in zip(images, sizes, strict=True):
            image[:, :h, :w] = torch.randn(3, h, w)
        self.steps(name, images, [target([[2, 3, 30, 31]], size) for size in sizes])

    def test_no_proposals(self, name):
        targets = [target([], (64, 64)) | {"proposals": torch.zeros(0, 4)}]
        found = self.steps(name, torch.rand(1, 3, 64, 64), targets)
        assert name == "sliding_window" or len(found[0]["boxes"]) == 0

    def test_a_class_that_never_occurs(self, name):
        self.steps(name, torch.rand(1, 3, 64, 64), [target([[3, 3, 30, 30]] * 2, (64, 64), [3, 3])])


class TestLocalizer:
    def test_loss_is_that_of_the_class_and_lambda_times_that_of_the_box(self):
        torch.manual_seed(0)
        images, targets = scenes(4, single=True)
        model = DETECTORS["localizer"](box_weight=7.0).eval()
        logits, boxes = model.heads(images)
        losses = model.losses(images, targets)
        labels = torch.cat([t["labels"] for t in targets])
        wanted = torch.cat([t["boxes"] for t in targets]) / 80
        log_p = logits.log_softmax(dim=1)[range(4), labels]
        torch.testing.assert_close(losses["class_loss"], -log_p.mean())
        torch.testing.assert_close(losses["box_loss"], 7 * ((boxes - wanted) ** 2).sum() / 16)

    def test_pictures_with_another_number_of_objects_are_told(self):
        model = DETECTORS["localizer"]()
        for boxes, count in (([], 0), ([[1, 2, 30, 40]] * 2, 2)):
            with pytest.raises(InputError, match=f"one object in each picture, and there is one with {count}"):
                model.losses(torch.rand(1, 3, 64, 64), [target(boxes, (64, 64))])

    def test_pairwise_iou_is_the_diagonal_of_iou(self):
        a, b = around(torch.zeros(0, 4), (90, 90), 50), around(torch.zeros(0, 4), (90, 90), 50, seed=1)
        n = min(len(a), len(b))
        torch.testing.assert_close(pairwise_iou(a[:n], b[:n]), iou(a[:n], b[:n]).diag())


class TestSlidingWindow:
    def test_the_convolution_says_what_the_classifier_says_of_each_window_cut_out(self):
        torch.manual_seed(0)
        classifier = WindowClassifier(4)
        classifier(torch.randn(8, 3, 40, 40))  # so that batch norm has other means than 0
        classifier.eval()
        images = torch.randn(2, 3, 67, 54)
        maps = classifier(images)  # (2, 5, 9, 6)
        assert maps.shape == (2, 5, (67 - 32) // 4 + 1, (54 - 32) // 4 + 1)
        for row in range(maps.shape[2]):
            for column in range(maps.shape[3]):
                crop = images[:, :, 4 * row : 4 * row + 32, 4 * column : 4 * column + 32]
                torch.testing.assert_close(classifier(crop)[:, :, 0, 0], maps[:, :, row, column], rtol=1e-4, atol=1e-5)

    def test_scores_and_windows_lie_side_by_side(self):
        """A window at its own scale is one that can be cut out of the picture."""
        torch.manual_seed(0)
        model = SlidingWindow(4, windows=(32.0,)).eval()
        images = torch.randn(1, 3, 50, 71)
        scores, windows = model.look(images)
        assert scores.shape[1] == len(windows) == 5 * 10
        for i in (0, 7, 23, 49):
            x1, y1, x2, y2 = windows[i].int().tolist()
            assert (x2 - x1, y2 - y1) == (32, 32)
            crop = images[:, :, y1:y2, x1:x2]
            torch.testing.assert_close(model.classifier(crop)[0, :, 0, 0], scores[0, i], rtol=1e-4, atol=1e-5)

    def test_windows_have_the_sides_asked_for_and_cover_the_picture(self):
        model = DETECTORS["sliding_window"]().eval()
        _, windows = model.look(torch.zeros(1, 3, 128, 128))
        sides = (windows[:, 2:] - windows[:, :2]).unique()
        for side in model.windows:
            assert (sides - side).abs().min() < 0.03 * side
        assert len(windows) == 3247
        assert windows.min() == 0
        assert 120 < windows.max() <= 128.001

    def test_how_many_windows_there_would_be(self):
        assert count_windows(128, 128) == 68_161_536
        model = DETECTORS["sliding_window"]()
        (name, title, shown), *_ = model.explain(*scenes(2, size=128))
        assert name == "windows"
        assert title.startswith("of 68,161,536 windows")
        assert all(len(each["positive"]) >= len(each["object"]) for each in shown)

    def test_a_picture_smaller_than_the_window(self):
        model = DETECTORS["sliding_window"](score_threshold=0.0).eval()
        (found,) = model(torch.rand(1, 3, 20, 16), [target([], (20, 16))])
        assert found["boxes"][:, 2].max() <= 16


class TestRCNN:
    def test_positives_negatives_and_what_is_neither(self):
        boxes = torch.tensor([[10.0, 10, 30, 30], [40, 40, 60, 60]])
        proposals = torch.tensor([
            [10, 10, 30, 30],  # the first object
            [10, 10, 30, 24],  # IoU 0.7
            [10, 10, 30, 18],  # 0.4: neither
            [42, 40, 60, 60],  # 0.9 of the second
            [0, 0, 9, 9],  # none
            [10, 10, 30, 15],  # 0.25
        ]).float()  # fmt: skip
        model = DETECTORS["rcnn"](regions=100)
        regions = model.sample({"boxes": boxes, "labels": torch.tensor([2, 0]), "proposals": proposals})
        found = {tuple(box): (int(label), tuple(obj)) for box, label, obj in
                 zip(regions.boxes.tolist(), regions.labels, regions.objects.tolist(), strict=True)}  # fmt: skip
        assert tuple(proposals[2].tolist()) not in found
        assert found[10.0, 10.0, 30.0, 24.0] == (3, (10.0, 10.0, 30.0, 30.0))
        assert found[42.0, 40.0, 60.0, 60.0] == (1, (40.0, 40.0, 60.0, 60.0))
        assert found[0.0, 0.0, 9.0, 9.0][0] == found[10.0, 10.0, 30.0, 15.0][0] == 0
        assert (regions.labels > 0).sum() == 5  # with the objects themselves, and the proposal that is one

    def test_no_more_than_asked_for_and_a_quarter_positive(self):
        boxes = torch.tensor([[10.0, 10, 30, 30]])
        proposals = torch.cat([boxes.repeat(50, 1), torch.tensor([[50.0, 50, 60, 60]]).repeat(50, 1)])
        regions = DETECTORS["rcnn"](regions=16).sample(
            {"boxes": boxes, "labels": torch.tensor([0]), "proposals": proposals}
        )
        assert len(regions.labels) == 16
        assert (regions.labels > 0).sum() == 4

    def test_only_positives_have_a_box_loss(self):
        torch.manual_seed(0)
        model = DETECTORS["rcnn"](ridge=0.0)
        images = torch.rand(1, 3, 64, 64)
        nothing = model.losses(images, [target([], (64, 64))])
        assert nothing["box_loss"] == 0
        assert nothing["class_loss"] > 0

    def test_the_ridge_is_part_of_the_box_loss(self):
        torch.manual_seed(0)
        model = DETECTORS["rcnn"](ridge=0.5)
        loss = model.losses(torch.rand(1, 3, 64, 64), [target([], (64, 64))])["box_loss"]
        torch.testing.assert_close(loss, 0.5 * (model.heads.offsets.weight**2).sum())

    def test_each_crop_is_one_pass_of_the_network(self):
        """A region's features are those of its crop alone; crops of whole pixels are cut out by hand here."""
        torch.manual_seed(0)
        model = RCNN(4, backbone(), size=4, hidden=8).eval()  # crops of 32 x 32
        images = torch.rand(2, 3, 64, 64)
        boxes = [torch.tensor([[0.0, 0, 32, 32], [16, 8, 48, 40]]), torch.tensor([[32.0, 32, 64, 64]])]
        features = model.features(model.see(images), boxes)
        # samples lie at 1/4 and 3/4 of each pixel: their mean is the picture, blurred by (1, 6, 1) / 8
        kernel = torch.tensor([1.0, 6, 1]) / 8
        blurred = nn.functional.conv2d(
            nn.functional.pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None],
            (kernel[:, None] * kernel)[None, None],
        ).view(2, 3, 64, 64)
        crops = [blurred[0, :, :32, :32], blurred[0, :, 8:40, 16:48], blurred[1, :, 32:, 32:]]
        for feature, crop in zip(features, crops, strict=True):
            torch.testing.assert_close(feature, model.backbone(crop[None])[0][0], rtol=1e-4, atol=1e-4)

    def test_without_proposals_one_line_says_how_to_get_them(self, train, capsys):
        from train import main

        argv = ["experiments/shapes_rcnn.yaml", "--data.proposals=null", "--data.train_size=4", "--data.val_size=2"]
        assert main([*argv, "--data.test_size=2"]) == 2
        assert "RCNN needs proposals: --data.proposals" in capsys.readouterr().err

    def test_choose(self):
        mask = torch.tensor([True, False, True, True])
        assert sorted(choose(mask, 5).tolist()) == [0, 2, 3]
        assert len(choose(mask, 2)) == 2
        assert len(choose(mask, 0)) == 0


class TestFastRCNN:
    @pytest.mark.parametrize("pool", ["roi_align", "roi_pool"])
    def test_features_are_those_that_the_lectures_lines_give(self, pool):
        torch.manual_seed(0)
        model = DETECTORS["fast_rcnn"](pool=pool) if pool == "roi_align" else DETECTORS["fast_rcnn_pool"]()
        images, targets = scenes(3)
        boxes = [t["proposals"][:5] for t in targets]
        maps = model.eval().backbone(images)[-1]
        by_hand = {"roi_align": roi_align_by_hand, "roi_pool": roi_pool_by_hand}[pool](maps, boxes, 7, 1 / 8)
        torch.testing.assert_close(model.features(model.see(images), boxes), by_hand, rtol=1e-4, atol=1e-5)

    def test_the_network_sees_each_image_once(self):
        model = DETECTORS["fast_rcnn"]().eval()
        seen = []
        model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
        images, targets = scenes(3)
        model(images, targets)
        assert seen == [images.shape]

    def test_heads_and_matching_are_its_ancestors(self):
        assert FastRCNN.region_losses is RCNN.region_losses
        assert FastRCNN.sample is RCNN.sample
        assert FastRCNN.detect is RCNN.detect


class TestBackbone:
    @pytest.mark.parametrize(
        ("network", "layers", "channels", "strides"),
        [
            ("mobilenet_v2", ["features.6", "features.13"], [32, 96], [8, 16]),
            ("resnet18", ["layer2", "layer4"], [128, 512], [8, 32]),
            (lambda: ResNetFeatures(18, width=8), ["layer1", "layer3"], [8, 32], [4, 16]),
            (SmallFeatures, ["stage2", "stage4"], [32, 128], [4, 16]),
        ],
    )
    def test_layers_of_torchvisions_networks_and_ours(self, network, layers, channels, strides):
        made = Backbone(network if isinstance(network, str) else network(), layers)
        assert (made.channels, made.strides) == (channels, strides)
        maps = made(torch.rand(1, 3, 96, 64))
        assert [tuple(m.shape) for m in maps] == [
            (1, c, 96 // s, 64 // s) for c, s in zip(channels, strides, strict=True)
        ]

    def test_what_comes_after_the_last_layer_is_left_out(self):
        assert not any(name.startswith(("body.stage3", "body.stage4")) for name, _ in
                       Backbone(SmallFeatures(), ["stage2"]).named_parameters())  # fmt: skip

    def test_frozen_norms_stay_as_they_are(self):
        made = Backbone(SmallFeatures(), ["stage3"], frozen_norm=True).train()
        before = {k: v.clone() for k, v in made.state_dict().items() if "running" in k}
        made(torch.randn(4, 3, 64, 64))[0].sum().backward()
        assert before
        assert all(torch.equal(v, made.state_dict()[k]) for k, v in before.items())
        assert all(norm.weight.grad is None for norm in made.norms)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("mobilenet_v22", ["features.6"]), "torchvision has no 'mobilenet_v22'.*mobilenet_v2"),
            (("mobilenet_v2", ["features.66"]), "the network has no 'features.66'"),
            (("mobilenet_v2", []), "name at least one"),
            (("mobilenet_v2", ["classifier"]), "not all of classifier have maps"),
        ],
    )
    def test_what_cannot_be_used(self, arguments, words):
        with pytest.raises(InputError, match=words):
            Backbone(*arguments)


class Known(FastRCNN):
    """A detector that knows, or finds nothing."""

    def __init__(self, knows: bool):
        super().__init__(4, Backbone(SmallFeatures((16,)), ["stage1"]), hidden=4, size=1)
        self.knows = knows

    def detect(self, seen, targets):
        return [
            {"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"]))}
            if self.knows
            else {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
            for t in targets
        ]


class TestMetrics:
    def metrics_of(self, knows, target_of=None):
        from pytorch_lightning import Trainer

        data = Shapes(size=64, train_size=2, val_size=12, test_size=12, eval_batch_size=5)
        data.proposals = None
        data.setup()
        for dataset in (data.train_set, data.val_set, data.test_set):
            dataset.proposals = [torch.zeros(0, 4).numpy()] * len(dataset)
            if target_of is not None:  # objects of other classes are taken away
                labels = dataset.tensors[2]
                labels[labels != target_of] = -1
                labels, order = labels.sort(dim=1, descending=True)
                boxes = dataset.tensors[3].gather(1, order[..., None].expand(-1, -1, 4))
                dataset.tensors = (*dataset.tensors[:2], labels, boxes)
        data.proposals = "given"
        trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
        (test,) = trainer.test(Known(knows), data, verbose=False)
        (val,) = trainer.validate(Known(knows), data, verbose=False)
        return test | val

    def test_a_detector_that_knows_has_1(self):
        metrics = self.metrics_of(True)
        for name in ("test/map", "test/map_50", "test/map_75", "test/map_voc", "val/map", "val/map_50", "val/map_75"):
            assert metrics[name] == pytest.approx(1, abs=1e-5)
        for name in CLASSES:
            assert metrics[f"test_ap/{name}"] == metrics[f"test_ap_voc/{name}"] == pytest.approx(1)

    def test_one_that_finds_nothing_has_0(self):
        metrics = self.metrics_of(False)
        assert metrics["test/map"] == metrics["test/map_voc"] == metrics["val/map"] == 0
        assert metrics["test_ap/star"] == metrics["test_ap_voc/star"] == 0

    def test_a_class_without_objects_has_none_and_does_not_count(self):
        metrics = self.metrics_of(True, target_of=3)
        assert {name for name in metrics if name.startswith("test_ap")} == {"test_ap/star", "test_ap_voc/star"}
        assert metrics["test/map"] == pytest.approx(1)
        assert metrics["test/map_voc"] == pytest.approx(1)


TINY_SCENES = (
    "--data.size=64",
    "--data.train_size=12",
    "--data.val_size=4",
    "--data.test_size=5",
    "--trainer.max_epochs=1",
)


class TestDifficult:
    """What VOC's protocol says of them, in torchmetrics' metric."""

    @pytest.mark.parametrize(
        ("boxes", "scores", "expected"),
        [
            ([[50, 0, 60, 10]], [0.8], 1.0),  # the ordinary one alone
            ([[0, 0, 40, 41], [50, 0, 60, 10]], [0.9, 0.8], 1.0),  # what finds the difficult one is ignored
            ([[10, 10, 20, 20], [50, 0, 60, 10]], [0.9, 0.8], 0.5),  # what lies within it is wrong
            ([[0, 0, 40, 40]], [0.9], 0.0),  # to find only it is to find nothing
        ],
    )
    def test_they_count_neither_as_found_nor_as_missed(self, boxes, scores, expected):
        model = DETECTORS["fast_rcnn"]()
        there = target([[0, 0, 40, 40], [50, 0, 60, 10]], (64, 64), [1, 1])
        there["difficult"] = torch.tensor([True, False])
        found = {
            "boxes": torch.tensor(boxes).float(),
            "scores": torch.tensor(scores),
            "labels": torch.ones(len(boxes)).long(),
        }
        model.update_map(model.test_map, [found], [there])
        model.test_voc.update([found], [there])
        assert float(model.test_map.compute()["map_50"]) == pytest.approx(expected, abs=0.01)
        assert float(model.test_voc.compute()[1]) == pytest.approx(expected)


def test_two_hundred_objects_that_are_all_found_are_all_counted():
    model = DETECTORS["fast_rcnn"](max_detections=300)
    there = target([[x, y, x + 6, y + 5] for x in range(0, 120, 6) for y in range(0, 60, 6)], (128, 128), [2] * 200)
    found = {"boxes": there["boxes"], "labels": there["labels"], "scores": torch.linspace(1, 0.5, 200)}
    model.update_map(model.test_map, [found], [there])
    assert float(model.test_map.compute()["map"]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["fast_rcnn", "rcnn"])
def test_in_double_precision(name):
    images, targets = scenes(2)
    model = DETECTORS[name]().double()
    loss = sum(model.losses(images.double(), targets).values())
    loss.backward()
    assert all(p.grad.dtype == torch.float64 for p in model.parameters() if p.grad is not None)


class TestRun:
    @pytest.mark.pictures
    @pytest.mark.parametrize(
        ("name", "own"),
        [("localizer", set()), ("sliding_window", {"windows"}), ("fast_rcnn", {"proposals", "matches"})],
    )
    def test_pictures(self, name, own, train):
        from PIL import Image

        run = train(*TINY_SCENES, experiment=f"experiments/shapes_{name}.yaml", tiny=())
        files = {file.stem: file for file in (run / "pictures").iterdir()}
        assert set(files) == {"curves", "detections", "precision_recall"} | own
        for file in files.values():
            with Image.open(file) as image:
                colours = image.convert("RGB").getcolors(2**24)
            assert len(colours) > 20

    def test_receipt_and_what_is_printed(self, train, capsys):
        from test_train import receipt

        run = train(*TINY_SCENES, experiment="experiments/shapes_fast_rcnn.yaml", tiny=())
        metrics = receipt(run)["metrics"]
        assert {"test/map", "test/map_50", "test/map_75", "test/map_voc", "proposals/recall"} <= set(metrics)
        assert receipt(run)["tested"] == 5
        printed = capsys.readouterr().out
        assert "test/map_50 " in printed
        assert "weakest ap_voc " in printed

    def test_pictures_in_voc_layout(self, train, small_data, monkeypatch):
        from test_train import receipt

        monkeypatch.setenv("DATA_DIR", str(small_data))  # with weights in it
        run = train("--data.image_size=64", "--data.num_workers=0", "--trainer.max_epochs=1",
                    experiment="experiments/bccd_fast_rcnn.yaml", tiny=())  # fmt: skip
        assert receipt(run)["pretrained"]["file"] == "mobilenet_v2_features.pth"
        assert receipt(run)["tested"] == 3

    @pytest.mark.pictures
    def test_pictures_of_mixed_sizes_with_difficult_objects(self, train, small_data, tmp_path, monkeypatch):
        import shutil

        from PIL import Image
        from test_train import receipt

        shutil.copytree(small_data / "BCCD", tmp_path / "mixed")
        for number, size in ((8, (80, 60)), (9, (60, 90)), (10, (100, 100))):
            Image.new("RGB", size, (200, 10 * number, 90)).save(
                tmp_path / "mixed" / "JPEGImages" / f"cell_{number}.jpg"
            )
            file = tmp_path / "mixed" / "Annotations" / f"cell_{number}.xml"
            text = file.read_text().replace("<difficult>0", "<difficult>1", 1)
            text = text.replace("<width>80", f"<width>{size[0]}").replace("<height>60", f"<height>{size[1]}")
            text = text.replace("<xmax>72", "<xmax>58")
            file.write_text(text)
        monkeypatch.setenv("DATA_DIR", str(small_data))
        run = train(f"--data.folder={tmp_path / 'mixed'}", "--data.image_size=64", "--data.num_workers=0",
                    "--data.eval_batch_size=2", "--trainer.max_epochs=1",
                    experiment="experiments/bccd_fast_rcnn.yaml", tiny=())  # fmt: skip
        assert receipt(run)["tested"] == 3
        assert (run / "pictures" / "matches.png").stat().st_size > 1000

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["--data.proposals=lit_models.selective_search.recall"], "proposals: recall is no method with settings"),
            (["--data.target=classes"], "FastRCNN needs boxes: --data.target boxes"),
            (["--model.max_detections=0"], "max_detections starts at 1, got 0"),
            (
                ["--model.backbone.network=lit_models.backbones.SmallFeatures"],
                "ours is given as {class_path: lit_models",
            ),
        ],
    )
    def test_what_cannot_be_used_is_one_line(self, argv, words, capsys):
        from train import main

        assert main(["experiments/shapes_fast_rcnn.yaml", *argv, *TINY_SCENES]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error

    def test_weights_can_be_left_out_on_the_command_line(self, train, small_data, monkeypatch):
        from test_train import receipt

        monkeypatch.setenv("DATA_DIR", str(small_data))
        run = train("--model.backbone.weights=null", "--data.image_size=64", "--data.num_workers=0", "--trainer.max_epochs=1",
                    experiment="experiments/bccd_fast_rcnn.yaml", tiny=())  # fmt: skip
        assert receipt(run)["pretrained"] is None

    def test_a_classifier_on_scenes_is_one_line(self, capsys):
        from train import main

        argv = ["--data=datamodules.shapes.Shapes", "--model.sizes=[12288,16,4]", *TINY_SCENES]
        assert main(["experiments/mnist_mlp.yaml", *argv]) == 2
        assert "model and data do not fit" in capsys.readouterr().err

    def test_scenes_with_several_objects_are_no_mistake_of_the_code(self, capsys):
        from train import main

        assert main(["experiments/shapes_localizer.yaml", "--data.single_object=false", *TINY_SCENES]) == 2
        assert "Localizer finds one object in each picture" in capsys.readouterr().err

    def test_another_number_of_classes(self, capsys):
        from train import main

        assert main(["experiments/shapes_fast_rcnn.yaml", "--model.num_classes=5", *TINY_SCENES]) == 2
        assert "FastRCNN has 5 classes, but Shapes has 4: --model.num_classes 4" in capsys.readouterr().err
