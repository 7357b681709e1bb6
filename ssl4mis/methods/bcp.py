"""BCP: bidirectional copy-paste (Bai et al., CVPR 2023).

A box of an unlabeled image is pasted into a labeled one and the reverse, so that both kinds of images share contexts.
The student learns the mixed images, from labels and from the largest components of what a teacher predicts.

Family: mixing.
Paper: Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation, arXiv 2305.00673.
Code: DeepMed-Lab-ECNU/BCP, LA_BCP_train.py, ACDC_BCP_train.py and pancreas/train_pancreas.py.
Differs from the code:
- self-training starts from the last weights of pre-training, since the best ones on the test list leak the test;
- predictions are not reduced to their largest component: that is post-processing, which every method could have;
- which half of a batch is pasted into which is one rule; the authors' rules per data set only rename random halves;
- the box moves over the actual patch, in the LA code's range at 112 x 112 x 80, which that code has built in;
- the Dice of the background counts its region as in the repaired ACDC code; the paper's runs counted the whole image;
- every stage starts with a new SGD optimizer, as on LA; on ACDC the authors keep the first one, on Pancreas their Adam,
  whose rate is 0.001 throughout;
- all data sets have one loader and one backbone; on Pancreas the authors neither shuffle nor have dropout;
- `average` state leaves the step counters of batch norm alone, which nothing reads.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ssl4mis import copy_paste
from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import Method, Needs, Preset, Stage, Teacher, within

DICE = {"linear": {"squared": False, "per_sample": True}, "squared": {"smooth": 1e-10}}


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        pretrain: share of the run that learns from mixed labeled images only.
        pretrain_loss: of a mixed labeled image at once, whole, or of the box and its outside apart, regions (ACDC).
        box: side of the pasted box, a share of the patch's side.
        weight: of voxels with pseudo labels, where voxels with labels weigh 1.
        decay: of the teacher's moving average.
        average: what the teacher averages: parameters, or state, batch-norm statistics too (ACDC).
        component: voxels of a pseudo label's largest component share corners, edges (Pancreas) or faces: 26, 18 or 6
            neighbors in 3D and 8, 8 or 4 in 2D; none keeps all components.
        dice: linear, of each sample (LA, Pancreas), or squared, of the batch (ACDC).
    """

    pretrain: float = 2 / 17
    pretrain_loss: Literal["whole", "regions"] = "whole"
    box: float = 2 / 3
    weight: float = 0.5
    decay: float = 0.99
    average: Literal["parameters", "state"] = "parameters"
    component: Literal["corners", "edges", "faces", "none"] = "corners"
    dice: Literal["linear", "squared"] = "linear"

    def __post_init__(self):
        within(self, 0, 1, "pretrain", "decay")
        within(self, 0, float("inf"), "weight")
        if not 0 < self.box < 1:
            raise UserError(f"hp.box {self.box}: expected a share between 0 and 1")


class BCP(Method):
    Config = Config
    needs = Needs(multiple=2, equal=True)
    presets = {
        "LA": Preset(run={"labeled_batch": 4, "unlabeled_batch": 4}, iterations=17000),
        "ACDC": Preset({"pretrain": 1 / 4, "pretrain_loss": "regions", "average": "state", "dice": "squared"},
                       {"schedule": "constant"}, 40000, dims=2),
        "Pancreas": Preset({"pretrain": 18 / 68, "component": "edges"},
                           {"labeled_batch": 4, "unlabeled_batch": 4, "schedule": "constant"}, 6800),
        "BraTS": Preset({"component": "none"}),  # a tumor may have several foci
    }

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.student = build()
        self.teacher = Teacher(self.student, hp.decay, warm_up=False, average=hp.average)

    def stages(self):
        share = self.hp.pretrain
        return Stage("pretrain", share, schedule="constant"), Stage("self_train", 1 - share, drop=1 / 6)

    def enter(self, stage):
        if stage == "self_train":
            self.teacher.copy(self.student)

    def forward(self, batch, clock):
        labeled, unlabeled = batch.labeled, batch.unlabeled.image
        inside = copy_paste.box(batch.image, self.hp.box)
        outside = ~inside
        (image_a, image_b), (label_a, label_b) = labeled.image.chunk(2), labeled.label.chunk(2)
        if clock.stage == "pretrain" or not len(unlabeled):
            logits = self.student(torch.where(inside, image_b, image_a)).logits
            if self.hp.pretrain_loss == "whole":
                return Losses({"supervised": self.loss(logits, torch.where(inside, label_b, label_a))})
            return Losses({"supervised": self.loss(logits, label_a, outside) + self.loss(logits, label_b, inside)})
        free_a, free_b = unlabeled.chunk(2)
        # The student's passes are queued before the pseudo labels are asked for: where the CPU finds components, they
        # run while it does.
        pseudo = self.pseudo_labels(unlabeled)
        inward = self.student(torch.where(inside, free_a, image_a)).logits
        outward = self.student(torch.where(inside, image_b, free_b)).logits
        pseudo_a, pseudo_b = pseudo().chunk(2)
        supervised = self.loss(inward, label_a, outside) + self.loss(outward, label_b, inside)
        guessed = self.loss(inward, pseudo_a, inside) + self.loss(outward, pseudo_b, outside)
        return Losses({"supervised": supervised, "pseudo": self.hp.weight * guessed})

    def pseudo_labels(self, image) -> Callable:
        """A function that gives the teacher's labels, (B, *space) uint8; the teacher's passes are queued at once."""
        probability = torch.cat([self.teacher(half).logits.softmax(1) for half in image.chunk(2)])
        return copy_paste.pseudo_labels(probability, self.hp.component)

    def loss(self, logits, label, mask=None):
        """Half of cross-entropy and Dice over the voxels of a mask (*space)."""
        mask = None if mask is None else mask.expand_as(label)
        return segmentation(logits, label, mask=mask, **DICE[self.hp.dice])

    def after_step(self, clock):
        if clock.stage == "self_train":
            self.teacher.follow(self.student, clock.step)

    def predict(self, image):
        return self.student(image).logits.softmax(1)
