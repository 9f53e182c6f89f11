"""Whether packages can be imported, and what torch then tells of the machine.

What a package does when it is imported is anybody's guess, up to killing Python: it is tried in a process of its own.
"""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

from runner.doctor.line import bytes_text
from runner.errors import one_line

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"opencv-python-headless": "cv2", "pillow": "PIL", "scikit-image": "skimage", "scikit-learn": "sklearn"}


def try_imports(packages: list[str]) -> dict[str, dict]:
    """Import packages in another process, and return what came of each: `error` if it cannot be; of torch the machine.

    Where torch is missing or broken, or one kills the process, nothing is said of those that come after it.
    """
    command = [sys.executable, "-W", "ignore", "-m", "runner.doctor.imports", *packages]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}  # it would ask the network
    done = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    told = {}
    for line in done.stdout.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):  # what a package prints, or what was cut short
            told.update(json.loads(line))
    if done.returncode and (left := [name for name in packages if name not in told]):
        signals = {-number: f"kills Python ({number.name})" for number in signal.Signals}
        told[left[0]] = {"error": f"importing it {signals.get(done.returncode, 'ends Python')}"}
    return told


def report(packages: list[str]) -> None:
    """Import packages, and print what came of each, an object a line: the part of `try_imports` in the other process."""
    for name in packages:
        try:
            module = importlib.import_module(MODULES.get(name, name.replace("-", "_")))
            said = {"torch": _try_torch, "torchvision": _try_torchvision}.get(name, lambda _: {})(module)
        except BaseException as error:  # of many kinds, SystemExit among them
            said = {"error": f"{type(error).__name__}: {one_line(error)[:200]}"}
        print("\n" + json.dumps({name: said}), flush=True)
        if name == "torch" and "error" in said:
            return  # most of the others would only say so again


def _try_torchvision(torchvision) -> dict:
    import torch

    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # its operators are compiled for one version of torch
    return {}


def _try_torch(torch) -> dict:
    torch.ones(1).numpy()  # fails where torch was built for another numpy
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [_try_gpu(torch, i) for i in range(count)]
    if torch.backends.mps.is_available():
        gpus.append({"name": f"mps (Apple), {bytes_text(torch.mps.recommended_max_memory())}"})
    return {
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "built for": f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip or "CPUs only",
        "gpus": gpus,
        "warning": f"({one_line(caught[0].message)[:160]})" if caught else "",
    }


def _try_gpu(torch, i: int) -> dict:
    said = {"name": torch.cuda.get_device_name(i)}
    try:
        free, memory = torch.cuda.mem_get_info(i)
        said["name"] += f", {bytes_text(free)} of {bytes_text(memory)} free"
        (torch.ones(8, 8, device=f"cuda:{i}") @ torch.ones(8, 8, device=f"cuda:{i}")).sum().item()
    except Exception as error:  # out of memory, no kernel for it, ...
        said["error"] = one_line(error)[:160]
    return said


if __name__ == "__main__":
    report(sys.argv[1:])
