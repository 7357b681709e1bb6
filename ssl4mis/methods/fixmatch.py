"""FixMatch: confident labels for strong views (Sohn et al., NeurIPS 2020), as UniMatch's authors segment with it.

The network labels an unlabeled crop as it is. Where it is confident, it learns these labels on a strong view of the
same crop, of which a box is replaced by another sample.

Family: pseudo-label.
Paper: FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence, arXiv 2001.07685.
Code: LiheYoung/UniMatch, fixmatch.py (2D).
Differs from the code:
- pseudo-labels are from a pass without dropout, since V-Net drops half of its channels (`pseudo` shared);
- Dice joins cross-entropy in both losses (`dice` False, `u_dice` False);
- networks start from scratch with one learning rate, strong views are those of gray volumes, boxes are cuboids, and
  partners are other samples instead of other crops of the same one;
- the paper's own averaged network is `evaluate` teacher;
- SSL4MIS has two scripts of this name, both with `supervised` 2, `weight` 0.2, `ramp` 1 and `cutmix` 0: a threshold of
  0.8 under which voxels become background (train_fixmatch_standard_augs.py: `pseudo` shared, `tau` 0.8, `confidence`
  range, `unsure` background, `complementary` 0.5), and none (train_fixmatch_cta.py: `pseudo` teacher, `tau` 0, `decay`
  0.99). Labeled images have no strong view here: the complementary loss takes them as they are.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch

from ssl4mis.batch import Losses
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.matching import boxes, check_boxes, masked, paste, steady, sureness, targets
from ssl4mis.method import Method, Needs, Preset, Teacher, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        tau: confidence from which on a voxel counts.
        confidence: the largest probability, or its lead over the smallest one, as a share of itself (SSL4MIS).
        unsure: voxels under the threshold are ignored, or labeled as background (SSL4MIS).
        pseudo: pseudo-labels are from a pass in eval mode (steady), from the training pass (shared, authors), or from
            a moving average of the network (teacher).
        supervised: weight of the supervised loss.
        weight: final weight of the losses on pseudo-labels.
        ramp: share of the run over which the weight ramps up; 0 for a constant weight.
        ramp_every: the weight changes every so many steps.
        complementary: weight, beside the loss on pseudo-labels, of that on least likely classes (0.5 in SSL4MIS).
        cutmix: probability that a box is cut out of another sample.
        box_min: smallest share of voxels in a box.
        box_max: largest share.
        dice: whether Dice joins cross-entropy in the supervised loss.
        u_dice: whether Dice joins cross-entropy on pseudo-labels.
        decay: of the moving average.
        evaluate: the network that predicts.
    """

    tau: float = 0.95
    confidence: Literal["probability", "range"] = "probability"
    unsure: Literal["ignored", "background"] = "ignored"
    pseudo: Literal["steady", "shared", "teacher"] = "steady"
    supervised: float = 0.5
    weight: float = 0.5
    ramp: float = 0.0
    ramp_every: int = 1
    complementary: float = 0.0
    cutmix: float = 0.5
    box_min: float = 0.02
    box_max: float = 0.4
    dice: bool = True
    u_dice: bool = True
    decay: float = 0.999
    evaluate: Literal["student", "teacher"] = "student"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, 1, "decay")
        within(self, 0, float("inf"), "tau", "supervised", "weight", "ramp", "complementary")
        check_boxes(self)


class FixMatch(Method):
    Config = Config
    needs = Needs(strong=1, partner=True)
    presets = dict.fromkeys(("LA", "Pancreas"), Preset(run={"schedule": "poly"}, iterations=15000))

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.student, self.teacher = build(), None
        if hp.pseudo == "teacher":
            self.teacher = Teacher(self.student, hp.decay)
        elif hp.evaluate == "teacher":  # which makes no passes in training, and so no statistics of its own
            self.teacher = Teacher(self.student, hp.decay, average="state")

    def forward(self, batch, clock):
        hp, n, label, unlabeled = self.hp, len(batch.labeled.image), batch.labeled.label, batch.unlabeled
        weak = self.student(batch.image).logits
        terms = {"supervised": hp.supervised * (segmentation if hp.dice else cross_entropy)(weak[:n], label)}
        if not len(unlabeled.image):
            return Losses(terms)
        mine, theirs = targets(self.guess, unlabeled, batch.partner, weak[n:] if hp.pseudo == "shared" else None)
        box = boxes(hp, unlabeled.image)
        target = mine.mixed(box, theirs)
        pseudo, mask, sure = self.pseudo_labels(target)
        image = paste(box, batch.partner.strong[0], unlabeled.strong[0])
        if hp.complementary:
            image = torch.cat([batch.labeled.image, image])
        strong, weight = self.student(image).logits, self.consistency_weight(clock)
        terms["pseudo"] = weight * masked(strong[-len(pseudo):], pseudo, mask, target.valid, hp.u_dice)
        if hp.complementary:
            likely = torch.cat([weak[:n].detach().softmax(1), target.probability])
            terms["complementary"] = weight * hp.complementary * complementary(strong, likely)
        return Losses(terms, watch=sureness(sure, target.label) | ({"weight": weight} if hp.ramp else {}))

    def guess(self, image):
        """Probabilities of what teaches, without gradient."""
        if self.hp.pseudo == "teacher":
            return self.teacher(image).logits.softmax(1)
        return steady(self.student, image)

    def pseudo_labels(self, target):
        """Labels, the voxels that count, and those that are sure, (B, *space) each."""
        if self.hp.confidence == "range":
            target = target._replace(confidence=lead(target.probability).amax(1))
        sure = target.sure(self.hp.tau)
        if self.hp.unsure == "background":
            return target.label * sure, target.valid, sure
        return target.label, sure, sure

    def after_step(self, clock):
        if self.teacher:
            self.teacher.follow(self.student, clock.step)

    def predict(self, image):
        net = self.teacher if self.hp.evaluate == "teacher" else self.student
        return net(image).logits.softmax(1)


def lead(probability):
    """How far each class is ahead of the least likely one, as a share of the most likely one, (B, K, *space)."""
    return (probability - probability.amin(1, keepdim=True)) / probability.amax(1, keepdim=True)


def certainty(logits):
    """1 where each class has its probability in one voxel, 0 where it is spread evenly: mean over classes, samples."""
    places = logits.log_softmax(1).flatten(2).log_softmax(-1)
    return 1 + ((places.exp() * places).sum(-1) / math.log(places.shape[-1])).mean()


def complementary(logits, likely):
    """SSL4MIS's loss on the least likely classes: 1 - p are its logits, and certainty weighs it twice, as released."""
    return certainty(logits) ** 2 * cross_entropy(1 - logits.softmax(1), likely.argmin(1))
