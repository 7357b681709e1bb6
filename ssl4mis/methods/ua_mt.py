"""UA-MT: uncertainty-aware Mean Teacher (Yu et al., MICCAI 2019).

Mean Teacher where the teacher is certain: voxels count whose entropy over several noisy passes lies under a threshold.
The threshold loosens along the run.

Family: consistency.
Paper: Uncertainty-aware Self-ensembling Model for Semi-supervised 3D Left Atrium Segmentation, arXiv 1907.07034.
Code: yulequan/UA-MT, train_LA_meanteacher_certainty_unlabel.py.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- with more than two classes the threshold and the mean count the classes (`compat` legacy keeps ln 2 and 2).
"""
import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ssl4mis.batch import Losses
from ssl4mis.losses import entropy, segmentation, softmax_mse
from ssl4mis.method import Preset, StudentTeacher, at_least_one, within
from ssl4mis.schedules import sigmoid_ramp


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the consistency term.
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        decay: of the teacher's moving average.
        passes: stochastic teacher passes; two share a forward pass, as in the authors' code.
        threshold: first uncertainty threshold, a share of the largest entropy; it rises to 1 over the run.
        noise: standard deviation of the teacher's input noise, in image units.
        noise_limit: largest noise.
        dice: classes of the Dice loss: foreground (UA-MT) or all (SSL4MIS).
        evaluate: the network that predicts.
        compat: legacy keeps the released constants of two classes (ln 2, a factor of 2) for any number of classes.
    """

    weight: float = 0.1
    ramp: float = 1.0
    ramp_every: int = 1
    decay: float = 0.99
    passes: int = 8
    threshold: float = 0.75
    noise: float = 0.1
    noise_limit: float = 0.2
    dice: Literal["all", "foreground"] = "foreground"
    evaluate: Literal["student", "teacher"] = "student"
    compat: Literal["right", "legacy"] = "right"

    def __post_init__(self):
        at_least_one(self, "ramp_every", "passes")
        within(self, 0, 1, "decay")
        within(self, 0, float("inf"), "weight", "ramp", "noise", "noise_limit")


class UAMT(StudentTeacher):
    Config = Config
    presets = {name: Preset(hp={"dice": "all"}) for name in ("ACDC", "BraTS")}  # where SSL4MIS is the published code

    def remarks(self):
        if any(isinstance(m, nn.Dropout | nn.Dropout2d | nn.Dropout3d) and m.p for m in self.student.modules()):
            return ()
        return ("this network has no dropout: the uncertainty of ua_mt comes from noise on its input alone",)

    def forward(self, batch, clock):
        hp, n, unlabeled = self.hp, len(batch.labeled.image), batch.unlabeled.image
        logits = self.student(batch.image).logits
        supervised = segmentation(logits[:n], batch.labeled.label, hp.dice)
        if not len(unlabeled):
            return Losses({"supervised": supervised})
        target = self.teacher(self.noisy(unlabeled)).logits
        uncertainty = self.uncertainty(unlabeled)
        classes = 2 if hp.compat == "legacy" else self.task.classes
        threshold = (hp.threshold + (1 - hp.threshold) * sigmoid_ramp(clock.step, clock.total)) * math.log(classes)
        certain = (uncertainty < threshold).to(logits.dtype)
        distance = (certain * softmax_mse(logits[n:], target)).sum() / (classes * certain.sum() + 1e-16)
        weight = self.consistency_weight(clock)
        return Losses({"supervised": supervised, "consistency": weight * distance},
                      watch={"weight": weight, "threshold": threshold, "certain": certain.mean()})

    def uncertainty(self, image):
        """Entropy in nats of the mean of `passes` teacher predictions, (B, 1, *space)."""
        total = 0
        for first in range(0, self.hp.passes, 2):
            together = min(2, self.hp.passes - first)
            noisy = self.noisy(image.repeat(together, *[1] * (image.ndim - 1)))
            total = total + self.teacher(noisy).logits.softmax(1).unflatten(0, (together, -1)).sum(0)
        return entropy(total / self.hp.passes)
