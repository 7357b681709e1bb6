"""UPC: uncertainty-aware pseudo-label and consistency (Lu et al., BSPC 2023).

Mean Teacher turned around: the student sees noise and learns the hard labels of a teacher that sees the clean images.
The divergence between the two says how uncertain a voxel is: it lowers the weight of its label and is itself minimized.

Family: consistency.
Paper: Uncertainty-aware pseudo-label and consistency for semi-supervised medical image segmentation, BSPC 2023.
Code: AIforMS/UPC-Pytorch, train_LA_UPC.py.
Differs from the code:
- the paper's rectified loss is on; the released command leaves it off and masks instead (`loss` confident);
- a decay of 0.99, where 0.9999 makes the teacher of a run of 6,000 steps the plain mean of all students (`decay`);
- the network's own dropout, where the script zeroes nine channels of ten (`dropout` 0.9);
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- with more than two classes the Dice loss is the mean over the foreground classes.
"""
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn import functional as F

from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import StudentTeacher, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        loss: of the teacher's labels: rectified by the divergence (the paper), of confident voxels only (the released
            command), or the squared difference of logits in place of labels.
        threshold: smallest probability of a confident voxel.
        temperature: of the teacher's softmax that the threshold is compared with.
        weight: final weight of the consistency term.
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        decay: of the teacher's moving average (0.9999 in the authors' code).
        dropout: rate in place of that of all dropout which the network has (0.9 in the authors' code); None leaves it.
        noise: standard deviation of the student's input noise, in image units.
        noise_limit: largest noise.
        dice: classes of the Dice loss: foreground (the authors) or all (SSL4MIS).
        evaluate: the network that predicts.
    """

    loss: Literal["rectified", "confident", "logits"] = "rectified"
    threshold: float = 0.9
    temperature: float = 1.0
    weight: float = 1.0
    ramp: float = 1.0
    ramp_every: int = 1
    decay: float = 0.99
    dropout: float | None = None
    noise: float = 0.2
    noise_limit: float = 0.4
    dice: Literal["foreground", "all"] = "foreground"
    evaluate: Literal["student", "teacher"] = "student"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, 1, "decay", *() if self.dropout is None else ("dropout",))
        within(self, 0, float("inf"), "weight", "ramp", "noise", "noise_limit")
        if not self.temperature > 0:
            raise UserError(f"hp.temperature {self.temperature}: expected more than 0")


class UPC(StudentTeacher):
    Config = Config

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        layers = [m for m in self.modules() if isinstance(m, nn.Dropout | nn.Dropout2d | nn.Dropout3d) and m.p]
        for layer in layers if hp.dropout is not None else ():
            layer.p = hp.dropout

    def forward(self, batch, clock):
        n = len(batch.labeled.image)
        logits = self.student(self.noisy(batch.image)).logits
        supervised = segmentation(logits[:n], batch.labeled.label, self.hp.dice)
        if not len(batch.unlabeled.image):
            return Losses({"supervised": supervised})
        loss, certainty = self.consistency(logits, self.teacher(batch.image).logits)
        weight = self.consistency_weight(clock)
        return Losses({"supervised": supervised, "consistency": weight * loss},
                      watch={"weight": weight, "certainty": certainty.detach().mean()})

    def consistency(self, logits, target):
        """The unweighted loss of logits against the teacher's, and how much each voxel's label counts, from 0 to 1."""
        hp = self.hp
        entropy = F.cross_entropy(logits, target.argmax(1), reduction="none")
        if hp.loss == "confident":
            certainty = ((target / hp.temperature).softmax(1).amax(1) >= hp.threshold).to(logits.dtype)
            return (entropy * certainty).mean(), certainty
        divergence = F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="none", log_target=True).sum(1)
        certainty = (-divergence).exp()
        if hp.loss == "logits":
            return F.mse_loss(logits, target), certainty
        return (entropy * certainty).mean() + divergence.mean(), certainty
