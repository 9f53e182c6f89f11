"""Continue a text, with nothing but a checkpoint and the YAML that it was trained by.

python train.py RUN/config.yaml --ckpt RUN/best.ckpt --prompt "ROMEO:" --temperature 0.8 --seed_everything 1

The same prompt, settings and seed give the same text.
"""

import torch

from datamodules.vocabulary import Vocabulary
from lit_models.language_model import LanguageModel
from runner.arguments import Prompt
from runner.errors import InputError


def continue_text(model: LanguageModel, trained: dict, prompt: Prompt, seed: int) -> None:
    """Print the prompt, and what comes next.

    Args:
        model: with its weights.
        trained: what the checkpoint says of the data: its vocabulary.
        prompt: what to begin with, and how to go on.
        seed: of the draws.

    Raises:
        InputError: the prompt is empty, or has a character that the model does not know.
    """
    vocabulary = Vocabulary(trained["vocabulary"], pad=False)
    if not prompt.text:
        raise InputError("--prompt is empty: give it one character at least, such as a line's end: --prompt $'\\n'")
    if unknown := [symbol for symbol in dict.fromkeys(prompt.text) if symbol not in vocabulary.numbers]:
        raise InputError(
            f"--prompt: the model does not know {', '.join(map(ascii, unknown))}, as the text that it was trained on has none; "
            f"it knows {''.join(vocabulary.symbols)!a}"
        )
    dice = torch.Generator().manual_seed(seed)
    text = model.write(
        prompt.text, vocabulary, prompt.length, temperature=prompt.temperature, top_k=prompt.top_k, generator=dice
    )
    print(prompt.text + text)
