"""DTC: dual-task consistency (Luo et al., AAAI 2021).

One network predicts the segmentation and the signed distance to its boundary. A steep step turns the distance into a
soft mask, and the two masks must agree on labeled and unlabeled images.

Family: dual task.
Paper: Semi-supervised Medical Image Segmentation through Dual-task Consistency, arXiv 2009.04448.
Code: HiLab-git/DTC, train_la_dtc.py.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- in a patch without foreground the true distance is 1, and -1 in one without background (`compat` legacy gives the
  code's 0 without foreground, and 0 for what is 0/0 there without background);
- predictions are not reduced to their largest component: that is post-processing, which any method could have;
- softmax over all classes in place of the sigmoid of one channel, and a distance map for each foreground class against
  the rest, as the authors advise for more than two classes.
"""
from dataclasses import dataclass
from typing import Literal

import torch

from ssl4mis.batch import Losses
from ssl4mis.distance import class_distances
from ssl4mis.losses import dice
from ssl4mis.method import Method, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        sdf: weight of the squared error of the signed distance on labeled images.
        steepness: of the step from distance to mask; beyond 5 of its inverse the mask is all but 0 or 1.
        weight: final weight of the consistency term.
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        compat: legacy keeps the released distance map of patches without foreground, 0 everywhere.
    """

    sdf: float = 0.3
    steepness: float = 1500.0
    weight: float = 1.0
    ramp: float = 1.0
    ramp_every: int = 1
    compat: Literal["right", "legacy"] = "right"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, float("inf"), "weight", "ramp")


class DTC(Method):
    Config = Config

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build({"seg": task.classes, "sdf": task.classes - 1})

    def forward(self, batch, clock):
        hp, n, label = self.hp, len(batch.labeled.image), batch.labeled.label
        heads = self.net(batch.image).heads
        probability, sdf = heads["seg"].softmax(1), heads["sdf"].tanh()
        terms = {"supervised": dice(probability[:n], label, "foreground"),
                 "sdf": hp.sdf * (sdf[:n] - class_distances(label, self.task.classes, hp.compat)).square().mean()}
        if not len(batch.unlabeled.image):
            return Losses(terms)
        weight = self.consistency_weight(clock)
        distance = (self.soft_mask(sdf) - probability[:, 1:]).square().mean()
        return Losses(terms | {"consistency": weight * distance}, watch={"weight": weight})

    def soft_mask(self, sdf):
        """1 inside, 0 outside and 0.5 on the boundary of a signed distance."""
        return torch.sigmoid(-self.hp.steepness * sdf)
