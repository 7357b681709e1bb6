"""FixMatch on voxels that say their own odds: which of them count, who labels them, what they learn, and refusals."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import networks
from networks.base import NetSpec, Output
from ssl4mis import augment, config
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import dice, segmentation
from ssl4mis.matching import last, perturbed
from ssl4mis.method import Task
from ssl4mis.methods.fixmatch import Config, FixMatch, certainty, complementary, lead

LAST = Clock(torch.tensor(999), 1000)
WEAK = [[99.0, 9.0], [1 / 9, 1 / 99]]  # odds of class 1: it is 0.99, 0.9, 0.1 and 0.01
LABEL, SURE = [[1, 1], [0, 0]], [[1, 0], [0, 1]]
ONLY_ENTROPY = {"dice": False, "u_dice": False}


class Odds(nn.Module):
    """The logit of class 1 is the voxel's value, that of class 0 is 0; in training times `mood`."""

    def __init__(self, mood=1.0):
        super().__init__()
        self.scale, self.mood, self.seen = nn.Parameter(torch.ones(())), mood, []

    def forward(self, image):
        self.seen.append(image)
        value = self.scale * (self.mood if self.training else 1.0) * image
        return Output({"seg": torch.cat([torch.zeros_like(value), value], 1)}, None)


def odds(values, samples=1):
    return torch.tensor(values).log().expand(samples, 1, 2, 2).clone()


def made(mood=1.0, **hp):
    return FixMatch(lambda: Odds(mood), Task(2, 2), Config(**hp)).train()


def batch(weak=WEAK, strong=((1.0, 1.0), (1.0, 1.0)), valid=((1, 1), (1, 1)), partner=None, unlabeled=1):
    """One labeled sample whose voxels are undecided, and an unlabeled one."""
    labeled = torch.zeros(1, 1, 2, 2)
    inside = torch.tensor(valid).bool().expand(unlabeled, 2, 2)
    half = Half(odds(weak, unlabeled), None, ("u",) * unlabeled, (odds(strong, unlabeled),), inside)
    truth = torch.tensor([LABEL], dtype=torch.uint8)
    return Batch(torch.cat([labeled, half.image]), Half(labeled, truth, ("l",)), half, partner or half)


@pytest.fixture
def box(monkeypatch):
    """The boxes of the next steps: none, until a list of voxels is put in."""
    places = []

    def boxes(count, space, *_):
        found = torch.zeros(count, *space, dtype=torch.bool)
        for place in places:
            found[:, *place] = True
        return found

    monkeypatch.setattr(augment, "boxes", boxes)
    return places


# --- what counts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("valid", "share"), [(((1, 1), (1, 1)), 2 / 4), (((0, 1), (1, 1)), 1 / 3),
                                              (((1, 0), (1, 1)), 2 / 3), (((0, 0), (0, 0)), 0)])
def test_the_sum_over_sure_voxels_is_divided_by_the_valid_ones(valid, share, box):
    """The strong view is undecided: every voxel costs ln 2."""
    terms, watch = made(**ONLY_ENTROPY)(batch(valid=valid), LAST)
    assert terms["pseudo"].item() == pytest.approx(0.5 * share * math.log(2))
    assert watch["sure"] == (torch.tensor(SURE) * torch.tensor(valid)).float().mean()


def test_labels_are_those_of_the_weak_view(box):
    """The strong view says 3 to 1 for class 1 everywhere: that is right in one sure voxel and wrong in the other."""
    terms = made(**ONLY_ENTROPY)(batch(strong=[[3.0, 3.0], [3.0, 3.0]]), LAST).terms
    assert terms["pseudo"].item() == pytest.approx(0.5 * (math.log(4 / 3) + math.log(4)) / 4)


def test_dice_is_over_the_sure_voxels(box):
    """Of both classes 2 * 1/2 over 2 * 1/4 + 1."""
    terms = made()(batch(), LAST).terms
    overlap = 1 - 1 / 1.5
    assert terms["pseudo"].item() == pytest.approx(0.5 * 0.5 * (math.log(2) / 2 + overlap), rel=1e-4)
    assert terms["supervised"].item() == pytest.approx(0.5 * 0.5 * (math.log(2) + 1 - 2 / 3), rel=1e-4)


@pytest.mark.parametrize(("tau", "share"), [(1.01, 0), (0.95, 2 / 4), (0.85, 1), (0.0, 1)])
def test_threshold(tau, share, box):
    terms, watch = made(tau=tau, **ONLY_ENTROPY)(batch(), LAST)
    assert terms["pseudo"].item() == pytest.approx(0.5 * share * math.log(2)) and watch["sure"] == share


@pytest.mark.parametrize(("weak", "share", "foreground"), [(WEAK, 0.5, 0.5), ([[9.0, 9.0], [1 / 99, 1 / 99]], 0.5, 0),
                                                           ([[99.0, 1 / 9], [1 / 9, 1 / 9]], 0.25, 1),
                                                           ([[1 / 99, 1 / 9], [1 / 9, 1 / 9]], 0.25, 0)])
def test_how_much_of_the_foreground_is_sure_is_watched(weak, share, foreground, box):
    watch = made()(batch(weak), LAST).watch
    assert (watch["sure"], watch["sure/foreground"]) == (share, foreground)


def test_nothing_sure_costs_nothing(box):
    terms = made(tau=1.01)(batch(), LAST).terms
    assert terms["pseudo"] == 0


def test_without_threshold_and_with_equal_views_pseudo_labels_are_its_own(box):
    terms = made(tau=0.0, **ONLY_ENTROPY)(batch(strong=WEAK), LAST).terms
    own = -(2 * math.log(0.99) + 2 * math.log(0.9)) / 4
    assert terms["pseudo"].item() == pytest.approx(0.5 * own, rel=1e-5)


def test_unsure_voxels_as_background(box):
    """Three voxels are labeled 0, in all of which the strong view is 3 to 1 wrong."""
    terms, watch = made(unsure="background", **ONLY_ENTROPY)(batch(strong=[[3.0, 3.0], [3.0, 3.0]]), LAST)
    assert terms["pseudo"].item() == pytest.approx(0.5 * (math.log(4 / 3) + 3 * math.log(4)) / 4)
    assert watch["sure"] == 0.5


@pytest.mark.parametrize(("tau", "sure"), [(0.88, 1.0), (0.9, 0.5), (0.995, 0.0)])
def test_confidence_as_a_lead(tau, sure, box):
    """Of 0.9 over 0.1 it is 8/9, of 0.99 over 0.01 it is 98/99."""
    assert made(tau=tau, confidence="range")(batch(), LAST).watch["sure"] == sure
    found = lead(torch.tensor([0.6, 0.3, 0.1]).view(1, 3, 1))
    torch.testing.assert_close(found, torch.tensor([5 / 6, 2 / 6, 0.0]).view(1, 3, 1))


# --- mixing ----------------------------------------------------------------------------------------------------------


def test_a_box_takes_image_target_and_valid_voxels_from_the_partner(box):
    """The second voxel is sure and wrong there, the third one is beyond the partner's volume."""
    box += [(0, 1), (1, 0)]
    weak, strong = [[99.0, 1 / 99], [99.0, 99.0]], [[7.0, 3.0], [7.0, 7.0]]
    other = batch(weak, strong, valid=((1, 1), (0, 1))).unlabeled
    method = made(**ONLY_ENTROPY)
    terms, watch = method(batch(partner=other), LAST)
    assert watch["sure"] == 3 / 4
    assert terms["pseudo"].item() == pytest.approx(0.5 * (2 * math.log(2) + math.log(4)) / 3)
    torch.testing.assert_close(method.student.seen[-1], odds([[1.0, 3.0], [7.0, 1.0]]))


def test_boxes_are_those_that_the_hyper_parameters_say(monkeypatch):
    asked = []
    monkeypatch.setattr(augment, "boxes", lambda *given: asked.append(given) or torch.zeros(3, 2, 2).bool())
    made(cutmix=0.3, box_min=0.1, box_max=0.2)(batch(unlabeled=3), LAST)
    (count, space, probability, share, device), = asked
    assert (count, tuple(space), probability, share, device.type) == (3, (2, 2), 0.3, (0.1, 0.2), "cpu")


# --- who labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pseudo", "right"), [("steady", True), ("shared", False), ("teacher", False)])
def test_who_labels(pseudo, right, box):
    """The network says the opposite in training, its average too; only a steady pass is not in training."""
    method = made(mood=-1.0, pseudo=pseudo, **ONLY_ENTROPY)
    loss = method(batch(strong=WEAK), LAST).terms["pseudo"].item()
    assert loss == pytest.approx(-0.5 * math.log(0.01 if right else 0.99) / 2, rel=1e-4)
    assert method.student.training


def test_the_moving_average_labels(box):
    method = made(pseudo="teacher", decay=0.5, **ONLY_ENTROPY)
    method.student.scale.data.fill_(-1.0)
    assert method(batch(strong=WEAK), LAST).terms["pseudo"].item() == pytest.approx(-0.5 * math.log(0.01) / 2, rel=1e-4)
    method.after_step(LAST)
    assert method.teacher.net.scale == 0.0


def test_targets_have_no_gradient(box):
    for pseudo in ("steady", "shared", "teacher"):
        method, data = made(pseudo=pseudo, tau=0.0, **ONLY_ENTROPY), batch()
        grad, = torch.autograd.grad(method(data, LAST).terms["pseudo"], method.student.scale)
        assert grad == 0  # the strong view's voxels are 0: only a target could have one


@pytest.mark.parametrize(("hp", "average"), [({}, None), ({"evaluate": "teacher"}, "state"),
                                             ({"pseudo": "teacher"}, "parameters"),
                                             ({"pseudo": "teacher", "evaluate": "teacher"}, "parameters")])
def test_a_moving_average_is_there_where_it_is_of_use(hp, average):
    method = made(**hp)
    assert (method.teacher and method.teacher.average) == average


@pytest.mark.parametrize(("evaluate", "expected"), [("student", 0.9), ("teacher", 0.1)])
def test_prediction(evaluate, expected):
    method = made(pseudo="teacher", evaluate=evaluate).eval()
    method.teacher.net.scale.data.fill_(-1.0)
    assert method.predict(odds([[9.0] * 2] * 2))[0, 1, 0, 0].item() == pytest.approx(expected)


# --- the complementary loss of SSL4MIS -------------------------------------------------------------------------------


def test_certainty():
    assert certainty(torch.randn(2, 3, 1, 1).expand(2, 3, 4, 5)).item() == pytest.approx(0, abs=1e-6)
    one = torch.zeros(1, 2, 4)  # class 1 is all but impossible, save in the last voxel
    one[0, 1, :3], one[0, 0, 3] = -60.0, -60.0
    alone, spread = 1.0, 1 - math.log(3) / math.log(4)
    assert certainty(one).item() == pytest.approx((alone + spread) / 2, rel=1e-5)
    assert certainty(torch.tensor([[[-1e4, 0.0], [1e4, 0.0]]])).isfinite()


def test_complementary_by_hand():
    """Both classes lie 3 to 1, or 1 to 3, in two voxels. The least likely class is 0; 1 - p is 1/4 and 3/4."""
    logits = torch.stack([torch.zeros(2), torch.tensor([math.log(3), -math.log(3)])])[None]
    likely = torch.tensor([[[0.2, 0.2], [0.8, 0.8]]])
    sure = 1 + (0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    entropy = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.5))) / 2
    assert certainty(logits).item() == pytest.approx(sure, rel=1e-5)
    assert complementary(logits, likely).item() == pytest.approx(sure**2 * entropy, rel=1e-5)


def test_complementary_is_over_all_samples_and_mixed_as_they_are(box, monkeypatch):
    seen, value = [], torch.tensor(0.4)
    monkeypatch.setattr("ssl4mis.methods.fixmatch.complementary", lambda *given: seen.append(given) or value)
    box += [(0, 0)]
    other = batch(weak=[[1 / 9] * 2] * 2, strong=[[5.0] * 2] * 2).unlabeled
    method = made(complementary=0.25, weight=0.2)
    assert method(batch(partner=other), LAST).terms["complementary"].item() == pytest.approx(0.2 * 0.25 * 0.4)
    assert "complementary" not in made()(batch(), LAST).terms
    (strong, likely), = seen
    torch.testing.assert_close(strong[:, 1].exp(), torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[5.0, 1.0], [1.0, 1.0]]]))
    torch.testing.assert_close(likely[:, 1], torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.1, 0.9], [0.1, 0.01]]]))
    assert not likely.requires_grad


# --- whole steps -----------------------------------------------------------------------------------------------------


def network(dims, classes):
    torch.manual_seed(0)
    return networks.Build("vnet", classes, NetSpec(1, (16,) * dims, 2))


def crops(dims, classes, labeled=2, unlabeled=2):
    torch.manual_seed(1)
    space = (16,) * dims
    image, inside = torch.randn(labeled + unlabeled, 1, *space), torch.ones(unlabeled, *space, dtype=torch.bool)
    inside[:, :3] = False
    label = torch.randint(classes, (labeled, *space), dtype=torch.uint8)
    half, other = (Half(x, None, ("u",) * unlabeled, (x + 0.3 * torch.randn_like(x),), valid) for x, valid in (
        (image[labeled:], inside), (torch.randn(unlabeled, 1, *space), inside.flip(1))))
    return Batch(image, Half(image[:labeled], label, ("l",) * labeled), half, other)


@pytest.mark.parametrize(("dims", "classes"), [(2, 4), (3, 2)])
@pytest.mark.parametrize("pseudo", ["steady", "shared"])
def test_a_step_written_down_a_second_time(dims, classes, pseudo, box):
    """Half the supervised loss and half that of confident pseudo-labels, with a network that has dropout."""
    box += [(slice(4, 12), slice(2, 9))]
    hp, data = Config(tau=0.8, pseudo=pseudo), crops(dims, classes)
    method = FixMatch(network(dims, classes), Task(classes, dims), hp)
    method.student.heads["seg"].conv.weight.data *= 200 if pseudo == "steady" else 20
    net, (u, v) = copy.deepcopy(method.student), (data.unlabeled, data.partner)

    torch.manual_seed(2)
    weak = net.train()(data.image).logits
    with torch.no_grad():
        mine, theirs = (net.eval()(half.image).logits.softmax(1) for half in (u, v))
    if pseudo == "shared":
        mine = weak[2:].detach().softmax(1)
    image, target, valid = u.strong[0].clone(), mine.clone(), u.valid.clone()
    for new, old in ((image, v.strong[0]), (target, theirs), (valid[:, None], v.valid[:, None])):
        new[:, :, 4:12, 2:9] = old[:, :, 4:12, 2:9]
    confidence, label = target.max(1)
    sure = (confidence >= 0.8) & valid
    # one log-softmax for both terms: gradients near 0 would show the rounding of two
    strong = net.train()(image).logits.log_softmax(1)
    entropy = (F.nll_loss(strong, label, reduction="none") * sure).sum() / valid.sum()
    expected = 0.5 * segmentation(weak[:2], data.labeled.label)
    expected = expected + 0.25 * (entropy + dice(strong.exp(), label, mask=sure))
    expected.backward()

    torch.manual_seed(2)
    terms, watch = method.train()(data, LAST)
    sum(terms.values()).backward()
    assert 0.1 < watch["sure"] < 0.9 and watch["sure"] == sure.float().mean()
    assert sum(terms.values()).item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, other in zip(method.student.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_an_average_that_makes_no_pass_has_statistics_all_the_same(box):
    method = FixMatch(network(2, 2), Task(2, 2), Config(evaluate="teacher")).train()
    method(crops(2, 2), LAST)
    method.after_step(Clock(torch.tensor(0), 1000))
    mine, theirs = (dict(net.named_buffers()) for net in (method.teacher.net, method.student))
    names = [name for name in mine if name.endswith("running_var")]
    assert names and all(torch.equal(mine[name], theirs[name]) and (mine[name] != 1).any() for name in names)


def test_perturbed_features_are_those_of_the_last_samples():
    seen = []

    class Decoder:
        def decode(self, skips):
            seen.append(skips)
            return Output({"seg": skips[0]}, None)

    features = [torch.arange(12.0).view(3, 2, 2), torch.ones(3, 4, 1)]
    assert torch.equal(perturbed(Decoder(), features, nn.Identity(), 2), features[0][1:])
    assert [x.shape for x in seen[0]] == [(2, 2, 2), (2, 4, 1)] and torch.equal(last(features[0], 1), features[0][2:])


# --- weights, refusals, presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hp", "step", "weight"), [
    ({}, 0, 0.5), ({"weight": 0.2, "ramp": 1.0}, 0, 0.2 * math.exp(-5)), ({"weight": 0.2, "ramp": 1.0}, 1000, 0.2),
    ({"weight": 0.2, "ramp": 0.5}, 500, 0.2),
])
def test_weights(hp, step, weight, box):
    terms, watch = made(tau=0.0, supervised=0.7, **ONLY_ENTROPY, **hp)(batch(), Clock(torch.tensor(step), 1000))
    assert terms["supervised"].item() == pytest.approx(0.7 * math.log(2))
    assert terms["pseudo"].item() == pytest.approx(weight * math.log(2))
    assert ("weight" in watch) == ("ramp" in hp)


def test_without_unlabeled_samples_it_is_supervised():
    assert set(made(complementary=1.0)(batch(unlabeled=0), LAST).terms) == {"supervised"}


@pytest.mark.parametrize(("hp", "message"), [
    ({"cutmix": 1.5}, "hp.cutmix 1.5: expected 0 to 1"), ({"tau": -0.1}, "hp.tau -0.1"), ({"decay": 1.1}, "hp.decay"),
    ({"ramp_every": 0}, "hp.ramp_every"), ({"weight": float("nan")}, "hp.weight"),
    ({"box_min": 0.5}, "hp.box_min 0.5: expected at most hp.box_max 0.4"),
])
def test_bad_values_are_refused(hp, message):
    with pytest.raises(UserError, match=message):
        Config(**hp)


@pytest.mark.parametrize(("words", "iterations", "batch"), [
    ("LA", 15000, 4), ("Pancreas", 15000, 4), ("BraTS", 30000, 4), ("ACDC --protocol slices", 30000, 24),
])
def test_presets(words, iterations, batch):
    (spec,), _ = config.parse(f"--method fixmatch --dataset {words}".split())
    assert (spec.iterations, spec.schedule, spec.labeled_batch + spec.unlabeled_batch) == (iterations, "poly", batch)
