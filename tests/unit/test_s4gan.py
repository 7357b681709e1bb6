"""s4GAN by hand: a critic that is known, on predictions and images that are known."""

import math

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec, Output
from networks.discriminator import Verdict
from ssl4mis import config
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Adam, Task
from ssl4mis.methods.s4gan import S4GAN, Config, unit_range

LN3 = math.log(3)
SEGMENT, CRITICIZE = (Clock(torch.tensor(500), 1000, phase=phase) for phase in ("segment", "criticize"))


class Fixed(nn.Module):
    """A network that says the same to every batch, and counts how often."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.calls = nn.Parameter(logits), 0

    def forward(self, image):
        self.calls += 1
        return Output({"seg": self.logits}, None)


class Means(nn.Module):
    """A critic with two features, the mean of class 1 and that of the image; the logit is the first times 4 ln 3."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4 * LN3))

    def forward(self, maps, image):
        features = torch.stack([maps[:, 1].flatten(1).mean(1), image.flatten(1).mean(1)], 1)
        return Verdict(self.scale * features[:, :1], features)


def s4gan(logits, **hp):
    method = S4GAN(lambda: Fixed(logits.clone()), Task(logits.shape[1], logits.ndim - 2), Config(**hp))
    method.critic = Means()
    return method


def odds(*values, space=(2, 3)):
    """Logits of samples whose class 1 is everywhere these times as likely as class 0."""
    each = torch.tensor([[0.0, math.log(value)] for value in values])
    return each.view(-1, 2, *[1] * len(space)).repeat(1, 1, *space)


def batch(labeled=1, unlabeled=1, space=(2, 3)):
    """All labels are 1; a third of a labeled image is 5, of an unlabeled one two thirds, the rest of both is 2."""
    image, label = torch.full((labeled + unlabeled, 1, *space), 2.0), torch.ones(labeled, *space, dtype=torch.uint8)
    image[:labeled, 0, :, 0] = 5
    image[labeled:, 0, :, :2] = 5
    return Batch(image, Half(image[:labeled], label, ()), Half(image[labeled:], None, ()))


def gradients(method, term):
    """Whether a term moves the segmenter and the critic."""
    found = torch.autograd.grad(term, [method.net.logits, method.critic.scale], retain_graph=True, allow_unused=True)
    return [g is not None and bool(g.any()) for g in found]


@pytest.mark.parametrize("space", [(2, 3), (2, 3, 4)])
def test_losses_by_hand(space):
    """Unlabeled p is 1/4, so features are 1/4 and 2/3 against 1 and 1/3, and the critic's odds of a label 3."""
    method = s4gan(odds(3, 1 / 3, space=space), dice=False)
    terms, watch = method(batch(space=space), SEGMENT)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx({
        "supervised": math.log(4 / 3), "feature_matching": 0.1 * (3 / 4 + 1 / 3) / 2,
        "self_training": math.log(4 / 3)}, rel=1e-5)
    assert watch["fooled"] == 1
    terms, watch = method(batch(space=space), CRITICIZE)
    assert terms["fake"].item() == pytest.approx(0.5 * math.log(4), rel=1e-5)
    assert terms["real"].item() == pytest.approx(0.5 * math.log(82 / 81), rel=1e-4)
    assert watch["judged_real/predictions"].item() == pytest.approx(3 / 4)
    assert watch["judged_real/labels"].item() == pytest.approx(81 / 82)


def test_weights():
    terms = [s4gan(odds(3, 1 / 3), feature_matching=a, self_training=b)(batch(), SEGMENT).terms
             for a, b in ((1, 1), (0.5, 2))]
    shares = {name: (terms[1][name] / terms[0][name]).item() for name in terms[0]}
    assert shares == pytest.approx({"supervised": 1, "feature_matching": 0.5, "self_training": 2})


def test_features_are_compared_as_means_over_the_images():
    """Two unlabeled images of p 1/4 and 3/4 have the mean of one labeled image whose half is 1."""
    data = batch(1, 2)
    label = torch.tensor([[[0, 0, 0], [1, 1, 1]]], dtype=torch.uint8)
    data = data._replace(labeled=data.labeled._replace(label=label, image=data.unlabeled.image[:1]))
    terms = s4gan(odds(1, 1 / 3, 3))(data, SEGMENT).terms
    assert terms["feature_matching"].item() == pytest.approx(0, abs=1e-7)


def test_self_training_is_on_images_that_fool_the_critic():
    """p 1/4 and 3/4: odds of a label 3 and 27. Beyond 3/4 the second one alone is left, beyond 27/28 none."""
    logits = odds(1, 1 / 3, 3)
    logits[2, 1, 0, 0] = 2 * LN3  # p 9/10 in one of six voxels
    one, two = math.log(4 / 3), (5 * math.log(4 / 3) + math.log(10 / 9)) / 6
    for threshold, expected, share in ((0.6, (one + two) / 2, 1), (0.8, two, 0.5), (0.99, 0, 0)):
        terms, watch = s4gan(logits, threshold=threshold)(batch(1, 2), SEGMENT)
        assert terms["self_training"].item() == pytest.approx(expected, rel=1e-5)
        assert watch["fooled"] == share


@pytest.mark.parametrize(("hp", "step", "started"), [({}, 32, False), ({}, 33, True), ({"start": 0.0}, 0, True)])
def test_self_training_starts_later(hp, step, started):
    terms = s4gan(odds(3, 3), **hp)(batch(), SEGMENT._replace(step=torch.tensor(step))).terms
    assert (terms["self_training"] > 0) == started and terms["feature_matching"] > 0


def test_each_player_learns_in_its_own_phase():
    method = s4gan(odds(3, 1 / 3))
    for term in method(batch(), SEGMENT).terms.values():
        assert gradients(method, term) == [True, False]
    for term in method(batch(), CRITICIZE).terms.values():
        assert gradients(method, term) == [False, True]
    own = [{id(p) for p in method.trainable(phase)} for phase in ("segment", "criticize")]
    assert own == [{id(p) for p in player.parameters()} for player in (method.net, method.critic)]
    (stage,) = method.stages()
    assert [(p.name, p.adam, p.schedule) for p in stage.phases] == [
        ("segment", None, None), ("criticize", Adam(1e-4, (0.9, 0.99), 0.0), "poly")]


def test_unsupervised_terms_are_of_unlabeled_predictions():
    method = s4gan(odds(3, 3))
    terms = method(batch(), SEGMENT).terms
    for name, halves in (("supervised", [True, False]), ("feature_matching", [False, True]),
                         ("self_training", [False, True])):
        (gradient,) = torch.autograd.grad(terms[name], method.net.logits, retain_graph=True)
        assert [bool(half.any()) for half in gradient] == halves


def test_the_critic_sees_the_predictions_of_the_same_step():
    method = s4gan(odds(3, 1 / 3))
    method(batch(), SEGMENT)
    with torch.no_grad():
        method.net.logits.zero_()
    assert method(batch(), CRITICIZE).terms["fake"].item() == pytest.approx(0.5 * math.log(4), rel=1e-5)
    assert method.net.calls == 1


def test_what_the_critic_sees():
    """Predictions with unlabeled images, one-hot labels with labeled ones, images by their own range."""
    seen = []
    method = s4gan(torch.zeros(2, 3, 2, 3))
    method(batch(), SEGMENT)
    method.critic.register_forward_pre_hook(lambda critic, inputs: seen.append(inputs))
    label = torch.tensor([[[0, 1, 2], [2, 2, 0]]], dtype=torch.uint8)
    data = batch()
    method(data._replace(labeled=data.labeled._replace(label=label)), CRITICIZE)
    (prediction, theirs), (truth, mine) = seen
    assert torch.allclose(prediction, torch.full((1, 3, 2, 3), 1 / 3)) and torch.equal(truth.argmax(1), label.long())
    assert truth.dtype == torch.float32 and torch.equal(truth.sum(1), torch.ones(1, 2, 3))
    assert theirs[0, 0].tolist() == [[1, 1, 0]] * 2 and mine[0, 0].tolist() == [[1, 0, 0]] * 2


def test_every_image_has_its_own_range():
    image = torch.tensor([[[0.0, 2], [4, 1]], [[-3, -3], [7, -1]], [[5, 5], [5, 5]]]).unsqueeze(1)
    expected = [[[0, 0.5], [1, 0.25]], [[0, 0], [1, 0.2]], [[0, 0], [0, 0]]]
    assert torch.allclose(unit_range(image)[:, 0], torch.tensor(expected))
    channels = torch.tensor([[[[1.0, 2]], [[3, 5]]]])
    assert unit_range(channels).flatten().tolist() == [0, 0.25, 0.5, 1], "the channels of an image share a range"


def test_dice_joins_cross_entropy_by_default():
    logits, label = odds(3, 3), batch().labeled.label
    both = 0.5 * (cross_entropy(logits[:1], label) + dice(logits[:1].softmax(1), label))
    assert s4gan(logits)(batch(), SEGMENT).terms["supervised"].item() == pytest.approx(both.item())


def test_without_unlabeled_images_predictions_of_labeled_ones_are_what_the_critic_unmasks():
    method = s4gan(odds(3), dice=False)
    terms = method(batch(unlabeled=0), SEGMENT).terms
    assert {name: term.item() for name, term in terms.items()} == pytest.approx({"supervised": math.log(4 / 3)})
    terms = method(batch(unlabeled=0), CRITICIZE).terms
    assert terms["fake"].item() == pytest.approx(0.5 * math.log(28), rel=1e-5)
    assert terms["real"].item() == pytest.approx(0.5 * math.log(82 / 81), rel=1e-4)


def test_the_critic_is_four_times_as_wide_and_sees_maps_and_images():
    build = networks.Build("vnet", 3, NetSpec(2, (16, 16), width=2))
    critic = S4GAN(build, Task(3, 2, 2), Config()).critic
    verdict = critic(torch.zeros(4, 3, 16, 16), torch.zeros(4, 2, 16, 16))
    assert verdict.logits.shape == (4, 1) and verdict.features.shape == (4, 64)
    assert critic.dropout.p == 0.5


def test_prediction():
    probability = s4gan(odds(3)).predict(torch.zeros(1, 1, 2, 3))
    assert torch.allclose(probability[0, :, 0, 0], torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize(("hp", "said"), [({"threshold": 1.5}, "threshold"), ({"start": -0.1}, "start"),
                                          ({"self_training": -1.0}, "self_training"),
                                          ({"feature_matching": -1.0}, "feature_matching")])
def test_impossible_hyper_parameters_are_refused(hp, said):
    with pytest.raises(UserError, match=said):
        Config(**hp)


def test_learning_rates_fall_as_the_authors():
    for name in ("LA", "Pancreas"):
        (spec,), _ = config.parse(["--method", "s4gan", "--dataset", name])
        assert spec.schedule == "poly"
