"""Two processes train what one would train, and a run outlives the loss of one."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY
from test_resume import only_run, start
from test_train import receipt

from callbacks.sharing import SharedBatches, share
from datamodules.image_folder import EndlessShuffle
from datamodules.in_memory import EpochShuffle, InMemoryDataset
from runner.history import read_history
from runner.processes import _free_port
from runner.sharding import ShardingStrategy
from train import main

TWO = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
SCENES = ("--data.train_size=23", "--data.val_size=3", "--data.test_size=5", "--data.batch_size=4", "--data.flip=false",
          "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--trainer.precision=32-true",
          "--trainer.sync_batchnorm=true")  # fmt: skip
KINDS = {
    "classifier": ["mnist_mlp", *TINY, "--model.sizes=[784, 32, 10]"],  # 247 pictures in batches of 32
    "detector": ["shapes_retinanet", *SCENES],
    "segmenter": ["shapes_unet", *SCENES, "--model.features=[4, 8]", "--trainer.precision=64-true"],  # its pixels are close calls
    "gan": ["mnist_dcgan", *TINY, "--model.width=4", "--model.noise=8", "--model.judged=40", "--trainer.precision=32-true",
            "--trainer.sync_batchnorm=true"],
}  # fmt: skip


@pytest.fixture(scope="module")
def helper():
    command = [sys.executable, str(REPOSITORY / "tests" / "helper_process.py")]
    with subprocess.Popen(
        command, cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def both(helper, monkeypatch):
    """Call train.py's main in this process, the first, and in the other; returns both exit codes."""

    def call(argv: list[str], **other: str) -> tuple[int, int]:
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        for key, value in {**common, "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(key, value)
        environment = {key: os.environ[key] for key in ("DATA_DIR", "RUNS_DIR", "WANDB_MODE")}
        task = {"argv": argv, "environment": {**environment, **common, "LOCAL_RANK": "1", **other}}
        helper.stdin.write(json.dumps(task) + "\n")
        helper.stdin.flush()
        return main(argv), int(helper.stdout.readline())

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_the_steps_that_one_would_make(kind, train, both, tmp_path, monkeypatch):
    name, *argv = KINDS[kind]
    argv.append("--trainer.accelerator=cpu")
    monkeypatch.setenv("WANDB_MODE", "offline" if kind == "classifier" else "disabled")
    experiment = f"experiments/{name}.yaml"
    alone = Path(shutil.move(train(*argv, experiment=experiment, tiny=()), tmp_path / "alone"))
    shutil.rmtree(tmp_path / "runs")
    assert both([experiment, *argv, *TWO]) == (0, 0)

    run = only_run(tmp_path)
    one, two = (read_history(folder / "metrics.csv") for folder in (alone, run))
    places = [(row["step"], row["epoch"], row["metric"]) for row in two]
    assert places == [(row["step"], row["epoch"], row["metric"]) for row in one]
    assert len(set(places)) == len(places)
    for was, now in zip(one, two, strict=True):
        near = math.isnan(was["value"]) or math.isclose(was["value"], now["value"], rel_tol=1e-4, abs_tol=1e-5)
        assert near or math.isnan(now["value"]), (was, now)
    was, now = receipt(alone), receipt(run)
    assert now["tested"] == was["tested"] == now["data"]["test"]
    assert (was["devices"]["count"], now["devices"]["count"]) == (1, 2)
    assert len(list((tmp_path / "runs").glob("*/*/receipt.json"))) == 1
    if kind == "classifier":
        assert len(list((tmp_path / "runs" / "wandb").glob("offline-run-*"))) == 1


def test_processes_that_divide_a_network_end_where_one_would(both, tmp_path, monkeypatch):
    """One epoch by two, one by two that go on, one by one that goes on with what they have left."""
    net = [
        "--model.layers=2",
        "--model.width=16",
        "--model.heads=2",
        "--model.hidden=32",
        "--model.lr_scheduler.warmup_steps=2",
    ]
    argv = ["experiments/mnist_vit.yaml", *TINY, *net, "--trainer.precision=64-true", "--trainer.gradient_clip_val=0.5"]
    argv.append("--trainer.accelerator=cpu")
    assert main([*argv, "--trainer.max_epochs=3"]) == 0
    alone = Path(shutil.move(only_run(tmp_path), tmp_path / "alone"))
    shutil.rmtree(tmp_path / "runs")
    held, teardown = [], ShardingStrategy.teardown

    def weigh(strategy):
        """Note the bytes of parameters and optimiser state, and of the memory that this process has for them."""
        (optimizer,) = strategy.optimizers
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [value for state in optimizer.state.values() for value in state.values()]
        here = [getattr(tensor, "_local_tensor", tensor).untyped_storage().nbytes() for tensor in tensors]
        held.append((sum(tensor.numel() * tensor.element_size() for tensor in tensors), sum(here)))
        teardown(strategy)

    monkeypatch.setattr(ShardingStrategy, "teardown", weigh)
    assert both([*argv, *TWO, "--trainer.strategy=fsdp", "--trainer.max_epochs=1"]) == (0, 0)
    run = only_run(tmp_path)
    assert both(["--resume", str(run), "--trainer.max_epochs=2"]) == (0, 0)
    assert len(held) == 2
    assert all(here < 0.6 * whole for whole, here in held), held  # the first has all positions, too
    monkeypatch.delenv("LOCAL_RANK")
    assert main(["--resume", str(run), "--trainer.max_epochs=3", "--trainer.devices=1"]) == 0

    was, now = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (alone, run))
    for one, two in ((was, now), (was["optimizer_states"][0], now["optimizer_states"][0])):
        assert one.keys() == two.keys()
    torch.testing.assert_close(now["state_dict"], was["state_dict"], rtol=0, atol=1e-9)
    for i, state in was["optimizer_states"][0]["state"].items():
        torch.testing.assert_close(now["optimizer_states"][0]["state"][i], state, rtol=1e-6, atol=1e-12)
    assert [r["metric"] for r in read_history(run / "metrics.csv")] == [
        r["metric"] for r in read_history(alone / "metrics.csv")
    ]
    assert receipt(run)["metrics"] == pytest.approx(receipt(alone)["metrics"], rel=1e-6)
    assert len(list((tmp_path / "runs").glob("*/*/receipt.json"))) == 1


def test_divided_networks_use_layers_outside_of_forward_and_memory_formats(both):
    """A detector's training is no call of `forward`, and its convolutions are in `channels_last`."""
    detr = ["experiments/shapes_detr.yaml", *SCENES, "--model.layers=1", "--model.width=32", "--model.heads=2"]
    detr += [
        "--data.train_size=4",
        "--data.size=64",
        "--trainer.gradient_clip_val=null",
        *TWO,
        "--trainer.strategy=fsdp",
    ]
    assert both(detr) == (0, 0)


@pytest.mark.parametrize(
    "argv",
    [
        # its backbone is set free later, when DDP is made already
        ["ants_bees_finetune", "--data.image_size=32", "--data.num_workers=0", "--data.batch_size=5", "--model.unfreeze_at=1",
         "--trainer.max_epochs=2"],
        # its batch norms have measured other samples in each process
        ["mnist_dcgan", *TINY, "--model.width=4", "--model.noise=8", "--model.judged=40", "--trainer.max_epochs=1"],
    ],
    ids=lambda argv: argv[0],
)  # fmt: skip
def test_processes_have_the_same_weights_and_metrics(argv, both):
    name, *argv = argv
    assert both([f"experiments/{name}.yaml", *argv, "--trainer.callbacks+=helper_process.Agreed", *TWO]) == (0, 0)


def test_an_error_in_one_process_ends_both(both, helper, tmp_path, capsys):
    """Its DATA_DIR is empty, so that it takes the digits that a package ships."""
    name, *argv = KINDS["classifier"]
    assert both([f"experiments/{name}.yaml", *argv, *TWO], DATA_DIR=str(tmp_path / "empty")) == (2, 2)
    err = capsys.readouterr().err
    assert err.startswith("error: another process is gone")
    assert err.count("\n") == 1


def test_a_run_outlives_the_loss_of_either_process(tmp_path, capsys):
    argv = ["experiments/mnist_mlp.yaml", *TINY, "--model.sizes=[784, 32, 10]", "--trainer.max_epochs=600", *TWO]
    for words, which in ((argv, "helper"), (None, "asked to end"), (None, "first")):
        if words is None:
            run = only_run(tmp_path)
            words = ["--resume", str(run)]
        process = start(words, until="epoch ")
        (other,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        assert os.getpgid(other) != os.getpgid(process.pid)  # a terminal's Ctrl-C does not reach it
        time.sleep(1)
        os.kill(
            other if which == "helper" else process.pid, signal.SIGTERM if which == "asked to end" else signal.SIGKILL
        )
        _, err = process.communicate(timeout=120)  # the helper has the same standard error
        assert err.strip().count("\n") == 0, err
        if which == "asked to end":
            assert process.returncode == 130
            assert f"interrupted: {run / 'last.ckpt'} holds the last finished epoch" in err
        elif which == "helper":
            assert process.returncode == 2
            assert err.startswith("error: process 1 of 2 was killed (SIGKILL")
            assert f"python train.py --resume {only_run(tmp_path)}" in err
        else:
            assert err.startswith("error: process LOCAL_RANK 1: another process is gone")
            assert f"python train.py --resume {run}" in err
    done = torch.load(run / "last.ckpt", weights_only=True)["epoch"] + 1
    alone = ["--trainer.devices=1", "--trainer.strategy=auto", f"--trainer.max_epochs={done + 1}"]
    assert main(["--resume", str(run), *alone]) == 0
    rows = [(row["step"], row["metric"]) for row in read_history(run / "metrics.csv")]
    assert len(set(rows)) == len(rows)
    assert [r["epoch"] for r in read_history(run / "metrics.csv") if r["metric"] == "val/acc"] == list(range(done + 1))


# -- shares ------------------------------------------------------------------------------------------------------------


def loader_of(samples: int, batch_size: int, shuffle=EpochShuffle) -> torch.utils.data.DataLoader:
    data = InMemoryDataset(torch.arange(samples))
    return torch.utils.data.DataLoader(data, batch_size, sampler=shuffle(samples), collate_fn=lambda batch: batch[0])


@pytest.mark.parametrize(("samples", "processes"), [(24, 2), (23, 2), (23, 3), (25, 4)])
def test_shares_make_up_the_batches_of_one_process_in_every_epoch(samples, processes):
    for epoch in (0, 1):
        whole = loader_of(samples, batch_size=8)
        shares = [share(loader_of(samples, batch_size=8), rank, processes) for rank in range(processes)]
        for loader in (whole, *shares):
            assert len(loader) == math.ceil(samples / 8)
            for sampler in {loader.sampler, loader.batch_sampler.sampler}:  # as Lightning does
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(epoch)
        batches = zip(*map(list, shares), strict=True)
        for i, (batch, parts) in enumerate(zip(whole, batches, strict=True)):
            weights = [loader.batch_sampler.weight(i) for loader in shares]
            assert sum(weights) == pytest.approx(processes)
            counted = [part for part, weight in zip(parts, weights, strict=True) if weight]
            assert sorted(torch.cat(counted).tolist()) == sorted(batch.tolist())
            mean = sum(weight * part.float().mean() for part, weight in zip(parts, weights, strict=True)) / processes
            assert mean == pytest.approx(batch.float().mean())


def test_a_process_for_which_nothing_is_left_makes_the_step_without_weight():
    batches = SharedBatches([[4, 7, 1], [5]], rank=1, processes=2)
    assert list(batches) == [[7], [5]]
    assert [batches.weight(i) for i in (0, 1)] == [2 / 3, 0]


def test_shares_tell_the_workers_the_epoch():
    sampler = EndlessShuffle(6)
    sampler.set_epoch(3)
    batches = torch.utils.data.BatchSampler(sampler, 4, drop_last=False)
    assert {i // 6 for batch in SharedBatches(batches, 0, 2) for i in batch} == {3}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiments/line_by_hand.yaml"], "finds its gradients by hand"),
        (["experiments/mnist_mlp.yaml", "--data.batch_size=1"], "2 processes cannot share a batch of 1"),
        (
            ["experiments/mnist_gan.yaml", "--trainer.strategy=fsdp"],
            "not for MLPGAN, which steps its optimisers itself",
        ),
        (
            ["experiments/mnist_vit.yaml", "--trainer.strategy=fsdp", "--model.compile=true"],
            "not for a compiled network",
        ),
        (["experiments/mnist_vit.yaml", "--trainer.strategy=fsdp", "--trainer.precision=16-mixed"], "not for 16-mixed"),
        (
            ["experiments/cifar10_vit.yaml", "--trainer.strategy=fsdp", "--model.compile=false"],
            "not for AveragedWeights",
        ),
        (["experiments/mnist_mlp.yaml", "--trainer.strategy=ddp_spawn"], "not ddp_spawn"),
        (["experiments/mnist_softmax.yaml", *TINY, "--model.optimizer=torch.optim.LBFGS"], "LBFGS goes by the loss"),
    ],
)
def test_what_cannot_be_shared_is_told_before_anything_is_started(words, said, capsys, tmp_path):
    assert main([words[0], *TWO, *words[1:]]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_more_processes_than_the_settings_say(monkeypatch, capsys):
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "1",
                       "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    assert main(["experiments/mnist_mlp.yaml", "--trainer.accelerator=cpu"]) == 2
    assert (
        "2 processes (torchrun, SLURM, LOCAL_RANK), but trainer.num_nodes 1 x trainer.devices 1 are 1"
        in capsys.readouterr().err
    )
