"""A batch shared out among processes, so that they make the step that one process would make of the whole.

`batch_size` is that of a step, whatever the number of processes is: each has its share of every training batch, in the one
order that all agree on. So a YAML's learning rate and schedule hold for any number of them, and one can go on with another's
run. (Lightning's own convention, a `batch_size` for each process, would make each step of more samples, and fewer steps. Its
distributed sampler also repeats samples, and does not tell our samplers the epoch.)

Validation is not shared out: each process validates the whole set, and comes to the numbers that one alone would come to.

All of it is here, and nothing in the models: what one process computes does not change.
"""

import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from callbacks.seeding import epoch_seed
from lit_models.gan import GAN
from lit_models.tasks import Task
from runner.errors import InputError

STREAM = 2  # of `epoch_seed`, for processes after the first


class SharedBatches:
    """One process's share of each batch: every n-th sample, from its own rank on.

    Where there are fewer samples than processes (at an epoch's end), those for which nothing is left take the first, for all to
    make the same number of steps; with a weight of 0.

    Args:
        batches: of samples' numbers, for all.
        rank: of this process.
        processes: how many there are.
    """

    def __init__(self, batches, rank: int, processes: int):
        self.batches, self.rank, self.processes = batches, rank, processes
        self.sizes: list[int] = []

    @property
    def sampler(self):
        """What Lightning tells the epoch."""
        return self.batches.sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        self.sizes = []  # of the whole batches so far
        for batch in self.batches:
            self.sizes.append(len(batch))
            yield batch[self.rank :: self.processes] or batch[:1]

    def weight(self, i: int) -> float:
        """The samples of this process's share of batch `i`, for those of a mean share."""
        return self.processes * len(range(self.rank, self.sizes[i], self.processes)) / self.sizes[i]


class Sharing(Callback):
    """Shares out the training batches of a Trainer of several processes; it goes after `Seeding`."""

    def setup(self, trainer: Trainer, pl_module: Task, stage: str) -> None:
        """Share out batches and noise, have what is logged of training added up, and no other metric: all have all of it.

        Raises:
            InputError: this process found other data than the first.
        """
        data, rank, processes = trainer.datamodule, trainer.global_rank, trainer.world_size
        fingerprint = data.state_dict()["fingerprint"]
        first = trainer.strategy.broadcast((fingerprint, data.source))
        if fingerprint != first[0]:
            raise InputError(f"its data is other than the first process's: {data.source}, not {first[1]}")

        whole = data.train_dataloader
        data.train_dataloader = lambda: _mark(whole())  # whole for who else asks, as YOLO does, for its anchors
        trainer.strategy.process_dataloader = lambda loader: (
            share(loader, rank, processes) if getattr(loader, "to_be_shared", False) else loader
        )
        for module in pl_module.modules():
            if isinstance(module, Metric):
                module.sync_on_compute = False
        log_train = pl_module.log_train
        pl_module.log_train = lambda batch_idx, samples, **sums: log_train(batch_idx, **self._added(samples, sums))
        if isinstance(pl_module, GAN):
            code = pl_module.code
            pl_module.code = lambda noise, labels: code(self._noise(noise) if pl_module.training else noise, labels)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the first process have it all again."""
        del trainer.datamodule.train_dataloader, pl_module.log_train
        if isinstance(pl_module, GAN):
            del pl_module.code

    def on_fit_start(self, trainer: Trainer, pl_module: Task) -> None:
        """See which parameters are frozen now: DDP does not know them, and leaves them alone if they are set free later."""
        self.frozen = [p for p in pl_module.parameters() if not p.requires_grad]

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:
        """Let SIGTERM (`kill`, a cluster's time limit) end training after the step, as in one process.

        (Lightning sends a message to the other processes at once, which are at another one: all would wait for ever.)
        """
        connector = trainer._signal_connector
        connector._register_signal(signal.SIGTERM, lambda *_: setattr(connector, "received_sigterm", True))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Task) -> None:
        """See to it that what the epoch's first batch is made with is drawn anew: a checkpoint has the first process's state."""
        _seed(trainer, trainer.global_rank, 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:
        """See how much the share counts; and draw, from the epoch's first batch on, other numbers than other processes."""
        batches, epoch = trainer.train_dataloader.batch_sampler, trainer.current_epoch
        self.weight, self.whole = batches.weight(batch_idx), batches.sizes[batch_idx]
        self.rank, self.processes = batches.rank, batches.processes
        if batch_idx == 0:
            self.dice = torch.Generator(pl_module.device).manual_seed(epoch_seed(epoch))
            _seed(trainer, batches.rank)

    def on_before_backward(self, trainer: Trainer, pl_module: Task, loss: Tensor) -> None:
        """Weigh the gradients, of which the processes' mean is taken."""
        if (weight := self.weight) != 1:
            loss.register_hook(lambda gradient: gradient * weight)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Task, optimizer: torch.optim.Optimizer) -> None:
        """Take the processes' mean of the gradients that DDP does not know. (FSDP does; they are DTensors.)"""
        for parameter in self.frozen:
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.processes

    def on_validation_end(self, trainer: Trainer, pl_module: Task) -> None:
        """Have all go by the first process's metrics, for all to agree on the best epoch, on a learning rate, and on the end.

        (Their own may be others: machines of two kinds round in two ways, and a GAN is judged outside of DDP's forward pass, in
        which batch norms would be given the first one's means and variances.)
        """
        metrics = {name: metric for name, metric in trainer._results.items() if metric._computed is not None}
        first = trainer.strategy.broadcast({name: float(metric._computed) for name, metric in metrics.items()})
        for name, metric in metrics.items():
            metric._computed = torch.full_like(metric._computed, first[name])
        _ = trainer.callback_metrics  # which Lightning keeps as they are when they are asked for

    def _added(self, samples: float | Tensor, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return arguments of `log_train`, added up over the processes; a sample that another one has counts for nothing."""
        device = next(iter(sums.values())).device
        values = [torch.as_tensor(v, dtype=torch.float64, device=device) for v in (samples, *sums.values())]
        total = torch.stack(values).detach() * (self.weight > 0)
        dist.all_reduce(total)
        return dict(zip(("samples", *sums), total.float(), strict=True))

    def _noise(self, noise: Tensor) -> Tensor:
        """Return this process's share (B, Z) of the noise that one alone would draw for the batch."""
        size = max(self.whole, self.processes), noise.shape[1]
        drawn = torch.randn(size, generator=self.dice, device=noise.device, dtype=noise.dtype)
        return drawn[self.rank :: self.processes][: len(noise)]


def share(loader: DataLoader, rank: int, processes: int) -> DataLoader:
    """Return a loader of one process's share of each of `loader`'s batches."""
    return type(loader)(
        loader.dataset,
        batch_sampler=SharedBatches(loader.batch_sampler, rank, processes),
        **{name: getattr(loader, name) for name in ("num_workers", "collate_fn", "pin_memory", "worker_init_fn",
           "timeout", "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers")},
    )  # fmt: skip


def _mark(loader: DataLoader) -> DataLoader:
    loader.to_be_shared = True
    return loader


def _seed(trainer: Trainer, rank: int, *stream: int) -> None:
    """Seed the generators of processes after the first, which draws what one alone would draw."""
    if rank:
        seed = epoch_seed(trainer.current_epoch, STREAM, rank, *stream)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
