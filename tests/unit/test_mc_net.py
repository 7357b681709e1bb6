"""MC-Net on logits that are given: pairs of decoders, gradients of targets, both Dice losses, and what it refuses."""

import pytest
import torch
from reference.several_decoders import SeveralDecoders

import networks
from networks.base import NetSpec
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.method import Task
from ssl4mis.methods.mc_net import Config, MCNet
from ssl4mis.passes import count_samples

TOTAL = 1000
END = Clock(torch.tensor(TOTAL), TOTAL)
EVEN, SURE = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.1, 0.9]).log()


def voxels(*pairs):
    """Logits (B, 2, 1, 1) of so many samples of a voxel."""
    return torch.stack(pairs)[..., None, None].clone().requires_grad_()


def mc_net(*logits, **hp):
    """The method with decoders that say these logits."""
    return MCNet(lambda: SeveralDecoders(logits), Task(logits[0].shape[1], 2), Config(len(logits), **hp))


def batch(count, label):
    image, n = torch.zeros(count, 1, *label.shape[1:]), len(label)
    return Batch(image, Half(image[:n], label, ("l",) * n), Half(image[n:], None, ("u",) * (count - n)))


def consistency(*pairs, labeled=1, **hp):
    """The term of one labeled voxel and, by default, one unlabeled one, where each decoder says its pair."""
    logits = [voxels(pair, pair) for pair in pairs]
    method = mc_net(*logits, **hp)
    return method(batch(2, torch.ones(labeled, 1, 1).long()), END).terms["consistency"], logits


@pytest.mark.parametrize(("third", "pairs"), [((), 1), ((EVEN,), 2)])
def test_ordered_pairs(third, pairs):
    """(0.5 - 1)^2 and (0.9 - 0.5)^2 for each pair of an even and a sure decoder, whose 0.9 is sharpened to 1."""
    term, _ = consistency(EVEN, SURE, *third)
    assert term.item() == pytest.approx(pairs * (0.25 + 0.16), rel=1e-5)


@pytest.mark.parametrize(("detach", "slope"), [(True, -0.25), (False, -0.25 - 2.0)])
def test_gradients_flow_through_targets_unless_detached(detach, slope):
    """Of (s - 1)^2 with s the logistic function at 0, and of (0.9 - s(10 x))^2; two samples share the mean."""
    term, (first, _) = consistency(EVEN, SURE, detach=detach)
    [gradient] = torch.autograd.grad(term, first)
    torch.testing.assert_close(gradient[:, 1].flatten(), torch.full((2,), slope / 2), rtol=1e-4, atol=1e-6)


def test_labels_teach_every_decoder_on_labeled_images_only():
    logits = [voxels(EVEN, EVEN), voxels(SURE, EVEN)]
    method = mc_net(*logits, supervised=2.0)
    term = method(batch(2, torch.ones(1, 1, 1).long()), END).terms["supervised"]
    # 1 - 2 * 0.5 / (0.5 + 1) and 1 - 2 * 0.9 / (0.9 + 1)
    assert term.item() == pytest.approx(2 * (1 / 3 + 0.1 / 1.9), rel=1e-5)
    for gradient in torch.autograd.grad(term, logits):
        assert gradient[0].abs().min() > 0 and not gradient[1].any()


def test_the_squared_dice_has_the_gradient_of_the_released_one():
    """1 - sum p y / (sum p^2 + sum y^2), a mean over classes, with twice the weight."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 4, 5, 5, generator=generator).requires_grad_()
    label = torch.randint(4, (2, 5, 5), generator=generator)
    p, y = first[:2].softmax(1), torch.nn.functional.one_hot(label, 4).movedim(-1, 1)
    axes = (0, 2, 3)
    released = (1 - (p * y).sum(axes) / (p.square().sum(axes) + y.square().sum(axes) + 1e-10)).mean()
    ours = mc_net(first, first, dice="squared", supervised=0.5)(batch(3, label), END).terms["supervised"]
    assert ours.item() == pytest.approx(2 * (released.item() - 0.5), rel=1e-5)
    mine, theirs = (torch.autograd.grad(loss, first)[0] for loss in (ours, 2 * 1.0 * released))
    torch.testing.assert_close(mine, theirs)


def test_sharpening():
    """Of 0.5, 0.3 and 0.2: 1/2, 1/(1 + (7/3)^2) and 1/(1 + 4^2) against the rest; together, shares of their squares."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().view(1, 3, 1, 1)
    binary, together = (mc_net(logits, logits, temperature=0.5, sharpening=kind).sharpened(logits.softmax(1)).flatten()
                        for kind in ("binary", "softmax"))
    torch.testing.assert_close(binary, torch.tensor([1 / 2, 9 / 58, 1 / 17]))
    torch.testing.assert_close(together, torch.tensor([25, 9, 4]) / 38)
    two = torch.tensor([0.8, 0.2]).log().view(1, 2, 1, 1)
    torch.testing.assert_close(*(mc_net(two, two, sharpening=kind).sharpened(two.softmax(1))
                                 for kind in ("binary", "softmax")))


@pytest.mark.parametrize("sharpening", ["binary", "softmax"])
def test_certain_decoders_are_harmless(sharpening):
    term, logits = consistency(torch.tensor([-200.0, 200.0]), torch.tensor([200.0, -200.0]), sharpening=sharpening)
    assert term.item() == pytest.approx(2.0)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(term, logits))


def build(network="vnet"):
    return networks.Build(network, 2, NetSpec(1, (64, 32), 2))


@pytest.mark.parametrize(("network", "modes"), [("vnet", ["bilinear", "nearest"]), ("unet", ["transposed", "nearest"])])
def test_each_decoder_upsamples_in_its_own_way(network, modes):
    method = MCNet(build(network), Task(2, 2), Config(3))
    decoders = [branch.decoder for branch in method.net.branches]
    found = [d.mode if network == "unet" else d.stages[0][0].mode for d in decoders]
    assert found == modes
    assert len(MCNet(build(network), Task(2, 2), Config()).net.branches) == 1


@pytest.mark.parametrize(("evaluate", "decoded"), [("first", 3), ("mean", 9)])
def test_the_first_decoder_predicts_alone(evaluate, decoded):
    method = MCNet(build(), Task(2, 2), Config(3, evaluate=evaluate)).eval()
    image = torch.randn(3, 1, 64, 32)
    outputs = [logits.softmax(1) for logits in method.decoded(image)]
    counts = count_samples(method)
    torch.testing.assert_close(method.predict(image), outputs[0] if evaluate == "first" else sum(outputs) / 3)
    assert counts["net", "decoded", True] == decoded and counts["net", "encoded", True] == 3


def test_it_tells_where_decoders_are_alike():
    assert MCNet(build(), Task(2, 2), Config()).remarks() == ()
    [line] = MCNet(build("nnunet"), Task(2, 2), Config()).remarks()
    assert "weights alone" in line and "\n" not in line


@pytest.mark.parametrize("hp", [{"decoders": 1}, {"decoders": 4}, {"temperature": 0.0}, {"weight": -1.0},
                                {"ramp_every": 0}])
def test_nonsense_is_refused(hp):
    with pytest.raises(UserError) as error:
        Config(**hp)
    assert next(iter(hp)) in str(error.value) and "\n" not in str(error.value)
