"""CCT: cross-consistency training (Ouali et al., CVPR 2020), as SSL4MIS uses it.

Auxiliary decoders read perturbed features of one encoder and must predict what the main decoder says of the clean ones:
perturbations of images, which work on natural scenes only where classes are far apart, are not needed.

Family: consistency.
Paper: Semi-Supervised Semantic Segmentation with Cross-Consistency Training, arXiv 2003.09005.
Code: HiLab-git/SSL4MIS, train_cross_consistency_training_2D.py (2D only); yassouali/CCT.
Differs from the code:
- the weight ramps up smoothly over the run instead of in blocks of 150 steps (`ramp_every` 150 gives the blocks);
- the main prediction is a target only, as in the paper; in SSL4MIS gradients flow through it (`detach` False);
- any backbone in 2D and 3D: its own decoder is the main one, and the auxiliary ones are of the same kind;
- the paper's own recipe is `weight` 30, `ramp` 0.1, `auxiliary` False and `levels` bottom, with an encoder that is
  pretrained and 18 decoders in place of three; its other perturbations (parts cut out or masked by the prediction,
  adversarial noise) are left out, and its dropout is of channels.
"""
from dataclasses import dataclass
from typing import Literal

import torch

from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import Method, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: final weight of the consistency term (30 in the paper).
        ramp: share of the run over which the weight ramps up.
        ramp_every: the weight changes every so many steps (150 in the authors' code).
        noise: largest relative noise on a feature.
        dropout: share of the features that dropout zeroes.
        drop_min: smallest share of the largest activity above which a position is dropped.
        drop_max: largest share.
        levels: which encoder features are perturbed, all (SSL4MIS) or the coarsest (bottom, the paper).
        auxiliary: whether the auxiliary decoders learn from labels too (SSL4MIS).
        detach: whether the main prediction is a target only.
    """

    weight: float = 0.1
    ramp: float = 1.0
    ramp_every: int = 1
    noise: float = 0.3
    dropout: float = 0.3
    drop_min: float = 0.7
    drop_max: float = 0.9
    levels: Literal["all", "bottom"] = "all"
    auxiliary: bool = True
    detach: bool = True

    def __post_init__(self):
        at_least_one(self, "ramp_every")
        within(self, 0, 1, "noise", "drop_min", "drop_max")
        within(self, 0, float("inf"), "weight", "ramp")
        if not 0 <= self.dropout < 1:
            raise UserError(f"hp.dropout {self.dropout}: expected a share below 1")
        if self.drop_min > self.drop_max:
            raise UserError(f"hp.drop_min {self.drop_min}: expected at most hp.drop_max {self.drop_max}")


class CCT(Method):
    Config = Config

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build()
        for _ in self.perturbations:
            self.net.add_branch()

    @property
    def perturbations(self):
        """What is done to the features of each auxiliary decoder, by name."""
        return {"noise": self.noisy, "dropout": self.dropped_out, "peaks": self.without_peaks}

    def forward(self, batch, clock):
        hp, n, label = self.hp, len(batch.labeled.image), batch.labeled.label
        main = self.net(batch.image)
        others = {name: branch(self.perturbed(main.features.encoder, perturb)).logits for branch, (name, perturb)
                  in zip(self.net.branches, self.perturbations.items(), strict=True)}
        taught = [main.logits, *(others.values() if hp.auxiliary else ())]
        terms = {"supervised": sum(segmentation(logits[:n], label) for logits in taught) / len(taught)}
        if not len(batch.unlabeled.image):
            return Losses(terms)
        target = main.logits[n:].softmax(1)
        if hp.detach:
            target = target.detach()
        weight = self.consistency_weight(clock)
        for name, logits in others.items():
            distance = (target - logits[n:].softmax(1)).square().mean()
            terms[f"consistency/{name}"] = weight / len(others) * distance
        return Losses(terms, watch={"weight": weight})

    def perturbed(self, skips, perturb):
        """Encoder features with a perturbation on all levels or on the coarsest."""
        first = 0 if self.hp.levels == "all" else len(skips) - 1
        return [perturb(x) if level >= first else x for level, x in enumerate(skips)]

    def noisy(self, x):
        """Features (B, C, *space) times 1 plus uniform noise, the same for all samples."""
        return x + x * x.new_empty(x.shape[1:]).uniform_(-self.hp.noise, self.hp.noise)

    def dropped_out(self, x):
        """Features (B, C, *space), some of them zero and the others larger; whatever their layout in memory is."""
        kept = 1 - self.hp.dropout
        return x * x.new_empty(x.shape).bernoulli_(kept).div_(kept)

    def without_peaks(self, x):
        """Features (B, C, *space) without the positions of each sample where their mean is near its largest."""
        activity = x.mean(1, keepdim=True)
        share = torch.empty((), device=x.device).uniform_(self.hp.drop_min, self.hp.drop_max)
        highest = activity.amax(tuple(range(1, x.ndim)), keepdim=True)
        return x * (activity < share * highest)
