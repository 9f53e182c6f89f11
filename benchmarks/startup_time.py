"""Seconds from the command to the first training step, beside those of importing Lightning, paired: A B A B ...

A  python train.py experiments/mnist_mlp.yaml, up to the end of its first step
B  python -c "import pytorch_lightning"

    python benchmarks/startup_time.py
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

ROUNDS = 5


def seconds_to_first_step() -> float:
    """Start train.py in a new process, and take the time until it says that its first step is done."""
    # a callback that ends the process is the simplest way to know, and costs the other steps nothing
    code = (
        "import sys, os; sys.argv[1:] = ['experiments/mnist_mlp.yaml']\n"
        "import train\n"
        "def end(self, trainer, module, outputs, batch, batch_idx): os._exit(0)\n"
        "import importlib.abc\n"
        "from runner import arguments\n"
        "parse = arguments.parse\n"
        "def parse_then_patch(argv):\n"
        "    asked = parse(argv)\n"
        "    from callbacks.seeding import EpochSeeding\n"
        "    EpochSeeding.on_train_batch_end = end\n"
        "    return asked\n"
        "arguments.parse = parse_then_patch\n"
        "sys.exit(train.main())\n"
    )
    return seconds([sys.executable, "-c", code])
