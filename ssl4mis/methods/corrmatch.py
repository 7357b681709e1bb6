"""CorrMatch-3D: labels travel along correlations of positions (after Sun et al., CVPR 2024, which is 2D).

Confident predictions on weak views teach strong views, as in FixMatch, over a threshold that follows the network's
confidence. A second head learns how positions correlate: along that, logits spread as one more prediction, and whole
regions join the pseudo-labels.

Family: pseudo-label.
Paper: Label Propagation via Correlation Matching for Semi-Supervised Semantic Segmentation, arXiv 2306.04300.
Code: BBBBchan/CorrMatch, corrmatch.py (2D, non-commercial; nothing here is taken from it).
Differs from the code:
- it is the 3D design of docs/corrmatch_3d.md, which lists the values that restore the authors' behavior;
- two encoder levels are projected to 64 channels, where 2D has one map and 256 (`projection` 256);
- 32 channels correlate instead of one per class, since two classes would give a correlation of rank two (`channels`);
- the threshold is capped, or it nears 1 in binary tasks and regions stop growing (`tau_max` 1, `tau_reg_max` 1);
- the unsupervised terms start after a warm-up, since nothing is pretrained (`warm_up` 0);
- Dice joins cross-entropy in the terms on the network's own maps (`dice` False, `u_dice` False);
- the target of the KL term is mixed like the image that it belongs to (`kl_target_cutmix` False);
- rows are drawn for each sample (`sampling` shared), logits averaged over cells (`corr_down` interp);
- the threshold is updated over the valid voxels of the image that was predicted (`tau_mask` mixed);
- features of the unlabeled half alone are perturbed, at all encoder levels, and partners are other samples.
"""
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from networks.blocks import CHANNEL_DROPOUT
from ssl4mis import correlation
from ssl4mis.batch import Losses
from ssl4mis.errors import UserError
from ssl4mis.matching import IGNORED, Target, boxes, check_boxes, masked, mean, paste, perturbed, steady, sureness
from ssl4mis.method import Method, Needs, Preset, at_least_one, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        pixel_prop: whether logits spread along a learned correlation. Weights of what is off go to the main terms.
        region_prop: whether regions enlarge the pseudo-labels; needs `pixel_prop`, which trains the correlation.
        kl: whether the distributions on strong and weak views are compared.
        fp: whether perturbed features are decoded too.
        tau: first confidence threshold.
        dynamic_tau: whether the threshold follows the network's confidence.
        tau_momentum: of the threshold's moving average.
        tau_stat: statistic of a class's confidence that the threshold follows.
        tau_mask: voxels that the threshold is updated over, the valid ones of the weak view or (authors) of the mix.
        tau_max: largest threshold of voxels.
        tau_reg_max: largest threshold of regions.
        n_rows: rows of the correlation that become shapes, per sample.
        sampling: of rows: random, shared by the batch (authors), uniform (evenly spaced), or balanced, half of them
            where foreground is predicted.
        shape_mode: shapes are cut at full resolution (authors' code) or on the coarse grid (paper), which is cheap.
        region_order: whether a region sees the labels that the regions before it left, or the first ones.
        corr_stride: largest stride of the features that correlate, in voxels.
        channels: of the two vectors whose products are the correlation.
        projection: channels of the features before that.
        corr_dropout: of the projection's channels.
        corr_apply: sums over what positions send (col, authors), or means over what they receive (row).
        corr_down: logits reach the coarse grid as means over cells, or (authors) as points.
        corr_memory: largest size of all correlations of a step in training, in MiB.
        kl_target_cutmix: whether the target of `kl` is mixed as the strong view is.
        cutmix: probability that a box is cut out of another sample.
        box_min: smallest share of voxels in a box.
        box_max: largest share.
        feature_dropout: of channels, in the perturbed features.
        warm_up: share of the run with supervised terms only.
        dice: whether Dice joins cross-entropy in the supervised term.
        u_dice: whether Dice joins cross-entropy on pseudo-labels.
    """

    pixel_prop: bool = True
    region_prop: bool = True
    kl: bool = True
    fp: bool = True
    tau: float = 0.85
    dynamic_tau: bool = True
    tau_momentum: float = 0.999
    tau_stat: Literal["max", "q95", "mean"] = "max"
    tau_mask: Literal["weak", "mixed"] = "weak"
    tau_max: float = 0.95
    tau_reg_max: float = 0.9
    n_rows: int = 128
    sampling: Literal["random", "shared", "uniform", "balanced"] = "random"
    shape_mode: Literal["soft_full", "binary_coarse"] = "soft_full"
    region_order: Literal["sequential", "parallel"] = "sequential"
    corr_stride: int = 8
    channels: int = 32
    projection: int = 64
    corr_dropout: float = 0.1
    corr_apply: Literal["col", "row"] = "col"
    corr_down: Literal["avgpool", "interp"] = "avgpool"
    corr_memory: int = 1024
    kl_target_cutmix: bool = True
    cutmix: float = 0.5
    box_min: float = 0.02
    box_max: float = 0.4
    feature_dropout: float = 0.5
    warm_up: float = 1 / 15
    dice: bool = True
    u_dice: bool = True

    def __post_init__(self):
        at_least_one(self, "n_rows", "corr_stride", "channels", "projection", "corr_memory")
        within(self, 0, 1, "tau_momentum", "corr_dropout", "feature_dropout", "warm_up")
        check_boxes(self)
        if self.region_prop and not self.pixel_prop:
            raise UserError("hp.region_prop True: expected hp.pixel_prop True, which trains the correlation")


class View(NamedTuple):
    """What the network makes of images: logits, spread logits and correlation (or None), encoder features."""

    logits: Tensor
    spread: Tensor | None
    matrix: Tensor | None
    skips: list[Tensor]


class CorrMatch(Method):
    Config = Config
    needs = Needs(strong=1, partner=True)
    presets = {
        **dict.fromkeys(("LA", "Pancreas"), Preset(run={"schedule": "poly"}, iterations=15000)),
        **dict.fromkeys(("ACDC", "BraTS"), Preset(hp={"warm_up": 1 / 30})),  # of twice as long runs
    }

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build(dropout=())
        self.perturb = CHANNEL_DROPOUT[task.spatial_dims](hp.feature_dropout)
        self.register_buffer("tau", torch.tensor(hp.tau, dtype=torch.float64))
        if hp.pixel_prop:
            self.head = correlation.CorrelationHead(self.net.backbone, hp.corr_stride, hp.projection, hp.channels,
                                                    hp.corr_dropout)
            labeled, unlabeled = task.batch
            self.head.check_memory(labeled + 2 * unlabeled, build.spec.patch, hp.corr_memory)

    def forward(self, batch, clock):
        hp, n, unlabeled, partner = self.hp, len(batch.labeled.image), batch.unlabeled, batch.partner
        if not len(unlabeled.image):
            return Losses(self.supervised(self.view(batch.image), batch.labeled.label))
        theirs = Target.of(self.steady(partner.image), partner.valid)
        weak = self.view(batch.image)
        mine = Target.of(weak.logits[n:].detach().softmax(1), unlabeled.valid)
        box = boxes(hp, unlabeled.image)
        mixed = mine.mixed(box, theirs)
        active = clock.step >= round(hp.warm_up * clock.total)
        tau = self.threshold(mine, mixed, active)
        label, mask = self.regions(weak, mine, mixed, box, tau)
        strong = self.view(paste(box, partner.strong[0], unlabeled.strong[0]))

        terms = self.supervised(weak, batch.labeled.label)
        losses = self.unsupervised(weak, strong, mine, mixed, label, mask, tau)
        for name, loss in losses.items():
            share = 1 - 0.25 * (len(losses) - 1) if name == "hard" else 0.25
            terms[name] = 0.5 * active.double() * share * loss
        sure = mixed.sure(tau.clamp(max=hp.tau_max))
        return Losses(terms, watch={"tau": tau, "propagated": mask.float().mean()} | sureness(sure, mixed.label))

    def supervised(self, view, label):
        """The terms of the labeled half, which comes first in the view."""
        n, known, hp = len(label), label != IGNORED, self.hp
        share = 0.25 if hp.pixel_prop else 0.5
        terms = {"supervised": share * masked(view.logits[:n], label, known, known, hp.dice)}
        if hp.pixel_prop:
            terms["supervised_corr"] = share * masked(view.spread[:n], label, known, known)
        return terms

    def unsupervised(self, weak, strong, mine, mixed, label, mask, tau):
        """Unweighted losses of the unlabeled half, which comes last in the weak view."""
        hp, n, tau = self.hp, -len(label), tau.clamp(max=self.hp.tau_max)
        sure = mine.sure(tau)
        losses = {"hard": masked(strong.logits, label, mask, mixed.valid, hp.u_dice)}
        if hp.kl:
            target = (mixed if hp.kl_target_cutmix else mine).probability
            divergence = F.kl_div(strong.logits.log_softmax(1), target, reduction="none").sum(1)
            losses["kl"] = mean(divergence, mixed.sure(tau), mixed.valid)
        if hp.fp:
            logits = perturbed(self.net, weak.skips, self.perturb, -n)
            losses["feature"] = masked(logits, mine.label, sure, mine.valid, hp.u_dice)
        if hp.pixel_prop:
            losses["corr"] = 0.5 * (masked(strong.spread, label, mask, mixed.valid)
                                    + masked(weak.spread[n:], mine.label, sure, mine.valid))
        return losses

    def view(self, image):
        """The `View` of images (B, C, *space)."""
        out = self.net(image)
        if not self.hp.pixel_prop:
            return View(out.logits, None, None, out.features.encoder)
        matrix, grid = self.head(out.features.encoder), self.head.grid(image.shape[2:])
        spread = correlation.propagate(out.logits, matrix, grid, self.hp.corr_down, self.hp.corr_apply)
        return View(out.logits, correlation.enlarge(spread, image.shape[2:]), matrix, out.features.encoder)

    def steady(self, image):
        """Probabilities of the network in eval mode, which leaves its batch-norm statistics alone."""
        return steady(self.net, image)

    def threshold(self, mine, mixed, active):
        """This step's threshold, 0-d; while `active` it first moves towards the network's confidence."""
        hp = self.hp
        if hp.dynamic_tau:
            valid = mine.valid if hp.tau_mask == "weak" else mixed.valid
            seen = correlation.class_confidence(mine.confidence, mine.label, valid, self.task.classes, hp.tau_stat)
            moved = hp.tau_momentum * self.tau + (1 - hp.tau_momentum) * seen
            self.tau.copy_(torch.where(active & seen.isfinite(), moved, self.tau))
        return self.tau.clone()

    def regions(self, weak, mine, mixed, box, tau):
        """Pseudo-labels of the mixed view and the mask of confident voxels, enlarged where regions are propagated."""
        hp, space, sure = self.hp, box.shape[1:], mixed.sure(tau.clamp(max=self.hp.tau_max))
        if not hp.region_prop:
            return mixed.label, sure
        grid = self.head.grid(space)
        foreground = correlation.reduce(mine.probability, grid).argmax(1).flatten(1) > 0
        rows = correlation.sample_rows(hp.sampling, hp.n_rows, foreground)
        shapes = correlation.shapes(weak.matrix[-len(box):].detach(), rows, grid, space, hp.shape_mode)
        return correlation.propagate_regions(mixed.label, sure, mixed.valid & ~box, shapes,
                                             tau.clamp(max=hp.tau_reg_max), self.task.classes, hp.region_order)
