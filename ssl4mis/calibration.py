"""Whether predicted probabilities are what they say they are."""
import torch
from torch import Tensor

BINS = 15
LEAST = 1e-12  # what a probability of 0 counts as in the likelihood, which would be infinite


@torch.inference_mode()
def calibration(probabilities: Tensor, truth: Tensor) -> dict[str, float]:
    """Expected calibration error and negative log-likelihood over all voxels of a case.

    `ece` is the mean distance of confidence and accuracy of the most probable class in 15 equal bins of confidence,
    0..1; `nll` the mean of -log p(true class) in nats. Most voxels are background, far from any border, so both are
    small, and depend on how far a case is cropped: they compare methods on one data set.

    Args:
        probabilities: (K, *space) float32. truth: classes, (*space), integers below K.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    truth = truth.long()
    confidence, best = probabilities.max(0)
    right = (best == truth).flatten().double()
    confidence = confidence.flatten().double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS)  # a bin holds its upper edge
    gaps = torch.bincount(bins, right - confidence, BINS + 1)
    likely = probabilities.gather(0, truth[None]).clamp(LEAST, 1)
    return {"ece": float(gaps.abs().sum() / len(right)), "nll": float(-likely.log().double().mean())}
