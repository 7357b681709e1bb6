"""CTCT on logits that are given: who teaches whom, who learns when, which two networks they are, and refusals."""

import math

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec, Output, PatchError
from ssl4mis import config
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, dice, segmentation
from ssl4mis.method import Task
from ssl4mis.methods.ctct import CTCT, PARTNERS, TRANSFORMERS, Config

TOTAL = 1000
END = Clock(torch.tensor(TOTAL), TOTAL)
LABEL = torch.tensor([[[0, 1], [1, 1]]])


class Fixed(nn.Module):
    """A network that says the same to every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.calls = nn.Parameter(logits.clone()), 0

    def forward(self, image):
        self.calls += 1
        return Output({"seg": self.logits[:len(image)]}, None)


class Building:
    """Makes networks that say given logits, and remembers for which names."""

    def __init__(self, network, logits, too_small=()):
        self.network, self.waiting, self.too_small, self.asked = network, list(logits), too_small, []

    def __call__(self, network=None):
        self.asked.append(network)
        if network in self.too_small:
            raise PatchError(f"patch [16, 16]: {network} needs more")
        return Fixed(self.waiting.pop(0))


def random_logits(classes=2, space=(2, 2)):
    torch.manual_seed(0)
    return torch.randn(2, 2, classes, *space)


def ctct(logits, network="vnet", **hp):
    return CTCT(Building(network, logits), Task(logits[0].shape[1], logits[0].ndim - 2), Config(**hp))


def batch(label=LABEL, unlabeled=1):
    images = [torch.zeros(count, 1, *label.shape[1:]) for count in (len(label), unlabeled)]
    return Batch(torch.cat(images), Half(images[0], label, ("l",)), Half(images[1], None, ("u",) * unlabeled))


def phases(method, data, clock=END):
    """The terms of a step by phase."""
    (stage,) = method.stages()
    return {phase.name: method(data, clock._replace(phase=phase.name)).terms for phase in stage.phases}


def gradients(method, term):
    """Gradients of a term with respect to the logits of both networks."""
    parameters = [method.first.logits, method.second.logits]
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(("classes", "space"), [(2, (6, 5)), (4, (4, 3, 5))])
@pytest.mark.parametrize("loss", ["dice", "ce", "ce+dice"])
def test_terms(optimizer, classes, space, loss):
    logits, label = random_logits(classes, space), torch.randint(classes, (1, *space))
    method = ctct(logits, optimizer=optimizer, loss=loss, weight=0.3)
    terms = {name: value for found in phases(method, batch(label)).values() for name, value in found.items()}
    assert set(terms) == {"supervised/first", "supervised/second", "cross/first", "cross/second"}
    kind = {"dice": lambda x, y: dice(x.softmax(1), y), "ce": cross_entropy, "ce+dice": segmentation}[loss]
    for mine, name, theirs in ((logits[0], "first", logits[1]), (logits[1], "second", logits[0])):
        assert torch.allclose(terms[f"supervised/{name}"], segmentation(mine[:1], label))
        assert torch.allclose(terms[f"cross/{name}"], 0.3 * kind(mine[1:], theirs[1:].argmax(1)).double())


def test_cross_teaching_by_hand():
    """Undecided where the other one is certain: of each class 2 * n/2 over 4 * 1/4 + n, for n of 1 and 3 voxels."""
    certain = 9.0 * nn.functional.one_hot(LABEL, 2).movedim(-1, 1).float()
    method = ctct([torch.zeros(2, 2, 2, 2), torch.cat([certain, certain])], optimizer="sgd", weight=1.0)
    assert method(batch(), END).terms["cross/first"].item() == pytest.approx(1 - (1 / 2 + 3 / 4) / 2, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_term_moves_its_own_network_and_cross_terms_the_unlabeled_half(optimizer):
    method = ctct(random_logits(), optimizer=optimizer)
    terms = {name: value for found in phases(method, batch()).values() for name, value in found.items()}
    for own, name in enumerate(("first", "second")):
        for term, half in (("supervised", 0), ("cross", 1)):
            found = gradients(method, terms[f"{term}/{name}"])
            assert found[own][half].any() and not found[own][1 - half].any() and not found[1 - own].any()


# --- phases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "slow"), [("vnet", "second"), ("unetr", "first")])
def test_the_transformer_learns_by_adam_in_a_phase_of_its_own(network, slow):
    method = ctct(random_logits(), network, rate=3e-4)
    (stage,) = method.stages()
    assert [phase.name for phase in stage.phases] == ["segment", "transformer"]
    assert stage.phases[0].adam is None and stage.phases[1].adam.rate == 3e-4
    fast = "first" if slow == "second" else "second"
    for name, found in phases(method, batch()).items():
        net = slow if name == "transformer" else fast
        assert set(found) == {f"supervised/{net}", f"cross/{net}"}
        (parameter,) = method.trainable(name)
        assert parameter is getattr(method, net).logits
    assert method.first.calls == method.second.calls == 1 and method.kept is None


def test_by_sgd_both_learn_in_one_phase():
    method = ctct(random_logits(), optimizer="sgd")
    (stage,) = method.stages()
    assert [phase.name for phase in stage.phases] == ["segment"] and stage.phases[0].adam is None
    assert len(method.trainable("segment")) == 2


def test_a_step_of_one_phase_leaves_what_the_other_one_will_learn():
    """The transformer's loss is that of before the CNN moved."""
    logits = random_logits()
    still, moved = (ctct(logits) for _ in range(2))
    expected = phases(still, batch())["transformer"]
    first = moved(batch(), END)
    sum(first.terms.values()).backward()
    with torch.no_grad():
        moved.first.logits.mul_(-5)
    found = moved(batch(), END._replace(phase="transformer")).terms
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    sum(found.values()).backward()
    assert moved.second.logits.grad.any()


def test_a_phase_can_be_called_alone():
    method = ctct(random_logits())
    for _ in range(2):
        found = method(batch(), END._replace(phase="transformer")).terms
        assert set(found) == {"supervised/second", "cross/second"} and method.kept is None
        sum(found.values()).backward()


@pytest.mark.parametrize(("hp", "step", "share"), [
    ({}, 0, math.exp(-5)), ({}, TOTAL, 1), ({}, TOTAL // 2, math.exp(-5 / 4)), ({"ramp": 0.5}, TOTAL // 2, 1),
    ({"ramp_every": 150}, 299, math.exp(-5 * 0.85**2)),
])
def test_weight(hp, step, share):
    watch = ctct(random_logits(), **hp)(batch(), Clock(torch.tensor(step), TOTAL)).watch
    assert watch["weight"].item() == pytest.approx(0.1 * share)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_without_unlabeled_samples_only_the_labeled_terms_are_left(optimizer):
    found = phases(ctct(random_logits(), optimizer=optimizer), batch(unlabeled=0))
    assert {name for terms in found.values() for name in terms} == {"supervised/first", "supervised/second"}


@pytest.mark.parametrize(("evaluate", "expected"), [("first", 0.75), ("second", 0.5), ("mean", 0.625)])
def test_prediction(evaluate, expected):
    odds = math.log(3) * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    method = ctct([odds, torch.zeros_like(odds)], evaluate=evaluate)
    assert method.predict(torch.zeros(1, 1, 1, 1))[0, 1].item() == pytest.approx(expected)


# --- partners --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", networks.NAMES)
@pytest.mark.parametrize("dims", [2, 3])
def test_one_is_a_cnn_and_the_other_a_transformer(network, dims):
    build = Building(network, [torch.zeros(1)] * 2)
    method = CTCT(build, Task(2, dims), Config())
    assert build.asked == [None, method.partner]
    assert (network in TRANSFORMERS) != (method.partner in TRANSFORMERS)
    (remark,) = method.remarks()
    assert method.partner in remark and "\n" not in remark


@pytest.mark.parametrize("dims", [2, 3])
def test_a_partner_that_cannot_take_the_patch_is_passed_over(dims):
    known = list(PARTNERS[dims])
    build = Building("vnet", [torch.zeros(1)] * 2, known[:-1])
    assert CTCT(build, Task(2, dims), Config()).partner == known[-1]
    with pytest.raises(UserError, match="hp.partner auto: patch .* needs more") as error:
        CTCT(Building("vnet", [torch.zeros(1)], known), Task(2, dims), Config())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("patch", [(112, 112, 80), (64, 64, 32), (96, 96, 96), (32, 32, 16), (256, 256), (224, 224)])
def test_patches_of_the_suite(patch):
    """The preferred partner takes them all."""
    build = networks.Build("vnet", 2, NetSpec(1, patch, 1))
    known = list(PARTNERS[len(patch)])
    assert CTCT(build, Task(2, len(patch)), Config()).partner == known[0]


def test_a_partner_by_name():
    method = ctct(random_logits(), partner="swin_unetr")
    assert method.partner == "swin_unetr" and method.remarks() == ()


@pytest.mark.parametrize(("network", "partner", "said"), [
    ("vnet", "resvnet", "hp.partner resvnet: expected a transformer beside vnet, such as --hp.partner unetr"),
    ("vnet", "vnet", "hp.partner vnet: expected a transformer"),
    ("unetr", "swin_unetr", "hp.partner swin_unetr: expected a CNN beside unetr, such as --hp.partner vnet"),
])
def test_two_of_a_kind_are_refused(network, partner, said):
    with pytest.raises(UserError, match=said) as error:
        CTCT(Building(network, random_logits()), Task(2, 3), Config(partner=partner))
    assert "\n" not in str(error.value)


def test_a_patch_that_the_named_partner_cannot_take_is_refused():
    build = networks.Build("vnet", 2, NetSpec(1, (16, 16), 1))
    with pytest.raises(UserError, match=r"hp.partner swin_unetr: patch \[16, 16\].*multiples of \[32, 32\]") as error:
        CTCT(build, Task(2, 2), Config(partner="swin_unetr"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("hp", "said"), [({"partner": "vnot"}, "vnot"), ({"ramp_every": 0}, "ramp_every"),
                                          ({"rate": -1.0}, "hp.rate -1.0"), ({"weight": float("nan")}, "weight")])
def test_impossible_hyper_parameters_are_refused(hp, said):
    with pytest.raises(UserError, match=said):
        Config(**hp)


@pytest.mark.parametrize(("words", "optimizer", "batch"), [
    ("LA", "adam", 4), ("ACDC", "adam", 4), ("ACDC --protocol slices", "sgd", 16), ("BraTS", "adam", 4),
])
def test_presets(words, optimizer, batch):
    (spec,), _ = config.parse(f"--method ctct --dataset {words}".split())
    assert (spec.hp["optimizer"], spec.labeled_batch + spec.unlabeled_batch) == (optimizer, batch)
