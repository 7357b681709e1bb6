"""CPS: cross pseudo supervision (Chen et al., CVPR 2021), as SSL4MIS uses it for volumes.

Two networks of the same kind start from different weights and see the same images. On unlabeled images each learns the
hard labels that the other one predicts.

Family: co-training.
Paper: Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision, arXiv 2106.01226.
Code: HiLab-git/SSL4MIS, train_cross_pseudo_supervision_3D.py.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- the poly schedule is one step later than in this one script, as in the authors' other scripts;
- transposed convolutions start like the others, where the script leaves them as torch makes them;
- the paper's own 2D method is `images` all, `weight` 1.5 and `ramp` 0; its supervised loss has no Dice.
"""
from dataclasses import dataclass
from typing import Literal

from networks.blocks import kaiming, xavier
from ssl4mis.batch import Losses
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import CoTraining, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the cross terms (1.5 in the paper).
        ramp: share of the run over which the weight ramps up; 0 for a constant weight (the paper).
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        images: where the networks teach each other: on unlabeled images (SSL4MIS) or on all (the paper).
        evaluate: what predicts: the first network or the mean of both.
    """

    weight: float = 0.1
    ramp: float = 1.0
    ramp_every: int = 1
    images: Literal["unlabeled", "all"] = "unlabeled"
    evaluate: Literal["first", "mean"] = "first"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, float("inf"), "weight", "ramp")


class CPS(CoTraining):
    Config = Config

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.first, self.second = kaiming(build()), xavier(build())

    def forward(self, batch, clock):
        hp, n, label = self.hp, len(batch.labeled.image), batch.labeled.label
        first, second = self.first(batch.image).logits, self.second(batch.image).logits
        supervised = {"supervised/first": segmentation(first[:n], label),
                      "supervised/second": segmentation(second[:n], label)}
        if not len(batch.unlabeled.image):
            return Losses(supervised)
        if hp.images == "unlabeled":
            first, second = first[n:], second[n:]
        weight = self.consistency_weight(clock)
        cross = {"cross/first": weight * cross_entropy(first, second.argmax(1)),
                 "cross/second": weight * cross_entropy(second, first.argmax(1))}
        return Losses(supervised | cross, watch={"weight": weight})
