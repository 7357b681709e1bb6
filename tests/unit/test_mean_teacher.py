"""Mean Teacher and UA-MT: who sees what, who predicts, and the values of the specification for two and four classes."""

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec, Output
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.method import Task
from ssl4mis.methods import mean_teacher, ua_mt

KINDS = {"mean_teacher": (mean_teacher.MeanTeacher, mean_teacher.Config), "ua_mt": (ua_mt.UAMT, ua_mt.Config)}
LAST = Clock(torch.tensor(999), 1000)


class Recorder(nn.Module):
    """A network that keeps the images it sees and answers with constant logits."""

    def __init__(self):
        super().__init__()
        self.seen, self.weight = [], nn.Parameter(torch.zeros(()))

    def forward(self, image):
        self.seen.append(image)
        return Output({"seg": self.weight + torch.zeros(len(image), 2, *image.shape[2:])}, None)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def batch(space=(16, 16)):
    torch.manual_seed(0)
    image, label = torch.randn(4, 1, *space), torch.randint(2, (2, *space), dtype=torch.uint8)
    return Batch(image, Half(image[:2], label, ("l",) * 2), Half(image[2:], None, ("u",) * 2))


def test_the_student_sees_the_images_and_the_teacher_noisy_unlabeled_ones(kind):
    cls, config = kind
    method, data = cls(Recorder, Task(2, 2), config(noise=0.1, noise_limit=0.15)), batch((64, 64))
    method(data, LAST)
    (seen,) = method.student.seen
    assert torch.equal(seen, data.image)
    noises = []
    for image in method.teacher.net.seen:
        for half in image.split(2):
            noises.append(half - data.unlabeled.image)
    assert len(noises) == (1 if cls is mean_teacher.MeanTeacher else 9)
    for noise in noises:
        assert 0.07 < noise.std() < 0.1 and 0.14 < noise.abs().max() <= 0.15 + 1e-6
    assert not any(torch.equal(noises[0], other) for other in noises[1:])


def test_who_predicts(kind):
    cls, config = kind
    build = networks.Build("vnet", 2, NetSpec(1, (16, 16), 2))
    methods = {}
    for evaluate in ("student", "teacher"):
        torch.manual_seed(0)
        methods[evaluate] = cls(build, Task(2, 2), config(evaluate=evaluate)).eval()
        methods[evaluate].teacher.net.heads["seg"].conv.bias.data[0] += 1
    image = batch().image
    with torch.no_grad():
        student, teacher = (methods[evaluate].predict(image) for evaluate in ("student", "teacher"))
        assert torch.equal(student, methods["teacher"].student(image).logits.softmax(1))
        assert torch.equal(teacher, methods["student"].teacher(image).logits.softmax(1))
    assert not torch.equal(student, teacher)


def test_the_teacher_is_in_train_mode_and_keeps_statistics_of_its_own(kind):
    cls, config = kind
    method = cls(networks.Build("vnet", 2, NetSpec(1, (32, 32), 2)), Task(2, 2), config()).train()
    means = [b.clone() for name, b in method.teacher.net.named_buffers() if name.endswith("running_mean")]
    method(batch((32, 32)), LAST)
    assert method.teacher.net.training
    moved = [b for name, b in method.teacher.net.named_buffers() if name.endswith("running_mean")]
    assert means and not any(map(torch.equal, means, moved))


def wave(phase, classes):
    """4 sin(0.7 n + phase) in C order, the input of the specification's known values: (2, classes, 2, 2, 2)."""
    return (4 * torch.sin(0.7 * torch.arange(16 * classes, dtype=torch.float64) + phase)).view(2, classes, 2, 2, 2)


class Answers(nn.Module):
    """A network that answers each pass with the same logits for the last samples."""

    def __init__(self):
        super().__init__()
        self.logits = None

    def forward(self, image):
        return Output({"seg": self.logits.repeat(-(-len(image) // len(self.logits)), 1, 1, 1, 1)[:len(image)]}, None)


@pytest.mark.parametrize(("classes", "compat", "kept", "expected"), [
    (2, "right", 12, 0.084143), (2, "legacy", 12, 0.084143), (4, "right", 14, 0.087179), (4, "legacy", 7, 0.071306)])
def test_known_values_of_ua_mt(classes, compat, kept, expected):
    """At the first step, where the threshold is lowest, with the uncertainty of the teacher's one answer."""
    method = ua_mt.UAMT(Answers, Task(classes), ua_mt.Config(weight=1.0, ramp=0.0, passes=2, compat=compat))
    method.student.logits, method.teacher.net.logits = wave(0, classes).requires_grad_(), wave(1, classes)
    image = torch.zeros(4, 1, 2, 2, 2, dtype=torch.float64)
    data = Batch(image, Half(image[:2], torch.zeros(2, 2, 2, 2, dtype=torch.uint8), ("l",) * 2),
                 Half(image[2:], None, ("u",) * 2))
    terms, watch = method(data, Clock(torch.tensor(0), 6000))
    assert watch["certain"].item() * 16 == pytest.approx(kept)
    assert terms["consistency"].item() == pytest.approx(expected, abs=1e-5)
