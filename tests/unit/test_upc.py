"""UPC's loss on known values and by hand, what each network sees, and its settings."""

import math

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec, Output
from ssl4mis import config
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import Task
from ssl4mis.methods.upc import UPC, Config

END = Clock(torch.tensor(1000), 1000)
# sum of the losses of confident voxels and how many there are; the rectified loss
KNOWN = {2: (5, 0.085011, 0.612387), 4: (3, 0.132461, 1.226806)}


class Fixed(nn.Module):
    """A network that says the same to every image and keeps what it saw."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen = nn.Parameter(logits.clone()), []

    def forward(self, image):
        self.seen.append(image)
        return Output({"seg": self.logits[:len(image)]}, None)


def wave(phase, classes):
    """4 sin(0.7 n + phase) over all elements n of (2, classes, 2, 2, 2)."""
    return (4 * torch.sin(0.7 * torch.arange(16 * classes, dtype=torch.float64) + phase)).view(2, classes, 2, 2, 2)


def upc(student, teacher=None, **hp):
    """The method with networks that say these logits."""
    method = UPC(lambda: Fixed(student), Task(student.shape[1], student.ndim - 2), Config(**hp))
    if teacher is not None:
        method.teacher.net.logits.data.copy_(teacher)
    return method


def batch(logits, n=1):
    space, count = logits.shape[2:], len(logits)
    image = torch.arange(float(count)).view(-1, 1, *[1] * len(space)).expand(-1, 1, *space)
    label = (torch.arange(math.prod(space)).view(space) % 3 == 0).to(torch.uint8).expand(n, *space)
    names = tuple(map(str, range(count)))
    return Batch(image, Half(image[:n], label, names[:n]), Half(image[n:], None, names[n:]))


@pytest.mark.parametrize("classes", KNOWN)
def test_known_values(classes):
    count, confident, rectified = KNOWN[classes]
    student, teacher = wave(0, classes), wave(1, classes)
    loss, certainty = upc(student, loss="confident").consistency(student, teacher)
    assert certainty.sum() == count and loss.item() == pytest.approx(confident, abs=1e-5)
    assert upc(student).consistency(student, teacher)[0].item() == pytest.approx(rectified, abs=1e-5)
    loss, _ = upc(student, loss="logits").consistency(student, teacher)
    assert loss.item() == pytest.approx((student - teacher).square().mean().item())


def test_rectified_by_hand():
    """The teacher says 3/4, the student 1/4: divergence ln(3)/2, cross-entropy ln 4, weight 1/sqrt 3."""
    student = torch.tensor([0.0, -math.log(3)]).view(1, 2, 1, 1).expand(1, 2, 3, 5)
    loss, certainty = upc(student).consistency(student, student.flip(1))
    assert torch.allclose(certainty, torch.tensor(3**-0.5))
    assert loss.item() == pytest.approx(math.log(4) / math.sqrt(3) + math.log(3) / 2, rel=1e-6)


def test_temperature_moves_the_threshold_and_not_the_rectified_loss():
    student, teacher = wave(0, 2), wave(1, 2)
    sharp, plain = (upc(student, loss="confident", temperature=t).consistency(student, teacher)[1] for t in (0.1, 1.0))
    assert sharp.sum() > plain.sum()
    values = [upc(student, temperature=t).consistency(student, teacher)[0] for t in (0.1, 1.0)]
    assert values[0] == values[1]


def test_extreme_logits_have_a_finite_loss_and_gradient():
    teacher = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    student = (-teacher).clone().requires_grad_()
    loss, _ = upc(student.detach()).consistency(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and student.grad.any()


def test_the_student_sees_noise_and_the_teacher_the_clean_images_and_both_see_all():
    torch.manual_seed(0)
    logits = torch.randn(4, 2, 16, 16)
    method, images = upc(logits, logits.flip(0)), batch(logits, 2)
    terms, watch = method(images, END)
    (noisy,), (clean,) = method.student.seen, method.teacher.net.seen
    assert torch.equal(clean, images.image)
    noise = noisy - images.image
    assert noise.abs().max() == pytest.approx(0.4, abs=1e-5) and noise.std() == pytest.approx(0.19, abs=0.01)
    expected, certainty = method.consistency(logits, logits.flip(0))
    assert terms["consistency"].item() == pytest.approx(expected.item(), rel=1e-5) and watch["weight"] == 1
    assert watch["certainty"].item() == pytest.approx(certainty.mean().item(), rel=1e-5)
    terms["consistency"].backward()
    assert all(sample.any() for sample in method.student.logits.grad), "labeled images count, too"


def test_supervised_term_is_that_of_ua_mt():
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 6, 5)
    images = batch(logits, 2)
    values = []
    for name in ("foreground", "all"):
        values.append(upc(logits, dice=name)(images, END).terms["supervised"].item())
        assert values[-1] == pytest.approx(segmentation(logits[:2], images.labeled.label, name).item(), rel=1e-6)
    assert values[0] != pytest.approx(values[1], rel=1e-3) and Config().dice == "foreground"


def test_without_unlabeled_samples_it_is_supervised():
    method = upc(torch.randn(2, 2, 4, 4))
    assert set(method(batch(torch.zeros(2, 2, 4, 4), 2), END).terms) == {"supervised"}
    assert not method.teacher.net.seen


@pytest.mark.parametrize("rate", [None, 0.0, 0.9])
def test_dropout_of_both_networks(rate):
    made = UPC(networks.Build("vnet", 2, NetSpec(1, (16, 16), 2)), Task(2, 2), Config(dropout=rate))
    rates = {layer.p for layer in made.modules() if isinstance(layer, nn.Dropout2d)}
    assert rates == {0.0, 0.5 if rate is None else rate}  # 0: no dropout there, before or after


def test_dropout_on_the_command_line():
    for value, expected in (("0.9", 0.9), ("null", None)):
        (spec,), _ = config.parse(f"--method upc --dataset LA --hp.dropout {value}".split())
        assert Config(**spec.hp).dropout == expected


@pytest.mark.parametrize("hp", [{"temperature": 0.0}, {"dropout": 1.5}, {"decay": 2.0}, {"ramp_every": 0}])
def test_hyper_parameters_that_cannot_work(hp):
    with pytest.raises(UserError, match=f"hp.{next(iter(hp))} {next(iter(hp.values()))}: expected"):
        Config(**hp)
