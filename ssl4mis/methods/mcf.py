"""MCF: mutual correction framework (Wang et al., CVPR 2023).

Two different networks review the labeled voxels on which they differ. On unlabeled images the one that is better on the
labeled half of the batch teaches the other with sharpened probabilities.

Family: co-training.
Paper: Mutual Correction Framework for Semi-Supervised Medical Image Segmentation, CVPR 2023.
Code: WYC-321/MCF, train_MCF.py.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- the learning rate drops one step earlier, as in UA-MT;
- the first network is the chosen backbone, by default the authors' V-Net, and `partner` the second;
- with more than two classes voxels differ where the classes do, and squares and Dice are means over classes.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

import networks
from networks.blocks import kaiming
from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, dice, softmax_mse
from ssl4mis.method import CoTraining, Preset, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        partner: backbone of the second network, another one than that of the run.
        rectification: weight of the squared error on labeled voxels where the networks differ.
        weight: final weight of the consistency term.
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        temperature: of the better network's softmax as a target; small is sharp.
        criterion: squared difference of probabilities, or of another softmax over them, as the code's name for it says.
        evaluate: the network that predicts, or the mean of both.
    """

    partner: str = "resvnet"
    rectification: float = 0.5
    weight: float = 0.1
    ramp: float = 1.0
    ramp_every: int = 1
    temperature: float = 0.1
    criterion: Literal["mse", "softmax_mse"] = "mse"
    evaluate: Literal["mean", "first", "second"] = "mean"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, float("inf"), "weight", "ramp")
        if self.partner not in networks.NAMES:
            raise UserError(f"hp.partner {self.partner!r}: expected one of {', '.join(networks.NAMES)}")
        if not self.temperature > 0:
            raise UserError(f"hp.temperature {self.temperature}: expected more than 0")


class MCF(CoTraining):
    Config = Config
    presets = {"LA": Preset(run={"augmentation": []})}

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        if getattr(build, "network", None) == hp.partner:
            other = "resvnet" if hp.partner == "vnet" else "vnet"
            raise UserError(f"hp.partner {hp.partner}: expected another network than that of the run, "
                            f"such as --hp.partner {other}")
        self.first, self.second = kaiming(build()), kaiming(build(network=hp.partner))

    def forward(self, batch, clock):
        hp, n, label = self.hp, len(batch.labeled.image), batch.labeled.label
        first, second = self.first(batch.image).logits, self.second(batch.image).logits
        differs = difference(first[:n], second[:n])
        loss_1, dice_1, rectification_1 = self.supervised(first[:n], label, differs)
        loss_2, dice_2, rectification_2 = self.supervised(second[:n], label, differs)
        terms = {"supervised/first": loss_1, "supervised/second": loss_2}
        watch = {"rectification/first": rectification_1.detach(), "rectification/second": rectification_2.detach(),
                 "differing": differs.mean()}
        if not len(batch.unlabeled.image):
            return Losses(terms, watch)
        first_wins = dice_1 < dice_2
        winner, loser = torch.where(first_wins, first[n:], second[n:]), torch.where(first_wins, second[n:], first[n:])
        target, learner = sharpened(winner.detach(), hp.temperature), loser.softmax(1)
        squared = softmax_mse(learner, target) if hp.criterion == "softmax_mse" else (learner - target).square()
        weight = self.consistency_weight(clock)
        return Losses(terms | {"consistency": weight * squared.mean()},
                      watch | {"weight": weight, "first_wins": first_wins.float()})

    def supervised(self, logits, label, differs):
        """The labeled loss of one network, the Dice loss in it, and the squared error where the networks differ."""
        probability = logits.softmax(1)
        overlap = dice(probability, label, "foreground")
        truth = F.one_hot(label.long(), probability.shape[1]).movedim(-1, 1)
        rectification = mean_square(probability - truth, differs)
        return cross_entropy(logits, label) + overlap + self.hp.rectification * rectification, overlap, rectification


def difference(first, second):
    """1.0 where the most probable classes of two maps of logits differ, else 0.0; (B, *space)."""
    return (first.argmax(1) != second.argmax(1)).to(first.dtype)


def mean_square(error, mask):
    """Mean square of an error (B, K, *space) over the voxels of a mask (B, *space); 0 where the mask is empty."""
    return (mask * error.square().mean(1)).sum() / (mask.sum() + 1e-16)


def sharpened(logits, temperature):
    """p^(1/temperature), normalized, of p = softmax(logits), without its underflow."""
    return (logits / temperature).softmax(1)
