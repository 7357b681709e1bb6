"""AC-MT's masks on known values and by hand: entropy, noisy passes, prototypes, and what the released code did."""

import math

import pytest
import torch
from torch import nn

import networks
from networks.base import Features, NetSpec, Output
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.method import Task
from ssl4mis.methods.ac_mt import ACMT, Config, distances, prototypes

TOTAL = 8000
START, END = Clock(torch.tensor(0), TOTAL), Clock(torch.tensor(TOTAL), TOTAL)
KNOWN = {2: (5, 0.189921), 4: (3, 0.144557)}  # ambiguous voxels at the start, their consistency


class Says(nn.Module):
    """A network that answers its passes in order, and with the last answer from then on; logits, features."""

    def __init__(self, *answers):
        super().__init__()
        self.answers, self.passes = answers, 0

    def forward(self, image):
        logits, features = self.answers[min(self.passes, len(self.answers) - 1)]
        self.passes += 1
        return Output({"seg": logits}, Features([], [None, features]))


def acmt(student, teacher, **hp):
    """The method with a student and a teacher that answer so."""
    logits = student[0][0]
    method = ACMT(lambda: Says(*student), Task(logits.shape[1], logits.ndim - 2), Config(**hp))
    method.teacher.net = Says(*teacher)
    return method


def wave(phase, classes):
    """4 sin(0.7 n + phase) over all elements n of (2, classes, 2, 2, 2)."""
    return (4 * torch.sin(0.7 * torch.arange(16 * classes, dtype=torch.float64) + phase)).view(2, classes, 2, 2, 2)


def batch(logits, n):
    """As many images as logits, the first n labeled."""
    space, count = logits.shape[2:], len(logits)
    image = torch.zeros(count, 1, *space)
    label = torch.zeros(n, *space, dtype=torch.uint8)
    names = tuple(map(str, range(count)))
    return Batch(image, Half(image[:n], label, names[:n]), Half(image[n:], None, names[n:]))


def toward(label, strength, classes=2):
    """Logits that are `strength` for the label's class and 0 for the others."""
    return strength * nn.functional.one_hot(label, classes).movedim(-1, 1).float()


@pytest.mark.parametrize("classes", KNOWN)
def test_known_values(classes):
    count, loss = KNOWN[classes]
    student, teacher = wave(0, classes), wave(1, classes)
    method = acmt([(torch.cat([student, student]), None)], [(teacher, None)])
    terms, watch = method(batch(torch.cat([student, student]), 2), START)
    assert watch["ambiguous"].item() == pytest.approx(count / 16)
    assert (terms["consistency"] / watch["weight"]).item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(("rise", "expected"), [(0.2, (0.75135, 0.80730, 0.95)), (0.15, (0.52056, 0.54965, 0.62383)),
                                                (-0.15, (0.748989, 0.707024, 0.6))])
def test_threshold_along_the_run(rise, expected):
    unit = math.log(2) if rise == 0.15 else 1
    student = wave(0, 2)
    method, images = acmt([(student, None)], [(student[1:], None)], rise=rise), batch(student, 1)
    for step, value in zip((0, TOTAL // 2, TOTAL), expected, strict=True):
        threshold = method(images, Clock(torch.tensor(step), TOTAL)).watch["threshold"]
        assert threshold.item() * unit == pytest.approx(value, abs=1e-5)


def test_weight_is_full_after_three_quarters_as_in_the_released_run():
    student = wave(0, 2)
    method, images = acmt([(student, None)], [(student[1:], None)], ramp_every=150), batch(student, 1)
    for step, weight in ((0, 0.000674), (150, 0.000862), (1500, 0.006005), (3000, 0.028650), (5999, 0.099688),
                         (6000, 0.1), (7999, 0.1)):
        watch = method(images, Clock(torch.tensor(step), TOTAL)).watch
        assert watch["weight"].item() == pytest.approx(weight, abs=1e-6)


def test_where_nobody_is_in_doubt_there_is_no_consistency():
    logits = toward(torch.zeros(2, 4, 4, dtype=torch.long), 50).requires_grad_()
    method = acmt([(logits, None)], [(-logits[1:].detach(), None)])
    terms, watch = method(batch(logits, 1), END)
    terms["consistency"].backward()
    assert terms["consistency"] == watch["ambiguous"] == 0 and not logits.grad.any()


def test_the_mask_has_no_gradient():
    logits = torch.zeros(2, 2, 3, 3, requires_grad=True)
    target = toward(torch.zeros(1, 3, 3, dtype=torch.long), math.log(3))  # probability 3/4
    terms, watch = acmt([(logits, None)], [(target, None)])(batch(logits, 1), END)
    terms["consistency"].backward()
    # d/dz of ((1/2 - 3/4)^2 + (1/2 - 1/4)^2) / 2 is 2 (-1/4) (1/4) in each of 9 voxels
    expected = watch["weight"].item() * -0.125 / 9
    assert logits.grad[1, 0].flatten().tolist() == pytest.approx([expected] * 9, rel=1e-5)


@pytest.mark.parametrize(("compat", "factor"), [("right", 1), ("legacy", 2)])
def test_model_uncertainty_is_of_the_student_and_counts_classes(compat, factor):
    """Two passes that contradict each other leave the largest entropy; the released mean forgets the classes."""
    zero = torch.zeros(1, 3, 3, dtype=torch.long)
    sure, other = toward(zero, 50), toward(1 - zero, 50)
    final = torch.cat([sure, sure])
    method = acmt([(sure, None), (other, None), (final, None)], [(other, None)], ambiguity="model_uncertainty",
                  passes=2, compat=compat)
    terms, watch = method(batch(final, 1), END)
    assert watch["ambiguous"] == 1 and method.student.passes == 3 and method.teacher.net.passes == 1
    assert (terms["consistency"] / watch["weight"]).item() == pytest.approx(factor)


def test_legacy_takes_the_entropy_of_two_classes_for_the_largest():
    logits = torch.zeros(2, 4, 3, 3)
    logits[:, 2:] = -50  # ln 2 of ln 4
    for compat, ambiguous in (("right", 0), ("legacy", 1)):
        _, watch = acmt([(logits, None)], [(logits[1:], None)], compat=compat)(batch(logits, 1), END)
        assert watch["ambiguous"] == ambiguous


@pytest.mark.parametrize(("compat", "moved"), [("right", 1), ("legacy", 5)])
def test_statistics_of_the_student_count_its_own_pass_only(compat, moved):
    torch.manual_seed(0)
    build = networks.Build("vnet", 2, NetSpec(1, (16, 16), 2))
    method = ACMT(build, Task(2, 2), Config(ambiguity="model_uncertainty", passes=4, compat=compat)).train()
    counts = [value for name, value in method.student.state_dict().items() if name.endswith("num_batches_tracked")]
    method(batch(torch.zeros(3, 2, 16, 16), 1), END)
    assert {int(value) for value in counts} == {moved}


# --- prototypes ------------------------------------------------------------------------------------------------------


def test_prototypes_and_distances_by_hand():
    features = torch.tensor([[[[0.0, 1.0], [5.0, 9.0]]]])  # (1, 1, 2, 2)
    weight = torch.tensor([[[[1.0, 3.0], [0.0, 0.0]], [[0.0, 0.0], [0.5, 0.0]]]])
    centers = prototypes(features, weight)
    assert centers.flatten().tolist() == pytest.approx([0.75, 5], rel=1e-4)
    away = distances(features, centers)
    assert away[0, 0].flatten().tolist() == pytest.approx([0.5625, 0.0625, 18.0625, 68.0625], rel=1e-4)
    assert away.shape == (1, 2, 2, 2)


LABEL = torch.tensor([[[0, 0, 0, 1], [0, 0, 1, 1]]])


def disputing(label, features, spread=0.0, classes=2, **hp):
    """A method whose teacher predicts a label in each pass; the logits of the second sampled one differ by `spread`."""
    logits = toward(label, 4.0, classes)
    answers = [(logits, None), (logits, features), (logits * (1 - spread), features)]
    return acmt([(logits, None)], answers, ambiguity="prototype_error", passes=2, **hp)


def test_voxels_nearer_to_another_class_are_disputed():
    """One voxel that the student calls background has the features of the object."""
    features = LABEL[:, None].float()
    student = LABEL.clone()
    student[0, 0, 3] = 0
    noisy, clean = disputing(LABEL, features).disputed(torch.zeros(1, 1, 2, 4), student[:, None])
    assert noisy.sum() == noisy[0, 0, 0, 3] == 1 and clean.sum() == 7


def test_features_of_the_second_level_are_enlarged():
    features = torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]]])
    label = torch.tensor([[[0, 0, 0, 0, 1, 1, 1, 1]] * 2])
    noisy, clean = disputing(label, features).disputed(torch.zeros(1, 1, 2, 8), label[:, None])
    assert not noisy.any() and clean.all()


def test_a_class_that_is_nowhere_certain_has_no_prototype_and_one_alone_disputes_nothing():
    label = torch.cat([LABEL, torch.zeros_like(LABEL)])  # the second sample is background
    features = torch.cat([LABEL[:, None].float()] * 2)
    noisy, clean = disputing(label, features, classes=4).disputed(torch.zeros(2, 1, 2, 4), (1 - label)[:, None])
    assert noisy[0].all() and not noisy[1].any() and not clean.any()


@pytest.mark.parametrize(("compat", "kept"), [("right", 0), ("legacy", 1)])
def test_uncertain_voxels_are_left_out_or_background(compat, kept):
    method = disputing(LABEL, None, compat=compat)
    probability = torch.tensor([0.2, 0.8]).view(1, 2, 1, 1)
    weight = method.certain(probability, torch.full((1, 2, 1, 1), 0.2))
    assert weight.flatten().tolist() == pytest.approx([0.2 * kept, 0])
    weight = method.certain(probability, torch.tensor([0.2, 0.05]).view(1, 2, 1, 1))
    assert weight.flatten().tolist() == pytest.approx([0, 0.8])


def test_deviation_over_the_passes():
    """Probabilities e^4/(1+e^4) and 1/2 of a class: the deviation of two values is their difference over sqrt 2."""
    method = disputing(LABEL, LABEL[:, None].float(), spread=1.0)
    method.teacher.net.passes = 1
    spread, features = method.sampled(torch.zeros(1, 1, 2, 4))
    expected = (1 / (1 + math.exp(-4)) - 0.5) / math.sqrt(2)
    assert torch.allclose(spread, torch.tensor(expected)) and torch.equal(features, LABEL[:, None].float())


def test_one_pass_has_no_deviation():
    method = disputing(LABEL, LABEL[:, None].float())
    method.hp, method.teacher.net.passes = Config(ambiguity="prototype_error", passes=1), 1
    assert not method.sampled(torch.zeros(1, 1, 2, 4))[0].any()


@pytest.mark.parametrize(("compat", "expected"), [("right", 0.5), ("legacy", 0.25)])
def test_entropy_counts_where_its_own_sample_is_clean(compat, expected):
    """The first of two samples is in doubt and clean; the released broadcast has it counted in half of the samples."""
    probability = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).view(2, 2, 1, 1).expand(2, 2, 3, 3)
    clean = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 1, 3, 3)
    actual = disputing(LABEL, None, compat=compat).clean_entropy(probability, clean)
    assert actual.item() == pytest.approx(expected, abs=1e-5)


def test_terms_of_each_choice():
    for ambiguity, usual in (("entropy", {"supervised", "consistency"}),
                             ("model_uncertainty", {"supervised", "consistency"}),
                             ("prototype_error", {"supervised", "consistency", "entropy"})):
        build = networks.Build("vnet", 3, NetSpec(1, (16, 16), 2))
        method = ACMT(build, Task(3, 2), Config(ambiguity=ambiguity, passes=2))
        assert set(method(batch(torch.zeros(4, 3, 16, 16), 2), END).terms) == usual
        assert set(method(batch(torch.zeros(2, 3, 16, 16), 2), END).terms) == {"supervised"}


def test_networks_without_dropout_are_told_where_passes_live_on_it():
    for ambiguity, network, count in (("entropy", "segresnet", 0), ("model_uncertainty", "segresnet", 1),
                                      ("prototype_error", "segresnet", 1), ("prototype_error", "vnet", 0)):
        build = networks.Build(network, 2, NetSpec(1, (16, 16), 4))
        assert len(ACMT(build, Task(2, 2), Config(ambiguity=ambiguity)).remarks()) == count


@pytest.mark.parametrize("hp", [{"rise": 0.5}, {"rise": -0.8}, {"threshold": 1.2}, {"passes": 0}, {"spread": -1.0}])
def test_hyper_parameters_that_cannot_work(hp):
    with pytest.raises(UserError, match=f"hp.{next(iter(hp))} {next(iter(hp.values()))}: expected"):
        Config(**hp)
