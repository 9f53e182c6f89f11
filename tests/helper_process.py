"""The second of two processes, for tests/test_distributed.py: runs train.py for each line that it is sent, and says how it ended."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer

import runner.cli  # noqa: F401  # what takes seconds, while the first process is busy with something else
from train import main


class Agreed(Callback):
    """Has the first process fail where weights or metrics have come apart."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, after validation."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        said = metrics, rates, [float(p.detach().double().sum()) for p in pl_module.parameters()]
        everyone = [None] * trainer.world_size
        dist.all_gather_object(everyone, said)
        if trainer.is_global_zero:
            assert metrics
            for other in everyone[1:]:
                assert other == said


if __name__ == "__main__":
    answers = sys.stdout
    for line in sys.stdin:
        task = json.loads(line)
        os.environ |= task["environment"]
        print(main(task["argv"]), file=answers, flush=True)
