"""The regressors: each learns, agrees with its reference, survives its edge cases; manual optimisation breaks nothing."""

import functools
import itertools
import json
import re

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from test_train import receipt

import lit_models.two_layer_net as forms
from datamodules.curves import NoisyPolynomial
from datamodules.random_pairs import RandomPairs
from lit_models.curve_fitting import CurveFitting
from lit_models.linear_regression import LineAutograd, LineByHand, LineModule
from lit_models.schedules import WarmupCosine
from runner.errors import InputError
from runner.history import read_history
from train import main

ADAM = functools.partial(torch.optim.Adam, lr=0.01)
SMALL = {"inputs": 6, "hidden": 16, "outputs": 2}
LINES = {"by hand": LineByHand, "autograd": LineAutograd, "module": LineModule}
BY_HAND = {
    "tensors": functools.partial(forms.Tensors, **SMALL, lr=2e-3),
    "autograd": functools.partial(forms.Autograd, **SMALL, lr=2e-3),
    "function": functools.partial(forms.CustomFunction, **SMALL, lr=2e-2),
    "sequential": functools.partial(forms.SequentialByHand, **SMALL, lr=1e-2),
    "static graph": functools.partial(forms.StaticGraph, **SMALL, lr=2e-3, compile=False),
}
WITH_OPTIMIZER = {
    "optimizer": functools.partial(forms.SequentialOptimizer, **SMALL, optimizer=ADAM),
    "module": functools.partial(forms.TwoLayerModule, **SMALL, optimizer=functools.partial(torch.optim.SGD, lr=0.1)),
    "container": functools.partial(forms.Container, **SMALL, optimizer=ADAM),
}
TWO_LAYER = {**BY_HAND, **WITH_OPTIMIZER}


def fit(model, data, epochs: int, **trainer) -> Trainer:
    trainer = Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, accelerator="cpu", **trainer)  # fmt: skip
    trainer.fit(model, data)
    return trainer


def pairs(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, SMALL["inputs"], generator=generator), torch.randn(n, SMALL["outputs"], generator=generator)


class TestTwoLayerNet:
    @pytest.mark.parametrize("name", TWO_LAYER)
    def test_one_batch_is_memorised(self, name):
        torch.manual_seed(0)
        model, data = TWO_LAYER[name](), RandomPairs(pairs=8, inputs=6, outputs=2)
        errors = []
        model.log_train = lambda batch_idx, samples, mse: errors.append(float(mse.detach()) / samples)
        fit(model, data, 1000)
        if name == "static graph":  # the choice of weights by the loss makes it jump: its docstring says so
            assert min(errors) < 0.5 < errors[0]
        else:
            assert errors[-1] < errors[0] / 20

    @pytest.mark.parametrize("name", TWO_LAYER)
    @pytest.mark.parametrize("n", [1, 3])
    def test_small_batches_train(self, name, n):
        model = TWO_LAYER[name]()
        before = [p.clone() for p in model.parameters()]
        fit(model, RandomPairs(pairs=n, inputs=6, outputs=2), 2)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def test_by_hand_and_autograd_follow_the_same_losses(self):
        """In the lecture's size, from the same start."""
        torch.manual_seed(0)
        a = forms.Tensors()
        b = forms.Autograd()
        b.load_state_dict(a.state_dict())
        x, y = torch.randn(64, 1000), torch.randn(64, 10)
        losses = [[float((m.descend(x, y) - y).detach().square().sum()) for _ in range(200)] for m in (a, b)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        assert losses[0][-1] < losses[0][0] / 1e4

    def test_by_hand_follows_the_lectures_numpy_loop(self):
        torch.manual_seed(0)
        model = forms.Tensors(**SMALL, lr=1e-3).double()
        x, y = (t.double() for t in pairs())
        w1, w2 = model.w1.numpy().copy(), model.w2.numpy().copy()
        for _ in range(20):
            model.descend(x, y)
            h = x.numpy() @ w1
            r = np.maximum(h, 0)
            grad_y = 2 * (r @ w2 - y.numpy())
            grad_w2 = r.T @ grad_y
            grad_w1 = x.numpy().T @ (grad_y @ w2.T * (h > 0))
            w1, w2 = w1 - 1e-3 * grad_w1, w2 - 1e-3 * grad_w2
        np.testing.assert_allclose(model.w1.numpy(), w1, rtol=1e-10)
        np.testing.assert_allclose(model.w2.numpy(), w2, rtol=1e-10)

    def test_the_sigmoid_has_the_gradient_of_its_differences(self):
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(forms.Sigmoid.apply, x)
        torch.testing.assert_close(forms.Sigmoid.apply(x), torch.sigmoid(x))

    @pytest.mark.parametrize("name", BY_HAND)
    def test_a_step_by_hand_goes_down_the_gradient_of_finite_differences(self, name):
        torch.manual_seed(0)
        model = BY_HAND[name]().double()
        x, y = (t.double() for t in pairs())
        start = {n: p.detach().clone() for n, p in model.named_parameters()}

        def loss() -> float:
            with torch.no_grad():
                return float((model(x) - y).square().sum())

        gradient = {}
        for n, p in model.named_parameters():
            gradient[n] = torch.zeros_like(p)
            for i in range(0, p.numel(), 7):
                values = []
                for nudge in (1e-6, -1e-6):
                    p.data.view(-1)[i] += nudge
                    values.append(loss())
                    p.data.view(-1)[i] -= nudge
                gradient[n].view(-1)[i] = (values[0] - values[1]) / 2e-6
        model.descend(x, y)
        for n, p in model.named_parameters():
            moved = ((start[n] - p) / model.lr).view(-1)[::7]
            torch.testing.assert_close(moved, gradient[n].view(-1)[::7], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", WITH_OPTIMIZER)
    def test_lightnings_loop_is_the_lectures_loop(self, name):
        torch.manual_seed(0)
        ours, data = WITH_OPTIMIZER[name](), RandomPairs(pairs=8, inputs=6, outputs=2)
        theirs = WITH_OPTIMIZER[name]()
        theirs.load_state_dict(ours.state_dict())
        fit(ours, data, 20)
        x, y = next(iter(data.train_dataloader()))
        optimizer = theirs.optimizer(theirs.parameters())
        for _ in range(20):
            loss = torch.nn.functional.mse_loss(theirs(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_the_container_multiplies_two_linear_maps(self):
        block = forms.ParallelBlock(3, 2)
        x = torch.randn(5, 3)
        expected = (x @ block.linear1.weight.T + block.linear1.bias) * (x @ block.linear2.weight.T + block.linear2.bias)
        torch.testing.assert_close(block(x), expected)

    @pytest.mark.parametrize(("last_loss", "moves", "stays"), [(4.9, "w2a", "w2b"), (5.0, "w2b", "w2a")])
    def test_the_static_graph_chooses_by_the_last_loss(self, last_loss, moves, stays):
        model = BY_HAND["static graph"]()
        model.last_loss.fill_(last_loss)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        x, y = pairs()
        predictions = model.descend(x, y).detach()
        torch.testing.assert_close(predictions, (x @ before["w1"]).clamp(min=0) @ before[moves])
        assert not torch.equal(getattr(model, moves), before[moves])
        assert torch.equal(getattr(model, stays), before[stays])
        assert float(model.last_loss) == pytest.approx(float((predictions - y).square().sum()), rel=1e-6)

    def test_compiled_it_is_one_graph_with_the_same_losses(self, capsys):
        torch.manual_seed(0)
        eager = BY_HAND["static graph"]()
        fast = forms.StaticGraph(**SMALL, lr=2e-3)
        fast.load_state_dict(eager.state_dict())
        x, y = pairs()
        for _ in range(20):
            torch.testing.assert_close(fast.descend(x, y), eager.descend(x, y), rtol=1e-4, atol=1e-4)
        assert "compiling" in capsys.readouterr().out
        assert fast.graph != fast.predict_and_lose, "it fell back to running as it is"

    def test_without_a_compiler_it_runs_and_says_so(self):
        import torch._inductor.config

        torch._dynamo.reset()
        model = forms.StaticGraph(**SMALL, lr=2e-3)
        with (
            torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}),
            pytest.warns(UserWarning, match="not compiled, so it runs as it is: .*compiler"),
        ):
            model.descend(*pairs())
        torch._dynamo.reset()
        assert model.graph == model.predict_and_lose


class TestLine:
    def test_by_hand_gives_the_notes_numbers(self, train):
        run = train(experiment="experiments/line_by_hand.yaml", tiny=())
        weights = torch.load(run / "best.ckpt", weights_only=True)["state_dict"]
        assert float(weights["b"]) == pytest.approx(3.2940507061348856, abs=1e-9)
        assert float(weights["w"]) == pytest.approx(1.8881539583398386, abs=1e-9)
        assert receipt(run)["metrics"]["test/mse"] == pytest.approx(0.9014630358776691, abs=1e-9)
        assert receipt(run)["checkpoint"]["step"] == receipt(run)["epochs"] == 1000

    def test_autograd_and_module_agree_with_least_squares(self, train):
        found = {}
        for name in ("autograd", "module"):
            run = train(experiment=f"experiments/line_{name}.yaml", tiny=())
            found[name] = [float(w) for w in torch.load(run / "best.ckpt", weights_only=True)["state_dict"].values()]
        rng = np.random.RandomState(42)
        x = rng.rand(100)
        y = 1 + 2 * x + 0.1 * rng.randn(100)
        least_squares = np.polyfit(x[:80], y[:80], 1)  # w, b
        np.testing.assert_allclose(found["autograd"], least_squares, atol=1e-4)
        np.testing.assert_allclose(found["module"], least_squares, atol=1e-4)
        np.testing.assert_allclose(found["autograd"], found["module"], atol=1e-4)

    @pytest.mark.parametrize("name", LINES)
    def test_one_point_is_memorised(self, name):
        torch.manual_seed(0)
        model = (
            LINES[name](lr=0.1)
            if name != "module"
            else LineModule(optimizer=functools.partial(torch.optim.SGD, lr=0.1))
        )
        fit(model, NoisyPolynomial((3.0, 2.0), train=1, val=1, test=1), 100)
        data = NoisyPolynomial((3.0, 2.0), train=1, val=1, test=1)
        data.setup()
        x, y = data.train_set.tensors
        torch.testing.assert_close(model(x), y, rtol=1e-3, atol=1e-3)

    def test_the_gradient_by_hand_is_autograds(self):
        a, b = LineByHand(0.1), LineAutograd(0.1)
        b.load_state_dict(a.state_dict())
        x, y = torch.rand(7, 1), torch.rand(7, 1)
        for _ in range(3):
            torch.testing.assert_close(a.descend(x, y), b.descend(x, y))


class TestCurveFitting:
    def test_its_layers_are_torchvisions_mlp(self):
        from torchvision.ops import MLP

        theirs, ours = MLP(1, [8, 4, 1], dropout=0.5).eval(), CurveFitting((1, 8, 4, 1), dropout=0.5).eval()
        with torch.no_grad():
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                a.copy_(b)
        x = torch.randn(5, 1)
        torch.testing.assert_close(ours(x), theirs(x))

    def test_it_learns_and_memorises_a_few_points(self):
        torch.manual_seed(0)
        model, data = (
            CurveFitting((1, 64, 64, 1), optimizer=ADAM),
            NoisyPolynomial(train=8, val=5, test=5, batch_size=8),
        )
        trainer = fit(model, data, 400)
        (metrics,) = trainer.test(model, data, verbose=False)
        x, y = data.test_set.tensors
        assert metrics["test/mse_on_train"] < 0.002
        predictions = model(x).detach()
        assert metrics["test/mse"] == pytest.approx(float((predictions - y).square().mean()), rel=1e-5)
        assert metrics["test/mae"] == pytest.approx(float((predictions - y).abs().mean()), rel=1e-5)

    @pytest.mark.parametrize("batch_size", [1, 3, 5])
    def test_metrics_are_over_samples_not_over_batches(self, batch_size):
        torch.manual_seed(0)
        model, data = CurveFitting((1, 4, 1)), NoisyPolynomial(train=8, val=5, test=11, noise=1.0)
        data.eval_batch_size = batch_size
        trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
        (metrics,) = trainer.test(model, data, verbose=False)
        x, y = data.test_set.tensors
        assert metrics["test/mse"] == pytest.approx(float((model(x) - y).detach().square().mean()), rel=1e-5)

    def test_the_points_are_the_same_ones_for_every_seed_and_no_set_shares_any(self):
        a, b = NoisyPolynomial(), NoisyPolynomial()
        a.setup()
        torch.manual_seed(5)
        np.random.seed(5)
        b.setup()
        b.setup()
        assert a.fingerprint == b.fingerprint
        x = [d.tensors[0].flatten().tolist() for d in (a.train_set, a.val_set, a.test_set)]
        assert len({*x[0], *x[1], *x[2]}) == 1400
        c = NoisyPolynomial(data_seed=1)
        c.setup()
        assert c.fingerprint != a.fingerprint

    def test_the_points_follow_the_law(self):
        data = NoisyPolynomial((1.0, -2.0, 3.0), noise=0.5, train=20_000, interval=(0.0, 2.0))
        data.setup()
        x, y = (t.flatten().numpy() for t in data.train_set.tensors)
        np.testing.assert_allclose(np.polyfit(x, y, 2), [3, -2, 1], atol=0.1)
        assert np.std(y - (1 - 2 * x + 3 * x**2)) == pytest.approx(0.5, rel=0.02)
        assert 0 <= x.min() < 0.01 < 1.99 < x.max() <= 2


class TestSchedules:
    def test_warmup_cosine_is_its_formula(self):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
        scheduler = WarmupCosine(optimizer, warmup_steps=4, total_steps=20)
        rates = []
        for _ in range(21):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        up = [0.2 * (t + 1) / 4 for t in range(4)]
        down = [0.2 * (1 + np.cos(np.pi * (t - 4) / 16)) / 2 for t in range(4, 21)]
        np.testing.assert_allclose(rates, up + down, atol=1e-12)

    def test_the_rate_is_logged_every_step_or_every_epoch(self, train):
        def rates(experiment: str, *argv: str) -> list[tuple[int, int, float]]:
            run = train("--trainer.max_epochs=3", *argv, experiment=f"experiments/{experiment}.yaml", tiny=())
            rows = read_history(run / "metrics.csv")
            return [(row["epoch"], row["step"], row["value"]) for row in rows if row["metric"] == "train/lr"]

        by_epoch = rates("schedule_step", "--model.lr_scheduler.step_size=1", "--model.lr_scheduler.gamma=0.5")
        assert by_epoch == [(0, 0, 0.05), (1, 8, 0.025), (2, 16, 0.0125)]
        by_step = rates("schedule_cosine", "--model.lr_scheduler.T_max=24", "--trainer.log_every_n_steps=4")
        expected = [0.05 * (1 + np.cos(np.pi * step / 24)) / 2 for step in (3, 7, 11, 15, 19, 23)]
        assert [(epoch, step) for epoch, step, _ in by_step] == [(0, 3), (0, 7), (1, 11), (1, 15), (2, 19), (2, 23)]
        np.testing.assert_allclose([rate for *_, rate in by_step], expected, atol=1e-12)

    def test_the_plateau_halves_the_rate(self, train):
        run = train("--model.lr_scheduler.patience=0", "--model.lr_scheduler.threshold=0.9", "--trainer.max_epochs=4",
                    experiment="experiments/schedule_plateau.yaml", tiny=())  # fmt: skip
        rates = [row["value"] for row in read_history(run / "metrics.csv") if row["metric"] == "train/lr"]
        assert rates[0] == 0.05
        assert rates[-1] < 0.05
        assert all(b in (a, a / 2) for a, b in itertools.pairwise(rates))

    @pytest.mark.parametrize(
        ("argv", "line"),
        [
            (["schedule_onecycle", "--trainer.max_epochs=31"], "OneCycleLR plans 240 steps, but there are 248"),
            (
                ["schedule_warmup_cosine", "--model.lr_scheduler.warmup_steps=300"],
                "warmup_steps must be from 2 to below",
            ),
            (["schedule_plateau", "--model.lr_interval=step"], "it needs lr_interval epoch"),
            (["schedule_step", "--model.lr_interval=day"], "expected one of 'epoch', 'step', got day"),
            (["line_by_hand", "--model.lr=0"], "the learning rate must be above 0, got 0"),
            (["line_by_hand", "--checkpoint.monitor=val/mse"], "Line has no validation set, so there is no 'val/mse'"),
            (["line_by_hand", "--trainer.accumulate_grad_batches=2"], "not supported for manual optimization"),
            (["curve_fit", "--model.sizes=[2,1]"], "model and data do not fit"),
            (["curve_fit", "--data.train=0"], "at least one point each"),
            (["curve_fit", "--data.noise=.nan"], "must be numbers"),
            (["curve_fit", "--data.interval=[-.inf, .inf]"], "must be numbers"),
            (["curve_fit", "--data.data_seed=-1"], "NoisyPolynomial: "),
            (["curve_fit", "--data.train=1000000000000"], "NoisyPolynomial: "),
            (["line_by_hand", "--data.seed=-1"], "Line: Seed must be"),
            (["line_by_hand", "--data.slope=.nan"], "must be numbers"),
            (["two_layer_tensors", "--data.outputs=0"], "start at 1, got 64, 1000 and 0"),
            (
                ["schedule_onecycle", "--trainer.max_epochs=null", "--trainer.max_time=00:00:00:02"],
                "set trainer.max_epochs",
            ),
            (["schedule_onecycle", "--trainer.max_epochs=-1", "--trainer.max_steps=9"], "set trainer.max_epochs"),
            (["schedule_step", "--model.lr_scheduler.step_size=0"], "StepLR: "),
            (["schedule_cosine", "--model.lr_scheduler.T_max=0"], "CosineAnnealingLR: "),
            (
                ["schedule_plateau", "--trainer.limit_val_batches=0", "--checkpoint.monitor=train/mse"],
                "no val/mse for lr_sch",
            ),
            (
                ["line_by_hand", "--checkpoint.monitor=train/loss"],
                "'train/loss' is never logged; did you mean 'train/mse'?",
            ),
            (["schedule_plateau", "--model.lr_scheduler.monitor=train/msee"], "did you mean 'train/mse'?"),
        ],
        ids=lambda value: value if isinstance(value, str) else " ".join(value),
    )
    def test_what_cannot_be_done_is_one_line_before_anything_is_written(self, argv, line, capsys, tmp_path):
        assert main([f"experiments/{argv[0]}.yaml", *argv[1:]]) == 2
        err = capsys.readouterr().err
        assert line in err
        assert err.count("\n") == 1
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize("experiment", ["schedule_step", "schedule_plateau", "line_module"])
    def test_a_time_limit_in_place_of_epochs(self, train, experiment, capsys):
        run = train("--trainer.max_epochs=null", "--trainer.max_time=00:00:00:01", experiment=f"experiments/{experiment}.yaml",
                    tiny=())  # fmt: skip
        assert receipt(run)["epochs"] >= 1
        assert re.search(r"^epoch 1  train", capsys.readouterr().out, flags=re.M)

    @pytest.mark.parametrize(("experiment", "says"), [("schedule_onecycle", False), ("schedule_step", True)])
    def test_longer_is_offered_where_the_schedule_allows_it(self, train, experiment, says, capsys):
        train(experiment=f"experiments/{experiment}.yaml", tiny=())
        assert ("\nlonger " in capsys.readouterr().out) == says


def test_scaled_gradients_are_refused_where_there_is_no_optimiser(monkeypatch):
    """16-mixed scales on a GPU only; here the scaler is put where Lightning has it."""
    model = LineByHand()
    trainer = Trainer(logger=False, accelerator="cpu")
    monkeypatch.setattr(trainer.precision_plugin, "scaler", torch.amp.GradScaler("cpu"), raising=False)
    model.trainer = trainer
    with pytest.raises(InputError, match="16-mixed needs one; bf16-mixed works"):
        model.setup("fit")


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize(
    "experiment",
    ["line_by_hand", "line_autograd", "line_module", *(f"two_layer_{f}" for f in (
        "tensors", "autograd", "function", "sequential", "optimizer", "module", "container", "static_graph")),
     "curve_dropout"],
)  # fmt: skip
def test_other_precisions_learn(experiment, precision, train):
    argv = ["--model.compile=false"] if experiment == "two_layer_static_graph" else []
    run = train(*argv, f"--trainer.precision={precision}", "--trainer.max_epochs=30",
                experiment=f"experiments/{experiment}.yaml", tiny=())  # fmt: skip
    errors = [row["value"] for row in read_history(run / "metrics.csv") if row["metric"] == "train/mse"]
    assert errors[-1] < 0.9 * errors[0]
    assert receipt(run)["precision"] == precision
    dtypes = {v.dtype for k, v in torch.load(run / "best.ckpt", weights_only=True)["state_dict"].items()}
    assert dtypes == {torch.float64 if precision == "64-true" else torch.float32}


def test_manual_optimisation_counts_steps_as_any_other(train):
    """80 points in batches of 32 are 3 steps an epoch; the loggers' step, the checkpoint's and the receipt's agree."""
    run = train("--data.batch_size=32", "--trainer.max_epochs=4", "--trainer.log_every_n_steps=3",
                experiment="experiments/line_by_hand.yaml", tiny=())  # fmt: skip
    assert [row["step"] for row in read_history(run / "metrics.csv") if row["metric"] == "train/mse"] == [2, 5, 8, 11]
    saved = torch.load(run / "last.ckpt", weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (3, 12)
    assert json.loads((run / "receipt.json").read_text())["epochs"] == 4
    stopped = train("--data.batch_size=32", "--trainer.max_epochs=9", "--trainer.max_steps=6",
                    experiment="experiments/line_by_hand.yaml", tiny=())  # fmt: skip
    assert receipt(stopped)["epochs"] == 2
