"""Tell what lines of text are, with nothing but a checkpoint and the YAML that it was trained by.

A data module of lines has `read_line`, from a line to tokens (T,). A classifier tells each line's class: names,
languages. A translator writes another text, in the symbols of the data's `target_vocabulary`: dates, ISO dates.

`predictions.csv`, in the folder that one is in, has a row for each line that is not empty:

    file,line,text,class,probability,p_Dutch,p_English,error      of a classifier
    names.txt,1,Jansen,Dutch,0.9375,0.9375,0.0625,
    file,line,text,output,error                                   of a translator
    dates.txt,1,3 March 2021,2021-03-03,
    dates.txt,2,3 März 2021,,the character 'ä' ...
"""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from pytorch_lightning import LightningDataModule
from torch import Tensor

from datamodules.names import read_lines
from datamodules.vocabulary import pad
from lit_models.tasks import Classifier
from runner.errors import InputError, one_line
from runner.files import write_whole

TABLE = Path("predictions.csv")


class Lines(LightningDataModule):
    """The lines of text files, a batch at a time.

    Args:
        paths: of the files.
        data: the experiment's data module.

    Attributes:
        texts: the lines that are not empty, each with its file and its number in it, from 1.
        read: the places in `texts` of those that could be read, in the order of the predictions.
        errors: by place, what is wrong with the others.

    Raises:
        InputError: a file is no text in UTF-8, or there are no lines.
    """

    def __init__(self, paths: list[Path], data: LightningDataModule):
        super().__init__()
        self.data = data
        self.texts = [
            (path, number, line.strip())
            for path in paths
            for number, line in enumerate(read_lines(path), start=1)
            if line.strip()
        ]
        if not self.texts:
            raise InputError(f"{paths[0]} has no lines: expected a text a line, in UTF-8")
        self.errors: dict[int, InputError] = {}
        tokens = {place: self._read(place) for place in range(len(self.texts))}
        self.tokens = {place: found for place, found in tokens.items() if found is not None}
        self.read = list(self.tokens)

    def predict_dataloader(self) -> Iterator[tuple[Tensor, None]]:
        """Yield batches of tokens (B, T), PAD behind the shorter ones, and no targets."""
        size = getattr(self.data, "eval_batch_size", 64)
        for start in range(0, len(self.read), size):
            yield pad([self.tokens[place].tolist() for place in self.read[start : start + size]]), None

    def _read(self, place: int) -> Tensor | None:
        try:
            return self.data.read_line(self.texts[place][2])
        except InputError as error:
            self.errors[place] = error
            return None


def predict_lines(experiment, paths: list[Path], trained: dict, trainer, checkpoint: Path) -> None:
    """Print what each line is, and write the table.

    Args:
        experiment: its model is a classifier or a translator of lines.
        paths: of text files.
        trained: what the checkpoint says of the data.
        trainer: to predict with.
        checkpoint: of the model.

    Raises:
        InputError: a file cannot be read, or none of its lines; the table cannot be written.
    """
    model, data = experiment.model, experiment.datamodule
    data.load_state_dict(trained)
    lines = Lines(paths, data)
    for place, error in lines.errors.items():
        path, number, _ = lines.texts[place]
        print(f"warning: {path}:{number}: {error}", file=sys.stderr)
    if not lines.read:
        raise InputError(f"none of the lines can be read, the first: {lines.errors[0]}")
    try:
        batches = trainer.predict(model, lines, ckpt_path=checkpoint, weights_only=True)
    except (RuntimeError, IndexError, TypeError) as error:
        raise InputError(f"model and lines do not fit: {one_line(error)}") from error
    outputs = [row for batch in batches for row in batch]
    if isinstance(model, Classifier):
        classes = trained.get("classes") or [str(k) for k in range(len(outputs[0]))]
        names = ["class", "probability", *(f"p_{name}" for name in classes)]
        told = [[classes[int(row.argmax())], float(row.max()), *row.tolist()] for row in outputs]
    else:
        names = ["output"]
        told = [[data.target_vocabulary.decode(row)] for row in outputs]
    write_table(lines, names, dict(zip(lines.read, told, strict=True)))


def write_table(lines: Lines, names: list[str], told: dict[int, list]) -> None:
    """Write `predictions.csv`, and print of it what a person looks for; `told` has, by place, a value for each name."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "line", "text", *names, "error"])
    for place, (path, number, line) in enumerate(lines.texts):
        values = told.get(place, [""] * len(names))
        writer.writerow([path, number, line, *values, lines.errors.get(place, "")])  # floats with all their digits
    try:
        write_whole(TABLE, text.getvalue().encode(errors="surrogateescape"))  # a file's name need not be UTF-8
    except OSError as error:
        raise InputError(f"{TABLE.absolute()} cannot be written: {error.strerror}") from None
    finally:
        width, first = (
            max(map(len, words)) for words in ([lines.texts[p][2] for p in told], [v[0] for v in told.values()])
        )
        for place, (value, *others) in told.items():
            line = f"{lines.texts[place][2]:{width}}  {value:{first}}" + (f"  {others[0]:.4f}" if others else "")
            print(line.encode(errors="replace").decode())
    print(f"\nall of it: {TABLE.absolute()}")
