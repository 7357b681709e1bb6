"""DCT: deep co-training (Qiao et al., ECCV 2018; for segmentation Peng et al., Pattern Recognition 2020).

Two networks that start from different weights must agree on unlabeled images. So that they do not become the same, each
can also be made to say of the other's adversarial examples what the other says of the clean images.

Family: co-training.
Paper: Deep Co-Training for Semi-Supervised Image Recognition, arXiv 1803.05984; Deep Co-Training for Semi-Supervised
Image Segmentation, arXiv 1903.11233.
Code: HiLab-git/SSL4MIS, train_deep_co_training_2D.py, for `views` rotations, which is another method.
Differs from the code:
- two networks, as in the papers; the script has one that must agree with itself when an image is turned by a random
  number of right angles in the plane of the first two axes (`views` rotations, with `weight` 0.1 and `ramp` 1); where
  this plane of a patch is no square, only by half turns;
- no adversarial examples unless `adversarial` says so (0.05 in the paper, as on ACDC here), since they take more time
  than all the rest; the weight ramps up in shares of the run that come from the paper's epochs;
- both kinds of adversarial examples in every step, of labeled and of unlabeled images, where the paper draws one;
- those are bounded by the intensities of their patch, and `epsilon` is a share of its range, instead of [0, 1];
- a virtual adversarial example is `epsilon` away in root mean square, where the papers' length of a whole image is lost
  in rounding for volumes, and so is the image at which its direction is found;
- both networks see the same labeled images, and the supervised loss has Dice (`dice`);
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks).
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from ssl4mis.attacks import fgsm, vat
from ssl4mis.batch import Losses
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import CoTraining, Preset, at_least_one, within
from ssl4mis.schedules import sigmoid_ramp


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        views: what must agree: two networks (the papers) or one network's views of an image and of a turned one, as
            the squared difference of probabilities (SSL4MIS).
        weight: final weight of the agreement (0.1 in SSL4MIS).
        ramp: share of the run over which the weights ramp up (1 in SSL4MIS).
        ramp_every: the weight of the agreement changes every so many steps (150 in SSL4MIS).
        adversarial: final weight of the diversity of two networks; 0 for none, which takes a third of the time.
        adversarial_start: share of the run before which that weight is 0.
        attack: adversarial examples: fgsm of labeled images, vat of unlabeled ones, or both.
        epsilon: size of an adversarial change, a share of the range of the patch's intensities.
        dice: whether Dice joins cross-entropy in the supervised loss (not in the papers).
        evaluate: which of two networks predicts: the first or the mean of both.
    """

    views: Literal["networks", "rotations"] = "networks"
    weight: float = 0.5
    ramp: float = 0.4
    ramp_every: int = 1
    adversarial: float = 0.0
    adversarial_start: float = 0.15
    attack: Literal["both", "fgsm", "vat"] = "both"
    epsilon: float = 0.03
    dice: bool = True
    evaluate: Literal["first", "mean"] = "first"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, float("inf"), "weight", "ramp", "adversarial", "epsilon")
        within(self, 0, 1, "adversarial_start")


class DCT(CoTraining):
    Config = Config
    presets = {"ACDC": Preset({"ramp": 5 / 12, "adversarial": 0.05, "adversarial_start": 1 / 6}, dims=2)}

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.first = build()
        self.second = build() if hp.views == "networks" else None

    def forward(self, batch, clock):
        if self.second is None:
            return self.rotations(batch, clock)
        hp, n, label = self.hp, len(batch.labeled.image), batch.labeled.label
        first, second = self.first(batch.image).logits, self.second(batch.image).logits
        terms = {"supervised/first": self.supervised(first[:n], label),
                 "supervised/second": self.supervised(second[:n], label)}
        if not len(batch.unlabeled.image):
            return Losses(terms)
        weight = self.consistency_weight(clock)
        terms["agreement"], watch = weight * jensen_shannon(first[n:], second[n:]), {"weight": weight}
        if hp.adversarial:
            watch["adversarial_weight"] = self.adversarial_weight(clock)
            diversity = 0.5 * (self.withstand(self.first, self.second, batch, first)
                               + self.withstand(self.second, self.first, batch, second))
            terms["diversity"] = watch["adversarial_weight"] * diversity
        return Losses(terms, watch)

    def rotations(self, batch, clock):
        """The losses of one network, whose views of straight and of turned images learn from each other."""
        n, turns = len(batch.labeled.image), self.turns(batch.image.shape[2:])
        logits = self.first(batch.image).logits
        supervised = self.supervised(logits[:n], batch.labeled.label)
        if not len(batch.unlabeled.image):
            return Losses({"supervised": supervised})
        turned = self.first(torch.rot90(batch.unlabeled.image, turns, (2, 3))).logits.softmax(1)
        straight = torch.rot90(logits[n:].softmax(1), turns, (2, 3))
        squared = (turned.detach() - straight).square().mean() + (turned - straight.detach()).square().mean()
        weight = self.consistency_weight(clock)
        return Losses({"supervised": supervised, "agreement": weight * 0.5 * squared}, watch={"weight": weight})

    def turns(self, space):
        """How many right angles this step turns by: a function of the step's seed, since shapes depend on it."""
        seed = torch.initial_seed()
        return seed % 4 if space[0] == space[1] else 2 * (seed % 2)

    def supervised(self, logits, label):
        return segmentation(logits, label) if self.hp.dice else cross_entropy(logits, label)

    def adversarial_weight(self, clock):
        """The weight of the diversity: 0, then from its start to the end of the ramp up to `hp.adversarial`."""
        start, length = self.hp.adversarial_start, max(self.hp.ramp - self.hp.adversarial_start, 0)
        ramp = sigmoid_ramp(clock.step - start * clock.total, length * clock.total)
        return self.hp.adversarial * (clock.step >= start * clock.total) * ramp

    def withstand(self, attacked, other, batch, logits):
        """Divergence from what a network says of the images to what the other says of its adversarial examples."""
        n, attack, examples, said = len(batch.labeled.image), self.hp.attack, [], []
        if attack != "vat":
            examples.append(fgsm(attacked, batch.labeled.image, batch.labeled.label, self.hp.epsilon))
            said.append(logits[:n])
        if attack != "fgsm":
            examples.append(vat(attacked, batch.unlabeled.image, self.hp.epsilon))
            said.append(logits[n:])
        return divergence(torch.cat(said).detach(), other(torch.cat(examples)).logits)


def jensen_shannon(first, second):
    """Mean Jensen-Shannon divergence of two maps of logits (B, K, *space), in nats: from 0 to ln 2."""
    logs = torch.stack([first, second]).log_softmax(2)
    mean = logs.logsumexp(0) - math.log(2)
    return (logs.exp() * (logs - mean)).sum(2).mean()


def divergence(target, logits):
    """Mean Kullback-Leibler divergence from a target to logits, both logits (B, K, *space), in nats."""
    return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="none", log_target=True).sum(1).mean()
