"""SASSNet: which head each term teaches, known losses, and distance maps of any number of classes."""

import math

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec
from networks.discriminator import Verdict
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.distance import class_distances
from ssl4mis.errors import UserError
from ssl4mis.method import Task
from ssl4mis.methods.sassnet import Config, SASSNet

SIDE, CLASSES, CLOCK = 16, 3, Clock(torch.tensor(100), 100)


class Suspicious(nn.Module):
    """A critic that says of all that comes with 3/4 that it is labeled; `seen` is what came."""

    def forward(self, maps, image):
        self.seen = maps, image
        return Verdict(torch.tensor([[0.0, math.log(3)]]).expand(len(maps), 2), None)


def sassnet(critic=None, **hp):
    torch.manual_seed(0)
    build = networks.Build("vnet", CLASSES, NetSpec(1, (SIDE, SIDE), width=2))
    method = SASSNet(build, Task(CLASSES, 2, 1), Config(**hp)).train()
    method.critic = critic or method.critic
    return method


def batch(n=1, total=4):
    image = torch.randn(total, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    label = (image[:n, 0] > 0).to(torch.uint8) + (image[:n, 0] > 1)
    return Batch(image, Half(image[:n], label, ("l",) * n), Half(image[n:], None, ("u",) * (total - n)))


def test_which_head_a_term_teaches():
    method, taught = sassnet(), {}
    for name, value in method(batch(), CLOCK).terms.items():
        method.zero_grad()
        value.backward(retain_graph=True)
        taught[name] = {head for head, module in method.net.heads.items()
                        if any(p.grad is not None and p.grad.any() for p in module.parameters())}
    assert taught == {"supervised": {"seg"}, "sdf": {"sdf"}, "adversarial": {"sdf"}}


@pytest.mark.parametrize("n", [1, 3, 4])
def test_known_losses(n):
    """Whatever the numbers of labeled and unlabeled images."""
    method = sassnet(Suspicious(), weight=0.5)
    terms, watch = method(batch(n), CLOCK)
    if n < 4:
        assert terms["adversarial"].item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
        assert (watch["weight"], watch["fooled"]) == (0.5, 1)
        assert method.critic.seen[0].shape == (4 - n, CLASSES - 1, SIDE, SIDE)
    else:
        assert set(terms) == {"supervised", "sdf"}
    terms, watch = method(batch(n), CLOCK._replace(phase="criticize"))
    loss = (n * math.log(4 / 3) + (4 - n) * math.log(4)) / 4
    assert terms["critic"].item() == pytest.approx(loss, rel=1e-6) and watch["accuracy"] == n / 4


def test_the_critic_judges_distances_that_the_network_would_predict_now():
    """After the segmenter's step, without dropout and with running statistics: not what it said in its own turn."""
    method = sassnet(Suspicious())
    method(batch(), CLOCK)
    before = method.critic.seen[0]
    with torch.no_grad():
        method.net.heads["sdf"].conv.bias += 1
    method(batch(), CLOCK._replace(phase="criticize"))
    maps, image = method.critic.seen
    assert torch.equal(image, batch().image) and maps.abs().max() <= 1
    assert not torch.allclose(maps[1:], before, atol=0.01)
    with torch.no_grad():
        assert torch.equal(maps, method.eval().net(batch().image).heads["sdf"].tanh())


def test_dropout_of_the_critic_only_in_its_own_turn():
    method, modes = sassnet(), []
    method.critic.dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
    for phase in ("segment", "criticize", "segment"):
        method(batch(), CLOCK._replace(phase=phase))
    assert modes == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize(("compat", "absent", "everywhere"), [("right", 1, -1), ("legacy", 0, 0)])
def test_a_distance_for_each_class_of_the_foreground(compat, absent, everywhere):
    label = torch.full((1, 5, 5), 1, dtype=torch.uint8)
    found = class_distances(label, CLASSES, compat)
    assert found.shape == (1, CLASSES - 1, 5, 5)
    assert (found[:, 0] == everywhere).all() and (found[:, 1] == absent).all()


def test_the_error_of_the_distance_is_its_mean_square():
    method = sassnet(sdf=2.0)
    for p in method.net.heads["sdf"].parameters():
        nn.init.zeros_(p)
    terms, _ = method(batch(), CLOCK)
    expected = 2 * class_distances(batch().labeled.label, method.task.classes, "right").square().mean()
    assert terms["sdf"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"sdf": -1.0}, {"critic_rate": -1.0}, {"ramp_every": 0}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(UserError, match=f"hp.{next(iter(wrong))} "):
        Config(**wrong)
