"""A network with several decoders that answer with stored maps."""

from types import SimpleNamespace

import torch
from torch import nn

from networks.base import Features, Output


class SeveralDecoders(nn.Module):
    """The network's own decoder and its branches answer with the given logits, in order, which are theirs alone.

    Every branch that was asked keeps what it saw in `seen`.
    """

    backbone = SimpleNamespace(upsamplings=(None, None, None))

    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen, self.branches = logits, {}, []
        self.skips = [torch.ones(len(logits[0]), 2, *logits[0].shape[2:])]

    def add_branch(self, upsampling=None):
        index = len(self.branches) + 1

        def branch(skips):
            self.seen[index] = skips
            return Output({"seg": self.logits[index]}, Features(skips, []))

        self.branches.append(branch)

    def forward(self, image):
        assert len(image) == len(self.logits[0]) and image.shape[2:] == self.logits[0].shape[2:]
        return Output({"seg": self.logits[0]}, Features(self.skips, []))
