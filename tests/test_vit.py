"""The vision transformer equals torchvision's, takes pictures of any size, says where it looked, and learns; so does the recipe."""

import functools
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pytorch_lightning import Trainer
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from benchmarks import vit_speed
from callbacks.attention_rollout import roll_out
from callbacks.averaged_weights import AveragedWeights
from datamodules.mnist import MNIST
from lit_models.deit import DeiT
from lit_models.mlp_mixer import MLPMixer
from lit_models.recipe import StepDropout, add_stochastic_depth
from lit_models.swin import Swin
from lit_models.transformer import Encoder
from lit_models.vit import NAMES, ViT, is_square, our_name, resize_positions
from runner.errors import InputError
from train import main

SMALL = {"num_classes": 10, "image_size": 28, "patch": 7, "channels": 1, "layers": 2, "heads": 2, "width": 16}
small = functools.partial(ViT, **SMALL)
RUN = ("--model.layers=1", "--model.width=16", "--model.patch=7", "--data.val_size=53", "--trainer.max_epochs=1")

AVERAGED = (
    '--trainer.callbacks=[{"class_path": "callbacks.averaged_weights.AveragedWeights", "init_args": {"decay": 0.9}}]',
    "--trainer.limit_train_batches=3",
)


def shaken(network: nn.Module) -> nn.Module:
    """Give norms, biases and what begins at zero numbers that tell them apart."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def theirs(image_size: int = 32, **arguments) -> VisionTransformer:
    return shaken(VisionTransformer(image_size, 8, 2, 4, 32, 64, num_classes=5, **arguments))


def ours(image_size: int = 32, **arguments) -> ViT:
    return ViT(5, image_size, 8, layers=2, heads=4, width=32, hidden=64, **arguments).eval()


class TestTorchvision:
    def test_vit_b_16_with_its_weights_gives_the_same_logits(self):
        torch.manual_seed(0)
        reference = torchvision.models.vit_b_16(weights=None).eval()
        nn.init.normal_(reference.heads.head.weight, std=0.02)
        with torch.device("meta"):
            network = ViT().eval()
        state = {our_name(name): tensor for name, tensor in reference.state_dict().items()}
        network.load_state_dict(state, assign=True)
        images = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            expected, found = reference(images), network(images)
        assert expected.std() > 1e-3
        assert (found - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())

    @pytest.mark.parametrize(("settings", "name"), NAMES.items(), ids=NAMES.values())
    def test_names_shapes_and_defaults_are_theirs(self, settings, name):
        patch, layers, heads, width = settings
        with torch.device("meta"):
            reference = torchvision.models.get_model(name, weights=None)
            network = ViT(patch=patch, layers=layers, heads=heads, width=width)
        expected = {our_name(key): tensor.shape for key, tensor in reference.state_dict().items()}
        assert {key: tensor.shape for key, tensor in network.state_dict().items()} == expected
        assert {m.eps for m in network.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}

    def test_a_file_of_theirs_is_taken_and_a_new_head_begins_anew(self, tmp_path):
        reference, images = theirs(), torch.randn(2, 3, 32, 32)
        torch.save(reference.state_dict(), tmp_path / "vit.pth")
        network = ours(weights=str(tmp_path / "vit.pth"))
        torch.testing.assert_close(network(images), reference(images), rtol=1e-4, atol=1e-5)
        assert network.pretrained["file"] == "vit.pth"
        other = ViT(3, 32, 8, layers=2, heads=4, width=32, hidden=64, weights=str(tmp_path / "vit.pth"))
        assert torch.equal(other.encoder.blocks[1].norm2.weight, network.encoder.blocks[1].norm2.weight)
        assert not other.head.weight.any()

    def test_older_files_with_other_names_are_taken_too(self, tmp_path):
        state = {k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
                 for k, v in theirs().state_dict().items()}  # fmt: skip
        torch.save(state, tmp_path / "old.pth")
        assert torch.equal(ours(weights=str(tmp_path / "old.pth")).encoder.blocks[0].mlp[3].bias,
                           state["encoder.layers.encoder_layer_0.mlp.linear_2.bias"])  # fmt: skip

    def test_both_begin_alike(self):
        torch.manual_seed(0)
        a = VisionTransformer(32, 8, 1, 4, 256, 512, num_classes=5).state_dict()
        b = ViT(5, 32, 8, layers=1, heads=4, width=256, hidden=512).state_dict()
        for name, tensor in a.items():
            assert b[our_name(name)].std() == pytest.approx(tensor.std().item(), rel=0.15, abs=1e-6), name


class TestPositions:
    @pytest.mark.parametrize("size", [16, 40, 64])
    def test_weights_of_another_picture_size_are_resized_as_torchvision_does(self, size, tmp_path):
        reference = theirs()
        torch.save(reference.state_dict(), tmp_path / "vit.pth")
        other = theirs(size)
        other.load_state_dict(interpolate_embeddings(size, 8, reference.state_dict()))
        images = torch.randn(2, 3, size, size)
        network = ours(size, weights=str(tmp_path / "vit.pth"))
        torch.testing.assert_close(network(images), other.eval()(images), rtol=1e-4, atol=1e-5)
        same = ours(weights=str(tmp_path / "vit.pth"))  # resized on the way, at every picture of that size
        torch.testing.assert_close(same(images), network(images))

    def test_a_checkpoint_of_ours_of_another_size_is_taken(self, tmp_path):
        network = shaken(small())
        torch.save({"state_dict": network.state_dict()}, tmp_path / "best.ckpt")
        larger = ViT(**{**SMALL, "image_size": 56}, weights=str(tmp_path / "best.ckpt")).eval()
        assert larger.positions.shape == (1, 65, 16)
        images = torch.rand(2, 1, 56, 56)
        torch.testing.assert_close(larger(images), network(images))

    def test_pictures_need_not_be_square(self):
        positions = torch.randn(1, 2 + 9, 4)
        resized = resize_positions(positions, (2, 5), extra=2)
        assert resized.shape == (1, 12, 4)
        assert torch.equal(resized[:, :2], positions[:, :2])
        assert torch.allclose(resized[0, [2, 6, 7, 11]], positions[0, [2, 4, 8, 10]], atol=1e-6)  # corners stay corners
        assert small()(torch.rand(2, 1, 14, 35)).shape == (2, 10)
        assert [n for n in range(-2, 17) if is_square(n)] == [1, 4, 9, 16]

    def test_positions_matter(self):
        network, images = shaken(small()), torch.rand(1, 1, 28, 28)
        assert not torch.allclose(network(images), network(images.roll(7, dims=3)), atol=1e-4)
        with torch.no_grad():
            network.positions[:, 1:] = 0
        assert torch.allclose(network(images), network(images.roll(7, dims=3)), atol=1e-5)  # patches in another order


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"image_size": 30}, "patches of 7 pixels do not fill pictures of 30"),
            ({"heads": 3}, "3 do not divide the width, 16"),
            ({"layers": 0}, "layers: at least 1"),
            ({"pool": "max"}, "pool: token or mean"),
            ({"stochastic_depth": 1.0}, "stochastic_depth: a share from 0 to below 1"),
            ({"mixup": -1.0}, "mixup and cutmix are 0"),
            ({"mixup": 1.0, "loss": "mse"}, "loss must be cross_entropy"),
        ],
    )
    def test_an_argument_is_one_line(self, arguments, words):
        with pytest.raises(InputError, match=words) as caught:
            small(**arguments)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("shape", "words"), [((1, 1, 28, 30), "do not fill pictures of 28 x 30"),
                                                  ((1, 3, 28, 28), "--model.channels 3")])  # fmt: skip
    def test_a_picture_is_one_line(self, shape, words):
        with pytest.raises(InputError, match=words):
            small()(torch.rand(shape))


class TestRollout:
    def test_by_hand(self):
        """Two tokens, two blocks, one head."""
        a, b = torch.tensor([[0.6, 0.4], [0.2, 0.8]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
        a_half, b_half = torch.tensor([[0.8, 0.2], [0.1, 0.9]]), torch.tensor([[1.0, 0.0], [0.25, 0.75]])
        torch.testing.assert_close(roll_out([a[None, None], b[None, None]])[0], b_half @ a_half)

    @pytest.mark.parametrize("pool", ["token", "mean"])
    def test_shares_are_the_patches(self, pool):
        maps = shaken(small(pool=pool)).rollout(torch.rand(3, 1, 28, 14))
        assert maps.shape == (3, 4, 2)
        assert (maps > 0).all()
        assert (maps.sum(dim=(1, 2)) <= 1 + 1e-5).all()  # the class token has the rest
        if pool == "mean":
            torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(3))

    def test_finds_the_patch_that_attention_looks_at(self):
        """A class token whose query fits the key of bright patches alone."""
        network = small(layers=1, heads=1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
            block = network.encoder.blocks[0]
            block.norm1.weight.fill_(1.0)
            network.class_token[0, 0, 0] = 1.0
            network.patches.weight[1] = 1.0
            block.attention.in_proj_weight[2, 0] = 5.0  # number 2 of the query: from the class token
            block.attention.in_proj_weight[16 + 2, 1] = 5.0  # of the key: from bright patches
        images = torch.zeros(1, 1, 28, 28)
        images[:, :, 14:21, 7:14] = 1.0
        assert network.rollout(images)[0].argmax() == 2 * 4 + 1


class TestRecipe:
    def test_without_it_blocks_are_as_they_were(self):
        encoder = Encoder(3, 8, 2)
        add_stochastic_depth(encoder.blocks, 0.0)
        assert {type(block.dropout) for block in encoder.blocks} == {nn.Dropout}

    def test_stochastic_depth_leaves_out_whole_steps_more_of_them_deeper(self):
        encoder = Encoder(3, 8, 2, dropout=0.0)
        add_stochastic_depth(encoder.blocks, 0.5)
        shares = [b.dropout.depth.p if isinstance(b.dropout, StepDropout) else 0.0 for b in encoder.blocks]
        assert shares == [0.0, 0.25, 0.5]
        torch.manual_seed(0)
        found = encoder.blocks[2].dropout(torch.ones(400, 3, 8))
        assert set(found.flatten().tolist()) == {0.0, 2.0}
        assert torch.equal(found.amin(dim=(1, 2)), found.amax(dim=(1, 2)))
        assert found.mean() == pytest.approx(1, abs=0.2)
        assert torch.equal(encoder.blocks[2].dropout.eval()(found), found)

    def test_dropout_is_still_there_with_it(self):
        step = StepDropout(0.25, 0.5).train()
        assert ((step(torch.ones(50, 50, 8)) == 0).float().mean() - (1 - 0.5 * 0.75)).abs() < 0.15

    @pytest.mark.parametrize("kinds", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 0.5}])
    def test_mixed_pictures_have_mixed_labels(self, kinds):
        network, images, labels = small(**kinds), torch.rand(8, 1, 28, 28), torch.arange(8)
        torch.manual_seed(0)
        mixed, shares = network.mix(images, labels)
        torch.manual_seed(0)
        assert torch.equal(network.mix(images, labels)[0], mixed)  # drawn from the global generator
        assert mixed.shape == images.shape
        assert shares.shape == (8, 10)
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(8))
        assert not torch.equal(mixed, images)
        loss, logits = network.training_loss(images, labels)
        assert loss.isfinite()
        assert logits.shape == (8, 10)

    def test_label_smoothing_goes_with_it(self):
        network, images, labels = small(mixup=1.0, label_smoothing=0.5), torch.rand(4, 1, 28, 28), torch.arange(4)
        shaken(network)
        torch.manual_seed(3)
        loss, logits = network.training_loss(images, labels)
        torch.manual_seed(3)
        _, shares = network.mix(images, labels)
        expected = -((0.5 * shares + 0.05) * logits.log_softmax(dim=1)).sum(dim=1).mean()
        torch.testing.assert_close(loss, expected)

    def test_evaluation_mixes_nothing(self):
        network, images = shaken(small(mixup=1.0, stochastic_depth=0.5, dropout=0.5)), torch.rand(4, 1, 28, 28)
        assert torch.equal(network(images), network(images))

    def test_only_matrices_decay(self):
        network = small(optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1))
        matrices, others = network.configure_optimizers().param_groups
        names = {id(p): name for name, p in network.named_parameters()}
        assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
        assert len(matrices["params"]) + len(others["params"]) == len(names)
        assert {"positions", "class_token", "head.bias"} <= {names[id(p)] for p in others["params"]}
        assert all(names[id(p)].endswith("weight") for p in matrices["params"])

    def test_averaged_weights_are_kept_where_the_model_will_be(self):
        """When they are made, it is still on the CPU."""
        callback, device = AveragedWeights(), torch.device("meta")
        callback.setup(SimpleNamespace(strategy=SimpleNamespace(root_device=device)), small(), "fit")
        assert {parameter.device for parameter in callback._average_model.parameters()} == {device}

    def test_averaged_weights_are_what_is_tested(self, train):
        """The checkpoint holds plain types, the run verifies, and one that was stopped ends in the same bits."""
        experiment = "experiments/mnist_vit.yaml"
        once = train(*RUN, *AVERAGED, experiment=experiment, tiny=())
        saved = torch.load(once / "best.ckpt", weights_only=True)
        assert not torch.equal(saved["state_dict"]["head.bias"], saved["current_model_state"]["head.bias"])
        assert main(["--verify", str(once / "receipt.json")]) == 0
        assert main([experiment, *RUN[:-1], *AVERAGED, "--resume", str(once), "--trainer.max_epochs=2"]) == 0
        twice = train(*RUN[:-1], *AVERAGED, "--trainer.max_epochs=2", experiment=experiment, tiny=())
        a, b = (torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in (once, twice))
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_memorises_a_batch(pool):
    torch.manual_seed(0)
    network, images, labels = small(pool=pool), torch.rand(6, 1, 28, 28), torch.arange(6)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    losses = []
    for _ in range(100):
        loss, _ = network.training_loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_a_batch_of_one_trains():
    network = small(mixup=1.0, cutmix=1.0, stochastic_depth=0.2)
    loss, _ = network.training_loss(torch.rand(1, 1, 28, 28), torch.tensor([3]))
    loss.backward()
    assert loss.isfinite()


KINDS = {
    "vit": functools.partial(small, mixup=0.5, cutmix=0.5, stochastic_depth=0.2),
    "mixer": functools.partial(MLPMixer, 10, 28, 7, 1, 2, 16, stochastic_depth=0.2),
    "deit": functools.partial(DeiT, **SMALL, stochastic_depth=0.2),
    "swin": functools.partial(Swin, 10, 1, 2, 8, (2, 1), (1, 2)),
}


@pytest.mark.parametrize("name", KINDS)
def test_compiled_in_half_precision_it_learns_the_same(name):
    """But for the last step, the C++ compiler, which takes a minute a network."""
    torch._dynamo.reset()
    network, images, labels = shaken(KINDS[name]()).train(), torch.rand(2, 1, 28, 28), torch.tensor([1, 2])
    found = []
    for is_compiled in (False, True):
        if is_compiled:
            network.compile(backend="aot_eager", dynamic=False, fullgraph=True)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, logits = network.training_loss(images, labels)
        network.zero_grad()
        loss.backward()
        found.append((loss, logits, [p.grad for p in network.parameters()]))
    assert all(gradient.isfinite().all() for gradient in found[0][2])
    torch.testing.assert_close(*found, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", KINDS)
def test_in_half_precision_norms_have_the_gradients_of_single_precision(name):
    """Of many places: where torch sums them in bfloat16, as it does on a CPU if it is given that, most of a sum is lost."""
    network, images, labels = shaken(KINDS[name]()), torch.rand(128, 1, 28, 28), torch.arange(128) % 10
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm)]
    found = []
    for precision in (torch.bfloat16, torch.float32):
        network.zero_grad()
        with torch.autocast("cpu", dtype=precision, enabled=precision == torch.bfloat16):
            F.cross_entropy(network(images), labels).backward()
        found.append([p.grad for norm in norms for p in norm.parameters()])
    for half, single in zip(*found, strict=True):
        assert (half - single).norm() < 0.05 * single.norm()


def test_a_compiled_networks_weights_are_averaged(monkeypatch):
    """As in `cifar10_vit`: the average is made of a network that is compiled already, and validated by its graph."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    network = KINDS["vit"](compile=True, optimizer=functools.partial(torch.optim.AdamW, lr=1e-2))
    settings = {
        "precision": "bf16-mixed", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "limit_val_batches": 1,
    }  # fmt: skip
    data = MNIST(batch_size=8, val_size=53, eval_batch_size=8)
    Trainer(**settings).validate(network, data, verbose=False)
    assert network._compiled_call_impl is not None
    seen = []
    network.register_forward_pre_hook(
        lambda module, _: seen.append((module.training, module.head.bias.detach().clone()))
    )
    Trainer(max_epochs=1, limit_train_batches=3, callbacks=[AveragedWeights(decay=0.5)], **settings).fit(network, data)
    *trained, (in_training, validated) = seen[-4:]
    assert not in_training
    assert all(training for training, _ in trained)
    assert torch.equal(network.head.bias, validated)  # what was validated is what is left: the average
    assert not torch.equal(validated, trained[-1][1])


def test_half_precision_is_near():
    network, images = shaken(small()), torch.rand(4, 1, 28, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images)
        loss = F.cross_entropy(logits, torch.arange(4))
    loss.backward()
    torch.testing.assert_close(logits.float(), network(images), rtol=0.1, atol=0.1)


@pytest.mark.pictures
def test_a_run_in_half_precision_draws_where_it_looked(train):
    run = train(*RUN, "--trainer.precision=bf16-mixed", experiment="experiments/mnist_vit.yaml", tiny=())
    names = {path.stem for path in (run / "pictures").glob("*.png")}
    assert names == {"predictions", "confusion_matrix", "filters", "attention_rollout", "curves"}


class TestBesideTorchvisions:
    """The benchmark; what it measures is in the README."""

    TINY = ("vit_small", "swin_small", "--batch", "2", "--rounds", "1", "--steps", "1")

    @pytest.mark.parametrize("precision", ["32", "bf16"])
    def test_it_prints_time_and_memory_of_each_pair(self, precision, capsys):
        assert vit_speed.main([*self.TINY, "--precision", precision]) == 0
        out = capsys.readouterr().out
        for name in ("vit_small", "swin_small"):
            assert re.search(rf"^{name}  step    ours \S+ .* ms  torchvision \S+ .* ms  ratio \d", out, flags=re.M)
            ours, theirs = re.search(
                rf"^{name}  memory  ours (\S+) MB  torchvision (\S+) MB  ratio", out, re.M
            ).groups()
            assert 0.9 < float(ours) / float(theirs) < 1.1

    def test_memory_is_what_a_step_holds(self):
        """Of a layer of a million weights, whose batch is small: its gradient, and little else."""
        layer = nn.Sequential(nn.Flatten(), nn.Linear(1000, 1000, bias=False))
        batch = torch.randn(1, 10, 10, 10), torch.tensor([3])
        contender = vit_speed.Contender(layer, batch, torch.float32, False)
        contender.step()
        assert contender.megabytes() == pytest.approx(4.0, abs=0.2)

    def test_another_network_is_not_compared(self, capsys, monkeypatch):
        make = functools.partial(vit_speed.vits, 28, 4, 1, 4, 64, 128)

        def other(classes):
            ours, theirs = make(classes)
            nn.init.normal_(ours.head.weight)
            return ours, theirs

        monkeypatch.setitem(vit_speed.PAIRS, "vit_small", (28, 10, other))
        assert vit_speed.main(list(self.TINY)) == 2
        assert "error: vit_small: the two do not compute the same" in capsys.readouterr().err

    @pytest.mark.parametrize(("arguments", "words"), [(["vit"], "no pair 'vit'"), (["--rounds", "0"], "start at 1")])
    def test_what_cannot_be_is_one_line(self, arguments, words, capsys):
        assert vit_speed.main(arguments) == 2
        assert words in capsys.readouterr().err
