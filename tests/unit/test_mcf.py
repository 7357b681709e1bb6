"""MCF on logits that are given: who wins, who learns, where both are corrected, and what it refuses."""

import math

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec, Output
from ssl4mis import config
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.mcf import MCF, Config, difference, mean_square, sharpened

TOTAL = 1000
END = Clock(torch.tensor(TOTAL), TOTAL)
LABEL = torch.tensor([[[0, 1], [1, 1]]])


class Fixed(nn.Module):
    """A network that says the same to every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image):
        return Output({"seg": self.logits}, None)


def mcf(first, second, **hp):
    """The method with two networks that say these logits."""
    def build(network=None):
        return Fixed((second if network else first).clone())

    return MCF(build, Task(first.shape[1], first.ndim - 2), Config(**hp))


def batch(label=LABEL, unlabeled=1):
    images = [torch.zeros(count, 1, *label.shape[1:]) for count in (len(label), unlabeled)]
    return Batch(torch.cat(images), Half(images[0], label, ("l",)), Half(images[1], None, ("u",) * unlabeled))


def toward(label, strength, classes=2):
    """Logits that are `strength` for the label's class and 0 for the others."""
    return strength * nn.functional.one_hot(label, classes).movedim(-1, 1).float()


def both(labeled, unlabeled=None):
    """Logits of one labeled and one unlabeled sample."""
    return torch.cat([labeled, torch.zeros_like(labeled) if unlabeled is None else unlabeled])


def gradients(method, term):
    """Whether a term moves the logits, of the first network and of the second."""
    parameters = [method.first.logits, method.second.logits]
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return [g is not None and bool(g.any()) for g in found]


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("space", [(6, 5), (4, 3, 5)])
def test_networks_that_agree_have_nothing_to_rectify(classes, space):
    torch.manual_seed(0)
    logits, label = torch.randn(2, classes, *space), torch.randint(classes, (1, *space))
    method = mcf(logits, logits)
    terms, watch = method(batch(label), END)
    assert watch["rectification/first"] == watch["rectification/second"] == watch["differing"] == 0
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_supervised_terms_are_sums_of_cross_entropy_foreground_dice_and_rectification():
    torch.manual_seed(0)
    label = torch.randint(3, (1, 4, 4))
    logits = {name: torch.randn(2, 3, 4, 4) for name in ("first", "second")}
    terms, watch = mcf(*logits.values(), rectification=0.25)(batch(label), END)
    for name, values in logits.items():
        segmented = cross_entropy(values[:1], label) + dice(values[:1].softmax(1), label, "foreground")
        assert torch.allclose(terms[f"supervised/{name}"], segmented + 0.25 * watch[f"rectification/{name}"])
        assert watch[f"rectification/{name}"] > 0


def test_rectification_of_two_classes_by_hand():
    """They differ on two of four voxels, where the truth is 1 and p is 1/4 and 3/4; elsewhere p is no matter."""
    odds = math.log(3)
    first, second = toward(LABEL, 5.0), toward(LABEL, 5.0)
    first[0, :, 1] = torch.tensor([[odds, odds], [0, 0]])
    second[0, :, 1] = torch.tensor([[0, 0], [odds, odds]])
    watch = mcf(both(first), both(second))(batch(), END).watch
    assert watch["differing"] == 0.5
    assert watch["rectification/first"].item() == pytest.approx(0.75**2)
    assert watch["rectification/second"].item() == pytest.approx(0.25**2)


def test_rectification_of_three_classes_by_hand():
    """Both foreground classes differ too. p is (1/5, 1/5, 3/5), the truth 1: squares 1/25, 16/25 and 9/25."""
    error = torch.tensor([0.2, -0.8, 0.6]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    mask = difference(toward(LABEL, 1.0, 3), toward(LABEL + torch.tensor([[0, 0], [0, 1]]), 1.0, 3))
    assert mask.tolist() == [[[0, 0], [0, 1]]]
    assert mean_square(error, mask).item() == pytest.approx(26 / 25 / 3)
    assert mean_square(error, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_sharpening_is_a_normalized_power(temperature):
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    power = logits.softmax(1) ** (1 / temperature)
    assert torch.allclose(sharpened(logits, temperature), power / power.sum(1, keepdim=True), rtol=1e-12)


def test_sharpening_survives_improbable_classes():
    assert sharpened(torch.tensor([[-200.0, 200.0]]), 0.1).tolist() == [[0, 1]]


@pytest.mark.parametrize(("strengths", "first_wins"), [((2, 1), True), ((1, 2), False), ((1, 1), False)])
def test_the_better_network_teaches_and_the_other_learns(strengths, first_wins):
    """A tie is won by the second network."""
    torch.manual_seed(0)
    unlabeled = torch.randn(2, 1, 2, 2, 2)
    method = mcf(*(both(toward(LABEL, s), u) for s, u in zip(strengths, unlabeled, strict=True)))
    terms, watch = method(batch(), END)
    assert watch["first_wins"] == first_wins
    assert gradients(method, terms["consistency"]) == [not first_wins, first_wins]
    assert gradients(method, terms["supervised/first"]) == [True, False]
    assert gradients(method, terms["supervised/second"]) == [False, True]


def test_dice_decides_and_not_cross_entropy():
    """The second network is sure of all voxels but one, which costs little Dice and much cross-entropy."""
    label = torch.tensor([[[0] * 4] * 2 + [[1] * 4] * 2])
    first, second = toward(label, 1.0), toward(label, 9.0)
    second[0, 1, 0, 0] = 29.0
    assert cross_entropy(first, label) < cross_entropy(second, label)
    assert not mcf(both(first), both(second))(batch(label), END).watch["first_wins"]


@pytest.mark.parametrize(("criterion", "expected"), [("mse", 0.5**2), ("softmax_mse", (1 / (1 + math.e) - 0.5) ** 2)])
def test_consistency_by_hand(criterion, expected):
    """The winner says 0 and 1 for certain, the learner 1/2 and 1/2; with another softmax 1/(1+e) and 1/2."""
    certain = torch.tensor([-9.0, 9.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    method = mcf(both(toward(LABEL, 2.0), certain), both(toward(LABEL, 1.0)), weight=0.3, criterion=criterion)
    assert method(batch(), END).terms["consistency"].item() == pytest.approx(0.3 * expected)


@pytest.mark.parametrize(("hp", "step", "share"), [
    ({}, 0, math.exp(-5)), ({}, TOTAL, 1), ({}, TOTAL // 2, math.exp(-5 / 4)), ({"ramp": 0.5}, TOTAL // 2, 1),
    ({"ramp_every": 150}, 299, math.exp(-5 * 0.85**2)),
])
def test_weight(hp, step, share):
    method = mcf(both(toward(LABEL, 1.0)), both(toward(LABEL, 2.0)), **hp)
    assert method(batch(), Clock(torch.tensor(step), TOTAL)).watch["weight"].item() == pytest.approx(0.1 * share)


def test_without_unlabeled_samples_only_the_labeled_terms_are_left():
    method = mcf(toward(LABEL, 1.0), toward(1 - LABEL, 1.0))
    terms, _ = method(batch(unlabeled=0), END)
    assert set(terms) == {"supervised/first", "supervised/second"}
    assert terms == {name: method(batch(), END).terms[name] for name in terms}


@pytest.mark.parametrize(("evaluate", "expected"), [("first", 0.75), ("second", 0.5), ("mean", 0.625)])
def test_prediction(evaluate, expected):
    odds = math.log(3) * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    method = mcf(odds, torch.zeros_like(odds), evaluate=evaluate)
    assert method.predict(torch.zeros(1, 1, 1, 1))[0, 1].item() == pytest.approx(expected)


def test_two_networks_of_their_own_with_he_normal_weights():
    torch.manual_seed(0)
    build = networks.Build("vnet", 2, NetSpec(1, (16, 16), width=16))
    asked = []

    def remember(network=None):
        asked.append(network)
        return build()

    method = MCF(remember, Task(2, 2), Config(partner="unet"))
    assert asked == [None, "unet"]
    for net in (method.first, method.second):
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 10_000:
                fan_in = layer.weight[0].numel()
                assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
    assert not torch.equal(next(method.first.parameters()), next(method.second.parameters()))


@pytest.mark.parametrize(("network", "advice"), [("vnet", "--hp.partner resvnet"), ("resvnet", "--hp.partner vnet")])
def test_the_same_network_twice_is_refused(network, advice):
    build = networks.Build(network, 2, NetSpec(1, (16, 16), width=2))
    with pytest.raises(UserError, match=advice) as error:
        MCF(build, Task(2, 2), Config(partner=network))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("hp", "said"), [({"partner": "vnot"}, "vnot"), ({"temperature": 0.0}, "temperature"),
                                          ({"temperature": float("nan")}, "temperature"),
                                          ({"ramp_every": 0}, "ramp_every")])
def test_impossible_hyper_parameters_are_refused(hp, said):
    with pytest.raises(UserError, match=said):
        Config(**hp)


def test_published_recipe_has_no_rotation_or_flip():
    for name in ("LA", "Pancreas"):
        (spec,), _ = config.parse(["--method", "mcf", "--dataset", name])
        assert spec.augmentation == []
