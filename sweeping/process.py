"""A trial's process: one at a time, and none that outlives its sweep."""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from runner.errors import InputError
from sweeping.file import REPOSITORY


@contextlib.contextmanager
def only_one(folder: Path):
    """Hold the folder's lock, and yield its file. A trial holds it too, in case it outlives a sweep that is killed.

    Raises:
        InputError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        hint = "set RUNS_DIR to a folder that you can write to"
        raise InputError(f"cannot write to {folder}: {error.strerror}; {hint}") from None
    with file:
        for _ in range(30):  # times 0.1 seconds: the trial of a killed sweep is about to end
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            raise InputError(f"this sweep is running already, or a trial of it still is: see {folder}")
        yield file


def run_command(command: list[str], log: Path, lock) -> int:
    """Run a trial in the repository's root, what it prints going to `log`; return its exit code, -n after signal n."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # what is printed last, an error, is last in the log
            start_new_session=True,  # Ctrl-C comes to us alone, and we stop all that the trial has started
            pass_fds=[lock.fileno()],
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            return process.wait()
        except BaseException:
            _stop(process)
            raise


def _end_with_parent() -> None:
    """Have Linux kill this process when the sweep is killed: it would go on beside its own repetition."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _stop(process: subprocess.Popen) -> None:
    """Interrupt a trial, and kill what is left of it after ten seconds, or at a second Ctrl-C."""
    gone = ProcessLookupError, PermissionError  # the latter is macOS's word for it
    with contextlib.suppress(*gone, subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=10)
    with contextlib.suppress(*gone):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
