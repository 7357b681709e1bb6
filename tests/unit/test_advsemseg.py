"""AdvSemSeg by hand: a critic that is known, on predictions that are known."""

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
from ssl4mis.methods.advsemseg import AdvSemSeg, Config, enlarged

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


class Scaled(nn.Module):
    """A critic whose logit is the probability of class 1 times 4 ln 3."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4 * LN3))

    def forward(self, maps):
        return self.scale * maps[:, 1:2]


def advsemseg(logits, **hp):
    method = AdvSemSeg(lambda: Fixed(logits.clone()), Task(logits.shape[1], logits.ndim - 2), Config(**hp))
    method.critic = Scaled()
    return method


def odds(*values, space=(2, 3)):
    """Logits of samples whose class 1 is everywhere these times as likely as class 0."""
    each = torch.tensor([[0.0, math.log(value)] for value in values])
    return each.view(-1, 2, *[1] * len(space)).repeat(1, 1, *space)


def batch(labeled=1, unlabeled=1, space=(2, 3)):
    """All labels are 1."""
    image, label = torch.zeros(labeled + unlabeled, 1, *space), torch.ones(labeled, *space, dtype=torch.uint8)
    return Batch(image, Half(image[:labeled], label, ()), Half(image[labeled:], None, ()))


def gradients(method, term):
    """Whether a term moves the segmenter and the critic."""
    found = torch.autograd.grad(term, [method.net.logits, method.critic.scale], retain_graph=True, allow_unused=True)
    return [g is not None and bool(g.any()) for g in found]


@pytest.mark.parametrize("space", [(2, 3), (2, 3, 4)])
def test_losses_by_hand(space):
    """Labeled p is 3/4, unlabeled 1/4: the critic's odds of a label are 27 and 3, and 81 where there is one."""
    method = advsemseg(odds(3, 1 / 3, space=space), dice=False)
    terms, watch = method(batch(space=space), SEGMENT)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx({
        "supervised": math.log(4 / 3), "adversarial/labeled": 0.01 * math.log(28 / 27),
        "adversarial/unlabeled": 0.001 * math.log(4 / 3), "self_training": 0.1 * math.log(4 / 3)}, rel=1e-5)
    assert watch["trusted"] == 1
    terms, watch = method(batch(space=space), CRITICIZE)
    assert terms["fake"].item() == pytest.approx(0.5 * (math.log(28) + math.log(4)) / 2, rel=1e-5)
    assert terms["real"].item() == pytest.approx(0.5 * math.log(82 / 81), rel=1e-4)
    assert watch["judged_real/predictions"].item() == pytest.approx((27 / 28 + 3 / 4) / 2)
    assert watch["judged_real/labels"].item() == pytest.approx(81 / 82)


def test_weights():
    terms = [advsemseg(odds(3, 1 / 3), adversarial_labeled=a, adversarial_unlabeled=b, self_training=c)(
        batch(), SEGMENT).terms for a, b, c in ((1, 1, 1), (0.5, 0.25, 2))]
    shares = {name: (terms[1][name] / terms[0][name]).item() for name in terms[0]}
    assert shares == pytest.approx({"supervised": 1, "adversarial/labeled": 0.5, "adversarial/unlabeled": 0.25,
                                    "self_training": 2})


def test_self_training_is_a_mean_over_trusted_voxels():
    """Odds of 1 and 1/3 at the critic's odds of 9 and 3; a threshold between them leaves ln 2, at own label 0 or 1."""
    logits = odds(3, 1)
    logits[1, 1, :, 1:] = -LN3
    for threshold, expected, share in ((0.2, (2 * math.log(2) + 4 * math.log(4 / 3)) / 6, 1),
                                       (0.8, math.log(2), 1 / 3), (0.95, 0, 0)):
        terms, watch = advsemseg(logits, threshold=threshold)(batch(), SEGMENT)
        assert terms["self_training"].item() == pytest.approx(0.1 * expected, rel=1e-5)
        assert watch["trusted"].item() == pytest.approx(share)


@pytest.mark.parametrize(("hp", "step", "started"), [({}, 249, False), ({}, 250, True), ({"start": 0.0}, 0, True)])
def test_self_training_starts_later(hp, step, started):
    terms = advsemseg(odds(3, 3), **hp)(batch(), SEGMENT._replace(step=torch.tensor(step))).terms
    assert (terms["self_training"] > 0) == started and terms["adversarial/unlabeled"] > 0


def test_each_player_learns_in_its_own_phase():
    method = advsemseg(odds(3, 1 / 3))
    for term in method(batch(), SEGMENT).terms.values():
        assert gradients(method, term) == [True, False]
    for term in method(batch(), CRITICIZE).terms.values():
        assert gradients(method, term) == [False, True]
    own = [{id(p) for p in method.trainable(phase)} for phase in ("segment", "criticize")]
    assert own == [{id(p) for p in player.parameters()} for player in (method.net, method.critic)]
    (stage,) = method.stages()
    assert [(p.name, p.adam, p.schedule) for p in stage.phases] == [
        ("segment", None, None), ("criticize", Adam(1e-4, (0.9, 0.99), 0.0), "poly")]


def test_self_training_does_not_learn_from_the_verdict():
    """Only through its own cross-entropy: at p = 3/4 of its own label, 1/4 per voxel."""
    method = advsemseg(odds(3, 3))
    (gradient,) = torch.autograd.grad(method(batch(), SEGMENT).terms["self_training"], method.net.logits)
    expected = 0.1 * torch.tensor([0.25, -0.25]).view(2, 1, 1).expand(2, 2, 3) / 6
    assert torch.allclose(gradient[1], expected, atol=1e-7) and not gradient[0].any()


def test_the_critic_sees_the_predictions_of_the_same_step():
    method = advsemseg(odds(3, 1 / 3))
    method(batch(), SEGMENT)
    with torch.no_grad():
        method.net.logits.zero_()
    fake = method(batch(), CRITICIZE).terms["fake"].item()
    assert method.net.calls == 1 and fake == pytest.approx(0.5 * (math.log(28) + math.log(4)) / 2, rel=1e-5)


def test_fooling_the_critic_makes_what_it_believes_likelier():
    method = advsemseg(odds(3, 3))
    for name in ("adversarial/labeled", "adversarial/unlabeled"):
        (gradient,) = torch.autograd.grad(method(batch(), SEGMENT).terms[name], method.net.logits)
        assert bool(gradient[:, 1].sum() < 0) and bool(gradient[:, 0].sum() > 0)


def test_labels_are_one_hot_for_the_critic():
    seen = []
    method = advsemseg(torch.zeros(2, 3, 2, 3))
    method(batch(), SEGMENT)
    method.critic.register_forward_pre_hook(lambda critic, inputs: seen.append(inputs[0]))
    label = torch.tensor([[[0, 1, 2], [2, 2, 0]]], dtype=torch.uint8)
    data = batch()
    method(data._replace(labeled=data.labeled._replace(label=label)), CRITICIZE)
    predictions, truth = seen
    assert predictions.shape == (2, 3, 2, 3) and torch.equal(truth.argmax(1), label.long())
    assert truth.dtype == torch.float32 and torch.equal(truth.sum(1), torch.ones(1, 2, 3))


def test_dice_joins_cross_entropy_by_default():
    logits, label = odds(3, 3), batch().labeled.label
    both = 0.5 * (cross_entropy(logits[:1], label) + dice(logits[:1].softmax(1), label))
    assert advsemseg(logits)(batch(), SEGMENT).terms["supervised"].item() == pytest.approx(both.item())


def test_without_unlabeled_images_the_labeled_terms_are_left():
    method = advsemseg(odds(3), dice=False)
    terms = method(batch(unlabeled=0), SEGMENT).terms
    assert {name: term.item() for name, term in terms.items()} == pytest.approx({
        "supervised": math.log(4 / 3), "adversarial/labeled": 0.01 * math.log(28 / 27)}, rel=1e-5)
    assert method(batch(unlabeled=0), CRITICIZE).terms["fake"].item() == pytest.approx(0.5 * math.log(28), rel=1e-5)


def test_verdicts_are_enlarged_linearly_from_corner_to_corner():
    row = torch.tensor([0.0, 1.0])
    assert torch.allclose(enlarged(row.view(1, 1, 1, 2), (1, 5)), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    assert torch.allclose(enlarged(row.view(1, 1, 2, 1, 1), (3, 2, 1))[0, :, 1, 0], torch.tensor([0, 0.5, 1]))


@pytest.mark.parametrize(("hp", "sides"), [({}, (2, 2)), ({"halvings": 5}, (1, 1)), ({"halvings": 2}, (8, 8))])
def test_the_critic_halves_the_sides_and_is_four_times_as_wide(hp, sides):
    build = networks.Build("vnet", 3, NetSpec(1, (32, 32), width=2))
    critic = AdvSemSeg(build, Task(3, 2), Config(**hp)).critic
    assert critic(torch.zeros(1, 3, 32, 32)).shape == (1, 1, *sides)
    assert [level.out_channels for level in critic.levels] == [8, 16, 32, 64, 1]


def test_prediction():
    probability = advsemseg(odds(3)).predict(torch.zeros(1, 1, 2, 3))
    assert torch.allclose(probability[0, :, 0, 0], torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize(("hp", "said"), [({"halvings": 0}, "halvings 0"), ({"halvings": 6}, "halvings 6"),
                                          ({"threshold": 1.5}, "threshold"), ({"start": -0.1}, "start"),
                                          ({"self_training": -1.0}, "self_training"),
                                          ({"adversarial_labeled": -1.0}, "adversarial_labeled"),
                                          ({"adversarial_unlabeled": -1.0}, "adversarial_unlabeled")])
def test_impossible_hyper_parameters_are_refused(hp, said):
    with pytest.raises(UserError, match=said):
        Config(**hp)


def test_learning_rates_fall_as_the_authors():
    for name in ("LA", "Pancreas"):
        (spec,), _ = config.parse(["--method", "advsemseg", "--dataset", name])
        assert spec.schedule == "poly"
