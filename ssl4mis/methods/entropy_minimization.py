"""EM: entropy minimization (Vu et al., CVPR 2019, as MinEnt), as SSL4MIS uses it.

The network must be sure of what it predicts on unlabeled images: the mean entropy of its predictions joins the loss, so
that boundaries between classes move to where the data are sparse.

Family: pseudo-label.
Paper: ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic Segmentation, arXiv 1811.12833.
Code: HiLab-git/SSL4MIS, train_entropy_minimization_3D.py.
Differs from the code:
- the entropy is that of unlabeled images, as in the paper; the script takes that of labeled ones, too (`images` all);
- the entropy is a share of the largest one there is, by the number of classes; the scripts have two classes in 3D and
  four in 2D built in (`compat` legacy);
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- the paper's own weight is a hundred times smaller and constant: `weight` 0.001 and `ramp` 0.
"""
import math
from dataclasses import dataclass
from typing import Literal

from ssl4mis.batch import Losses
from ssl4mis.losses import entropy, segmentation
from ssl4mis.method import Method, at_least_one, within

RELEASED_CLASSES = {2: 4, 3: 2}  # by dimensions


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the entropy, which is 1 where all classes are equally probable (0.001 in the paper). A
            large one may drive small structures into the background: watch `foreground`, their predicted share.
        ramp: share of the run over which the weight ramps up; 0 for a constant weight (the paper).
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        images: whose entropy: that of unlabeled images (the paper) or of all (SSL4MIS).
        compat: legacy keeps the number of classes of the released scripts for any number of classes.
    """

    weight: float = 0.1
    ramp: float = 1.0
    ramp_every: int = 1
    images: Literal["unlabeled", "all"] = "unlabeled"
    compat: Literal["right", "legacy"] = "right"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, float("inf"), "weight", "ramp")


class EntropyMinimization(Method):
    Config = Config

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build()

    def forward(self, batch, clock):
        hp, n = self.hp, len(batch.labeled.image)
        logits = self.net(batch.image).logits
        supervised = segmentation(logits[:n], batch.labeled.label)
        if not len(batch.unlabeled.image):
            return Losses({"supervised": supervised})
        probability = (logits[n:] if hp.images == "unlabeled" else logits).softmax(1)
        classes = RELEASED_CLASSES[self.task.spatial_dims] if hp.compat == "legacy" else self.task.classes
        weight = self.consistency_weight(clock)
        return Losses({"supervised": supervised, "entropy": weight * entropy(probability).mean() / math.log(classes)},
                      watch={"weight": weight, "foreground": 1 - probability[:, 0].detach().mean()})
