"""Adversarial examples of a segmentation network, for methods that train with them.

The attacked network is in evaluation mode meanwhile, so that its batch norms stay as they are, and gets no gradients.
Intensities have no natural bounds or unit: an example keeps to those of its patch, and sizes are shares of their range.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.base import evaluating

TAILS = 0.005  # share of voxels on either side of the range of a patch's intensities


def fgsm(net: nn.Module, image: Tensor, label: Tensor, epsilon: float) -> Tensor:
    """Images whose every voxel went `epsilon` of the range towards a larger cross-entropy (Goodfellow et al., 2015)."""
    image = full(image)
    # sums, since half precision may lose what a mean leaves of a gradient
    slope = gradient(net, image, lambda logits: F.cross_entropy(logits, label.long(), reduction="sum"))
    return bounded(image, epsilon * extent(image) * slope.sign())


def vat(net: nn.Module, image: Tensor, epsilon: float) -> Tensor:
    """Images that went `epsilon` of the range, in root mean square, to where predictions change (Miyato et al., 2018).

    The direction is the gradient of the Kullback-Leibler divergence at an equally large random change: at a smaller
    one, half precision would see no divergence.
    """
    image = full(image)
    size = epsilon * extent(image)
    with evaluating(net), torch.no_grad():
        said = net(image).logits.log_softmax(1)
    away = image + size * unit(torch.randn_like(image))
    slope = gradient(net, away, lambda logits: F.kl_div(logits.log_softmax(1), said, reduction="sum", log_target=True))
    return bounded(image, size * unit(slope))


def gradient(net: nn.Module, image: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient by an image of a loss of a network's logits; the network is in evaluation mode and gets none."""
    image = image.detach().requires_grad_()
    with evaluating(net):  # and still while its activations are computed once more
        return torch.autograd.grad(loss(net(image).logits), image)[0]


def full(image: Tensor) -> Tensor:
    """The image in float32, or wider if it is."""
    return image.to(torch.promote_types(image.dtype, torch.float32))


def extent(image: Tensor) -> Tensor:
    """The range of intensities without their tails, of each sample and channel, (B, C, 1, ...)."""
    values = image.flatten(2)
    few = max(1, round(TAILS * values.shape[2]))
    low, high = (values.kthvalue(place, 2).values for place in (few, values.shape[2] - few + 1))
    return (high - low).view(*high.shape, *[1] * (image.ndim - 2))


def bounded(image: Tensor, change: Tensor) -> Tensor:
    """The image plus a change, within the intensities that each sample and channel has."""
    space = tuple(range(2, image.ndim))
    return (image + change).clamp(image.amin(space, keepdim=True), image.amax(space, keepdim=True))


def unit(direction: Tensor) -> Tensor:
    """The direction of each sample (B, ...) with a root mean square of 1; 0 where it is 0."""
    axes, tiny = tuple(range(1, direction.ndim)), torch.finfo(direction.dtype).tiny
    direction = direction / direction.abs().amax(axes, keepdim=True).clamp(min=tiny)  # squares of small numbers are 0
    return direction / direction.square().mean(axes, keepdim=True).sqrt().clamp(min=tiny)
