"""`python train.py --doctor`: known-bad machines are told, each with what to do, and a machine that is all right is."""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import venv
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from runner import doctor, doctor_data
from runner.doctor import without_secrets
from runner.doctor_data import Data, experiments_by_data, wanted_by
from runner.doctor_packages import Packages, fits, import_all, module_of, package_lines, read_requirement
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
    few = ["torch", "torchvision", "cv2", "albumentations", "wandb"]
    monkeypatch.setattr("runner.doctor_packages.import_all", lambda names: import_all([n for n in names if n in few]))
    assert main(["--doctor"]) == 0
    said = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["sitecustomize.py"], "it leaves nothing behind"
    assert "\nall right: " in said
    assert not re.search(r"^x ", said, flags=re.M)
    for name in ("code", "system", "python", "packages", "cpu", "gpu", "compile", "memory", "wandb"):
        assert re.search(rf"^[ !] {name} ", said, flags=re.M), name
    for name in ("RUNS_DIR", "TMPDIR", "DATA_DIR"):
        assert re.search(rf"^[ !] {name}  +\S.* free", said, flags=re.M), name
    assert f"torch {importlib.metadata.version('torch')}, " in said
    assert re.search(r"torch uses \d+ thread", said)
    assert re.search(r"MNIST +\d+ experiments not there; a run downloads 12 MB; without a network 5,000", said)
    assert len(said.splitlines()) < 50
    assert max(map(len, said.splitlines())) < 160


# -- machines with other packages: a new virtual environment, and stubs in it --------------------------------------------

TORCH = """
__version__ = "2.15.0"
class version: cuda = None
class Tensor:
    def numpy(self): NUMPY
def ones(*_): return Tensor()
def zeros(*_): return Tensor()
"""
NMS = "class ops:\n    nms = staticmethod(lambda *_: None)\n"


def install(site: Path, package: str, version: str, code: str | None = "", requires: tuple[str, ...] = ()) -> None:
    """Write a package: what pip knows of it and, unless `code` is None, its module."""
    info = site / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n{needs}")
    if code is not None:
        (site / f"{module_of(package)}.py").write_text(code)


@pytest.fixture
def machine(tmp_path):
    """Make a virtual environment in which all that requirements.txt names is a stub; returns its site-packages and a call."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "yaml").symlink_to(Path(yaml.__file__).parent)
    for line in (REPOSITORY / "requirements.txt").read_text().splitlines():
        package, bounds = read_requirement(line)
        if package:
            version = re.search(r"[\d.]+", bounds)[0]
            code = {"torch": TORCH.replace("NUMPY", "pass"), "torchvision": NMS}.get(package, "")
            install(site, package, version, code)

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


def wrong(said: str) -> list[str]:
    """The lines marked x, each with the advice below it."""
    return re.findall(r"^x (.*\n +-> .*)", said, flags=re.M)


def test_packages_that_are_as_they_should_be(machine):
    _, call = machine
    assert not wrong(call(0))


def test_torchvision_whose_operators_do_not_load(machine):
    site, call = machine
    (site / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (line,) = wrong(call(1))
    assert line.startswith("torchvision ")
    assert "operators that do not load beside torch 2.11, built for CPUs only" in line
    assert "-> take both from one place: pip install" in line


def test_a_package_that_kills_python_and_others_that_are_broken(machine):
    """Each is told once, what comes after it is still looked at, and what needs a broken torch is not blamed for it."""
    site, call = machine
    (site / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    (site / "torchvision.py").write_text("import torch")
    (site / "wandb.py").write_text("import sys\nsys.exit(3)")
    (site / "mlxtend.py").write_text("import os\nos._exit(7)")
    (site / "skimage.py").write_text("import scipy_that_is_not_there")
    said = call(1)
    assert "wrong: torch, wandb, scikit-image, mlxtend: a run would stop" in said
    assert "cannot be imported: importing it kills Python (SIGSEGV)" in said
    assert "importing it ends Python with exit code 7" in said
    assert "scikit-image needs scipy_that_is_not_there, which is not there" in said


def test_torch_of_another_numpy(machine):
    site, call = machine
    (site / "torch.py").write_text(TORCH.replace("NUMPY", "raise RuntimeError('Numpy is not available')"))
    (site / "torchvision.py").write_text("raise ImportError('of torch')")  # which is not tried
    install(site, "numpy", "2.4.6", None)
    (line,) = wrong(call(1))
    assert "torch     was built for another numpy" in line


def test_nothing_is_installed_at_all(tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    command = [tmp_path / "venv" / "bin" / "python", "-B", "train.py", "--doctor"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^x packages +not installed: torch, torchvision, .*opencv", done.stdout, flags=re.M)
    assert "            -> pip install -r requirements.txt" in done.stdout
    assert re.search(r"^x data +the experiments cannot be read without PyYAML", done.stdout, flags=re.M)
    assert re.search(r"^  RUNS_DIR ", done.stdout, flags=re.M)


def test_what_is_pasted_has_no_secrets(machine, tmp_path):
    site, call = machine
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


def judged(versions: dict[str, str], wants: dict | None = None, modules: dict | None = None) -> list:
    """What is said of these versions beside what is right otherwise."""
    bounds = dict(map(read_requirement, (REPOSITORY / "requirements.txt").read_text().splitlines()))
    bounds.pop("")
    right = {name: re.search(r"[\d.]+", bound)[0] for name, bound in bounds.items()}
    return [
        line for line in package_lines(Packages(bounds, right | versions, wants or {}, modules or {})) if line.level
    ]


def test_right_versions_are_right():
    assert judged({}) == []
    assert judged({"torch": "2.15.0+cpu", "opencv-python-headless": "4.14.0.94"}) == []


@pytest.mark.parametrize(
    ("versions", "level", "name", "text", "advice"),
    [
        ({"opencv-python-headless": "5.0.0.1"}, "wrong", "opencv-python-headless", "wants >=4.13,<5", "pip install -r"),
        ({"opencv-python-headless": "4.9.0.80"}, "wrong", "opencv-python-headless", "4.9.0.80, and", "pip install -r"),
        ({"albumentations": "2.0.9"}, "wrong", "albumentations", "wants ==2.0.8", "pip install -r"),
        ({"albumentationsx": "2.1.0"}, "wrong", "albumentations", "writes over it", "pip uninstall albumentationsx"),
        ({"opencv-python": "4.14.0"}, "note", "opencv", "the last one wins", "uninstall opencv-python opencv-python-h"),
        ({"wandb": "0.28.2"}, "wrong", "wandb", "0.28.2, and requirements.txt wants >=0.31", "pip install -r"),
        ({"pytorch-lightning": "2.6.5"}, "wrong", "pytorch-lightning", "wants >=2.6.6,<2.7", "pip install -r"),
        ({"pytorch-lightning": "2.7.0"}, "wrong", "pytorch-lightning", "wants >=2.6.6,<2.7", "pip install -r"),
        ({"jsonargparse": "5.0"}, "wrong", "jsonargparse", "wants >=4.53,<5", "pip install -r"),
        ({"torch": "2.10.0+cu128"}, "wrong", "torch", "2.10.0+cu128, and requirements.txt wants >=2.11", "pip install"),
        ({"lightning": "2.6.6"}, "note", "lightning", "beside pytorch-lightning", "pip uninstall lightning, unless"),
        ({"lightning": "2.6.3"}, "wrong", "lightning", "malicious", "take every key"),
    ],
)  # fmt: skip
def test_a_bad_combination_of_versions(versions, level, name, text, advice):
    (line,) = judged(versions)
    assert (line.level, line.name) == (level, name)
    assert text in line.text
    assert advice in line.advice


def test_what_packages_want_of_one_another():
    wants = {
        "torchvision": {"torch": "==2.13.0", "pillow": "!=8.3.*,>=5.3.0"},
        "albumentations": {"albucore": "==0.0.24"},
    }
    good = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "albucore": "0.0.24", "pillow": "12.0"}
    assert judged(good, wants) == []
    torch, pillow, albucore = judged({**good, "torch": "2.13.1", "pillow": "8.3.2", "albucore": "0.0.33"}, wants)[-3:]
    assert torch.text == "0.28.0 wants torch ==2.13.0, and 2.13.1 is installed"
    assert "wants pillow !=8.3.*" in pillow.text
    assert albucore.level == "wrong"


def test_a_module_that_hides_a_package():
    inside, venv_inside = REPOSITORY / "wandb.py", REPOSITORY / ".venv/lib/python3.11/site-packages/wandb/__init__.py"
    (line,) = judged({}, modules={"wandb": {"file": str(inside), "version": ""}})
    assert (line.name, line.level) == ("wandb", "wrong")
    assert "rename that one" in line.advice
    assert judged({}, modules={"wandb": {"file": str(venv_inside), "version": "0.31"}}) == []
    (line,) = judged({}, modules={"wandb": {"file": "", "version": ""}})
    assert "a folder named wandb without code in it" in line.text


def test_opencv_that_another_package_overwrote():
    modules = {"cv2": {"file": "/x/site-packages/cv2/__init__.py", "version": "4.9.0"}}
    (line,) = judged({"opencv-python-headless": "4.14.0.94"}, modules=modules)
    assert (line.level, line.text[:44]) == ("note", "4.14.0.94 is installed, but 4.9.0 is importe")
    modules["cv2"]["version"] = "4.14.0"
    assert judged({"opencv-python-headless": "4.14.0.94"}, modules=modules) == []


@pytest.mark.parametrize(
    ("version", "bounds", "fit"),
    [
        ("2.6.6", ">=2.6.6,<2.7", True), ("2.10", ">=2.9", True), ("2.9", ">=2.10", False), ("2.7.0", "<2.7", False),
        ("2.0.8", "==2.0.8", True), ("2.0.8.1", "==2.0.8", False), ("8.3.2", "!=8.3.*", False), ("8.4", "!=8.3.*", True),
        ("3.9.4", "~=3.9.0", True), ("3.10", "~=3.9.0", False), ("2.8.9", "<=2.9", True), ("2.9", ">2.9", False),
        ("2.9.0", "==2.9", True), ("2.12.0a0+git12", ">=2.11", True), ("1.0", "", True), ("?", ">=1", False),
    ],
)  # fmt: skip
def test_fits(version, bounds, fit):
    assert fits(version, bounds) is fit


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("jsonargparse[signatures]>=4.53,<5", ("jsonargparse", ">=4.53,<5")),
        ("# torch>=2", ("", "")),
        ("torch (==2.13.0)", ("torch", "==2.13.0")),
        ("Foo_Bar  # why", ("foo-bar", "")),
        ('triton~=3.9.0; platform_system == "Linux"', ("", "")),
        ("-r requirements.txt", ("", "")),
    ],
)
def test_read_requirement(line, said):
    assert read_requirement(line) == said


# -- the other sections --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--doctor", "experiments/mnist_mlp.yaml"], ["--doctor=1"], ["--ckpt", "x", "--doctor"]]
)
def test_bad_use(words, capsys):
    assert main(words) == 2
    assert "--doctor looks at this machine, not at an experiment" in capsys.readouterr().err


def only(lines: list, name: str):
    (line,) = (line for line in lines if line.name == name)
    return line


def test_a_runs_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path / "file" / "runs", tmp_path / "file", "/proc/runs", tmp_path / "link" / "runs"):
        monkeypatch.setenv("RUNS_DIR", str(folder))
        line = only(doctor.folder_lines({}), "RUNS_DIR")
        assert line.level == "wrong", folder
        assert "set RUNS_DIR to a folder that can be written" in line.advice
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "new" / "runs"))
    assert only(doctor.folder_lines({}), "RUNS_DIR").level == ""
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("RUNS_DIR", "~/runs")
    assert "not your home folder" in only(doctor.folder_lines({}), "RUNS_DIR").text


def test_a_data_folder_that_cannot_be_written_stops_only_downloads(monkeypatch):
    monkeypatch.setenv("DATA_DIR", "/proc")
    line = only(doctor.folder_lines({}), "DATA_DIR")
    assert (line.level, line.advice) == ("note", "")
    line = only(doctor.folder_lines({"MNIST": 12}), "DATA_DIR")
    assert "what is missing, such as MNIST, cannot be downloaded to it" in line.text
    assert "set DATA_DIR" in line.advice


def test_a_full_disk(monkeypatch):
    def free(n):
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": n, "total": n, "used": 0}))
        return {line.name: line for line in doctor.folder_lines({"VOC2012": 2000, "MNIST": 12})}

    lines = free(50e6)
    assert lines["RUNS_DIR"].level == "wrong"
    assert "checkpoints may not fit" in lines["RUNS_DIR"].text
    assert lines["TMPDIR"].level == "note"
    lines = free(3e9)
    assert [lines[name].level for name in ("RUNS_DIR", "TMPDIR", "DATA_DIR")] == ["", "", "note"]
    assert "too little to download VOC2012" in lines["DATA_DIR"].text
    assert {line.level for line in free(9e9).values()} == {""}


@pytest.mark.parametrize(
    ("environment", "level", "text"),
    [
        ({}, "", "offline: WANDB_MODE is not set; no key"),
        ({"WANDB_API_KEY": "k" * 40}, "", "online: WANDB_MODE is not set; a key for api.wandb.ai"),
        ({"WANDB_MODE": "online"}, "wrong", "no key for api.wandb.ai"),
        ({"WANDB_MODE": "offlin"}, "wrong", "did you mean 'offline'"),
        ({"WANDB_MODE": "disabled"}, "", "disabled: WANDB_MODE=disabled"),
        ({"WANDB_BASE_URL": "wandb.example.org"}, "wrong", "WANDB_BASE_URL is no server's address"),
    ],
)
def test_wandb(monkeypatch, tmp_path, environment, level, text):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    (line,) = doctor.wandb_lines()
    assert line.level == level
    assert text in line.text
    assert "k" * 40 not in line.text


def test_devices(monkeypatch):
    files = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed\n"}
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(path, ""))
    gpu = {"name": "H200", "memory": 150e9, "free": 149e9, "bf16": True}
    said = {"gpus": [gpu, {**gpu, "error": "no kernel image is available"}], "cuda_build": "13.2", "warning": ""}
    said |= {"threads": 3, "cpu": "AVX2"}
    cpu, good, bad = doctor.device_lines(Packages({}, {}, devices=said))
    assert "torch uses 3 thread(s), AVX2" in cpu.text
    assert good.level == ""
    assert "cuda:0 H200, 149 GB of 150 GB free, bf16; torch is built for CUDA 13.2, driver 580.82.07" in good.text
    assert bad.level == "wrong"
    assert "--trainer.accelerator cpu" in bad.advice
    _, none = doctor.device_lines(Packages({}, {}, devices={"gpus": [], "cuda_build": None, "warning": "too old"}))
    assert none.level == "note"
    assert "torch finds no GPU: torch is built for CPUs only (too old)" in none.text
    _, apple = doctor.device_lines(Packages({}, {}, devices={"gpus": [], "warning": "", "mps": 17e9}))
    assert "mps (Apple), 17 GB" in apple.text


def test_no_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    (line,) = doctor.compiler_lines()
    assert (line.level, line.text) == ("note", "no C++ compiler for torch.compile")


def test_a_containers_memory(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 9000000 kB\n",
        "/sys/fs/cgroup/memory.max": "2000000000\n",
        "/sys/fs/cgroup/memory.current": "1500000000\n",
        "/sys/fs/cgroup/cpu.max": "150000 100000\n",
    }
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 64e6, "total": 64e6}))
    memory, shared = doctor.memory_lines()
    assert (memory.level, memory.text) == ("note", "500 MB of 2.0 GB free")
    assert shared.level == "note"
    assert "--shm-size" in shared.advice
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    assert doctor._usable_cores() == 1.5
    del files["/sys/fs/cgroup/memory.max"]
    assert doctor.memory_lines()[0].text == "9.2 GB of 16 GB free"


def test_python_that_is_too_old(monkeypatch):
    assert only(doctor.system_lines(), "python").level == ""
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    assert only(doctor.system_lines(), "python").level == "wrong"


def test_a_section_that_fails_is_told_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_packages", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "memory_lines", lambda: 1 / 0)
    assert main(["--doctor"]) == 0
    said = capsys.readouterr().out
    assert said.count("could not look at all: ZeroDivisionError") == 2
    assert "  wandb " in said


def test_names_of_users(monkeypatch):
    monkeypatch.setenv("HOME", "/data/ann")
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    assert without_secrets("/data/ann/x /data/anna/y /data/ann") == "~/x /data/anna/y ~"
    assert without_secrets("/scratch/ann/x, /scratch/ann: /annex") == "/scratch/<user>/x, /scratch/<user>: /annex"
    assert without_secrets("/home/berta/x C:\\Users\\Carl\\y") == "/home/<user>/x C:\\Users\\<user>\\y"
    monkeypatch.setenv("HOME", "/")
    assert without_secrets("/data/x") == "/data/x"


# -- data ----------------------------------------------------------------------------------------------------------------


def test_the_data_of_every_experiment_is_known_and_found(small_data):
    counts, made, odd = experiments_by_data()
    assert not odd
    assert made > 40
    missing = {data.name for data in counts if not data.found()}
    assert missing <= {"weights resnet50", "weights vit_b_16"}, "which conftest.py writes none of"
    lines = {line.text.split("  ")[0]: line.text for line in doctor.data_lines(counts, made, odd)}
    assert "there, " in lines["MNIST"]
    assert lines["MNIST"].endswith(": MNIST/raw")
    assert lines["BCCD"].endswith(": BCCD")


def test_what_is_not_there_and_what_would_be_done(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    counts, made, odd = experiments_by_data()
    lines = {line.text.split("  ")[0]: line.text for line in doctor.data_lines(counts, made, odd)}
    assert lines["CIFAR-10"].endswith("not there; a run downloads 170 MB")
    assert lines["BCCD"].endswith("not there; to be had from github.com/Shenggan/BCCD_Dataset")
    assert lines["weights mobilenet_v2"].endswith("not there; a run downloads 14 MB")
    wanted = doctor.to_download(counts)
    assert wanted["VOC2012 masks"] == 2000
    assert "BCCD" not in wanted
    assert all(wanted.values()), "the size of a download is unknown"
    assert {data.name for data in counts if not data.has_download} == doctor_data.BY_HAND.keys()

    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_text("")
    lines = {line.text.split("  ")[0]: line.text for line in doctor.data_lines(counts, made, odd)}
    assert "there in part: no MNIST/raw/train-labels-idx1-ubyte; a run downloads 12 MB" in lines["MNIST"]

    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth").write_bytes(bytes(2_000_000))
    (text,) = (line.text for line in doctor.data_lines(experiments_by_data()[0], 0, []) if "resnet50" in line.text)
    assert "there, 2.0 MB: hub/checkpoints/resnet50-0676ba61.pth" in text


def test_data_in_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names").mkdir()
    (data,) = wanted_by(
        {"model": {}, "data": {"class_path": "datamodules.names.Names", "init_args": {"folder": "names"}}}
    )
    assert data.found() == [Path("names")]
    assert not data.has_download


def test_data_of_an_unknown_kind_is_told(monkeypatch, tmp_path):
    config = {"model": {}, "data": {"class_path": "datamodules.new.New"}}
    (tmp_path / "new.yaml").write_text(json.dumps(config))
    (tmp_path / "broken.yaml").write_text("a: [")
    monkeypatch.setattr(doctor_data, "EXPERIMENTS", tmp_path)
    counts, made, odd = experiments_by_data()
    assert (counts, made) == ({}, 0)
    assert "broken.yaml: " in odd[0]
    assert "new.yaml: data of a kind that is not known here: new.New" in odd[1]


def test_places_are_those_of_the_data_modules():
    """Data modules look where the doctor looks. (Those that are made by code have no such place.)"""
    seen = set()
    for path in sorted((REPOSITORY / "experiments").glob("*.yaml")):
        given = yaml.safe_load(path.read_text())["data"]
        arguments = {k: v for k, v in given.get("init_args", {}).items() if k != "proposals"}
        data = [d for d in wanted_by({"model": {}, "data": given}) if not d.name.startswith("weights")]
        if not data or given["class_path"].endswith("ImageMasks") or data[0].name in seen:
            continue
        seen.add(data[0].name)
        module, _, name = given["class_path"].rpartition(".")
        made = getattr(importlib.import_module(module), name)(**arguments)
        if hasattr(made, "places"):
            assert [data[0].root() / place for (place,) in data[0].places] == [*made.places]
        else:
            place = made.folder if isinstance(getattr(made, "folder", None), Path) else made.path
            paths = [data[0].root() / path for path in data[0].places[0]]
            assert all(path.is_relative_to(place) for path in paths), path
            assert os.path.commonpath([*paths, place]) == str(place)
            for file in getattr(made, "missing", []):
                assert Path(file).name in {path.name for path in paths}
    assert len(seen) > 9
    assert Data("x", (("a",),)).missing() == []
