"""CTCT: cross teaching between CNN and transformer (Luo et al., MIDL 2022), in 2D and 3D.

A convolutional network and a transformer, which err differently, see the same images. On unlabeled images each learns
the hard labels that the other one predicts, by a Dice loss.

Family: co-training.
Paper: Semi-Supervised Medical Image Segmentation via Cross Teaching between CNN and Transformer, arXiv 2112.04894.
Code: HiLab-git/SSL4MIS, train_cross_teaching_between_cnn_transformer_2D.py.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- the transformer starts from scratch, where the authors' knows ImageNet, and so learns by Adam (`optimizer` sgd);
- slices keep the protocol's size, where the authors' Swin-UNet wants 224 (`--patch [224,224] --stride [224,224]`).
"""
from dataclasses import dataclass
from typing import Literal

import networks
from networks.base import PatchError
from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, dice, segmentation
from ssl4mis.method import Adam, CoTraining, Phase, Preset, Stage, at_least_one, within

TRANSFORMERS = ("swin_unet", "swin_unetr", "unetr")
PARTNERS = {2: ("swin_unet", "unetr"), 3: ("unetr", "swin_unetr")}  # of a CNN, the preferred one first
CNN = "vnet"  # the partner of a transformer


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        partner: backbone of the second network, a transformer beside a CNN or the reverse. auto is the first of
            swin_unet and unetr in 2D, of unetr and swin_unetr in 3D, that takes the patch, and vnet beside those.
        weight: final weight of the cross terms.
        ramp: share of the run over which the weight ramps up; 0 for a constant weight.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        loss: of the cross terms.
        optimizer: of the transformer: Adam, or sgd as for the CNN (authors).
        rate: of Adam.
        evaluate: what predicts: the run's own network, its partner, or the mean of both.
    """

    partner: str = "auto"
    weight: float = 0.1
    ramp: float = 1.0
    ramp_every: int = 1
    loss: Literal["dice", "ce", "ce+dice"] = "dice"
    optimizer: Literal["adam", "sgd"] = "adam"
    rate: float = 1e-4
    evaluate: Literal["first", "second", "mean"] = "first"

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, float("inf"), "weight", "ramp", "rate")
        if self.partner not in ("auto", *networks.NAMES):
            raise UserError(f"hp.partner {self.partner!r}: expected auto or one of {', '.join(networks.NAMES)}")


class CTCT(CoTraining):
    Config = Config
    presets = {"ACDC": Preset({"optimizer": "sgd"}, {"labeled_batch": 8, "unlabeled_batch": 8}, dims=2)}

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        own = getattr(build, "network", None)
        self.first = build()
        self.partner, self.second = partner(build, own, task, hp.partner)
        self.names = "segment", "transformer"
        if own in TRANSFORMERS:
            self.names = self.names[::-1]
        self.kept = None

    def remarks(self):
        return (f"the partner of the network is {self.partner}",) if self.hp.partner == "auto" else ()

    def stages(self):
        if self.hp.optimizer == "sgd":
            return (Stage(),)
        return (Stage(phases=(Phase("segment"), Phase("transformer", Adam(self.hp.rate, (0.9, 0.999))))),)

    def trainable(self, phase):
        if self.hp.optimizer == "sgd":
            return super().trainable(phase)
        return list((self.first, self.second)[self.names.index(phase)].parameters())

    def forward(self, batch, clock):
        """The terms of both networks, or of the one whose phase it is: those of the transformer wait for its phase."""
        kept, self.kept = self.kept, None
        if kept and clock.phase == "transformer":
            return kept
        n, label = len(batch.labeled.image), batch.labeled.label
        first, second = self.first(batch.image).logits, self.second(batch.image).logits
        terms = [{"supervised/first": segmentation(first[:n], label)},
                 {"supervised/second": segmentation(second[:n], label)}]
        watch = {}
        if len(batch.unlabeled.image):
            weight = watch["weight"] = self.consistency_weight(clock)
            terms[0]["cross/first"] = weight * self.loss(first[n:], second[n:].argmax(1))
            terms[1]["cross/second"] = weight * self.loss(second[n:], first[n:].argmax(1))
        if self.hp.optimizer == "sgd":
            return Losses(terms[0] | terms[1], watch)
        now = self.names.index(clock.phase)
        if clock.phase == "segment":
            self.kept = Losses(terms[1 - now])
        return Losses(terms[now], watch)

    def loss(self, logits, label):
        """What a network is told by the other one's labels."""
        if self.hp.loss == "dice":
            return dice(logits.softmax(1), label)
        return (cross_entropy if self.hp.loss == "ce" else segmentation)(logits, label)


def partner(build, own, task, name):
    """Name and network of the partner of the network called `own`; UserError where none fits it and the patch."""
    wanted = [name]
    if name == "auto":
        wanted = (CNN,) if own in TRANSFORMERS else PARTNERS[task.spatial_dims]
    elif (own in TRANSFORMERS) == (name in TRANSFORMERS):
        kind, example = ("CNN", CNN) if own in TRANSFORMERS else ("transformer", PARTNERS[task.spatial_dims][0])
        raise UserError(f"hp.partner {name}: expected a {kind} beside {own}, such as --hp.partner {example}")
    for candidate in wanted:
        try:
            return candidate, build(network=candidate)
        except PatchError as error:
            refusal = error
    raise UserError(f"hp.partner {name}: {refusal}")
