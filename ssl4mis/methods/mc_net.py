"""MC-Net and MC-Net+: mutual consistency (Wu et al., MICCAI 2021; Medical Image Analysis 2022).

One encoder carries two or three decoders that double the sides of their maps in different ways. Where they disagree the
image is hard, so the probabilities of each decoder must agree with the sharpened ones of the others.

Family: consistency.
Paper: Semi-supervised Left Atrium Segmentation with Mutual Consistency Training, arXiv 2103.02911; Mutual Consistency
Learning for Semi-supervised Medical Image Segmentation, arXiv 2109.09960.
Code: ycwu1997/MC-Net, train_mcnet_3d.py and train_mcnet_2d.py.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks), one
  step later;
- two decoders are the default, MC-Net; the second paper's MC-Net+ is `decoders` 3;
- the Dice of the 2D script lacks the factor 2 and weighs twice as much (1.0): the gradient is the same, and the loss
  is less by 0.5 per decoder here;
- any backbone: the first decoder is its own, the others upsample in the other two ways; where a backbone has no choice
  they differ in their weights alone;
- where all decoders predict it is by the mean of their probabilities; the script cuts the mean of logits at 0.5;
- the last weights are evaluated, not the best ones on the test list, and slices as volumes are.
"""
from dataclasses import dataclass
from typing import Literal

import torch

from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import dice
from ssl4mis.method import Method, Preset, at_least_one, within

DICE = {"linear": {"classes": "foreground", "squared": False, "smooth": 1e-8}, "squared": {"smooth": 1e-10}}
CERTAIN = 1e-6  # a probability so near to 0 or 1 is sharp already
LONG = {"iterations": 15000, "run": {"schedule": "constant"}}


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        decoders: 2 (MC-Net) or 3 (MC-Net+).
        supervised: weight of each decoder's Dice loss.
        dice: linear, of the foreground (3D), or squared, of all classes (ACDC).
        weight: final weight of the consistency term (0.1 on ACDC).
        ramp: share of the run over which the weight ramps up (1 on ACDC).
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        temperature: of the sharpened probabilities; small is sharp.
        sharpening: of each class against the rest (binary, authors), or of all classes together (softmax); both are the
            same with two classes.
        detach: whether sharpened probabilities are targets only; in the authors' code gradients flow through them.
        evaluate: what predicts: the first decoder or the mean of all.
    """

    decoders: int = 2
    supervised: float = 0.5
    dice: Literal["linear", "squared"] = "linear"
    weight: float = 1.0
    ramp: float = 0.4
    ramp_every: int = 1
    temperature: float = 0.1
    sharpening: Literal["binary", "softmax"] = "binary"
    detach: bool = False
    evaluate: Literal["first", "mean"] = "first"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 2, 3, "decoders")
        within(self, 0, float("inf"), "supervised", "weight", "ramp")
        if not self.temperature > 0:
            raise UserError(f"hp.temperature {self.temperature}: expected more than 0")


class MCNet(Method):
    Config = Config
    presets = {
        "LA": Preset(**LONG), "Pancreas": Preset(**LONG),
        "ACDC": Preset({"dice": "squared", "weight": 0.1, "ramp": 1.0}, {"schedule": "constant"}, dims=2),
    }

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build()
        for upsampling in self.net.backbone.upsamplings[1:hp.decoders]:
            self.net.add_branch(upsampling)

    def remarks(self):
        if self.net.backbone.upsamplings[1]:
            return ()
        return ("this network upsamples in one way only: the decoders of mc_net differ in their weights alone",)

    def forward(self, batch, clock):
        hp, n, label = self.hp, len(batch.labeled.image), batch.labeled.label
        probabilities = [logits.softmax(1) for logits in self.decoded(batch.image)]
        losses = [dice(probability[:n], label, **DICE[hp.dice]) for probability in probabilities]
        terms = {"supervised": hp.supervised * sum(losses)}
        if not len(batch.unlabeled.image):
            return Losses(terms)
        sharp = [self.sharpened(p.detach() if hp.detach else p) for p in probabilities]
        pairs = [(p - target).square().mean() for i, p in enumerate(probabilities)
                 for j, target in enumerate(sharp) if i != j]
        weight = self.consistency_weight(clock)
        return Losses(terms | {"consistency": weight * sum(pairs)}, watch={"weight": weight})

    def decoded(self, image):
        """Logits of all decoders, the network's own first."""
        first = self.net(image)
        return [first.logits, *(branch(first.features.encoder).logits for branch in self.net.branches)]

    def sharpened(self, probability):
        """p^(1/temperature) against (1-p)^(1/temperature), or normalized over the classes; (B, K, *space)."""
        if self.hp.sharpening == "softmax":
            return (probability.clamp(min=CERTAIN).log() / self.hp.temperature).softmax(1)
        return torch.sigmoid(probability.logit(CERTAIN) / self.hp.temperature)

    def predict(self, image):
        if self.hp.evaluate == "first":
            return self.net(image).logits.softmax(1)
        return torch.stack([logits.softmax(1) for logits in self.decoded(image)]).mean(0)
