"""Which packages are installed, whether they may be, and whether they can be imported: for `python train.py --doctor`.

What a package does when it is imported is anybody's guess, up to killing Python. So that is tried in a process of its own.
"""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import one_line

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "pip install -r requirements.txt"
MODULES = {  # where the module's name is not the package's
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
}
ON_TORCH = ("torchvision", "torchmetrics", "pytorch_lightning", "torch_geometric")  # nothing of these without torch
OPENCV = ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")
MARK = "\x1e"  # in front of what the other process reports, between what packages print
SECONDS = 300  # for all imports: a machine may be busy, or its disk slow


@dataclass(frozen=True)
class Line:
    """A line of the report.

    Attributes:
        name: what it is about.
        text: what there is.
        level: "wrong" if it would stop a run, "note" if it is worth knowing, else "".
        advice: what to do about it.
    """

    name: str
    text: str
    level: str = ""
    advice: str = ""


@dataclass
class Packages:
    """What was found.

    Attributes:
        bounds: of requirements.txt, by package, such as {"torch": ">=2.11"}.
        versions: of what is installed, whether it is asked for or not.
        wants: of each package, what it says that it needs, as `bounds`.
        modules: what importing each module gave: `error` (and `missing`, the module that is not there), or `file` and
            `version`.
        devices: what torch tells of the machine: see `_devices`.
    """

    bounds: dict[str, str]
    versions: dict[str, str]
    wants: dict[str, dict[str, str]] = field(default_factory=dict)
    modules: dict[str, dict] = field(default_factory=dict)
    devices: dict = field(default_factory=dict)


def find_packages() -> Packages:
    """Look up versions, and import everything that requirements.txt names."""
    bounds = dict(map(read_requirement, (ROOT / "requirements.txt").read_text().splitlines()))
    bounds.pop("", None)
    wants = {name: _wants(name) for name in bounds}
    others = {"lightning", "albumentationsx", *OPENCV, *(other for needed in wants.values() for other in needed)}
    versions = {name: version for name in {*bounds, *others} if (version := _version(name))}
    names = [module_of(name) for name in bounds]
    slow = ("torch", *ON_TORCH, "albumentations")  # all of these import torch, which takes a second or two
    halves = [[n for n in names if (n in slow) is is_slow] for is_slow in (True, False)]
    with ThreadPoolExecutor() as pool:
        modules = {name: said for half in pool.map(import_all, halves) for name, said in half.items()}
    return Packages(bounds, versions, wants, modules, modules.get("torch", {}).pop("devices", {}))


# -- versions -----------------------------------------------------------------------------------------------------------


def module_of(package: str) -> str:
    """Return the name to import."""
    return MODULES.get(package, package.replace("-", "_"))


def read_requirement(line: str) -> tuple[str, str]:
    """Part `name[extra]>=1,<2  # why` into the name and the bounds; two empty strings for a line that has none.

    What holds only on some systems or with some extras (after a `;`) is left out.
    """
    found = re.match(r"([A-Za-z0-9][\w.-]*)\s*(?:\[[^]]*\])?\s*\(?([^#;)]*)\)?\s*(;?)", line)
    if not found or found[3]:
        return "", ""
    return re.sub(r"[-_.]+", "-", found[1]).lower(), found[2].strip()


def fits(version: str, bounds: str) -> bool:
    """Return whether a version is within bounds such as `>=4.53,<5`; of a version only its numbers count (`2.15.0+cpu`)."""
    have = _numbers(version)
    for bound in filter(None, map(str.strip, bounds.split(","))):
        sign, want = re.match(r"([<>=!~]*)\s*(.*)", bound).groups()
        parts, n = _numbers(want), len(_numbers(want))
        same = (have[:n] if want.endswith("*") else _pad(have, n)) == (
            parts if want.endswith("*") else _pad(parts, len(have))
        )
        more = _pad(have, n) >= _pad(parts, len(have))
        if not {
            "==": same, "===": same, "!=": not same, ">=": more, "<": not more, ">": more and not same,
            "<=": same or not more, "~=": more and have[: n - 1] == parts[:-1],
        }.get(sign, True):  # fmt: skip
            return False
    return True


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", re.match(r"v?(?:\d+!)?([\d.]*)", version)[1])]


def _pad(numbers: list[int], length: int) -> list[int]:
    return numbers + [0] * (length - len(numbers))


def _version(package: str) -> str:
    """Return a package's version; empty if it is not installed, or nothing useful is known of it."""
    try:
        return importlib.metadata.version(package) or ""
    except Exception:  # of many kinds, in a damaged environment
        return ""


def _wants(package: str) -> dict[str, str]:
    try:
        needed = dict(map(read_requirement, importlib.metadata.requires(package) or []))
    except Exception:  # not installed
        return {}
    return {name: bounds for name, bounds in needed.items() if bounds}


# -- imports ------------------------------------------------------------------------------------------------------------


def import_all(names: list[str]) -> dict[str, dict]:
    """Import modules in another process, and return what came of each; where one kills it, go on with the others in a new one.

    What needs torch is not tried, and nothing is returned of it, where torch cannot be imported: it would only say so again.
    """
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from runner.doctor_packages import report; report(sys.argv[1:])"
    told: dict[str, dict] = {}

    def is_left(name: str) -> bool:
        return name not in told and not (name in ON_TORCH and "error" in told.get("torch", {}))

    while waiting := list(filter(is_left, names)):
        environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}  # it would ask the network
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code, *waiting],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
            )
            output, end = done.stdout, _how_it_ended(done.returncode)
        except subprocess.TimeoutExpired as error:
            output, end = error.stdout or b"", f"did not end within {SECONDS} s"
        for line in output.decode(errors="replace").split(MARK)[1:]:
            with contextlib.suppress(ValueError, IndexError):  # cut short by what ended it
                name, said = json.loads(line.splitlines()[0])
                told[name] = said
        if left := list(filter(is_left, waiting)):  # the first of them is the one that did it
            told[left[0]] = {"error": f"importing it {end}"}
    return told


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ends Python with exit code {code}"
    try:
        return f"kills Python ({signal.Signals(-code).name})"
    except ValueError:
        return f"kills Python (signal {-code})"


def report(names: list[str]) -> None:
    """Import modules, and print what came of each: the part of `import_all` in the other process."""
    has_torch = True
    for name in names:
        if name in ON_TORCH and not has_torch:
            continue
        try:
            module = importlib.import_module(name)
            said = {
                "file": getattr(module, "__file__", None) or "",
                "version": str(getattr(module, "__version__", "")),
            }
            said |= {"torch": _look_at_torch, "torchvision": _look_at_torchvision}.get(name, lambda _: {})(module)
        except BaseException as error:  # of many kinds, SystemExit among them
            said = {"error": f"{type(error).__name__}: {one_line(error)[:200]}"}
            if isinstance(error, ModuleNotFoundError):
                said["missing"] = error.name
        print("\n" + MARK + json.dumps([name, said]), flush=True)
        has_torch = has_torch and not (name == "torch" and "error" in said)


def _look_at_torchvision(torchvision) -> dict:
    import torch

    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # compiled for one version of torch
    return {}


def _look_at_torch(torch) -> dict:
    torch.ones(1).numpy()  # fails where torch was built for another numpy
    return {"devices": _devices(torch)}


def _devices(torch) -> dict:
    """What torch tells of the machine; what it cannot tell is left out."""
    said: dict = {"gpus": [], "warning": ""}
    try:
        said["cuda_build"] = torch.version.cuda or getattr(torch.version, "hip", None)
        said["threads"] = torch.get_num_threads()
        said["cpu"] = torch.backends.cpu.get_cpu_capability()
    except Exception:
        pass
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            available = torch.cuda.is_available()
        said["warning"] = one_line(caught[0].message)[:160] if caught else ""
        for i in range(torch.cuda.device_count() if available else 0):
            gpu = {"name": torch.cuda.get_device_name(i), "memory": torch.cuda.get_device_properties(i).total_memory}
            said["gpus"].append(gpu)
            try:
                gpu["bf16"] = torch.cuda.get_device_capability(i) >= (8, 0) or bool(getattr(torch.version, "hip", None))
                gpu["free"] = torch.cuda.mem_get_info(i)[0]
                (torch.ones(8, 8, device=f"cuda:{i}") @ torch.ones(8, 8, device=f"cuda:{i}")).sum().item()
            except Exception as error:  # out of memory, no kernel for it, ...
                gpu["error"] = one_line(error)[:160]
    except Exception as error:
        said["warning"] = one_line(error)[:160]
    try:
        if torch.backends.mps.is_available():
            said["mps"] = torch.mps.recommended_max_memory()
    except Exception:
        pass
    return said


# -- what the report says -----------------------------------------------------------------------------------------------


def package_lines(packages: Packages) -> list[Line]:
    """Return the versions, and a line for everything that is wrong with them."""
    bounds, versions, modules = packages.bounds, packages.versions, packages.modules
    told = {name: modules.get(module_of(name), {}) for name in bounds}
    have = {name: versions.get(name) or told[name].get("version") or "-" for name in bounds}
    text = ", ".join(f"{name}\0{version}" for name, version in have.items() if version != "-")
    rows = textwrap.wrap(text, 104, break_on_hyphens=False, break_long_words=False)  # which keeps the pairs together
    lines = [Line("packages", row.replace("\0", " ")) for row in rows]

    def wrong(name: str, text: str, advice: str = INSTALL) -> None:
        lines.append(Line(name, text, "wrong", advice))

    def note(name: str, text: str, advice: str = "") -> None:
        lines.append(Line(name, text, "note", advice))

    missing = [n for n in bounds if have[n] == "-" and (not told[n] or _is_absent(n, told[n]))]
    if missing:
        wrong("packages", f"not installed: {', '.join(missing)}")
    for name, bound in bounds.items():
        if have[name] != "-" and not fits(have[name], bound):
            wrong(name, f"{have[name]}, and requirements.txt wants {bound}")
    for name in bounds:
        for other, bound in packages.wants.get(name, {}).items():
            if name in versions and other in versions and not fits(versions[other], bound):
                wrong(name, f"{versions[name]} wants {other} {bound}, and {versions[other]} is installed")
    for name in bounds:
        if name not in missing:
            lines += _import_lines(name, told[name], packages)

    if versions.get("lightning") in ("2.6.2", "2.6.3"):
        wrong(
            "lightning",
            f"{versions['lightning']} is malicious (pytorch-lightning#21691)",
            "pip uninstall lightning; take every key and password on this machine as stolen",
        )
    elif "lightning" in versions:
        note(
            "lightning",
            f"{versions['lightning']} is installed beside pytorch-lightning: their classes do not know each other",
            "pip uninstall lightning, unless something else needs it; here it is not imported",
        )
    if several := [f"{name} {versions[name]}" for name in OPENCV if name in versions]:
        note(
            "opencv",
            f"{', '.join(several)} beside opencv-python-headless: all write into one folder, the last one wins",
            f"pip uninstall {' '.join(n for n in (*OPENCV, 'opencv-python-headless') if n in versions)}; {INSTALL}",
        )
    if "albumentationsx" in versions:
        wrong(
            "albumentations",
            f"albumentationsx {versions['albumentationsx']} writes over it: same module, other code and licence",
            f"pip uninstall albumentationsx albumentations; {INSTALL}",
        )
    return lines


def _import_lines(name: str, said: dict, packages: Packages) -> list[Line]:
    """Return what is wrong with an import."""
    module, versions = module_of(name), packages.versions
    if not said:
        return []
    error, file, version = said.get("error", ""), said.get("file", ""), said.get("version", "")
    again = f"pip install --force-reinstall --no-deps '{name}{packages.bounds[name]}'"
    if said.get("missing") and not _is_absent(name, said):
        return [Line(name, f"needs {said['missing']}, which is not there", "wrong", again.replace(" --no-deps", ""))]
    if name == "torchvision" and re.search(r"torchvision::|operator|undefined symbol|nms", error):
        cuda = packages.devices.get("cuda_build")
        kind = f"for CUDA {cuda}" if cuda else "for CPUs only"
        return [
            Line(
                name,
                f"{versions.get(name)} has operators that do not load beside torch {versions.get('torch')}, built {kind} ({error})",
                "wrong",
                "take both from one place: pip install --force-reinstall torch torchvision  (for CPUs only, add "
                "--index-url https://download.pytorch.org/whl/cpu)",
            )
        ]
    if re.search(r"[Nn]um[Pp]y is not available|_ARRAY_API|numpy.dtype size changed", error):
        return [
            Line(
                name,
                f"was built for another numpy than {versions.get('numpy', 'the one here')} ({error})",
                "wrong",
                again,
            )
        ]
    if error:
        return [Line(name, f"cannot be imported: {error}", "wrong", again)]
    inside = Path(file).resolve() if file else ROOT
    if not file or (inside.is_relative_to(ROOT) and "-packages" not in str(inside)):
        what = file or f"a folder named {module} without code in it"
        return [Line(name, f"comes from {what}, not from the package", "wrong", f"rename that one; {again}")]
    if name in versions and version and not _agree(version, versions[name]):
        return [Line(name, f"{versions[name]} is installed, but {version} is imported, from {file}", "note", again)]
    return []


def _is_absent(name: str, said: dict) -> bool:
    return said.get("missing") == module_of(name)


def _agree(a: str, b: str) -> bool:
    return all(x == y for x, y in zip(_numbers(a), _numbers(b)))  # noqa: B905 - one may tell more digits
