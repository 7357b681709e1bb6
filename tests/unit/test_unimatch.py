"""UniMatch against a second writing of its step, and where its parts come from: views, boxes, partners, features."""

import copy

import pytest
import torch
from torch.nn import functional as F

import networks
from networks.base import NetSpec
from ssl4mis import augment, config
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import dice, segmentation
from ssl4mis.matching import Target
from ssl4mis.method import Task
from ssl4mis.methods.unimatch import Config, UniMatch

LAST = Clock(torch.tensor(999), 1000)
BOXES = ((slice(4, 12), slice(2, 9)), (slice(0, 5), slice(8, 16)))
TERMS = ["supervised", "strong/first", "strong/second", "feature"]


def made(dims=2, classes=2, confident=1.0, **hp):
    torch.manual_seed(0)
    build = networks.Build("vnet", classes, NetSpec(1, (16,) * dims, 2))
    method = UniMatch(build, Task(classes, dims), Config(**hp)).train()
    method.net.heads["seg"].conv.weight.data *= confident
    return method


def crops(dims=2, classes=2, unlabeled=2):
    torch.manual_seed(1)
    space = (16,) * dims
    image, inside = torch.randn(2 + unlabeled, 1, *space), torch.ones(unlabeled, *space, dtype=torch.bool)
    inside[:, :3] = False

    def half(x, valid):
        return Half(x, None, ("u",) * unlabeled, tuple(x + 0.3 * torch.randn_like(x) for _ in range(2)), valid)

    labeled = Half(image[:2], torch.randint(classes, (2, *space), dtype=torch.uint8), ("l", "l"))
    return Batch(image, labeled, half(image[2:], inside), half(torch.randn(unlabeled, 1, *space), inside.flip(1)))


@pytest.fixture(autouse=True)
def boxes(monkeypatch):
    """The first and the second box in turn."""
    places = [*BOXES] * 2

    def draw(count, space, *_):
        found = torch.zeros(count, *space, dtype=torch.bool)
        found[:, *places.pop(0)] = True
        return found

    monkeypatch.setattr(augment, "boxes", draw)


@pytest.mark.parametrize(("dims", "classes"), [(2, 4), (3, 2)])
@pytest.mark.parametrize("pseudo", ["steady", "shared"])
@pytest.mark.parametrize("loss", ["auto", "ce"])
def test_a_step_written_down_a_second_time(dims, classes, pseudo, loss):
    """A network with dropout, but without that of features."""
    hp = {"tau": 0.8, "pseudo": pseudo, "loss": loss, "feature_dropout": 0.0}
    method, data = made(dims, classes, 200 if pseudo == "steady" else 20, **hp), crops(dims, classes)
    net, u, v = copy.deepcopy(method.net), data.unlabeled, data.partner

    def taught(logits, target, valid):
        confidence, label = target.max(1)
        sure = (confidence >= 0.8) & valid
        if classes > 2 and loss == "auto":
            return dice(logits.softmax(1), label, mask=sure)
        logs = logits.log_softmax(1)  # one for both terms: gradients near 0 would show the rounding of two
        entropy = (F.nll_loss(logs, label, reduction="none") * sure).sum() / valid.sum()
        return entropy if loss == "ce" else (entropy + dice(logs.exp(), label, mask=sure)) / 2

    torch.manual_seed(2)
    weak = net.train()(data.image)
    with torch.no_grad():
        mine, theirs = (net.eval()(half.image).logits.softmax(1) for half in (u, v))
    if pseudo == "shared":
        mine = weak.logits[2:].detach().softmax(1)
    views = []
    for number, place in enumerate(BOXES):
        views.append((u.strong[number].clone(), mine.clone(), u.valid[:, None].clone()))
        for new, old in zip(views[-1], (v.strong[number], theirs, v.valid[:, None]), strict=True):
            new[:, :, *place] = old[:, :, *place]
    strong = net.train()(torch.cat([image for image, *_ in views])).logits
    feature = net.decode([x[2:] for x in weak.features.encoder]).logits
    expected = {"supervised": segmentation(weak.logits[:2], data.labeled.label) / 2}
    for name, (_, target, valid), logits in zip(TERMS[1:3], views, (strong[:2], strong[2:]), strict=True):
        expected[name] = taught(logits, target, valid[:, 0]) / 8
    expected["feature"] = taught(feature, mine, u.valid) / 4

    torch.manual_seed(2)
    terms, watch = method(data, LAST)
    assert 0.1 < watch["sure"] < 0.9 and list(terms) == TERMS
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5) and value > 0, name
    sum(expected.values()).backward()
    sum(terms.values()).backward()
    for ours, other in zip(method.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_weights(monkeypatch):
    """Every loss replaced by one: what is left are the weights."""
    monkeypatch.setattr("ssl4mis.methods.unimatch.segmentation", lambda *_: torch.tensor(1.0))
    monkeypatch.setattr(UniMatch, "loss", lambda *_: torch.tensor(1.0))
    assert made()(crops(), LAST).terms == dict(zip(TERMS, (0.5, 0.125, 0.125, 0.25), strict=True))


@pytest.mark.parametrize(("classes", "loss", "expected"), [
    (2, "auto", 0.5 * (0.5 * 0.6931472 + 1 / 3)), (2, "dice", 1 / 3), (2, "ce", 0.5 * 0.6931472),
    (2, "ce+dice", 0.5 * (0.5 * 0.6931472 + 1 / 3)), (4, "auto", (2 * (1 - 0.5 / 1.125) + 2) / 4),
])
def test_losses_by_hand(classes, loss, expected):
    """Undecided logits. Two of four voxels are sure, one of class 0 and one of class 1; all four are valid."""
    probability = torch.full((1, classes, 4), 0.1 / classes)
    probability[0, [0, 1], [0, 1]] = 0.99
    target = Target.of(probability, torch.ones(1, 4, dtype=torch.bool))
    found = made(2, classes, loss=loss).loss(torch.zeros(1, classes, 4), target)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_perturbed_features_are_those_of_the_unlabeled_half(monkeypatch):
    method, seen = made(3, confident=20), []
    decode = method.net.decode
    monkeypatch.setattr(method.net, "decode", lambda skips: seen.append(skips) or decode(skips))
    method(crops(3, unlabeled=3), LAST)
    weak, perturbed = seen[0], seen[-1]
    assert len(perturbed) == len(weak) == 5
    dropped = 0
    for whole, part in zip(weak, perturbed, strict=True):
        assert part.shape == whole[2:].shape
        zero = part.flatten(2).abs().amax(2) == 0
        dropped += zero.sum()
        assert torch.equal(part[~zero], 2 * whole[2:][~zero])
    assert 0.3 < dropped / (sum(x.shape[1] for x in weak) * 3) < 0.7


def test_the_two_views_and_boxes_are_their_own(monkeypatch):
    """Where a box is, the partner's view of the same number; elsewhere the own one."""
    method, data, seen = made(), crops(), []
    monkeypatch.setattr(method.net, "forward", lambda x, was=method.net.forward: seen.append(x) or was(x))
    method(data, LAST)
    first, second = seen[-1].chunk(2)
    for view, number, place in ((first, 0, BOXES[0]), (second, 1, BOXES[1])):
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[place] = True
        assert torch.equal(view[..., inside], data.partner.strong[number][..., inside])
        assert torch.equal(view[..., ~inside], data.unlabeled.strong[number][..., ~inside])


def test_only_the_supervised_term_knows_the_labels():
    data = crops()
    other = data._replace(labeled=data.labeled._replace(label=1 - data.labeled.label))
    found = []
    for one in (data, other):
        torch.manual_seed(0)
        found.append(made(confident=20, tau=0.5)(one, LAST).terms)
    same = {name: bool(torch.equal(found[0][name], found[1][name])) for name in TERMS}
    assert same == dict(zip(TERMS, (False, True, True, True), strict=True))


def test_without_unlabeled_samples_it_is_supervised():
    assert set(made()(crops(unlabeled=0), LAST).terms) == {"supervised"}


def test_nothing_sure_costs_nothing():
    terms = made(tau=1.01)(crops(), LAST).terms
    assert all(terms[name] == 0 for name in TERMS[1:])


@pytest.mark.parametrize(("hp", "message"), [
    ({"cutmix": 1.5}, "hp.cutmix 1.5: expected 0 to 1"), ({"tau": -0.1}, "hp.tau -0.1"),
    ({"feature_dropout": 2.0}, "hp.feature_dropout"), ({"box_min": 0.5}, "hp.box_min 0.5: expected at most"),
])
def test_bad_values_are_refused(hp, message):
    with pytest.raises(UserError, match=message):
        Config(**hp)


@pytest.mark.parametrize(("words", "iterations", "batch", "pseudo"), [
    ("LA", 15000, 4, "steady"), ("Pancreas", 15000, 4, "steady"), ("BraTS", 30000, 4, "steady"),
    ("ACDC --protocol slices", 30000, 24, "shared"), ("ACDC", 30000, 4, "steady"),
])
def test_presets(words, iterations, batch, pseudo):
    (spec,), _ = config.parse(f"--method unimatch --dataset {words}".split())
    assert (spec.iterations, spec.schedule, spec.labeled_batch + spec.unlabeled_batch) == (iterations, "poly", batch)
    assert spec.hp["pseudo"] == pseudo
