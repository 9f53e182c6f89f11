"""Small files in the datasets' real layout, and train.py called in this process."""

import os
import pickle
import signal
from collections import defaultdict
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: before anything imports torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from mask_files import write_carvana, write_membrane, write_pets, write_voc_segmentation

# A shell starts what is to run in the background with Ctrl-C ignored, and children inherit that: some tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REAL_DATA_DIR = os.environ.get("DATA_DIR")
REPOSITORY = Path(__file__).parent.parent
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def has_real_mnist() -> bool:
    """Whether the DATA_DIR that pytest was started with holds MNIST as it is."""
    file = Path(REAL_DATA_DIR or "nowhere") / "MNIST" / "raw" / FILES[0]
    return file.exists() and file.stat().st_size == 47_040_016


def write_mnist(root: Path, name: str = "MNIST", train: int = 300, test: int = 103, seed: int = 0) -> Path:
    """Write the four files of MNIST's layout: noise, and a bright bar whose height tells the class."""
    folder = root / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for part, n in (("train", train), ("t10k", test)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        images = rng.integers(0, 90, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 3 : 2 * label + 5, 4:24] = 250
        header = bytes([0, 0, 8, 3]) + np.array([n, 28, 28], ">u4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = bytes([0, 0, 8, 1]) + np.array([n], ">u4").tobytes()
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return folder


def write_cifar10(root: Path) -> Path:
    """Write torchvision's six files of CIFAR-10: noise, and a bright bar whose height tells the class."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in [*((f"data_batch_{i}", 20) for i in range(1, 6)), ("test_batch", 23)]:
        labels = [i % 10 for i in range(n)]
        images = rng.integers(0, 90, (n, 3, 32, 32), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 3 * label + 1 : 3 * label + 3] = 250
        # as Python 2 wrote them: protocol 2, keys of bytes
        (folder / name).write_bytes(pickle.dumps({b"data": images.reshape(n, -1), b"labels": labels}, protocol=2))
    return folder


def write_hymenoptera(root: Path) -> None:
    """Write class folders of photos in miniature, without a test folder, and a backbone's weights."""
    import torch
    from PIL import Image
    from torchvision.models import mobilenet_v2

    rng = np.random.default_rng(0)
    for part, n in (("train", 5), ("val", 3)):
        for level, name in ((40, "ants"), (160, "bees")):
            folder = root / "hymenoptera" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(level, level + 60, (48, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    torch.manual_seed(0)
    weights = {k: v for k, v in mobilenet_v2().state_dict().items() if k.startswith("features.")}
    (root / "weights").mkdir()
    torch.save(weights, root / "weights" / "mobilenet_v2_features.pth")


def write_voc(folder: Path, classes: tuple[str, str, str]) -> None:
    """Write pictures with coloured rectangles in Pascal VOC's layout, of three classes; some have none."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    number = 0
    for part, n in (("train", 5), ("val", 2), ("test", 3)):
        names = []
        for i in range(n):
            number += 1
            names.append(f"cell_{number}")
            pixels = rng.integers(180, 220, (60, 80, 3), dtype=np.uint8)
            objects = ""
            for k, kind in enumerate(classes if i != 1 else ()):
                x, y = 4 + 25 * k, int(rng.integers(2, 30))
                pixels[y : y + 20, x : x + 18, k] = 30
                corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + 18, "ymax": y + 20}
                box = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
                objects += f"<object><name>{kind}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{names[-1]}.jpg")
            size = "<size><width>80</width><height>60</height><depth>3</depth></size>"
            xml = f"<annotation><filename>{names[-1]}.jpg</filename>{size}{objects}</annotation>"
            (folder / "Annotations" / f"{names[-1]}.xml").write_text(xml)
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names) + "\n")


def write_names(root: Path) -> None:
    """Write a file of names for each of 18 languages: each has an ending of its own."""
    folder = root / "names"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(18):
        stems = ["".join(rng.choice(list("aeioubdlmnr"), rng.integers(1, 6))).capitalize() for _ in range(20)]
        (folder / f"L{k:02d}.txt").write_text("".join(f"{stem}{chr(97 + k)}{chr(98 + k)}\n" for stem in stems))


def write_shakespeare(root: Path) -> None:
    """Write a text of 5,000 characters where tiny Shakespeare is looked for."""
    (root / "tinyshakespeare").mkdir()
    lines = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"
    (root / "tinyshakespeare" / "input.txt").write_text(lines * 60)


def write_planetoid(root: Path, name: str = "Cora", features: int = 1433, classes: int = 7) -> Path:
    """Write a citation network in Planetoid's eight files: words tell the class, and so do those that cite each other."""
    import scipy.sparse

    folder = root / "Planetoid" / name / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    train, test = 2 * classes, 23  # to validate on there are always 500
    known = train + 500
    labels = np.arange(known + test) % classes
    block = features // classes
    words = (rng.random((len(labels), features)) < 5 / features).astype(np.float32)
    for row, label in zip(words, labels, strict=True):
        row[label * block + rng.integers(0, min(block, 12), 6)] = 1
    graph = {i: [] for i in range(len(labels))}
    for i in range(len(labels) - classes):  # a chain of each class
        graph[i].append(i + classes)
        graph[i + classes].append(i)
    graph[3] += [3, 3 + classes]  # a self-loop, and a citation that is there already
    one_hot = np.eye(classes, dtype=np.int32)[labels]
    order = rng.permutation(test)
    numbers = known + order
    if name == "CiteSeer":  # two papers that nobody cites are in none of its files
        gone = test // 2
        numbers = np.where(order < gone, numbers, numbers + 2)
        move = lambda i: i + 2 * (i >= known + gone)  # noqa: E731
        graph = {move(i): [move(j) for j in others] for i, others in graph.items()}
    rows = {"x": slice(0, train), "tx": known + order, "allx": slice(0, known)}
    for part, which in rows.items():
        parts = {part: scipy.sparse.csr_matrix(words[which]), part.replace("x", "y"): one_hot[which]}
        for file, content in parts.items():
            (folder / f"ind.{name.lower()}.{file}").write_bytes(pickle.dumps(content, protocol=2))
    (folder / f"ind.{name.lower()}.graph").write_bytes(pickle.dumps(defaultdict(list, graph), protocol=2))
    (folder / f"ind.{name.lower()}.test.index").write_text("".join(f"{i}\n" for i in numbers))
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A DATA_DIR with a small one of each dataset in it. Tests that damage files make their own."""
    root = tmp_path_factory.mktemp("data")
    write_small_data(root)
    return root


def write_small_data(root: Path) -> None:
    """Write a small one of each dataset."""
    write_mnist(root, "MNIST")
    write_mnist(root, "FashionMNIST", seed=1)
    write_cifar10(root)
    write_hymenoptera(root)
    write_planetoid(root)
    write_voc(root / "BCCD", ("Platelets", "RBC", "WBC"))
    write_voc(root / "VOCdevkit" / "VOC2007", ("bird", "cat", "dog"))
    for write in (write_carvana, write_membrane, write_pets, write_voc_segmentation):
        write(root)
    write_names(root)
    write_shakespeare(root)


@pytest.fixture(autouse=True)
def isolated(small_data, tmp_path, monkeypatch):
    """Every test has small data, a runs folder of its own, and no wandb unless it asks."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("DATA_DIR", str(small_data))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    for key in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Most tests are not about pictures: leave out the drawing."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, dpi: path.write_bytes(b""))
        monkeypatch.setattr("runner.run.RunWandbLogger.log_image", lambda *_: None)


TINY = ("--data.batch_size=32", "--data.val_size=53", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=3")


@pytest.fixture
def train(tmp_path):
    """Call train.py's main; returns the folder of the newest run, after asserting exit code 0."""
    from train import main

    def call(*argv: str, experiment: str = "experiments/mnist_mlp.yaml", tiny: tuple[str, ...] = TINY) -> Path:
        words = [experiment, *tiny, *argv] if experiment else list(argv)
        assert main(words) == 0
        return max((tmp_path / "runs").glob("*/*/receipt.json"), key=lambda p: p.stat().st_mtime_ns).parent

    return call


# A small net with all that makes resuming hard: dropout, shuffling, momentum, a scheduler.
SMALL_NET = (
    "--model.sizes=[784, 32, 10]",
    "--model.dropout=0.3",
    "--model.lr_scheduler=torch.optim.lr_scheduler.ExponentialLR",
    "--model.lr_scheduler.gamma=0.7",
)
