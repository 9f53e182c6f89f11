"""`python train.py --doctor`: known-bad machines are told, each with what to do, and a machine that is all right is."""

import importlib.metadata
import os
import re
import subprocess
import venv

import pytest
import yaml
from conftest import REPOSITORY

from runner.doctor import data, environment, machine, packages
from runner.doctor.imports import MODULES, try_imports
from runner.doctor.line import Line, shown, without_secrets
from train import main

# -- this machine -------------------------------------------------------------------------------------------------------


def test_a_machine_that_runs_the_tests_is_all_right(monkeypatch, tmp_path, capsys):
    """With nothing in DATA_DIR; of the packages, only those that are worth their seconds are imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*_):\n"
        f"    open({str(tmp_path / 'asked the network')!r}, 'a').close()\n"
        "    raise OSError('no network')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    for name in ("DATA_DIR", "RUNS_DIR", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "new"))
    few = ["torch", "torchvision", "opencv-python-headless", "albumentations", "wandb"]
    monkeypatch.setattr("runner.doctor.try_imports", lambda names: try_imports([n for n in names if n in few]))
    assert main(["--doctor"]) == 0
    said = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["sitecustomize.py"], "it leaves nothing behind"
    assert "\nall right: " in said
    assert not re.search(r"^x ", said, flags=re.M)
    for name in ("code", "system", "python", "packages", "cpu", "gpu", "memory", "wandb"):
        assert re.search(rf"^[ !] {name} ", said, flags=re.M), name
    for name in ("RUNS_DIR", "TMPDIR", "DATA_DIR"):
        assert re.search(rf"^[ !] {name}  +\S.* free", said, flags=re.M), name
    assert f"  torch=={importlib.metadata.version('torch')} " in said
    assert re.search(r"torch uses \d+ thread", said)
    assert re.search(r"MNIST +\d+ experiments  not there; a run downloads 12 MB, or takes 5,000", said)
    assert len(said.splitlines()) < 50
    assert max(map(len, said.splitlines())) <= 120


# -- machines with other packages: a new virtual environment, and stubs in it --------------------------------------------

TORCH = """
from types import SimpleNamespace as Names
version = Names(cuda=None, hip=None)
cuda = Names(is_available=lambda: False)
backends = Names(cpu=Names(get_cpu_capability=lambda: "AVX2"), mps=Names(is_available=lambda: False))
get_num_threads = lambda: 3
ones = zeros = lambda *_: Names(numpy=lambda: None)
"""
NMS = "class ops:\n    nms = staticmethod(lambda *_: None)\n"


@pytest.fixture
def machine_of_stubs(tmp_path):
    """Make a virtual environment in which all that requirements.txt names is a stub; returns its site-packages and a call."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for package, line in packages.wanted().items():
        version = re.search(r"[\d.]+", line.rpartition("]")[2].removeprefix(package))[0]
        info = site / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        code = {"torch": TORCH, "torchvision": NMS}.get(package, "")
        (site / f"{MODULES.get(package, package.replace('-', '_'))}.py").write_text(code)

    def call(code: int, **environment: str) -> str:
        done = subprocess.run(
            [tmp_path / "venv" / "bin" / "python", "-B", REPOSITORY / "train.py", "--doctor"],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return site, call


def unwrapped(said: str) -> str:
    """Put what was wrapped back into one line."""
    return re.sub(r"\n {12}(?=[^ -])", " ", said)


def wrong(said: str) -> list[str]:
    """The lines marked x, each with the advice below it."""
    return re.findall(r"^x (.*\n +-> .*)", unwrapped(said), flags=re.M)


def test_packages_that_are_as_they_should_be(machine_of_stubs):
    _, call = machine_of_stubs
    said = call(0)
    assert not wrong(said)
    assert "torch uses 3 thread(s), AVX2" in said
    assert "gpu       none; torch is built for CPUs only" in said


def test_torchvision_whose_operators_do_not_load(machine_of_stubs):
    site, call = machine_of_stubs
    (site / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (line,) = wrong(call(1))
    assert line.startswith("torchvision ")
    assert "does not go with torch 2.11, its operators do not load" in line
    assert "-> take both from one place: pip install" in line


def test_packages_that_end_python_or_miss_another(machine_of_stubs):
    site, call = machine_of_stubs
    (site / "wandb.py").write_text("import sys\nprint('5')\nsys.exit(3)")
    (site / "skimage.py").write_text("import scipy_that_is_not_there")
    (site / "mlxtend.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    said = call(1)
    assert "wrong: wandb, scikit-image, mlxtend: a run would stop" in said
    assert "wandb     cannot be imported: SystemExit: 3" in said
    assert "cannot be imported: ModuleNotFoundError: No module named 'scipy_that_is_not_there'" in said
    assert "mlxtend   cannot be imported: importing it kills Python (SIGSEGV)" in said
    assert "! packages  not tried to import for that: albumentations, opencv-python-headless" in said


def test_torch_of_another_numpy_is_told_once(machine_of_stubs):
    site, call = machine_of_stubs
    (site / "torch.py").write_text("def ones(_): raise RuntimeError('Numpy is not available')")
    (site / "torchvision.py").write_text("raise ImportError('of torch')")
    (line,) = wrong(call(1))
    assert "torch     cannot be imported: RuntimeError: Numpy is not available" in line


def test_nothing_is_installed_at_all(tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    command = [tmp_path / "venv" / "bin" / "python", "-B", "train.py", "--doctor"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^x packages +not installed: torch, torchvision, .*opencv", unwrapped(done.stdout), flags=re.M)
    assert "            -> pip install -r requirements.txt" in done.stdout
    assert re.search(r"^  RUNS_DIR ", done.stdout, flags=re.M)


def test_what_is_pasted_has_no_secrets(machine_of_stubs, tmp_path):
    site, call = machine_of_stubs
    home = tmp_path / "ann"
    (site / "wandb.py").write_text("import os\nraise OSError(os.environ['WANDB_API_KEY'] + os.path.expanduser(' ~/x'))")
    key = {"WANDB_API_KEY": "0123456789abcdef", "WANDB_BASE_URL": "https://ann:sesame@wandb.example.org"}
    said = call(1, HOME=str(home), RUNS_DIR=f"{home}/runs", DATA_DIR="/home/berta/data", WANDB_MODE="online", **key)
    assert "OSError: *** ~/x" in said
    assert re.search(r"RUNS_DIR  ~/runs \(not there yet\)", said)
    assert "/home/<user>/data" in said
    assert "online: WANDB_MODE=online; a key for wandb.example.org" in said
    for secret in (*key.values(), str(home), "sesame", "berta"):
        assert secret not in said


# -- known-bad combinations of versions ----------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch):
    """Says what is wrong with versions beside what is right otherwise, and with what packages want."""

    def call(versions: dict[str, str], wants: dict[str, list[str]] | None = None) -> list[Line]:
        right = {name: re.search(r"[=>]=([\d.]+)|$", line)[1] or "1" for name, line in packages.wanted().items()}
        monkeypatch.setattr(packages, "version_of", lambda name: (right | versions).get(name, ""))
        monkeypatch.setattr("importlib.metadata.requires", lambda name: (wants or {}).get(name))
        return [line for line in packages.versions() + packages.at_odds() + packages.harmful() if line.level]

    return call


def test_right_versions_are_right(judged):
    assert judged({}) == []
    assert judged({"torch": "2.15.0+cpu", "opencv-python-headless": "4.14.0.94"}) == []
    assert judged({"torch": "2.16.0a0+git12"}) == []


@pytest.mark.parametrize(
    ("versions", "level", "name", "text", "advice"),
    [
        ({"wandb": ""}, "wrong", "packages", "not installed: wandb", "pip install -r"),
        ({"opencv-python-headless": "5.0.0.1"}, "wrong", "opencv-python-headless", "wants <5,>=4.13", "pip install -r"),
        ({"albumentations": "2.0.9"}, "wrong", "albumentations", "wants ==2.0.8", "pip install -r"),
        ({"pytorch-lightning": "2.6.5"}, "wrong", "pytorch-lightning", "wants <2.7,>=2.6.6", "pip install -r"),
        ({"pytorch-lightning": "2.7.0"}, "wrong", "pytorch-lightning", "wants <2.7,>=2.6.6", "pip install -r"),
        ({"jsonargparse": "5.0"}, "wrong", "jsonargparse", "5.0, and requirements.txt wants <5", "pip install -r"),
        ({"torch": "2.10.0+cu128"}, "wrong", "torch", "2.10.0+cu128, and requirements.txt wants >=2.11", "pip install"),
        ({"albumentationsx": "2.1.0"}, "note", "albumentationsx", "writes over", "pip uninstall albumentationsx"),
        ({"opencv-python": "4.14.0"}, "note", "opencv-python", "installed last counts", "pip uninstall opencv-python;"),
        ({"lightning": "2.6.6"}, "note", "lightning", "second copy of pytorch-lightning", "pip uninstall lightning"),
        ({"lightning": "2.6.3"}, "wrong", "lightning", "malicious", "take every key"),
    ],
)
def test_a_bad_combination_of_versions(judged, versions, level, name, text, advice):
    (line,) = judged(versions)
    assert (line.level, line.name) == (level, name)
    assert text in line.text
    assert advice in line.advice


def test_what_packages_want_of_one_another(judged):
    wants = {
        "torchvision": ["torch (==2.13.0)", "pillow!=8.3.*,>=5.3.0", 'gdown>=4.7.3; extra == "gdown"'],
        "albumentations": ["albucore==0.0.24", 'torch<1; sys_platform == "nowhere"'],
    }
    good = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "albucore": "0.0.24", "pillow": "12.0", "gdown": "1.0"}
    assert judged(good, wants) == []
    torch, albucore = judged({**good, "torch": "2.13.1", "albucore": "0.0.33"}, wants)
    assert torch == ("torch", "2.13.1, and torchvision wants ==2.13.0", "wrong", packages.INSTALL)
    assert (albucore.name, albucore.level) == ("albucore", "wrong")


# -- the other sections --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--doctor", "experiments/mnist_mlp.yaml"], ["--doctor=1"], ["--ckpt", "x", "--doctor"]]
)
def test_bad_use(words, capsys):
    assert main(words) == 2
    assert "--doctor looks at this machine, not at an experiment" in capsys.readouterr().err


def folder(name: str) -> Line:
    return {line.name: line for line in environment.folders()}[name]


def test_a_runs_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "runs", tmp_path / "file", "/proc/runs"):
        monkeypatch.setenv("RUNS_DIR", str(path))
        assert folder("RUNS_DIR").level == "wrong", path
        assert "set RUNS_DIR to a folder that can be written" in folder("RUNS_DIR").advice
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "new" / "runs"))
    assert folder("RUNS_DIR").level == ""
    assert "new/runs (not there yet), " in folder("RUNS_DIR").text
    assert not (tmp_path / "new").exists()


def test_a_data_folder_that_cannot_be_written_stops_only_downloads(monkeypatch):
    monkeypatch.setenv("DATA_DIR", "/proc")
    assert folder("DATA_DIR").level == "note"
    assert "nothing can be downloaded to it" in folder("DATA_DIR").text
    assert "set DATA_DIR" in folder("DATA_DIR").advice


@pytest.mark.parametrize(("free", "levels"), [(50e6, ["wrong", "note", "note"]), (5e8, ["note"] * 3), (3e9, [""] * 3)])
def test_a_full_disk(monkeypatch, free, levels):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    assert [line.level for line in environment.folders()] == levels


@pytest.mark.parametrize(
    ("given", "level", "text"),
    [
        ({}, "", "offline: WANDB_MODE is not set; no key"),
        ({"WANDB_API_KEY": "k" * 40}, "", "online: WANDB_MODE is not set; a key for api.wandb.ai"),
        ({"WANDB_MODE": "online"}, "wrong", "no key for api.wandb.ai"),
        ({"WANDB_MODE": "offlin"}, "wrong", "did you mean 'offline'"),
        ({"WANDB_MODE": "disabled"}, "", "disabled: WANDB_MODE=disabled"),
    ],
)
def test_wandb(monkeypatch, tmp_path, given, level, text):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    (line,) = environment.wandb()
    assert line.level == level
    assert text in line.text
    assert "k" * 40 not in line.text


def test_devices(monkeypatch):
    files = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed\n"}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    gpus = [{"name": "H200, 149 GB of 150 GB free"}, {"name": "H200", "error": "no kernel image is available"}]
    said = {"threads": 3, "cpu": "AVX2", "built for": "CUDA 13.2", "gpus": gpus, "warning": "(driver too old)"}
    cpu, good, bad = machine.devices({"torch": said})
    assert "torch uses 3 thread(s), AVX2" in cpu.text
    assert good == ("gpu", "H200, 149 GB of 150 GB free; torch is built for CUDA 13.2, driver 580.82.07", "", "")
    assert (bad.level, bad.advice) == ("wrong", "go on without: --trainer.accelerator cpu")
    _, none = machine.devices({"torch": {**said, "built for": "CPUs only", "gpus": []}})
    assert none.level == "note"
    assert "none that torch finds; torch is built for CPUs only, driver 580.82.07 (driver too old)" in none.text
    assert [line.name for line in machine.devices({"torch": {"error": "x"}})] == ["cpu"]


def test_a_containers_share_of_the_machine(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 9000000 kB\n",
        "/sys/fs/cgroup/memory.max": "2000000000\n",
        "/sys/fs/cgroup/memory.current": "1500000000\n",
        "/sys/fs/cgroup/cpu.max": "150000 100000\n",
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    assert ", 1.5 of " in machine.devices({})[0].text
    (memory,) = machine.memory()
    assert (memory.level, memory.text) == ("note", "500 MB of 2.0 GB free")
    del files["/sys/fs/cgroup/memory.max"]
    assert machine.memory()[0].text == "9.2 GB of 16 GB free"


def test_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(machine, "OLDEST_PYTHON", (99, 0))
    assert [line.level for line in machine.code_and_system()] == ["", "", "wrong"]


def test_a_section_that_fails_is_told_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setattr("runner.doctor.try_imports", lambda _: {})
    monkeypatch.setattr(machine, "memory", lambda: 1 / 0)
    assert main(["--doctor"]) == 0
    said = capsys.readouterr().out
    assert "! doctor    could not look at all: ZeroDivisionError" in said
    assert "  wandb " in said


def test_a_line_as_it_is_shown():
    first = Line("data", "a-b " * 40)
    assert shown(first).splitlines() == ["  data      " + ("a-b " * 27).strip(), " " * 12 + ("a-b " * 13).strip()]
    assert shown(Line("data", "x"), first) == "            x"
    assert shown(Line("data", "x", "wrong", "pip install x"), first) == "x data      x\n            -> pip install x"


def test_names_of_users(monkeypatch):
    monkeypatch.setenv("HOME", "/data/ann")
    assert without_secrets("/data/ann/x /data/anna/y /data/ann") == "~/x /data/anna/y ~"
    assert without_secrets("/home/berta/x C:\\Users\\Carl\\y") == "/home/<user>/x C:\\Users\\<user>\\y"
    monkeypatch.setenv("HOME", "/")
    assert without_secrets("/data/x") == "/data/x"


# -- data ----------------------------------------------------------------------------------------------------------------

MADE = {  # by code, or what comes with Python or a package
    "curves.NoisyPolynomial", "lines.Line", "random_pairs.RandomPairs", "series.Series", "shapes.Shapes",
    "captions.Captions", "dates.Dates", "karate.KarateClub", "text.Text",
}  # fmt: skip


def test_the_data_of_every_experiment_is_known_and_found(small_data):
    """Here conftest.py has written all but two files of weights, where the data modules look for it."""
    for name, read in data.wanted().items():
        config = yaml.safe_load((REPOSITORY / "experiments" / f"{name}.yaml").read_text())
        kind = config["data"]["class_path"].removeprefix("datamodules.")
        is_made = kind in MADE and config["data"].get("init_args", {}).get("source") != "shakespeare"
        assert len([d for d in read if not d.name.startswith("weights")]) == (not is_made), name
        has_weights = re.search(
            r"^ *weights: (?!null)", (REPOSITORY / "experiments" / f"{name}.yaml").read_text(), re.M
        )
        assert len([d for d in read if d.name.startswith("weights")]) == bool(has_weights), name
    assert {d.name for d in data.DATA if not d.folder()} <= {"weights resnet50", "weights vit_b_16"}
    lines = {line.text.split("  ")[0]: line.text for line in data.places()}
    assert lines["MNIST"].endswith("  there: MNIST/raw")


def test_what_is_not_there_and_what_would_be_done(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    said = [line.text for line in data.places()]
    assert sum("  not there; a run downloads " in line for line in said) == 13
    assert sum("  not there; get it from " in line for line in said) == 3
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth").write_bytes(b"")
    (text,) = (line.text for line in data.places() if "resnet50" in line.text)
    assert text.endswith("there: ../hub/checkpoints")
