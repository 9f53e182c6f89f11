"""What environment variables lead to: settings, wandb's mode, and the folders that a run writes to."""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import os
import shutil
import tempfile
from pathlib import Path

from datamodules.files import data_dir
from runner.account import has_key, wandb_host, wandb_mode
from runner.doctor.line import Line, bytes_text
from runner.errors import InputError

SETTINGS = (  # which change what a run does; none of them is secret
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PL_GLOBAL_SEED", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "CUBLAS_WORKSPACE_CONFIG", "TORCH_HOME", "SLURM_NTASKS", "WORLD_SIZE", "RANK", "PYTHONPATH", "LD_LIBRARY_PATH",
)  # fmt: skip


def settings() -> list[Line]:
    """Return which settings are in the environment."""
    given = [f"{key}={os.environ[key][:80]}" for key in SETTINGS if key in os.environ]
    return [Line("settings", " ".join(given))] if given else []


def wandb() -> list[Line]:
    """Return whether runs go online, without asking anybody."""
    try:
        mode = wandb_mode()
    except InputError as error:
        return [Line("wandb", str(error), "wrong", "unset it")]
    given = os.environ.get("WANDB_MODE")
    why = f"WANDB_MODE={given}" if given else "WANDB_MODE is not set"
    text = f"{mode}: {why}; {'a key' if has_key() else 'no key'} for {wandb_host()}, which was not asked"
    if mode == "online" and not has_key():
        return [Line("wandb", text, "wrong", "wandb login; or unset WANDB_MODE, or set it to offline")]
    return [Line("wandb", text)]


def folders() -> list[Line]:
    """Return the folders that a run writes to: free space, and whether they can be written."""
    paths = {"RUNS_DIR": os.environ.get("RUNS_DIR") or "runs", "TMPDIR": tempfile.gettempdir()}
    return [_folder(name, Path(path)) for name, path in {**paths, "DATA_DIR": data_dir()}.items()]


def _folder(name: str, path: Path) -> Line:
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.exists(folder))
    text = f"{path.absolute()}{'' if path.exists() else ' (not there yet)'}"
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
    except OSError as error:
        text, advice = f"{text} cannot be written ({error.strerror})", f"set {name} to a folder that can be written"
        if name == "DATA_DIR":
            return Line(name, f"{text}: nothing can be downloaded to it", "note", f"if data is missing, {advice}")
        return Line(name, text, "wrong", advice)
    free = shutil.disk_usage(there).free
    level = "" if free > 1e9 else "wrong" if name == "RUNS_DIR" and free < 1e8 else "note"  # checkpoints may not fit
    advice = f"make room, or set {name} to another disk" if level else ""
    return Line(name, f"{text}, {bytes_text(free)} free", level, advice)
