"""Hand a run's model on: write it in a format that others read, run what was written, and hold it against the model.

python export.py RUN/best.ckpt --format onnx
python export.py --help
"""

import argparse
import os
import sys
from pathlib import Path

from runner import arguments
from runner.errors import InputError, existing_file, one_line

FORMATS = ("state_dict", "safetensors", "onnx", "torch_export")
ABOUT = """\
formats:
  state_dict     names and weights, for torch.load; what is to be known of them goes into FILE.json beside it
  safetensors    the same in a format that cannot hold code, with what is to be known in its header
  onnx           the network as a graph, for onnxruntime and others
  torch_export   the same for torch.export.load, without this repository's code

The file is run on test pictures of the run's own data, in batches of 1 and of others than it was made with, and its
outputs are held against the model's. It gets its name only if they are equal, or of graphs nearly.
"""


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0; 1 if the file's outputs are not the model's; 2 for a mistake of the user's, told in one line."""
    try:
        asked = parse(argv)
        from exporting.hand_on import hand_on  # torch and Lightning take seconds: a typo was told before
        from runner.cli import Experiment

        config = existing_file(asked.checkpoint.parent / "config.yaml", "the run's configuration", ".yaml")
        experiment = Experiment(arguments.parse([str(config), "--ckpt", str(asked.checkpoint)]))
        return hand_on(experiment, asked.checkpoint, asked.format, asked.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name in ("runner", "exporting", "callbacks", "lit_models", "datamodules"):
            raise
        print(f"error: the package {error.name} is missing; try: pip install -r requirements.txt", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: for whatever can be found wrong without torch.
    """
    parser = _Parser(
        prog="export.py",
        description=__doc__.splitlines()[0],
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="RUN/best.ckpt", help="of a run, with its config.yaml beside it")
    parser.add_argument("--format", required=True, choices=FORMATS, help="see below")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to (default: beside the checkpoint)")
    asked = parser.parse_args(argv)
    asked.checkpoint = arguments.checkpoint_file(asked.checkpoint)
    if output := asked.output:
        if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
            what = "a folder" if output.is_dir() else "in no folder that can be written to"
            raise InputError(f"--output {output} is {what}: name a file")
        if output.suffix in (".ckpt", ".yaml", ".csv", ".json"):
            raise InputError(f"--output {output} would be taken for a run's own {output.suffix}: give it another name")
    return asked


if __name__ == "__main__":
    sys.exit(main())
