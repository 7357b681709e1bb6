"""DyCON's terms on known values and by hand, classes of positions, gradients, memory, and its settings."""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import networks
from networks.base import NetSpec
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods import dycon
from ssl4mis.methods.dycon import Config, DyCON, Projection, contrast, embedding, uncertain_consistency

TOTAL = 1000
END = Clock(torch.tensor(TOTAL), TOTAL)
UNCERTAIN = {2: {5.0: 4.241954, 0.5: 0.507640}, 4: {5.0: 6.630849, 0.5: 0.790363}}
CLASSES = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 0, 0, 0, 1, 0]])
FIRST = 0.3 + 0.2 * math.exp(-5)  # threshold of the first step


def wave(phase, *shape):
    """4 sin(0.7 n + phase) over all elements n of a shape."""
    return (4 * torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + phase)).view(shape)


def vectors():
    """Embeddings of student and teacher, (2, 6, 3)."""
    return tuple(torch.nn.functional.normalize(wave(phase, 2, 6, 3), dim=-1) for phase in (0, 1))


def method(dims=2, classes=2, network="vnet", side=16, **hp):
    torch.manual_seed(0)
    build = networks.Build(network, classes, NetSpec(1, (side,) * dims, 2))
    return DyCON(build, Task(classes, dims), Config(**{"hidden": 8, "channels": 4} | hp)).train()


def batch(n=2, count=4, dims=2, classes=2, side=16):
    torch.manual_seed(1)
    space = (side,) * dims
    image, label = torch.randn(count, 1, *space), torch.randint(classes, (n, *space), dtype=torch.uint8)
    label[..., :side // 2], label[..., side // 2:] = 0, 1
    names = tuple(map(str, range(count)))
    return Batch(image, Half(image[:n], label, names[:n]), Half(image[n:], None, names[n:]))


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", UNCERTAIN)
def test_uncertain_consistency_of_known_values(classes):
    student, teacher = (wave(phase, 2, classes, 2, 2, 2).softmax(1) for phase in (0, 1))
    for beta, expected in UNCERTAIN[classes].items():
        assert uncertain_consistency(student, teacher, beta).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("gamma", "legacy", "expected"), [(0.0, True, 1.654850), (2.0, True, 1.250177),
                                                           (0.0, False, 1.654823), (2.0, False, 1.250145)])
def test_contrast_of_known_values(gamma, legacy, expected):
    near, apart = contrast(*vectors(), CLASSES, torch.ones(2, 6), FIRST, 0.6, gamma, legacy)
    assert near.item() == pytest.approx(expected, abs=1e-6) and apart.item() == pytest.approx(1.169561, abs=1e-5)


def test_number_of_pairs_with_the_teacher():
    own, other = vectors()
    different = CLASSES[:, :, None] != CLASSES[:, None]
    similarity = own @ other.transpose(1, 2)
    assert (different & (similarity > FIRST)).sum() == 14
    _, apart = contrast(own, other, CLASSES, torch.ones(2, 6), 2.0, 0.6, 2.0)
    assert apart == 0, "no similarity is above 1"


def test_positions_by_hand():
    """Two positions of one class, one of another, at right angles to both: share 1 / (1 + 1/e) at temperature 1."""
    own = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    near, _ = contrast(own, own, torch.tensor([[0, 0, 1]]), torch.ones(1, 3), 0.5, 1.0, 0.0)
    assert near.item() == pytest.approx(2 / 3 * math.log(1 + 1 / math.e), rel=1e-5)
    near, _ = contrast(own, own, torch.tensor([[0, 0, 1]]), torch.ones(1, 3), 0.5, 1.0, 2.0)
    far = 1 / (1 + math.e)
    assert near.item() == pytest.approx(2 / 3 * far**2 * math.log(1 + 1 / math.e), rel=1e-5)


def test_positions_without_certainty_are_as_if_they_were_not_there():
    own, other = vectors()
    certain = torch.ones(2, 6)
    certain[:, [1, 4]] = 0
    there = [0, 2, 3, 5]
    mine = contrast(own, other, CLASSES, certain, FIRST, 0.6, 2.0)
    expected = contrast(own[:, there], other[:, there], CLASSES[:, there], torch.ones(2, 4), FIRST, 0.6, 2.0)
    assert [x.item() for x in mine] == pytest.approx([x.item() for x in expected], rel=1e-6)


@pytest.mark.parametrize("certain", [0.0, 1.0])
@pytest.mark.parametrize("classes", [torch.zeros(2, 6, dtype=torch.long), torch.arange(6).expand(2, 6)])
def test_nothing_to_compare_costs_nothing(certain, classes):
    own, other = (x.float().requires_grad_() for x in vectors())
    near, apart = contrast(own, other, classes, torch.full((2, 6), certain), 1.1, 0.6, 2.0)
    (near + apart).backward()
    assert near == apart == 0 and own.grad.isfinite().all()


def test_a_position_that_equals_the_teachers_of_another_class_has_a_finite_loss():
    own = torch.ones(1, 4, 2).div(math.sqrt(2)).requires_grad_()
    near, apart = contrast(own, own.detach(), torch.tensor([[0, 1, 0, 1]]), torch.ones(1, 4), 0.3, 0.6, 2.0)
    (near + apart).backward()
    assert apart.item() == pytest.approx(-math.log(dycon.NEAR), rel=1e-5) and own.grad.isfinite().all()


@pytest.mark.parametrize("legacy", [False, True])
def test_some_rows_at_a_time_give_the_same(monkeypatch, legacy):
    values = []
    for rows in (512, 4):
        monkeypatch.setattr(dycon, "ROWS", rows)
        own, other = vectors()
        own.requires_grad_()
        loss = sum(contrast(own, other, CLASSES, torch.ones(2, 6), FIRST, 0.6, 2.0, legacy))
        loss.backward()
        values.append((loss.detach(), own.grad))
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


def test_memory_is_linear_in_the_number_of_positions(monkeypatch):
    """What the backward pass keeps of them: no array with a side of N by N, with checkpoints."""
    def kept(positions):
        sizes = []
        own = torch.nn.functional.normalize(torch.randn(1, positions, 3), dim=-1).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            contrast(own, own.detach(), torch.arange(positions)[None] % 2, torch.ones(1, positions), 0.3, 0.6, 2.0)
        return max(sizes, default=0)

    monkeypatch.setattr(dycon, "ROWS", 32)
    assert kept(256) <= 3 * 256
    monkeypatch.setattr(dycon, "checkpoint", lambda function, *args, **_: function(*args))
    assert kept(256) >= 32 * 256 and checkpoint is not dycon.checkpoint


# --- positions -------------------------------------------------------------------------------------------------------


def test_classes_are_of_labels_where_there_are_any_and_else_the_teachers():
    label = torch.zeros(1, 16, 16, dtype=torch.uint8)
    label[:, 8:] = 2
    target = torch.tensor([0.1, 0.8, 0.1]).view(1, 3, 1, 1).expand(2, 3, 16, 16).clone()
    target[1, :, :8] = torch.tensor([0.4, 0.35, 0.25]).view(3, 1, 1)
    classes, certain = method(classes=3, certain=0.75).positions(target, label, (2, 2))
    assert classes.tolist() == [[0, 0, 2, 2], [0, 0, 1, 1]]
    assert certain.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    _, certain = method(classes=3).positions(target, label, (2, 2))
    assert certain.all()


@pytest.mark.parametrize(("network", "side", "grid"), [("vnet", 32, 4), ("unet", 32, 4), ("segresnet", 32, 8)])
@pytest.mark.parametrize("dims", [2, 3])
def test_positions_are_those_of_the_level_above_the_deepest(network, side, grid, dims):
    net = networks.Build(network, 2, NetSpec(1, (side,) * dims, 4))()
    with torch.no_grad():
        maps = net(torch.randn(2, 1, *(side,) * dims)).features.encoder
        out = Projection(net.backbone, 8, 6)(maps)
    assert out.shape == (2, 6, *(grid,) * dims) and out.shape[2:] == maps[-2].shape[2:]
    assert torch.allclose(embedding(out).norm(dim=-1), torch.ones(()), atol=1e-5)
    assert embedding(out).shape == (2, grid**dims, 6)


# --- the step --------------------------------------------------------------------------------------------------------


def test_beta_and_thresholds_along_the_run():
    made = method(cross_ramp=1.0)
    for share, beta, threshold in ((0, 5, 0.3013), (0.25, 2.812, None), (0.5, 1.581, 0.3573), (1, 0.5, 0.5)):
        clock = Clock(torch.tensor(int(share * TOTAL)), TOTAL)
        assert made.beta(clock).item() == pytest.approx(beta, abs=1e-3)
        if threshold:
            assert made.cross_threshold(clock).item() == pytest.approx(threshold, abs=1e-4)
    assert float(method(cross_ramp=0.45).cross_threshold(Clock(torch.tensor(450), TOTAL))) == 0.5


def test_the_released_run_ends_before_its_weight_is_full():
    weight = method(ramp=1.5, ramp_every=150)(batch(), Clock(torch.tensor(20000), 20000)).watch["weight"]
    assert weight.item() == pytest.approx(0.1 * math.exp(-5 * (1 - 133 / 200) ** 2), abs=1e-6)


def test_terms_and_where_their_gradients_go():
    made, images = method(side=32), batch(side=32)
    terms, _ = made(images, END)
    assert list(terms) == ["supervised", "consistency", "uncertainty", "contrast"]
    for name, term in terms.items():
        reached = {part: any(g is not None and bool(g.any()) for g in torch.autograd.grad(
            term, list(module.parameters()), retain_graph=True, allow_unused=True))
            for part, module in (("encoder", made.student.backbone.stages), ("head", made.student.heads),
                                 ("projection", made.projection))}
        contrasts = name == "contrast"
        assert reached == {"encoder": True, "head": not contrasts, "projection": contrasts}, name


def test_supervised_term_is_cross_entropy_and_foreground_dice_and_all_there_is_without_unlabeled_samples():
    made, images = method(), batch(count=2)
    net = copy.deepcopy(made.student)
    torch.manual_seed(3)
    terms = made(images, END).terms
    torch.manual_seed(3)
    logits = net(images.image).logits
    expected = cross_entropy(logits, images.labeled.label) + dice(logits.softmax(1), images.labeled.label, "foreground")
    assert set(terms) == {"supervised"} and terms["supervised"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_labels_decide_the_contrast_of_labeled_images_alone():
    images = batch()
    other = images._replace(labeled=images.labeled._replace(label=torch.ones_like(images.labeled.label)))
    for contrasted, same in (("unlabeled", True), ("all", False)):
        values = []
        for data in (images, other):
            made = method(contrasted=contrasted)
            torch.manual_seed(3)
            values.append(made(data, END).terms["contrast"].item())
        assert (values[0] == values[1]) == same


def test_legacy_squares_differences_of_another_softmax():
    """Of two classes it shrinks them by 0.39 to 0.5, their squares by 4 to 6.5."""
    values = []
    for compat in ("right", "legacy"):
        torch.manual_seed(3)
        values.append(method(compat=compat)(batch(), END).terms["consistency"].item())
    assert 4 <= values[0] / values[1] <= 6.5


def test_both_teachers_follow():
    made = method(decay=0.9)
    before = copy.deepcopy(made.teacher_projection.net)
    with torch.no_grad():
        made.projection.layers[0].weight.add_(1)
    made.after_step(Clock(torch.tensor(10**6), 10**7))
    moved = made.teacher_projection.net.layers[0].weight - before.layers[0].weight
    assert torch.allclose(moved, torch.full_like(moved, 0.1), atol=1e-5)
    assert not any(p.requires_grad for p in made.teacher_projection.parameters())


@pytest.mark.parametrize("hp", [{"temperature": 0.0}, {"beta_last": 0.0}, {"gamma": 0.5}, {"certain": 1.5},
                                {"channels": 0}, {"ramp_every": 0}])
def test_hyper_parameters_that_cannot_work(hp):
    with pytest.raises(UserError, match=f"hp.{next(iter(hp))} {next(iter(hp.values()))}: expected"):
        Config(**hp)
