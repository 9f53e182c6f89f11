"""Speed of the language models: sampling with and without a cache, and a training step beside the library's Transformer.

    python benchmarks/transformer_speed.py
    python benchmarks/transformer_speed.py --context 256 --rounds 9

Everything is measured in turns, A B A B ..., in one process, with nanoGPT's small model (4 layers, 4 heads, 128 wide; the
weights are random, which costs no less than trained ones).

Sampling: one text is continued to the end of the context, where both compute the same; and to four times that. There the
window moves: ours by a quarter of itself at once, after which the cache is filled again; without a cache it moves by one
token each time, and all that is in it is computed for every token, as nanoGPT does.

Training: forward pass, loss, backward pass, clipping and fused AdamW on batches of 12, in a plain loop. Beside
`TransformerLM` stands the same model of `nn.TransformerEncoderLayer`, with the same weights and a causal mask; the losses of
the two are compared first.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.transformer import TransformerLM

VOCABULARY, BATCH = 65, 12


class WithoutCache(TransformerLM):
    """Reads the whole window for every token."""

    def next_logits(self, text: Tensor, state: None) -> tuple[Tensor, None]:
        """As in `TransformerLM`."""
        return self(text[:, -self.context :])[0][:, -1], None


class Library(nn.Module):
    """The same model out of the library's layers, with the weights of ours."""

    def __init__(self, ours: TransformerLM):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, 128), nn.Embedding(ours.context, 128)
        layer = nn.TransformerEncoderLayer(
            128, 4, 512, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, bias=False
        )
        norm = nn.LayerNorm(128, bias=False)
        self.encoder = nn.TransformerEncoder(layer, len(ours.encoder.blocks), norm, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(ours.context))
        names = {"layers": "encoder.blocks", "self_attn": "attention", "linear1": "mlp.0", "linear2": "mlp.3"}
        state = ours.state_dict()
        for name, parameter in self.named_parameters():
            theirs = name.replace("encoder.layers", "layers")
            for theirs_part, ours_part in names.items():
                theirs = theirs.replace(theirs_part, ours_part)
            parameter.data.copy_(state[theirs])

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """Map tokens (B, T) to logits (B, T, V)."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        x = self.encoder(x, mask=self.mask, is_causal=True)
        return F.linear(x, self.embedding.weight), None


def stepper(model: nn.Module, tokens: Tensor) -> Callable[[], float]:
    """Return a function that takes a training step on tokens (B, T + 1), and returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)

    def step() -> float:
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def in_turns(first: Callable, second: Callable, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of both, round by round; the first of the rounds does not count."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for seconds, call in zip(taken, (first, second), strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return taken[0][1:], taken[1][1:]


def spread(values: list[float], digits: int = 2) -> str:
    """Return the median, and the least and the most."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main(argv: list[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--rounds", type=int, default=7, help="that count (default: 7)")
    parser.add_argument("--steps", type=int, default=20, help="of training in a round (default: 20)")
    arguments = parser.parse_args(argv)
    context, rounds = arguments.context, arguments.rounds
    torch.manual_seed(0)
    ours, without = TransformerLM(VOCABULARY, context), WithoutCache(VOCABULARY, context)
    without.load_state_dict(ours.state_dict())
    print(f"{torch.get_num_threads()} thread(s), context {context}: median (least to most) of {rounds} rounds")

    prompt = torch.zeros(1, 1, dtype=torch.int64)
    for count in (context - 1, 4 * context):
        a, b = in_turns(lambda n=count: ours.sample(prompt, n), lambda n=count: without.sample(prompt, n), rounds)
        rates = [spread([count / seconds for seconds in taken], 0) for taken in (a, b)]
        ratio = spread([slow / quick for quick, slow in zip(a, b, strict=True)])
        print(
            f"sampling {count:5} tokens: {rates[0]} a second with the cache, {rates[1]} without: {ratio} times as fast"
        )

    tokens = torch.randint(VOCABULARY, (BATCH, context + 1))
    library = Library(ours)
    steps = stepper(ours, tokens), stepper(library, tokens)
    losses = [step() for step in steps]
    if abs(losses[0] - losses[1]) > 1e-4:
        print(f"error: the losses differ, {losses[0]} and {losses[1]}: these are not the same model", file=sys.stderr)
        return 1
    a, b = in_turns(*(lambda step=step: [step() for _ in range(arguments.steps)] for step in steps), rounds)
    times = [spread([1000 * seconds / arguments.steps for seconds in taken], 1) for taken in (a, b)]
    ratio = spread([theirs / ours for ours, theirs in zip(a, b, strict=True)])
    print(f"training step: {times[0]} ms, the library's layers {times[1]} ms: they take {ratio} times as long")
    return 0


if __name__ == "__main__":
    sys.exit(main())
