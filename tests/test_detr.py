"""DETR: its Transformer is the paper's, its matching the best there is, its losses by hand; it learns; edge cases."""

import functools
import itertools
import math
import warnings

import pytest
import test_detectors
import torch
import torch.nn.functional as F
from test_detectors import scenes
from torch import nn
from torchvision.ops import box_convert, generalized_box_iou

from lit_models.backbones import Backbone, SmallFeatures
from lit_models.boxes import iou
from lit_models.detr import (
    DETR,
    Answers,
    PictureBlock,
    PictureEncoder,
    QueryBlock,
    QueryDecoder,
    assign,
    generalised_iou,
    grid,
    half,
    in_pixels,
    places,
    sines,
    to_corners,
    to_shares,
)
from lit_models.transformer import EncoderBlock, sinusoids
from runner.errors import InputError
from runner.history import read_history

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)


def detr(**arguments) -> DETR:
    settings = {"queries": 12, "width": 64, "heads": 4, "layers": 2, "dropout": 0.0, "norm_first": True}
    return DETR(4, Backbone(SmallFeatures((16, 32, 64)), ["stage3"]), **(settings | {"optimizer": ADAM} | arguments))


@pytest.fixture(autouse=True)
def beside_the_others(monkeypatch, tmp_path):
    """What is asked of every detector finds it by name."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setitem(test_detectors.DETECTORS, "detr", detr)


class TestAsEveryDetector:
    @pytest.mark.filterwarnings("ignore:a picture has more objects than the 12 queries")
    @pytest.mark.parametrize(
        "case",
        [case for case in vars(test_detectors.TestEdgeCases) if case.startswith("test_") and "proposals" not in case],
    )
    def test_edge_cases(self, case):
        getattr(test_detectors.TestEdgeCases(), case)("detr")

    def test_it_memorises_a_batch(self):
        """Longer than the others need: who is to find what has to settle first."""
        torch.manual_seed(0)
        images, targets = scenes(4, size=64)
        model = detr().train()
        optimizer = model.configure_optimizers()
        first = None
        for _ in range(250):
            losses = model.losses(images, targets)
            loss = sum(losses.values())
            first = first or loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.2 * first
        found = model.eval()(images, targets)
        for f, t in zip(found, targets, strict=True):  # without any suppression, as many as there are
            kept = f["scores"] > 0.5
            assert kept.sum() == len(t["labels"])
            overlaps = iou(t["boxes"], f["boxes"][kept])
            assert ((overlaps > 0.5) & (t["labels"][:, None] == f["labels"][kept])).any(dim=1).all()


def random_answers(layers: int, batch: int, queries: int, seed: int = 0) -> Answers:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(layers, batch, queries, 5, generator=generator)
    boxes = 0.1 + 0.6 * torch.rand(layers, batch, queries, 4, generator=generator)
    return Answers(logits.requires_grad_(), boxes.requires_grad_())


def random_targets(counts: tuple[int, ...], size: tuple[int, int] = (60, 80), seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for n in counts:
        boxes = torch.rand(n, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([size[1], size[0]])
        labels = torch.randint(4, (n,), generator=generator)
        targets.append({"boxes": boxes.flatten(1), "labels": labels, "size": size})
    return targets


def cost_by_hand(answers: Answers, layer: int, image: int, query: int, there: dict, n: int) -> float:
    """The paper's, one number at a time, its GIoU by torchvision and in pixels."""
    h, w = there["size"]
    box, wanted = answers.boxes[layer, image, query].detach(), there["boxes"][n]
    probability = answers.logits[layer, image, query].softmax(dim=0)[there["labels"][n]]
    scale = torch.tensor([w, h, w, h])
    l1 = (box - box_convert(wanted, "xyxy", "cxcywh") / scale).abs().sum()
    giou = generalized_box_iou(box_convert(box, "cxcywh", "xyxy")[None] * scale, wanted[None])[0, 0]
    return float(-probability + 5 * l1 + 2 * (1 - giou))


class TestMatching:
    @pytest.mark.parametrize(("queries", "objects"), [(5, 3), (4, 4), (3, 5), (1, 1), (6, 0)])
    @pytest.mark.parametrize("seed", range(3))
    def test_is_the_best_of_all_permutations(self, queries, objects, seed):
        costs = torch.randn(queries, objects, generator=torch.Generator().manual_seed(seed))
        q, o = assign(costs)
        assert len(q) == len(set(q.tolist())) == len(set(o.tolist())) == min(queries, objects)
        small, large = sorted((queries, objects))
        by_few = costs if queries <= objects else costs.T
        best = min(
            sum(float(by_few[i, j]) for i, j in enumerate(chosen))
            for chosen in itertools.permutations(range(large), small)
        )
        assert float(costs[q, o].sum()) == pytest.approx(best, abs=1e-5)

    def test_costs_are_the_papers(self):
        answers, targets = random_answers(2, 2, 4), random_targets((2, 3))
        labels, boxes = [t["labels"] for t in targets], [to_shares(t) for t in targets]
        costs = detr().costs(answers, torch.cat(labels), torch.cat(boxes))
        assert costs.shape == (2, 2, 4, 5)
        for layer, image, query in itertools.product(range(2), range(2), range(4)):
            for n in range(len(labels[image])):
                expected = cost_by_hand(answers, layer, image, query, targets[image], n)
                assert float(costs[layer, image, query, 2 * image + n]) == pytest.approx(expected, abs=1e-5)

    def test_each_layer_and_picture_has_the_best_of_its_own(self):
        answers, targets = random_answers(3, 3, 4), random_targets((2, 0, 4))
        labels, boxes = [t["labels"] for t in targets], [to_shares(t) for t in targets]
        layer, image, query, number = detr().match(answers, labels, boxes)
        assert len(layer) == 3 * 6
        for i, k in itertools.product(range(3), (0, 2)):
            mine = (layer == i) & (image == k)
            n, first = len(labels[k]), 2 * (k == 2)
            assert sorted(number[mine].tolist()) == list(range(first, first + n))
            costs = [[cost_by_hand(answers, i, k, q, targets[k], o) for o in range(n)] for q in range(4)]
            best = min(sum(costs[q][o] for o, q in enumerate(c)) for c in itertools.permutations(range(4), n))
            chosen = sum(costs[q][o - first] for q, o in zip(query[mine].tolist(), number[mine].tolist(), strict=True))
            assert chosen == pytest.approx(best, abs=1e-5)

    def test_what_is_no_number_is_taken_last(self):
        queries, objects = assign(torch.tensor([[math.nan, math.nan], [2.0, 3.0], [1.0, math.inf]]))
        assert dict(zip(objects.tolist(), queries.tolist(), strict=True)) == {0: 2, 1: 1}
        assert len(assign(torch.full((3, 2), math.nan))[0]) == 2


class TestLosses:
    def losses(self, answers: Answers, targets: list[dict], model: DETR | None = None) -> dict[str, torch.Tensor]:
        model = model or detr()
        model.answer = lambda images, targets: answers
        return model.losses(torch.zeros(len(targets), 3, 60, 80), targets)

    @pytest.mark.parametrize("counts", [(2, 3), (0, 4), (1, 0), (0, 0)])
    def test_by_hand(self, counts):
        """Of every layer by itself, with the matching of the least cost among all."""
        answers, targets = random_answers(2, 2, 4), random_targets(counts)
        found = self.losses(answers, targets)
        assert list(found) == [
            *("class_loss", "box_loss", "giou_loss"),
            *("class_loss_1", "box_loss_1", "giou_loss_1"),
        ]
        for layer, end in ((1, ""), (0, "_1")):
            wanted = torch.full((2, 4), 4)
            l1 = giou = 0.0
            for k, there in enumerate(targets):
                best = min(
                    itertools.permutations(range(4), counts[k]),
                    key=lambda c: sum(cost_by_hand(answers, layer, k, q, there, o) for o, q in enumerate(c)),
                )
                for n, q in enumerate(best):
                    wanted[k, q] = there["labels"][n]
                    scale = torch.tensor([80, 60, 80, 60])
                    box = answers.boxes[layer, k, q].detach()
                    l1 += float((box - box_convert(there["boxes"][n], "xyxy", "cxcywh") / scale).abs().sum())
                    corners = box_convert(box, "cxcywh", "xyxy")[None] * scale
                    giou += 1 - float(generalized_box_iou(corners, there["boxes"][n][None]))
            weights = torch.tensor([1.0, 1, 1, 1, 0.1])
            expected = F.cross_entropy(answers.logits[layer].transpose(1, 2), wanted, weights)
            count = max(sum(counts), 1)
            assert float(found[f"class_loss{end}"]) == pytest.approx(float(expected), rel=1e-4)
            assert float(found[f"box_loss{end}"]) == pytest.approx(5 * l1 / count, rel=1e-4, abs=1e-6)
            assert float(found[f"giou_loss{end}"]) == pytest.approx(2 * giou / count, rel=1e-4, abs=1e-6)

    def test_a_perfect_answer_costs_nothing(self):
        (there,) = random_targets((3,))
        logits = torch.full((1, 1, 5, 5), -50.0)
        logits[0, 0, range(5), [*there["labels"].tolist(), 4, 4]] = 50.0
        boxes = torch.cat([to_shares(there), torch.rand(2, 4)])[None, None]
        losses = self.losses(Answers(logits, boxes), [there])
        assert sum(losses.values()) == pytest.approx(0, abs=1e-5)

    def test_the_order_of_objects_and_queries_does_not_matter(self):
        answers, (there,) = random_answers(1, 1, 6), random_targets((4,))
        order, of = torch.randperm(6), torch.tensor([2, 0, 3, 1])
        turned = Answers(answers.logits[:, :, order], answers.boxes[:, :, order])
        mixed = there | {"boxes": there["boxes"][of], "labels": there["labels"][of]}
        torch.testing.assert_close(self.losses(answers, [there]), self.losses(turned, [mixed]))

    def test_more_objects_than_queries_teach_as_many_as_there_are_queries(self):
        answers, targets, model = random_answers(1, 1, 3), random_targets((7,)), detr()
        with pytest.warns(
            UserWarning, match="more objects than the 3 queries, which can find no more: --model.queries"
        ):
            losses = self.losses(answers, targets, model)
        assert all(torch.isfinite(loss) for loss in losses.values())
        with warnings.catch_warnings(action="error"):
            self.losses(answers, random_targets((3,)), model)

    def test_no_object_may_have_no_weight(self):
        losses = self.losses(random_answers(1, 1, 3), random_targets((0,)), detr(no_object_weight=0.0))
        assert float(sum(losses.values())) == 0

    def test_every_layer_is_taught(self):
        model = detr()
        images, targets = torch.randn(2, 3, 64, 64), random_targets((2, 1), (64, 64))
        losses = model.losses(images, targets)
        last = sum(value for name, value in losses.items() if not name.endswith("_1"))
        inner = sum(value for name, value in losses.items() if name.endswith("_1"))
        parameter = model.decoder.blocks[1].mlp[0].weight
        assert not torch.autograd.grad(inner, parameter, retain_graph=True)[0].any()
        assert torch.autograd.grad(last, parameter, retain_graph=True)[0].any()
        assert torch.autograd.grad(inner, model.decoder.blocks[0].mlp[0].weight)[0].any()


class TestGeneralisedIoU:
    def test_is_torchvisions(self):
        generator = torch.Generator().manual_seed(0)
        a, b = torch.rand(2, 30, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
        a[0], a[1] = b[0], b[1] + 2  # the same, far off
        torch.testing.assert_close(generalised_iou(a[:, None], b), generalized_box_iou(a, b))
        torch.testing.assert_close(generalised_iou(a, b), generalized_box_iou(a, b).diag())

    def test_without_area_it_and_its_gradient_are_finite(self):
        a = torch.full((1, 4), 0.3, requires_grad=True)
        value = generalised_iou(a, torch.full((1, 4), 0.3))
        value.sum().backward()
        assert value.isfinite().all()
        assert a.grad.isfinite().all()

    def test_tiny_boxes_are_told_apart(self):
        a = torch.tensor([0.0, 0, 1e-3, 1e-3])
        assert float(generalised_iou(a, a)) == pytest.approx(1)


def test_boxes_go_to_shares_and_back():
    there = random_targets((5,), (37, 91))[0]
    shares = to_shares(there)
    (back,) = in_pixels(shares[None], [there])
    torch.testing.assert_close(back, there["boxes"])
    torch.testing.assert_close(to_corners(shares), box_convert(shares, "cxcywh", "xyxy"))
    assert to_shares(random_targets((0,))[0]).shape == (0, 4)


# -- the Transformer ---------------------------------------------------------------------------------------------------


class TheirLayer(nn.TransformerDecoderLayer):
    """The paper's layer (section A.3, figure 10), of PyTorch's parts: positions in queries and keys, not in values."""

    def forward(self, x, queries, memory, at):
        if self.norm_first:
            y = self.norm1(x)
            x = x + self.self_attn(y + queries, y + queries, y, need_weights=False)[0]
            y = self.norm2(x)
            x = x + self.multihead_attn(y + queries, memory + at, memory, need_weights=False)[0]
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self.self_attn(x + queries, x + queries, x, need_weights=False)[0])
        x = self.norm2(x + self.multihead_attn(x + queries, memory + at, memory, need_weights=False)[0])
        return self.norm3(x + self._ff_block(x))


@pytest.mark.parametrize("norm_first", [False, True])
class TestTransformer:
    def test_a_decoders_block_is_the_papers(self, norm_first):
        torch.manual_seed(0)
        theirs = TheirLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=norm_first)
        ours = QueryBlock(16, 2, 24, activation="relu", norm_first=norm_first)
        names = {"self_attn": "attention", "multihead_attn": "cross_attention", "linear1": "mlp.0", "linear2": "mlp.3"}
        state = {}
        for name, value in theirs.state_dict().items():
            head, _, rest = name.partition(".")
            state[f"{names.get(head, head)}.{rest}"] = value + 0.1 * torch.randn(value.shape)
        ours.load_state_dict(state)
        back = {new: old for old, new in names.items()}
        theirs.load_state_dict(
            {
                next((n.replace(b, o, 1) for b, o in back.items() if n.startswith(b + ".")), n): v
                for n, v in state.items()
            }
        )
        x, memory, at = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
        queries = torch.randn(5, 16)
        expected = theirs(x, queries.expand(2, -1, -1), memory, at)
        torch.testing.assert_close(ours(x, queries, memory, at), expected, rtol=1e-4, atol=1e-5)
        seen = []
        torch.testing.assert_close(ours(x, queries, memory, at, seen=seen), expected, rtol=1e-4, atol=1e-5)
        assert seen[0].shape == (2, 2, 5, 7)

    def test_an_encoders_block_without_positions_is_the_other(self, norm_first):
        torch.manual_seed(0)
        ours, other = (cls(16, 2, norm_first=norm_first) for cls in (PictureBlock, EncoderBlock))
        other.load_state_dict(ours.state_dict())
        x = torch.randn(2, 6, 16)
        torch.testing.assert_close(ours(x, torch.zeros(2, 6, 16)), other(x))
        assert not torch.allclose(ours(x, torch.randn(2, 6, 16)), other(x), atol=1e-3)

    def test_places_are_a_set_but_for_their_positions(self, norm_first):
        torch.manual_seed(0)
        encoder, decoder = (
            PictureEncoder(2, 16, 2, norm_first=norm_first),
            QueryDecoder(2, 16, 2, norm_first=norm_first),
        )
        x, at, queries, order = torch.randn(2, 9, 16), torch.randn(2, 9, 16), torch.randn(4, 16), torch.randperm(9)
        first = decoder(queries, encoder(x, at), at)
        assert first.shape == (2, 2, 4, 16)
        torch.testing.assert_close(
            decoder(queries, encoder(x[:, order], at[:, order]), at[:, order]), first, rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(decoder(queries, encoder(x[:, order], at), at), first, atol=1e-3)
        assert not torch.allclose(first[:, :, 0], first[:, :, 1], atol=1e-3)  # queries tell theirs apart

    def test_padding_changes_nothing(self, norm_first):
        torch.manual_seed(0)
        model = detr(norm_first=norm_first).eval()
        x, at = torch.randn(1, 6, 64), torch.randn(1, 6, 64)
        mask = torch.tensor([True] * 4 + [False] * 2)[None, None, None]
        padded = model.decoder(model.queries.weight, model.encoder(x, at, mask), at, mask)
        alone = model.decoder(model.queries.weight, model.encoder(x[:, :4], at[:, :4]), at[:, :4])
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


class TestPositions:
    def test_are_the_sinusoids_of_transformer(self):
        shares = torch.arange(7) / (2 * math.pi)
        torch.testing.assert_close(sines(shares, 12), sinusoids(7, 12), rtol=1e-4, atol=1e-5)

    def test_tell_row_then_column_of_each_place(self):
        at, mask = places((3, 5), 8, [(24, 40)] * 2, 16, torch.device("cpu"))
        assert mask is None
        assert at.shape == (2, 15, 16)
        at = at.view(2, 3, 5, 16)
        assert torch.equal(at[..., :8], at[:, :, :1, :8].expand(-1, -1, 5, -1))
        assert torch.equal(at[..., 8:], at[:, :1, :, 8:].expand(-1, 3, -1, -1))
        torch.testing.assert_close(at[0, 1, 2], sines(torch.tensor([0.5, 0.5]), 8).flatten())  # its middle
        assert len(at[0].flatten(0, 1).unique(dim=0)) == 15

    def test_are_shares_of_the_picture_without_padding_which_is_hidden(self):
        sizes = [(24, 40), (12, 17), (1, 1)]
        at, mask = places((3, 5), 8, sizes, 16, torch.device("cpu"))
        assert mask.shape == (3, 1, 1, 15)
        inside = mask.view(3, 3, 5)
        assert inside[0].all()
        assert inside[1].nonzero().tolist() == [[y, x] for y in (0, 1) for x in (0, 1, 2)]
        assert inside[2].nonzero().tolist() == [[0, 0]]
        expected = sines(torch.tensor([4 / 12, 12 / 17]), 8).flatten()
        torch.testing.assert_close(at.view(3, 3, 5, 16)[1, 0, 1], expected)

    @pytest.mark.filterwarnings("ignore:Attribute 'backbone'")
    def test_are_the_same_whatever_pads_a_picture(self):
        """Of 33 x 47 pixels, which the stride of 8 does not divide."""
        model, given = detr().eval(), []
        model.encoder.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1:]))
        for height, width in ((33, 47), (33, 48), (64, 72)):
            model.answer(torch.zeros(1, 3, height, width), [{"size": (33, 47)}])
        (alone, nothing), (padded, no_more), (larger, mask) = given
        assert alone.shape == (1, 5 * 6, 64)
        assert nothing is no_more is None  # all places begin inside
        torch.testing.assert_close(padded, alone)
        torch.testing.assert_close(larger[mask.view(1, -1)], alone[0])


class TestDetection:
    def answers(self) -> Answers:
        logits = torch.tensor([[0.0, 6, 0, 0, 0], [0, 0, 0, 0, 9], [3, 0, 0, 0, 2], [0, 6.5, 0, 0, 0]])
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.2, 0.4]])
        return Answers(logits[None, None], boxes[None, None])

    def test_best_first_in_pixels_clipped_and_nothing_suppressed(self):
        (found,) = detr().found(self.answers(), [{"size": (50, 100)}])
        assert found["labels"].tolist() == [1, 1, 0]
        torch.testing.assert_close(
            found["boxes"], torch.tensor([[40.0, 15, 60, 35], [40, 15, 60, 35], [0, 0, 30, 15]]), atol=1e-4, rtol=0
        )
        assert float(found["scores"][2]) == pytest.approx(math.exp(3) / (math.exp(3) + math.exp(2) + 3), rel=1e-4)

    @pytest.mark.parametrize(("arguments", "count"), [({"max_detections": 1}, 1), ({"score_threshold": 0.9}, 2)])
    def test_fewer(self, arguments, count):
        (found,) = detr(**arguments).found(self.answers(), [{"size": (50, 100)}])
        assert len(found["boxes"]) == count
        assert found["labels"].tolist() == [1] * count

    def test_what_it_explains(self):
        images, targets = torch.randn(2, 3, 64, 80), random_targets((2, 0), (64, 80))
        targets[1]["size"] = (30, 41)
        model = detr().eval()
        with torch.no_grad():
            (_, title, queries), (_, _, looks) = model.explain(images, targets)
        assert "all 12 queries" in title
        for (h, w), boxes, look in zip(((64, 80), (30, 41)), queries, looks, strict=True):
            assert sum(map(len, boxes.values())) == 12
            assert len(look["object"]) == 1
            cells = look["looked at"]
            assert 1 <= len(cells) <= 80
            assert ((cells[:, 2:] - cells[:, :2]) > 0).all()  # padding is not looked at
            assert (cells[:, 2:] <= torch.tensor([w, h])).all()

    def test_half_of_the_attention(self):
        assert half(torch.tensor([0.1, 0.4, 0.3, 0.2])).tolist() == [1, 2]
        assert half(torch.tensor([0.0, 1.0])).tolist() == [1]
        assert grid((17, 24), 8, 9, torch.device("cpu"))[4].tolist() == [8, 8, 16, 16]


class TestSettings:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"queries": 0}, "queries start at 1"),
            ({"width": 6, "heads": 2}, "multiple of 4: got 12 and 6"),
            ({"heads": 3}, "heads: 3 do not divide the width"),
            ({"layers": 0}, "layers: at least 1"),
            ({"giou_weight": -1.0}, "must be 0 or more"),
        ],
    )
    def test_what_cannot_be_is_one_line(self, arguments, words):
        with pytest.raises(InputError, match=words):
            detr(**arguments)


def test_in_half_precision_norms_are_given_single_precision():
    """See `test_vit`: torch would sum the gradients in half precision."""
    model, given = detr(), []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.answer(torch.randn(1, 3, 64, 64), random_targets((1,), (64, 64)))
    assert set(given) == {torch.float32}


@pytest.mark.filterwarnings("ignore:Attribute 'backbone'")
def test_compiled_in_half_precision_it_answers_the_same():
    """But for the C++ compiler, as in `test_vit`; whom to match is for scipy."""
    torch._dynamo.reset()
    model, targets = detr(), random_targets((2, 1), (64, 64))
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.answer(images, targets)
        model.answer = torch.compile(model.answer, backend="aot_eager", dynamic=False, fullgraph=True)
        torch.testing.assert_close(model.answer(images, targets), expected, rtol=0.05, atol=0.02)
        loss = sum(model.losses(images, targets).values())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.pictures
def test_a_run_logs_every_loss_and_draws(train):
    from test_train import receipt

    run = train(
        "--model.width=32", "--model.layers=2", "--trainer.log_every_n_steps=1", *test_detectors.TINY_SCENES,
        experiment="experiments/shapes_detr.yaml", tiny=(),
    )  # fmt: skip
    assert receipt(run)["tested"] == 5
    logged = {row["metric"] for row in read_history(run / "metrics.csv")}
    names = {f"{kind}_loss{end}" for kind in ("class", "box", "giou") for end in ("", "_1")}
    assert {"train/loss", *(f"train/{name}" for name in names), "val/map", "test/map_50"} <= logged
    pictures = {file.stem for file in (run / "pictures").iterdir()}
    assert pictures == {"curves", "detections", "precision_recall", "queries", "attention"}
    state = torch.load(run / "best.ckpt", weights_only=True)
    assert state["hyper_parameters"]["queries"] == 20
    assert not any("class_weights" in name for name in state["state_dict"])
