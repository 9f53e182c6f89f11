"""Which packages are installed, and whether they go together with requirements.txt and with one another."""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import importlib.metadata
import re

from runner.doctor.imports import ROOT
from runner.doctor.line import Line

INSTALL = "pip install -r requirements.txt"
BOTH = "pip install --force-reinstall torch torchvision  [--index-url https://download.pytorch.org/whl/cpu]"
OVERWRITES = "writes into the folder of opencv-python-headless: the one that was installed last counts"
HARMFUL = {  # if installed beside ours: what it does
    "lightning": "a second copy of pytorch-lightning, whose classes do not know the other's; here it is not imported",
    "albumentationsx": "writes over albumentations: the same module, but other code and another licence",
    "opencv-python": OVERWRITES,
    "opencv-contrib-python": OVERWRITES,
}


def wanted() -> dict[str, str]:
    """Return what requirements.txt asks for, by the packages' names, such as {"torch": "torch>=2.11"}."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return {re.match(r"[\w.-]+", line)[0]: line for line in lines if line}


def version_of(package: str) -> str:
    """Return the version of what is installed; empty if it is not, or damaged."""
    try:
        return importlib.metadata.version(package) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions() -> list[Line]:
    """Return the versions, and what is not installed."""
    have = {name: version_of(name) for name in wanted()}
    lines = [Line("packages", " ".join(f"{name}=={version}" for name, version in have.items() if version) or "none")]
    missing = ", ".join(name for name, version in have.items() if not version)
    return [*lines, Line("packages", f"not installed: {missing}", "wrong", INSTALL)] if missing else lines


def at_odds() -> list[Line]:
    """Return what is older or newer than requirements.txt wants, or one of the packages there."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:  # without which Lightning cannot be imported: that will be told
        return []
    wants = {name: importlib.metadata.requires(name) or [] for name in wanted() if version_of(name)}
    wants["requirements.txt"] = list(wanted().values())
    needs = [(who, Requirement(text)) for who, texts in wants.items() for text in texts]
    return [
        Line(need.name, f"{version}, and {who} wants {need.specifier}", "wrong", INSTALL)
        for who, need in needs
        if (need.marker is None or need.marker.evaluate({"extra": ""}))
        and (version := version_of(need.name))
        and not need.specifier.contains(version, prereleases=True)
    ]


def harmful() -> list[Line]:
    """Return what is installed beside ours, and does harm there."""
    if version_of("lightning") in ("2.6.2", "2.6.3"):
        advice = "pip uninstall lightning; take every key and password on this machine as stolen"
        return [Line("lightning", "2.6.2 and 2.6.3 are malicious (pytorch-lightning#21691)", "wrong", advice)]
    again = f"{INSTALL} --force-reinstall"
    return [
        Line(name, f"is installed, too: {what}", "note", f"pip uninstall {name}; {again}")
        for name, what in HARMFUL.items()
        if version_of(name)
    ]


def broken(imported: dict[str, dict]) -> list[Line]:
    """Return what is installed, but cannot be imported, and what was not tried for that."""
    installed = list(filter(version_of, wanted()))
    errors = {name: imported[name]["error"] for name in installed if "error" in imported.get(name, {})}
    lines = [_broken(name, error) for name, error in errors.items()]
    if untried := [name for name in installed if name not in imported]:
        lines.append(Line("packages", f"not tried to import for that: {', '.join(untried)}", "note"))
    return lines


def _broken(name: str, error: str) -> Line:
    if name == "torchvision" and re.search(r"torchvision::|operator|undefined symbol|nms", error):
        text = f"{version_of(name)} does not go with torch {version_of('torch')}, its operators do not load: {error}"
        return Line(name, text, "wrong", f"take both from one place: {BOTH}")
    return Line(name, f"cannot be imported: {error}", "wrong", f"pip install --force-reinstall {name}")
