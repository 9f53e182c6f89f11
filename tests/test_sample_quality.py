"""The judge of samples, and the numbers it gives."""

import math

import pytest
import torch
from conftest import write_mnist
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid

from datamodules.lines import Line
from datamodules.mnist import MNIST
from lit_models import sample_quality
from lit_models.lenet import LeNet
from lit_models.sample_quality import class_shares, find_judge, frechet_distance
from runner.errors import InputError


def features(n: int, seed: int, d: int = 6) -> torch.Tensor:
    """Correlated numbers (n, d) whose mean and spread come from the seed."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    return mixed + torch.randn(d, generator=g, dtype=torch.float64)


class TestFrechetDistance:
    def test_of_one_dimension_is_that_of_means_and_deviations(self):
        a, b = features(50, 0, d=1), features(70, 1, d=1)
        expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
        assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)

    def test_of_independent_dimensions_is_the_sum_of_theirs(self):
        points = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]).double()
        a, b = points * torch.tensor([1.0, 2, 3]), points * torch.tensor([4.0, 1, 3]) + torch.tensor([0.5, -1, 2])
        deviation = math.sqrt(2 / 5)  # of a coordinate of the points
        expected = deviation**2 * (3**2 + 1**2 + 0**2) + 0.5**2 + 1**2 + 2**2
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("seeds", [(0, 1), (2, 3), (4, 5)])
    def test_equals_the_formula_with_a_matrix_root_and_torchmetrics(self, seeds):
        a, b = (features(200 + 30 * i, seed) for i, seed in enumerate(seeds))
        (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(dim=0), torch.cov(x.T)) for x in (a, b))
        root = torch.from_numpy(sqrtm((cov_a @ cov_b).numpy()).real)
        expected = (mean_a - mean_b).square().sum() + (cov_a + cov_b - 2 * root).trace()
        assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
        assert frechet_distance(a, b) == pytest.approx(float(_compute_fid(mean_a, cov_a, mean_b, cov_b)), rel=1e-6)

    def test_is_symmetric_and_zero_to_itself(self):
        a, b = features(40, 0), features(30, 1)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
        assert 0 <= frechet_distance(a, a.clone()) < 1e-9

    def test_single_precision_is_summed_in_double(self):
        a, b = features(500, 0).float() + 1000, features(500, 1).float() + 1000
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(a.double() - 1000, b.double() - 1000), rel=1e-6)

    def test_fewer_pictures_than_features_and_features_that_are_never_on(self):
        a, b = features(3, 0, d=20), features(4, 1, d=20)
        a[:, 5] = b[:, 5] = 0
        forwards, backwards = frechet_distance(a, b), frechet_distance(b, a)
        assert forwards == pytest.approx(backwards, rel=1e-6)
        assert forwards > float((a.mean(dim=0) - b.mean(dim=0)).square().sum())

    def test_a_single_picture_is_a_point(self):
        a, b = features(1, 0), features(30, 1)
        expected = (a[0] - b.mean(dim=0)).square().sum() + torch.cov(b.T).trace()
        assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
        assert frechet_distance(a, a + 1) == pytest.approx(6)

    @pytest.mark.parametrize("odd", [math.nan, math.inf])
    def test_of_samples_of_a_net_that_diverged_is_no_number(self, odd):
        a = features(10, 0)
        a[3, 2] = odd
        assert math.isnan(frechet_distance(a, features(10, 1)))


def test_shares_count_each_sample_once_and_absent_classes_too():
    probabilities = torch.tensor([[0.6, 0.4, 0], [0.2, 0.8, 0], [0.9, 0.1, 0], [0.5, 0.3, 0.2]])
    assert class_shares(probabilities) == [0.75, 0.25, 0]


def test_sample_quality_by_hand():
    probabilities = torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.9, 0.1], [0.5, 0.5]])
    seen, real = features(4, 0), features(9, 1)
    quality = sample_quality.sample_quality(seen, probabilities, real, asked=torch.tensor([0, 1, 1, 0]))
    assert quality == pytest.approx(
        {"frechet": frechet_distance(seen, real), "confidence": 0.7, "least_class": 0.25, "right_class": 0.75}
    )
    assert "right_class" not in sample_quality.sample_quality(seen, probabilities, real)


# -- the judge -------------------------------------------------------------------------------------------------------


@pytest.fixture
def data() -> MNIST:
    data = MNIST(batch_size=32, val_size=53)
    data.setup()
    return data


@pytest.fixture
def untrainable(monkeypatch):
    """To see that what was kept is used."""

    def fail(*_):
        raise AssertionError("trained again")

    return lambda: monkeypatch.setattr(sample_quality, "train", fail)


def test_a_judge_learns_its_data(tmp_path, monkeypatch, capsys):
    write_mnist(tmp_path / "more", train=2053)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "more"))
    data = MNIST(batch_size=32, val_size=53)
    data.setup()
    judge = find_judge(data)
    images, labels = data.test_set.tensors
    features, probabilities = judge.look(sample_quality.as_pixels(images))
    assert features.shape == (103, 84)
    assert (probabilities.argmax(dim=1) == labels).float().mean() > 0.95
    assert "judge: a LeNet learns to tell 2,000 pictures apart, once: " in capsys.readouterr().out


def test_features_are_the_last_hidden_layer():
    torch.manual_seed(0)
    network, images = LeNet(), torch.rand(5, 1, 28, 28)
    expected = network.eval()(images).softmax(dim=1)
    head = network.fc3
    features, probabilities = sample_quality.Judge(network).look(images)
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(head(features).softmax(dim=1), expected)
    assert not any(p.requires_grad for p in network.parameters())


def test_what_the_judge_sees_does_not_depend_on_the_runs_precision(data):
    judge, images = find_judge(data), torch.rand(5, 1, 28, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = judge.look(images)
    assert mixed[0].dtype == mixed[1].dtype == torch.float32
    assert all(map(torch.equal, mixed, judge.look(images)))


def test_a_judge_is_trained_once_and_the_same_whatever_the_seed(data, untrainable, tmp_path):
    torch.manual_seed(1)
    first = find_judge(data)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)  # it took none of the run's random numbers
    (path,) = (tmp_path / "runs" / "judges").iterdir()
    path.rename(tmp_path / "kept.pth")
    torch.manual_seed(2)
    assert find_judge(data).sha256 == first.sha256
    assert path.exists()
    untrainable()
    assert find_judge(data).sha256 == first.sha256


def test_other_data_has_another_judge(data, tmp_path):
    find_judge(data)
    other = MNIST(batch_size=32, val_size=54)
    other.setup()
    find_judge(other)
    assert len(list((tmp_path / "runs" / "judges").iterdir())) == 2


def test_a_damaged_judge_is_trained_anew(data, tmp_path):
    first = find_judge(data)
    (path,) = (tmp_path / "runs" / "judges").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="cannot be read, and is trained anew"):
        assert find_judge(data).sha256 == first.sha256


def test_a_judge_that_cannot_be_kept_judges_all_the_same(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept in"):
        assert find_judge(data)


def a_checkpoint(path, network) -> str:
    torch.save({"state_dict": network.state_dict(), "epoch": 0}, path)
    return str(path)


def test_a_checkpoint_of_ours_judges(data, untrainable, tmp_path, monkeypatch):
    untrainable()
    monkeypatch.setattr(sample_quality, "LEAST_ACC", 0.0)
    torch.manual_seed(3)
    network, images = LeNet(), torch.rand(5, 1, 28, 28)
    expected = network(images).softmax(dim=1)
    judge = find_judge(data, a_checkpoint(tmp_path / "best.ckpt", network))
    torch.testing.assert_close(judge.look(images)[1], expected)


def test_a_checkpoint_that_does_not_know_the_data_is_refused(data, tmp_path):
    torch.manual_seed(0)
    with pytest.raises(InputError, match=r"tells only \d+\.\d% of MNIST's real pictures right"):
        find_judge(data, a_checkpoint(tmp_path / "best.ckpt", LeNet()))


def test_a_checkpoint_of_other_sizes_is_refused(data, tmp_path):
    with pytest.raises(InputError, match=r"^judge: weights .* do not fit: fc3"):
        find_judge(data, a_checkpoint(tmp_path / "best.ckpt", LeNet(num_classes=7)))


def test_a_checkpoint_with_code_in_it_is_refused(data, tmp_path):
    torch.save({"state_dict": print}, tmp_path / "best.ckpt")
    with pytest.raises(InputError, match=r"^judge: weights .* cannot be read"):
        find_judge(data, str(tmp_path / "best.ckpt"))


def test_a_checkpoint_that_is_not_there_is_named(data):
    with pytest.raises(InputError, match=r"^judge: weights are not there.*nowhere\.ckpt"):
        find_judge(data, "runs/nowhere.ckpt")


def test_data_without_pictures_has_no_judge():
    with pytest.raises(InputError, match="Line has none"):
        find_judge(Line())
