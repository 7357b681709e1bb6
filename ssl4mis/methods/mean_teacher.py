"""Mean Teacher (Tarvainen & Valpola, NeurIPS 2017), as segmentation uses it (SSL4MIS).

The student must agree with a moving average of itself on unlabeled images under small noise. The average changes
slowly, so that its predictions are steadier targets than the student's own.

Family: consistency.
Paper: Mean teachers are better role models, arXiv 1703.01780.
Code: HiLab-git/SSL4MIS, train_mean_teacher_3D.py.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- no gate on the consistency term in the first 1,000 steps, which only the 2D script has.
"""
from dataclasses import dataclass
from typing import Literal

from ssl4mis.batch import Losses
from ssl4mis.losses import segmentation, softmax_mse
from ssl4mis.method import StudentTeacher, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the consistency term.
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        decay: of the teacher's moving average.
        noise: standard deviation of the teacher's input noise, in image units.
        noise_limit: largest noise.
        dice: classes of the Dice loss: all (SSL4MIS) or foreground (UA-MT).
        evaluate: the network that predicts.
    """

    weight: float = 0.1
    ramp: float = 1.0
    ramp_every: int = 1
    decay: float = 0.99
    noise: float = 0.1
    noise_limit: float = 0.2
    dice: Literal["all", "foreground"] = "all"
    evaluate: Literal["student", "teacher"] = "student"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, 1, "decay")
        within(self, 0, float("inf"), "weight", "ramp", "noise", "noise_limit")


class MeanTeacher(StudentTeacher):
    Config = Config

    def forward(self, batch, clock):
        n = len(batch.labeled.image)
        logits = self.student(batch.image).logits
        supervised = segmentation(logits[:n], batch.labeled.label, self.hp.dice)
        if not len(batch.unlabeled.image):
            return Losses({"supervised": supervised})
        target = self.teacher(self.noisy(batch.unlabeled.image)).logits
        weight = self.consistency_weight(clock)
        return Losses({"supervised": supervised, "consistency": weight * softmax_mse(logits[n:], target).mean()},
                      watch={"weight": weight})
