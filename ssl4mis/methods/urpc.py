"""URPC: uncertainty rectified pyramid consistency (Luo et al., MICCAI 2021).

One network predicts at several decoder levels, and on unlabeled images every level must agree with the mean of all. The
divergence from the mean says how uncertain a voxel is: it lowers the voxel's weight and is itself minimized.

Family: consistency.
Paper: Efficient Semi-supervised Gross Target Volume of Nasopharyngeal Carcinoma Segmentation via Uncertainty Rectified
Pyramid Consistency, arXiv 2012.07042.
Code: HiLab-git/SSL4MIS, train_uncertainty_rectified_pyramid_consistency_3D.py.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- the weight is full at the end; the released command for BraTS stops halfway up the ramp, at 0.0283 (`ramp` 2);
- by default on a V-Net, which is a port: the published numbers are those of the U-Net (`--network unet`);
- as many classes as the data have, where the 3D script always has three (`compat` legacy);
- any backbone: heads and channel dropout go on its finest decoder levels, of which the authors' U-Net has four;
- 2D is like 3D, where the 2D script enlarges by the nearest voxel and perturbs the coarse levels in other ways;
- logarithms of the softmax from the logits, and no mean below the least float, whose logarithm is not finite.
"""
from dataclasses import dataclass
from typing import Literal

import torch

from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import Method, at_least_one, within

DROPOUT = (0.1, 0.2, 0.3, 0.5)  # of channels after the decoder levels, fine to coarse
RELEASED_CLASSES = 3


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the consistency term.
        ramp: length of the weight's ramp, a share of the run; above 1 the run ends before the weight is full.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        scales: decoder levels with a head, at least 2; fewer where the backbone has fewer levels.
        compat: legacy has three classes where the data have two, as the released 3D script; predictions leave the
            third one out.
    """

    weight: float = 0.1
    ramp: float = 1.0
    ramp_every: int = 1
    scales: int = 4
    compat: Literal["right", "legacy"] = "right"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, float("inf"), "weight", "ramp")
        if self.scales < 2:
            raise UserError(f"hp.scales {self.scales}: expected at least 2, which can disagree")


class URPC(Method):
    Config = Config

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build(heads=self.pyramid, dropout=DROPOUT)

    def pyramid(self, backbone):
        """Names, channels and decoder levels of the heads; UserError where the backbone has one level only."""
        levels = min(self.hp.scales, len(backbone.decoder_channels))
        if levels < 2:
            raise UserError(f"network {type(backbone).__name__}: urpc needs at least two decoder levels, this has one")
        classes = self.task.classes
        if self.hp.compat == "legacy":
            classes = max(classes, RELEASED_CLASSES)
        return {"seg" if level == 0 else f"seg{level}": (classes, level) for level in range(levels)}

    def forward(self, batch, clock):
        halves = [len(batch.labeled.image), len(batch.unlabeled.image)]
        maps = self.net(batch.image).heads.values()
        labeled, unlabeled = zip(*(logits.split(halves) for logits in maps), strict=True)
        supervised = torch.stack([segmentation(logits, batch.labeled.label) for logits in labeled]).mean()
        if not len(batch.unlabeled.image):
            return Losses({"supervised": supervised})
        weight = self.consistency_weight(clock)
        return Losses({"supervised": supervised, "consistency": weight * consistency(unlabeled).mean()},
                      watch={"weight": weight})

    def predict(self, image):
        return self.net(image).logits[:, :self.task.classes].softmax(1)


def disagreement(maps):
    """Logits of several scales, each (B, K, *space) -> their probabilities, the mean of these, and divergences from it.

    A divergence is in nats, from the mean to a scale, (B, *space).
    """
    logs = [logits.log_softmax(1) for logits in maps]
    probabilities = [scale.exp() for scale in logs]
    mean = sum(probabilities) / len(probabilities)
    # sum_k mean (log mean - log p) in two sums: the first is one for all scales, the second one pass over each.
    negentropy = (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum(1)
    return probabilities, mean, [negentropy - (mean * scale).sum(1) for scale in logs]


def consistency(maps):
    """Squared distances from the mean prediction where the scales agree, plus the mean divergence, of each scale (S,).

    Gradients flow through the mean, the weights and the divergences.
    """
    probabilities, mean, divergences = disagreement(maps)
    losses = []
    for probability, divergence in zip(probabilities, divergences, strict=True):
        certainty = (-divergence).exp()
        distance = (mean - probability).square().mean(1) * certainty
        losses.append(distance.mean() / (certainty.mean() + 1e-8) + divergence.mean())
    return torch.stack(losses)
