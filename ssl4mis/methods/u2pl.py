"""U2PL-med: unreliable pseudo-labels teach what a voxel is not (after Wang et al., CVPR 2022), for few classes.

A teacher's certain voxels are pseudo-labels. Its uncertain ones still tell which classes they hardly are: their
features are remembered as negatives of those classes, from which the features of certain voxels must keep a distance.

Family: contrastive.
Paper: Semi-Supervised Semantic Segmentation Using Unreliable Pseudo-Labels, arXiv 2203.03884.
Code: Haochen-Wang409/U2PL (2D).
Differs from the code:
- ranks 3 to 19 of 21 classes say nothing of 2 to 4: a voxel is a negative of all classes that are not its prediction
  (`low_rank` 3 for the authors' rule); with two classes a labeled voxel is one of the other class, whatever is
  predicted;
- time is a share of the run instead of epochs, and supervised training comes first for longer, since nothing is
  pretrained (`warm_up`);
- Dice joins cross-entropy in the supervised term (`dice` False);
- features are two 1x1 convolutions on a decoder level, the code's two 3x3 ones with batch norm and dropout and a 1x1;
- the memory is shorter and takes a random part of each step's negatives (`memory`, `remembered`), in place of 30,000
  vectors, 50,000 for the background, and all of them;
- each image has a box of its own and decides for itself whether it is mixed; its partner is the next in the batch;
- classes keep their numbers where one is absent from the batch, in which case the code mixes up their features;
- during the supervised steps the teacher copies the student and sees the images, but nothing is remembered.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from networks.base import without_learning
from networks.blocks import CONV
from ssl4mis import augment
from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Method, Teacher, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: of the term on pseudo-labels.
        contrast: weight of the contrastive term.
        warm_up: share of the run with the supervised term only.
        decay: of the teacher's moving average.
        dropped: share of voxels, those of the highest entropy, without a pseudo-label; it falls to 0 over the run.
        extreme: share of voxels of the lowest entropy that are anchors, and of the highest that are negatives; it falls
            to 0 over the run.
        confidence: smallest probability of its class in an anchor.
        low_rank: first rank of a class, counted from 0, at which an unlabeled voxel is its negative; at the ranks
            before it a labeled voxel of another class is one (3 in the paper, 1 for few classes).
        high_rank: the rank from which on it is not.
        anchors: drawn per class and step, with replacement.
        negatives: drawn per anchor.
        temperature: of the cosine similarities.
        channels: of the features that are compared.
        level: decoder level of the features, 2 for every fourth voxel; the coarsest where there are fewer.
        memory: negatives that are kept per class, first in, first out.
        remembered: largest number of negatives that a step adds per class.
        cutmix: probability that a box is cut out of another sample.
        dice: whether Dice joins cross-entropy in the supervised term.
        evaluate: the network that predicts.
    """

    weight: float = 1.0
    contrast: float = 1.0
    warm_up: float = 1 / 15
    decay: float = 0.99
    dropped: float = 0.2
    extreme: float = 0.2
    confidence: float = 0.3
    low_rank: int = 1
    high_rank: int = 20
    anchors: int = 256
    negatives: int = 50
    temperature: float = 0.5
    channels: int = 256
    level: int = 2
    memory: int = 5000
    remembered: int = 500
    cutmix: float = 0.5
    dice: bool = True
    evaluate: Literal["teacher", "student"] = "teacher"

    def __post_init__(self):
        at_least_one(self, "low_rank", "anchors", "negatives", "channels", "remembered")
        within(self, 0, 1, "warm_up", "decay", "dropped", "extreme", "confidence", "cutmix")
        within(self, 0, float("inf"), "weight", "contrast", "level")
        if not self.temperature > 0:
            raise UserError(f"hp.temperature {self.temperature}: expected more than 0")
        if self.low_rank >= self.high_rank:
            raise UserError(f"hp.low_rank {self.low_rank}: expected less than hp.high_rank {self.high_rank}")
        if self.remembered > self.memory:
            raise UserError(f"hp.remembered {self.remembered}: expected at most hp.memory {self.memory}")


class U2PL(Method):
    Config = Config

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.student = Represented(build(), hp.level, hp.channels)
        self.teacher = Teacher(self.student, hp.decay)
        self.memory = Memory(task.classes, hp.memory, hp.channels)

    def remarks(self):
        if self.hp.low_rank >= 3:
            return ()
        return ("negatives by a rule for few classes: report results as U2PL-med, not as U2PL",)

    def forward(self, batch, clock):
        hp, n, unlabeled, label = self.hp, len(batch.labeled.image), batch.unlabeled.image, batch.labeled.label
        loss = segmentation if hp.dice else cross_entropy
        if not len(unlabeled):
            self.teacher(batch.image)  # for its batch-norm statistics, since it predicts
            return Losses({"supervised": loss(self.student.net(batch.image).logits, label)})
        pseudo = without_learning(self.teacher, unlabeled)[0].argmax(1)
        box = augment.boxes(len(unlabeled), unlabeled.shape[2:], hp.cutmix, (0.5, 0.5), unlabeled.device)
        pseudo = torch.where(box, pseudo.roll(1, 0), pseudo)
        image = torch.cat([batch.labeled.image, torch.where(box[:, None], unlabeled.roll(1, 0), unlabeled)])
        logits, features = self.student(image)
        seen, targets = self.teacher(image)

        active, left = clock.step >= round(hp.warm_up * clock.total), 1 - clock.step.double() / clock.total
        entropy = -(seen[n:].softmax(1) * seen[n:].log_softmax(1)).sum(1)
        order, extreme = entropy.flatten().sort().values, hp.extreme * left
        kept = entropy < percentile(order, 1 - hp.dropped * left)
        share = kept.numel() / kept.sum().clamp(min=1)
        true = torch.ones_like(label, dtype=torch.bool)  # any labeled voxel may be anchor and negative
        low = torch.cat([true, entropy <= percentile(order, extreme)])
        high = torch.cat([true, entropy >= percentile(order, 1 - extreme)])
        maps = seen.softmax(1), torch.cat([label.long(), pseudo])[:, None], low[:, None], high[:, None]
        cells = [in_cells(values, features.shape[2:]) for values in maps]
        contrast = self.contrast(features, targets, cells, n, active)
        return Losses({"supervised": loss(logits[:n], label),
                       "pseudo": hp.weight * active.double() * share * cross_entropy(logits[n:], pseudo, kept),
                       "contrast": hp.contrast * active.double() * contrast},
                      watch={"kept": kept.float().mean(), "remembered": self.memory.count.float().mean()})

    def contrast(self, features, targets, cells, labeled, active):
        """The contrastive loss, a mean over the classes in the batch; while `active`, negatives are remembered first.

        Args:
            features, targets: of student and teacher, (B, D, *grid).
            cells: probability, label, low and high of `roles`.
            labeled: how many of the samples are.
        """
        hp, losses, place = self.hp, [], features.shape[2:]
        features, targets = in_cells(features, place), in_cells(targets, place)
        with torch.autocast(features.device.type, enabled=False):
            anchor, negative, member = roles(*cells, labeled * place.numel(), hp)
            self.memory.add(F.normalize(targets, dim=1), negative & active, hp.remembered)
            present = member.any(1)
            means = F.normalize(member.to(targets.dtype) @ targets, dim=1)  # only their directions count
            for index, positive in enumerate(means):
                mine = F.normalize(features[drawn(anchor[index], hp.anchors)], dim=1)
                others = self.memory.draw(index, hp.anchors * hp.negatives)
                apart = (others.unflatten(0, (hp.anchors, -1)) @ mine[:, :, None])[..., 0]
                similar = torch.cat([(mine @ positive)[:, None], apart], 1) / hp.temperature
                usable = anchor[index].any() & (self.memory.count[index] > 0)
                losses.append(torch.where(usable, -similar.log_softmax(1)[:, 0].mean(), 0.0))
            several = present.sum() > 1  # one class alone has nothing to differ from
            return torch.stack(losses).sum() * several / present.sum().clamp(min=1)

    def after_step(self, clock):
        begun = clock.step - round(self.hp.warm_up * clock.total)
        self.teacher.follow(self.student, begun.clamp(min=0))

    def predict(self, image):
        chosen = self.student if self.hp.evaluate == "student" else self.teacher.net
        return chosen.net(image).logits.softmax(1)


class Represented(nn.Module):
    """A network with features to compare: image -> logits (B, K, *space), features (B, D, *grid), both float32."""

    def __init__(self, net, level, channels):
        super().__init__()
        self.net, self.level = net, min(level, len(net.backbone.decoder_channels) - 1)
        width, conv = net.backbone.decoder_channels[self.level], CONV[net.backbone.spatial_dims]
        self.project = nn.Sequential(conv(width, channels, 1), nn.ReLU(inplace=True), conv(channels, channels, 1))

    def forward(self, image):
        out = self.net(image)
        return out.logits, self.project(out.features.decoder[self.level]).float()


class Memory(nn.Module):
    """The last `size` feature vectors of each class, first in, first out, in buffers."""

    def __init__(self, classes, size, channels):
        super().__init__()
        self.register_buffer("bank", torch.zeros(classes, size, channels))
        self.register_buffer("place", torch.zeros(classes, dtype=torch.long))  # where the next one goes
        self.register_buffer("count", torch.zeros(classes, dtype=torch.long))

    @torch.no_grad()
    def add(self, vectors, mask, most):
        """Take in vectors (N, D) of a mask (K, N) bool; of more than `most` of a class so many, drawn at random."""
        size, most = self.bank.shape[1], min(most, len(vectors))
        priority = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
        chosen, added = priority.topk(most, 1).indices, mask.sum(1).clamp(max=most)
        slots = torch.arange(most, device=mask.device)
        places = ((self.place[:, None] + slots) % size)[..., None].expand(-1, -1, self.bank.shape[2])
        new = torch.where((slots < added[:, None])[..., None], vectors[chosen].to(self.bank.dtype),
                          self.bank.gather(1, places))
        self.bank.scatter_(1, places, new)
        self.place.copy_((self.place + added) % size)
        self.count.copy_((self.count + added).clamp(max=size))

    def draw(self, index, number):
        """Random vectors of a class (number, D), with replacement; zeros where nothing is remembered."""
        chance = torch.rand(number, device=self.bank.device, dtype=torch.float64)
        return self.bank[index, (chance * self.count[index]).long()].float()


def roles(probability, label, low, high, labeled, hp):
    """Which cells are anchors, which are negatives of each class, and which make up its mean feature, (K, N) bool each.

    Args:
        probability: of the teacher, (N, K).
        label, low, high: (N, 1), the class, and whether a cell may be an anchor or a negative.
        labeled: the first so many cells have true labels.
    """
    classes, true = probability.shape[1], torch.arange(len(label), device=label.device) < labeled
    label = label == torch.arange(classes, device=label.device)
    rank = (probability[:, None] > probability[:, :, None]).sum(2)  # of each class in each cell, from 0
    confusing = (rank < hp.low_rank) | (classes == 2)
    unlikely = (rank >= hp.low_rank) & (rank < hp.high_rank)
    member, negative = label & (low > 0), torch.where(true[:, None], ~label & confusing, unlikely) & (high > 0)
    return (member & (probability > hp.confidence)).T, negative.T, member.T


def in_cells(maps, grid):
    """Maps (B, C, *space) at the cells of a grid, to the nearest voxel: (cells of all samples, C)."""
    if maps.shape[2:] != grid:
        maps = F.interpolate(maps.float(), grid, mode="nearest")
    return maps.movedim(1, -1).flatten(0, -2)


def percentile(order, share):
    """The value below which a share of sorted values (N,) lies, as numpy has it; the share is a 0-d tensor."""
    place = share * (len(order) - 1)
    low, high = order.take(place.floor().long()), order.take(place.ceil().long())
    return low.lerp(high, place.frac().to(order.dtype))


def drawn(mask, number):
    """Places of random members of a mask (N,) bool, with replacement; any places where it is empty."""
    rank = mask.cumsum(0)
    chance = torch.rand(number, device=mask.device, dtype=torch.float64)
    return torch.searchsorted(rank, (chance * rank[-1]).long(), right=True).clamp(max=len(mask) - 1)
