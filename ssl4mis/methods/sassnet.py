"""SASSNet: shape-aware semi-supervised segmentation (Li et al., MICCAI 2020).

One network predicts the segmentation and the signed distance to its boundary, a map of the shape. A critic sees
distance maps with their images and learns to tell labeled from unlabeled ones; the network learns to predict distances
on unlabeled images that the critic takes for labeled.

Family: adversarial.
Paper: Shape-aware Semi-supervised 3D Semantic Segmentation for Medical Images, arXiv 2007.10732.
Code: kleinzcy/SASSnet, train_gan_sdfloss.py.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- in a patch without foreground the true distance is 1, and -1 in one without background (`compat` legacy gives the
  code's 0 without foreground, and 0 for what is 0/0 there without background);
- the critic averages over all voxels, whatever the patch, where the code has a constant for each;
- as many targets as samples, where the code has those of two labeled and two unlabeled ones;
- the critic is as wide as the networks, 64 channels beside their 16;
- softmax over all classes in place of the sigmoid of one channel, and a distance map for each foreground class.
"""
from dataclasses import dataclass
from typing import Literal

from networks.base import without_learning
from networks.discriminator import ImageDiscriminator, sized, tell_apart
from ssl4mis.batch import Losses
from ssl4mis.distance import class_distances
from ssl4mis.losses import dice
from ssl4mis.method import Adversarial, at_least_one, through, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        sdf: weight of the squared error of the signed distance on labeled images.
        weight: final weight of the adversarial term, as published for 16 labeled cases; 0.015 for 8.
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        critic_rate: learning rate of the critic's Adam, constant.
        compat: legacy keeps the released distance map of patches without foreground, 0 everywhere.
    """

    sdf: float = 0.3
    weight: float = 0.01
    ramp: float = 1.0
    ramp_every: int = 1
    critic_rate: float = 1e-4
    compat: Literal["right", "legacy"] = "right"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, float("inf"), "sdf", "weight", "ramp", "critic_rate")


class SASSNet(Adversarial):
    Config = Config
    critic_schedule = "constant"

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build({"seg": task.classes, "sdf": task.classes - 1})
        self.critic = ImageDiscriminator(task.spatial_dims, task.classes - 1, task.channels, **sized(build))

    def segment(self, batch, clock):
        hp, n, label, unlabeled = self.hp, len(batch.labeled.image), batch.labeled.label, batch.unlabeled.image
        heads = self.net(batch.image).heads
        probability, sdf = heads["seg"].softmax(1), heads["sdf"].tanh()
        terms = {"supervised": dice(probability[:n], label, "foreground"),
                 "sdf": hp.sdf * (sdf[:n] - class_distances(label, self.task.classes, hp.compat)).square().mean()}
        if not len(unlabeled):
            return Losses(terms)
        adversarial, fooled = tell_apart(through(self.critic.eval(), sdf[n:], unlabeled).logits, len(unlabeled))
        weight = self.consistency_weight(clock)
        return Losses(terms | {"adversarial": weight * adversarial}, watch={"weight": weight, "fooled": fooled})

    def criticize(self, batch):
        sdf = without_learning(self.net, batch.image).heads["sdf"].tanh()
        loss, accuracy = tell_apart(self.critic.train()(sdf, batch.image).logits, len(batch.labeled.image))
        return Losses({"critic": loss}, watch={"accuracy": accuracy})
