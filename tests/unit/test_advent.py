"""AdvEnt: self-information, targets of both players, and that the critic sees the prediction of the same step."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.method import Task
from ssl4mis.methods.advent import AdvEnt, Config, self_information

SIDE, CLOCK = 16, Clock(torch.tensor(0), 100)


class Suspicious(nn.Module):
    """A critic that says of every part with 3/4 that it is of an unlabeled image; `seen` is what came."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, maps):
        self.seen.append(maps)
        return torch.full((len(maps), 1, 3, 2), math.log(3))


def advent(critic=None, **hp):
    torch.manual_seed(0)
    build = networks.Build("vnet", 2, NetSpec(1, (SIDE, SIDE), width=2))
    method = AdvEnt(build, Task(2, 2, 1), Config(**hp)).train()
    method.critic = critic or method.critic
    return method


def batch(n=1, total=4):
    image = torch.randn(total, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    label = (image[:n, 0] > 0).to(torch.uint8)
    return Batch(image, Half(image[:n], label, ("l",) * n), Half(image[n:], None, ("u",) * (total - n)))


@pytest.mark.parametrize(("classes", "mean"), [(2, 0.306225), (4, 0.113290)])
def test_known_self_information(classes, mean):
    """-p log2(p) / log2(classes) of logits 4 sin(0.7 n)."""
    logits = torch.tensor(4 * np.sin(0.7 * np.arange(16 * classes))).reshape(2, classes, 2, 2, 2)
    found, p = self_information(logits), logits.softmax(1)
    assert found.mean().item() == pytest.approx(mean, abs=1e-6)
    torch.testing.assert_close(found, -p * p.log2() / math.log2(classes))


def test_information_lies_between_certain_and_no_idea():
    even = self_information(torch.zeros(1, 4, 2, 2))
    torch.testing.assert_close(even.sum(1), torch.ones(1, 2, 2))
    logits = torch.tensor([1e4, -1e4, 0.0]).view(1, 3, 1, 1).requires_grad_()
    certain = self_information(logits)
    assert not certain.any()
    certain.sum().backward()
    assert logits.grad.isfinite().all()


def test_known_losses():
    """Labeled is 0, unlabeled 1, and the segmenter wants 0 of unlabeled images."""
    method = advent(Suspicious(), weight=0.5)
    terms, _ = method(batch(), CLOCK)
    assert set(terms) == {"supervised", "adversarial"}
    assert terms["adversarial"].item() == pytest.approx(0.5 * math.log(4), rel=1e-6)
    terms, watch = method(batch(), CLOCK._replace(phase="criticize"))
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"critic/labeled": 0.5 * math.log(4), "critic/unlabeled": 0.5 * math.log(4 / 3)}, rel=1e-6)
    assert watch == {"right/labeled": 0, "right/unlabeled": 1}


def test_both_turns_see_one_prediction():
    """The network is asked once per step."""
    method, asked = advent(Suspicious()), []
    method.net.register_forward_hook(lambda _, images, out: asked.append(out.logits.detach()))
    for phase in ("segment", "criticize"):
        method(batch(), CLOCK._replace(phase=phase))
    [logits], (fooling, judged) = asked, method.critic.seen
    assert torch.equal(judged, self_information(logits)) and torch.equal(fooling, judged[1:])
    assert fooling.requires_grad and not judged.requires_grad


def test_without_unlabeled_images():
    method = advent(Suspicious())
    assert set(method(batch(4), CLOCK).terms) == {"supervised"}
    terms, watch = method(batch(4), CLOCK._replace(phase="criticize"))
    assert set(terms) == {"critic/labeled"} and watch == {"right/labeled": 0}


def test_the_critic_is_fully_convolutional_with_five_halvings():
    method = AdvEnt(networks.Build("vnet", 3, NetSpec(1, (64, 64, 32), width=2)), Task(3, 3, 1), Config())
    assert method.critic(torch.rand(2, 3, 64, 64, 32)).shape == (2, 1, 2, 2, 1)
    assert [tuple(conv.stride) for conv in method.critic.levels] == [(2, 2, 2)] * 5


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"critic_rate": -1.0}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(UserError, match=f"hp.{next(iter(wrong))} "):
        Config(**wrong)
