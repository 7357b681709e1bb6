"""What is mixed with what, by which random factors, and who sees and learns it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from networks.base import Output
from ssl4mis import config
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.config import RunSpec
from ssl4mis.errors import UserError
from ssl4mis.losses import softmax_mse
from ssl4mis.method import Task
from ssl4mis.methods.ict import ICT, Config, symmetric_beta

CLOCK = Clock(torch.tensor(100), 100)
LINEAR = torch.tensor([2.0, -1.0])  # logits per intensity


class Intensity(nn.Module):
    """A network whose logits are intensities times a weight; it keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(LINEAR.clone()), []

    def forward(self, image):
        self.seen.append(image)
        return Output({"seg": image * self.weight.view(1, 2, *[1] * (image.ndim - 2))}, None)


class Mixing(ICT):
    """Draws factors that are given."""

    drawn = None

    def factors(self, image):
        return super().factors(image) if self.drawn is None else torch.tensor(self.drawn).view(-1, 1, 1, 1)


def method(drawn=None, **hp):
    made = Mixing(Intensity, Task(2, 2), Config(**{"weight": 1.0, "ramp": 0.0} | hp))
    made.drawn = drawn
    return made


def batch(labeled=2, unlabeled=4):
    image = torch.randn(labeled + unlabeled, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    label = (image[:labeled, 0] > 0).to(torch.uint8)
    return Batch(image, Half(image[:labeled], label, ("l",) * labeled), Half(image[labeled:], None, ("u",) * unlabeled))


@pytest.mark.parametrize(("passes", "seen"), [("halves", [2, 2]), ("together", [4])])
def test_the_first_half_is_mixed_with_the_second(passes, seen):
    made, data = method([0.25, 0.75], passes=passes), batch()
    made(data, CLOCK)
    (image,) = made.student.seen
    a, b, c, d = data.unlabeled.image
    assert torch.equal(image[:2], data.labeled.image)
    assert torch.allclose(image[2:], torch.stack([0.75 * a + 0.25 * c, 0.25 * b + 0.75 * d]))
    assert [len(x) for x in made.teacher.net.seen] == seen
    assert torch.equal(torch.cat(made.teacher.net.seen), data.unlabeled.image)


@pytest.mark.parametrize("targets", ["probabilities", "logits"])
@pytest.mark.parametrize(("factor", "which"), [(0.0, slice(0, 2)), (1.0, slice(2, 4))])
def test_a_factor_of_0_or_1_is_mean_teacher_on_one_of_the_images(factor, which, targets):
    made, data = method([factor] * 2, targets=targets), batch()
    made.teacher.net.weight.data = torch.tensor([0.5, 1.0])
    logits = data.unlabeled.image[which] * LINEAR.view(1, 2, 1, 1)
    target = data.unlabeled.image[which] * made.teacher.net.weight.view(1, 2, 1, 1)
    expected = softmax_mse(logits, target).mean()
    assert made(data, CLOCK).terms["consistency"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_consistency_by_hand():
    """Intensities 0 and ln 3, logits (x, 0): probabilities 1/2 and 3/4, of the mixture sqrt 3 / (1 + sqrt 3)."""
    image = torch.tensor([0, 0, math.log(3)]).view(3, 1, 1, 1)
    data = Batch(image, Half(image[:1], torch.zeros(1, 1, 1), ("l",)), Half(image[1:], None, ("u",) * 2))
    mixture = math.sqrt(3) / (1 + math.sqrt(3))
    for targets, expected in (("probabilities", (mixture - 5 / 8) ** 2), ("logits", 0.0)):
        made = method([0.5], targets=targets)
        for net in (made.student, made.teacher.net):
            net.weight.data = torch.tensor([1.0, 0.0])
        assert made(data, CLOCK).terms["consistency"].item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_the_student_learns_and_the_teacher_does_not():
    made = method([0.3, 0.6])
    made(batch(), CLOCK).terms["consistency"].backward()
    assert made.student.weight.grad.any() and made.teacher.net.weight.grad is None


def test_no_unlabeled_samples_leave_the_supervised_term():
    made = method()
    assert set(made(batch(4, 0), CLOCK).terms) == {"supervised"} and not made.teacher.net.seen


def test_each_pair_has_a_factor_of_its_own_and_all_that_is_in_it_the_same():
    for dims in (2, 3):
        factor = ICT.factors(method(), torch.zeros(5, 3, *[4] * dims))
        assert factor.shape == (5, 1, *[1] * dims) and len(factor.unique()) == 5


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 4.0])
def test_factors_are_beta_distributed(alpha):
    """Away from the ends, which float32 rounds to 0 and 1."""
    torch.manual_seed(0)
    drawn = np.sort(symmetric_beta(alpha, (100_000,), "cpu").double())
    assert drawn.min() >= 0 and drawn.max() <= 1
    places = np.linspace(0.001, 0.999, 999)
    found = np.searchsorted(drawn, places) / len(drawn)
    np.testing.assert_allclose(found, stats.beta(alpha, alpha).cdf(places), rtol=0, atol=0.006)


def test_factors_are_finite_at_the_ends_of_uniform_numbers(monkeypatch):
    ends = torch.tensor([0.0, 1.0, 2.0**-24, 1 - 2.0**-24])
    u, v = torch.cartesian_prod(ends, torch.cat([ends, torch.tensor([0.25, 0.5, 0.75])])).T
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.stack([u, v]))
    for alpha in (0.01, 0.2, 1.0, 100.0):
        drawn = symmetric_beta(alpha, u.shape, "cpu")
        assert drawn.isfinite().all() and drawn.min() >= 0 and drawn.max() <= 1


@pytest.mark.parametrize("name", ["labeled_batch", "unlabeled_batch"])
def test_odd_batches_are_refused_in_one_line(name):
    spec = RunSpec(method="ict", patch=[16, 16], stride=[16, 16])
    config.check_values(spec, 2)
    with pytest.raises(UserError, match=f"{name} 3: method ict expects a multiple of 2") as error:
        config.check_values(dataclasses.replace(spec, **{name: 3}), 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"ramp_every": 0}, {"weight": -1.0}, {"decay": 1.5}, {"alpha": 0.0}])
def test_nonsense_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))) as error:
        Config(**change)
    assert "\n" not in str(error.value)
