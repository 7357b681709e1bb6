"""ICT: interpolation consistency training (Verma et al., IJCAI 2019), as SSL4MIS uses it.

Two unlabeled images are mixed by a random factor, and the student's prediction of the mixture must be the mixture of
the predictions that a moving average of it makes of both. So predictions change evenly between images.

Family: mixing.
Paper: Interpolation Consistency Training for Semi-Supervised Learning, arXiv 1903.03825.
Code: HiLab-git/SSL4MIS, train_interpolation_consistency_training_3D.py.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- the 3D script mixes one pair of images whatever the batch; here the first half of a batch is mixed with the second;
- the paper mixes logits of the teacher (`targets` logits) and any two images, by one factor per batch; its `alpha` is 1
  or 0.1, its `decay` 0.999, its `weight` 100, and the teacher predicts (`evaluate`);
- as in the code labeled images are not mixed; the paper mixes them, too, and their labels.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch

from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import Needs, StudentTeacher, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the consistency term.
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        decay: of the teacher's moving average.
        alpha: both parameters of the Beta distribution of the factors; the smaller, the closer mixtures are to one of
            their images.
        targets: what is mixed of the teacher's predictions: probabilities (SSL4MIS) or logits (the paper).
        passes: of the teacher: of each half of the unlabeled images (SSL4MIS) or of all of them together, which share
            the statistics of batch norms.
        evaluate: the network that predicts.
    """

    weight: float = 0.1
    ramp: float = 1.0
    ramp_every: int = 1
    decay: float = 0.99
    alpha: float = 0.2
    targets: Literal["probabilities", "logits"] = "probabilities"
    passes: Literal["halves", "together"] = "halves"
    evaluate: Literal["student", "teacher"] = "student"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, 1, "decay")
        within(self, 0, float("inf"), "weight", "ramp")
        if not self.alpha > 0:
            raise UserError(f"hp.alpha {self.alpha}: expected more than 0")


class ICT(StudentTeacher):
    Config = Config
    needs = Needs(multiple=2)

    def forward(self, batch, clock):
        labeled, unlabeled = batch.labeled, batch.unlabeled.image
        n = len(labeled.image)
        if not len(unlabeled):
            return Losses({"supervised": segmentation(self.student(labeled.image).logits, labeled.label)})
        pairs = unlabeled.chunk(2)
        factor = self.factors(pairs[0])
        target = self.target(pairs, factor)
        logits = self.student(torch.cat([labeled.image, mix(*pairs, factor)])).logits
        weight = self.consistency_weight(clock)
        distance = (logits[n:].softmax(1) - target).square().mean()
        return Losses({"supervised": segmentation(logits[:n], labeled.label), "consistency": weight * distance},
                      watch={"weight": weight})

    def factors(self, image):
        """The share of the second image in each mixture, (B, 1, ...) for images (B, C, *space)."""
        return symmetric_beta(self.hp.alpha, (len(image), *[1] * (image.ndim - 1)), image.device)

    def target(self, pairs, factor):
        """Class probabilities of the mixtures as the teacher mixes them, (B, K, *space)."""
        if self.hp.passes == "together":
            first, second = self.teacher(torch.cat(pairs)).logits.chunk(2)
        else:
            first, second = (self.teacher(image).logits for image in pairs)
        if self.hp.targets == "logits":
            return mix(first, second, factor).softmax(1)
        return mix(first.softmax(1), second.softmax(1), factor)


def mix(first, second, factor):
    """(1 - factor) first + factor second."""
    return (1 - factor) * first + factor * second


def symmetric_beta(alpha, shape, device):
    """Random numbers of the distribution Beta(alpha, alpha), float32 of this shape.

    One formula of two uniform numbers (Bailey 1994, by Student's t of 2 alpha degrees of freedom), since torch's own
    sampler reads values and is not there for all devices.
    """
    u, v = torch.rand(2, *shape, device=device)
    tangent = (u.pow(-1 / alpha) - 1).sqrt() * torch.cos(2 * math.pi * v)
    return 0.5 + 0.5 * torch.sin(torch.atan(tangent))  # the angle is finite where u is 0
