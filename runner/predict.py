"""Tell the classes of pictures, or what a sentence about each would be, with nothing but a checkpoint and its YAML.

(What a detector finds in them is told by `predict_boxes.py`, the classes of their pixels by `predict_masks.py`, what lines of
text are by `predict_lines.py`, and how a text goes on by `predict_text.py`.)

`predictions.csv`, in the folder that one is in, has a row for each picture:

    file,class,probability,p_cat,p_dog,error
    pictures/1.jpg,dog,0.9375,0.0625,0.9375,
    pictures/2.jpg,,,,,pictures/2.jpg cannot be read: it is no picture

or, of a model that writes captions, `file,caption,error`.
"""

import csv
import io
import sys
from pathlib import Path
from typing import Literal

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor

from lit_models.detector import Detector
from lit_models.language_model import LanguageModel
from lit_models.segmenter import Segmenter
from lit_models.seq2seq import Translator
from lit_models.tasks import Classifier
from runner.arguments import Prompt
from runner.checkpoints import read_checkpoint
from runner.errors import InputError, one_line
from runner.files import write_whole
from runner.picture_files import PictureFiles
from runner.predict_boxes import BoxFiles, tell_boxes
from runner.predict_lines import predict_lines
from runner.predict_masks import UnmaskedFiles, WriteMasks, tell_masks
from runner.predict_text import continue_text

TABLE = Path("predictions.csv")


def predict(experiment, checkpoint: Path, given: list[Path] | Prompt) -> None:
    """Tell what is in files, or how a prompt goes on: see `tell_pictures`, `predict_lines` and `continue_text`.

    Raises:
        InputError: that is not what the experiment is about, the checkpoint is not of its model, none of the files can be
            read, or what is found cannot be written.
    """
    model, data = experiment.model, experiment.datamodule
    what = f"{experiment.name} ({type(model).__name__} on {type(data).__name__})"
    is_prompt, known = isinstance(given, Prompt), can_be_given(model, data)
    if known == "prompt" and not is_prompt:
        raise InputError(f"{what} continues a text: give it --prompt TEXT in place of files")
    if is_prompt and known != "prompt":
        raise InputError(f"--prompt is a text for a language model to continue, and {what} is none")
    if not known:
        raise InputError(f"--predict tells what is in pictures, and {what} does not")
    saved = read_checkpoint(checkpoint, model)
    trained = saved.get(type(data).__qualname__)
    if not isinstance(trained, dict):  # its classes would be given the names of others
        raise InputError(f"checkpoint {checkpoint} was trained on other data than {type(data).__name__}")
    trainer = experiment.trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        devices=1,
        num_nodes=1,
        strategy="auto",
        fast_dev_run=False,
        limit_predict_batches=1.0,
    )
    if is_prompt:
        experiment.model.load_state_dict(saved["state_dict"])
        continue_text(experiment.model.to(trainer.strategy.root_device), trained, given, experiment.seed)
    elif known == "lines":
        predict_lines(experiment, given, trained, trainer, checkpoint)
    else:
        tell_pictures(experiment, given, trained, trainer, checkpoint)


def can_be_given(model: LightningModule, data: LightningDataModule) -> Literal["prompt", "lines", "pictures", ""]:
    """Return what a trained model tells something about: a prompt, or files of lines, or pictures; nothing if it does not."""
    if isinstance(model, LanguageModel):
        return "prompt"
    if hasattr(data, "read_line"):
        return "lines"
    knows_pictures = isinstance(model, Classifier | Detector | Segmenter | Translator) and hasattr(data, "read_input")
    return "pictures" if knows_pictures else ""


def tell_pictures(experiment, paths: list[Path], trained: dict, trainer, checkpoint: Path) -> None:
    """Print what is in each picture, and write it to files: see `tell_classes`, `tell_captions`, `tell_boxes` and `tell_masks`.

    Args:
        experiment: its model classifies pictures or their pixels, finds objects in them, or writes about them.
        paths: of the pictures.
        trained: what the checkpoint says of the data.
        trainer: to predict with.
        checkpoint: of the model.

    Raises:
        InputError: none of them can be read, or what is found cannot be written.
    """
    model, data = experiment.model, experiment.datamodule
    classes = trained.get("classes") or getattr(data, "classes", None)  # folders tell them, those of MNIST are known
    kind = {Detector: BoxFiles, Segmenter: UnmaskedFiles}
    kind = next((files for task, files in kind.items() if isinstance(model, task)), PictureFiles)
    pictures = kind(paths, data, classes, experiment.config["trainer"]["enable_progress_bar"] is not False)
    masks = WriteMasks(pictures) if isinstance(model, Segmenter) else None
    trainer.callbacks += [masks] if masks else []
    try:
        batches = trainer.predict(
            model, pictures, return_predictions=not masks, ckpt_path=checkpoint, weights_only=True
        )
    except (RuntimeError, IndexError, TypeError) as error:
        raise InputError(f"model and pictures do not fit: {one_line(error)}") from error
    if not pictures.read:
        first = pictures.errors[paths[0]]
        raise InputError(f"none of {len(paths)} pictures can be read, the first: {first}" if paths[1:] else str(first))

    for path in paths:
        if path in pictures.errors:
            print(f"warning: {pictures.errors[path]}", file=sys.stderr)
    if isinstance(model, Classifier) and pictures.bright > len(pictures.read) / 2:
        hint = "these pictures are bright at the border; for a model of white on black, such as MNIST's, invert them"
        print(f"hint: {hint}", file=sys.stderr)
    if masks:
        tell_masks(masks)
    elif isinstance(model, Detector):
        tell_boxes(pictures, [found for batch in batches for found in batch])
    elif isinstance(model, Translator):
        tell_captions(pictures, [data.target_vocabulary.decode(row) for batch in batches for row in batch])
    else:
        tell_classes(pictures, torch.cat(batches))


def tell_classes(pictures: PictureFiles, probabilities: Tensor) -> None:
    """Tell the classes of the pictures that were read, from probabilities (N, K)."""
    classes = pictures.classes or [str(k) for k in range(probabilities.shape[1])]
    best, index = probabilities.max(dim=1)  # (N,), (N,)
    told = zip([classes[k] for k in index.tolist()], best.tolist(), probabilities.tolist(), strict=True)
    write_table(
        pictures, ["class", "probability", *(f"p_{c}" for c in classes)], [[n, p, *each] for n, p, each in told]
    )
    print(f"\nprobabilities of all classes: {TABLE.absolute()}")


def tell_captions(pictures: PictureFiles, captions: list[str]) -> None:
    """Tell the captions of the pictures that were read."""
    write_table(pictures, ["caption"], [[caption] for caption in captions])
    print(f"\nall captions: {TABLE.absolute()}")


def write_table(pictures: PictureFiles, names: list[str], told: list[list]) -> None:
    """Write the table, and print of it what a person looks for.

    Args:
        pictures: a row for each file.
        names: of the columns.
        told: for each picture that was read, a value for each column: first what it is, then, if known, how sure that is.

    Raises:
        InputError: it cannot be written; what it would say has been printed.
    """
    rows = dict(zip(pictures.read, told, strict=True))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *names, "error"])
    for path in pictures.paths:
        values = rows.get(path, [""] * len(names))
        writer.writerow([path, *values, pictures.errors.get(path, "")])  # floats with all their digits
    try:
        write_whole(TABLE, text.getvalue().encode(errors="surrogateescape"))  # a file's name need not be UTF-8
    except OSError as error:
        raise InputError(f"{TABLE.absolute()} cannot be written: {error.strerror}") from None
    finally:
        width, first = (max(map(len, words)) for words in (map(str, rows), (values[0] for values in told)))
        for path, (what, *sure) in rows.items():
            line = f"{path!s:{width}}  {what:{first}}" + "".join(f"  {value:.4f}" for value in sure[:1])
            print(line.rstrip().encode(errors="replace").decode())
