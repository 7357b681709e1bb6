"""s4GAN: self-training by what fools a critic, and feature matching (Mittal et al., TPAMI 2019).

A critic learns to tell images with predictions from images with labels. Its features of unlabeled images with
predictions are to be, on average, those of labeled ones, and predictions that fool it become pseudo-labels.

Family: adversarial.
Paper: Semi-Supervised Semantic Segmentation with High- and Low-level Consistency, arXiv 1908.05724.
Code: sud0301/semisup-semseg, train_s4GAN.py (2D).
Differs from the code:
- every image is brought to 0..1 by its own range for the critic, where the code mixes up the ranges of two batches;
- the labeled half of the batch is both what the segmenter learns from and what the critic knows as real, where the code
  has three loaders, and both halves go through the segmenter at once;
- self-training starts after a warm-up, since nothing is pretrained (`start` 0);
- the critic's width follows the segmenter's;
- the segmenter has the run's optimizer, in place of SGD with 2.5e-4;
- Dice joins cross-entropy in the supervised term (`dice` False);
- the multi-label branch is not here: it removes classes that an image does not have, and medical images have all.
"""
from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot, softplus

from networks.discriminator import ImageDiscriminator, sized
from ssl4mis.batch import Losses
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Adversarial, Preset, through, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        feature_matching: weight of the distance of mean features.
        self_training: weight of the cross-entropy to the segmenter's own labels.
        threshold: how probable the critic must find it that an image has labels for that (0.7 on Cityscapes).
        start: share of the run without self-training.
        critic_rate: first learning rate of the critic's Adam, on the poly schedule.
        dice: whether Dice joins cross-entropy in the supervised term.
    """

    feature_matching: float = 0.1
    self_training: float = 1.0
    threshold: float = 0.6
    start: float = 1 / 30
    critic_rate: float = 1e-4
    dice: bool = True

    def __post_init__(self):
        within(self, 0, float("inf"), "feature_matching", "self_training")
        within(self, 0, 1, "threshold", "start")


class S4GAN(Adversarial):
    Config = Config
    presets = dict.fromkeys(("LA", "Pancreas"), Preset(run={"schedule": "poly"}))

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build()
        self.critic = ImageDiscriminator(task.spatial_dims, task.classes, task.channels, classes=1, **sized(build))

    def segment(self, batch, clock):
        hp, n, unlabeled = self.hp, len(batch.labeled.image), batch.unlabeled.image
        logits = self.net(batch.image).logits
        probability = logits.softmax(1)
        self.predicted = probability.detach()  # what the critic sees in its turn
        supervised = (segmentation if hp.dice else cross_entropy)(logits[:n], batch.labeled.label)
        if not len(unlabeled):
            return Losses({"supervised": supervised})
        fake = through(self.critic, probability[n:], unit_range(unlabeled))
        with torch.no_grad():
            real = self.critic(self.truth(batch.labeled), unit_range(batch.labeled.image))
        distance = (real.features.mean(0) - fake.features.mean(0)).abs().mean()
        fooled = (fake.logits.detach().sigmoid() >= hp.threshold).view(-1, *[1] * (unlabeled.ndim - 2))
        label = logits[n:].argmax(1)
        own = cross_entropy(logits[n:], label, fooled.expand_as(label))
        started = clock.step >= round(hp.start * clock.total)
        return Losses({"supervised": supervised, "feature_matching": hp.feature_matching * distance,
                       "self_training": hp.self_training * started * own}, watch={"fooled": fooled.float().mean()})

    def criticize(self, batch):
        """The losses of the critic: a logit above 0 is to say that an image has labels."""
        half = batch.unlabeled if len(batch.unlabeled.image) else batch.labeled
        fake = self.critic(self.predicted[-len(half.image):], unit_range(half.image)).logits
        real = self.critic(self.truth(batch.labeled), unit_range(batch.labeled.image)).logits
        return Losses({"fake": 0.5 * softplus(fake).mean(), "real": 0.5 * softplus(-real).mean()},
                      watch={"judged_real/predictions": fake.detach().sigmoid().mean(),
                             "judged_real/labels": real.detach().sigmoid().mean()})

    def truth(self, labeled):
        """The labels as probabilities, (B, K, *space)."""
        return one_hot(labeled.label.long(), self.task.classes).movedim(-1, 1).to(self.predicted.dtype)


def unit_range(image):
    """Every image (C, *space) of a batch brought to 0..1 by its own range; 0 where it has one value only."""
    axes = tuple(range(1, image.ndim))
    low, high = (bound(axes, keepdim=True) for bound in (image.amin, image.amax))
    return (image - low) / (high - low).clamp(min=1e-6)
