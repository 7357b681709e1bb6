"""DAN: targets for any number of samples, what the critic sees and when, and what is refused."""

import math

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec
from networks.discriminator import Verdict
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.method import Task
from ssl4mis.methods.dan import DAN, Config

SIDE, TOTAL = 16, 100
CLOCK = Clock(torch.tensor(TOTAL), TOTAL)


class Suspicious(nn.Module):
    """A critic that says of all that comes with 3/4 that it is labeled; `seen` is what came."""

    def forward(self, maps, image):
        self.seen = maps, image
        return Verdict(torch.tensor([[0.0, math.log(3)]]).expand(len(maps), 2), None)


def dan(critic=None, **hp):
    torch.manual_seed(0)
    build = networks.Build("vnet", 2, NetSpec(1, (SIDE, SIDE), width=2))
    method = DAN(build, Task(2, 2, 1), Config(**hp)).train()
    method.critic = critic or method.critic
    return method


def batch(n=1, total=4):
    image = torch.randn(total, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    label = (image[:n, 0] > 0).to(torch.uint8)
    return Batch(image, Half(image[:n], label, ("l",) * n), Half(image[n:], None, ("u",) * (total - n)))


@pytest.mark.parametrize(("n", "critic"), [(1, (math.log(4 / 3) + 3 * math.log(4)) / 4),
                                           (3, (3 * math.log(4 / 3) + math.log(4)) / 4), (4, math.log(4 / 3))])
def test_known_losses(n, critic):
    """Whatever the numbers of labeled and unlabeled images, all unlabeled ones are to be taken for labeled."""
    method = dan(Suspicious(), weight=0.5)
    terms, watch = method(batch(n), CLOCK)
    if n < 4:
        assert terms["adversarial"].item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
        assert (watch["weight"], watch["fooled"]) == (0.5, 1)
    else:
        assert set(terms) == {"supervised"}
    terms, watch = method(batch(n), CLOCK._replace(phase="criticize"))
    assert set(terms) == {"critic"} and terms["critic"].item() == pytest.approx(critic, rel=1e-6)
    assert watch["accuracy"] == n / 4


def test_the_critic_judges_what_the_network_would_predict_now():
    """After the segmenter's step, without dropout and with running statistics: not what it said in its own turn."""
    method = dan(Suspicious())
    method(batch(), CLOCK)
    before = method.critic.seen[0]
    with torch.no_grad():
        method.net.heads["seg"].conv.bias += torch.tensor([1.0, -1.0])
    method(batch(), CLOCK._replace(phase="criticize"))
    maps, image = method.critic.seen
    assert torch.equal(image, batch().image)
    assert not torch.allclose(maps[1:], before, atol=0.01)
    with torch.no_grad():
        assert torch.equal(maps, method.eval().predict(batch().image))


def test_dropout_of_the_critic_only_in_its_own_turn():
    method, modes = dan(), []
    method.critic.dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
    for phase in ("segment", "criticize", "segment"):
        method(batch(), CLOCK._replace(phase=phase))
    assert modes == [False] * 3 + [True] * 3 + [False] * 3


def test_a_critic_of_predictions_alone():
    assert dan(judged="predictions").critic.image is None
    assert dan(judged="pairs").critic.image.in_channels == 1
    method, other = dan(judged="predictions").eval(), batch()
    other = other._replace(image=other.image + 1)
    maps = torch.rand(4, 2, SIDE, SIDE)
    assert torch.equal(method.critic(maps, batch().image).logits, method.critic(maps, other.image).logits)


@pytest.mark.parametrize(("step", "weight"), [(0, 0.000674), (149, 0.000674), (299, 0.000708), (15000, 0.028650)])
def test_the_weight_ramps_up_in_blocks(step, weight):
    watch = dan(ramp_every=150)(batch(), Clock(torch.tensor(step), 30000)).watch
    assert watch["weight"].item() == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"critic_rate": -1.0}, {"ramp": -1.0}, {"ramp_every": 0}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(UserError, match=f"hp.{next(iter(wrong))} "):
        Config(**wrong)
