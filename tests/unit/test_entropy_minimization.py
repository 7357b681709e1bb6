"""Whose entropy is minimized, what it is a share of, and the values of the specification for two and four classes."""

import math

import pytest
import torch
from torch import nn

from networks.base import Output
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.method import Task
from ssl4mis.methods.entropy_minimization import Config, EntropyMinimization

CLOCK = Clock(torch.tensor(0), 100)


class Fixed(nn.Module):
    """A network with one answer."""

    def __init__(self):
        super().__init__()
        self.logits = None

    def forward(self, image):
        return Output({"seg": self.logits[:len(image)]}, None)


def step(logits, labeled, **hp):
    """The losses where the network answers with these logits (B, K, *space), the first ones of labeled images."""
    config = Config(**{"weight": 1.0, "ramp": 0.0} | hp)
    method = EntropyMinimization(Fixed, Task(logits.shape[1], logits.ndim - 2), config)
    method.net.logits = logits
    image = torch.zeros(len(logits), 1, *logits.shape[2:])
    label = torch.zeros(labeled, *logits.shape[2:], dtype=torch.uint8)
    return method(Batch(image, Half(image[:labeled], label, ("l",) * labeled),
                        Half(image[labeled:], None, ("u",) * (len(logits) - labeled))), CLOCK)


def wave(classes):
    """4 sin(0.7 n) in C order, the input of the specification's known values: (2, classes, 2, 2, 2)."""
    return (4 * torch.sin(0.7 * torch.arange(16 * classes, dtype=torch.float64))).view(2, classes, 2, 2, 2)


@pytest.mark.parametrize(("classes", "expected"), [(2, 0.612447), (4, 0.453157)])
def test_known_values(classes, expected):
    logits = torch.cat([torch.zeros_like(wave(classes)), wave(classes)])
    assert step(logits, 2).terms["entropy"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("space", [(4, 4), (2, 3, 2)])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_it_is_1_where_all_classes_are_equally_probable_and_0_where_one_is_certain(classes, space):
    logits = torch.zeros(2, classes, *space)
    assert step(logits, 1).terms["entropy"].item() == pytest.approx(1, abs=1e-5)
    logits[:, 0] = 1000
    assert step(logits, 1).terms["entropy"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("space", "base"), [((4, 4), 4), ((2, 3, 2), 2)])
def test_the_released_scripts_have_their_number_of_classes(space, base):
    entropy = step(torch.zeros(2, 3, *space), 1, compat="legacy").terms["entropy"]
    assert entropy.item() == pytest.approx(math.log(3) / math.log(base), rel=1e-5)


@pytest.mark.parametrize(("images", "entropy", "foreground"), [("unlabeled", 0.0, 0.0), ("all", 0.5, 0.25)])
def test_whose_entropy(images, entropy, foreground):
    """Labeled images say 1/2 and 1/2, unlabeled ones are certain of the background."""
    logits = torch.zeros(4, 2, 4, 4)
    logits[2:, 0] = 1000
    logits.requires_grad_()
    terms, watch = step(logits, 2, images=images)
    assert terms["entropy"].item() == pytest.approx(entropy, abs=1e-5)
    assert watch["foreground"].item() == pytest.approx(foreground)


def test_it_makes_the_likely_class_likelier():
    """p is 3/4 and 1/4: more logit of the first class and less of the second lower the entropy."""
    logits = torch.tensor([math.log(3), 0]).view(1, 2, 1, 1).repeat(2, 1, 4, 4).requires_grad_()
    step(logits, 1).terms["entropy"].backward()
    assert not logits.grad[0].any() and (logits.grad[1, 0] < 0).all() and (logits.grad[1, 1] > 0).all()


def test_no_unlabeled_samples_leave_the_supervised_term():
    assert set(step(torch.zeros(2, 2, 4, 4), 2, images="all").terms) == {"supervised"}


@pytest.mark.parametrize("change", [{"ramp_every": 0}, {"weight": -1.0}, {"ramp": -0.1}])
def test_nonsense_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))) as error:
        Config(**change)
    assert "\n" not in str(error.value)
