"""How good pictures are that a model made up: what a LeNet sees in them, beside what it sees in real ones.

The judge is a LeNet that was trained on the same data: as a digit is small and grey, an ImageNet network has little to
say of it. Its last hidden layer gives the features that the Frechet distance is taken in, its probabilities tell which
class a sample is of, and how sure that is.

Shapes: N and M pictures, C channels, D features, K classes.

Source: Heusel et al. 2017 (Frechet Inception distance, there between 50,000 samples and in Inception's features: numbers
do not compare).
"""

import hashlib
import io
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.in_memory import InMemoryDataModule
from lit_models.lenet import LeNet
from lit_models.pretrained import load_pretrained
from runner.errors import InputError
from runner.files import write_whole

EPOCHS, BATCH_SIZE, MAX_LR = 3, 100, 5e-3  # of a judge that is trained here, as experiments/mnist_lenet.yaml's LeNet is
LEAST_ACC = 0.5  # of a judge that was trained elsewhere: one below it was trained for something else


class Judge:
    """A LeNet in evaluation mode, in single precision whatever the model's is; no module, so that no checkpoint holds it.

    Args:
        network: trained.
    """

    def __init__(self, network: LeNet):
        self.network = network.eval().requires_grad_(False).float()
        self.head = network.fc3
        network.fc3 = nn.Identity()  # what is left gives the last hidden layer

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (N, C, 28 or 32, 28 or 32) in [0, 1] to features (N, D) and probabilities (N, K), on the CPU."""
        device = images.device
        with torch.autocast(device.type, enabled=False):
            features = self.network.to(device)(images.float())  # (N, D)
            probabilities = self.head.to(device)(features).softmax(dim=1)  # (N, K)
        return features.cpu(), probabilities.cpu()

    @property
    def sha256(self) -> str:
        """Of its weights."""
        digest = hashlib.sha256()
        for tensor in (*self.network.parameters(), *self.head.parameters()):
            digest.update(tensor.cpu().numpy())
        return digest.hexdigest()


# -- where a judge comes from ----------------------------------------------------------------------------------------


def find_judge(data: InMemoryDataModule, file: str | None = None) -> Judge:
    """Return a LeNet that knows this data.

    Args:
        data: set up; pictures as uint8 and their labels.
        file: a checkpoint of a run of `experiments/mnist_lenet.yaml` or another of LeNet's, as it is or below
            `DATA_DIR`; None: the one that was trained for this data before, else it is trained now, and kept in
            `RUNS_DIR/judges`.

    Raises:
        InputError: the data has no labelled pictures of 28 or 32 pixels, or the file cannot be had or does not know them.
    """
    if not is_labelled_pictures(data):
        raise InputError(
            f"a LeNet judges the samples, and learns to from labelled pictures of 28 x 28 or 32 x 32 pixels in memory, "
            f"such as datamodules.mnist.MNIST: {type(data).__name__} has none"
        )
    images, labels = data.train_set.tensors
    size, channels, classes = images.shape[-1], images.shape[1], len(data.classes)
    with torch.random.fork_rng(devices=[]):  # leaves the run's random numbers, and does not depend on them
        torch.manual_seed(0)
        network = LeNet(image_size=size, channels=channels, num_classes=classes)
    if file is None:
        if not _load(network, path := _path(data)):
            print(f"judge: a LeNet learns to tell {len(labels):,} pictures apart, once: {path}", flush=True)
            train(network, images, labels)
            _keep(network, path)
        return Judge(network)
    try:
        load_pretrained(network, file, None)
    except InputError as error:
        raise InputError(f"judge: {error}") from None
    judge = Judge(network)
    held_out, held_out_labels = (t[:1000] for t in (data.val_set or data.train_set).tensors)
    acc = (judge.look(as_pixels(held_out))[1].argmax(dim=1) == held_out_labels).double().mean().item()
    if acc < LEAST_ACC:
        raise InputError(
            f"judge {file} tells only {acc:.1%} of {type(data).__name__}'s real pictures right: it was trained on others, "
            "or on pixels of another scale"
        )
    return judge


def is_labelled_pictures(data: object) -> bool:
    """Whether a LeNet can be trained on it."""
    tensors = data.train_set.tensors if isinstance(data, InMemoryDataModule) and data.train_set else ()
    if len(tensors) != 2 or not getattr(data, "classes", None):
        return False
    images = tensors[0]
    return images.dtype == torch.uint8 and images.ndim == 4 and images.shape[-2:] in ((28, 28), (32, 32))


def as_pixels(images: Tensor) -> Tensor:
    """Turn uint8 images to floats in [0, 1]."""
    return images.float().div_(255)


def train(network: LeNet, images: Tensor, labels: Tensor) -> None:
    """Train a LeNet on images (N, C, H, W) uint8 and labels (N,), on the CPU, in an order that is always the same."""
    optimizer = torch.optim.Adam(network.parameters(), lr=MAX_LR, fused=True)
    steps = EPOCHS * -(-len(labels) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    network.train()
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(EPOCHS):
            for index in torch.randperm(len(labels), generator=generator).split(BATCH_SIZE):
                optimizer.zero_grad()
                F.cross_entropy(network(as_pixels(images[index])), labels[index]).backward()
                optimizer.step()
                scheduler.step()


def _path(data: InMemoryDataModule) -> Path:
    recipe = f"{data.fingerprint} {EPOCHS} {BATCH_SIZE} {MAX_LR}"  # of the data and the way of training
    key = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    return Path(os.environ.get("RUNS_DIR") or "runs") / "judges" / f"{type(data).__name__}-{key}.pth"


def _load(network: LeNet, path: Path) -> bool:
    """Load what was kept; a file that is damaged counts as none."""
    if not path.is_file():
        return False
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises many kinds
        warnings.warn(f"judge {path} cannot be read, and is trained anew: {error}", stacklevel=2)
        return False
    return True


def _keep(network: LeNet, path: Path) -> None:
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getbuffer())
    except OSError as error:
        warnings.warn(
            f"the judge cannot be kept in {path.parent} ({error.strerror}): it is trained again next time", stacklevel=2
        )


# -- what is measured ------------------------------------------------------------------------------------------------


def sample_quality(
    features: Tensor, probabilities: Tensor, real_features: Tensor, asked: Tensor | None = None
) -> dict[str, float]:
    """Return what the judge says of N samples.

    Args:
        features: (N, D) of the samples.
        probabilities: (N, K) of the samples.
        real_features: (M, D) of real pictures.
        asked: (N,) the classes that the samples were to be of, if the model can be asked.

    Returns:
        `frechet`: the Frechet distance between samples and real pictures; `confidence`: the mean of each sample's
        largest probability; `least_class`: the share of the class that is seen in the fewest samples, at best 1 / K (0:
        the model has forgotten a class, "mode collapse"); `right_class`, if asked: the share of samples in which the
        asked class is seen. NaN samples give NaN.
    """
    largest, seen = probabilities.max(dim=1)
    quality = {
        "frechet": frechet_distance(features, real_features),
        "confidence": float(largest.double().mean()),
        "least_class": min(class_shares(probabilities)),
    }
    if asked is not None:
        quality["right_class"] = float((seen == asked.cpu()).double().mean())
    return quality


def class_shares(probabilities: Tensor) -> list[float]:
    """Return for each of K classes the share of N samples with probabilities (N, K) that it is the likeliest of."""
    counts = torch.bincount(probabilities.argmax(dim=1), minlength=probabilities.shape[1])
    return (counts.double() / len(probabilities)).tolist()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the (squared) Frechet distance between two normal distributions fitted to features (N, D) and (M, D).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with means m and covariances C, in double precision. The product
    has the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric: so all are real, also where the covariances are
    singular, as those of fewer pictures than features are.

    The fewer pictures, the larger it is, also for two draws from the same: compare it among equal N and M only.
    """
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("nan")
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(dim=0), _covariance(x)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^(1/2), (D, D)
    product = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0)  # (D,)
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * product.sqrt().sum()
    return max(0.0, float(distance))  # of two equal ones the rounding may leave less than 0


def _covariance(x: Tensor) -> Tensor:
    """Return the covariance (D, D) of x (N, D); of a single picture it is 0."""
    x = x - x.mean(dim=0)
    return x.T @ x / max(1, len(x) - 1)
