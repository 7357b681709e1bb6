"""What two networks agree on and withstand, adversarial examples by hand, and one network's views of turned images."""

import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from contract.ranks_worker import networks_of, setting, trained
from torch import nn

import networks
from networks.base import NetSpec, Output
from ssl4mis.attacks import bounded, extent, fgsm, gradient, unit, vat
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Task
from ssl4mis.methods import dct
from ssl4mis.methods.dct import DCT, divergence, jensen_shannon

HERE, SIDE = Path(__file__).resolve().parent, 16
END = Clock(torch.tensor(100), 100)
ODDS = math.log(3)


@dataclass(frozen=True)
class Config(dct.Config):
    adversarial: float = 0.05


class Adversarial(DCT):
    """The method with adversarial examples, as test_ranks.py takes it."""

    Config = Config


class Linear(nn.Module):
    """A network whose logits are intensities, times a weight per class, of the voxels that it looks at."""

    def __init__(self, weight=(2.0, -1.0), looks=1.0):
        super().__init__()
        self.weight, self.looks, self.seen = nn.Parameter(torch.tensor(weight)), looks, []

    def forward(self, image):
        self.seen.append(image.detach())
        return Output({"seg": self.looks * image[:, :1] * self.weight.view(1, -1, *[1] * (image.ndim - 2))}, None)


class Answers(nn.Module):
    """A network that answers its passes with these logits, in order."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = list(logits)

    def forward(self, image):
        return Output({"seg": self.logits.pop(0)}, None)


def method(cls=DCT, dims=2, width=4, **hp):
    torch.manual_seed(0)
    return cls(networks.Build("vnet", 2, NetSpec(1, (SIDE,) * dims, width)), Task(2, dims), cls.Config(**hp)).train()


def batch(labeled=2, samples=4, space=(SIDE, SIDE)):
    image = torch.randn(samples, 1, *space, generator=torch.Generator().manual_seed(1))
    label = (image[:labeled, 0] > 0).to(torch.uint8)
    return Batch(image, Half(image[:labeled], label, ("l",) * labeled),
                 Half(image[labeled:], None, ("u",) * (samples - labeled)))


def moved(module):
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


# --- agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
def test_divergence_is_0_for_equal_networks_and_ln_2_for_opposite_ones(classes):
    logits = torch.randn(2, classes, 3, 4, 5, dtype=torch.float64)
    assert jensen_shannon(logits, logits).item() == pytest.approx(0, abs=1e-12)
    sure = 1000 * torch.eye(classes, dtype=torch.float64)[:2].view(2, 1, classes, 1, 1)
    assert jensen_shannon(*sure).item() == pytest.approx(math.log(2))
    assert 0 < jensen_shannon(logits, logits.flip(1)).item() < math.log(2)


def test_divergence_by_hand():
    """3/4 and 1/4 against 1/4 and 3/4: ln 2 less the entropy of either."""
    first = torch.tensor([ODDS, 0.0]).view(1, 2, 1, 1).requires_grad_()
    second = first.detach().flip(1).requires_grad_()
    value = jensen_shannon(first, second)
    value.backward()
    assert value.item() == pytest.approx(math.log(2) - 0.75 * math.log(4 / 3) - 0.25 * math.log(4))
    assert first.grad.any() and torch.allclose(first.grad, second.grad.flip(1))


@pytest.mark.parametrize("dice", [True, False])
def test_terms_of_two_networks(dice):
    made, data, maps = method(weight=2.0, dice=dice), batch(), torch.randn(2, 4, 2, SIDE, SIDE, requires_grad=True)
    made.first, made.second = map(Answers, maps)
    terms, watch = made(data, END)
    assert set(terms) == {"supervised/first", "supervised/second", "agreement"} and watch["weight"] == 2
    loss = segmentation if dice else cross_entropy
    for name, logits in zip(("first", "second"), maps, strict=True):
        assert torch.equal(terms[f"supervised/{name}"], loss(logits[:2], data.labeled.label))
    assert terms["agreement"].item() == pytest.approx(2 * jensen_shannon(maps[0, 2:], maps[1, 2:]).item(), rel=1e-6)
    [grad] = torch.autograd.grad(terms["agreement"], maps)
    assert not grad[:, :2].any() and grad[0, 2:].any() and grad[1, 2:].any()


def test_the_networks_start_from_different_weights():
    first, second = ([p for p in net.parameters() if p.ndim > 1] for net in (method().first, method().second))
    assert not any(map(torch.equal, first, second))


@pytest.mark.parametrize("views", ["networks", "rotations"])
def test_no_unlabeled_samples_leave_the_supervised_terms(views):
    terms = method(Adversarial, views=views)(batch(4), END).terms
    assert set(terms) == ({"supervised/first", "supervised/second"} if views == "networks" else {"supervised"})


def test_prediction_of_the_first_network_or_of_both():
    maps = torch.randn(2, 1, 2, SIDE, SIDE)
    for evaluate, expected in (("first", maps[0].softmax(1)), ("mean", maps.softmax(2).mean(0))):
        made = method(evaluate=evaluate)
        made.first, made.second = map(Answers, maps)
        assert torch.allclose(made.predict(None), expected)


# --- adversarial examples --------------------------------------------------------------------------------------------


def test_the_range_leaves_the_tails_out():
    """Of the numbers 0 to 999 the fifth from either end; outliers do not matter; each channel has its own."""
    image = torch.stack([torch.arange(1000.0), 3 * torch.arange(1000.0)]).view(1, 2, 10, 10, 10)
    image[0, 0, -1, -1, -1] = 1e6
    assert extent(image).flatten().tolist() == [991, 3 * 991] and extent(image).shape == (1, 2, 1, 1, 1)
    assert extent(torch.full((2, 1, 4, 4), 5.0)).flatten().tolist() == [0, 0]


def test_fgsm_by_hand():
    """The first class's logit rises with the intensity: so does the cross-entropy of the second class only."""
    image = torch.linspace(-1, 1, 400).view(1, 1, 20, 20)
    label = (torch.arange(400) % 2).view(1, 20, 20)
    size = 0.03 * extent(image).item()
    change = fgsm(Linear(), image, label, 0.03) - image
    expected = size * torch.where(label == 1, 1.0, -1.0)[:, None]
    inside = (image + expected).abs() <= 1
    assert inside.float().mean() > 0.9 and torch.allclose(change[inside], expected[inside], atol=1e-6)
    assert change.abs().max() <= size + 1e-6 and (image + change).abs().max() <= 1


@pytest.mark.parametrize("dims", [2, 3])
def test_fgsm_of_a_network_raises_its_loss(dims):
    made, data = method(dims=dims), batch(space=(SIDE,) * dims)
    image, label = data.labeled[:2]
    example = fgsm(made.first, image, label, 0.1)
    made.eval()
    losses = [cross_entropy(made.first(x).logits, label).item() for x in (image, example)]
    assert losses[1] > losses[0]
    assert ((example - image).abs() <= 0.1 * extent(image) + 1e-6).all()
    assert example.amax() <= image.amax() and example.amin() >= image.amin()


def test_vat_goes_where_the_prediction_changes():
    """The network looks at one half of the image: the other half stays."""
    torch.manual_seed(0)
    image, looks = torch.randn(3, 1, 8, 10), torch.zeros(8, 10)
    looks[:, :5] = 1.0
    image[:, :, 0, 0], image[:, :, 0, 1] = 9.0, -9.0  # so wide are the bounds
    change = vat(Linear(looks=looks), image, 0.03) - image
    assert not change[..., 5:].any()
    size = change.square().mean((1, 2, 3)).sqrt() / extent(image).flatten()
    assert torch.allclose(size, torch.full((3,), 0.03), rtol=0.02)


def test_vat_changes_a_prediction_more_than_chance_does():
    made, image = method(), batch().unlabeled.image
    example, random = vat(made.first, image, 0.1), bounded(image, 0.1 * extent(image) * unit(torch.randn_like(image)))
    made.eval()
    said, virtual, chance = (made.first(x).logits for x in (image, example, random))
    assert divergence(said, virtual) > 2 * divergence(said, chance)


def test_a_direction_has_a_root_mean_square_of_1_however_small_it_is():
    direction = torch.stack([torch.ones(1, 4, 4), 1e-30 * torch.ones(1, 4, 4), torch.zeros(1, 4, 4)])
    assert torch.allclose(unit(direction).square().mean((1, 2, 3)), torch.tensor([1.0, 1.0, 0.0]))


def test_attacks_leave_a_network_as_it_was():
    """No gradients, no other statistics, no dropout while they are made, train mode afterwards."""
    made, data = method(), batch()
    before = {name: value.clone() for name, value in made.first.state_dict().items()}
    examples = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        examples.append(fgsm(made.first, data.labeled.image, data.labeled.label, 0.03))
    vat(made.first, data.unlabeled.image, 0.03)
    assert torch.equal(*examples)
    assert all(module.training for module in made.modules())
    assert all(torch.equal(value, before[name]) for name, value in made.first.state_dict().items())
    assert all(p.grad is None for p in made.parameters())
    with pytest.raises(ZeroDivisionError):
        gradient(made.first, data.labeled.image, lambda logits: 1 / 0)
    assert made.first.training


# --- diversity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attack", "which"), [("fgsm", slice(0, 2)), ("vat", slice(2, 4)), ("both", slice(0, 4))])
def test_who_is_attacked_and_who_learns_from_it(attack, which):
    made, data = method(Adversarial, attack=attack), batch()
    made.first, made.second = Linear(), Linear((0.5, 1.0))
    made(data, END)
    example = made.second.seen[1]  # after the clean images
    change = example - data.image[which]
    assert example.shape == data.image[which].shape and 0 < change.abs().amax((1, 2, 3)).min()
    size = 0.03 * extent(data.image)[:2]
    if attack != "vat":
        up = torch.where(data.labeled.label[:, None] == 1, size, -size)
        assert torch.allclose(change[:2], bounded(data.image[:2], up) - data.image[:2], atol=1e-6)


def test_the_other_network_learns_and_the_attacked_one_does_not():
    made, data = method(Adversarial), batch()
    made.withstand(made.first, made.second, data, made.first(data.image).logits).backward()
    assert moved(made.second) and not moved(made.first)
    made.zero_grad()
    made(data, END).terms["diversity"].backward()
    assert moved(made.second) and moved(made.first)


def test_diversity_by_hand():
    """The attacked network says 3/4 and 1/4 of clean images, the other 1/4 and 3/4 of everything."""
    made, data = method(Adversarial, adversarial=0.5, attack="fgsm"), batch()
    first = torch.tensor([ODDS, 0.0]).view(1, 2, 1, 1).expand(4, 2, SIDE, SIDE)
    made.first = Linear()
    made.second = Answers(first.flip(1)[:2])
    assert made.withstand(made.first, made.second, data, first).item() == pytest.approx(ODDS / 2)
    assert divergence(first, first) == 0


@pytest.mark.parametrize(("step", "share"), [(0, 0), (149, 0), (150, math.exp(-5)), (275, math.exp(-5 / 4)), (400, 1),
                                             (999, 1)])
def test_the_weight_of_diversity_starts_late(step, share):
    weight = method(Adversarial).adversarial_weight(Clock(torch.tensor(step), 1000))
    assert weight.item() == pytest.approx(0.05 * share, rel=1e-6)
    early = method(Adversarial, ramp=0.0).adversarial_weight(Clock(torch.tensor(step), 1000))
    assert early.item() == pytest.approx(0.05 * (step >= 150), rel=1e-6)


def test_half_precision_trains_all_weights():
    """The gradients by images must not take those by weights along."""
    made, data = method(Adversarial), batch()
    with torch.autocast("cpu", torch.bfloat16):
        terms = made(data._replace(labeled=data.labeled._replace(image=data.labeled.image.bfloat16())), END).terms
        sum(terms.values()).backward()
    assert all(value.isfinite() for value in terms.values())
    weights = [p for p in made.parameters() if p.ndim > 1]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in weights)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_step_reads_no_value(dims):
    made, data = method(Adversarial, dims=dims).to("meta"), batch(space=(SIDE,) * dims)
    image = data.image.to("meta")
    labeled = Half(image[:2], data.labeled.label.to("meta"), ("l",) * 2)
    losses = made(Batch(image, labeled, Half(image[2:], None, ("u",) * 2)), END._replace(step=END.step.to("meta")))
    sum(losses.terms.values()).backward()
    assert {x.device.type for x in (*losses.terms.values(), *losses.watch.values())} == {"meta"}


@pytest.mark.slow
def test_two_processes_attack_as_one(tmp_path):
    name, env = "test_dct:Adversarial", os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1])))}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           HERE.parent / "contract" / "ranks_worker.py", tmp_path, name],
                          env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for network in networks_of(name):
        case = replace(setting("dct", network), cls=Adversarial)
        before, alone = case.method().state_dict(), trained(case, tmp_path / network)
        first, second = (torch.load(tmp_path / f"{name}-{network}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first)
        keys = [key for key in alone if alone[key].is_floating_point()]
        farthest = max(float((alone[key] - before[key]).abs().max()) for key in keys)
        assert max(float((first[key] - alone[key]).abs().max()) for key in keys) < 1e-6 * farthest


# --- rotations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [(SIDE, SIDE), (SIDE, SIDE, 8)])
def test_one_network_sees_images_and_turned_ones(space):
    for seed in range(4):
        made, data = method(views="rotations"), batch(space=space)
        made.first = Linear()
        torch.manual_seed(seed)
        terms = made(data, END).terms
        assert made.second is None and set(terms) == {"supervised", "agreement"}
        assert torch.equal(made.first.seen[0], data.image)
        assert torch.equal(made.first.seen[1], torch.rot90(data.unlabeled.image, seed, (2, 3)))
        assert terms["agreement"].item() == pytest.approx(0, abs=1e-12)  # it does not matter to voxels on their own


def test_both_views_learn_half_of_what_a_squared_difference_would():
    """One voxel is turned onto itself: probabilities 3/4 and 1/2."""
    made, image = method(views="rotations", weight=1.0), torch.zeros(2, 1, 1, 1)
    straight, turned = torch.zeros(2, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    straight[1, 0] = ODDS
    straight.requires_grad_(), turned.requires_grad_()
    made.first = Answers(straight, turned)
    data = Batch(image, Half(image[:1], torch.zeros(1, 1, 1), ("l",)), Half(image[1:], None, ("u",)))
    agreement = made(data, END).terms["agreement"]
    agreement.backward()
    assert agreement.item() == pytest.approx(1 / 16)
    # by the first logit: the sum over both classes of (p - q) dp, over two elements
    assert straight.grad[1, 0].item() == pytest.approx(0.25 * (3 / 16))
    assert turned.grad[0, 0].item() == pytest.approx(-0.25 * (1 / 4))


def test_turns_are_random_and_keep_shapes():
    made, turns = method(views="rotations"), {(16, 16): Counter(), (16, 24): Counter()}
    for space, counted in turns.items():
        for seed in torch.randint(2**62, (400,), generator=torch.Generator().manual_seed(0)).tolist():
            torch.manual_seed(seed)
            counted[made.turns(space)] += 1
    square, oblong = turns.values()
    assert set(square) == {0, 1, 2, 3} and min(square.values()) > 70
    assert set(oblong) == {0, 2} and min(oblong.values()) > 150


@pytest.mark.parametrize("change", [{"ramp_every": 0}, {"weight": -1.0}, {"adversarial": -1.0}, {"epsilon": -0.1},
                                    {"adversarial_start": 1.5}])
def test_nonsense_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))) as error:
        dct.Config(**change)
    assert "\n" not in str(error.value)
