"""Critics: sizes that they take, known values, and that critic and segmenter leave each other's weights alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import networks
from networks.base import NetSpec, parameter_count, without_learning
from networks.blocks import BATCH_NORM
from networks.discriminator import (
    ImageDiscriminator,
    PatchDiscriminator,
    against,
    halving,
    sized,
    tell_apart,
)
from ssl4mis import registry
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.method import Adam, Task

SIDE, CLOCK = 16, Clock(torch.tensor(99), 100)
ADVERSARIES = {"dan": "constant", "sassnet": "constant", "advent": "poly"}  # and the critic's schedule


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(96, 96, 96), (112, 112, 80), (16, 16), (8, 20, 33), (1, 32), (3, 5)], ids=str)
@pytest.mark.parametrize("images", [0, 2])
def test_a_critic_of_images_takes_any_patch(patch, images):
    critic = ImageDiscriminator(len(patch), 3, images, 1, patch)
    logits, features = critic(noise(2, 3, *patch), noise(2, images, *patch) if images else None)
    assert logits.shape == (2, 2) and features.shape == (2, 8)


@pytest.mark.parametrize(
    ("patch", "halvings", "expected"),
    [((112, 112, 80), 5, (3, 3, 2)), ((112, 112, 80), 4, (7, 7, 5)), ((96, 96), 5, (3, 3)), ((16, 32), 5, (1, 1)),
     ((16, 16, 16), 4, (1, 1, 1)), ((4, 64, 64), 5, (1, 2, 2))], ids=str)
def test_how_far_a_critic_of_parts_halves_the_sides(patch, halvings, expected):
    critic = PatchDiscriminator(len(patch), 2, 1, patch, halvings)
    assert critic(noise(2, 2, *patch)).shape == (2, 1, *expected)


def test_sides_are_halved_while_there_are_voxels():
    assert halving(2, (5, 8), 3) == [(True, True), (True, True), (False, True)]
    assert halving(2, None, 2, 3) == [(True, True), (True, True), (False, False)]


def test_a_critic_of_images_by_hand():
    """Two convolutions summed, three more, leaky activations, the mean over voxels, a linear layer."""
    critic, maps, image = ImageDiscriminator(2, 3, 1, 2).eval(), noise(2, 3, 32, 48), noise(2, 1, 32, 48)
    weights = iter(critic.parameters())

    def conv(x):
        return F.conv2d(x, next(weights), next(weights), stride=2, padding=1)

    x = F.leaky_relu(conv(maps) + conv(image), 0.2)
    for _ in range(3):
        x = F.leaky_relu(conv(x), 0.2)
    features = F.adaptive_avg_pool2d(x, 1).flatten(1)
    verdict = critic(maps, image)
    torch.testing.assert_close(verdict.features, features)
    torch.testing.assert_close(verdict.logits, F.linear(features, next(weights), next(weights)))
    assert next(weights, None) is None


def test_a_critic_of_parts_by_hand():
    critic, x = PatchDiscriminator(2, 3, 2), noise(2, 3, 64, 96)
    logits, weights = critic(x), iter(critic.parameters())
    for level in range(5):
        x = F.conv2d(x if level == 0 else F.leaky_relu(x, 0.2), next(weights), next(weights), stride=2, padding=1)
    torch.testing.assert_close(logits, x)
    assert next(weights, None) is None and logits.shape == (2, 1, 2, 3)


def test_channels_of_a_critic_of_parts():
    assert [conv.out_channels for conv in PatchDiscriminator(3, 2).levels] == [64, 128, 256, 512, 1]


def test_dropout_in_training_follows_the_first_three_levels():
    """Where all channels are dropped only the last convolution's bias is left."""
    critic, maps = ImageDiscriminator(2, 2, 0, 2, dropout=1.0), noise(2, 2, 32, 32)
    features = critic(maps).features
    torch.testing.assert_close(features, F.leaky_relu(critic.deeper[-1].bias, 0.2).expand(2, -1))
    assert not torch.allclose(critic.eval()(maps).features, features)
    calls = []
    critic.dropout.register_forward_hook(lambda *call: calls.append(call))
    critic(maps)
    assert len(calls) == 3 and isinstance(critic.dropout, nn.Dropout2d)


def test_a_critic_that_does_not_see_the_image():
    critic, maps = ImageDiscriminator(2, 2, 0, 2).eval(), noise(2, 2, 32, 32)
    assert torch.equal(critic(maps, noise(2, 1, 32, 32)).logits, critic(maps).logits)
    assert parameter_count(ImageDiscriminator(2, 2, 1, 2)) - parameter_count(critic) == 2 * 16 + 2


@pytest.mark.parametrize(("kind", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_logits_are_float32_or_wider(kind, expected):
    """The segmenter's maps are float32 whatever the precision."""
    maps, image = noise(2, 2, 32, 32), noise(2, 1, 32, 32).to(kind)
    logits, features = ImageDiscriminator(2, 2, 1, 2).to(kind)(maps, image)
    parts = PatchDiscriminator(2, 2, 2).to(kind)(maps)
    assert {logits.dtype, features.dtype, parts.dtype} == {expected}
    with torch.autocast("cpu", torch.bfloat16):
        logits, features = ImageDiscriminator(2, 2, 1, 2)(maps, image.float())
        assert {logits.dtype, features.dtype, PatchDiscriminator(2, 2, 2)(maps).dtype} == {torch.float32}


def test_a_critic_is_four_times_as_wide_as_the_networks():
    assert sized(networks.Build("vnet", 2, NetSpec(1, (48, 32), 16))) == {"width": 64, "patch": (48, 32)}
    assert sized(nn.Module) == {}


# --- losses ----------------------------------------------------------------------------------------------------------


def test_known_losses():
    """Two images of which the critic says with 3/4 that they are labeled, and that they are not."""
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    for labeled, loss, accuracy in ((1, math.log(4 / 3), 1), (2, (math.log(4 / 3) + math.log(4)) / 2, 0.5),
                                    (0, (math.log(4 / 3) + math.log(4)) / 2, 0.5)):
        found = tell_apart(logits, labeled)
        assert [value.item() for value in found] == pytest.approx([loss, accuracy], rel=1e-6)
    for truth, loss in ((0.0, math.log(4)), (1.0, math.log(4 / 3))):
        assert against(torch.full((2, 1, 3), math.log(3)), truth).item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_a_look_at_a_network_leaves_no_trace(training):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), BATCH_NORM[2](2), nn.Dropout(0.5)).train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    image = noise(2, 1, 4, 4)
    found = without_learning(net, image)
    assert all(module.training == training for module in net.modules()) and not found.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(found, net.eval()(image))


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=ADVERSARIES)
def adversary(request):
    """A method and its name, and a batch of two labeled and one unlabeled image."""
    torch.manual_seed(0)
    cls, image = registry.method_class(request.param), noise(3, 1, SIDE, SIDE)
    build = networks.Build("vnet", 3, NetSpec(1, (SIDE, SIDE), width=2))
    batch = Batch(image, Half(image[:2], (image[:2, 0] > 0).to(torch.uint8), ("a", "b")), Half(image[2:], None, ("c",)))
    return request.param, cls(build, Task(3, 2, 1), cls.Config()).train(), batch


def turn(method, batch, phase):
    """The losses of a phase, and which networks they have moved."""
    method.zero_grad()
    losses = method(batch, CLOCK._replace(phase=phase))
    sum(losses.terms.values()).backward()
    return losses, {name for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}


def test_each_turn_moves_its_own_network_only(adversary):
    _, method, batch = adversary
    for phase, prefix in (("segment", "net."), ("criticize", "critic.")):
        _, moved = turn(method, batch, phase)
        own = {id(p) for p in method.trainable(phase)}
        assert moved and all(name.startswith(prefix) for name in moved)
        assert {name for name, p in method.named_parameters() if id(p) in own} == {
            name for name, _ in method.named_parameters() if name.startswith(prefix)}


def test_the_turn_of_the_critic_leaves_the_segmenter_as_it_is(adversary):
    """Its batch-norm statistics, too, and it goes on in train mode."""
    _, method, batch = adversary
    turn(method, batch, "segment")
    before = {name: value.clone() for name, value in method.net.state_dict().items()}
    turn(method, batch, "criticize")
    assert all(torch.equal(value, before[name]) for name, value in method.net.state_dict().items())
    assert all(module.training for module in method.net.modules())


def test_the_adversarial_term_teaches_the_segmenter_to_be_taken_for_labeled(adversary):
    """A small step down the term alone lowers it, judged by the same critic."""
    _, method, batch = adversary
    method.net.eval()  # without noise of dropout
    term = method(batch, CLOCK).terms["adversarial"]
    parameters = method.trainable("segment")
    gradients = torch.autograd.grad(term, parameters, allow_unused=True)
    size = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= 1e-2 * gradient / size
    assert method(batch, CLOCK).terms["adversarial"] < term


def test_the_critics_own_optimizer(adversary):
    name, method, _ = adversary
    [stage] = method.stages()
    segment, criticize = stage.phases
    assert (segment.name, segment.adam, segment.schedule) == ("segment", None, None)
    assert (criticize.name, criticize.adam, criticize.schedule) == ("criticize", Adam(), ADVERSARIES[name])
    assert (criticize.adam.rate, criticize.adam.betas, criticize.adam.weight_decay) == (1e-4, (0.9, 0.99), 0)
    method.hp = type(method).Config(critic_rate=0.5)
    assert method.stages()[0].phases[1].adam.rate == 0.5


def test_without_unlabeled_images_the_critic_learns_what_labeled_ones_look_like(adversary):
    _, method, batch = adversary
    usual = [set(turn(method, batch, phase)[0].terms) for phase in ("segment", "criticize")]
    alone = batch._replace(image=batch.labeled.image, unlabeled=Half(batch.image[2:2], None, ()))
    for phase, terms in zip(("segment", "criticize"), usual, strict=True):
        losses, moved = turn(method, alone, phase)
        assert set(losses.terms) <= terms and "adversarial" not in losses.terms and moved
        assert all(value.isfinite() for value in (*losses.terms.values(), *losses.watch.values()))
