"""Show, attend and tell: a sentence about a picture (Xu et al. 2015).

A convolutional network's maps are read as a sequence: each place of their grid is one vector of it. Before each word, the
decoder of `seq2seq.py` looks at the places it needs: attention's weights over the grid, drawn over the picture, show what it
looked at when it said "star". Its first state comes from the mean over the grid.

Departures from the paper: the network is trained from scratch together with the decoder, not taken from ImageNet; no gate
on what is seen, no second loss that makes it look everywhere equally often; words are written greedily, not by beam search.

Shapes: B batch, H height, W width, D maps, h, w of the grid, S = h w places, T words, V symbols.
"""

from typing import Literal

import torch
from torch import Tensor

from callbacks.translations import CaptionPictures
from lit_models.backbones import Backbone
from lit_models.convnet import can_be_channels_last
from lit_models.seq2seq import AttentionDecoder, Reading, Translator


class ShowAttendTell(Translator):
    """A backbone's maps, and a decoder that looks at them.

    Args:
        targets, max_length, label_smoothing, task: as in `Translator`.
        backbone: with one layer of maps.
        width: of the words' embeddings.
        hidden: units of the decoder.
        cell: of the decoder.
        attention: how a place is scored, see `attention.py`; `dot` needs as many maps as `hidden`.
        dropout: see `AttentionDecoder`.
        fused: whether the library's layer computes, see `RNN`.
        channels_last: whether to keep a pixel's channels side by side in memory, which convolutions are faster with.
    """

    pictures = CaptionPictures

    def __init__(
        self,
        targets: int,
        backbone: Backbone,
        width: int = 64,
        hidden: int = 128,
        cell: Literal["gru", "lstm"] = "lstm",
        attention: Literal["additive", "dot", "general"] = "additive",
        dropout: float = 0.0,
        fused: bool = True,
        channels_last: bool = True,
        max_length: int = 20,
        label_smoothing: float = 0.0,
        **task,
    ):
        super().__init__(targets, max_length, label_smoothing, **task)
        self.backbone, self.pretrained, self.channels_last = backbone, backbone.pretrained, channels_last
        self.decoder = AttentionDecoder(targets, backbone.channels[-1], width, hidden, cell, attention, dropout, fused)

    def setup(self, stage: str) -> None:
        """Check the data; set the memory format."""
        super().setup(stage)
        if self.channels_last and can_be_channels_last(self, self.trainer.strategy.root_device):
            self.to(memory_format=torch.channels_last)

    def read(self, sources: Tensor) -> Reading:
        """Look at images (B, 3, H, W)."""
        maps = self.backbone(sources)[-1]  # (B, D, h, w)
        memory = maps.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, D, S) -> (B, S, D)
        return self.decoder.begin(memory, memory.mean(dim=1))

    def write(self, tokens: Tensor, state: Reading) -> tuple[Tensor, Reading, Tensor]:
        """Go on writing, see `Translator.write`."""
        return self.decoder(tokens, state)
