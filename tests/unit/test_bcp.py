"""BCP on networks that are given: the box, the mixtures, the two regions of the loss, stages and teacher."""

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec, Output
from ssl4mis import copy_paste, ops
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.config import RunSpec
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Task
from ssl4mis.methods.bcp import BCP, Config
from ssl4mis.schedules import learning_rate
from ssl4mis.trainer import plan

SHAPE = (9, 12)
CORNER = [torch.tensor(2), torch.tensor(3)]
STEP = torch.tensor(10)


class Echo(nn.Module):
    """A network whose logits are 0, 1, 2... times the image; keeps what it saw."""

    def __init__(self, classes=2):
        super().__init__()
        self.slope, self.classes, self.seen = nn.Parameter(torch.ones(())), classes, []
        self.norm = nn.BatchNorm2d(1, affine=False)

    def forward(self, image):
        self.seen.append(image)
        return Output({"seg": torch.cat([index * self.slope * image for index in range(self.classes)], 1)}, None)


def method(classes=2, **hp):
    return BCP(lambda: Echo(classes), Task(classes, 2), Config(**hp))


def batch(labeled=4, unlabeled=4, classes=2):
    """Image i is filled with i + 1, so that a voxel says whence it came."""
    image = torch.arange(1.0, labeled + unlabeled + 1).view(-1, 1, 1, 1).expand(-1, 1, *SHAPE).clone()
    label = torch.randint(0, classes, (labeled, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(image, Half(image[:labeled], label, ("l",) * labeled),
                 Half(image[labeled:], None, ("u",) * unlabeled))


def clock(stage):
    return Clock(STEP, 100, stage)


@pytest.fixture
def box(monkeypatch):
    """Every box lies at CORNER; the mask of its voxels."""
    monkeypatch.setattr(copy_paste, "corner", lambda *_: CORNER)
    return ops.cuboid(SHAPE, CORNER, (6, 8))


# --- box -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "sides", "share"), [
    ((112, 112, 80), (74, 74, 53), 0.2892), ((256, 256), (170, 170), 0.4410), ((96, 96, 96), (64, 64, 64), 0.2963)])
def test_the_box_is_two_thirds_of_each_side(shape, sides, share):
    inside = copy_paste.box(torch.empty(1, 1, *shape), Config().box)
    assert inside.shape == shape and abs(inside.float().mean() - share) < 5e-5
    where = inside.nonzero()
    assert (where.max(0).values - where.min(0).values + 1).tolist() == list(sides)


def test_every_place_but_the_last_is_drawn():
    torch.manual_seed(0)
    corners = torch.stack([torch.stack(copy_paste.corner((9, 12), (6, 8), "cpu")) for _ in range(200)])
    assert corners.min(0).values.tolist() == [0, 0] and corners.max(0).values.tolist() == [2, 3]
    torch.manual_seed(0)
    assert torch.stack(copy_paste.corner((9, 12), (6, 8), "cpu")).equal(corners[0])


# --- mixtures and losses ---------------------------------------------------------------------------------------------


def test_self_training_pastes_in_both_directions(box):
    m = method()
    m(batch(), clock("self_train"))
    inward, outward = m.student.seen
    for i in range(2):  # labeled images are 1 to 4, unlabeled ones 5 to 8
        assert (inward[i, 0][~box] == 1 + i).all() and (inward[i, 0][box] == 5 + i).all()
        assert (outward[i, 0][~box] == 7 + i).all() and (outward[i, 0][box] == 3 + i).all()
    assert [image.flatten(1)[:, 0].tolist() for image in m.teacher.net.seen] == [[5, 6], [7, 8]]


def test_pretraining_pastes_labeled_images_only(box):
    m = method()
    m(batch(), clock("pretrain"))
    [image] = m.student.seen
    for i in range(2):
        assert (image[i, 0][~box] == 1 + i).all() and (image[i, 0][box] == 3 + i).all()
    assert m.teacher.net.seen == []


def test_terms(box):
    """By hand: labels weigh 1 and pseudo labels 0.5, each in its region."""
    m, data = method(), batch()
    label = data.labeled.label
    m.pseudo_labels = lambda image: lambda: torch.ones_like(label)
    terms = m(data, clock("self_train")).terms
    inward, outward = (m.student(image).logits for image in list(m.student.seen))
    inside = box.expand(2, *SHAPE)
    ones, kind = torch.ones_like(label[:2]), {"squared": False, "per_sample": True}
    supervised = (segmentation(inward, label[:2], mask=~inside, **kind)
                  + segmentation(outward, label[2:], mask=inside, **kind))
    pseudo = segmentation(inward, ones, mask=inside, **kind) + segmentation(outward, ones, mask=~inside, **kind)
    assert torch.allclose(terms["supervised"], supervised) and torch.allclose(terms["pseudo"], 0.5 * pseudo)


def test_regions_divide_the_cross_entropy():
    """Means over the regions, weighted with their sizes, are the mean over the whole."""
    logits, label = torch.randn(2, 3, *SHAPE), torch.randint(0, 3, (2, *SHAPE))
    inside = ops.cuboid(SHAPE, CORNER, (6, 8)).expand_as(label)
    share = inside.float().mean()
    parts = share * cross_entropy(logits, label, inside) + (1 - share) * cross_entropy(logits, label, ~inside)
    assert torch.allclose(parts, cross_entropy(logits, label))
    assert cross_entropy(logits, label, inside & ~inside) == 0


@pytest.mark.parametrize("kind", ["linear", "squared"])
def test_dice_of_a_perfect_prediction_and_of_no_voxel(kind):
    label = torch.randint(0, 3, (2, *SHAPE))
    sure = 1000 * nn.functional.one_hot(label, 3).movedim(-1, 1).float()
    inside = ops.cuboid(SHAPE, CORNER, (6, 8))
    m = method(3, dice=kind)
    assert m.loss(sure, label).abs() < 1e-6 and m.loss(sure, label, inside).abs() < 1e-6
    assert m.loss(torch.randn_like(sure), label, inside & ~inside).abs() < 1e-6


def test_what_the_two_dices_average():
    """Two samples of one voxel, of which the network is right and wrong."""
    logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]]).view(2, 2, 1, 1)  # says 0, then 1; both labels are 0
    label, ce = torch.zeros(2, 1, 1, dtype=torch.uint8), 50.0
    # linear: class 0 gives 1 and 0; class 1 gives 1 (absent) and 0. squared: class 0 gives 2/3, class 1 gives 0
    assert torch.allclose(method(dice="linear").loss(logits, label), torch.tensor((ce + 0.5) / 2), atol=1e-4)
    assert torch.allclose(method(dice="squared").loss(logits, label), torch.tensor((ce + 2 / 3) / 2), atol=1e-4)


@pytest.mark.parametrize(("kind", "absent"), [("linear", 1 - 1e-5 / 1.01e-3), ("squared", 1 - 1e-10 / 1.0001e-6)])
def test_how_little_smooths_an_absent_class(kind, absent):
    logits = torch.tensor([0.999, 0.001]).log().view(1, 2, 1, 1)
    loss = method(dice=kind).loss(logits, torch.zeros(1, 1, 1, dtype=torch.uint8))
    assert loss.item() == pytest.approx((0.001 + absent / 2) / 2, abs=2e-4)


@pytest.mark.parametrize("kind", ["whole", "regions"])
def test_pretraining_loss_and_no_unlabeled_samples(kind, box):
    m, data = method(pretrain_loss=kind), batch()
    label_a, label_b = data.labeled.label.chunk(2)
    [(name, value)] = m(data, clock("pretrain")).terms.items()
    logits = m.student(m.student.seen[0]).logits
    parts = m.loss(logits, label_a, ~box) + m.loss(logits, label_b, box)
    whole = m.loss(logits, torch.where(box, label_b, label_a))
    assert name == "supervised" and value == (whole if kind == "whole" else parts) and not torch.isclose(whole, parts)
    for stage in ("pretrain", "self_train"):
        assert m(batch(unlabeled=0), clock(stage)).terms == {"supervised": value}


# --- pseudo labels ---------------------------------------------------------------------------------------------------


def test_one_half_is_foreground():
    found = method(component="none").pseudo_labels(torch.tensor([0.0, 1.0, -1.0, 0.0]).view(4, 1, 1, 1))()
    assert found.dtype == torch.uint8 and found.flatten().tolist() == [1, 1, 0, 1]


def test_several_classes_are_told_by_the_largest():
    found = method(3, component="none").pseudo_labels(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))()
    assert found.flatten().tolist() == [2, 0]


@pytest.mark.parametrize(("component", "kept"), [("corners", 3), ("edges", 3), ("faces", 2), ("none", 4)])
def test_components(component, kept):
    image = -torch.ones(2, 1, *SHAPE)
    for voxel in ((0, 0), (0, 1), (1, 2), (8, 8)):
        image[:, 0, voxel[0], voxel[1]] = 1
    assert method(component=component).pseudo_labels(image)().flatten(1).sum(1).tolist() == [kept, kept]


def test_the_student_is_queued_before_the_components_are_asked_for(monkeypatch):
    """What hides the host's work on a GPU."""
    m, events = method(), []

    def later(label, connectivity):
        events.append("begin")
        return lambda: events.append("wait") or label

    monkeypatch.setattr(copy_paste, "largest_component_later", later)
    for name, net in (("student", m.student), ("teacher", m.teacher.net)):
        net.register_forward_hook(lambda *_, name=name: events.append(name))
    m(batch(), clock("self_train"))
    assert events == ["teacher", "teacher", "begin", "student", "student", "wait"]


# --- stages and teacher ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dataset", "steps"), [("LA", (2000, 15000)), ("ACDC", (10000, 30000)),
                                                ("Pancreas", (1800, 5000))])
def test_published_stages(dataset, steps):
    preset = BCP.presets[dataset]
    spec = RunSpec(method="bcp", dataset=dataset, iterations=preset.iterations, **preset.run)
    stages = plan(method(**preset.hp).stages(), spec.iterations)
    assert tuple(count for _, count in stages) == steps

    def rate(index, step):
        stage, total = stages[index]
        return learning_rate(stage.schedule or spec.schedule, spec.learning_rate, step, total, stage.drop)

    assert rate(0, steps[0] - 1) == 0.01
    if dataset == "LA":
        assert [rate(1, step) for step in (0, 2499, 2500, 14999)] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-7])
    else:
        assert rate(1, steps[1] - 1) == 0.01


def shift(net):
    """Changes parameters and batch-norm statistics."""
    with torch.no_grad():
        net.slope += 1
        net.norm.running_mean += 1
        net.norm.num_batches_tracked += 7


def state(net):
    return [float(net.slope.detach()), float(net.norm.running_mean), float(net.norm.running_var),
            int(net.norm.num_batches_tracked)]


def test_self_training_starts_with_a_copy():
    m = method()
    shift(m.student)
    m.enter("pretrain")
    assert state(m.teacher.net) == [1, 0, 1, 0]
    m.enter("self_train")
    assert state(m.teacher.net) == state(m.student) == [2, 1, 1, 7]


@pytest.mark.parametrize(("average", "mean"), [("parameters", 0), ("state", 0.01)])
def test_what_the_teacher_averages(average, mean):
    m = method(average=average)
    shift(m.student)
    m.after_step(clock("pretrain"))
    assert state(m.teacher.net) == [1, 0, 1, 0]
    for first in (torch.tensor(0), STEP):  # no warm-up: the first step moves as little as the others
        m = method(average=average)
        shift(m.student)
        m.after_step(clock("self_train")._replace(step=first))
        assert state(m.teacher.net) == pytest.approx([1.01, mean, 1, 0])


def test_the_student_predicts():
    m = BCP(networks.Build("vnet", 2, NetSpec(1, (16, 16), width=2)), Task(2, 2), Config()).eval()
    image = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        m.student.heads["seg"].conv.bias += torch.tensor([0.0, 1.0])
        assert torch.equal(m.predict(image), m.student(image).logits.softmax(1))


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hp", [{"box": 0.0}, {"box": 1.0}, {"pretrain": -0.1}, {"pretrain": 1.1}])
def test_impossible_shares(hp):
    [name] = hp
    with pytest.raises(UserError, match=rf"hp\.{name} "):
        Config(**hp)
