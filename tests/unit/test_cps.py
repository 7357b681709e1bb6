"""Which network teaches which, on which images, and which one predicts."""

import math

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec, Output
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.losses import cross_entropy
from ssl4mis.method import Task
from ssl4mis.methods.cps import CPS, Config

SIDE, CLOCK = 16, Clock(torch.tensor(0), 100)


def method(**hp):
    torch.manual_seed(0)
    return CPS(networks.Build("vnet", 3, NetSpec(1, (SIDE, SIDE), width=8)), Task(3, 2, 1), Config(**hp))


def batch(n=2):
    image = torch.randn(4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    label = (image[:n, 0] > 0).to(torch.uint8)
    names = ("a", "b", "c", "d")
    return Batch(image, Half(image[:n], label, names[:n]), Half(image[n:], None, names[n:]))


def moved(module):
    return any(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("images", ["unlabeled", "all"])
@pytest.mark.parametrize("mine, other", [("first", "second"), ("second", "first")])
def test_a_cross_term_moves_its_own_network_only(images, mine, other):
    cps = method(images=images)
    cps(batch(), CLOCK).terms[f"cross/{mine}"].backward()
    assert moved(getattr(cps, mine)) and not moved(getattr(cps, other))


class Fixed(nn.Module):
    """A network with one answer."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, image):
        return Output({"seg": self.logits}, None)


def answers(maps, **hp):
    """The method with networks that answer with these logits."""
    cps = method(**hp)
    cps.first, cps.second = map(Fixed, maps)
    return cps


def test_the_original_weighs_all_images_from_the_first_step():
    maps = torch.randn(2, 4, 3, SIDE, SIDE)
    terms, watch = answers(maps, images="all", weight=1.5, ramp=0.0)(batch(), CLOCK)
    assert watch["weight"] == 1.5
    assert terms["cross/first"] == pytest.approx(1.5 * cross_entropy(maps[0], maps[1].argmax(1)).item(), rel=1e-6)
    assert terms["cross/second"] == pytest.approx(1.5 * cross_entropy(maps[1], maps[0].argmax(1)).item(), rel=1e-6)


def test_known_cross_entropy():
    """Probabilities (1/4, 3/4) against the other's class 0; logits (1, -1), which choose it, against class 1."""
    first = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1).expand(4, 2, SIDE, SIDE)
    second = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(4, 2, SIDE, SIDE)
    cps = answers((first, second), weight=1.0, ramp=0.0)
    terms = cps(batch(), CLOCK).terms
    assert terms["cross/first"] == pytest.approx(math.log(4), rel=1e-6)
    assert terms["cross/second"] == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6)


def test_no_unlabeled_samples_leave_the_supervised_terms():
    assert set(method(images="all")(batch(4), CLOCK).terms) == {"supervised/first", "supervised/second"}


def test_prediction_of_the_first_network_or_of_both():
    maps = torch.randn(2, 4, 3, SIDE, SIDE)
    probabilities = maps.softmax(2)
    assert torch.equal(answers(maps).predict(None), probabilities[0])
    assert torch.allclose(answers(maps, evaluate="mean").predict(None), probabilities.mean(0))


def test_initial_weights_are_he_normal_and_glorot_normal():
    """Variance of the deepest 3x3 convolution: 2 / inputs, and 2 / (inputs + outputs), times 1/9."""
    cps = method()
    weights = [max(net.parameters(), key=torch.numel) for net in (cps.first, cps.second)]
    channels = weights[0].shape[0]
    assert weights[0].std().item() == pytest.approx(math.sqrt(2 / (9 * channels)), rel=0.02)
    assert weights[1].std().item() == pytest.approx(math.sqrt(1 / (9 * channels)), rel=0.02)


@pytest.mark.parametrize("step, weight", [(0, 0.000674), (149, 0.000674), (299, 0.000708), (15000, 0.028650)])
def test_the_weight_ramps_up_in_blocks(step, weight):
    clock = Clock(torch.tensor(step), 30000)
    assert method(ramp_every=150)(batch(), clock).watch["weight"].item() == pytest.approx(weight, abs=1e-6)
