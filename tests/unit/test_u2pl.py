"""U2PL: percentiles, who is an anchor and who a negative, the memory's ring, the contrast, and when it all starts."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec
from ssl4mis import augment
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Task
from ssl4mis.methods.u2pl import U2PL, Config, Memory, Represented, drawn, in_cells, percentile, roles

TOTAL = 1000
END = Clock(torch.tensor(TOTAL - 1), TOTAL)
SIDE = 16


class Said(nn.Module):
    """Logits and features that are given, instead of a network's, for as many images as there are; all passes noted."""

    def __init__(self, logits, features):
        super().__init__()
        self.logits, self.features, self.images = nn.Parameter(logits.clone()), nn.Parameter(features.clone()), []

    def forward(self, image):
        self.images.append((self.training, image))
        return self.logits[-len(image):], self.features[-len(image):]


def method(dims=2, classes=2, **hp):
    torch.manual_seed(0)
    build = networks.Build("vnet", classes, NetSpec(1, (SIDE,) * dims, 2))
    return U2PL(build, Task(classes, dims), Config(**{"channels": 4, "memory": 20, "remembered": 10} | hp)).train()


def speaking(student, teacher, features=None, teacher_features=None, classes=2, **hp):
    """A method whose student and teacher say these logits and features, by default one and the same vector."""
    made = method(classes=classes, **hp)
    blank = torch.ones(len(student), 4, *student.shape[2:])
    made.student = Said(student, blank if features is None else features)
    made.teacher.net = Said(teacher, blank if teacher_features is None else teacher_features).requires_grad_(False)
    return made


def batch(labeled, unlabeled, classes=2, label=None):
    space = labeled.shape[2:]
    label = torch.zeros(len(labeled), *space, dtype=torch.uint8) if label is None else label
    return Batch(torch.cat([labeled, unlabeled]), Half(labeled, label, ("l",) * len(labeled)),
                 Half(unlabeled, None, ("u",) * len(unlabeled)))


def random_batch(dims=2, unlabeled=2):
    torch.manual_seed(1)
    return batch(torch.randn(2, 1, *[SIDE] * dims), torch.randn(unlabeled, 1, *[SIDE] * dims))


def odds(*probabilities):
    """Logits (B, 2, voxels, 1) of two classes; class 1 has these probabilities (B, voxels)."""
    one = torch.tensor(probabilities).logit()[:, None, :, None]
    return torch.cat([torch.zeros_like(one), one], 1)


# --- percentiles and draws -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.25, 0.7777, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 101])
def test_percentiles_are_those_of_numpy(share, count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(0))
    found = percentile(values.sort().values, torch.tensor(share, dtype=torch.float64))
    assert found.item() == pytest.approx(np.percentile(values.numpy(), 100 * share), abs=1e-6)


def test_draws_are_of_the_mask_with_replacement():
    mask = torch.tensor([False, True, False, False, True, True, False])
    torch.manual_seed(0)
    found = torch.bincount(drawn(mask, 6000), minlength=7)
    assert found[~mask].sum() == 0 and found.sum() == 6000
    assert all(1800 < count < 2200 for count in found[mask])
    assert drawn(torch.zeros(3, dtype=torch.bool), 5).tolist() == [2] * 5  # somewhere, to be left out later


def test_cells_are_voxels_of_all_samples():
    maps = torch.arange(32.0).view(2, 1, 4, 4)
    assert in_cells(maps, torch.Size([2, 2])).tolist() == [[0], [2], [8], [10], [16], [18], [24], [26]]
    assert in_cells(torch.stack([maps[:, 0]] * 2, 1) > 20, torch.Size([4, 4])).shape == (32, 2)


# --- roles -----------------------------------------------------------------------------------------------------------


def role(probability, label, low, high, labeled, **hp):
    column = (torch.tensor(values)[:, None] for values in (label, low, high))
    return [mask.int().tolist() for mask in roles(torch.tensor(probability), *column, labeled, Config(**hp))]


def test_roles_of_four_classes_by_hand():
    """Two labeled cells, of class 0, the second one taken for 2; three unlabeled ones."""
    probability = [[0.6, 0.2, 0.1, 0.1], [0.25, 0.15, 0.35, 0.25], [0.1, 0.7, 0.15, 0.05], [0.3, 0.4, 0.2, 0.1],
                   [0.1, 0.2, 0.3, 0.4]]
    anchor, negative, member = role(probability, [0, 0, 1, 1, 3], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2)
    assert member == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0] * 5, [0] * 5]
    assert anchor == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0] * 5, [0] * 5]  # 0.25 is not more than 0.3
    # the second cell is a negative of the class that it is taken for; the fourth of all but the likeliest class
    assert negative == [[0, 0, 0, 1, 0], [0] * 5, [0, 1, 0, 1, 0], [0, 0, 0, 1, 0]]


def test_ranks_of_the_paper_by_hand():
    """A labeled cell is a negative of other classes among the first three, an unlabeled one of the fourth class."""
    probability = [[0.5, 0.3, 0.15, 0.05], [0.5, 0.3, 0.15, 0.05]]
    _, negative, _ = role(probability, [1, 0], [1, 1], [1, 1], 1, low_rank=3)
    assert negative == [[1, 0], [0, 0], [1, 0], [0, 1]]
    _, negative, _ = role(probability, [1, 0], [1, 1], [1, 1], 1, low_rank=1, high_rank=3)
    assert negative == [[1, 0], [0, 1], [0, 1], [0, 0]]


def test_roles_of_two_classes_by_hand():
    """Labeled cells are negatives of the other class whatever is predicted, unlabeled ones of what is not."""
    probability = [[0.9, 0.1], [0.2, 0.8], [0.45, 0.55], [0.6, 0.4]]
    anchor, negative, member = role(probability, [0, 0, 1, 0], [1, 1, 1, 0], [1, 1, 0, 1], 2, confidence=0.3)
    assert member == [[1, 1, 0, 0], [0, 0, 1, 0]] and anchor == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert negative == [[0, 0, 0, 0], [1, 1, 0, 1]]


# --- memory ----------------------------------------------------------------------------------------------------------


def numbered(*values):
    return torch.tensor([[float(v)] * 2 for v in values])


def held(memory, index):
    return sorted(memory.bank[index, :int(memory.count[index]), 0].tolist())


def test_the_memory_is_a_ring():
    memory = Memory(2, 5, 2)
    masks = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1]], dtype=torch.bool)
    memory.add(numbered(1, 2, 3, 4), masks, 4)
    assert (held(memory, 0), held(memory, 1)) == ([1, 2, 4], [4])
    assert memory.place.tolist() == [3, 1] and memory.count.tolist() == [3, 1]
    memory.add(numbered(5, 6, 7, 8), masks, 4)
    assert held(memory, 0)[-3:] == [5, 6, 8] and set(held(memory, 0)[:2]) < {1, 2, 4} and held(memory, 1) == [4, 8]
    assert memory.place.tolist() == [1, 2] and memory.count.tolist() == [5, 2]
    memory.add(numbered(9, 9, 9, 9), torch.zeros_like(masks), 4)
    assert memory.place.tolist() == [1, 2] and held(memory, 0)[-3:] == [5, 6, 8]
    for _ in range(2):
        memory.add(numbered(10, 11, 12, 13), torch.ones_like(masks), 4)
    assert memory.place.tolist() == [4, 0] and memory.count.tolist() == [5, 5]
    assert set(memory.bank[..., 0].flatten().tolist()) <= {10, 11, 12, 13}


def test_the_oldest_are_forgotten_first():
    memory = Memory(1, 4, 2)
    for value in range(1, 8):
        memory.add(numbered(value), torch.ones(1, 1, dtype=torch.bool), 3)
        assert held(memory, 0) == list(range(max(1, value - 3), value + 1))


def test_of_many_a_random_part_is_remembered():
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        memory = Memory(1, 6, 2)
        memory.add(numbered(*range(1, 9)), torch.tensor([[False, *[True] * 7]]), 3)
        assert memory.count.tolist() == memory.place.tolist() == [3] and len(set(held(memory, 0))) == 3
        seen |= set(held(memory, 0))
    assert seen == set(range(2, 9))


def test_draws_are_of_what_is_remembered():
    memory = Memory(2, 5, 2)
    assert not memory.draw(0, 7).any() and memory.draw(0, 7).shape == (7, 2)
    memory.add(numbered(1, 2), torch.tensor([[True, True], [False, True]]), 5)
    torch.manual_seed(0)
    assert set(memory.draw(0, 50)[:, 0].tolist()) == {1, 2} and set(memory.draw(1, 50)[:, 0].tolist()) == {2}


def test_the_memory_is_state():
    made, other = method(), method()
    made(random_batch(), END)
    assert made.memory.count.sum() > 0
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.memory.bank, made.memory.bank) and torch.equal(other.memory.place, made.memory.place)


# --- contrast --------------------------------------------------------------------------------------------------------


def contrast(features, targets, label, classes=2, labeled=1, active=True, **hp):
    """The contrast of cells in one row per sample, all true, certain of their label and possible negatives."""
    made = method(classes=classes, **hp)
    count, length = label.shape
    probability = nn.functional.one_hot(label.flatten(), classes).float()
    yes = torch.ones(count * length, 1)
    maps = [torch.tensor(values).view(count, length, -1).movedim(-1, 1)[..., None] for values in (features, targets)]
    maps[0].requires_grad_()
    cells = [probability, label.flatten()[:, None], yes, yes]
    return made, maps[0], made.contrast(*maps, cells, labeled, torch.tensor(active))


ALONG = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_contrast_of_two_classes_by_hand(temperature):
    """An anchor is its class's mean, at cosine 1, and at right angles to each of 3 negatives."""
    _, _, found = contrast(ALONG, ALONG, torch.tensor([[0, 1]]), negatives=3, temperature=temperature)
    assert found.item() == pytest.approx(math.log(1 + 3 * math.exp(-1 / temperature)))


def test_only_directions_count():
    _, _, small = contrast(ALONG, ALONG, torch.tensor([[0, 1]]))
    longer = [[7 * x for x in row] for row in ALONG]
    _, _, large = contrast(longer, longer, torch.tensor([[0, 1]]))
    assert large.item() == pytest.approx(small.item())


def test_the_positive_is_the_mean_of_the_teachers_features():
    """Class 0 has two cells at right angles: both anchors are at cosine 1/sqrt(2) to their mean."""
    targets = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]]
    _, features, found = contrast(targets, targets, torch.tensor([[0, 0, 1]]), negatives=1, temperature=1.0)
    first = math.log(1 + math.exp(-1 / math.sqrt(2)))
    assert found.item() == pytest.approx((first + math.log(1 + math.exp(-1))) / 2)
    (grad,) = torch.autograd.grad(found, features)
    assert grad.any()


def test_positives_and_negatives_are_the_teachers_and_anchors_the_students():
    """Features of the student at an angle of 60 degrees to the teacher's mean, and at right angles to the negative."""
    _, _, found = contrast([[0.5, 0, math.sqrt(0.75), 0], [0, 0.5, 0, math.sqrt(0.75)]], ALONG, torch.tensor([[0, 1]]),
                           negatives=1, temperature=1.0)
    assert found.item() == pytest.approx(math.log(1 + math.exp(-0.5)))


def test_a_class_alone_has_no_contrast_and_absent_classes_do_not_count():
    made, features, found = contrast(ALONG, ALONG, torch.tensor([[1, 1]]), classes=3)
    assert found == 0 and torch.autograd.grad(found, features)[0].isfinite().all()
    made.memory.add(torch.ones(3, 4), torch.ones(3, 3, dtype=torch.bool), 3)  # not for want of negatives
    cells = [torch.eye(3)[[1, 1]], torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1)]
    maps = torch.tensor(ALONG).view(1, 2, 4).movedim(-1, 1)[..., None]
    assert made.contrast(maps, maps, cells, 1, torch.tensor(True)) == 0
    _, _, two = contrast(ALONG, ALONG, torch.tensor([[0, 2]]), classes=3, negatives=1, low_rank=2)
    assert two.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_nothing_is_remembered_before_it_starts():
    made, _, found = contrast(ALONG, ALONG, torch.tensor([[0, 1]]), active=False)
    assert found == 0 and not made.memory.count.any()


# --- a step ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_box(monkeypatch):
    monkeypatch.setattr(augment, "boxes", lambda count, space, *_: torch.zeros(count, *space, dtype=torch.bool))


@pytest.mark.parametrize(("step", "dropped", "kept"), [(TOTAL // 2, 0.8, [0, 2, 4]), (0, 0.8, [2]),
                                                       (TOTAL // 2, 0.2, [0, 1, 2, 4]),
                                                       (TOTAL // 2, 0.5, [0, 2, 4])])
def test_pseudo_label_term_by_hand(no_box, step, dropped, kept):
    """Five voxels; from the percentile of 1 - dropped (1 - share of the run) on they have no label.

    The mean over those that are left is divided by their share.
    """
    sure = [0.9, 0.3, 0.99, 0.45, 0.15]
    made = speaking(odds([0.5] * 5, [0.8, 0.6, 0.7, 0.9, 0.4]), odds([0.5] * 5, sure), warm_up=0.0, dropped=dropped,
                    weight=0.5)
    image = torch.zeros(1, 1, 5, 1)
    term = made(batch(image, image), Clock(torch.tensor(step), TOTAL)).terms["pseudo"]
    losses = [-math.log(p if t > 0.5 else 1 - p) for p, t in zip([0.8, 0.6, 0.7, 0.9, 0.4], sure, strict=True)]
    expected = sum(losses[k] for k in kept) / len(kept) * 5 / len(kept)
    assert term.item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_extremes_are_the_surest_and_the_least_sure(no_box, monkeypatch):
    """At half of the run 0.25 of five voxels: entropies up to the second lowest, and from the second highest on."""
    seen = {}
    made = speaking(odds([0.5] * 5, [0.5] * 5), odds([0.5] * 5, [0.9, 0.3, 0.99, 0.45, 0.15]), warm_up=0.0, extreme=0.5)
    monkeypatch.setattr(made, "contrast", lambda f, t, cells, n, active: seen.update(cells=cells, n=n) or f.sum() * 0)
    image = torch.zeros(1, 1, 5, 1)
    label = torch.tensor([[[1], [0], [1], [0], [1]]], dtype=torch.uint8)
    made(batch(image, image, label=label), Clock(torch.tensor(TOTAL // 2), TOTAL))
    probability, known, low, high = (values.flatten().tolist() if values.shape[1] == 1 else values
                                     for values in seen["cells"])
    assert seen["n"] == 1 and known == [1, 0, 1, 0, 1, 1, 0, 1, 0, 0]
    assert low == [1] * 5 + [1, 0, 1, 0, 0] and high == [1] * 5 + [0, 1, 0, 1, 0]
    assert torch.allclose(probability[5:, 1], torch.tensor([0.9, 0.3, 0.99, 0.45, 0.15]))


def test_mixing_takes_the_same_box_from_images_and_labels(monkeypatch):
    box = torch.zeros(2, 5, 1, dtype=torch.bool)
    box[0, :2] = True
    asked = []
    monkeypatch.setattr(augment, "boxes", lambda *args: asked.append(args) or box)
    teacher = odds([0.5] * 5, [0.9] * 5, [0.1, 0.1, 0.1, 0.1, 0.4])
    made = speaking(odds([0.5] * 5, [0.8] * 5, [0.8] * 5), teacher, warm_up=0.0, dropped=0.0, cutmix=0.7)
    images = torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 5, 1)
    terms, _ = made(batch(torch.zeros(1, 1, 5, 1), images), END)
    # labels are 0 0 1 1 1 and 0 0 0 0, and the voxel of the largest entropy has none
    assert terms["pseudo"].item() == pytest.approx(-(3 * math.log(0.8) + 6 * math.log(0.2)) / 9 * 10 / 9, rel=1e-5)
    assert asked[0][:4] == (2, (5, 1), 0.7, (0.5, 0.5))
    (steady, plain), (train, mixed) = made.teacher.net.images
    assert not steady and torch.equal(plain, images)  # pseudo-labels are of the images as they are
    assert train and mixed.flatten(1).tolist() == [[0] * 5, [2, 2, 1, 1, 1], [2] * 5]
    assert torch.equal(made.student.images[0][1], mixed)
    assert made.teacher.training


def test_the_unsupervised_terms_wait_for_the_warm_up():
    for step, waits in ((99, True), (100, False)):
        made = method(warm_up=0.1)
        terms, watch = made(random_batch(), Clock(torch.tensor(step), TOTAL))
        assert (terms["pseudo"] == 0) == (terms["contrast"] == 0) == waits and terms["supervised"] > 0
        assert (watch["remembered"] == 0) == waits


def test_the_teacher_is_a_copy_until_the_warm_up_is_over():
    made = method(warm_up=0.1, decay=0.9)
    mine, theirs = next(made.teacher.net.parameters()), next(made.student.parameters())
    for step, expected in ((0, 0.0), (99, 99.0), (100, 100.0), (101, 100.5), (110, 0.9 * 100.5 + 0.1 * 110)):
        theirs.data.fill_(float(step))
        made.after_step(Clock(torch.tensor(step), TOTAL))
        assert torch.allclose(mine, torch.tensor(expected)), step


@pytest.mark.parametrize(("dice", "loss"), [(True, segmentation), (False, cross_entropy)])
def test_without_unlabeled_samples_the_supervised_term_is_left(dice, loss):
    made, data = method(dice=dice), random_batch(unlabeled=0)
    before = {name: value.clone() for name, value in made.teacher.named_buffers()}
    torch.manual_seed(2)
    made.eval()
    terms, _ = made(data, END)
    assert terms.keys() == {"supervised"}
    assert torch.equal(terms["supervised"], loss(made.student(data.image)[0], data.labeled.label))
    made.train()(data, END)
    assert any(not torch.equal(before[name], value) for name, value in made.teacher.named_buffers())


@pytest.mark.parametrize("dims", [2, 3])
def test_who_learns(dims):
    made = method(dims)
    terms, _ = made(random_batch(dims), END)
    head, project = (next(m.parameters()) for m in (made.student.net.heads, made.student.project))
    for name, expected in (("supervised", [True, False]), ("pseudo", [True, False]), ("contrast", [False, True])):
        found = torch.autograd.grad(terms[name], [head, project], retain_graph=True, allow_unused=True)
        assert [g is not None for g in found] == expected
    sum(terms.values()).backward()
    assert all(p.grad is None for p in made.teacher.parameters())


@pytest.mark.parametrize(("level", "sides"), [(0, 16), (2, 4), (9, 2)])
def test_features_are_of_a_decoder_level(level, sides):
    net = networks.Build("vnet", 2, NetSpec(1, (SIDE, SIDE), 2))()
    logits, features = Represented(net, level, 7)(torch.randn(2, 1, SIDE, SIDE))
    assert logits.shape == (2, 2, SIDE, SIDE) and features.shape == (2, 7, sides, sides)


@pytest.mark.parametrize("evaluate", ["teacher", "student"])
def test_prediction(evaluate):
    made, image = method(evaluate=evaluate).eval(), torch.randn(1, 1, SIDE, SIDE)
    made.student.net.heads["seg"].conv.weight.data.mul_(3)
    nets = {"student": made.student, "teacher": made.teacher.net}
    same = {name: torch.equal(made.predict(image), net(image)[0].softmax(1)) for name, net in nets.items()}
    assert same == {"student": evaluate == "student", "teacher": evaluate == "teacher"}


def test_rows_by_the_rule_for_few_classes_have_a_name_of_their_own():
    (remark,) = method().remarks()
    assert "U2PL-med" in remark and "\n" not in remark
    assert method(low_rank=3).remarks() == ()


@pytest.mark.parametrize(("hp", "said"), [
    ({"temperature": 0.0}, "temperature"), ({"low_rank": 20}, "low_rank"), ({"low_rank": 0}, "low_rank"),
    ({"remembered": 30, "memory": 20}, "remembered"), ({"level": -1}, "level"), ({"dropped": 1.5}, "dropped"),
])
def test_impossible_hyper_parameters_are_refused(hp, said):
    with pytest.raises(UserError, match=said):
        Config(**hp)
