"""Known values of URPC's consistency, extreme logits, and what is built on which backbone."""

import math

import pytest
import torch

import networks
from networks import vnet
from networks.base import NetSpec
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import Task
from ssl4mis.methods.urpc import URPC, Config, consistency, disagreement

KNOWN = {2: (0.522170, 0.211425, 0.202550, 0.523539, 0.364921), 4: (1.653731, 0.726437, 0.724693, 1.656388, 1.190312)}


def wave(phase, classes):
    """4 sin(0.7 n + phase) over all elements n of (2, classes, 2, 2, 2)."""
    return (4 * torch.sin(0.7 * torch.arange(16 * classes, dtype=torch.float64) + phase)).view(2, classes, 2, 2, 2)


@pytest.mark.parametrize("classes", KNOWN)
def test_known_values(classes):
    mine = consistency([wave(phase, classes) for phase in range(4)])
    *scales, mean = KNOWN[classes]
    assert mine.tolist() == pytest.approx(scales, abs=1e-5) and mine.mean().item() == pytest.approx(mean, abs=1e-5)


def test_two_scales_by_hand():
    """Probabilities (1/4, 3/4) and (3/4, 1/4): mean 1/2, distance 1/16, divergence ln(2 / sqrt 3) everywhere."""
    first = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1).expand(1, 2, 3, 5)
    maps = [first, first.flip(1)]
    divergence = math.log(2 / math.sqrt(3))
    assert torch.allclose(torch.stack(disagreement(maps)[2]), torch.tensor(divergence))
    assert consistency(maps).tolist() == pytest.approx([1 / 16 + divergence] * 2, rel=1e-6)


def test_scales_that_agree_cost_nothing():
    assert consistency(wave(0, 4).float().expand(4, -1, -1, -1, -1, -1)).abs().max() < 1e-6


def test_extreme_logits_have_a_finite_loss_and_gradient():
    maps = torch.full((4, 2, 3, 4, 4), -100.0)
    for scale in range(4):
        maps[scale, :, scale % 3] = 100.0
    maps.requires_grad_()
    loss = consistency(maps).mean()
    loss.backward()
    assert loss.isfinite() and maps.grad.isfinite().all() and maps.grad.any()


def method(classes=2, dims=2, **hp):
    build = networks.Build("vnet", classes, NetSpec(1, (16,) * dims, width=2))
    return URPC(build, Task(classes, dims, 1), Config(**hp))


def batch(n):
    image = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    label = (image[:n, 0] > 0).to(torch.uint8)
    names = ("a", "b", "c", "d")
    return Batch(image, Half(image[:n], label, names[:n]), Half(image[n:], None, names[n:]))


@pytest.mark.parametrize("scales, levels", [(2, 2), (3, 3), (4, 4), (9, 4)])
def test_heads_on_as_many_levels_as_there_are(scales, levels):
    net = method(scales=scales).net
    assert [head.level for head in net.heads.values()] == list(range(levels))
    assert "seg" in net.heads and net.heads["seg"].level == 0
    assert [layer.p for layer in net.backbone.decoder.dropout] == [0.1, 0.2, 0.3, 0.5] and net.backbone.dropout.p == 0


def test_supervised_term_is_the_mean_over_the_scales_and_all_there_is_without_unlabeled_samples():
    urpc, images = method(), batch(4)
    torch.manual_seed(0)
    terms = urpc(images, Clock(torch.tensor(0), 10)).terms
    torch.manual_seed(0)
    heads = urpc.net(images.image).heads.values()
    assert set(terms) == {"supervised"} and len(heads) == 4
    expected = sum(segmentation(logits, images.labeled.label) for logits in heads) / 4
    assert terms["supervised"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("classes, channels", [(2, 3), (3, 3), (4, 4)])
def test_legacy_has_three_classes_and_predicts_those_of_the_data(classes, channels):
    urpc = method(classes, compat="legacy")
    assert all(term.isfinite() for term in urpc(batch(2), Clock(torch.tensor(0), 10)).terms.values())
    urpc.eval()
    assert {head.conv.out_channels for head in urpc.net.heads.values()} == {channels}
    with torch.inference_mode():
        probability = urpc.net(batch(2).image).logits.softmax(1)[:, :classes]
        expected = probability / probability.sum(1, keepdim=True)
        assert torch.allclose(urpc.predict(batch(2).image), expected, atol=1e-6)


@pytest.mark.parametrize("ramp, last", [(1.0, 0.1), (2.0, 0.028650)])
def test_a_ramp_longer_than_the_run_never_ends(ramp, last):
    clock = Clock(torch.tensor(30000), 30000)
    assert method(ramp=ramp)(batch(2), clock).watch["weight"].item() == pytest.approx(last, abs=1e-6)


def test_the_released_command_ends_at_a_quarter_of_the_weight():
    clock = Clock(torch.tensor(29999), 30000)
    assert method(ramp=2.0, ramp_every=150)(batch(2), clock).watch["weight"].item() == pytest.approx(0.028294, abs=1e-6)


@pytest.mark.parametrize("hp", [{"scales": 1}, {"scales": 0}, {"ramp_every": 0}])
def test_hyper_parameters_that_cannot_work(hp):
    with pytest.raises(UserError, match=f"hp.{next(iter(hp))} {next(iter(hp.values()))}: expected at least"):
        Config(**hp)


def test_a_network_of_one_level_is_an_error_in_one_line(monkeypatch):
    def flat(spec):
        made = vnet.VNet(spec)
        made.decoder_channels = made.decoder_channels[:1]
        return made

    monkeypatch.setattr(vnet, "backbone", flat)
    with pytest.raises(UserError, match="^network VNet: urpc needs at least two decoder levels, .*$") as error:
        method()
    assert "\n" not in str(error.value)
