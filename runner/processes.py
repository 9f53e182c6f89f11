"""The processes that train one model: which one this is, and how they begin and end together.

The first process (rank 0) rehearses, keeps the run's folder, tests, and writes the receipt. The others help it to train, and
do no more. On one machine it starts them itself, with its own command line; `torchrun` and SLURM start all of them.
"""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from runner.errors import InputError, one_line

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # of torchrun and this file, Lightning, SLURM
PARENT = "TRAIN_PY_PID"
SET = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "OMP_NUM_THREADS",
    PARENT,
)  # for some time
GRACE = 20  # seconds in which a process that has lost another one is to notice by itself: NCCL may wait for much longer
LOST = re.compile("gloo|nccl|closed by|reset by|broken pipe|connection refused|timed out", re.IGNORECASE)


def is_helper() -> bool:
    """Whether another process than this one keeps the run."""
    return any(os.environ.get(name, "0") != "0" for name in RANKS)


def begin_to_help() -> None:
    """Be quiet, what there is to say the first process says; and end when it has ended."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.showwarning = lambda *_, **__: None
    if PARENT in os.environ:
        threading.Thread(target=_outlive_no_parent, args=(int(os.environ[PARENT]),), daemon=True).start()


def say_last(message: str) -> None:
    """Print a helper's error, unless the first process has found the same, says so, and ends this one meanwhile."""
    time.sleep(5)
    who = next(f"{name} {os.environ[name]}" for name in RANKS if os.environ.get(name, "0") != "0")
    print(f"error: process {who}: {message}", file=sys.stderr, flush=True)


def lost(error: Exception) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, RuntimeError) and not isinstance(error, InputError) and bool(LOST.search(str(error)))


@contextlib.contextmanager
def helpers(count: int, argv: list[str], last_words: Callable[[], str]) -> Iterator[None]:
    """Have the other processes of this machine help with what is done inside; they end with it.

    Args:
        count: processes of this machine, this one among them; 1, or if they were started already: nothing is done.
        argv: the command line.
        last_words: returns what is said in the end if one is lost, and this process waits for it in vain.

    Raises:
        ConnectionError: one of them has ended too early; says how.
    """
    environment, threads = {name: os.environ.get(name) for name in SET}, _threads()
    started = []
    if count > 1 and "LOCAL_RANK" not in os.environ and "SLURM_PROCID" not in os.environ:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        os.environ |= {"LOCAL_RANK": "0", PARENT: str(os.getpid())}
        command = [sys.executable, str(Path(__file__).parent.parent / "train.py"), *argv]
        started = [  # in groups of their own: a terminal's Ctrl-C is for the first, which ends them
            subprocess.Popen(command, env={**os.environ, "LOCAL_RANK": str(i)}, process_group=0)
            for i in range(1, count)
        ]
    done = threading.Event()
    if started:
        threading.Thread(target=_watch, args=(started, done, last_words), daemon=True).start()
    try:
        yield
        for process in started:
            process.wait(timeout=60)
    except Exception as error:
        if isinstance(error, InputError) or not (message := _how_lost(started, error)):
            raise
        raise ConnectionError(message) from error
    finally:
        done.set()
        for process in started:
            process.kill()
            process.wait()
        _forget_group()
        _be_alone_again(environment, threads)


def _how_lost(processes: list[subprocess.Popen], error: Exception) -> str:
    """Return which process is lost, and how it ended; empty if none is, and the error is this process's own."""
    until = time.monotonic() + (GRACE / 2 if lost(error) else 0)
    while True:
        for i, process in enumerate(processes, start=1):
            if process.poll():
                return f"process {i} of {len(processes) + 1} {_ended(process.returncode)}"
        if time.monotonic() >= until or not processes:
            why = re.sub(r"^\[\S+\] ", "", one_line(error)).partition(". ")[0][:120]  # without gloo's source and advice
            return f"another process is gone ({why})" if lost(error) else ""
        time.sleep(0.1)


def _ended(code: int) -> str:
    if code < 0:
        hint = ": out of memory?" if code == -signal.SIGKILL else ""
        return f"was killed ({signal.Signals(-code).name}{hint})"
    return f"ended with an error (exit code {code})"


def _watch(processes: list[subprocess.Popen], done: threading.Event, last_words: Callable[[], str]) -> None:
    while not any(process.poll() for process in processes):
        if done.wait(1):
            return
    if not done.wait(GRACE):
        print(f"error: {_how_lost(processes, InputError())}; {last_words()}", file=sys.stderr, flush=True)
        for process in processes:
            process.kill()
        os._exit(2)


def _outlive_no_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(GRACE)
    print("error: the first process of the run is gone", file=sys.stderr, flush=True)
    os._exit(2)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _be_alone_again(environment: dict[str, str | None], threads: int) -> None:
    """Undo what was told to the others, and what Lightning does to share the cores out."""
    import torch

    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _forget_group() -> None:
    """Leave the group: torchmetrics would wait for the others."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
