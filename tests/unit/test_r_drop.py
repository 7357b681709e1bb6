"""Two passes of one network or a pass of each of two, and how far apart they are, by hand and as specified."""

import math

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec, Output
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import Task
from ssl4mis.methods.r_drop import Config, RDrop, divergence

SIDE, CLOCK = 16, Clock(torch.tensor(100), 100)


def method(network="vnet", classes=2, **hp):
    torch.manual_seed(0)
    return RDrop(networks.Build(network, classes, NetSpec(1, (SIDE, SIDE), 4)), Task(classes, 2), Config(**hp))


def batch(labeled=2, samples=4):
    image = torch.randn(samples, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    label = (image[:labeled, 0] > 0).to(torch.uint8)
    return Batch(image, Half(image[:labeled], label, ("l",) * labeled),
                 Half(image[labeled:], None, ("u",) * (samples - labeled)))


class Answers(nn.Module):
    """A network that answers its passes with these logits, in order, and keeps what it saw."""

    def __init__(self, *logits):
        super().__init__()
        self.logits, self.seen = list(logits), []

    def forward(self, image):
        self.seen.append(image)
        return Output({"seg": self.logits[len(self.seen) - 1]}, None)


def wave(phase, classes):
    """4 sin(0.7 n + phase) in C order, the input of the specification's known values: (2, classes, 2, 2, 2)."""
    return (4 * torch.sin(0.7 * torch.arange(16 * classes, dtype=torch.float64) + phase)).view(2, classes, 2, 2, 2)


# --- the divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "classes", "expected"), [
    ("classes", 2, 0.289733), ("classes", 4, 0.882349), ("last", 2, 0.150054), ("last", 4, 0.148922)])
def test_known_values(axis, classes, expected):
    assert divergence(wave(0, classes), wave(1, classes), axis).item() == pytest.approx(expected, abs=1e-5)


def test_divergence_by_hand():
    """Probabilities 3/4 and 1/4 against 1/4 and 3/4: 1/2 ln 3 in each direction; where they agree it is 0."""
    first = torch.zeros(1, 2, 1, 2)
    first[0, 0, 0, 0] = math.log(3)
    second = first.flip(1)
    assert divergence(first, second).item() == pytest.approx(math.log(3) / 2 / 2)
    assert divergence(first, first) == 0


@pytest.mark.parametrize(("axis", "seen"), [("classes", True), ("last", False)])
def test_a_class_that_is_likelier_everywhere(axis, seen):
    first = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    second = first + torch.tensor([1.0, 0, 0], dtype=torch.float64).view(1, 3, 1, 1)
    assert (divergence(first, second, axis).item() > 1e-3) == seen


def test_divergence_is_symmetric_and_both_sides_learn():
    first, second = (torch.randn(2, 3, 4, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    forth, back = divergence(first, second), divergence(second, first)
    assert torch.allclose(forth, back, rtol=1e-12)
    both = torch.nn.functional.kl_div(first.log_softmax(1), second.log_softmax(1), reduction="none", log_target=True) \
        + torch.nn.functional.kl_div(second.log_softmax(1), first.log_softmax(1), reduction="none", log_target=True)
    assert forth.item() == pytest.approx(both.sum(1).mean().item() / 2, rel=1e-12)
    forth.backward()
    assert first.grad.any() and second.grad.any()


def test_opposite_certainties_are_finite():
    logits = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).requires_grad_()
    value = divergence(logits, -logits.detach())
    value.backward()
    assert value.item() == pytest.approx(400) and logits.grad.isfinite().all()


# --- passes ----------------------------------------------------------------------------------------------------------


def test_one_network_sees_the_batch_twice_and_answers_differently():
    made, data = method(), batch()
    made.train()
    assert made.second is None
    first, second = made.passes(data.image)
    assert first.shape == second.shape == (4, 2, SIDE, SIDE) and not torch.equal(first, second)
    made.eval()
    assert torch.equal(*made.passes(data.image))


@pytest.mark.parametrize("images", ["unlabeled", "all"])
def test_terms_of_one_network(images):
    """Half of each pass's supervised loss, so that their sum is the mean."""
    made, data, maps = method(images=images, weight=3.0), batch(), torch.randn(8, 2, SIDE, SIDE)
    made.first = Answers(maps)
    terms, watch = made(data, CLOCK)
    (seen,) = made.first.seen
    assert torch.equal(seen, torch.cat([data.image, data.image]))
    first, second = maps[:4], maps[4:]
    for name, logits in (("first", first), ("second", second)):
        expected = segmentation(logits[:2], data.labeled.label) / 2
        assert terms[f"supervised/{name}"].item() == pytest.approx(expected.item(), rel=1e-6)
    start = 2 if images == "unlabeled" else 0
    assert watch["weight"] == 3
    assert terms["consistency"].item() == pytest.approx(3 * divergence(first[start:], second[start:]).item(), rel=1e-6)


def test_terms_of_two_networks():
    made, data, maps = method(networks="two"), batch(), torch.randn(2, 4, 2, SIDE, SIDE)
    assert made.second is not None and not torch.equal(*(max(net.parameters(), key=torch.numel)
                                                         for net in (made.first, made.second)))
    made.first, made.second = map(Answers, maps)
    terms = made(data, CLOCK).terms
    for name, logits in zip(("first", "second"), maps, strict=True):
        expected = segmentation(logits[:2], data.labeled.label)
        assert terms[f"supervised/{name}"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms["consistency"].item() == pytest.approx(divergence(maps[0, 2:], maps[1, 2:]).item(), rel=1e-6)


@pytest.mark.parametrize("count", ["one", "two"])
def test_no_unlabeled_samples_leave_the_supervised_terms(count):
    assert set(method(networks=count, images="all")(batch(4), CLOCK).terms) == {"supervised/first", "supervised/second"}


@pytest.mark.parametrize(("network", "remarked"), [("vnet", False), ("nnunet", True)])
def test_a_network_without_dropout_gets_some(network, remarked):
    made = method(network, dropout=0.25)
    rates = {m.p for m in made.modules() if isinstance(m, nn.modules.dropout._DropoutNd)} - {0.0}
    assert bool(made.remarks()) == remarked
    assert rates == ({0.25} if remarked else {0.5})
    first, second = made.train().passes(batch().image)
    assert not torch.equal(first, second)
    two = method(network, networks="two")
    assert two.remarks() == () and any(m.p for m in two.modules() if isinstance(m, nn.Dropout2d)) != remarked


def test_prediction_of_the_first_network_or_of_both():
    maps = torch.randn(2, 1, 2, SIDE, SIDE)
    for evaluate, expected in (("first", maps[0].softmax(1)), ("mean", maps.softmax(2).mean(0))):
        made = method(networks="two", evaluate=evaluate)
        made.first, made.second = map(Answers, maps)
        assert torch.allclose(made.predict(None), expected)
        alone = method(evaluate=evaluate)
        alone.first = Answers(maps[0])
        assert torch.equal(alone.predict(None), maps[0].softmax(1))


@pytest.mark.parametrize("change", [{"ramp_every": 0}, {"weight": -1.0}, {"dropout": 0.0}, {"dropout": 1.0}])
def test_nonsense_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))) as error:
        Config(**change)
    assert "\n" not in str(error.value)
