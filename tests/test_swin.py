"""Swin equals torchvision's, learns, and says in one line what does not fit."""

import functools

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.swin_transformer import PatchMerging as TheirMerging
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer

from lit_models.swin import PatchMerging, Swin, WindowAttention, from_windows, strangers, to_windows
from runner.errors import InputError

ADAM = functools.partial(torch.optim.AdamW, lr=2e-3)


def randomise(network: nn.Module) -> nn.Module:
    """Make attention look at something, and norms and biases differ: with the first weights all is nearly uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in network.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("relative_position_bias_table"):
                p.copy_(noise)
            elif p.ndim == 1:
                p.copy_(0.2 * noise + name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "0.2.weight")))
            else:
                p.copy_(noise * (2 if "qkv" in name else 1) / p[0].numel() ** 0.5)
    return network.eval()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
    assert expected.std() > 1e-3


def small(**arguments) -> Swin:
    torch.manual_seed(0)
    settings = {"num_classes": 10, "channels": 1, "patch": 2, "width": 16, "depths": (2, 2), "heads": (2, 4)}
    return Swin(**(settings | {"optimizer": ADAM} | arguments))


@pytest.mark.parametrize(("width", "std"), [(384, 0.02), (96, 0.04)])
def test_weights_begin_as_the_authors_where_the_last_stage_is_768_wide_and_larger_where_it_is_narrower(width, std):
    for module in small(width=width).modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(std, rel=0.05)


class TestTorchvision:
    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("swin_t", {}),
            ("swin_s", {"depths": (2, 2, 18, 2)}),
            ("swin_b", {"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}),
        ],
    )
    def test_names_and_shapes_are_theirs(self, name, arguments):
        with torch.device("meta"):
            theirs, ours = torchvision.models.get_model(name, weights=None), Swin(**arguments)
        assert {k: v.shape for k, v in ours.state_dict().items() if "test_" not in k and "val_" not in k} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }

    def test_their_file_gives_the_same_logits_and_gradients(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        theirs = randomise(torchvision.models.swin_t(weights=None))
        (tmp_path / "weights").mkdir()
        url = torchvision.models.Swin_T_Weights.IMAGENET1K_V1.url
        file = tmp_path / "weights" / url.rpartition("/")[2]
        torch.save(theirs.state_dict(), file)
        ours = Swin(weights="IMAGENET1K_V1").eval()
        assert ours.pretrained["file"] == file.name
        file.unlink()  # a hundred megabytes
        images = torch.randn(1, 3, 224, 224)
        found, expected = ours(images), theirs(images)
        assert_same(found, expected)
        found.square().mean().backward()
        expected.square().mean().backward()
        for name, p in theirs.named_parameters():
            grad = ours.get_parameter(name).grad
            assert (grad - p.grad).abs().max() <= 1e-3 * p.grad.abs().max() + 1e-6, name

    @pytest.mark.parametrize(("height", "width"), [(56, 56), (57, 30), (33, 90), (14, 61), (13, 9), (4, 4)])
    def test_sizes_that_windows_do_not_divide(self, height, width):
        theirs = SwinTransformer([4, 4], 12, [2, 2, 2], [1, 2, 3], [7, 7], stochastic_depth_prob=0.0, num_classes=5)
        randomise(theirs)
        ours = Swin(5, width=12, depths=(2, 2, 2), heads=(1, 2, 3)).eval()
        ours.load_state_dict(theirs.state_dict(), strict=False)
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            assert_same(ours(images), theirs(images))

    @pytest.mark.parametrize("shift", [0, 1, 2, 3])
    @pytest.mark.parametrize(("height", "width"), [(8, 12), (4, 12), (9, 3), (1, 1)])
    def test_window_attention(self, shift, height, width):
        theirs = randomise(ShiftedWindowAttention(12, [4, 4], [shift, shift], 3))
        ours = WindowAttention(12, 3, 4, shift)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, height, width, 12)
        assert_same(ours(x), theirs(x))

    @pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 1)])
    def test_patch_merging(self, height, width):
        theirs = randomise(TheirMerging(6))
        ours = PatchMerging(6)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, height, width, 6)
        assert_same(ours(x), theirs(x))

    def test_with_other_classes_the_last_layer_begins_anew(self, tmp_path):
        reference = small()
        torch.save(reference.state_dict(), tmp_path / "w.pth")
        ours = small(num_classes=3, weights=str(tmp_path / "w.pth"))
        assert torch.equal(ours.features[1][1].attn.qkv.weight, reference.features[1][1].attn.qkv.weight)
        assert ours.head.weight.shape == (3, 32)

    def test_by_name_there_are_weights_of_torchvisions_configurations_only(self):
        with pytest.raises(InputError, match="'IMAGENET1K_V1' must be a file"):
            small(weights="IMAGENET1K_V1")


class TestWindows:
    def test_cut_and_put_together(self):
        x = torch.arange(2 * 6 * 9).view(2, 6, 9, 1)
        cut = to_windows(x, 3)
        assert cut.shape == (2, 6, 9, 1)
        assert cut[0, 1, :, 0].tolist() == [3, 4, 5, 12, 13, 14, 21, 22, 23]
        assert torch.equal(from_windows(cut, 6, 9), x)

    def test_strangers_are_those_that_were_not_near_before_the_roll(self):
        height, width, side, shift = 8, 12, 4, (2, 1)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        where = torch.stack([y, x], dim=-1).roll((-2, -1), dims=(0, 1))[None]  # where each was
        where = to_windows(where, side)[0]  # (G, N, 2)
        far = ((where[:, :, None] - where[:, None]).abs() >= side).any(dim=-1)
        assert torch.equal(strangers(height, width, side, shift, torch.device("cpu")), far)
        assert far.any()

    def test_a_place_sees_its_window_and_no_other(self):
        """Blocks by twos: what changes at a corner is seen within its window, and behind the shifted one farther off."""
        model = small(window=4, depths=(2,), heads=(2,)).double().eval()
        randomise(model)
        images = torch.randn(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)  # 16 x 16 patches
        patches = model.features[0](images)
        for blocks, sees in ((1, slice(4, 8)), (2, slice(0, 8))):
            x = model.features[1][:blocks](patches)
            (grad,) = torch.autograd.grad(x[0, 5, 5].sum(), images, retain_graph=True)
            seen = grad[0, 0].unfold(0, 2, 2).unfold(1, 2, 2).abs().sum(dim=(2, 3)) > 0  # (16, 16)
            expected = torch.zeros(16, 16, dtype=torch.bool)
            if blocks == 1:
                expected[sees, sees] = True
            else:  # shifted by 2: its window is of 2 to 5 and of what these saw, 0 to 7
                expected[0:8, 0:8] = True
            assert torch.equal(seen, expected), blocks


class TestLearns:
    def test_it_memorises_a_batch(self):
        model = small(stochastic_depth=0.0, window=4).train()
        images, labels = torch.randn(10, 1, 12, 12), torch.arange(10)  # 6 x 6 patches: 2 x 2 windows, with padding
        optimizer = model.configure_optimizers()
        for _ in range(120):
            loss, logits = model.training_loss(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.2
        assert (logits.argmax(dim=1) == labels).float().mean() >= 0.95

    def test_every_parameter_learns(self):
        model = small().train()
        model(torch.randn(4, 1, 28, 28)).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_what_has_no_weight_decay(self):
        model = small()
        matrices, rest = model.configure_optimizers().param_groups
        assert rest["weight_decay"] == 0 < matrices["weight_decay"]
        assert all(p.ndim > 1 for p in matrices["params"])
        ids = {id(p) for p in rest["params"]}
        assert id(model.features[1][0].attn.relative_position_bias_table) in ids
        assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))

    def test_stochastic_depth_grows_and_is_off_in_evaluation(self):
        model = small(stochastic_depth=0.3)
        drops = [block.stochastic_depth.p for stage in (model.features[1], model.features[3]) for block in stage]
        assert drops == pytest.approx([0, 0.1, 0.2, 0.3])
        images = torch.randn(8, 1, 28, 28)
        assert not torch.equal(model.train()(images), model(images))
        assert torch.equal(model.eval()(images), model(images))


class TestEdgeCases:
    @pytest.mark.parametrize("size", [(28, 28), (29, 15), (3, 50), (2, 2)])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_a_step_in_half_precision(self, size, batch):
        model = small().train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, logits = model.training_loss(torch.randn(batch, 1, *size), torch.zeros(batch, dtype=torch.int64))
        loss.backward()
        assert logits.shape == (batch, 10)
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    def test_one_block(self):
        assert small(depths=[1], heads=[2])(torch.randn(2, 1, 28, 28)).shape == (2, 10)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"heads": (3, 4)}, "heads: 3 do not divide the width, 16"),
            ({"heads": (2,)}, r"depths \[2, 2\] and heads \[2\]"),
            ({"depths": (), "heads": ()}, "one of each for every stage"),
            ({"depths": (2, 0)}, "start at 1"),
            ({"window": 0}, "start at 1"),
            ({"stochastic_depth": 1.0}, "stochastic_depth: a share from 0 to below 1, got 1.0"),
        ],
    )
    def test_what_cannot_be_is_one_line(self, arguments, words):
        with pytest.raises(InputError, match=words):
            small(**arguments)

    def test_pictures_smaller_than_a_patch(self):
        with pytest.raises(InputError, match=r"pictures of \(1, 28\) pixels are smaller than a patch of 2"):
            small()(torch.zeros(1, 1, 1, 28))


def test_a_run(train):
    from test_train import receipt

    run = train(
        "--model.width=8", "--model.depths=[1, 1]", "--model.lr_scheduler.total_steps=100", "--trainer.max_epochs=1",
        experiment="experiments/fashion_swin.yaml",
    )  # fmt: skip
    assert receipt(run)["tested"] == 103
    assert torch.load(run / "best.ckpt", weights_only=True)["hyper_parameters"]["width"] == 8
