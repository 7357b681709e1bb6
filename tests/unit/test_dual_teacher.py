"""Dual Teacher: who is on duty, what a teacher remembers, what is mixed, and the terms by hand."""

import math

import pytest
import torch
from torch import nn

from networks.base import Output
from ssl4mis import augment
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Task
from ssl4mis.methods.dual_teacher import Config, DualTeacher, half_of_classes, partner

TOTAL = 12


class Affine(nn.Module):
    """A network whose logits of class 1 are `scale` times the image plus `shift`, those of other classes 0."""

    def __init__(self, classes=2):
        super().__init__()
        self.scale, self.shift, self.classes = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(())), classes

    def forward(self, image):
        one = self.scale * image + self.shift
        empty = torch.zeros_like(one)
        return Output({"seg": torch.cat([empty, one, *[empty] * (self.classes - 2)], 1)}, None)


def method(turns=4, **hp):
    return DualTeacher(Affine, Task(2, 2), Config(turns=turns, **hp))


def clock(step, total=TOTAL):
    return Clock(torch.tensor(step), total)


def batch(labeled, unlabeled, strong=None, valid=None):
    """Images (B, *space), one labeled half of background and one unlabeled."""
    labeled, unlabeled = labeled[:, None], unlabeled[:, None]
    strong = unlabeled if strong is None else strong[:, None]
    valid = torch.ones_like(unlabeled[:, 0], dtype=torch.bool) if valid is None else valid
    label = torch.zeros_like(labeled[:, 0], dtype=torch.uint8)
    return Batch(torch.cat([labeled, unlabeled]), Half(labeled, label, ("l",) * len(labeled)),
                 Half(unlabeled, None, ("u",) * len(unlabeled), (strong,), valid))


def no_box(count, space, *_):
    return torch.zeros(count, *space, dtype=torch.bool)


@pytest.mark.parametrize(("turns", "total", "expected"), [
    (4, 12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
    (3, 8, [0, 0, 0, 1, 1, 1, 2, 2]),
    (60, 3, [0, 1, 2]),  # no turn without a step
    (1, 3, [0, 0, 0]),
])
def test_turns(turns, total, expected):
    made = method(turns)
    assert [int(made.turn(torch.tensor(step), total)) for step in range(total)] == expected


def walk(made, steps, total=TOTAL):
    """The shift of the teacher on duty and of the other one after each step; the student's is 1, 2, 3, ..."""
    found = []
    for step in range(steps):
        made.student.shift.data.fill_(step + 1.0)
        made.after_step(clock(step, total))
        found.append((made.on_duty.net.shift.item(), made.resting.shift.item()))
    return found


def test_temporary_teachers_by_hand():
    """Turns of 3 steps: a copy, then means of the turn's students; who is relieved keeps what it had."""
    duty, resting = zip(*walk(method(decay=0.99), 9), strict=True)
    # after the last step of a turn the weights have changed places
    assert duty == pytest.approx([1, 1.5, 0, 4, 4.5, 2, 7, 7.5, 5])
    assert resting == pytest.approx([0, 0, 2, 2, 2, 5, 5, 5, 8])


def test_teachers_with_a_memory_of_the_run_by_hand():
    """The second turn of each goes on: with three students averaged the fourth one counts a quarter."""
    duty, resting = zip(*walk(method(memory="run"), 8), strict=True)
    assert duty == pytest.approx([1, 1.5, 0, 4, 4.5, 2, 2 + (7 - 2) / 4, (3.25 * 4 + 8) / 5])
    assert resting == pytest.approx([0, 0, 2, 2, 2, 5, 5, 5])


def test_the_decay_is_capped_within_a_turn():
    duty, _ = zip(*walk(method(turns=1, decay=0.5), 4), strict=True)
    assert duty[:3] == pytest.approx([1, 1.5, 2.25])


def test_changing_places_is_exact():
    made = method()
    values = torch.tensor([1e30, 1e-30]), torch.tensor([-3.3e-7, 1.7])
    for net, value in zip((made.on_duty.net, made.resting), values, strict=True):
        net.scale.data, net.shift.data = value[0].clone(), value[1].clone()
    for over, (mine, theirs) in ((False, values), (True, values[::-1]), (True, values)):
        made.relieve(torch.tensor(over))
        assert torch.equal(torch.stack([made.on_duty.net.scale, made.on_duty.net.shift]), mine)
        assert torch.equal(torch.stack([made.resting.scale, made.resting.shift]), theirs)


def test_the_teacher_on_duty_labels_and_the_other_does_not_matter():
    data = batch(torch.zeros(1, 2, 2), torch.randn(2, 2, 2))
    values = []
    for change in (None, "resting", "on_duty"):
        made = method(threshold=0.0)
        if change:
            net = getattr(made, change)
            getattr(net, "net", net).scale.data.neg_()
        torch.manual_seed(0)
        values.append(made(data, clock(0)).terms["consistency"].item())
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("step", [0, 3])
def test_boxes_in_the_first_turn_and_objects_in_the_second(monkeypatch, step):
    box = torch.tensor([[[1, 0], [0, 0]], [[0, 1], [0, 0]]], dtype=torch.bool)
    monkeypatch.setattr(augment, "boxes", lambda *_: box)
    label = torch.tensor([[[0, 1], [2, 0]], [[0, 0], [0, 3]]])
    expected = label > 0 if step == 3 else ~box
    assert torch.equal(method().copied(label, clock(step)), expected)


def test_the_partner_is_the_sample_before():
    assert partner(torch.tensor([1, 2, 3])).tolist() == [3, 1, 2]


def test_terms_by_hand(monkeypatch):
    """Two images of two voxels, mixed by objects; the teacher's logit is the image, the student's, too.

    Sure voxels are those with a probability of 0.9, a logit of at least ln 9. The first image gives its voxel of class
    1, the second has none, so that it becomes the first image altogether.
    """
    monkeypatch.setattr(augment, "boxes", no_box)
    images = torch.tensor([[[3.0, -1.0]], [[-4.0, -0.5]]])
    valid = torch.tensor([[[True, True]], [[False, True]]])
    data = batch(torch.full((1, 1, 2), 0.7), images, valid=valid)
    made = method(threshold=0.9, mix=2.0, consistency=0.5)
    terms, watch = made(data, clock(3))

    def loss(x):  # cross-entropy of the class that the teacher sees, whose logit is the larger one
        return math.log(1 + math.exp(-abs(x)))

    mixed = [[3.0, -0.5], [3.0, -1.0]]
    weights = [1 / 2, 1 / 2]  # of each pair 3.0 is sure
    expected = sum(w * (loss(a) + loss(b)) / 2 for w, (a, b) in zip(weights, mixed, strict=True)) / 2
    assert terms["mix"].item() == pytest.approx(2 * expected)
    assert terms["consistency"].item() == pytest.approx(0.5 * loss(3.0) / 3)  # -4.0 is not valid, three others are
    assert watch["confident"] == 0.5 and watch["second"] == 1 and watch["copied"] == 0.25


def test_strong_views_are_what_the_student_sees(monkeypatch):
    """The teacher labels weak views: the strong ones are 0, where the student does not know."""
    monkeypatch.setattr(augment, "boxes", no_box)
    images = torch.tensor([[[3.0, -3.0]], [[4.0, 5.0]]])
    made = method(threshold=0.5)
    terms, _ = made(batch(torch.zeros(1, 1, 2), images, strong=torch.zeros_like(images)), clock(0))
    assert terms["mix"].item() == pytest.approx(math.log(2))
    assert terms["consistency"].item() == pytest.approx(0.2 * math.log(2))


def test_no_gradient_reaches_a_teacher():
    made = method(threshold=0.0)
    sum(made(batch(torch.zeros(1, 2, 2), torch.randn(2, 2, 2)), clock(0)).terms.values()).backward()
    assert made.student.shift.grad is not None
    assert all(p.grad is None and not p.requires_grad for net in (made.on_duty, made.resting) for p in net.parameters())


@pytest.mark.parametrize(("dice", "loss"), [(True, segmentation), (False, cross_entropy)])
def test_supervised_term(dice, loss):
    image = torch.randn(2, 3, 3)
    terms, _ = method(dice=dice)(batch(image, torch.zeros(0, 3, 3)), clock(0))
    logits = torch.stack([torch.zeros_like(image), image], 1)
    assert terms.keys() == {"supervised"}
    assert torch.allclose(terms["supervised"], loss(logits, torch.zeros(2, 3, 3, dtype=torch.uint8)))


def test_half_of_the_classes_by_chance():
    """Of classes 0, 2 and 3 one is copied, of one class none, each time whole; all of them get their turn."""
    label = torch.tensor([[[0, 2], [3, 3]], [[1, 1], [1, 1]]])
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        mask = half_of_classes(label, 4)
        assert not mask[1].any()
        (chosen,) = set(label[0][mask[0]].tolist())
        assert torch.equal(mask[0], label[0] == chosen)
        seen.add(chosen)
    assert seen == {0, 2, 3}


@pytest.mark.parametrize(("hp", "said"), [({"turns": 0}, "turns"), ({"threshold": 1.5}, "threshold"),
                                          ({"box_min": 0.6, "box_max": 0.5}, "box_min"), ({"mix": -1.0}, "mix")])
def test_impossible_hyper_parameters_are_refused(hp, said):
    with pytest.raises(UserError, match=said):
        Config(**hp)
