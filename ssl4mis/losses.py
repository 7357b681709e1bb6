"""Losses of the field as pure functions, for any number of classes and dimensions.

Logits and probabilities are (B, K, *space) float32, labels (B, *space) integers.
"""
import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTH = 1e-5


def cross_entropy(logits: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean voxel cross-entropy, over the voxels of a mask (B, *space) where one is given; 0 where it is empty."""
    return _negative_log(logits.log_softmax(1), label, mask)


def _negative_log(log_probability: Tensor, label: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return F.nll_loss(log_probability, label.long())
    own = log_probability.gather(1, label.long()[:, None])[:, 0]  # nll_loss takes longer
    return -(own * mask).sum() / (mask.sum() + 1e-16)


def dice(probability: Tensor, label: Tensor, classes: str = "all", mask: Tensor | None = None,
         squared: bool = True, per_sample: bool = False, smooth: float = SMOOTH) -> Tensor:
    """1 - soft Dice, mean over classes; by default with squared denominators and sums over batch and voxels.

    Args:
        probability, label: as above.
        classes: "all" (SSL4MIS) or "foreground" (UA-MT, DTC, MCF). ValueError for other values.
        mask: (B, *space) bool, the voxels that count.
        squared: whether probabilities are squared in the denominator (not in BCP on LA, CML, MC-Net).
        per_sample: a Dice of each sample, then their mean (BCP on LA, CML).
        smooth: added to both parts of the fraction.
    """
    if classes not in ("all", "foreground"):
        raise ValueError(f"dice classes {classes!r}: expected all or foreground")
    first = 1 if classes == "foreground" else 0
    axes = tuple(range(1 if per_sample else 0, probability.ndim - 1))
    terms = []
    for index, p in enumerate(probability.unbind(1)[first:], first):
        y = label == index
        y, inside = (y, p) if mask is None else (y & mask, p * mask)
        y, size = y.to(p.dtype), inside * p if squared else inside
        terms.append(1 - (2 * (p * y).sum(axes) + smooth) / (size.sum(axes) + y.sum(axes) + smooth))
    return torch.stack(terms).mean()


def segmentation(logits: Tensor, label: Tensor, classes: str = "all", mask: Tensor | None = None, **kind) -> Tensor:
    """The supervised loss of the field: 0.5 (cross-entropy + Dice), on a mask where given; `kind` goes to `dice`."""
    logs = logits.log_softmax(1)  # of both terms
    return 0.5 * (_negative_log(logs, label, mask) + dice(logs.exp(), label, classes, mask, **kind))


def softmax_mse(logits: Tensor, target: Tensor) -> Tensor:
    """Squared difference of two softmaxes, elementwise (B, K, *space)."""
    return (logits.softmax(1) - target.softmax(1)).square()


def entropy(probability: Tensor) -> Tensor:
    """-sum_k p log(p + 1e-6) in nats, (B, 1, *space)."""
    return -(probability * torch.log(probability + 1e-6)).sum(1, keepdim=True)
