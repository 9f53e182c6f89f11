"""DeiT learns from a teacher, which stays what it was, and is nowhere in the student."""

import copy
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lit_models.deit import DeiT, find_teacher, load_teacher
from lit_models.lenet import LeNet
from lit_models.resnet import ResNet
from runner.errors import InputError
from train import main

small = functools.partial(DeiT, num_classes=10, image_size=28, patch=7, channels=1, layers=2, heads=2, width=16)
TEACHER = ("--model.width=4", "--data.val_size=53", "--trainer.max_epochs=1")
STUDENT = ("--model.layers=1", "--model.width=16", "--model.patch=7", "--data.val_size=53", "--trainer.max_epochs=1")
EXPERIMENT = "experiments/fashion_deit.yaml"


def shaken(network: DeiT) -> DeiT:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def taught(**arguments) -> DeiT:
    """A student with a teacher, without files."""
    network = shaken(small(**arguments))
    torch.manual_seed(2)
    network._teacher = [ResNet(10, 18, 1, 4, True).requires_grad_(False).eval()]
    return network


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("teacher")


@pytest.fixture
def teacher_run(train, shelf, tmp_path) -> Path:
    """A finished run of fashion_resnet among this test's runs; it is trained once for all tests."""
    if not list(shelf.iterdir()):
        run = train(*TEACHER, experiment="experiments/fashion_resnet.yaml", tiny=())
        shutil.copytree(run, shelf / run.name)
        shutil.rmtree(tmp_path / "runs")
    (kept,) = shelf.iterdir()
    return Path(shutil.copytree(kept, tmp_path / "runs" / "fashion_resnet" / kept.name))


class TestLoss:
    def test_hard(self):
        network, images, labels = taught(alpha=0.3, label_smoothing=0.1), torch.rand(5, 1, 28, 28), torch.arange(5)
        own, distilled = network(images, both=True)
        said = network._teacher[0](images).argmax(dim=1)
        expected = 0.7 * F.cross_entropy(own, labels, label_smoothing=0.1) + 0.3 * F.cross_entropy(distilled, said)
        loss, logits = network.training_loss(images, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(logits, network(images))
        assert not torch.allclose(own, distilled, atol=1e-3)

    def test_soft(self):
        network, images, labels = (
            taught(distillation="soft", temperature=2.0),
            torch.rand(5, 1, 28, 28),
            torch.arange(5),
        )
        own, distilled = network(images, both=True)
        p, q = ((x / 2).softmax(dim=1) for x in (network._teacher[0](images), distilled))
        divergence = (p * (p / q).log()).sum(dim=1).mean()
        expected = 0.5 * F.cross_entropy(own, labels) + 0.5 * 4 * divergence
        torch.testing.assert_close(network.training_loss(images, labels)[0], expected)
        assert network.distillation_loss(distilled, distilled).item() == pytest.approx(0, abs=1e-6)

    def test_without_a_teacher_both_tokens_learn_from_the_labels(self):
        network, images, labels = shaken(small()), torch.rand(5, 1, 28, 28), torch.arange(5)
        expected = sum(F.cross_entropy(logits, labels) for logits in network(images, both=True)) / 2
        torch.testing.assert_close(network.training_loss(images, labels)[0], expected)

    def test_the_teacher_sees_the_mixed_pictures(self):
        network, seen = taught(mixup=1.0), []
        network._teacher[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        images, labels = torch.rand(4, 1, 28, 28), torch.arange(4)
        torch.manual_seed(0)
        network.training_loss(images, labels)
        torch.manual_seed(0)
        assert torch.equal(seen[0], network.mix(images, labels)[0])

    def test_each_token_has_its_own_lesson(self):
        """With all of the loss the teacher's, the class token's head learns nothing."""
        network = taught(alpha=1.0)
        network.training_loss(torch.rand(4, 1, 28, 28), torch.arange(4))[0].backward()
        assert not network.head.weight.grad.any()
        assert network.distillation_head.weight.grad.any()


class TestTeacherIsNoPart:
    def test_it_is_neither_counted_nor_saved_nor_trained_nor_copied(self):
        plain, network = small(), taught()
        assert network.state_dict().keys() == plain.state_dict().keys()
        assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in plain.parameters())
        assert copy.deepcopy(network)._teacher == []
        teacher = network._teacher[0]
        before = copy.deepcopy(teacher.state_dict())
        network.train()
        assert not teacher.training
        network.training_loss(torch.rand(4, 1, 28, 28), torch.arange(4))[0].backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert all(
            torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items()
        )  # batch norms, too


class TestRun:
    def test_a_student_of_the_newest_finished_run(self, train, teacher_run, tmp_path):
        unfinished = teacher_run.parent / "99991231-235959-s1-aaaaaaaa"
        unfinished.mkdir()
        (unfinished / "best.ckpt").write_bytes(b"half a checkpoint")
        callback = '--trainer.callbacks=[{"class_path": "callbacks.averaged_weights.AveragedWeights"}]'
        run = train(*STUDENT, callback, "--trainer.precision=bf16-mixed", experiment=EXPERIMENT, tiny=())
        saved = torch.load(run / "best.ckpt", weights_only=True)
        assert saved["teacher"]["file"] == str(teacher_run / "best.ckpt")
        said = json.loads((run / "receipt.json").read_text())
        assert said["parameters"] == sum(t.numel() for t in saved["state_dict"].values())
        teacher = torch.load(teacher_run / "best.ckpt", weights_only=True)["state_dict"]
        assert not saved["state_dict"].keys() & (teacher.keys() - {"head.weight", "head.bias"})
        # tested and verified without it, and resumed only with the very same
        shutil.move(teacher_run, tmp_path / "away")
        assert main(["--verify", str(run / "receipt.json")]) == 0

    def test_a_resumed_run_goes_on_with_the_teacher_it_began_with(self, train, teacher_run):
        run = train(*STUDENT, experiment=EXPERIMENT, tiny=())
        newer = teacher_run.parent / "99991231-235959-s1-aaaaaaaa"
        shutil.copytree(teacher_run, newer)
        saved = torch.load(newer / "best.ckpt", weights_only=True)
        saved["epoch"] = 7  # another file
        torch.save(saved, newer / "best.ckpt")
        assert find_teacher("fashion_resnet/best.ckpt") == newer / "best.ckpt"
        assert main([EXPERIMENT, *STUDENT[:-1], "--resume", str(run), "--trainer.max_epochs=2"]) == 0
        told = torch.load(run / "last.ckpt", weights_only=True)["teacher"]["file"]
        assert told == str(teacher_run / "best.ckpt")

    def test_without_a_teacher_one_line_says_how_to_make_one(self, capsys, tmp_path):
        assert main([EXPERIMENT, *STUDENT]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert "python train.py experiments/fashion_resnet.yaml" in line
        assert not list((tmp_path / "runs").glob("fashion_deit/*"))

    def test_another_normalisation_is_one_line(self, teacher_run, capsys):
        assert main([EXPERIMENT, *STUDENT, "--data.normalize=[0.5, 0.5]"]) == 2
        assert "normalize [0.286, 0.353], and the student has [0.5, 0.5]" in capsys.readouterr().err

    def test_a_teacher_of_other_data_is_a_warning(self, train):
        teacher = train(
            *TEACHER, "--data=datamodules.mnist.MNIST", experiment="experiments/fashion_resnet.yaml", tiny=()
        )
        name = f"--model.teacher={teacher / 'best.ckpt'}"
        with pytest.warns(UserWarning, match="was trained on other data"):
            train(*STUDENT, name, experiment=EXPERIMENT, tiny=())


class TestLoading:
    def test_its_answers_are_those_it_gave(self, teacher_run):
        network, checkpoint = load_teacher(teacher_run / "best.ckpt")
        assert type(network) is ResNet
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        assert all(torch.equal(checkpoint["state_dict"][name], t) for name, t in network.state_dict().items())

    def test_what_is_no_classifier_of_ours_is_one_line(self, teacher_run, tmp_path):
        good = torch.load(teacher_run / "best.ckpt", weights_only=True)

        def changed(**settings) -> dict:
            return {**good, "hyper_parameters": {**good["hyper_parameters"], **settings}}

        bad = {
            "no checkpoint": [1, 2],
            "code": {**good, "run": print},
            "other": changed(_class_path="subprocess.Popen"),
            "nested": changed(shortcut={"class_path": "os.system", "init_args": {"command": "true"}}),
            "no classifier": changed(_class_path="lit_models.transformer.TransformerLM"),
            "gone": changed(_class_path="lit_models.resnet.Gone"),
            "shapes": changed(width=8),
        }
        for name, content in bad.items():
            torch.save(content, tmp_path / "bad.ckpt")
            with pytest.raises(InputError, match=r"teacher .*bad\.ckpt") as caught:
                load_teacher(tmp_path / "bad.ckpt")
            assert "\n" not in str(caught.value), name

    def test_other_classes_are_one_line(self, tmp_path, teacher_run):
        with pytest.raises(InputError, match="10 classes apart, and the student 3"):
            small(num_classes=3).set_teacher(teacher_run / "best.ckpt")

    def test_a_path_that_is_nowhere_is_one_line(self):
        with pytest.raises(InputError, match=r"no/such\.ckpt is not there"):
            find_teacher("some/no/such.ckpt")


@pytest.mark.parametrize(("arguments", "words"), [({"alpha": 1.5}, "alpha"), ({"temperature": 0.0}, "temperature"),
                                                  ({"distillation": "warm"}, "hard or soft"), ({"loss": "mse"}, "cross_entropy")])  # fmt: skip
def test_a_wrong_argument_is_one_line(arguments, words):
    with pytest.raises(InputError, match=words):
        small(**arguments)


def test_weights_of_another_picture_size_are_taken(tmp_path):
    network = shaken(small())
    torch.save(network.state_dict(), tmp_path / "deit.pth")
    larger = small(image_size=56, weights=str(tmp_path / "deit.pth")).eval()
    assert larger.positions.shape == (1, 66, 16)
    images = torch.rand(2, 1, 56, 56)
    torch.testing.assert_close(larger(images), network(images))


def test_rollout_has_neither_token():
    assert shaken(small()).rollout(torch.rand(2, 1, 28, 28)).shape == (2, 4, 4)


@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_memorises_a_batch(distillation):
    network = taught(distillation=distillation, alpha=0.1).train()
    images, labels = torch.rand(6, 1, 28, 28), torch.arange(6)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(60):
        loss, _ = network.training_loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(network(images, both=True)[0].argmax(dim=1), labels)


def test_a_batch_of_one_trains():
    network = taught(cutmix=1.0).train()
    loss, _ = network.training_loss(torch.rand(1, 1, 28, 28), torch.tensor([3]))
    loss.backward()
    assert loss.isfinite()


def test_compiled_it_is_the_same():
    torch._dynamo.reset()
    network, images = taught(), torch.rand(2, 1, 28, 28)
    expected, loss = network(images), network.training_loss(images, torch.tensor([1, 2]))[0]
    network.compile(backend="aot_eager", dynamic=False)
    torch.testing.assert_close(network(images), expected)
    torch.testing.assert_close(network.training_loss(images, torch.tensor([1, 2]))[0], loss)


def test_lenet_may_teach_too(train):
    """Any classifier: one whose arguments are other ones."""
    run = train("--data.val_size=53", "--trainer.max_epochs=1", experiment="experiments/mnist_lenet.yaml", tiny=())
    assert type(load_teacher(run / "best.ckpt")[0]) is LeNet
