"""DAN: deep adversarial network (Zhang et al., MICCAI 2017), as SSL4MIS uses it for volumes.

A critic sees predictions with their images and learns to tell labeled from unlabeled ones. The segmenter learns to
predict on unlabeled images so that the critic takes them for labeled.

Family: adversarial.
Paper: Deep Adversarial Networks for Biomedical Image Segmentation Utilizing Unannotated Images.
Code: HiLab-git/SSL4MIS, train_adversarial_network_3D.py; the authors have released none.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- the critic averages over all voxels, whatever the patch, where the script takes 96x96x96 only;
- as many targets as samples, where the script has those of two labeled and two unlabeled ones;
- the critic is as wide as the networks, 64 channels beside their 16;
- 2D is like 3D: the 2D critic lacks activation and dropout of the first level and averages over a part of the image.
"""
from dataclasses import dataclass
from typing import Literal

from networks.base import without_learning
from networks.discriminator import ImageDiscriminator, sized, tell_apart
from ssl4mis.batch import Losses
from ssl4mis.losses import segmentation
from ssl4mis.method import Adversarial, at_least_one, through, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the adversarial term.
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps (150 in SSL4MIS).
        judged: what the critic sees: pairs of prediction and image, or predictions alone, which keeps it from learning
            a few labeled images by heart.
        critic_rate: learning rate of the critic's Adam, constant.
        dice: classes of the Dice loss: all (SSL4MIS) or foreground (UA-MT).
    """

    weight: float = 0.1
    ramp: float = 1.0
    ramp_every: int = 1
    judged: Literal["pairs", "predictions"] = "pairs"
    critic_rate: float = 1e-4
    dice: Literal["all", "foreground"] = "all"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, float("inf"), "weight", "ramp", "critic_rate")


class DAN(Adversarial):
    Config = Config
    critic_schedule = "constant"

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build()
        images = task.channels if hp.judged == "pairs" else 0
        self.critic = ImageDiscriminator(task.spatial_dims, task.classes, images, **sized(build))

    def segment(self, batch, clock):
        n, unlabeled = len(batch.labeled.image), batch.unlabeled.image
        logits = self.net(batch.image).logits
        supervised = segmentation(logits[:n], batch.labeled.label, self.hp.dice)
        if not len(unlabeled):
            return Losses({"supervised": supervised})
        judged = through(self.critic.eval(), logits[n:].softmax(1), unlabeled).logits
        adversarial, fooled = tell_apart(judged, labeled=len(unlabeled))
        weight = self.consistency_weight(clock)
        return Losses({"supervised": supervised, "adversarial": weight * adversarial},
                      watch={"weight": weight, "fooled": fooled})

    def criticize(self, batch):
        probability = without_learning(self.net, batch.image).logits.softmax(1)
        loss, accuracy = tell_apart(self.critic.train()(probability, batch.image).logits, len(batch.labeled.image))
        return Losses({"critic": loss}, watch={"accuracy": accuracy})
