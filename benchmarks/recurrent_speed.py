"""How much faster the library's recurrent layers are than ours, written out step by step; paired: ours, theirs, ours, ...

A step is forward and backward, of one layer with the same weights, on the same sequences: once with all of them of full
length, once with lengths in no order (mean three quarters), padded.

    python benchmarks/recurrent_speed.py
    python benchmarks/recurrent_speed.py --rounds 3 --sizes 64,48,1,48      batch, steps, inputs, hidden units
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from lit_models.lstm import GRU, LSTM
from lit_models.rnn import RNN

SIZES = ("64,48,1,48", "64,8,64,128", "32,128,128,256")  # series_lstm's, names_lstm's, a character language model's


def seconds(network: RNN, x: Tensor, lengths: Tensor | None) -> float:
    """Seconds of forward and backward."""
    network.zero_grad()
    start = time.perf_counter()
    outputs, _ = network(x, lengths)
    outputs.sum().backward()
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of each, after two that do not count (default: 20)")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help=f"(default: {' '.join(SIZES)})")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    arguments = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} thread(s)")
    print("milliseconds, medians; ratio: median of the pairs' (least to most)\n")
    print(f"{'':4}  {'B, T, D, H':16}  {'lengths':8}  {'ours':>7}  {'library':>7}  ratio")
    for size in arguments.sizes:
        batch, steps, n_in, hidden = map(int, size.split(","))
        for kind in (RNN, LSTM, GRU):
            for padded in (False, True):
                torch.manual_seed(0)
                ours = kind(n_in, hidden).to(arguments.device)
                library = kind(n_in, hidden, fused=True).to(arguments.device)
                library.load_state_dict(ours.state_dict())
                x = torch.randn(batch, steps, n_in, device=arguments.device)
                lengths = torch.randint((steps + 1) // 2, steps + 1, (batch,)) if padded else None
                pairs = [
                    (seconds(ours, x, lengths), seconds(library, x, lengths)) for _ in range(arguments.rounds + 2)
                ][2:]
                ratios = [a / b for a, b in pairs]
                a, b = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
                what = f"{kind.__name__:4}  {size.replace(',', ', '):16}  {'padded' if padded else 'full':8}"
                ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
                print(f"{what}  {a:7.2f}  {b:7.2f}  {ratio}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
