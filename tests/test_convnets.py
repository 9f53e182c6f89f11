"""The convolutional networks equal torchvision's, take its weights, and keep to what their files say of them."""

import functools
import json
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pytorch_lightning import Trainer
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from datamodules.mnist import MNIST
from lit_models.airbench import Airbench, whitening
from lit_models.alexnet import AlexNet
from lit_models.densenet import DenseNet
from lit_models.googlenet import GoogLeNet
from lit_models.lenet import LeNet
from lit_models.pretrained import from_checkpoint
from lit_models.resnet import ResNet, ResNetFeatures
from lit_models.vgg import VGG
from runner.errors import InputError
from train import main

PAPERS = {  # torchvision's name -> ours
    "alexnet": AlexNet,
    **{f"vgg{d}": functools.partial(VGG, depth=d) for d in (11, 13, 16, 19)},
    **{f"vgg{d}_bn": functools.partial(VGG, depth=d, batch_norm=True) for d in (11, 13, 16, 19)},
    "googlenet": GoogLeNet,
    **{f"resnet{d}": functools.partial(ResNet, depth=d) for d in (18, 34, 50, 101, 152)},
    **{f"densenet{d}": functools.partial(DenseNet, depth=d) for d in (121, 161, 169, 201)},
}
SMALL = {  # for pictures (B, 1, 28, 28) of 10 classes
    "lenet": LeNet,
    "alexnet": functools.partial(AlexNet, 10, 1, (8, 12, 16, 16, 16), True, hidden=32, dropout=0.1),
    "vgg": functools.partial(VGG, 10, 11, 1, (8, 8, 16, 16, 16), False, True, hidden=32, dropout=0.0),
    "vgg_bn": functools.partial(VGG, 10, 11, 1, (8, 8, 16, 16, 16), True, True, hidden=32, dropout=0.0),
    "googlenet": functools.partial(GoogLeNet, 10, 1, 1 / 16, True, hidden=16),
    "resnet": functools.partial(ResNet, 10, 18, 1, 4, True),
    "resnet20": functools.partial(ResNet, 10, 20, 1, 4, True, "padding"),
    "resnet50": functools.partial(ResNet, 10, 50, 1, 4, True),
    "densenet": functools.partial(DenseNet, 10, layers=(2, 2, 2), channels=1, growth_rate=4, small_images=True),
}


def theirs(name: str) -> nn.Module:
    extra = {"init_weights": False, "aux_logits": True} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **extra)


def randomise(network: nn.Module) -> nn.Module:
    """Give batch norms statistics that tell them apart."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return network.eval()


class TestTorchvision:
    @pytest.mark.parametrize("name", PAPERS)
    def test_names_shapes_and_parameter_counts_are_theirs(self, name):
        with torch.device("meta"):
            a, b = theirs(name), PAPERS[name]()
        shapes = {key: tensor.shape for key, tensor in a.state_dict().items()}
        prefix = "features." if name.startswith(("resnet", "googlenet")) else ""
        heads = ("fc.", "aux")
        assert shapes == {
            key if key.startswith(heads) else key.removeprefix(prefix): tensor.shape
            for key, tensor in b.state_dict().items()
        }
        assert sum(p.numel() for p in b.parameters()) == sum(p.numel() for p in a.parameters())

    @pytest.mark.parametrize("name", ["alexnet", "vgg11_bn", "googlenet", "resnet18", "resnet50", "densenet121"])
    def test_their_weights_give_the_same_logits(self, name, tmp_path):
        reference = randomise(theirs(name))
        torch.save(reference.state_dict(), tmp_path / "weights.pth")
        ours = PAPERS[name](weights=str(tmp_path / "weights.pth")).eval()
        images = torch.randn(2, 3, 224, 224) if name in ("alexnet", "vgg11_bn") else torch.randn(2, 3, 96, 128)
        with torch.no_grad():
            expected, found = reference(images), ours(images)
        assert (found - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
        assert expected.std() > 1e-3  # not all the same
        (tmp_path / "weights.pth").unlink()  # half a gigabyte, some of them

    def test_the_papers_resnets_for_small_pictures_have_its_sizes(self):
        sizes = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}  # millions, table 6
        for depth, millions in sizes.items():
            with torch.device("meta"):
                network = ResNet(10, depth, small_images=True, shortcut="padding")
            assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.035)
        convs = [
            m for m in ResNetFeatures(20, small_images=True, shortcut="padding").modules() if isinstance(m, nn.Conv2d)
        ]
        assert len(convs) == 19  # and the linear layer

    def test_googlenet_brings_pictures_to_the_range_that_torchvisions_weights_want(self):
        network = GoogLeNet(3, transform_input=True, auxiliary_weight=0).eval()
        network.features = nn.Identity()
        network.avgpool, network.fc = nn.Identity(), nn.Identity()
        images = torch.randn(2, 3, 8, 8)
        expected = torchvision.models.GoogLeNet(
            transform_input=True, aux_logits=False, init_weights=False
        )._transform_input(images)
        torch.testing.assert_close(network(images), expected.flatten(1))

    def test_googlenet_does_not_take_torchvisions_weights_without_it(self, tmp_path):
        file = tmp_path / "googlenet-1378be20.pth"
        torch.save(theirs("googlenet").state_dict(), file)
        with pytest.raises(InputError, match="set transform_input: true"):
            GoogLeNet(weights=str(file))
        GoogLeNet(weights=str(file), transform_input=True)
        with from_checkpoint():  # which brings its own
            GoogLeNet(weights=str(file))


class TestShapes:
    @pytest.mark.parametrize("size", [28, 32, 33, 47, 64])
    @pytest.mark.parametrize("name", [name for name in SMALL if name != "lenet"])
    def test_the_small_stem_takes_28_to_64_pixels(self, name, size):
        assert SMALL[name]().eval()(torch.rand(2, 1, size, size)).shape == (2, 10)

    @pytest.mark.parametrize("size", [(224, 224), (197, 231)])
    @pytest.mark.parametrize("name", ["alexnet", "googlenet", "resnet18", "densenet121"])
    def test_the_papers_stem_takes_odd_sizes(self, name, size):
        assert PAPERS[name](num_classes=4).eval()(torch.rand(1, 3, *size)).shape == (1, 4)

    def test_maps_shrink_as_the_docstrings_say(self):
        images = torch.rand(1, 3, 64, 64)
        assert ResNetFeatures(18, width=8)(images).shape == (1, 64, 2, 2)
        assert ResNetFeatures(18, width=8, small_images=True)(images).shape == (1, 64, 8, 8)
        assert ResNetFeatures(20, small_images=True)(images).shape == (1, 64, 16, 16)
        assert ResNetFeatures(50, width=8)(images).shape == (1, 256, 2, 2)


class TestWaysToRun:
    @pytest.mark.parametrize("name", [name for name in SMALL if name != "lenet"])
    def test_channels_last_reaches_the_last_maps_and_changes_no_result(self, name):
        torch.manual_seed(0)
        network = randomise(SMALL[name]())
        images = torch.rand(4, 1, 64, 64)
        expected = network(images)
        network.to(memory_format=torch.channels_last)
        maps = network.features(images)
        assert maps.shape[2] > 1  # of one pixel, both orders are the same
        assert maps.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)

    def test_what_would_crash_with_channels_last_runs_without(self, train):
        """An odd last batch, and a 1 x 1 convolution with a stride and 8 channels: torch 2.15 writes past its memory."""
        with pytest.warns(UserWarning, match="without channels_last: features.layer2.0.downsample.0 has a stride"):
            train(
                "--model.width=8", "--model.lr_scheduler.total_steps=100", experiment="experiments/fashion_resnet.yaml"
            )

    @pytest.mark.parametrize("name", ["lenet", "alexnet", "vgg_bn", "googlenet", "resnet", "densenet"])
    def test_compiled_in_half_precision_it_trains(self, name, tmp_path, monkeypatch):
        """The whole chain but for the last step, the C++ compiler, which takes a minute a network."""
        compiled = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", compiled)
        torch._dynamo.reset()
        network = SMALL[name](channels_last=True, compile=True, optimizer=functools.partial(torch.optim.SGD, lr=0.01))
        trainer = Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1, precision="bf16-mixed", logger=False,
                          enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")  # fmt: skip
        trainer.fit(network, MNIST(batch_size=8, val_size=53, eval_batch_size=8))
        assert network._compiled_call_impl is not None
        assert trainer.global_step == 2
        assert all(torch.isfinite(p).all() for p in network.parameters())
        assert set(network.state_dict()) == set(SMALL[name]().state_dict())

    def test_compiled_by_the_real_compiler_it_gives_the_same_logits(self):
        torch._dynamo.reset()
        network = randomise(SMALL["alexnet"]())
        images = torch.rand(4, 1, 28, 28)
        expected = network(images)
        network.compile()
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)

    def test_without_a_compiler_it_runs_and_says_so(self, train):
        torch._dynamo.reset()
        with (
            torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}),
            pytest.warns(UserWarning, match="not compiled, so it runs as it is: .*compiler"),
        ):
            train("--model.compile=true", "--trainer.max_epochs=1", "--model.lr_scheduler.total_steps=100",
                  experiment="experiments/fashion_resnet.yaml")  # fmt: skip

    def test_a_batch_of_one_trains_where_the_last_maps_are_large_enough(self):
        for name in ("alexnet", "vgg", "resnet", "resnet50", "densenet", "googlenet"):
            loss, _ = SMALL[name]().train().training_loss(torch.rand(1, 1, 32, 32), torch.zeros(1, dtype=torch.int64))
            loss.backward()

    def test_a_batch_of_one_that_batch_norm_cannot_take_says_why(self, capsys):
        argv = (
            "--data.batch_size=1",
            "--data.val_size=53",
            "--model.lr_scheduler.total_steps=1000",
            "--trainer.max_epochs=1",
        )
        for name in ("resnet", "googlenet"):  # with the stem for large pictures: maps of 14, 7, 4, 2 and 1 pixels
            assert main([f"experiments/fashion_{name}.yaml", *argv, "--model.small_images=false"]) == 2
            error = capsys.readouterr().err
            assert "cannot be trained on a batch of one picture of (28, 28)" in error
            assert "Traceback" not in error


class TestGoogLeNet:
    def test_auxiliary_heads_are_weighed_in_training_and_dropped_outside(self):
        torch.manual_seed(0)
        network = GoogLeNet(10, 1, 1 / 16, True, hidden=16, dropout=0.0, auxiliary_dropout=0.0).train()
        images, labels = torch.rand(4, 1, 28, 28), torch.arange(4)
        scores = network(images, with_auxiliary=True)
        assert [s.shape for s in scores] == [(4, 10)] * 3
        losses = [F.cross_entropy(s, labels) for s in scores]
        loss, logits = network.training_loss(images, labels)
        torch.testing.assert_close(loss, losses[0] + 0.3 * (losses[1] + losses[2]))
        torch.testing.assert_close(logits, scores[0])
        called = []
        for head in (network.aux1, network.aux2):
            head.register_forward_hook(lambda *_: called.append(1))
        network.eval()(images)
        assert not called

    def test_without_auxiliary_heads(self):
        network = GoogLeNet(10, 1, 1 / 16, True, auxiliary_weight=0)
        assert not any(name.startswith("aux") for name in network.state_dict())
        loss, _ = network.training_loss(torch.rand(4, 1, 28, 28), torch.arange(4))
        loss.backward()

    def test_heads_see_the_maps_behind_4a_and_4d(self):
        reference = randomise(theirs("googlenet"))
        ours = GoogLeNet().eval()
        ours.load_state_dict(
            {
                f"features.{k}" * (f"features.{k}" in ours.state_dict()) or k: v
                for k, v in reference.state_dict().items()
            }
        )
        taps = {"inception4a": "a", "inception4d": "d"}
        images = torch.randn(1, 3, 64, 64)
        maps = create_feature_extractor(reference, taps)(images)
        _, aux1, aux2 = ours(images, with_auxiliary=True)
        torch.testing.assert_close(aux1, reference.aux1(maps["a"]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(aux2, reference.aux2(maps["d"]), rtol=1e-4, atol=1e-5)


class TestWeights:
    def test_with_other_classes_the_last_layer_begins_anew(self, tmp_path):
        reference = theirs("resnet18")
        torch.save(reference.state_dict(), tmp_path / "w.pth")
        ours = ResNet(7, 18, weights=str(tmp_path / "w.pth"))
        assert torch.equal(ours.features.conv1.weight, reference.conv1.weight)
        assert ours.fc.weight.shape == (7, 512)
        assert ours.pretrained["file"] == "w.pth"
        assert len(ours.pretrained["sha256"]) == 64

    def test_a_checkpoint_of_ours_will_do(self, train):
        path = "experiments/fashion_resnet.yaml"
        argv = ("--model.width=4", "--model.lr_scheduler.total_steps=100", "--trainer.max_epochs=1")
        first = train(*argv, experiment=path)
        second = train(*argv, f"--model.weights={first / 'best.ckpt'}", experiment=path)
        assert main([str(second / "config.yaml"), "--ckpt", str(second / "best.ckpt")]) == 0
        (first / "best.ckpt").unlink()  # what began with it goes on without it
        assert main(["--verify", str(second / "receipt.json")]) == 0
        again = train("--resume", str(second), "--trainer.max_epochs=2", experiment="", tiny=())
        assert again == second
        assert json.loads((again / "receipt.json").read_text())["pretrained"]["file"] == "best.ckpt"

    def test_the_old_names_in_densenets_files(self, tmp_path):
        reference = theirs("densenet121").eval()
        old = {re.sub(r"(layer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in reference.state_dict().items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in old
        torch.save(old, tmp_path / "w.pth")
        ours = DenseNet(weights=str(tmp_path / "w.pth")).eval()
        images = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(ours(images), reference(images))

    def test_torchvisions_file_is_found_below_data_dir_before_anything_is_downloaded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        (tmp_path / "weights").mkdir()
        reference = theirs("resnet18")
        torch.save(reference.state_dict(), tmp_path / "weights" / "resnet18-f37072fd.pth")
        for name in ("IMAGENET1K_V1", "DEFAULT"):
            ours = ResNet(depth=18, weights=name)
            assert torch.equal(ours.fc.weight, reference.fc.weight)

    def test_of_several_the_first_that_is_there_counts(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        torch.save(theirs("resnet18").state_dict(), tmp_path / "mine.pth")
        assert ResNet(depth=18, weights=["none.pth", "mine.pth", "IMAGENET1K_V1"]).pretrained["file"] == "mine.pth"

    def test_a_download_goes_to_data_dir(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        asked = []

        def fetch(url, path, digest):
            asked.append(url)
            assert digest == "f37072fd"
            torch.save(theirs("resnet18").state_dict(), path)

        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        ResNet(depth=18, weights="IMAGENET1K_V1")
        ResNet(depth=18, weights="IMAGENET1K_V1")
        assert asked == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]
        assert (tmp_path / "data" / "weights" / "resnet18-f37072fd.pth").is_file()
        assert "downloading" in capsys.readouterr().out

    def test_without_a_network_one_line_names_the_file_and_the_folder(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

        def fetch(url, path, digest):
            raise OSError("no route to host")

        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        argv = ["--model.weights=IMAGENET1K_V1", "--model.small_images=false", "--model.channels=3", "--model.width=64"]
        assert main(["experiments/fashion_resnet.yaml", *argv]) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1
        assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in error
        assert str(tmp_path / "data" / "weights") in error
        assert not (tmp_path / "data").exists()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"depth": 18, "weights": "IMAGENET1K_V2"}, ["resnet18 has no 'IMAGENET1K_V2'", "did you mean 'IMAGENET1K_V1'"]),
            ({"depth": 18, "weights": "no/such.pth"}, ["not there", "no/such.pth", "DATA_DIR"]),
            ({"depth": 20, "weights": "IMAGENET1K_V1"}, ["must be a file"]),
            ({"depth": 34, "weights": "{tmp}/resnet18.pth"}, ["do not fit", "missing"]),
            ({"depth": 18, "weights": "{tmp}/resnet18.pth", "small_images": True}, ["conv1.weight", "(64, 3, 7, 7)", "(64, 3, 3, 3)"]),
            ({"depth": 18, "weights": "{tmp}/text.pth"}, ["cannot be read"]),
            ({"depth": 18, "weights": "{tmp}/list.pth"}, ["expected names and tensors"]),
            ({"depth": 18, "weights": "{tmp}/code.pth"}, ["cannot be read"]),
        ],
    )  # fmt: skip
    def test_what_cannot_be_used_is_told_in_one_line(self, arguments, words, tmp_path):
        torch.save(theirs("resnet18").state_dict(), tmp_path / "resnet18.pth")
        (tmp_path / "text.pth").write_text("no weights")
        torch.save([1, 2], tmp_path / "list.pth")
        torch.save({"run": print}, tmp_path / "code.pth")
        arguments = {**arguments, "weights": arguments["weights"].format(tmp=tmp_path)}
        with pytest.raises(InputError) as caught:
            ResNet(**arguments)
        assert len(str(caught.value).splitlines()) == 1
        assert not [word for word in words if word not in str(caught.value)]


class TestAirbench:
    def test_whitening_makes_patches_uncorrelated_and_of_variance_one(self):
        torch.manual_seed(0)
        images = torch.randn(50, 3, 16, 16) @ torch.rand(16, 16)  # neighbours that go together
        filters = whitening(images, epsilon=0.0)
        assert filters.shape == (24, 3, 2, 2)
        white = F.conv2d(images.double(), filters[:12]).permute(1, 0, 2, 3).flatten(1)  # (12, N)
        torch.testing.assert_close(
            white @ white.T / white.shape[1], torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0
        )
        assert torch.equal(filters[12:], -filters[:12])

    def test_views_are_averaged_outside_of_training(self):
        network = randomise(Airbench(widths=(8, 8, 8)))
        images = torch.rand(2, 3, 32, 32)
        padded = F.pad(images, (1,) * 4, mode="reflect")
        views = [images, images.flip(3)] * 2
        views += [v for moved in (padded[..., :32, :32], padded[..., 2:, 2:]) for v in (moved, moved.flip(3))]
        torch.testing.assert_close(network(images), torch.stack([network.scores(v) for v in views]).mean(dim=0))
        torch.testing.assert_close(network(images), network(images.flip(3)))
        network.average_views = False
        torch.testing.assert_close(network(images), network.scores(images))

    def test_biases_learn_faster_and_the_whitening_not_at_all(self):
        optimizer = functools.partial(torch.optim.SGD, lr=0.5, weight_decay=0.1)
        network = Airbench(widths=(8, 8, 8), optimizer=optimizer)
        weights, biases = network.configure_optimizers().param_groups
        assert (weights["lr"], weights["weight_decay"]) == (0.5, 0.1)
        assert (biases["lr"], biases["weight_decay"]) == (32, 0.1 / 64)
        assert len(biases["params"]) == 6
        held = {id(p) for group in (weights, biases) for p in group["params"]}
        assert {n for n, p in network.named_parameters() if id(p) not in held} == {
            "whiten.weight", *(f"features.{i}.{j}.weight" for i in (1, 2, 3) for j in (2, 5))
        }  # fmt: skip
