"""SSGAN by hand: a logit of 0 for fake beside the classes' own, two players, and what neither of them moves."""

import copy
import math

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec, Output
from ssl4mis import config
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Adam, Task
from ssl4mis.methods.ssgan import SSGAN, Config, realness

SEGMENT, GENERATE = (Clock(torch.tensor(0), 10, phase=phase) for phase in ("segment", "generate"))


class Proportional(nn.Module):
    """Logits are the image's first channel times a number per class."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor(numbers))

    def forward(self, image):
        return Output({"seg": image[:, :1] * self.numbers.view(1, -1, *[1] * (image.ndim - 2))}, None)


def ssgan(net=None, dims=2, channels=1, **hp):
    torch.manual_seed(0)
    build = networks.Build("vnet", 2, NetSpec(channels, (16,) * dims, width=2))
    method = SSGAN(build, Task(2, dims, channels), Config(**hp))
    if net is not None:
        method.net = net
    return method


def batch(image, labeled):
    label = torch.ones(labeled, *image.shape[2:], dtype=torch.uint8)
    return Batch(image, Half(image[:labeled], label, ("l",) * labeled), Half(image[labeled:], None, ()))


def ones(labeled=2, unlabeled=2, dims=2):
    return batch(torch.ones(labeled + unlabeled, 1, *(16,) * dims), labeled)


def gradients(method, term):
    """Whether a term moves the segmenter and the generator."""
    players = [list(method.net.parameters()), list(method.generator.parameters())]
    found = torch.autograd.grad(term, sum(players, []), retain_graph=True, allow_unused=True)
    moved = [g is not None and bool(g.any()) for g in found]
    return [any(moved[:len(players[0])]), any(moved[len(players[0]):])]


@pytest.mark.parametrize("space", [(3, 5), (2, 3, 4)])
def test_the_probability_of_real_is_a_softmax_over_the_classes_and_a_fake_of_logit_zero(space):
    logits = torch.randn(2, 3, *space)
    with_fake = torch.cat([logits, torch.zeros(2, 1, *space)], 1).softmax(1)
    mine = realness(Output({"seg": logits}, None))
    assert torch.allclose(mine.sigmoid(), with_fake[:, :3].sum(1), atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_losses_by_hand(dims, weight):
    """Logits 0 and ln 3 on images of ones, whose range leaves the generator nothing but ones: odds of real are 4."""
    method = ssgan(Proportional(0.0, math.log(3)), dims, dice=False, weight=weight)
    terms, watch = method(ones(dims=dims), SEGMENT)
    assert terms["supervised"].item() == pytest.approx(math.log(4 / 3), rel=1e-5)
    assert terms["real"].item() == pytest.approx(weight * math.log(5 / 4), rel=1e-5)
    assert terms["fake"].item() == pytest.approx(weight * math.log(5), rel=1e-5)
    assert watch["judged_real/unlabeled"].item() == pytest.approx(4 / 5)
    assert watch["judged_real/generated"].item() == pytest.approx(4 / 5)
    (loss,) = method(ones(dims=dims), GENERATE).terms.values()
    assert loss.item() == pytest.approx(math.log(5 / 4), rel=1e-5)


def test_the_minimax_game_by_hand():
    method = ssgan(Proportional(0.0, math.log(3)), game="minimax")
    assert method(ones(), GENERATE).terms["adversarial"].item() == pytest.approx(-math.log(5), rel=1e-5)


def test_certain_verdicts_have_finite_losses():
    for scale in (-300.0, 300.0):
        method = ssgan(Proportional(scale, scale))
        for clock in (SEGMENT, GENERATE):
            assert all(term.isfinite() for term in method(ones(), clock).terms.values())


def test_dice_joins_cross_entropy_by_default():
    data = batch(torch.randn(4, 1, 16, 16), 2)
    logits = Proportional(0.0, 1.0)(data.labeled.image).logits
    both = 0.5 * (cross_entropy(logits, data.labeled.label) + dice(logits.softmax(1), data.labeled.label))
    for hp, expected in (({}, both), ({"dice": False}, cross_entropy(logits, data.labeled.label))):
        terms = ssgan(Proportional(0.0, 1.0), **hp)(data, SEGMENT).terms
        assert terms["supervised"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_only_unlabeled_images_are_real_and_only_labeled_ones_have_classes():
    image = torch.cat([torch.ones(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)])
    terms = ssgan(Proportional(0.0, math.log(3)), dice=False)(batch(image, 2), SEGMENT).terms
    assert terms["supervised"].item() == pytest.approx(math.log(4 / 3), rel=1e-5)
    assert terms["real"].item() == pytest.approx(0.5 * math.log(3 / 2), rel=1e-5)  # two classes of logit 0
    assert terms["fake"].item() == pytest.approx(0.5 * math.log(3), rel=1e-5)


def test_each_player_learns_in_its_own_phase():
    method, data = ssgan(), batch(torch.randn(4, 1, 16, 16), 2)
    for term in method(data, SEGMENT).terms.values():
        assert gradients(method, term) == [True, False]
    assert gradients(method, method(data, GENERATE).terms["adversarial"]) == [False, True]
    own = [{id(p) for p in method.trainable(phase)} for phase in ("segment", "generate")]
    assert own == [{id(p) for p in player.parameters()} for player in (method.net, method.generator)]
    (stage,) = method.stages()
    assert [phase.name for phase in stage.phases] == ["segment", "generate"]
    assert stage.phases[0].adam is None and stage.phases[1].schedule == "poly"
    assert stage.phases[1].adam == Adam(2e-4, (0.9, 0.99), 5e-4)


def test_generated_images_do_not_move_running_statistics():
    method, data = ssgan(), batch(torch.randn(4, 1, 16, 16), 2)
    twin = copy.deepcopy(method.net)
    torch.manual_seed(0)
    method(data, SEGMENT)
    torch.manual_seed(0)
    twin(data.image)
    for _ in range(2):
        assert all(map(torch.equal, method.net.buffers(), twin.buffers()))
        method(data, GENERATE)
    assert twin.get_buffer([name for name, _ in twin.named_buffers()][-1]) == 1  # a counter: there are some


@pytest.mark.parametrize("dims", [2, 3])
def test_generated_images_are_new_within_the_range_of_each_channel_and_as_many(dims):
    image = torch.rand(3, 2, *(16,) * dims) * torch.tensor([1.0, 50.0]).view(1, 2, *[1] * dims) - 7
    method = ssgan(dims=dims, channels=2)
    one, other = method.generated(image), method.generated(image)
    assert one.shape == image.shape and not torch.equal(one, other)
    for channel in range(2):
        low, high = image[:, channel].aminmax()
        assert low < one[:, channel].min() < one[:, channel].max() < high
    method.generator = nn.Module()  # what says -1, 0 and 1 makes the lowest, the middle and the highest value
    method.generator.forward = lambda noise: torch.tensor([-1.0, 0, 1]).view(3, 1, *[1] * dims).expand_as(image)
    found = method.generated(image)[:, 1].flatten(1)[:, 0]
    low, high = image[:, 1].aminmax()
    assert torch.allclose(found, torch.stack([low, (low + high) / 2, high]), atol=1e-4)


@pytest.mark.parametrize("game", ["non_saturating", "minimax"])
def test_the_generator_learns_to_be_taken_for_real(game):
    """The segmenter takes bright images for real."""
    method, data = ssgan(Proportional(1.0, 1.0), game=game), batch(torch.randn(8, 1, 16, 16), 2)
    optimizer = torch.optim.Adam(method.trainable("generate"), 1e-2)
    before = method.generated(data.unlabeled.image).mean()
    for _ in range(20):
        optimizer.zero_grad()
        sum(method(data, GENERATE).terms.values()).backward()
        optimizer.step()
    assert method.generated(data.unlabeled.image).mean() > before + 1


def test_without_unlabeled_images_the_segmenter_learns_labels_only():
    method, data = ssgan(), batch(torch.randn(2, 1, 16, 16), 2)
    assert set(method(data, SEGMENT).terms) == {"supervised"}
    losses = method(data, GENERATE)
    assert set(losses.terms) == {"adversarial"} and gradients(method, losses.terms["adversarial"]) == [False, True]


def test_prediction_is_a_softmax_over_the_real_classes():
    probability = ssgan(Proportional(0.0, math.log(3))).predict(torch.ones(1, 1, 4, 4))
    assert torch.allclose(probability[0, :, 0, 0], torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize(("hp", "said"), [({"noise": 0}, "hp.noise 0"), ({"weight": -1.0}, "hp.weight -1")])
def test_impossible_hyper_parameters_are_refused(hp, said):
    with pytest.raises(UserError, match=said):
        Config(**hp)


def test_learning_rates_fall_as_the_authors():
    for name in ("LA", "Pancreas"):
        (spec,), _ = config.parse(["--method", "ssgan", "--dataset", name])
        assert spec.schedule == "poly"
