"""Runs that are killed with `kill -9` at random moments and resumed must end as if nothing had happened.

python tests/kill_and_resume.py                                                  20 kills over every kind of task
python tests/kill_and_resume.py --kills 100 --seed 1 --experiments mnist_gan mnist_vae

Of each experiment, made small, one run is left in peace, and others are killed, resumed, killed again, until they end. A
kill comes from outside, a random time after training or validating an epoch has begun, or after the process has; or
from inside in the middle of writing a checkpoint, for that moment is too short to be met from outside. Each process is
forked from this one, which has imported what takes seconds and done nothing else. Compared with the undisturbed run:
all that is in best.ckpt and last.ckpt, metrics.csv byte by byte, and what the receipts say; and wandb must know one run,
of which every session can be read. (Values that wandb has not written to its file when the process is killed, it loses: the
table tells how many.) Exit code 1: something differs.
"""

import argparse
import importlib
import json
import math
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads would not survive the fork
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import yaml
from conftest import REPOSITORY, write_small_data
from matplotlib.figure import Figure
from pytorch_lightning import Callback, Trainer
from test_experiments import small
from tqdm import tqdm

from callbacks.checkpoint import AtomicCheckpointIO
from runner.history import read_history
from runner.loggers import RunWandbLogger
from train import main as train

KINDS = {  # experiment: kind of task, and settings that make it smaller still, but leave several batches an epoch
    "mnist_mlp": ("classifier", "--data.batch_size=64", "--model.sizes=[784, 32, 10]", "--model.dropout=0.2"),
    "curve_fit": ("regressor",),
    "line_by_hand": ("regressor by hand", "--data.batch_size=30"),
    "names_lstm": ("recurrent classifier",),
    "shapes_fcos": ("detector", "--data.batch_size=4"),
    "shapes_unet": ("segmenter", "--data.batch_size=4"),
    "shakespeare_lstm": ("language model",),
    "dates_attention": ("sequence to sequence", "--data.batch_size=16"),
    "shapes_captioning": ("captioning",),
    "mnist_gan": ("GAN", "--data.batch_size=64"),
    "mnist_vae": ("autoencoder", "--data.batch_size=64"),
    "karate_gcn": ("graph",),
}
PHASES = ("start", "train", "validate", "save", "end")  # what a process is at; "end" is after training: pictures, test
SAVES = ("half written", "written, not moved", "between two moves", "moved")


# -- in the process that is to be killed -----------------------------------------------------------------------------


class Told(Callback):
    """Writes into memory shared with the parent what the process is at, in which epoch, and how often it was."""

    def __init__(self, shared: mmap.mmap):
        self.shared = shared

    def __deepcopy__(self, memo: dict) -> "Told":
        """Return itself: a GAN's callbacks are copied to draw samples, and memory that is shared is not to be copied."""
        return self

    def tell(self, phase: str, epoch: int) -> None:
        """Tell."""
        seen = struct.unpack_from("I", self.shared, 8 + 4 * PHASES.index(phase))[0]
        struct.pack_into("I", self.shared, 8 + 4 * PHASES.index(phase), seen + 1)
        struct.pack_into("II", self.shared, 0, PHASES.index(phase), epoch)

    def on_train_epoch_start(self, trainer: Trainer, *_) -> None:
        """Training an epoch begins."""
        self.tell("train", trainer.current_epoch)

    def on_validation_start(self, trainer: Trainer, *_) -> None:
        """Validation begins."""
        self.tell("validate", trainer.current_epoch)

    def on_fit_end(self, trainer: Trainer, *_) -> None:
        """Training is over."""
        self.tell("end", trainer.current_epoch)


def listen(told: Told, save: int, moment: str) -> None:
    """Have Trainers tell what they are at; the process kills itself at a `moment` of the `save`-th checkpoint, if not 0."""
    fit, write, saves = Trainer.fit, AtomicCheckpointIO.save_checkpoint, iter(range(1, 10**9))

    def fit_and_tell(self, model, *args, **kwargs):
        self.callbacks.insert(0, told)
        return fit(self, model, *args, **kwargs)

    def write_and_tell(self, checkpoint, path, storage_options=None):
        told.tell("save", checkpoint["epoch"])
        if next(saves) != save:
            return write(self, checkpoint, path)
        fsync, replace, moves = os.fsync, os.replace, iter(SAVES[1:])

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def half(file):
            os.ftruncate(file, os.fstat(file).st_size // 2)
            die()

        os.fsync = half if moment == "half written" else fsync
        os.replace = lambda *paths: die() if next(moves) == moment else replace(*paths)
        write(self, checkpoint, path)
        return die()  # best.ckpt, and the first last.ckpt, are moved but once

    Trainer.fit, AtomicCheckpointIO.save_checkpoint = fit_and_tell, write_and_tell


# -- in the one that kills -------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """When to kill: `wait` seconds after the process has been at `phase` for the `nth` time; "save": at a `moment` of it."""

    phase: str
    nth: int = 0
    wait: float = 0.0
    moment: str = ""


@dataclass
class Life:
    """How a process ended: its exit code (-9: killed), at what it was, and for how long it had been at each phase."""

    code: int
    phase: str
    epoch: int
    seconds: dict[str, float]
    seen: Counter


def live(argv: list[str], log: Path, plan: Plan | None = None) -> Life:
    """Call train.py's main in a process of its own, and kill it as planned, unless it ends before."""
    shared = mmap.mmap(-1, 4096)
    pid = os.fork()
    if not pid:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        saving = plan and plan.phase == "save"
        code = 99
        try:
            listen(Told(shared), plan.nth if saving else 0, plan.moment if saving else "")
            code = train(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    seconds, before, due = dict.fromkeys(PHASES, 0.0), time.perf_counter(), math.inf
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        phase, epoch, *counts = struct.unpack_from(f"II{len(PHASES)}I", shared)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return Life(code, PHASES[phase], epoch, seconds, Counter(dict(zip(PHASES, counts, strict=True))))
        now = time.perf_counter()
        seconds[PHASES[phase]] += now - before
        before = now
        if plan and plan.phase != "save" and due == math.inf and (counts[PHASES.index(plan.phase)] >= plan.nth):
            due = now + plan.wait
        if now >= due:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def draw(rng: random.Random, phase: str, whole: Life, epochs: int) -> Plan:
    """Draw a moment of a process that has as many epochs before it, from how long the undisturbed run took for what."""
    if phase == "save":
        return Plan("save", rng.randint(min(2, epochs), epochs), moment=rng.choice(SAVES))
    if phase == "any" or not whole.seen[phase]:  # there may be nothing to validate on
        return Plan("start", 0, rng.uniform(0, sum(whole.seconds.values())))
    times = min(epochs, whole.seen[phase])  # in the first epoch there is nothing to go on from: rarely there
    return Plan(
        phase, rng.randint(min(2, times), times), rng.uniform(0, whole.seconds[phase] / max(1, whole.seen[phase]))
    )


def killed_until_it_ends(
    argv: list[str], folder: Path, whole: Life, phases: list[str], most: int, rng: random.Random
) -> list[str]:
    """Run, kill, resume, at most so many times, then to the end; return what each kill has met.

    Args:
        argv: of train.py.
        folder: RUNS_DIR.
        whole: the undisturbed run.
        phases: to kill in, the last first; those that were are removed.
        most: kills.
        rng: draws the moments.

    Raises:
        RuntimeError: it does not go on.
    """
    met, log, again = [], folder / "log.txt", argv
    while True:
        epochs = max(1, whole.seen["train"] - finished(folder))
        life = live(again, log, draw(rng, phases[-1], whole, epochs) if len(met) < most else None)
        if life.code == -signal.SIGKILL:
            phases.pop()
            met.append(f"{life.phase} {life.epoch + 1}" if life.phase in ("train", "validate", "save") else life.phase)
        elif life.code:
            raise RuntimeError(f"exit code {life.code}: {log.read_text().strip().splitlines()[-1]}")
        else:
            if len(met) < most:  # it ended before its time had come
                phases.insert(0, phases.pop())
            return met
        runs = [file.parent for file in folder.glob("*/*/config.yaml")]
        again = ["--resume", str(runs[0])] if runs else argv


def finished(folder: Path) -> int:
    """Return how many epochs the run in `folder` could go on from."""
    for file in sorted(folder.glob("*/*/last.ckpt")):
        return torch.load(file, weights_only=True)["epoch"] + 1
    return 0


# -- what must be the same -------------------------------------------------------------------------------------------


def differences(a: object, b: object, path: str = "") -> list[str]:
    """Return where two checkpoints differ; paths and seconds may, and a score that Lightning saves but does not read."""
    if path.endswith(("_path", "dirpath", "seconds", "best_k_models", "current_score")):
        return []
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [where for key in a for where in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [where for i, (x, y) in enumerate(zip(a, b, strict=True)) for where in differences(x, y, f"{path}.{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())
    else:
        same = a == b or (a != a and b != b)
    return [] if same else [path.lstrip(".")]


def compare(whole: Path, other: Path) -> list[str]:
    """Return in what a run that was killed differs from one that was not; both folders are RUNS_DIRs with one run in it."""
    (a,), (b,) = whole.glob("*/2*"), other.glob("*/2*")
    found = []
    if {f.name for f in a.iterdir()} != {f.name for f in b.iterdir()}:
        found.append(f"files: {sorted({f.name for f in a.iterdir()} ^ {f.name for f in b.iterdir()})}")
    for name in ("best.ckpt", "last.ckpt"):
        x, y = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        if where := differences(x, y):
            found.append(f"{name}: {', '.join(where[:3])}{' ...' * (len(where) > 3)}")
    if (a / "metrics.csv").read_text() != (b / "metrics.csv").read_text():
        found.append("metrics.csv")
    x, y = (json.loads((folder / "receipt.json").read_text()) for folder in (a, b))
    told = ("experiment", "metrics", "config_sha256", "data", "tested", "seed", "epochs", "parameters")
    found += [f"receipt: {key}" for key in told if x[key] != y[key]]
    found += [f"receipt: checkpoint.{key}" for key in ("epoch", "step") if x["checkpoint"][key] != y["checkpoint"][key]]
    return found


# -- the table -------------------------------------------------------------------------------------------------------


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all, over the experiments in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--experiments", nargs="+", default=list(KINDS), choices=KINDS, metavar="NAME")
    parser.add_argument("--epochs", type=int, default=4, help="of each run")
    parser.add_argument("--quick", action="store_true", help="without wandb, and with empty pictures")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder, to look at")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["WANDB_MODE"] = "disabled" if arguments.quick else "offline"
    if arguments.quick:
        Figure.savefig = lambda self, path, dpi: path.write_bytes(b"")
        RunWandbLogger.log_image = lambda *_: None
    os.environ["DATA_DIR"] = str(folder / "data")
    os.chdir(REPOSITORY)
    if not (folder / "data").exists():
        write_small_data(folder / "data")
    try:
        return kill_all(arguments, folder)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


def kill_all(arguments: argparse.Namespace, folder: Path) -> int:
    """Do it for every experiment, and print a line for each; return the exit code."""
    rng = random.Random(arguments.seed)
    names = arguments.experiments[: arguments.kills]
    modules = ["wandb", "runner.cli", "runner.run", *(f"callbacks.{m}" for m in ("pictures", "receipt", "seeding"))]
    for name in names:
        text = (REPOSITORY / "experiments" / f"{name}.yaml").read_text()
        modules += re.findall(r"class_path: ((?:lit_models|datamodules)\.\w+)", text)
    for module in modules:  # once, here
        importlib.import_module(module)
    wanted = {name: arguments.kills // len(names) + (i < arguments.kills % len(names)) for i, name in enumerate(names)}
    phases = [("save", "train", "validate", "any", "end")[i % 5] for i in range(arguments.kills)]
    rng.shuffle(phases)
    rows, failed = [("experiment", "task", "runs", "killed in", "weights, metrics, rows", "wandb")], False
    with tqdm(total=arguments.kills, desc="kills", disable=None) as bar:
        for name in names:
            kind, *settings = KINDS[name]
            path = REPOSITORY / "experiments" / f"{name}.yaml"
            argv = [
                str(path),
                *small(yaml.safe_load(path.read_text())),
                f"--trainer.max_epochs={arguments.epochs}",
                *settings,
            ]
            bar.set_description(name)
            met, found, runs, told = [], [], 0, Counter()
            try:
                whole, root = alone(argv, folder / name / "whole"), folder / name / "whole"
                while len(met) < wanted[name] and not found:
                    runs += 1
                    other = folder / name / f"killed-{runs}"
                    other.mkdir(parents=True)
                    os.environ["RUNS_DIR"] = str(other)
                    new = killed_until_it_ends(argv, other, whole, phases, min(3, wanted[name] - len(met)), rng)
                    met += new
                    bar.update(len(new))
                    found = compare(root, other)
                    if not arguments.quick:
                        told += told_wandb(other)
            except RuntimeError as error:
                found.append(str(error))
            failed |= bool(found)
            where = ", ".join(f"{phase}{f' ({n})' if n > 1 else ''}" for phase, n in Counter(met).items())
            sessions = "{runs} run(s), {sessions} sessions, lost {lost} of {values} values" if told else "-"
            rows.append((name, kind, str(runs), where, "; ".join(found) or "the same", sessions.format_map(told)))
            bar.write("  ".join(rows[-1]), file=sys.stderr)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return int(failed)


def alone(argv: list[str], root: Path) -> Life:
    """Make the run that is left in peace.

    Raises:
        RuntimeError: it fails.
    """
    root.mkdir(parents=True)
    os.environ["RUNS_DIR"] = str(root)
    whole = live(argv, root / "log.txt")
    if whole.code:
        raise RuntimeError(f"exit code {whole.code}: {(root / 'log.txt').read_text().strip().splitlines()[-1]}")
    return whole


def told_wandb(root: Path) -> Counter:
    """Count what wandb's files have of the one run in `root`.

    Raises:
        RuntimeError: it takes it for several runs, or a file cannot be read.
    """
    (run,) = root.glob("*/2*")
    files, rows = sorted(root.glob("wandb/offline-run-*/*.wandb")), {}
    if (names := {file.name for file in files}) != {f"run-{run.name.rpartition('-')[2]}.wandb"}:
        raise RuntimeError(f"wandb has other runs than {run.name}: {names}")
    for file in files:
        program = Path(sys.executable).with_name("wandb")
        done = subprocess.run([program, "leet", "inspect", "--json", file], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"wandb cannot read {file}: {done.stderr}")
        for record in map(json.loads, done.stdout.splitlines()):
            item = record.get("history", {}).get("item", {})
            rows |= {(item["_step"], name): value for name, value in item.items() if name[0] != "_"}
    ours = {(row["step"], row["metric"]): row["value"] for row in read_history(run / "metrics.csv")}
    return Counter(runs=1, sessions=len(files), values=len(ours), lost=len(ours.keys() - rows.keys()))


if __name__ == "__main__":
    sys.exit(main())
