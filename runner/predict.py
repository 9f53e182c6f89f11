"""Tell the classes of pictures, with nothing but a checkpoint and the YAML that it was trained by.

(What a detector finds in them is told by `predict_boxes.py`, the classes of their pixels by `predict_masks.py`.)

`predictions.csv`, in the folder that one is in, has a row for each picture:

    file,class,probability,p_cat,p_dog,error
    pictures/1.jpg,dog,0.9375,0.0625,0.9375,
    pictures/2.jpg,,,,,pictures/2.jpg cannot be read: it is no picture
"""

import csv
import io
import sys
from pathlib import Path

import torch
from torch import Tensor

from lit_models.detector import Detector
from lit_models.segmenter import Segmenter
from lit_models.tasks import Classifier
from runner.checkpoints import read_checkpoint
from runner.errors import InputError, one_line
from runner.files import write_whole
from runner.picture_files import PictureFiles
from runner.predict_boxes import BoxFiles, tell_boxes
from runner.predict_masks import UnmaskedFiles, WriteMasks, tell_masks

TABLE = Path("predictions.csv")


def predict(experiment, checkpoint: Path, paths: list[Path]) -> None:
    """Print what is in each picture, and write it to files: see `tell_classes`, `tell_boxes` and `tell_masks`.

    Raises:
        InputError: the experiment neither classifies pictures or their pixels nor finds objects in them, the checkpoint
            is not of its model, none of the pictures can be read, or what is found cannot be written.
    """
    model, data = experiment.model, experiment.datamodule
    if not isinstance(model, Classifier | Detector | Segmenter) or not hasattr(data, "read_input"):
        what = f"{type(model).__name__} on {type(data).__name__}"
        raise InputError(f"--predict tells what is in pictures, and {experiment.name} ({what}) does not")
    trained = read_checkpoint(checkpoint, model).get(type(data).__qualname__)
    if not isinstance(trained, dict):  # its classes would be given the names of others
        raise InputError(f"checkpoint {checkpoint} was trained on other data than {type(data).__name__}")
    classes = trained.get("classes") or getattr(data, "classes", None)  # folders tell them, those of MNIST are known
    kind = PictureFiles if isinstance(model, Classifier) else BoxFiles if isinstance(model, Detector) else UnmaskedFiles
    pictures = kind(paths, data, classes, experiment.config["trainer"]["enable_progress_bar"] is not False)
    masks = WriteMasks(pictures) if isinstance(model, Segmenter) else None
    trainer = experiment.trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        devices=1,
        num_nodes=1,
        strategy="auto",
        fast_dev_run=False,
        limit_predict_batches=1.0,
        callbacks=[masks] if masks else [],
    )
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
    else:
        tell_classes(pictures, torch.cat(batches))


def tell_classes(pictures: PictureFiles, probabilities: Tensor) -> None:
    """Write the table, and print of it what a person looks for: probabilities (N, K) of the pictures that were read."""
    classes = pictures.classes or [str(k) for k in range(probabilities.shape[1])]
    best, index = probabilities.max(dim=1)  # (N,), (N,)
    names = [classes[k] for k in index.tolist()]
    told = dict(zip(pictures.read, zip(names, best.tolist(), probabilities.tolist(), strict=True), strict=True))

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "probability", *(f"p_{name}" for name in classes), "error"])
    for path in pictures.paths:
        if path in told:
            name, probability, each = told[path]
            writer.writerow([path, name, probability, *each, ""])  # floats with all their digits
        else:
            writer.writerow([path, *[""] * (2 + len(classes)), pictures.errors[path]])
    try:
        write_whole(TABLE, text.getvalue().encode(errors="surrogateescape"))  # a file's name need not be UTF-8
    except OSError as error:
        raise InputError(f"{TABLE.absolute()} cannot be written: {error.strerror}") from None
    finally:
        width, class_width = (max(map(len, words)) for words in (map(str, told), names))
        for path, (name, probability, _) in told.items():
            line = f"{path!s:{width}}  {name:{class_width}}  {probability:.4f}"
            print(line.encode(errors="replace").decode())
    print(f"\nprobabilities of all classes: {TABLE.absolute()}")
