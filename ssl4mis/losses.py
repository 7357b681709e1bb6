"""Losses of the field as pure functions, for any number of classes and dimensions.

Logits and probabilities are (B, K, *space) float32, labels (B, *space) integers.
"""
import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTH = 1e-5


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean voxel cross-entropy."""
    return F.cross_entropy(logits, label.long())


def dice(probability: Tensor, label: Tensor, classes: str = "all") -> Tensor:
    """1 - soft Dice with squared denominators, sums over batch and voxels, mean over classes.

    `classes`: "all" (SSL4MIS) or "foreground" (UA-MT, DTC, MCF). ValueError for other values.
    """
    if classes not in ("all", "foreground"):
        raise ValueError(f"dice classes {classes!r}: expected all or foreground")
    first = 1 if classes == "foreground" else 0
    terms = []
    for index in range(first, probability.shape[1]):
        p, y = probability[:, index], (label == index).to(probability.dtype)
        terms.append(1 - (2 * (p * y).sum() + SMOOTH) / (p.square().sum() + y.sum() + SMOOTH))
    return torch.stack(terms).mean()


def segmentation(logits: Tensor, label: Tensor, classes: str = "all") -> Tensor:
    """The supervised loss of the field: 0.5 (cross-entropy + Dice)."""
    return 0.5 * (cross_entropy(logits, label) + dice(logits.softmax(1), label, classes))


def softmax_mse(logits: Tensor, target: Tensor) -> Tensor:
    """Squared difference of two softmaxes, elementwise (B, K, *space)."""
    return (logits.softmax(1) - target.softmax(1)).square()


def entropy(probability: Tensor) -> Tensor:
    """-sum_k p log(p + 1e-6) in nats, (B, 1, *space)."""
    return -(probability * torch.log(probability + 1e-6)).sum(1, keepdim=True)
