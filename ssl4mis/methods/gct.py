"""GCT: guided collaborative training (Ke et al., ECCV 2020), for volumes.

Two networks learn together under a flaw detector, which predicts where a prediction is wrong. Voxel by voxel the
network with fewer flaws teaches the other one; where both are flawed they learn to look flawless to the detector.

Family: co-training.
Paper: Guided Collaborative Training for Pixel-wise Semi-Supervised Learning, arXiv 2008.05258.
Code: ZHKKKe/PixelSSL, pixelssl/ssl_algorithm/ssl_gct.py (2D).
Differs from the code:
- Dice joins cross-entropy in the supervised terms (`dice` False);
- the mean square over 2 classes is some ten times that over the authors' 21, hence a smaller weight (`weight` 100);
- networks without dropout, as the authors' are: at such a weight V-Net's would be all that the networks learn about;
- the detector's norms are of a sample, where the code has batch norm for half of the channels: batches are small;
- the detector is as wide as the networks, 64 channels beside their 16; it halves no side of fewer than 8 voxels, and
  where it halves nothing its kernel is 3, which keeps the size;
- negative flaws are cut off for the networks only, and not in the map that the detector is corrected by;
- a flaw map that is cut off altogether is 0 after scaling to [0, 1], too;
- blurs are separable and follow the patch's side on each axis; their tails are cut off instead of folded back;
- the code's factor mu is left out: flaws are scaled to [0, 1] after it, so that it has no effect.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from networks.blocks import CONV, INSTANCE_NORM, Layers
from networks.discriminator import sized
from ssl4mis.batch import Losses
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Adam, CoTraining, Phase, Stage, at_least_one, through, within

# The detector's layers: channels in multiples of its width, and whether sides are halved; a last one gives the map.
LAYERS = ((1, True), (2, True), (2, False), (4, True), (4, False), (8, True), (8, False))
LEAST_SIDE = 8  # voxels of a side that is still halved
FLAW_BLUR, TARGET_BLUR, DILATED_BLUR = 1 / 16, 1 / 8, 1 / 4  # kernels as shares of a side
NO_FLAW = 0.1  # a map without a larger value has no flaws
DILATE = {2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the dynamic consistency terms (100 in the authors' code).
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps.
        correction: weight of the flaw correction terms.
        threshold: flaw from which on a prediction is bad.
        dilations: how often flaws are enlarged and blurred again in the detector's targets.
        detection: factor of the detector's loss.
        detector_rate: first learning rate of the detector's Adam; it falls as in the schedule poly.
        dice: whether Dice joins cross-entropy in the supervised terms.
        evaluate: what predicts: a network or the mean of both.
    """

    weight: float = 10.0
    ramp: float = 0.15
    ramp_every: int = 1
    correction: float = 1.0
    threshold: float = 0.6
    dilations: int = 1
    detection: float = 10.0
    detector_rate: float = 1e-4
    dice: bool = True
    evaluate: Literal["first", "second", "mean"] = "first"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, 1, "threshold")
        within(self, 0, float("inf"), "weight", "ramp", "correction", "dilations", "detection", "detector_rate")


class GCT(CoTraining):
    Config = Config

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.first, self.second = build(dropout=()), build(dropout=())
        self.detector = FlawDetector(task.spatial_dims, task.channels + task.classes, **sized(build))
        self.before = None

    def stages(self):
        return (Stage(phases=(Phase("segment"), Phase("detect", Adam(self.hp.detector_rate), "poly"))),)

    def trainable(self, phase):
        if phase == "detect":
            return list(self.detector.parameters())
        return [*self.first.parameters(), *self.second.parameters()]

    def forward(self, batch, clock):
        hp, n, image, label = self.hp, len(batch.labeled.image), batch.image, batch.labeled.label
        if clock.phase == "detect":
            return self.detect(batch.labeled)
        with torch.no_grad():
            before = [net(image).logits.softmax(1) for net in (self.first, self.second)]
            flaws = [usable(self.detector(image, probability)) for probability in before]
        self.before = [probability[:n] for probability in before]  # what the detector learns from in this step

        loss = segmentation if hp.dice else cross_entropy
        first, second = (net(image).logits for net in (self.first, self.second))
        terms = {"supervised/first": loss(first[:n], label), "supervised/second": loss(second[:n], label)}
        if not len(batch.unlabeled.image):
            return Losses(terms)
        targets, bad = guidance(before, flaws, hp.threshold)
        weight = self.consistency_weight(clock)
        for name, logits, target in zip(("first", "second"), (first, second), targets, strict=True):
            probability = logits.softmax(1)
            seen = through(self.detector, image, probability)
            terms["consistency/" + name] = weight * (probability - target).square().mean()
            terms["correction/" + name] = hp.correction * (bad * seen.square()).mean()
        return Losses(terms, watch={"weight": weight, "bad": bad.float().mean(),
                                    "first_better": (flaws[0] < flaws[1]).float().mean()})

    def detect(self, labeled):
        """The detector's loss on what both networks made of the labeled images before they learned."""
        flaws = self.detector(torch.cat([labeled.image] * 2), torch.cat(self.before))
        target = torch.cat([true_flaws(p, labeled.label, self.hp.dilations) for p in self.before])
        return Losses({"detection": self.hp.detection * F.mse_loss(flaws, target)}, watch={"flawed": target.mean()})


class FlawDetector(nn.Module):
    """Image (B, C, *space) and class probabilities (B, K, *space) -> flaw map (B, 1, *space), float32, any real values.

    Args:
        dims: number of spatial dimensions. inputs: channels of the image, and classes.
        width: channels of the first layer. patch: sides in voxels, None for large ones.
    """

    def __init__(self, dims, inputs, width=64, patch=None):
        super().__init__()
        self.mode, sides, layers = {2: "bilinear", 3: "trilinear"}[dims], list(patch or [256] * dims), []
        for outputs, halve in (*((width * times, halve) for times, halve in LAYERS), (1, True)):
            halved = [halve and side >= LEAST_SIDE for side in sides]
            kernel, stride = (tuple(pair[half] for half in halved) for pair in ((3, 4), (1, 2)))
            layers += [CONV[dims](inputs, outputs, kernel, stride, 1), INSTANCE_NORM[dims](outputs, affine=True),
                       nn.LeakyReLU(0.2)]
            sides, inputs = [side // (1 + half) for side, half in zip(sides, halved, strict=True)], outputs
        self.layers = Layers(*layers[:-2])  # neither norm nor activation after the last one

    def forward(self, image, probability):
        kind = self.layers[0].weight.dtype
        maps = self.layers(torch.cat([image.to(kind), probability.to(kind)], 1))
        return F.interpolate(maps.float(), image.shape[2:], mode=self.mode, align_corners=True)


def guidance(probabilities, flaws, threshold):
    """What each of two networks learns, (B, K, *space), and where both are bad, (B, 1, *space) bool.

    Flaws over the threshold are all alike; a network that is not worse than the other learns its own prediction.
    """
    bad = [flaw > threshold for flaw in flaws]
    first, second = (flaw.masked_fill(wrong, 1.0) for flaw, wrong in zip(flaws, bad, strict=True))
    mine, theirs = probabilities
    return (torch.where(first <= second, mine, theirs), torch.where(second <= first, theirs, mine)), bad[0] & bad[1]


def usable(flaws):
    """Flaw maps as the networks use them: not negative, smooth, from 0 to 1, and 0 where there is no flaw."""
    maps = blur(flaws.clamp(min=0), FLAW_BLUR)
    return stretched(maps) * (maps.amax(tuple(range(1, maps.ndim)), keepdim=True) > NO_FLAW)


def true_flaws(probability, label, dilations):
    """The detector's target: how far probabilities are from labels, enlarged, smooth, from 0 to 1; (B, 1, *space)."""
    truth = F.one_hot(label.long(), probability.shape[1]).movedim(-1, 1)
    maps = blur((truth - probability).abs().sum(1, keepdim=True), TARGET_BLUR)
    for _ in range(dilations):
        maps = blur(DILATE[label.ndim - 1](maps, 3, 1, 1), DILATED_BLUR)
    return stretched(maps)


def stretched(maps):
    """Each map (1, *space) linearly to [0, 1], up to a constant one, which becomes 0."""
    each = tuple(range(1, maps.ndim))
    low, high = maps.amin(each, keepdim=True), maps.amax(each, keepdim=True)
    return (maps - low) / (high - low + 1e-9)


def blur(maps, share):
    """Gaussian blur of maps (B, 1, *space), reflected at the edges; its kernel is a share of each side, made odd."""
    with torch.autocast(maps.device.type, enabled=False):
        for axis in range(2, maps.ndim):
            radius = int(maps.shape[axis] * share) // 2
            sigma = 0.3 * (radius - 1) + 0.8
            offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
            kernel = (-0.5 * (offsets / sigma).square()).softmax(0)
            lines = maps.movedim(axis, -1)
            padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (radius, radius), mode="reflect")
            maps = F.conv1d(padded, kernel[None, None]).view(lines.shape).movedim(-1, axis)
        return maps
