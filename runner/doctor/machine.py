"""What this is, and what it runs on: code, system, Python, processors, GPUs, compiler, memory."""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from runner.doctor.imports import ROOT
from runner.doctor.line import Line, bytes_text

OLDEST_PYTHON = (3, 11)


def code_and_system() -> list[Line]:
    """Return which commit this is, on which operating system, run by which Python."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = len(_output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no").splitlines())
    code = f"commit {commit}{f' and {changed} changed file(s)' if changed else ''}" if commit else "not in git"
    advice = "make an environment with Python 3.11 or newer: python3.11 -m venv .venv"
    too_old = ("wrong", advice) if sys.version_info < OLDEST_PYTHON else ()
    return [
        Line("code", f"{code}, {time.strftime('%Y-%m-%d %H:%M')}"),
        Line("system", platform.platform()),
        Line("python", f"{platform.python_version()}, in {sys.prefix}", *too_old),
    ]


def devices(imported: dict[str, dict]) -> list[Line]:
    """Return the CPU and the GPUs, as `imports.try_imports` says that torch sees them."""
    found = re.search(r"^model name\s*: (.*)", _read("/proc/cpuinfo"), flags=re.M)
    cpu = f"{found[1] if found else platform.processor()}, {_cores():g} of {os.cpu_count()} cores"
    said = imported.get("torch", {"error": ""})
    if "error" in said:
        return [Line("cpu", cpu)]
    cpu = Line("cpu", f"{cpu}, torch uses {said['threads']} thread(s), {said['cpu']}")
    driver = re.search(r"Kernel Module\S*(?:\s+for \S+)?\s+(\S+)", _read("/proc/driver/nvidia/version"))
    built = f"torch is built for {said['built for']}" + (f", driver {driver[1]}" if driver else "")
    if said["gpus"] or not driver:
        return [cpu, *(_gpu(gpu, built) for gpu in said["gpus"] or [{"name": "none"}])]
    advice = "runs go on the CPU; see pytorch.org/get-started for the torch that fits"
    return [cpu, Line("gpu", f"none that torch finds; {built} {said['warning']}".rstrip(), "note", advice)]


def _gpu(gpu: dict, built: str) -> Line:
    if "error" in gpu:
        text, advice = f"{gpu['name']}; fails: {gpu['error']}; {built}", "go on without: --trainer.accelerator cpu"
        return Line("gpu", text, "wrong", advice)
    return Line("gpu", f"{gpu['name']}; {built}")


def memory() -> list[Line]:
    """Return the memory, of a container its own; nothing where it is not told as on Linux."""
    info = {key: 1024 * int(kb) for key, kb in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), flags=re.M)}
    total, free = info.get("MemTotal", 0), info.get("MemAvailable", 0)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total, free = int(limit), min(free, int(limit) - int(used))
    little = ("note", "little: a smaller --data.batch_size, --data.num_workers 0") if free < 1e9 else ()
    return [Line("memory", f"{bytes_text(free)} of {bytes_text(total)} free", *little)] if total else []


def _cores() -> float:
    """Return how many cores this process may use: those that it is bound to, or a container's share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() else cores


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    """Return what a command prints; empty if there is no such command, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
