"""R-Drop: regularized dropout (Liang et al., NeurIPS 2021), as segmentation can use it.

Every image goes through the network twice, and dropout makes two predictions of it. On unlabeled images they must
agree: the mean of the Kullback-Leibler divergences from each to the other is minimized, and both learn.

Family: consistency.
Paper: R-Drop: Regularized Dropout for Neural Networks, arXiv 2106.14448.
Code: HiLab-git/SSL4MIS, train_regularized_dropout_3D.py.
Differs from the code:
- one network with two passes, as in the paper; the script has two networks with a pass each (`networks` two);
- the divergence is that of class probabilities; the script has its softmax along the last axis of space, where it does
  not see that a class becomes likelier everywhere, and the mean over all elements (`axis` last);
- the paper's smallest weight, 1, since that of the script, 4, belongs to its divergence, which is much smaller;
- the supervised loss is the mean of both passes, as in the paper; of two networks it is the sum, as in the script;
- a network without dropout of its own gets some before its head (`dropout`);
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- the poly schedule is one step later than in this one script, as in the authors' other scripts.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import CoTraining, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the divergence (1 to 5 in the paper, 4 in the authors' code).
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        networks: two passes of one network (the paper) or a pass of each of two (SSL4MIS).
        axis: what the divergence compares: probabilities of classes, or (SSL4MIS) profiles of each class's logits along
            the last axis of space.
        images: where the passes must agree: on unlabeled images (SSL4MIS) or on all (the paper).
        dropout: rate of channel dropout before the head where one network has no dropout of its own.
        evaluate: which of two networks predicts: the first or the mean of both.
    """

    weight: float = 1.0
    ramp: float = 1.0
    ramp_every: int = 1
    networks: Literal["one", "two"] = "one"
    axis: Literal["classes", "last"] = "classes"
    images: Literal["unlabeled", "all"] = "unlabeled"
    dropout: float = 0.5
    evaluate: Literal["first", "mean"] = "first"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, float("inf"), "weight", "ramp")
        if not 0 < self.dropout < 1:
            raise UserError(f"hp.dropout {self.dropout}: expected more than 0 and less than 1, so that passes differ")


class RDrop(CoTraining):
    Config = Config

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.first = build()
        self.second = build() if hp.networks == "two" else None
        self.own_dropout = any(isinstance(m, nn.Dropout | nn.Dropout2d | nn.Dropout3d) and m.p
                               for m in self.first.modules())
        if hp.networks == "one" and not self.own_dropout:
            self.first = build(dropout=(hp.dropout,))

    def remarks(self):
        if self.hp.networks == "two" or self.own_dropout:
            return ()
        return (f"this network has no dropout of its own: r_drop adds channel dropout of {self.hp.dropout} before its "
                "head (hp.dropout)",)

    def forward(self, batch, clock):
        n, label = len(batch.labeled.image), batch.labeled.label
        first, second = self.passes(batch.image)
        share = 1.0 if self.hp.networks == "two" else 0.5
        supervised = {"supervised/first": share * segmentation(first[:n], label),
                      "supervised/second": share * segmentation(second[:n], label)}
        if not len(batch.unlabeled.image):
            return Losses(supervised)
        if self.hp.images == "unlabeled":
            first, second = first[n:], second[n:]
        weight = self.consistency_weight(clock)
        return Losses(supervised | {"consistency": weight * divergence(first, second, self.hp.axis)},
                      watch={"weight": weight})

    def passes(self, image):
        """Logits of both passes."""
        if self.second is None:
            return self.first(torch.cat([image, image])).logits.chunk(2)
        return self.first(image).logits, self.second(image).logits


def divergence(first, second, axis="classes"):
    """Mean of both Kullback-Leibler divergences between the softmaxes of two maps of logits (B, K, *space), in nats.

    That of a voxel's classes, mean over voxels, or of profiles along the "last" axis, mean over all their elements.
    """
    along = 1 if axis == "classes" else -1
    first, second = first.log_softmax(along), second.log_softmax(along)
    each = 0.5 * (first.exp() - second.exp()) * (first - second)
    return each.sum(1).mean() if axis == "classes" else each.mean()
