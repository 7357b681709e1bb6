"""Dual Teacher: two temporary teachers that work in shifts (Na et al., NeurIPS 2023), for volumes.

A single moving average comes ever closer to its student and then repeats it. Here two averages take turns: the one on
duty labels unlabeled images and follows the student, the other rests. In the first one's turns images are mixed by
boxes, in the second one's by classes, so that the student meets targets of two kinds.

Family: consistency.
Paper: Switching Temporary Teachers for Semi-Supervised Semantic Segmentation, arXiv 2310.18640.
Code: naver-ai/dual-teacher, tools/train.py and seg_core/augmentations.py (2D; nothing here is taken from it).
Differs from the code:
- a turn is a share of the run, since an epoch of few labeled volumes is a few steps (`turns`);
- Dice joins cross-entropy in the supervised term (`dice` False);
- classes are mixed by copying all foreground, which with two classes is what is left of the authors' rule (`classmix`
  half);
- boxes have a uniform share of the voxels, where the authors' sides are clipped at the border;
- both kinds of mixtures are made of strong views, with the partner next in the batch; none is flipped;
- strong views change contrast and brightness and are blurred: gray images have no hue;
- a mixture weighs its own share of confident voxels, not that of the image below it or of the whole batch;
- one pass of the teacher labels the images for both unsupervised terms, where the code asks twice;
- the consistency term counts the unlabeled images' own valid voxels; the code takes those of the labeled ones;
- sub-networks come from the backbone's dropout, not from stochastic depth, and the optimizer is that of the run.
"""
import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from ssl4mis import augment
from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Method, Needs, Teacher, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        turns: how many turns the teachers take in a run, one after the other.
        memory: a teacher starts each of its turns as the student (turn, authors' code), or from where it was (run).
        decay: of the teachers' moving averages; smaller in the first steps, those of a turn or of all turns.
        threshold: smallest probability of a confident voxel.
        mix: weight of the term on mixed images.
        consistency: weight of the term on strong views.
        box_min: smallest share of voxels in a box.
        box_max: largest share.
        classmix: what is copied in the second teacher's turns: all foreground, or a random half of the classes that the
            teacher sees, background among them (authors).
        dice: whether Dice joins cross-entropy in the supervised term.
    """

    turns: int = 60
    memory: Literal["turn", "run"] = "turn"
    decay: float = 0.99
    threshold: float = 0.95
    mix: float = 1.0
    consistency: float = 0.2
    box_min: float = 0.1
    box_max: float = 0.5
    classmix: Literal["foreground", "half"] = "foreground"
    dice: bool = True

    def __post_init__(self):
        at_least_one(self, "turns")
        within(self, 0, 1, "decay", "threshold", "box_min", "box_max")
        within(self, 0, float("inf"), "mix", "consistency")
        if self.box_min > self.box_max:
            raise UserError(f"hp.box_min {self.box_min}: expected at most hp.box_max {self.box_max}")


class DualTeacher(Method):
    Config = Config
    needs = Needs(strong=1)

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.student = build()
        self.on_duty = Teacher(self.student, hp.decay)
        self.resting = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, batch, clock):
        hp, n, unlabeled = self.hp, len(batch.labeled.image), batch.unlabeled
        loss = segmentation if hp.dice else cross_entropy
        if not len(unlabeled.image):
            return Losses({"supervised": loss(self.student(batch.image).logits, batch.labeled.label)})
        confidence, label = self.on_duty(unlabeled.image).logits.softmax(1).max(1)
        copied, strong = self.copied(label, clock), unlabeled.strong[0]
        mixed = torch.where(copied[:, None], strong, partner(strong))
        target, sure = (torch.where(copied, mine, partner(mine)) for mine in (label, confidence >= hp.threshold))

        logits = self.student(torch.cat([batch.labeled.image, mixed])).logits
        weight = sure.flatten(1).float().mean(1)
        mix = (weight * F.cross_entropy(logits[n:], target, reduction="none").flatten(1).mean(1)).mean()
        each = F.cross_entropy(self.student(strong).logits, label, reduction="none")
        confident = (confidence >= hp.threshold) & unlabeled.valid
        consistency = (each * confident).sum() / unlabeled.valid.sum().clamp(min=1)
        return Losses({"supervised": loss(logits[:n], batch.labeled.label), "mix": hp.mix * mix,
                       "consistency": hp.consistency * consistency},
                      watch={"second": self.turn(clock.step, clock.total) % 2, "confident": weight.mean(),
                             "copied": copied.float().mean()})

    def turn(self, step, total):
        """Number of the turn that a step is in, from 0; every turn has a step."""
        return step * min(self.hp.turns, total) // total

    def copied(self, label, clock):
        """Voxels that each image gives to its mixture, (B, *space) bool; its partner gives the rest."""
        hp = self.hp
        box = augment.boxes(len(label), label.shape[1:], 1.0, (hp.box_min, hp.box_max), label.device)
        objects = label > 0 if hp.classmix == "foreground" else half_of_classes(label, self.task.classes)
        return torch.where(self.turn(clock.step, clock.total) % 2 == 1, objects, ~box)

    def after_step(self, clock):
        step, total = clock.step, clock.total
        turns, turn, later = min(self.hp.turns, total), self.turn(step, total), self.turn(step + 1, total)
        done = step - (turn * total + turns - 1) // turns  # steps of this turn before this one
        if self.hp.memory == "run":
            done = done + turn // 2 * (total // turns)
        self.on_duty.follow(self.student, done)
        self.relieve(later != turn)

    @torch.no_grad()
    def relieve(self, over):
        """The teachers' weights change places where the 0-d tensor `over` is true. Nothing waits for it: weights are
        mixed by a share of 0 or 1, which is exact."""
        mine, theirs = list(self.on_duty.net.parameters()), list(self.resting.parameters())
        share = [over.to(mine[0].device, mine[0].dtype)] * len(mine)
        rested = torch._foreach_lerp(theirs, mine, share)
        torch._foreach_lerp_(mine, theirs, share)
        torch._foreach_copy_(theirs, rested)

    def predict(self, image):
        return self.student(image).logits.softmax(1)


def partner(values):
    """What the sample that comes before in the batch has, (B, ...)."""
    return values.roll(1, 0)


def half_of_classes(label, classes):
    """The voxels of a random half, rounded down, of the classes in each label map, (B, *space) bool."""
    present = torch.stack([(label == index).flatten(1).any(1) for index in range(classes)], 1)
    priority = torch.rand(present.shape, device=label.device).masked_fill(~present, 2.0)
    chosen = priority.argsort(1).argsort(1) < present.sum(1, keepdim=True) // 2
    return chosen.gather(1, label.flatten(1)).view_as(label)
