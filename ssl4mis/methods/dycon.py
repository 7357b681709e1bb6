"""DyCON: dynamic uncertainty-aware consistency and contrastive learning (Assefa et al., CVPR 2025).

Mean Teacher with two terms more. Consistency is divided by exponentials of both entropies, whose sum is minimized, too;
how much entropy counts decays along the run. Embeddings of coarse positions attract those of the same class, the more
the further they are apart, and repel the others, also the teacher's.

Family: contrastive.
Paper: DyCON, arXiv 2504.04566.
Code: KU-CVML/DyCON, train_DyCON_BraTS19.py.
Differs from the code:
- classes of positions in unlabeled images are the teacher's (of those that it is sure of with `certain` 0.75), and
  positions of labeled images are compared, too (`contrasted`); the released code takes the labels of the unlabeled
  images, so its published results are not semi-supervised;
- squared differences of probabilities, where the code takes another softmax over them, and the loss of each position
  normalized by its own largest similarity, which changes nothing, not by others' (`compat` legacy);
- similarities to the teacher count up to 1 - 1e-4, since the logarithm of zero or less is not finite;
- the weight ramps up smoothly, and over the run; the released run of 20,000 steps ends at two thirds of its ramp, at
  0.057 (`ramp` 1.5, `ramp_every` 150 for blocks of 150 steps);
- beta and the teacher's threshold change with every step, not every epoch; the threshold's ramp is as long as with 25
  labeled scans of BraTS (0.15 of the run with the script's 8);
- by default on a V-Net, and any backbone: the deepest features are embedded at the resolution of the level above, as in
  the authors' U-Net; its second output, which nothing reads, is left out;
- with more than two classes Dice is a mean over the foreground's, and positions have the class that is likeliest there;
- predictions are not reduced to their largest component: that is post-processing, which every method could have.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from networks.blocks import BATCH_NORM, CONV
from ssl4mis.batch import Losses
from ssl4mis.correlation import enlarge
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, dice, entropy, softmax_mse
from ssl4mis.method import Preset, StudentTeacher, Teacher, at_least_one, within
from ssl4mis.schedules import sigmoid_ramp

MODE = {2: "bilinear", 3: "trilinear"}
ROWS = 512  # positions whose similarities to all others are in memory at once
NEAR = 1e-4  # smallest 1 - similarity of which the logarithm is taken


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the plain consistency term.
        ramp: length of the weight's ramp, a share of the run; above 1 the run ends before the weight is full.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        uncertainty: weight of the consistency with entropies.
        beta_first: by which entropies are multiplied in the first step.
        beta_last: in the last step; in between the logarithm is linear.
        contrast: weight of the contrastive term.
        contrasted: images whose positions are compared: all, or the unlabeled ones (the authors).
        certain: smallest probability with which the teacher tells the class of a position that counts; 0 for all.
        temperature: of similarities; small is sharp.
        gamma: exponent of the focal weight, which favors positions that are far from their class; 0 for none.
        cross: weight of the similarities to the teacher's positions of other classes, in the contrastive term.
        cross_first: threshold of those similarities in the first step; smaller ones do not count.
        cross_last: threshold at the end of its ramp.
        cross_ramp: length of its ramp, a share of the run.
        hidden: channels between the two layers of the projection.
        channels: of an embedding.
        decay: of the teacher's moving average.
        noise: standard deviation of the teacher's input noise, in image units.
        noise_limit: largest noise.
        evaluate: the network that predicts.
        compat: legacy keeps the released code's second softmax and its normalization, but not its use of labels.
    """

    weight: float = 0.1
    ramp: float = 1.0
    ramp_every: int = 1
    uncertainty: float = 0.5
    beta_first: float = 5.0
    beta_last: float = 0.5
    contrast: float = 0.5
    contrasted: Literal["all", "unlabeled"] = "all"
    certain: float = 0.0
    temperature: float = 0.6
    gamma: float = 2.0
    cross: float = 1.0
    cross_first: float = 0.3
    cross_last: float = 0.5
    cross_ramp: float = 0.45
    hidden: int = 512
    channels: int = 256
    decay: float = 0.99
    noise: float = 0.1
    noise_limit: float = 0.2
    evaluate: Literal["student", "teacher"] = "student"
    compat: Literal["right", "legacy"] = "right"

    def __post_init__(self):
        at_least_one(self, "ramp_every", "hidden", "channels")
        within(self, 0, 1, "decay", "certain")
        within(self, 0, float("inf"), "weight", "ramp", "uncertainty", "contrast", "cross", "cross_ramp", "noise",
               "noise_limit")
        for name in ("beta_first", "beta_last", "temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"hp.{name} {getattr(self, name)}: expected more than 0")
        if self.gamma:
            within(self, 1, float("inf"), "gamma")


class Projection(nn.Module):
    """Encoder features -> (B, channels, *grid): the deepest ones at the level above, through two 1x1 convolutions.

    In float32 under any autocast, since similarities are compared with thresholds.
    """

    def __init__(self, backbone, hidden: int, channels: int):
        super().__init__()
        dims, (above, deepest) = backbone.spatial_dims, backbone.encoder_strides[-2:]
        self.factor = tuple(coarse // fine for fine, coarse in zip(above, deepest, strict=True))
        self.layers = nn.Sequential(
            CONV[dims](backbone.encoder_channels[-1], hidden, 1), BATCH_NORM[dims](hidden), nn.ReLU(inplace=True),
            CONV[dims](hidden, channels, 1), BATCH_NORM[dims](channels))

    def forward(self, encoder):
        deepest = encoder[-1]
        grid = [side * factor for side, factor in zip(deepest.shape[2:], self.factor, strict=True)]
        with torch.autocast(deepest.device.type, enabled=False):
            return self.layers(enlarge(deepest, grid).to(self.layers[0].weight.dtype)).float()


class DyCON(StudentTeacher):
    Config = Config
    presets = {"BraTS": Preset(run={"labeled_batch": 4, "unlabeled_batch": 4, "schedule": "constant",
                                    "learning_rate": 0.01, "clip": 1.0}, iterations=20000)}

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.projection = Projection(self.student.backbone, hp.hidden, hp.channels)
        self.teacher_projection = Teacher(self.projection, hp.decay)

    def forward(self, batch, clock):
        hp, n, label = self.hp, len(batch.labeled.image), batch.labeled.label
        own = self.student(batch.image)
        probability = own.logits.softmax(1)
        supervised = cross_entropy(own.logits[:n], label) + dice(probability[:n], label, "foreground")
        if not len(batch.unlabeled.image):
            return Losses({"supervised": supervised})
        other = self.teacher(self.noisy(batch.image))
        target = other.logits.softmax(1)
        features = self.projection(own.features.encoder)
        theirs = self.teacher_projection(other.features.encoder)
        first = n if hp.contrasted == "unlabeled" else 0
        classes, certain = self.positions(target, label, features.shape[2:])
        squared = softmax_mse if hp.compat == "legacy" else squared_difference
        weight, beta = self.consistency_weight(clock), self.beta(clock)
        near, apart = contrast(*(embedding(x)[first:] for x in (features, theirs)), classes[first:], certain[first:],
                               self.cross_threshold(clock), hp.temperature, hp.gamma, hp.compat == "legacy")
        return Losses({
            "supervised": supervised, "consistency": weight * squared(probability[n:], target[n:]).mean(),
            "uncertainty": hp.uncertainty * uncertain_consistency(probability, target, beta),
            "contrast": hp.contrast * (near + hp.cross * apart),
        }, watch={"weight": weight, "beta": beta, "certain": certain[n:].mean()})

    def beta(self, clock):
        """What entropies are multiplied by; it falls geometrically from the first to the last step."""
        first, last = self.hp.beta_first, self.hp.beta_last
        return first * (last / first) ** (clock.step.double() / clock.total)

    def cross_threshold(self, clock):
        """The smallest similarity to the teacher that counts, 0-d."""
        first, last = self.hp.cross_first, self.hp.cross_last
        return first + (last - first) * sigmoid_ramp(clock.step, self.hp.cross_ramp * clock.total)

    def positions(self, target, label, grid):
        """The classes of coarse positions (B, N), from the labels where there are any, and 1.0 where they are certain.

        `target` are the teacher's probabilities of all images (B, K, *space), labels those of the first ones.
        """
        truth = F.one_hot(label.long(), target.shape[1]).movedim(-1, 1).to(target.dtype)
        known = torch.cat([truth, target[len(label):]])
        confidence, classes = F.interpolate(known, grid, mode=MODE[len(grid)]).flatten(2).max(1)
        certain = torch.cat([torch.ones_like(confidence[:len(label)]),
                             (confidence[len(label):] >= self.hp.certain).to(target.dtype)])
        return classes, certain

    def after_step(self, clock):
        super().after_step(clock)
        self.teacher_projection.follow(self.projection, clock.step)


def squared_difference(first, second):
    """Of each element."""
    return (first - second).square()


def uncertain_consistency(probability, target, beta):
    """Mean over voxels of the squared difference, divided by exponentials of the entropies, plus `beta` times both."""
    mine, theirs = beta * entropy(probability), beta * entropy(target)
    difference = squared_difference(probability, target).sum(1, keepdim=True)
    return (difference / (mine.exp() + theirs.exp()) + mine + theirs).mean()


def embedding(features):
    """Features (B, C, *grid) -> a vector of length 1 for each position, (B, N, C)."""
    return F.normalize(features.flatten(2).transpose(1, 2), dim=-1)


def contrast(own, other, classes, certain, threshold, temperature, gamma, legacy=False):
    """How far positions are from those of their class, and how near to the teacher's of other classes; two 0-d losses.

    Similarities of some rows at a time are computed, and once more for the gradient, so that memory is linear in N.

    Args:
        own, other: embeddings of student and teacher, (B, N, C).
        classes, certain: (B, N); positions count where certain is 1.
        threshold: of similarities to the teacher, above which they count.
        temperature, gamma: as in `Config`.
        legacy: divide the exponential of each similarity by the largest one of the column instead of nothing.
    """
    with torch.autocast(own.device.type, enabled=False):  # checkpoints remember it
        off = 1 - torch.eye(own.shape[1], device=own.device) if legacy else None
        shift = (own @ own.transpose(1, 2) * off).detach().amax(1, keepdim=True) if legacy else 0
        sums = sum(checkpoint(_rows, first, own, other, classes, certain, shift, threshold, temperature, gamma,
                              use_reentrant=False, preserve_rng_state=False) for first in range(0, own.shape[1], ROWS))
    loss, apart, pairs = sums
    return loss / certain.sum().clamp(min=1), apart / pairs.clamp(min=1)


def _rows(first, own, other, classes, certain, shift, threshold, temperature, gamma):
    """Sums over the positions from `first` on: their losses, those to the teacher's, and of how many pairs; (3,)."""
    rows, index = slice(first, first + ROWS), torch.arange(own.shape[1], device=own.device)
    mine, here, there = own[:, rows], certain[:, rows, None], certain[:, None]
    same = (classes[:, rows, None] == classes[:, None]).to(own.dtype)
    off = (index[rows, None] != index).to(own.dtype)
    positive, negative = same * off * there, (1 - same) * there
    power = ((mine @ own.transpose(1, 2) * off - shift) / temperature).exp()
    share = power / (power + (power * negative).sum(2, keepdim=True) + 1e-18)
    losses = (positive * (1 - share) ** gamma * -(share + 1e-18).log()).sum(2, keepdim=True)
    loss = (here * losses / positive.sum(2, keepdim=True).clamp(min=1)).sum()
    cross = mine @ other.transpose(1, 2)
    counted = here * negative * (cross > threshold)
    return torch.stack([loss, (counted * -(1 - cross).clamp(min=NEAR).log()).sum(), counted.sum()])
