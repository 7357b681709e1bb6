"""Supervised: the same network, augmentation and steps, labeled data only.

It is the bound that every method must beat. Its batches are the labeled half of the semi-supervised runs';
`--labeled_batch 4` matches their whole batch instead.

Family: supervised.
Code: yulequan/UA-MT and HiLab-git/SSL4MIS, which differ in the batch.
Differs from the code:
- as many labeled samples a step as the semi-supervised runs have, where UA-MT's script takes four.
"""
from dataclasses import dataclass
from typing import Literal

from ssl4mis.batch import Losses
from ssl4mis.losses import segmentation
from ssl4mis.method import Method, Needs


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        dice: classes of the Dice loss: all (SSL4MIS) or foreground (UA-MT).
    """

    dice: Literal["all", "foreground"] = "all"


class Supervised(Method):
    Config = Config
    needs = Needs(unlabeled=False)

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build()

    def forward(self, batch, clock):
        return Losses({"supervised": segmentation(self.net(batch.image).logits, batch.labeled.label, self.hp.dice)})
