"""YOLO: boxes, losses and which cells learn agree with loops over all cells; anchors; the mosaic; what all detectors survive."""

import math
from types import SimpleNamespace

import pytest
import test_detectors
import torch
import torch.nn.functional as F
from test_detectors import ADAM, TINY_SCENES, scenes, target
from torchvision.ops import complete_box_iou_loss

from datamodules.mosaic import mosaic
from datamodules.shapes import Shapes
from lit_models import yolo as yolo_file
from lit_models.backbones import Backbone, SmallFeatures
from lit_models.detector import Detector
from lit_models.yolo import YOLO, best_possible_recall, complete_iou, fit_anchors, object_sizes
from runner.errors import InputError

ANCHORS = [(5.0, 4.0), (8.0, 16.0), (16.0, 9.0), (24.0, 24.0), (32.0, 20.0), (40.0, 60.0)]  # two a level
LAYERS = ["stage2", "stage3", "stage4"]  # strides 4, 8, 16


def yolo(classes: int = 4, **arguments) -> YOLO:
    return YOLO(classes, Backbone(SmallFeatures((8, 16, 32, 64)), LAYERS), width=32, optimizer=ADAM, **arguments)


def talkative(classes: int = 3, **arguments) -> YOLO:
    """Return a detector that says something else of each cell."""
    torch.manual_seed(0)
    model = yolo(classes, anchors=ANCHORS, **arguments)
    for head in model.heads:
        torch.nn.init.normal_(head.weight, std=0.2)
        torch.nn.init.normal_(head.bias)
    return model


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))


CASES = [name for name in dir(test_detectors.TestEdgeCases) if name.startswith("test_") and "proposals" not in name]


class TestAsAllDetectors:
    @pytest.fixture(autouse=True)
    def among_them(self, monkeypatch):
        monkeypatch.setitem(test_detectors.DETECTORS, "yolo", yolo)

    def test_it_memorises_a_batch(self):
        test_detectors.TestLearns().test_it_memorises_a_batch("yolo")

    @pytest.mark.parametrize("case", CASES)
    def test_edge_case(self, case):
        getattr(test_detectors.TestEdgeCases(), case)("yolo")

    def test_a_batch_of_one_small_picture(self):
        """Its coarsest maps would be one pixel, of which batch norm has no variance."""
        test_detectors.TestEdgeCases().steps("yolo", torch.rand(1, 3, 16, 9), [target([[1, 1, 8, 9]], (16, 9))])

    def test_whatever_the_network_says_the_losses_are_finite(self):
        model = talkative(4)
        for head in model.heads:
            head.weight.data *= 1e4
        losses = model.losses(torch.randn(1, 3, 64, 64), [target([[2, 3, 30, 40], [5, 5, 6, 60]], (64, 64))])
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad.isfinite().all() for p in model.parameters())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def box_of(model: YOLO, level: int, anchor: int, row: int, column: int, offsets) -> list[float]:
    """Return x1, y1, x2, y2 by the equations, one number at a time."""
    tx, ty, tw, th = (sigmoid(float(t)) for t in offsets)
    x, y = ((2 * tx - 0.5 + column) * 4 * 2**level, (2 * ty - 0.5 + row) * 4 * 2**level)
    w, h = (float(side) * (2 * t) ** 2 for side, t in zip(ANCHORS[2 * level + anchor], (tw, th), strict=True))
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


class TestDetection:
    def test_boxes_and_scores_are_those_of_the_equations(self):
        model = talkative(score_threshold=0.01, nms_threshold=1.0, max_detections=10**6, candidates=10**6).eval()
        images, sizes = torch.rand(2, 3, 37, 30), [(37, 22), (20, 30)]
        with torch.no_grad():
            found = model(images, [target([], size) for size in sizes])
            said = model.look(images)
        assert [tuple(s.shape) for s in said] == [(2, 2, 12, 8, 8), (2, 2, 6, 4, 8), (2, 2, 3, 2, 8)]
        for i, (height, width) in enumerate(sizes):
            wanted = []
            for level, s in enumerate(said):
                for anchor in range(2):
                    for row in range(s.shape[2]):
                        for column in range(s.shape[3]):
                            t = s[i, anchor, row, column].tolist()
                            x1, y1, x2, y2 = box_of(model, level, anchor, row, column, t[:4])
                            box = [max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)]
                            if box[2] - box[0] > 0.01 and box[3] - box[1] > 0.01:
                                wanted += [(sigmoid(t[4]) * sigmoid(t[5 + k]), k, box) for k in range(3)]
            wanted = sorted((w for w in wanted if w[0] > 0.01), key=lambda w: -w[0])
            assert len(wanted) == len(found[i]["scores"]) > 100
            torch.testing.assert_close(found[i]["scores"], torch.tensor([w[0] for w in wanted]), rtol=1e-4, atol=1e-6)
            # boxes with (almost) the same score may stand in another order
            ours = sorted(zip(found[i]["labels"].tolist(), found[i]["boxes"].tolist(), strict=True))
            theirs = sorted((label, box) for _, label, box in wanted)
            assert [label for label, _ in ours] == [label for label, _ in theirs]
            ours, theirs = (torch.tensor([box for _, box in boxes]) for boxes in (ours, theirs))
            difference = (ours[:, None] - theirs).abs().amax(dim=2)
            assert difference.amin(dim=1).max() < 1e-3
            assert difference.amin(dim=0).max() < 1e-3

    def test_suppression_looks_at_the_best_only(self, monkeypatch):
        seen = []
        monkeypatch.setattr(YOLO, "keep_best", lambda self, boxes, scores, labels: seen.append((boxes, scores, labels)))
        images, targets = torch.rand(1, 3, 64, 64), [target([], (64, 64))]
        for candidates in (10**6, 40):
            talkative(candidates=candidates).eval()(images, targets)
        (_, all_scores, _), (boxes, scores, labels) = seen
        assert len(all_scores) == 3 * 2 * (16 * 16 + 8 * 8 + 4 * 4)
        assert boxes.shape == (40, 4)
        assert len(labels) == 40
        torch.testing.assert_close(scores, all_scores.sort(descending=True).values[:40])

    def test_anchors_come_with_the_weights(self):
        model, other = talkative().eval(), yolo(3, anchors_per_level=2).eval()
        other.load_state_dict(model.state_dict())
        images, targets = torch.rand(1, 3, 64, 64), [target([], (64, 64))]
        torch.testing.assert_close(other(images, targets)[0]["boxes"], model(images, targets)[0]["boxes"])


class TestLosses:
    def by_loops(self, model, said, targets):
        """Return box, objectness and class loss, looking at every cell, anchor and object by itself."""
        sums = [0.0, 0.0, 0.0]
        for level, (s, balance) in enumerate(zip(said, (4.0, 1.0, 0.4), strict=True)):
            stride = 4 * 2**level
            boxes, classes, objectness = [], [], []
            for place in [(i, a, r, c) for i in range(len(targets)) for a in range(2)
                          for r in range(s.shape[2]) for c in range(s.shape[3])]:  # fmt: skip
                i, anchor, row, column = place
                t, nearest = s[place], 0.0
                found = torch.tensor([box_of(model, level, anchor, row, column, t[:4])])
                for box, label in zip(targets[i]["boxes"], targets[i]["labels"], strict=True):
                    x1, y1, x2, y2 = box.tolist()
                    dx, dy = (x1 + x2) / 2 / stride - column, (y1 + y2) / 2 / stride - row
                    here = 0 <= dx < 1 and 0 <= dy < 1
                    beside = 0 <= dy < 1 and (-0.5 <= dx < 0 or 1 <= dx < 1.5)
                    above = 0 <= dx < 1 and (-0.5 <= dy < 0 or 1 <= dy < 1.5)
                    wa, ha = ANCHORS[2 * level + anchor]
                    w, h = x2 - x1, y2 - y1
                    if (here or beside or above) and w and h and max(w / wa, wa / w, h / ha, ha / h) < 4:
                        loss = complete_box_iou_loss(found, box[None]).item()
                        boxes.append(loss)
                        nearest = max(nearest, 1 - loss)
                        classes += [-math.log(sigmoid(float(t[5 + k]) * (1 if k == label else -1))) for k in range(3)]
                p = sigmoid(float(t[4]))
                objectness.append(-nearest * math.log(p) - (1 - nearest) * math.log(1 - p))
            for i, (values, weight) in enumerate(((boxes, 1), (objectness, balance), (classes, 1))):
                sums[i] += weight * sum(values) / max(len(values), 1)
        cells = said[0].shape[2] * said[0].shape[3]
        return 0.05 * sums[0], cells / 6400 * sums[1], 0.5 * 3 / 80 * sums[2]

    @pytest.mark.parametrize("numbers", [(7, 0, 3), (0, 0, 0), (40, 1, 0)])
    def test_they_are_those_of_loops_over_all_cells(self, numbers):
        model = talkative().eval()
        images = torch.rand(3, 3, 48, 32)
        targets = []
        for n in numbers:
            corners = torch.rand(n, 2, 2).mul(torch.tensor([32, 48])).sort(dim=1).values.flatten(1)  # x1, y1, x2, y2
            targets.append(target(corners.tolist(), (48, 32), [i % 3 for i in range(n)]))
        with torch.no_grad():
            losses = model.losses(images, targets)
            wanted = self.by_loops(model, model.look(images), targets)
        assert all(w > 0 for w in wanted) or not any(numbers)
        for name, value in zip(("box_loss", "objectness_loss", "class_loss"), wanted, strict=True):
            torch.testing.assert_close(losses[name], torch.tensor(value), rtol=1e-4, atol=1e-6)

    def test_the_objectness_wanted_is_no_way_to_a_smaller_loss(self):
        """Boxes learn from their own loss, not from the objectness they are to have."""
        model = talkative()
        losses = model.losses(torch.rand(1, 3, 64, 64), [target([[2, 3, 30, 40]], (64, 64), [0])])
        grads = torch.autograd.grad(losses["objectness_loss"], [head.bias for head in model.heads])
        for grad in grads:
            per_cell = grad.view(2, 8)
            assert (per_cell[:, 4] != 0).all()
            assert (per_cell[:, :4] == 0).all()
            assert (per_cell[:, 5:] == 0).all()

    def test_weights(self):
        images, targets = torch.rand(1, 3, 64, 64), [target([[2, 3, 30, 40]], (64, 64), [0])]
        one = talkative().losses(images, targets)
        other = talkative(box_weight=0.1, objectness_weight=3.0, class_weight=2.0).losses(images, targets)
        for name, factor in (("box_loss", 2), ("objectness_loss", 3), ("class_loss", 4)):
            torch.testing.assert_close(other[name], factor * one[name])


class TestCompleteIoU:
    def test_it_is_torchvisions_and_so_is_its_gradient(self):
        torch.manual_seed(0)
        a, b = (torch.cat([c := 40 * torch.rand(200, 2), c + 1 + 40 * torch.rand(200, 2)], dim=1) for _ in range(2))
        a.requires_grad_(True)
        ours, theirs = 1 - complete_iou(a, b), complete_box_iou_loss(a, b)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(loss.sum(), a)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)

    def test_it_is_1_for_the_same_box_and_less_the_farther_two_are(self):
        box = torch.tensor([[10.0, 10, 30, 20]])
        assert complete_iou(box, box).item() == pytest.approx(1)
        assert 0 > complete_iou(box, box + 30) > complete_iou(box, box + 60) > -1

    def test_boxes_without_area(self):
        a = torch.zeros(2, 4, requires_grad=True)
        value = complete_iou(a, torch.tensor([[0.0, 0, 0, 0], [0, 0, 3, 4]]))
        value.sum().backward()
        assert value.isfinite().all()
        assert a.grad.isfinite().all()
        assert complete_iou(a[:0], a[:0]).shape == (0,)


class TestAssign:
    ANCHORS = ((2.0, 8.0), (8.0, 8.0), (8.0, 31.0), (8.0, 32.0), (33.0, 8.0), (90.0, 90.0))

    def cells(self, level: int, *boxes: list[float]) -> set:
        model = yolo(anchors=list(self.ANCHORS))
        side = 64 // (4 * 2**level)
        targets = [target([], (64, 64)), target(boxes, (64, 64))]
        matches = model.assign(level, side, side, targets)
        assert matches.boxes.shape == (len(matches.labels), 4)
        image, anchor, row, column = (index.tolist() for index in matches.where)
        assert set(image) <= {1}
        return set(zip(anchor, column, row, matches.labels.tolist(), strict=True))

    def test_the_cell_of_the_centre_and_the_two_nearest(self):
        # centre (9, 15): in cells of 4 pixels (2.25, 3.75), so left and below; side 8, as the second anchor
        assert self.cells(0, [5, 11, 13, 19]) == {(1, 2, 3, 0), (1, 1, 3, 0), (1, 2, 4, 0)}

    def test_in_the_middle_of_a_cell_right_and_below(self):
        assert self.cells(0, [6, 10, 14, 18]) == {(1, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0)}

    def test_no_neighbours_beyond_the_maps(self):
        assert self.cells(0, [0, 0, 3, 3]) == {(0, 0, 0, 0), (1, 0, 0, 0)}
        assert self.cells(0, [61, 61, 64, 64]) == {(0, 15, 15, 0), (1, 15, 15, 0)}

    def test_anchors_that_fit(self):
        """Neither side 4 times as large, or more; the ratio 4 itself is too much, in both directions."""
        fits = lambda level, width, height: {a for a, *_ in self.cells(level, [20, 10, 20 + width, 10 + height])}  # noqa: E731
        assert fits(0, 8, 8) == {1}  # the first is 4 times as narrow
        assert fits(0, 7.9, 8) == {0, 1}
        assert fits(1, 8, 8) == {0}  # 31 is less than 4 times 8, 32 is not
        assert fits(2, 8, 8) == set()  # 33 is more
        assert fits(2, 9, 8) == {0}
        assert fits(2, 23, 23) == {0, 1}

    def test_each_object_by_itself_though_they_share_a_cell(self):
        cells = self.cells(0, [5, 11, 13, 19], [6, 12, 13, 19])
        assert {label for *_, label in cells} == {0, 1}
        assert {c for c in cells if c[0] == 1 and c[3] == 0} == {(1, 2, 3, 0), (1, 1, 3, 0), (1, 2, 4, 0)}

    def test_a_box_without_area_is_left_out(self):
        assert self.cells(0, [5, 5, 5, 9]) == set()

    def test_what_is_shown(self):
        model = yolo(anchors=list(self.ANCHORS))
        box = [5.0, 11, 13, 19]
        ((name, title, shown),) = model.explain(
            torch.rand(2, 3, 64, 64), [target([], (64, 64)), target([box], (64, 64))]
        )
        assert name == "matches"
        assert "1/4 to 4" in title
        assert len(shown[0]["anchor"]) == 0
        count = sum(len(self.cells(level, box)) for level in range(3))
        assert len(shown[1]["anchor"]) == count > 3
        assert [6.0, 10.0, 14.0, 18.0] in shown[1]["anchor"].tolist()  # 8 x 8, in the middle of cell (2, 3)


class TestAnchors:
    CENTRES = torch.tensor([[10.0, 12], [12, 40], [60, 20], [70, 75], [150, 40], [160, 170]])

    def sizes(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return (self.CENTRES.repeat(50, 1) * (1 + 0.03 * torch.randn(300, 2, generator=generator)))[
            torch.randperm(300, generator=generator)
        ]

    def test_clear_clusters_are_found_sorted_by_area(self):
        anchors = fit_anchors(self.sizes(), 6)
        torch.testing.assert_close(anchors, self.CENTRES[self.CENTRES.prod(dim=1).argsort()], rtol=0.02, atol=0)

    def test_the_same_again_and_nothing_else_is_drawn_from(self):
        state = torch.random.get_rng_state()
        first = fit_anchors(self.sizes())
        assert first.shape == (9, 2)
        assert torch.equal(first, fit_anchors(self.sizes()))
        assert torch.equal(first, fit_anchors(self.sizes().flip(0)))
        assert torch.equal(state, torch.random.get_rng_state())

    def test_the_distance_is_of_shapes_not_of_pixels(self):
        sides = torch.tensor([2.0, 4, 100, 110]).repeat(20)
        anchors = fit_anchors(torch.stack([sides, sides], dim=1), 3)
        torch.testing.assert_close(anchors[:, 0], torch.tensor([2.0, 4, 105]))  # not 3, 100, 110

    @pytest.mark.parametrize("sizes", [[[7, 9]] * 30, [[7, 9]]])
    def test_fewer_sizes_than_anchors(self, sizes):
        torch.testing.assert_close(fit_anchors(torch.tensor(sizes).float(), 9), torch.tensor([[7.0, 9]]).repeat(9, 1))

    def test_best_possible_recall(self):
        sizes = torch.tensor([[8.0, 8], [31.9, 8], [8, 32], [100, 100]])
        assert best_possible_recall(sizes, torch.tensor([[8.0, 8]]), 4.0) == 0.5
        assert best_possible_recall(sizes, torch.tensor([[8.0, 8], [50, 60]]), 4.0) == 0.75

    def test_small_ones_go_to_fine_maps_in_whatever_order_they_are_given(self):
        model = yolo(anchors=ANCHORS[::-1])
        assert model.anchors.flatten(0, 1).tolist() == [list(pair) for pair in ANCHORS]
        assert model.anchors.shape == (3, 2, 2)

    def test_objects_of_drawn_scenes(self):
        data = Shapes(size=64, train_size=11, val_size=1, test_size=1, batch_size=4)
        data.setup()
        there = data.train_set.tensors[3][data.train_set.tensors[2] >= 0]
        sizes = (there[:, 2:] - there[:, :2]).tolist()
        assert sorted(object_sizes(data).tolist()) == sorted(sizes)
        assert len(sizes) > 10

    def test_objects_of_pictures_in_voc_layout_are_scaled(self, small_data, monkeypatch):
        from datamodules.voc import VOC

        monkeypatch.setenv("DATA_DIR", str(small_data))
        data = VOC("BCCD", image_size=120, num_workers=0, batch_size=2)
        data.prepare_data()
        data.setup()
        sizes = object_sizes(data)  # 18 x 20 in pictures of 80 x 60
        assert len(sizes) == 12
        torch.testing.assert_close(sizes, torch.tensor([[36.0, 40]]).expand(12, 2))

    def test_without_objects_one_line_says_so(self):
        data = Shapes(size=64, train_size=2, val_size=1, test_size=1)
        data.setup()
        data.train_set.tensors[2].fill_(-1)
        model, trainer = yolo(), SimpleNamespace(datamodule=data)
        model.trainer = trainer
        with pytest.raises(InputError, match=r"no objects that anchors could be fitted to: --model\.anchors"):
            model.on_fit_start()

    @pytest.mark.parametrize("data", [None, "without area"])
    def test_nothing_to_fit_to(self, data):
        if data:
            batches = [(None, [{"boxes": torch.tensor([[3.0, 3, 3, 9]])}])]
            data = SimpleNamespace(train_dataloader=lambda: batches)
        model, trainer = yolo(), SimpleNamespace(datamodule=data)
        model.trainer = trainer
        with pytest.raises(InputError, match="no objects that anchors could be fitted to"):
            model.on_fit_start()

    def test_given_ones_stay(self):
        model, trainer = yolo(anchors=ANCHORS), SimpleNamespace(datamodule=None)
        model.trainer = trainer
        model.on_fit_start()
        assert model.anchors.flatten(0, 1).tolist() == [list(pair) for pair in ANCHORS]


class TestRun:
    def test_checkpoints_carry_the_anchors(self, train, capsys):
        """A test needs no training data; a run that goes on keeps those that its weights were trained for."""
        run = train(*TINY_SCENES, experiment="experiments/shapes_yolo.yaml", tiny=())
        printed = capsys.readouterr().out
        assert "anchors fitted to" in printed
        assert "best possible recall 1.0000" in printed
        data = Shapes(size=64, train_size=12, val_size=4, test_size=5)
        data.setup()
        wanted = fit_anchors(object_sizes(data)).view(3, 3, 2)
        assert torch.equal(torch.load(run / "best.ckpt", weights_only=True)["state_dict"]["anchors"], wanted)
        train("--resume", str(run), "--trainer.max_epochs", "2", experiment="", tiny=())
        train("experiments/shapes_yolo.yaml", "--ckpt", str(run / "best.ckpt"), *TINY_SCENES, experiment="", tiny=())
        assert "anchors fitted" not in capsys.readouterr().out
        last = torch.load(run / "last.ckpt", weights_only=True)
        assert last["epoch"] == 1
        assert torch.equal(last["state_dict"]["anchors"], wanted)

    @pytest.mark.pictures
    def test_pictures(self, train):
        run = train(*TINY_SCENES, experiment="experiments/shapes_yolo.yaml", tiny=())
        assert {f.stem for f in (run / "pictures").iterdir()} == {"curves", "detections", "precision_recall", "matches"}


class TestMosaic:
    SIZES = ((40, 48), (30, 48), (40, 20), (13, 11), (40, 48))

    def batch(self, count: int = 5) -> tuple[torch.Tensor, list[dict]]:
        """Return images whose pixels tell image, row and column, from 1, and rubbish beyond each image; object 10 i + j."""
        images, targets = torch.full((count, 3, 40, 48), -99.0), []
        generator = torch.Generator().manual_seed(1)
        for i, (h, w) in enumerate(self.SIZES[:count]):
            rows, columns = torch.meshgrid(torch.arange(1.0, h + 1), torch.arange(1.0, w + 1), indexing="ij")
            images[i, :, :h, :w] = torch.stack([torch.full_like(rows, i + 1), rows, columns])
            n = (4, 3, 5, 1, 0)[i]
            corners = torch.rand(n, 2, 2, generator=generator) * torch.tensor([w - 3, h - 3])
            boxes = torch.cat([corners.amin(dim=1).floor(), corners.amax(dim=1).floor() + 3], dim=1)
            masks = torch.zeros(n, h, w, dtype=torch.bool)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = True
            labels = 10 * i + torch.arange(n)
            targets.append({"boxes": boxes, "labels": labels, "size": (h, w), "difficult": labels % 2 == 1,
                            "masks": masks, "proposals": torch.zeros(3, 4)})  # fmt: skip
        return images, targets

    def test_pixels_and_boxes_move_alike(self):
        images, targets = self.batch()
        objects = {int(k): box for t in targets for k, box in zip(t["labels"], t["boxes"], strict=True)}
        seen = set()
        for seed in range(10):
            made, made_targets = mosaic(images, targets, torch.Generator().manual_seed(seed))
            assert made.shape == images.shape
            for image, there in zip(made, made_targets, strict=True):
                assert there["size"] == (40, 48)
                assert "proposals" not in there
                for box, label in zip(there["boxes"], there["labels"].tolist(), strict=True):
                    x1, y1, x2, y2 = box.int().tolist()
                    assert [x1, y1, x2, y2] == box.tolist()
                    pixels = image[:, y1:y2, x1:x2]
                    assert (pixels[0] == label // 10 + 1).all()
                    left, top, right, bottom = objects[label].tolist()
                    assert pixels[1].min() == pixels[1][0, 0] >= top + 1
                    assert pixels[2].min() == pixels[2][0, 0] >= left + 1
                    assert pixels[1].max() == pixels[1][0, 0] + y2 - y1 - 1 <= bottom
                    assert pixels[2].max() == pixels[2][0, 0] + x2 - x1 - 1 <= right
                    seen.add(label)
        assert len(seen) >= 10

    def test_of_each_object_as_much_is_boxed_as_is_seen(self):
        images, targets = self.batch()
        made, made_targets = mosaic(images, targets, torch.Generator().manual_seed(0), least_share=0.0, least_side=0.01)
        for image, there in zip(made, made_targets, strict=True):
            for i, t in enumerate(targets):
                for (x1, y1, x2, y2), label in zip(t["boxes"], t["labels"], strict=True):
                    _, y, x = image
                    seen = (image[0] == i + 1) & (y > y1) & (y <= y2) & (x > x1) & (x <= x2)
                    boxes = there["boxes"][there["labels"] == label]
                    assert (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sum() == seen.sum()

    def test_what_is_left_of_an_object_is_enough(self):
        images, targets = self.batch()
        whole = {int(k): (b[2:] - b[:2]).prod() for t in targets for k, b in zip(t["labels"], t["boxes"], strict=True)}
        fewer = 0
        for seed in range(20):
            made_targets = mosaic(images, targets, torch.Generator().manual_seed(seed))[1]
            every = mosaic(images, targets, torch.Generator().manual_seed(seed), least_share=0.0, least_side=0.01)[1]
            for there, before in zip(made_targets, every, strict=True):
                sides = there["boxes"][:, 2:] - there["boxes"][:, :2]
                shares = sides.prod(dim=1) / torch.tensor([whole[int(k)] for k in there["labels"]])
                assert (sides >= 2).all()
                assert (shares >= 0.2).all()
                sides = before["boxes"][:, 2:] - before["boxes"][:, :2]
                shares = sides.prod(dim=1) / torch.tensor([whole[int(k)] for k in before["labels"]])
                assert len(there["boxes"]) == ((sides >= 2).all(dim=1) & (shares >= 0.2)).sum()
                fewer += len(before["boxes"]) - len(there["boxes"])
        assert fewer > 5

    def test_masks_and_what_is_difficult_go_along(self):
        _, made_targets = mosaic(*self.batch(), torch.Generator().manual_seed(3))
        for there in made_targets:
            assert torch.equal(there["difficult"], there["labels"] % 2 == 1)
            assert there["masks"].shape == (len(there["labels"]), 40, 48)
            for mask, box in zip(there["masks"], there["boxes"].int().tolist(), strict=True):
                x1, y1, x2, y2 = box
                assert mask[y1:y2, x1:x2].all()
                assert mask.sum() == (x2 - x1) * (y2 - y1)

    def test_only_the_real_part_of_an_image_is_seen_and_its_own_always(self):
        images, targets = self.batch()
        made = torch.cat([mosaic(images, targets, torch.Generator().manual_seed(seed))[0] for seed in range(10)])
        assert made.min() == 0  # beside a tile's image
        for i, image in enumerate(made):
            assert (image[0] == i % 5 + 1).any()
        kinds = [len(image[0].unique()) for image in made]
        assert max(kinds) >= 4

    def test_images_without_objects_and_a_batch_of_one(self):
        made, (there,) = mosaic(torch.rand(1, 3, 20, 30), [target([], (20, 30))])
        assert there["boxes"].shape == (0, 4)
        assert there["labels"].dtype == torch.int64
        assert (made != 0).all()  # it fills all four tiles

    def test_what_came_is_left_as_it_was(self):
        images, targets = self.batch()
        before = images.clone(), [t["boxes"].clone() for t in targets]
        mosaic(images, targets)
        assert torch.equal(images, before[0])
        assert all(torch.equal(t["boxes"], boxes) for t, boxes in zip(targets, before[1], strict=True))

    def test_torchs_seed_tells_what_is_drawn(self):
        made = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            made.append(mosaic(*self.batch())[0])
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])

    @pytest.mark.parametrize(
        ("share", "off", "epochs", "on"),
        [
            (1.0, 0.2, 10, [True] * 8 + [False] * 2),
            (1.0, 0.0, 3, [True] * 3),
            (1.0, 1.0, 3, [False] * 3),
            (0.0, 0.0, 3, [False] * 3),
            (1.0, 0.2, -1, [True] * 3),
        ],
    )
    def test_off_in_the_last_epochs(self, share, off, epochs, on, monkeypatch):
        monkeypatch.setattr(yolo_file, "mosaic", lambda images, targets: ("a mosaic", targets))
        monkeypatch.setattr(Detector, "training_step", lambda self, batch, batch_idx: batch[0])
        model = yolo(mosaic=share, mosaic_off=off)
        for epoch, wanted in enumerate(on):
            trainer = SimpleNamespace(max_epochs=epochs, current_epoch=epoch)
            model.trainer = trainer
            assert (model.training_step(("images", []), 0) == "a mosaic") == wanted

    def test_as_often_as_asked_for(self, monkeypatch):
        monkeypatch.setattr(yolo_file, "mosaic", lambda images, targets: ("a mosaic", targets))
        monkeypatch.setattr(Detector, "training_step", lambda self, batch, batch_idx: batch[0])
        model, trainer = yolo(mosaic=0.25), SimpleNamespace(max_epochs=10, current_epoch=0)
        model.trainer = trainer
        torch.manual_seed(0)
        count = sum(model.training_step(("images", []), i) == "a mosaic" for i in range(400))
        assert 70 < count < 130

    def test_a_mosaic_of_scenes_can_be_learned_from(self):
        torch.manual_seed(0)
        images, targets = scenes(4, size=64)
        losses = yolo().losses(*mosaic(images, targets))
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"anchors": [(3.0, 4.0)] * 4}, "anchors: 3, 6, 9"),
            ({"anchors": []}, "anchors: 3, 6, 9"),
            ({"anchors": [(3.0, 4.0), (5.0, 0.0), (4.0, 4.0)]}, "above 0"),
            ({"mosaic": 1.5}, "mosaic 1.5 .* must be shares"),
            ({"mosaic_off": -1.0}, "mosaic_off -1.0 must be shares"),
            ({"candidates": 0}, "candidates at 1"),
            ({"largest_ratio": 1.0}, "largest_ratio is above 1"),
        ],
    )
    def test_what_cannot_be_used(self, arguments, words):
        with pytest.raises(InputError, match=words):
            yolo(**arguments)

    @pytest.mark.parametrize("layers", [LAYERS[:2], ["stage1", "stage2", "stage4"]])
    def test_backbones_that_do_not_fit(self, layers):
        with pytest.raises(InputError, match="three layers, each of half the side of the last, got strides"):
            YOLO(4, Backbone(SmallFeatures((8, 8, 8, 8)), layers))

    def test_another_backbone(self):
        model = YOLO(4, Backbone("mobilenet_v2", ["features.6", "features.13", "features.18"]), width=16)
        said = model.look(torch.rand(1, 3, 70, 100))
        assert [tuple(s.shape) for s in said] == [(1, 3, 12, 16, 9), (1, 3, 6, 8, 9), (1, 3, 3, 4, 9)]
        probability = F.sigmoid(said[0][..., 4]).mean().item()
        assert probability == pytest.approx(0.01, rel=0.5)
