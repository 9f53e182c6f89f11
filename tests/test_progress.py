"""The learning rates that are logged, and the commands that a run ends with."""

import re
import shlex

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.demos.boring_classes import BoringModel
from torch.optim.lr_scheduler import LambdaLR

from callbacks.progress import LearningRate
from runner.history import read_history
from runner.loggers import History
from train import main


def logged(tmp_path, groups: list[dict], plans: list | None = None) -> dict[str, list[float]]:
    """Train for two epochs of a step with groups of parameters; returns the rates of each name in metrics.csv."""

    class Net(BoringModel):
        def configure_optimizers(self):
            parameters = [{"params": [p], **group} for p, group in zip(self.parameters(), groups, strict=True)]
            optimizer = torch.optim.SGD(parameters, lr=0.5)
            scheduler = LambdaLR(optimizer, plans or (lambda epoch: 1 / (1 + epoch)))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": "train/lr"}}

    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=1,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=History(tmp_path),
        callbacks=[LearningRate()],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net())
    rates = {}
    for row in read_history(tmp_path / "metrics.csv"):
        if "lr" in row["metric"]:
            rates.setdefault(row["metric"], []).append(row["value"])
    return rates


def test_groups_of_one_rate_are_one_curve(tmp_path):
    groups = [{"name": "matrices"}, {"name": "others", "weight_decay": 0.0}]
    assert logged(tmp_path, groups) == {"train/lr": [0.5, 0.25]}


def test_groups_without_names_are_one_curve(tmp_path):
    assert logged(tmp_path, [{}, {}]) == {"train/lr": [0.5, 0.25]}


def test_groups_of_different_rates_are_a_curve_each(tmp_path):
    rates = logged(tmp_path, [{"name": "head"}, {"name": "backbone", "lr": 0.05}])
    assert rates == {"train/lr/head": [0.5, 0.25], "train/lr/backbone": [0.05, 0.025]}


def test_groups_whose_rates_only_meet_stay_apart(tmp_path):
    """Both are 0 in the first step, as in a warm-up."""
    rates = logged(tmp_path, [{"name": "a"}, {"name": "b", "lr": 0.05}], [lambda epoch: float(epoch)] * 2)
    assert rates == {"train/lr/a": [0, 0.5], "train/lr/b": [0, 0.05]}


def test_groups_with_plans_of_their_own_are_told_where_they_differ(tmp_path):
    rates = logged(tmp_path, [{"name": "a"}, {"name": "b"}], [lambda epoch: 1.0, lambda epoch: 1.0 - epoch / 2])
    assert rates == {"train/lr": [0.5], "train/lr/a": [0.5], "train/lr/b": [0.25]}


def commands(said: str) -> dict[str, str]:
    """What stands at a run's end, by its first word."""
    return dict(re.findall(r"^(look|compare|verify|write|again) +(\S.*)$", said, flags=re.M))


def test_a_language_model_says_how_it_writes(train, capsys):
    tiny = ("--model.network.init_args.n_in=8", "--model.network.init_args.hidden=8", "--data.context=16",
            "--data.eval_batch_size=4", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2")  # fmt: skip
    run = train(experiment="experiments/shakespeare_lstm.yaml", tiny=tiny)
    said = commands(capsys.readouterr().out)
    assert said["write"] == f'python train.py {run / "config.yaml"} --ckpt {run / "best.ckpt"} --prompt "..."'
    command = said["write"].replace("...", "All:")
    assert main([*shlex.split(command)[2:], "--length", "5"]) == 0
    assert capsys.readouterr().out.startswith("All:")


def test_what_is_no_language_model_says_nothing_of_it(train, capsys):
    train("--trainer.max_epochs=1", experiment="experiments/two_layer_tensors.yaml", tiny=())
    said = commands(capsys.readouterr().out)
    assert [*said] == ["look", "compare", "verify", "again"]
