"""Transfer learning: what is frozen stays as it is, what is set free learns at its own rate, and a resume changes nothing."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from pytorch_lightning import Trainer
from test_train import receipt
from torch import nn

from callbacks.heat_maps import grad_cam
from datamodules.image_folder import ImageFolder
from lit_models.alexnet import AlexNetFeatures
from lit_models.densenet import DenseNetFeatures
from lit_models.resnet import ResNet, ResNetFeatures
from lit_models.transfer import Transfer, without_last_layer
from lit_models.vgg import VGGFeatures
from runner.errors import InputError
from runner.history import read_history
from train import main

EXPERIMENTS = {name: f"experiments/ants_bees_{name}.yaml" for name in ("feature_extraction", "finetune", "scratch")}
TINY = ("--data.image_size=32", "--data.num_workers=0", "--data.batch_size=4")


def small_backbone() -> nn.Module:
    return ResNetFeatures(18, width=4, small_images=True)


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


class TestBackbones:
    @pytest.mark.parametrize(
        "name", ["mobilenet_v2", "resnet18", "mnasnet0_5", "densenet121", "mobilenet_v3_small", "efficientnet_b0"]
    )
    def test_with_its_own_last_layer_it_is_torchvisions_classifier(self, name, tmp_path):
        torch.manual_seed(0)
        reference = torchvision.models.get_model(name, weights=None).eval()
        torch.save(reference.state_dict(), tmp_path / "w.pth")
        ours = Transfer(1000, name, weights=str(tmp_path / "w.pth")).eval()
        *_, last = (module for module in reference.modules() if isinstance(module, nn.Linear))
        ours.head.load_state_dict(last.state_dict())
        images = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), reference(images))

    @pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
    def test_networks_with_auxiliary_heads_as_torchvision_makes_them_of_its_files(self, name, tmp_path):
        torch.manual_seed(0)
        reference = torchvision.models.get_model(
            name, weights=None, init_weights=False, aux_logits=True, transform_input=True
        )
        torch.save(reference.state_dict(), tmp_path / "w.pth")
        ours = Transfer(1000, name, weights=str(tmp_path / "w.pth")).eval()
        ours.head.load_state_dict(reference.fc.state_dict())
        images = torch.rand(2, 3, 96, 96)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), reference.eval()(images))

    def test_a_vision_transformer_by_a_file_with_its_older_names(self, tmp_path):
        reference = torchvision.models.vit_b_32(weights=None).eval()
        new = reference.state_dict()
        old = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in new.items()}
        assert set(old) != set(new)
        torch.save(old, tmp_path / "w.pth")
        ours = Transfer(3, "vit_b_32", weights=str(tmp_path / "w.pth")).eval()
        assert all(torch.equal(v, new[k]) for k, v in ours.backbone.state_dict().items())
        assert ours(torch.rand(1, 3, 224, 224)).shape == (1, 3)

    @pytest.mark.parametrize(
        "features", [VGGFeatures(11, widths=(4,) * 5), AlexNetFeatures(widths=(4,) * 5), DenseNetFeatures((2, 2))]
    )
    def test_all_of_ours_can_be_backbones(self, features):
        assert Transfer(3, features).eval()(torch.rand(2, 3, 96, 96)).shape == (2, 3)

    def test_one_of_ours_with_the_weights_of_our_own_checkpoint(self, tmp_path):
        ours = ResNet(10, 18, width=4, small_images=True)
        torch.save({"state_dict": ours.state_dict()}, tmp_path / "best.ckpt")
        network = Transfer(2, small_backbone(), weights=str(tmp_path / "best.ckpt"))
        assert torch.equal(network.backbone.conv1.weight, ours.features.conv1.weight)
        images = torch.rand(2, 3, 32, 32)
        torch.testing.assert_close(
            network.eval().features(images), ours.eval().avgpool(ours.features(images)).flatten(1)
        )

    def test_one_of_ours_by_class_path(self, train):
        argv = (
            "--model.backbone=lit_models.resnet.ResNetFeatures",
            "--model.backbone.depth=18",
            "--model.backbone.width=4",
        )
        run = train(*argv, "--trainer.max_epochs=1", experiment=EXPERIMENTS["scratch"], tiny=TINY)
        assert main(["--verify", str(run / "receipt.json")]) == 0

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"backbone": "mobilenet_v4"}, ["no classifier 'mobilenet_v4'", "did you mean 'mobilenet_v"]),
            ({"backbone": "lit_models.resnet.ResNetFeatures"}, ["{class_path: lit_models.resnet.ResNetFeatures}"]),
            ({"backbone": "mobilenet_v2", "freeze": "all"}, ["give it weights, or freeze: none"]),
            ({"unfreeze_at": 2}, ["nothing to set free"]),
            ({"backbone": "squeezenet1_0"}, ["last layer of squeezenet1_0", "not linear"]),
            (
                {"freeze": "some", "weights": "weights/mobilenet_v2_features.pth"},
                ["expected all, none or up_to:<layer>, got 'some'"],
            ),
            (
                {"freeze": "up_to:features.99", "weights": "weights/mobilenet_v2_features.pth"},
                ["no layer 'features.99'"],
            ),
            ({"freeze": "up_to:", "weights": "weights/mobilenet_v2_features.pth"}, ["no layer ''"]),
            ({"unfreeze_at": 0}, ["unfreeze_at"]),
            ({"backbone_lr": 0}, ["backbone_lr must be above 0"]),
        ],
    )
    def test_what_cannot_be_used_is_told_in_one_line(self, arguments, words):
        with pytest.raises(InputError) as caught:
            Transfer(2, **{"backbone": "mobilenet_v2", "freeze": "none", **arguments})
        assert len(str(caught.value).splitlines()) == 1
        assert not [word for word in words if word not in str(caught.value)]


class TestFrozen:
    @pytest.mark.parametrize(("freeze", "frozen"), [("all", 20), ("none", 0), ("up_to:layer2", 10), ("up_to:bn1", 1)])
    def test_frozen_layers_stay_in_evaluation_mode_and_get_no_gradient(self, freeze, frozen):
        network = Transfer(2, small_backbone(), freeze=freeze)
        network.eval()
        network.train()  # as Lightning calls it
        assert [not norm.training for norm in norms(network)] == [i < frozen for i in range(20)]
        assert [not norm.weight.requires_grad for norm in norms(network)] == [i < frozen for i in range(20)]
        before = [norm.running_mean.clone() for norm in norms(network)]
        loss, _ = network.training_loss(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))
        loss.backward()
        after = [norm.running_mean for norm in norms(network)]
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i < frozen for i in range(20)]

    def test_the_learning_rates_are_the_heads_and_its_share(self):
        network = Transfer(2, small_backbone(), freeze="none", backbone_lr=0.25)
        groups = network.configure_optimizers().param_groups
        assert [(group["name"], group["lr"]) for group in groups] == [("head", 1e-3), ("backbone", 0.25e-3)]
        assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))

    def test_what_stays_frozen_is_left_out_of_the_optimiser(self):
        assert len(Transfer(2, small_backbone()).configure_optimizers().param_groups) == 1
        partly = Transfer(2, small_backbone(), freeze="up_to:layer3")
        held = {id(p) for group in partly.configure_optimizers().param_groups for p in group["params"]}
        assert held == {id(p) for p in partly.parameters() if p.requires_grad}

    def test_a_plateau_scheduler_will_do(self, train):
        argv = ["--model.lr_scheduler=pytorch_lightning.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/loss"]
        for freeze in ("all", "none"):
            train(
                *argv,
                f"--model.freeze={freeze}",
                "--trainer.max_epochs=1",
                experiment=EXPERIMENTS["feature_extraction"],
                tiny=TINY,
            )

    def test_a_schedule_that_levels_the_rates_is_an_error(self, capsys):
        argv = ["--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR", "--model.lr_scheduler.total_steps=100"]
        assert main([EXPERIMENTS["finetune"], *TINY, *argv, "--model.lr_scheduler.max_lr=0.01"]) == 2
        assert "give it a list of two, the head's first" in capsys.readouterr().err
        argv += ["--trainer.max_epochs=1", "--model.freeze=none", "--model.unfreeze_at=null"]
        assert main([EXPERIMENTS["finetune"], *TINY, *argv, "--model.lr_scheduler.max_lr=[0.01, 0.001]"]) == 0


class TestTwoStages:
    @pytest.fixture
    def arguments(self):
        return (
            *TINY,
            "--model.unfreeze_at=2",
            "--trainer.max_epochs=4",
            "--model.lr_scheduler.T_max=4",
            "--data.batch_size=5",
        )

    @staticmethod
    def weights(run: Path) -> dict:
        return torch.load(run / "last.ckpt", weights_only=True)["state_dict"]

    def test_first_the_head_alone_then_all_and_a_resume_ends_in_the_same_bits(self, train, arguments):
        begin = torch.load(Path(ImageFolder("hymenoptera").path).parent / "weights" / "mobilenet_v2_features.pth")
        path = EXPERIMENTS["finetune"]
        runs = {n: train(*arguments, f"--trainer.max_epochs={n}", experiment=path, tiny=()) for n in (1, 2, 3, 4)}
        name = "features.0.0.weight"
        for n in (1, 2):
            assert all(torch.equal(self.weights(runs[n])[f"backbone.{key}"], begin[key]) for key in begin)
        assert not torch.equal(self.weights(runs[3])[f"backbone.{name}"], begin[name])
        assert not torch.equal(self.weights(runs[3])["head.weight"], self.weights(runs[2])["head.weight"])
        for n in (1, 2, 3):  # before, at, and after the epoch that sets free
            resumed = train("--resume", str(runs[n]), "--trainer.max_epochs=4", experiment="", tiny=())
            expected, found = self.weights(runs[4]), self.weights(resumed)
            assert all(torch.equal(expected[key], found[key]) for key in expected)
            groups = torch.load(resumed / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
            assert [group["name"] for group in groups] == ["head", "backbone"]
            assert groups[1]["initial_lr"] == pytest.approx(0.1 * groups[0]["initial_lr"])

    def test_the_rates_of_both_groups_are_logged(self, train, arguments):
        run = train(*arguments, experiment=EXPERIMENTS["finetune"], tiny=())
        rates = {row["metric"]: row["value"] for row in read_history(run / "metrics.csv") if row["epoch"] == 0}
        assert rates["train/lr/backbone"] == pytest.approx(0.1 * rates["train/lr/head"])


class TestPrecomputedFeatures:
    @pytest.fixture
    def calls(self, monkeypatch):
        """Counts the pictures that the backbone sees."""
        seen = []
        features = Transfer.features
        monkeypatch.setattr(
            Transfer, "features", lambda self, images: (seen.append(len(images)), features(self, images))[1]
        )
        return seen

    def test_each_picture_goes_through_the_backbone_once(self, train, calls):
        train(*TINY, "--trainer.max_epochs=5", experiment=EXPERIMENTS["feature_extraction"], tiny=())
        # 6 to rehearse, 10 + 6 computed once, 6 tested, and 6 heat maps
        assert sum(calls) == 6 + 16 + 6 + 6

    def test_the_numbers_are_those_of_computing_them_every_epoch(self, train, calls):
        argv = (*TINY, "--trainer.max_epochs=3")
        fast = train(*argv, experiment=EXPERIMENTS["feature_extraction"], tiny=())
        few = len(calls)
        slow = train(*argv, "--model.precompute=false", experiment=EXPERIMENTS["feature_extraction"], tiny=())
        assert len(calls) - few > few
        a, b = (receipt(run)["metrics"] for run in (fast, slow))
        assert a == pytest.approx(b, rel=1e-4)

    def test_not_where_something_random_stands_before_them(self, train, calls):
        train(
            *TINY,
            "--trainer.max_epochs=2",
            "--data.augment=null",
            experiment=EXPERIMENTS["feature_extraction"],
            tiny=(),
        )
        assert sum(calls) == 6 + 2 * 16 + 6 + 6

    def test_in_half_precision_too(self, train, calls):
        argv = (*TINY, "--trainer.max_epochs=2", "--trainer.precision=bf16-true")
        train(*argv, experiment=EXPERIMENTS["feature_extraction"], tiny=())
        assert sum(calls) == 6 + 16 + 6 + 6

    def test_after_training_the_data_is_pictures_again(self):
        data = ImageFolder("hymenoptera", image_size=32, augment=[], num_workers=0, batch_size=5)
        arguments = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        for _ in range(2):
            Trainer(**arguments, enable_model_summary=False, accelerator="cpu").fit(Transfer(2, small_backbone()), data)
            assert next(iter(data.train_dataloader()))[0].shape == (5, 3, 32, 32)

    def test_stopped_and_resumed_it_ends_in_the_same_bits(self, train):
        path = EXPERIMENTS["feature_extraction"]
        whole = train(*TINY, "--trainer.max_epochs=3", experiment=path, tiny=())
        part = train(*TINY, "--trainer.max_epochs=1", experiment=path, tiny=())
        resumed = train("--resume", str(part), "--trainer.max_epochs=3", experiment="", tiny=())
        a, b = (TestTwoStages.weights(run) for run in (whole, resumed))
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert main(["--verify", str(resumed / "receipt.json")]) == 0


class TestReceipt:
    def test_it_names_the_weights_and_the_folder_tested(self, train):
        run = train(*TINY, "--trainer.max_epochs=1", experiment=EXPERIMENTS["feature_extraction"], tiny=())
        said = json.loads((run / "receipt.json").read_text())
        assert said["pretrained"]["file"] == "mobilenet_v2_features.pth"
        assert "val" in json.dumps(said["data"])
        assert said["tested"] == said["data"]["test"] == 6

    def test_weights_that_are_nowhere_are_one_line(self, tmp_path, monkeypatch, capsys):
        import shutil

        data = ImageFolder("hymenoptera").path
        shutil.copytree(data, tmp_path / "data" / "hymenoptera")
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

        def fail(*_):
            raise OSError("no route to host")

        monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
        assert main([EXPERIMENTS["finetune"], *TINY]) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1
        assert "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth" in error


class TestHeatMaps:
    def test_only_what_speaks_for_the_class_is_hot(self):
        """Maps that are the picture itself: the heat is where the picture is bright, and where its weight is positive."""

        class Sum(ResNet):
            def __init__(self):
                super().__init__(2, 18, width=4)
                self.features = nn.Conv2d(1, 1, 1, bias=False)
                nn.init.ones_(self.features.weight)

            def forward(self, images):
                total = self.features(images).sum(dim=(1, 2, 3))
                return torch.stack([total, -total], dim=1)

        images = torch.zeros(2, 1, 8, 8)
        images[0, 0, 2, 3], images[1, 0, 5, 5] = 4.0, -4.0  # class 0 for what is bright, class 1 for what is dark
        heat = grad_cam(Sum(), images)
        for i, place in enumerate([(2, 3), (5, 5)]):
            assert heat[i].argmax() == place[0] * 8 + place[1]
            assert heat[i].sum() == 1

    def test_a_network_without_maps_has_none(self):
        class Flat(nn.Module):
            def forward(self, images):
                return images.flatten(1)

        assert grad_cam(Flat(), torch.rand(2, 3, 4, 4)) is None

    def test_of_a_compiled_network_they_are_the_same(self):
        torch._dynamo.reset()
        torch.manual_seed(0)
        network = Transfer(2, small_backbone()).eval()
        images = torch.rand(2, 3, 32, 32)
        expected = grad_cam(network, images)
        network.compile(backend="aot_eager")
        network(images)
        assert torch.equal(grad_cam(network, images), expected)

    @pytest.mark.pictures
    def test_they_are_drawn(self, train):
        run = train(*TINY, "--trainer.max_epochs=1", experiment=EXPERIMENTS["finetune"], tiny=())
        names = {path.stem for path in (run / "pictures").glob("*.png")}
        assert names == {"predictions", "confusion_matrix", "filters", "heat_maps", "curves"}


def test_hooks_and_gradients_leave_nothing_behind():
    network = Transfer(2, small_backbone())
    grad_cam(network, torch.rand(1, 3, 32, 32))
    assert not any(module._forward_hooks for module in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_without_last_layer_tells_what_it_was():
    _, width, name = without_last_layer("mobilenet_v2")
    assert (width, name) == (1280, "classifier.1")


def test_memorises_a_batch():
    torch.manual_seed(0)
    network = Transfer(3, small_backbone(), freeze="none", backbone_lr=1.0)
    images, labels = torch.rand(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(30):
        loss, _ = network.training_loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
