"""UniMatch: two strong views and perturbed features of one weak view (Yang et al., CVPR 2023).

Confident predictions on an unlabeled crop teach, as in FixMatch, but three times: two strong views of the crop, each
with a box of another sample, and the crop itself, decoded from features of which half of the channels are dropped.

Family: pseudo-label.
Paper: Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation, arXiv 2208.09910.
Code: LiheYoung/UniMatch, more-scenarios/medical/unimatch.py (ACDC).
Differs from the code:
- but for slices of ACDC, pseudo-labels are from a pass without dropout, since V-Net drops half of its channels
  (`pseudo` shared);
- with two classes cross-entropy joins Dice on pseudo-labels (`loss` dice; the authors' natural images: `loss` ce and
  `dice` False);
- the last network is evaluated, while the authors take the best one on validation and test cases together;
- features of the unlabeled half alone are perturbed, labeled and unlabeled images keep the same precision, strong views
  change the intensities of gray volumes, and boxes are cuboids.
"""
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from networks.blocks import CHANNEL_DROPOUT
from ssl4mis.batch import Losses
from ssl4mis.losses import cross_entropy, dice, segmentation
from ssl4mis.matching import boxes, check_boxes, masked, paste, perturbed, steady, sureness, targets
from ssl4mis.method import Method, Needs, Preset, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        tau: confidence from which on a voxel counts.
        pseudo: pseudo-labels are from a pass in eval mode (steady), or from the training pass (shared, authors).
        loss: on pseudo-labels; auto is ce+dice with two classes and dice with more.
        dice: whether Dice joins cross-entropy in the supervised loss.
        cutmix: probability that a box is cut out of another sample, for each strong view.
        box_min: smallest share of voxels in a box.
        box_max: largest share.
        feature_dropout: of channels, in the perturbed features.
    """

    tau: float = 0.95
    pseudo: Literal["steady", "shared"] = "steady"
    loss: Literal["auto", "dice", "ce", "ce+dice"] = "auto"
    dice: bool = True
    cutmix: float = 0.5
    box_min: float = 0.02
    box_max: float = 0.4
    feature_dropout: float = 0.5

    def __post_init__(self):
        within(self, 0, float("inf"), "tau")
        within(self, 0, 1, "feature_dropout")
        check_boxes(self)


class UniMatch(Method):
    Config = Config
    needs = Needs(strong=2, partner=True)
    presets = {
        **dict.fromkeys(("LA", "Pancreas"), Preset(run={"schedule": "poly"}, iterations=15000)),
        "ACDC": Preset(hp={"pseudo": "shared"}, dims=2),
    }

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net, self.perturb = build(), CHANNEL_DROPOUT[task.spatial_dims](hp.feature_dropout)

    def forward(self, batch, clock):
        hp, n, label, unlabeled = self.hp, len(batch.labeled.image), batch.labeled.label, batch.unlabeled
        weak = self.net(batch.image)
        supervised = (segmentation if hp.dice else cross_entropy)(weak.logits[:n], label)
        if not len(unlabeled.image):
            return Losses({"supervised": 0.5 * supervised})
        shared = weak.logits[n:] if hp.pseudo == "shared" else None
        mine, theirs = targets(partial(steady, self.net), unlabeled, batch.partner, shared)
        first, second = boxes(hp, unlabeled.image), boxes(hp, unlabeled.image)
        views = zip((first, second), batch.partner.strong, unlabeled.strong, strict=True)
        strong = self.net(torch.cat([paste(*view) for view in views])).logits.chunk(2)
        feature = perturbed(self.net, weak.features.encoder, self.perturb, len(unlabeled.image))
        terms = {"supervised": 0.5 * supervised,
                 "strong/first": 0.125 * self.loss(strong[0], mine.mixed(first, theirs)),
                 "strong/second": 0.125 * self.loss(strong[1], mine.mixed(second, theirs)),
                 "feature": 0.25 * self.loss(feature, mine)}
        return Losses(terms, watch=sureness(mine.sure(hp.tau), mine.label))

    def loss(self, logits, target):
        """What the voxels say that a target is sure of."""
        sure, kind = target.sure(self.hp.tau), self.hp.loss
        if kind == "dice" or kind == "auto" and self.task.classes > 2:
            return dice(logits.softmax(1), target.label, mask=sure)
        return masked(logits, target.label, sure, target.valid, kind != "ce")
