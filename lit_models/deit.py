"""DeiT: a vision transformer that a convolutional network teaches (Touvron et al. 2021).

Beside the class token stands a distillation token. The class token's answer is held against the label, the distillation
token's against what a trained teacher says of the same picture. So what a convolutional network has built in (near pixels belong
together, a thing is the same thing elsewhere) reaches the transformer through answers; and a teacher that says "shirt" of what is
half hidden, or was cut out by a random crop, says what there is to see, where the label does not.

    hard    1/2 CE(class, label) + 1/2 CE(distillation, argmax teacher)
    soft    (1 - a) CE(class, label) + a t^2 KL(softmax(teacher / t), softmax(distillation / t))       (Hinton et al. 2015)

Shapes: B batch, C channels, H height, W width, D width, K classes.

Departures from the paper: the two answers' logits are averaged for the prediction, as in the authors' code, not their
probabilities; and soft distillation has the distillation token, too, where the paper's has the class token alone.
"""

import hashlib
import importlib
import os
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from pytorch_lightning.cli import instantiate_module
from torch import Tensor, nn

from lit_models.pretrained import from_checkpoint
from lit_models.tasks import Classifier
from lit_models.vit import ViT
from runner.errors import InputError, one_line


class DeiT(ViT):
    """A `ViT` with a distillation token and a teacher.

    The teacher sees the pictures as the student does, so it must have been trained with the same normalisation. It is no part
    of the student: it is neither trained, nor counted, nor saved.

    Args:
        num_classes: K.
        teacher: a classifier's checkpoint that `train.py` made, as it is (`RUN/best.ckpt`) or below `RUNS_DIR`;
            `<experiment>/best.ckpt` is that of the experiment's newest finished run. None: both tokens learn from the labels,
            to see what the teacher is worth.
        distillation: whether the teacher's class counts (`hard`), or its probabilities (`soft`).
        alpha: a, the share of the loss that is the teacher's.
        temperature: t, of soft distillation.
        weights: of a DeiT of ours to begin with; see `ViT`.
        vit: arguments of `ViT`.

    Raises:
        InputError: an argument is out of its range. Of the teacher: before training.
    """

    heads = ("head", "distillation_head")
    teacher: dict | None = None  # what is known of it: file and SHA-256

    def __init__(
        self,
        num_classes: int = 1000,
        teacher: str | None = None,
        distillation: Literal["hard", "soft"] = "hard",
        alpha: float = 0.5,
        temperature: float = 3.0,
        weights: str | list[str] | None = None,
        **vit,
    ):
        super().__init__(num_classes=num_classes, pool="token", weights=None, **vit)
        if distillation not in ("hard", "soft"):
            raise InputError(f"distillation: hard or soft, got {distillation!r}")
        if not 0 <= alpha <= 1 or not temperature > 0:
            raise InputError(f"alpha is a share from 0 to 1, and temperature above 0, got {alpha} and {temperature}")
        if self.loss_name != "cross_entropy":
            raise InputError(f"DeiT is for loss cross_entropy, got {self.loss_name}")
        self.teacher_file, self.distillation, self.alpha, self.temperature = teacher, distillation, alpha, temperature
        width = self.head.in_features
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 2 + self.grid**2, width))
        self.distillation_head = nn.Linear(width, num_classes)
        nn.init.zeros_(self.distillation_head.weight)
        nn.init.zeros_(self.distillation_head.bias)
        nn.init.trunc_normal_(self.class_token, std=0.02)  # at 0 both tokens would differ in nothing but their position
        nn.init.trunc_normal_(self.distillation_token, std=0.02)
        self._teacher: list[Classifier] = []  # in a list, where PyTorch does not look for parts of this network
        self.weights = weights
        self.load_weights(None)

    def tokens(self) -> list[Tensor]:
        """Return the class token and the distillation token, each (1, 1, D)."""
        return [self.class_token, self.distillation_token]

    def forward(self, images: Tensor, both: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map images (B, C, H, W) to logits (B, K); `both`: to those of the class and of the distillation token."""
        x = self.encoder(self.embed(images))  # (B, T, D)
        answers = self.head(x[:, 0]), self.distillation_head(x[:, 1])
        return answers if both else (answers[0] + answers[1]) / 2

    # -- how it is trained -------------------------------------------------------------------------------------------

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss that is at the head of this file, and the logits (B, K) that a prediction has."""
        images, labels = self.mix(images, labels)
        own, distilled = self(images, both=True)
        loss = (1 - self.alpha) * F.cross_entropy(own, labels, label_smoothing=self.label_smoothing)
        logits = (own + distilled) / 2
        if not self._teacher:
            told = F.cross_entropy(distilled, labels, label_smoothing=self.label_smoothing)
            return loss + self.alpha * told, logits
        with torch.no_grad():
            taught = self._teacher[0](images)  # (B, K)
        return loss + self.alpha * self.distillation_loss(distilled, taught), logits

    def distillation_loss(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Return how far logits (B, K) are from the teacher's (B, K): a scalar, the batch's mean."""
        if self.distillation == "hard":
            return F.cross_entropy(logits, taught.argmax(dim=1))
        t = self.temperature
        log_p, log_q = (x.float().div(t).log_softmax(dim=1) for x in (taught, logits))
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * t**2

    # -- the teacher -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the teacher, if there is something to teach; in the rehearsal, too, where it is missed early."""
        super().setup(stage)
        if stage in ("fit", "validate") and self.teacher_file and not self._teacher:
            self.set_teacher(find_teacher(self.teacher_file))

    def set_teacher(self, file: Path) -> None:
        """Load the teacher from a checkpoint.

        Raises:
            InputError: it is not one of ours, or does not fit.
        """
        network, checkpoint = load_teacher(file)
        if network.num_classes != self.num_classes:
            raise InputError(
                f"teacher {file} tells {network.num_classes} classes apart, and the student {self.num_classes}"
            )
        if self._trainer:
            check_data(file, checkpoint, self._trainer.datamodule)
            network.to(self._trainer.strategy.root_device)
        if getattr(network, "channels_last", False):
            network.to(memory_format=torch.channels_last)
        self._teacher = [network]
        self.teacher = {"file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the teacher out of copies, such as the one whose weights are averages."""
        return {**super().__getstate__(), "_teacher": []}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Note who taught: the name and SHA-256, no weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["teacher"] = self.teacher

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Take over the note; a resumed run goes on with the teacher it began with, though there may be a newer one.

        Raises:
            InputError: that is no longer there.
        """
        super().on_load_checkpoint(checkpoint)
        began = checkpoint.get("teacher")
        if self._teacher and began and began["sha256"] != self.teacher["sha256"]:
            file = Path(began["file"])
            if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != began["sha256"]:
                raise InputError(
                    f"the run began with another teacher: {file}, sha256 {began['sha256'][:8]}, is no longer there"
                )
            self.set_teacher(file)
        self.teacher = began


def find_teacher(name: str) -> Path:
    """Return the checkpoint of that name: as it is, below `RUNS_DIR`, or of an experiment's newest finished run.

    Raises:
        InputError: there is none; says how to make one.
    """
    runs, wanted = Path(os.environ.get("RUNS_DIR") or "runs"), Path(name).expanduser()
    for file in (wanted, runs / wanted):
        if file.is_file():
            return file
    folder = runs / wanted.parent
    finished = [file for file in folder.glob(f"*/{wanted.name}") if (file.parent / "receipt.json").is_file()]
    if finished:
        return max(finished, key=lambda file: file.parent.name)  # which begins with the time
    experiment = Path(__file__).parent.parent / "experiments" / f"{wanted.parent.name}.yaml"
    if len(wanted.parts) == 2 and experiment.is_file():
        raise InputError(
            f"teacher {name}: no finished run is in {folder}; make one first: python train.py experiments/{experiment.name}"
        )
    raise InputError(f"teacher {name} is not there, nor below {runs}: give RUN/best.ckpt or <experiment>/best.ckpt")


def load_teacher(file: Path) -> tuple[Classifier, dict]:
    """Return a classifier of ours, frozen and in evaluation mode, and its checkpoint; nothing in the file is run.

    Raises:
        InputError: it is no checkpoint of one.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        settings = {**checkpoint["hyper_parameters"]}
        class_path, state = settings["_class_path"], checkpoint["state_dict"]
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"teacher {file} is no checkpoint that train.py made: {one_line(error)[:120]}") from None
    # It names what is to be made: of our models only, and none of it to train with
    settings = {
        key: value for key, value in settings.items() if key not in ("_instantiator", "optimizer", "lr_scheduler")
    }
    if strange := [path for path in class_paths(settings) if not path.startswith("lit_models.")]:
        raise InputError(f"teacher {file} is made of {strange[0]}, which is none of our models")
    try:
        module, _, name = class_path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        if not issubclass(kind, Classifier):
            raise TypeError(f"{class_path} is no classifier")
        with from_checkpoint():
            network = instantiate_module(kind, settings)
        network.load_state_dict(state)
    except Exception as error:  # of jsonargparse, of the model's __init__, of load_state_dict
        raise InputError(f"teacher {file} cannot be made: {one_line(error)[:160]}") from error
    return network.requires_grad_(False).eval(), checkpoint


def class_paths(settings: Any) -> list[str]:
    """Return all class paths in nested settings."""
    if isinstance(settings, list | tuple):
        return [path for value in settings for path in class_paths(value)]
    if not isinstance(settings, dict):
        return []
    own = [str(settings[key]) for key in ("_class_path", "class_path") if key in settings]
    return own + [path for value in settings.values() for path in class_paths(value)]


def check_data(file: Path, checkpoint: dict, data: Any) -> None:
    """Hold the teacher's data against the student's.

    Raises:
        InputError: its classes or its normalisation are other ones. (That it has seen other pictures is a warning.)
    """
    seen = checkpoint.get(type(data).__qualname__)
    seen = seen if isinstance(seen, dict) else {}
    classes = seen.get("classes")
    if classes and list(classes) != list(data.classes):
        raise InputError(f"teacher {file} tells apart {', '.join(classes)}, but the data has {', '.join(data.classes)}")
    if not seen or seen.get("fingerprint") != getattr(data, "fingerprint", None):
        warnings.warn(
            f"teacher {file} was trained on other data than this: it may know pictures that are here to validate or to test",
            stacklevel=2,
        )
    config = file.parent / "config.yaml"
    if config.is_file() and hasattr(data, "mean"):
        theirs = yaml.safe_load(config.read_text())["data"]["init_args"].get("normalize")
        ours = [_listed(data.mean), _listed(data.std)]
        theirs = theirs or ([0.0, 1.0] if isinstance(data.mean, float) else [[0.0] * 3, [1.0] * 3])
        if [_listed(value) for value in theirs] != ours:
            raise InputError(
                f"teacher {file} was trained with normalize {theirs}, and the student has {ours}: give it the same"
            )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
