"""CML: cross-view mutual learning (Wu et al., ACM Multimedia 2024).

Two networks with different decoders are pushed towards different features. Into unlabeled images a box of another one
is pasted, and each network learns the other's pseudo-labels outside the box and its own inside.

Family: co-training.
Paper: Cross-view Mutual Learning for Semi-Supervised Medical Image Segmentation, ACM Multimedia 2024.
Code: SongwuJob/CML, CML_LA_train.py.
Differs from the code:
- training starts from the last weights of pre-training with a new optimizer, where the code takes weights and optimizer
  of the best checkpoint on the test list;
- predictions are not reduced to their largest component: that is post-processing, which every method could have;
- which half of a batch is pasted into which is random, and the box moves over the actual patch, as in BCP;
- any backbone: the second network upsamples in another way than the first; where there is no choice the networks
  differ in their weights alone;
- two networks on ACDC as in the paper: in the released code both branches there are one network.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from ssl4mis import copy_paste
from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import Method, Needs, Preset, Stage, within

DICE = {"squared": False, "per_sample": True}


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        pretrain: share of the run that learns from mixed labeled images only.
        box: side of the pasted box, a share of the patch's side.
        supervised: weight of the labels.
        weight: of the pseudo-labels.
        discrepancy: weight of the cosine of the two networks' features.
        component: voxels of a pseudo label's largest component share corners, edges or faces: 26, 18 or 6 neighbors in
            3D and 8, 8 or 4 in 2D; none keeps all components.
        evaluate: what predicts: the mean of both networks' logits or one network.
    """

    pretrain: float = 2 / 17
    box: float = 2 / 3
    supervised: float = 1.0
    weight: float = 1.0
    discrepancy: float = 0.2
    component: Literal["corners", "edges", "faces", "none"] = "corners"
    evaluate: Literal["mean", "first", "second"] = "mean"

    def __post_init__(self):
        within(self, 0, 1, "pretrain")
        within(self, 0, float("inf"), "supervised", "weight", "discrepancy")
        if not 0 < self.box < 1:
            raise UserError(f"hp.box {self.box}: expected a share between 0 and 1")


class CML(Method):
    Config = Config
    needs = Needs(multiple=2, equal=True)
    presets = {
        "LA": Preset(run={"labeled_batch": 4, "unlabeled_batch": 4}, iterations=17000),
        "ACDC": Preset({"pretrain": 1 / 4, "box": 1 / 2, "weight": 0.5, "discrepancy": 0.1}, {"schedule": "constant"},
                       40000, dims=2),
        "BraTS": Preset({"component": "none"}),  # a tumor may have several foci
    }

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.first = build()
        self.second = build(upsampling=self.first.backbone.upsamplings[1])

    def remarks(self):
        if self.first.backbone.upsamplings[1]:
            return ()
        return ("this network upsamples in one way only: the two networks of cml differ in their weights alone",)

    def stages(self):
        share = self.hp.pretrain
        return Stage("pretrain", share, schedule="constant"), Stage("train", 1 - share, drop=1 / 6)

    def forward(self, batch, clock):
        hp, unlabeled = self.hp, batch.unlabeled.image
        nets, mixing = (self.first, self.second), clock.stage == "train" and len(unlabeled)
        if mixing:  # asked first, for work that follows is queued while the CPU seeks components
            pseudo = [self.pseudo_labels(net, unlabeled) for net in nets]
            free = copy_paste.box(unlabeled, hp.box)
        inside = copy_paste.box(batch.image, hp.box)
        image, label = (paste(x, inside) for x in (batch.labeled.image, batch.labeled.label))
        outs = [net(image) for net in nets]
        terms = {"supervised": hp.supervised * sum(segmentation(out.logits, label, **DICE) for out in outs)}
        likeness = cosines(*outs)
        if mixing:
            image = paste(unlabeled, free)
            outs = [net(image) for net in nets]
            (first_a, first_b), (second_a, second_b) = (labels().chunk(2) for labels in pseudo)
            targets = torch.where(free, first_b, second_a), torch.where(free, second_b, first_a)
            losses = [segmentation(out.logits, target, **DICE) for out, target in zip(outs, targets, strict=True)]
            terms["pseudo"] = hp.weight * sum(losses)
            likeness = likeness + cosines(*outs)
        return Losses(terms | {"discrepancy": hp.discrepancy * likeness})

    @torch.no_grad()
    def pseudo_labels(self, net, image):
        """A function that gives a network's labels in train mode, (B, *space) uint8."""
        return copy_paste.pseudo_labels(net(image).logits.softmax(1), self.hp.component)

    def predict(self, image):
        nets = {"first": [self.first], "second": [self.second], "mean": [self.first, self.second]}[self.hp.evaluate]
        return torch.stack([net(image).logits for net in nets]).mean(0).softmax(1)


def paste(x, inside):
    """The first half of a batch with a box (*space) of the second."""
    a, b = x.chunk(2)
    return torch.where(inside, b, a)


def cosines(*outs):
    """1 + the mean cosine of two networks' coarsest features, summed over whose features move; 0 where opposite."""
    first, second = (out.features.encoder[-1].float() for out in outs)
    return sum(1 + F.cosine_similarity(mine, other.detach(), 1, 1e-6).mean()
               for mine, other in ((first, second), (second, first)))
