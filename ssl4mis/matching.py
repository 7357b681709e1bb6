"""What FixMatch and its successors share: confident targets, boxes of another sample, losses where targets are sure.

A weak view is a crop as it is, a strong view the same crop with other intensities; a partner is another sample, of
which a box replaces a part of a crop, of its target and of what is valid in it. Nothing here waits for the device.
Source: Sohn et al., FixMatch, NeurIPS 2020, as Yang et al., UniMatch, CVPR 2023, and CorrMatch use it to segment.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from networks.base import without_learning
from ssl4mis import augment
from ssl4mis.batch import Half
from ssl4mis.errors import UserError
from ssl4mis.losses import dice
from ssl4mis.method import within

IGNORED = 255  # a label without a class


class Target(NamedTuple):
    """Class probabilities, the largest of them, its class, and the voxels that are inside the volumes."""

    probability: Tensor
    confidence: Tensor
    label: Tensor
    valid: Tensor

    @classmethod
    def of(cls, probability: Tensor, valid: Tensor) -> "Target":
        """The target of probabilities (B, K, *space) and valid voxels (B, *space)."""
        return cls(probability, *probability.max(1), valid)

    def sure(self, tau) -> Tensor:
        """(B, *space) bool: valid and at least as confident as a threshold."""
        return (self.confidence >= tau) & self.valid

    def mixed(self, box: Tensor, other: "Target") -> "Target":
        """This target with another one in place of it inside a box (B, *space)."""
        return Target.of(paste(box, other.probability, self.probability), torch.where(box, other.valid, self.valid))


def sureness(sure: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Shares of the voxels (B, *space), and of those of a foreground label, that are sure: what a run should watch.

    Background alone can be sure for a whole run, which is then of no use.
    """
    foreground = label > 0
    return {"sure": sure.float().mean(),
            "sure/foreground": (sure & foreground).sum() / foreground.sum().clamp(min=1)}


def check_boxes(hp) -> None:
    """For a `Config`'s `__post_init__`: UserError unless `cutmix`, `box_min` and `box_max` are possible shares."""
    within(hp, 0, 1, "cutmix", "box_min", "box_max")
    if hp.box_min > hp.box_max:
        raise UserError(f"hp.box_min {hp.box_min}: expected at most hp.box_max {hp.box_max}")


def boxes(hp, image: Tensor) -> Tensor:
    """Random boxes (B, *space) bool for images (B, C, *space), as `cutmix`, `box_min` and `box_max` say."""
    return augment.boxes(len(image), image.shape[2:], hp.cutmix, (hp.box_min, hp.box_max), image.device)


def paste(box: Tensor, other: Tensor, mine: Tensor) -> Tensor:
    """Maps (B, C, *space): the other ones inside a box (B, *space), mine outside."""
    return torch.where(box[:, None], other, mine)


def steady(net: nn.Module, image: Tensor) -> Tensor:
    """Probabilities of a network in evaluation mode, without dropout; its batch-norm statistics stay as they are."""
    return without_learning(net, image).logits.softmax(1)


def targets(predict: Callable[[Tensor], Tensor], unlabeled: Half, partner: Half,
            logits: Tensor | None = None) -> tuple[Target, Target]:
    """The targets of unlabeled samples and of their partners.

    Args:
        predict: images to probabilities, without gradient. unlabeled, partner: as many samples each.
        logits: of the unlabeled samples in a training pass, where those are to teach.
    """
    if logits is None:
        mine, other = predict(torch.cat([unlabeled.image, partner.image])).chunk(2)
    else:
        mine, other = logits.detach().softmax(1), predict(partner.image)
    return Target.of(mine, unlabeled.valid), Target.of(other, partner.valid)


def perturbed(net, features, dropout: nn.Module, count: int) -> Tensor:
    """Logits that a `SegNet` decodes from the features of the last samples after a dropout of their channels."""
    return net.decode([dropout(last(level, count)) for level in features]).logits


def last(features: Tensor, count: int) -> Tensor:
    """The last samples of (B, C, *space); sliced with channels last, so that the gradient needs no other layout."""
    return features.movedim(1, -1)[-count:].movedim(-1, 1)


def mean(values: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
    """Sum over a mask, divided by the number of valid voxels."""
    return (values * mask).sum() / valid.sum().clamp(min=1)


def masked(logits: Tensor, label: Tensor, mask: Tensor, valid: Tensor, with_dice: bool = False) -> Tensor:
    """Cross-entropy over a mask, divided by the number of valid voxels; or its mean with Dice over the mask."""
    logs = logits.log_softmax(1)
    own = torch.stack([(label == k) & mask for k in range(logs.shape[1])], 1)
    entropy = -(logs * own.to(logs.dtype)).sum() / valid.sum().clamp(min=1)  # nll_loss and gather take longer
    return 0.5 * (entropy + dice(logs.exp(), label, mask=mask)) if with_dice else entropy
