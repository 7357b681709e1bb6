"""AC-MT: ambiguity-consensus Mean Teacher (Xu et al., MedIA 2023).

Mean Teacher where the student is in doubt, the reverse of UA-MT: consistency counts on ambiguous voxels alone. They are
those of high entropy, those on which noisy passes of the student differ, or those that lie nearer to the prototype of
another class.

Family: consistency.
Paper: Ambiguity-selective consistency regularization for mean-teacher semi-supervised medical image segmentation,
Medical Image Analysis 2023.
Code: lemoshu/AC-MT, train_ACMT_Ent_3D.py, train_ACMT_MU_3D.py and train_ACMT_PErr_3D.py.
Differs from the code:
- the fourth way to choose voxels, by confident learning, is left out: it needs the package cleanlab, on the CPU;
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- thresholds rise, as in the code; the rule that stands there as a comment loosens them (`rise` -0.15);
- thresholds and means count the classes (`compat` legacy keeps ln 2, and twice the mean with model_uncertainty);
- the student's noisy passes leave its batch-norm statistics as they are (legacy: they enter the predictions), and each
  is a forward pass of its own;
- no teacher pass whose result nobody reads;
- for prototypes the softmax is sampled and uncertain voxels are left out (legacy: a sigmoid of each half logit, and
  uncertain voxels are background), classes without a certain voxel have none, samples with fewer than two are skipped,
  and voxels agree or not as a whole, not in each class;
- the entropy of a sample's voxels counts where that sample is clean (legacy: by a broadcast over the wrong axis, where
  the samples are on average).
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ssl4mis.batch import Losses
from ssl4mis.losses import entropy, segmentation
from ssl4mis.method import Preset, StudentTeacher, at_least_one, within
from ssl4mis.schedules import sigmoid_ramp

MODE = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        ambiguity: how ambiguous voxels are found: entropy of the student, model_uncertainty, its entropy over noisy
            passes, or prototype_error, where the nearest prototype is of another class than the student's.
        threshold: first smallest entropy of an ambiguous voxel, a share of the largest entropy.
        rise: of the threshold over the run (0.15 with model_uncertainty in the authors' code).
        passes: stochastic passes, of the student for model_uncertainty or (10 in the authors' code) of the teacher for
            prototype_error.
        spread: standard deviation over the teacher's passes below which a class is certain, for prototypes.
        weight: final weight of the consistency term.
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        decay: of the teacher's moving average.
        noise: standard deviation of the teacher's input noise, in image units.
        noise_limit: largest noise.
        dice: classes of the Dice loss.
        evaluate: the network that predicts.
        compat: legacy keeps what the released code has of two classes and of its mistakes.
    """

    ambiguity: Literal["entropy", "model_uncertainty", "prototype_error"] = "entropy"
    threshold: float = 0.75
    rise: float = 0.2
    passes: int = 8
    spread: float = 0.1
    weight: float = 0.1
    ramp: float = 0.75
    ramp_every: int = 1
    decay: float = 0.99
    noise: float = 0.1
    noise_limit: float = 0.2
    dice: Literal["all", "foreground"] = "all"
    evaluate: Literal["student", "teacher"] = "student"
    compat: Literal["right", "legacy"] = "right"

    def __post_init__(self):
        at_least_one(self, "ramp_every", "passes")
        within(self, 0, 1, "decay", "threshold")
        within(self, -self.threshold, 1 - self.threshold, "rise")
        within(self, 0, float("inf"), "weight", "ramp", "noise", "noise_limit", "spread")


class ACMT(StudentTeacher):
    Config = Config
    presets = {"LA": Preset(run={"schedule": "poly"}, iterations=8000)}

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.legacy = hp.compat == "legacy"
        self.largest = math.log(2 if self.legacy else task.classes)  # entropy

    def remarks(self):
        layers = nn.Dropout | nn.Dropout2d | nn.Dropout3d
        if self.hp.ambiguity == "entropy" or any(isinstance(m, layers) and m.p for m in self.student.modules()):
            return ()
        return (f"this network has no dropout: the passes of ac_mt's {self.hp.ambiguity} hardly differ",)

    def forward(self, batch, clock):
        hp, n, unlabeled = self.hp, len(batch.labeled.image), batch.unlabeled.image
        sample = hp.ambiguity == "model_uncertainty" and len(unlabeled)
        uncertainty = self.uncertainty(unlabeled) if sample else None
        logits = self.student(batch.image).logits
        supervised = segmentation(logits[:n], batch.labeled.label, hp.dice)
        if not len(unlabeled):
            return Losses({"supervised": supervised})
        target = self.teacher(self.noisy(unlabeled)).logits.softmax(1)
        probability, weight = logits[n:].softmax(1), self.consistency_weight(clock)
        terms, watch = {"supervised": supervised}, {"weight": weight}
        if hp.ambiguity == "prototype_error":
            ambiguous, clean = self.disputed(unlabeled, probability.detach().argmax(1, keepdim=True))
            terms["entropy"] = weight * self.clean_entropy(probability, clean)
        else:
            uncertainty = entropy(probability.detach()) / self.largest if uncertainty is None else uncertainty
            watch["threshold"] = hp.threshold + hp.rise * sigmoid_ramp(clock.step, clock.total)
            ambiguous = (uncertainty >= watch["threshold"]).to(logits.dtype)
        terms["consistency"] = weight * self.distance(probability, target, ambiguous)
        return Losses(terms, watch | {"ambiguous": ambiguous.mean()})

    def distance(self, probability, target, mask):
        """Mean squared difference over the voxels of a mask (B, 1, *space); 0 where it is empty."""
        classes = 1 if self.legacy and self.hp.ambiguity == "model_uncertainty" else self.task.classes
        return (mask * (probability - target).square()).sum() / (classes * mask.sum() + 1e-16)

    def clean_entropy(self, probability, clean):
        """Mean over all voxels of the entropy, a share of the largest, where a mask (B, 1, *space) is 1."""
        share = entropy(probability) / self.largest
        return (clean.mean(0) * share.mean(0)).mean() if self.legacy else (clean * share).mean()

    @torch.no_grad()
    def uncertainty(self, image):
        """Entropy of the mean of the student's noisy predictions, a share of the largest; (B, 1, *space)."""
        buffers = list(self.student.buffers())
        before = torch._foreach_clone(buffers) if buffers else []
        total = sum(self.student(self.noisy(image)).logits.softmax(1) for _ in range(self.hp.passes))
        if buffers and not self.legacy:
            torch._foreach_copy_(buffers, before)
        return entropy(total / self.hp.passes) / self.largest

    @torch.no_grad()
    def disputed(self, image, label):
        """Masks (B, 1, *space) of the voxels whose nearest prototype is of another class than a label, and of the rest.

        Both are 0 in samples with fewer than two prototypes.
        """
        probability = self.teacher(image).logits.softmax(1)
        spread, features = self.sampled(image)
        weight = self.certain(probability, spread)
        features = F.interpolate(features, image.shape[2:], mode=MODE[image.ndim - 2])
        there = weight.flatten(2).any(2)
        away = distances(features, prototypes(features, weight))
        away = torch.where(there.view(*there.shape, *[1] * (image.ndim - 2)), away, torch.inf)
        agree = away.argmin(1, keepdim=True) == label
        enough = (there.sum(1) > 1).view(-1, *[1] * (image.ndim - 1))
        return (~agree & enough).to(away.dtype), (agree & enough).to(away.dtype)

    def sampled(self, image):
        """Deviation of the teacher's prediction over its passes (B, K, *space), and the mean of its second finest
        decoder features."""
        predictions, total = [], 0
        for _ in range(self.hp.passes):
            out = self.teacher(image)
            predictions.append((out.logits / 2).sigmoid() if self.legacy else out.logits.softmax(1))
            total = total + out.features.decoder[min(1, len(out.features.decoder) - 1)].float()
        return torch.stack(predictions).std(0, correction=min(1, self.hp.passes - 1)), total / self.hp.passes

    def certain(self, probability, spread):
        """The teacher's probabilities where their class is certain and, of those that are, the likeliest; else 0."""
        certain = (spread < self.hp.spread).to(probability.dtype)
        chosen = (certain * probability).argmax(1, keepdim=True)
        weight = torch.zeros_like(probability).scatter(1, chosen, probability.gather(1, chosen))
        return weight if self.legacy else weight * certain


def prototypes(features, weight):
    """Features (B, F, *space), weights (B, K, *space) -> weighted mean features of each sample's classes, (B, K, F)."""
    sums = [(features * each.unsqueeze(1)).flatten(2).sum(2) for each in weight.unbind(1)]
    return torch.stack(sums, 1) / (weight.flatten(2).sum(2, keepdim=True) + 1e-5)


def distances(features, centers):
    """Squared distances from features (B, F, *space) to centers (B, K, F): (B, K, *space)."""
    space = features.shape[2:]
    centers = centers.view(*centers.shape, *[1] * len(space))
    return torch.stack([(features - center).square().sum(1) for center in centers.unbind(1)], 1)
