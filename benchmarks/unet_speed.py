"""Seconds of a training step of our U-Net and of the notes': in turns, A B A B ..., in one process, on the same batch.

    python benchmarks/unet_speed.py
    python benchmarks/unet_speed.py --size 128 128 --batch 8 --features 16 32 64 128
    python benchmarks/unet_speed.py --device cuda --precision 16 --batch 16

A step is forward pass, loss, backward pass and optimiser, without the Trainer. Ours is the model's `training_step`,
which counts the pixels that are right, too, with channels_last and a fused optimiser. The notes' is their network, loss
(binary cross-entropy) and optimiser (Adam) in a plain loop. Both begin with the same weights. With another precision
than 32, the notes' network is measured in both, ours in that one.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torchvision.transforms.functional as TF
from torch import Tensor, nn

from lit_models.unet import UNet
from runner.errors import InputError, one_line

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


# -- the notes' network ------------------------------------------------------------------------------------------------


def notes_double_conv(n_in: int, n_out: int) -> nn.Sequential:
    """Return two convolutions with batch norm and ReLU."""
    layers = []
    for n in (n_in, n_out):
        layers += [nn.Conv2d(n, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class NotesUNet(nn.Module):
    """The U-Net of the lecture notes: what comes from below is resized where it does not fit."""

    def __init__(self, n_in: int = 3, n_out: int = 1, features: tuple[int, ...] = (64, 128, 256, 512)):
        super().__init__()
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        for feature in features:
            self.downs.append(notes_double_conv(n_in, feature))
            n_in = feature
        for feature in reversed(features):
            self.ups.append(nn.ConvTranspose2d(2 * feature, feature, kernel_size=2, stride=2))
            self.ups.append(notes_double_conv(2 * feature, feature))
        self.bottleneck = notes_double_conv(features[-1], 2 * features[-1])
        self.final_conv = nn.Conv2d(features[0], n_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K, H, W)."""
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for i in range(0, len(self.ups), 2):
            x, skip = self.ups[i](x), skips.pop()
            if x.shape != skip.shape:
                x = TF.resize(x, size=list(skip.shape[2:]))
            x = self.ups[i + 1](torch.cat((skip, x), dim=1))
        return self.final_conv(x)


def pairs(ours: UNet, notes: NotesUNet) -> list[tuple[nn.Module, nn.Module]]:
    """Return the parts of our network, each with the notes' like it."""
    return [
        *zip(ours.downs, notes.downs, strict=True),
        (ours.bottom, notes.bottleneck),
        *zip(ours.ups, notes.ups[0::2], strict=True),
        *zip(ours.joins, notes.ups[1::2], strict=True),
        (ours.last, notes.final_conv),
    ]


def copy_weights(ours: UNet, notes: NotesUNet) -> None:
    """Give our network the notes' weights."""
    for mine, theirs in pairs(ours, notes):
        mine.load_state_dict(theirs.state_dict())


# -- steps -------------------------------------------------------------------------------------------------------------


class Contender:
    """A network with its optimiser, on one batch.

    Args:
        name: for what is printed.
        precision: of DTYPES.
        batch: images (B, 3, H, W) and masks (B, H, W), 0 or 1.
    """

    def __init__(self, name: str, precision: str, batch: tuple[Tensor, Tensor]):
        self.name, self.dtype, self.batch, self.device = (
            f"{name} {precision}",
            DTYPES[precision],
            batch,
            batch[0].device,
        )
        # which keeps small gradients of 16 bits from becoming 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def seconds(self) -> float:
        """Train for a step; return how long it took."""
        self.wait()
        start = time.perf_counter()
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            self.loss = self.forward()
        self.optimizer.zero_grad()
        self.scaler.scale(self.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for a GPU to have done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Ours(Contender):
    """Our U-Net."""

    def __init__(self, notes: NotesUNet, features: list[int], precision: str, batch: tuple[Tensor, Tensor]):
        super().__init__("ours", precision, batch)
        self.model = UNet(1, features=tuple(features))
        copy_weights(self.model, notes)
        self.model.to(self.device, memory_format=torch.channels_last).train()
        self.model.log_train = lambda *_, **sums: None
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)

    def forward(self) -> Tensor:
        """Return the loss."""
        return self.model.training_step(self.batch, 0)


class Notes(Contender):
    """The notes' U-Net."""

    def __init__(self, notes: NotesUNet, features: list[int], precision: str, batch: tuple[Tensor, Tensor]):
        super().__init__("notes", precision, batch)
        self.model = NotesUNet(features=tuple(features))
        self.model.load_state_dict(notes.state_dict())
        self.model.to(self.device).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def forward(self) -> Tensor:
        """Return the loss."""
        images, masks = self.batch
        return nn.functional.binary_cross_entropy_with_logits(self.model(images), masks.float().unsqueeze(1))


def spread(values: list[float]) -> str:
    """Return the median, and the least and the most."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main(argv: list[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs=2, type=int, default=[160, 240], metavar=("H", "W"), help="(default: 160 240)")
    parser.add_argument("--batch", type=int, default=4, help="pictures in it (default: 4; the notes': 16)")
    parser.add_argument("--features", nargs="+", type=int, default=[64, 128, 256, 512], help="(default: the notes')")
    parser.add_argument("--rounds", type=int, default=7, help="that count (default: 7)")
    parser.add_argument("--precision", choices=DTYPES, default="32", help="(default: 32)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    arguments = parser.parse_args(argv)
    try:
        contenders = make(arguments)
    except (InputError, RuntimeError) as error:  # the latter of a device that is not there
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    height, width = arguments.size
    where = f"{torch.get_num_threads()} of {os.cpu_count()} CPUs" if arguments.device == "cpu" else arguments.device
    print(f"seconds a step of {arguments.batch} pictures of {height} x {width}, {where}, torch {torch.__version__}")
    taken: dict[str, list[float]] = {c.name: [] for c in contenders}
    for i in range(arguments.rounds + 1):
        for contender in contenders:
            taken[contender.name].append(contender.seconds())
        told = "  ".join(f"{name} {values[-1]:.3f}" for name, values in taken.items())
        print(f"  round {i}: {told}{'' if i else ' (does not count)'}", flush=True)
    for name, values in taken.items():
        print(f"{name:10}  {spread(values[1:])}")
    (ours, *notes) = taken
    for other in notes:
        ratios = [a / b for a, b in list(zip(taken[ours], taken[other], strict=True))[1:]]
        print(f"{ours} / {other}  {spread(ratios)}")
    return 0


def make(arguments: argparse.Namespace) -> list[Contender]:
    """Return ours, the notes', and, with another precision than 32, the notes' in that of 32, with the same weights."""
    if min(arguments.rounds, arguments.batch, *arguments.size, *arguments.features) < 1:
        raise InputError("--rounds, --batch, --size and --features start at 1")
    torch.manual_seed(0)
    images = torch.randn(arguments.batch, 3, *arguments.size, device=arguments.device)
    batch = images, (images[:, 0] > 0).long()
    notes = NotesUNet(features=tuple(arguments.features))
    same = [kind(notes, arguments.features, arguments.precision, batch) for kind in (Ours, Notes)]
    return same + [Notes(notes, arguments.features, "32", batch)] * (arguments.precision != "32")


if __name__ == "__main__":
    sys.exit(main())
