"""AdvEnt: adversarial entropy minimization (Vu et al., CVPR 2019).

A critic sees in parts of an image how unsure the network is there, the self-information of its prediction, and learns
to tell labeled from unlabeled images. The network learns to be as sure of unlabeled images as of labeled ones.

Family: adversarial.
Paper: ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic Segmentation, arXiv 1811.12833.
Code: valeoai/ADVENT, for two domains of photographs; there is none for medical images.
Differs from the code:
- labeled and unlabeled cases of one data set in place of two domains;
- without the auxiliary head, its losses, and a network trained before on other images;
- the optimizer and supervised loss of all methods, in place of cross-entropy at a small learning rate;
- the critic is as wide as the networks, 64 channels beside their 16, and halves sides only as long as there are voxels;
- logarithms of softmax in place of a small number inside of the logarithm.
"""
import math
from dataclasses import dataclass
from typing import Literal

from networks.discriminator import PatchDiscriminator, against, sized
from ssl4mis.batch import Losses
from ssl4mis.losses import segmentation
from ssl4mis.method import Adversarial, through, within

LABELED, UNLABELED = 0.0, 1.0  # what the critic should say


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: of the adversarial term, constant.
        critic_rate: first learning rate of the critic's Adam, on the poly schedule.
        dice: classes of the Dice loss: all (SSL4MIS) or foreground (UA-MT).
    """

    weight: float = 0.001
    critic_rate: float = 1e-4
    dice: Literal["all", "foreground"] = "all"

    def __post_init__(self):
        within(self, 0, float("inf"), "weight", "critic_rate")


class AdvEnt(Adversarial):
    Config = Config

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build()
        self.critic = PatchDiscriminator(task.spatial_dims, task.classes, **sized(build))
        self.seen = None  # what the network has just made of the batch, for the critic's turn

    def segment(self, batch, clock):
        n = len(batch.labeled.image)
        logits = self.net(batch.image).logits
        supervised = segmentation(logits[:n], batch.labeled.label, self.hp.dice)
        information = self_information(logits)
        self.seen = information.detach()
        if not len(batch.unlabeled.image):
            return Losses({"supervised": supervised})
        judged = through(self.critic, information[n:])
        return Losses({"supervised": supervised, "adversarial": self.hp.weight * against(judged, LABELED)},
                      watch={"information": self.seen[n:].mean()})

    def criticize(self, batch):
        """The critic's losses, half for each kind of image."""
        n, judged, terms, watch = len(batch.labeled.image), self.critic(self.seen), {}, {}
        for name, part, truth in (("labeled", judged[:n], LABELED), ("unlabeled", judged[n:], UNLABELED)):
            if len(part):
                terms[f"critic/{name}"] = 0.5 * against(part, truth)
                watch[f"right/{name}"] = ((part > 0) == truth).float().mean()
        return Losses(terms, watch)


def self_information(logits):
    """-p log p of each class as a share of the largest entropy, (B, K, *space): they sum to the entropy in [0, 1]."""
    log = logits.log_softmax(1)
    return -log.exp() * log / math.log(logits.shape[1])
