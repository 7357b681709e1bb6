"""GCT: flaws that are true and flaws as they are used, who teaches whom, and who learns in which phase."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import networks
from networks.base import NetSpec, Output
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Adam, Task
from ssl4mis.methods import gct
from ssl4mis.methods.gct import GCT, Config, FlawDetector, blur, guidance, stretched, true_flaws, usable

END = Clock(torch.tensor(1000), 1000)
DETECT = END._replace(phase="detect")


class Fixed(nn.Module):
    """A network that says the same to every image, or another thing in its first pass."""

    def __init__(self, logits, before=None):
        super().__init__()
        self.logits, self.before = nn.Parameter(logits.clone()), before

    def forward(self, image):
        said, self.before = self.logits if self.before is None else self.before, None
        return Output({"seg": said[:len(image)]}, None)


class Known(nn.Module):
    """A detector whose flaws are `scale` times the probability of class 1."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image, probability):
        return self.scale * probability[:, 1:2]


def odds(*probabilities):
    """Logits (B, 2, 1, voxels) of two classes; class 1 has these probabilities (B, voxels)."""
    one = torch.tensor(probabilities).logit()[:, None, None]
    return torch.cat([torch.zeros_like(one), one], 1)


def method(first, second, before=(None, None), **hp):
    nets = iter((Fixed(first, before[0]), Fixed(second, before[1])))
    made = GCT(lambda dropout: next(nets), Task(2, 2), Config(**hp))
    made.detector = Known()
    return made


def batch(voxels, labeled=1, unlabeled=1):
    image = torch.zeros(labeled + unlabeled, 1, 1, voxels)
    label = torch.zeros(labeled, 1, voxels, dtype=torch.uint8)
    return Batch(image, Half(image[:labeled], label, ("l",) * labeled), Half(image[labeled:], None, ("u",) * unlabeled))


# --- flaw maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "share", "size"), [
    (112, 1 / 8, 15), (80, 1 / 8, 11), (112, 1 / 4, 29), (321, 1 / 8, 41), (112, 1 / 16, 7), (16, 1 / 16, 1),
    (7, 1 / 16, 1),
])
def test_a_blur_spans_an_odd_share_of_the_side(side, share, size):
    """The width of its trace of a single voxel; sigma is that of the code."""
    line = torch.zeros(1, 1, 1, side, dtype=torch.float64)
    line[..., side // 2] = 1
    found = blur(line, share).flatten()
    assert (found > 0).sum() == size and found.sum().item() == pytest.approx(1)
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    if size > 1:
        middle, beside = found[side // 2], found[side // 2 + 1]
        assert (beside / middle).item() == pytest.approx(math.exp(-0.5 / sigma**2))


@pytest.mark.parametrize("space", [(24, 16), (24, 16, 32)])
def test_a_blur_keeps_what_is_constant_and_follows_each_axis(space):
    assert torch.allclose(blur(torch.full((2, 1, *space), 0.3), 1 / 4), torch.tensor(0.3))
    point = torch.zeros(1, 1, *space)
    point[(0, 0, *(side // 2 for side in space))] = 1
    found = blur(point, 1 / 8)
    for axis, side in enumerate(space):
        others = tuple(2 + other for other in range(len(space)) if other != axis)
        assert (found.sum(others) > 0).sum() == side // 8 + 1 - side // 8 % 2
    assert torch.equal(blur(torch.cat([point, 2 * point]), 1 / 8)[1], 2 * found[0])


def test_stretched_by_hand():
    maps = torch.tensor([[2.0, 4.0, 6.0], [3.0, 3.0, 3.0]]).view(2, 1, 1, 3)
    assert torch.allclose(stretched(maps).flatten(1), torch.tensor([[0, 0.5, 1], [0, 0, 0]]))


def test_usable_flaws_by_hand():
    """On so small a map the kernel is one voxel. Negative values become 0; a map up to 0.1 has no flaw."""
    maps = torch.tensor([[-1.0, 0.2, 0.4], [0.05, 0.1, 0.02], [0.11, 0.11, -1.0]]).view(3, 1, 1, 3)
    assert torch.allclose(usable(maps).flatten(1), torch.tensor([[0, 0.5, 1], [0, 0, 0], [1, 1, 0]]), atol=1e-6)
    assert maps.min() == -1, "the detector's own map is changed"


@pytest.mark.parametrize(("dims", "grown"), [(2, 9), (3, 27)])
def test_true_flaws_are_enlarged(dims, grown):
    """Without blur: one wrong voxel of probability 1/4, and one dilation makes it a block of three voxels a side."""
    label = torch.zeros(1, *[7] * dims, dtype=torch.uint8)
    probability = torch.stack([torch.ones(1, *[7] * dims), torch.zeros(1, *[7] * dims)], 1)
    probability[(0, slice(None), *[3] * dims)] = torch.tensor([0.25, 0.75])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gct, "blur", lambda maps, share: maps)
        assert true_flaws(probability, label, 0).flatten().tolist().count(1) == 1
        found = true_flaws(probability, label, 1)
    assert found.shape == (1, 1, *[7] * dims)
    assert (found == 1).sum() == grown and (found == 0).sum() == 7**dims - grown


def test_true_flaws_are_blurred_before_and_after_the_dilation(monkeypatch):
    seen = []
    monkeypatch.setattr(gct, "blur", lambda maps, share: seen.append((share, maps.clone())) or maps)
    label, probability = torch.tensor([[[0, 2]]]), torch.tensor([[[[0.5, 0.1]], [[0.3, 0.2]], [[0.2, 0.7]]]])
    assert torch.allclose(true_flaws(probability, label, 2), torch.tensor(0.0))  # two voxels: all is enlarged
    assert [share for share, _ in seen] == [1 / 8, 1 / 4, 1 / 4]
    assert torch.allclose(seen[0][1].flatten(), torch.tensor([1.0, 0.6]))  # |1 - p| of the truth and p of the others
    assert torch.allclose(seen[1][1].flatten(), torch.tensor([1.0, 1.0]))


def test_a_perfect_prediction_has_no_flaws():
    label = torch.randint(3, (2, 8, 8))
    assert not true_flaws(F.one_hot(label, 3).movedim(-1, 1).float(), label, 1).any()


# --- who teaches -----------------------------------------------------------------------------------------------------


def test_guidance_by_hand():
    """The better network teaches; at a tie, or where both are over the threshold, each learns its own prediction."""
    flaws = torch.tensor([[0.1, 0.3, 0.2, 0.7, 0.6], [0.2, 0.1, 0.2, 0.9, 0.7]]).view(2, 1, 1, 1, 5)
    mine, theirs = torch.full((1, 2, 1, 5), 0.25), torch.full((1, 2, 1, 5), 0.75)
    (first, second), bad = guidance((mine, theirs), flaws, 0.6)
    assert first[0, 0, 0].tolist() == [0.25, 0.75, 0.25, 0.25, 0.25]
    assert second[0, 0, 0].tolist() == [0.25, 0.75, 0.75, 0.75, 0.25]
    assert bad.flatten().tolist() == [False, False, False, True, False]
    assert flaws.max() == pytest.approx(0.9), "the flaws are changed"


def test_terms_by_hand():
    """Flaws are the probabilities of class 1, which on the first image are scaled to (0, 1, 0.5) and (1, 0, 0.5)."""
    first, second = odds([0.1, 0.9, 0.5]), odds([0.8, 0.2, 0.5])
    made = method(first, second, weight=3.0, correction=0.5, threshold=0.4)
    terms, watch = made(batch(3, 1, 0)._replace(unlabeled=batch(3).unlabeled), END)
    # consistency: the first learns 0.2 in its second voxel, the second learns 0.1 in its first one; both classes err
    assert terms["consistency/first"].item() == pytest.approx(3 * (0.9 - 0.2)**2 / 3, rel=1e-5)
    assert terms["consistency/second"].item() == pytest.approx(3 * (0.8 - 0.1)**2 / 3, rel=1e-5)
    # correction: both are bad in the third voxel only
    assert terms["correction/first"].item() == pytest.approx(0.5 * 0.5**2 / 3)
    assert watch["bad"].item() == pytest.approx(1 / 3) and watch["first_better"].item() == pytest.approx(1 / 3)


def test_targets_and_flaws_come_from_the_pass_before():
    first, second = odds([0.1, 0.9, 0.5]), odds([0.8, 0.2, 0.5])
    now = odds([0.3, 0.3, 0.3])
    made = method(now, now, (first, second), weight=3.0, threshold=0.4)
    terms, _ = made(batch(3, 1, 0)._replace(unlabeled=batch(3).unlabeled), END)
    targets = torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.1, 0.2, 0.5])
    for name, target in zip(("first", "second"), targets, strict=True):
        assert terms[f"consistency/{name}"].item() == pytest.approx(3 * (0.3 - target).square().mean().item())
        assert terms[f"correction/{name}"].item() == pytest.approx(0.3**2 / 3)


def test_the_detector_learns_from_the_pass_before_and_the_labels():
    """Its loss is the mean over both networks, on labeled images only."""
    before = odds([0.25, 0.75, 0.5], [0.9, 0.9, 0.9]), odds([0.5, 0.25, 0.75], [0.9, 0.9, 0.9])
    now = odds([0.1, 0.1, 0.1], [0.1, 0.1, 0.1])
    made = method(now, now, before, detection=4.0, dilations=0)
    made(batch(3), END)
    terms, _ = made(batch(3), DETECT)
    # labels are 0: p is the flaw; on three voxels nothing is blurred, and it is scaled to (0, 1, 0.5), (0.5, 0, 1)
    expected = 4 * sum((p - t)**2 for p, t in ((0.25, 0), (0.75, 1), (0.5, 0.5), (0.5, 0.5), (0.25, 0), (0.75, 1))) / 6
    assert terms.keys() == {"detection"} and terms["detection"].item() == pytest.approx(expected)


def gradient(term, parameters):
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return [g is not None and bool(g.abs().max() > 0) for g in found]


def test_who_learns():
    """In a step of the networks the detector is a judge; in its own step it learns alone."""
    made = method(odds([0.1, 0.9, 0.6], [0.2, 0.9, 0.6]), odds([0.8, 0.2, 0.6], [0.7, 0.3, 0.7]), threshold=0.4)
    parameters = [made.first.logits, made.second.logits, made.detector.scale]
    terms, _ = made(batch(3), END)
    for name, term in terms.items():
        assert gradient(term, parameters) == [name.endswith("first"), name.endswith("second"), False], name
    detection = made(batch(3), DETECT).terms["detection"]
    assert gradient(detection, parameters) == [False, False, True]
    assert {id(p) for p in made.trainable("segment")} == {id(p) for p in parameters[:2]}
    assert [id(p) for p in made.trainable("detect")] == [id(made.detector.scale)]


def test_the_detector_has_adam_and_a_schedule_of_its_own():
    (stage,) = method(odds([0.5]), odds([0.5]), detector_rate=2e-4).stages()
    segment, detect = stage.phases
    assert (segment.adam, segment.schedule) == (None, None)
    assert (detect.adam, detect.schedule) == (Adam(2e-4, (0.9, 0.99)), "poly")


@pytest.mark.parametrize(("step", "share"), [(0, math.exp(-5)), (75, math.exp(-5 / 4)), (150, 1), (1000, 1)])
def test_weight(step, share):
    made = method(odds([0.1, 0.2]), odds([0.3, 0.1]))
    found = made(batch(2, 1, 0)._replace(unlabeled=batch(2).unlabeled), Clock(torch.tensor(step), 1000)).watch["weight"]
    assert found.item() == pytest.approx(10 * share)


@pytest.mark.parametrize(("dice", "loss"), [(True, segmentation), (False, cross_entropy)])
def test_without_unlabeled_samples_the_labeled_terms_are_left(dice, loss):
    first, second = odds([0.1, 0.2]), odds([0.3, 0.1])
    made, data = method(first, second, dice=dice), batch(2, 1, 0)
    terms, _ = made(data, END)
    assert terms.keys() == {"supervised/first", "supervised/second"}
    assert torch.equal(terms["supervised/first"], loss(first, data.labeled.label))
    assert made(data, DETECT).terms.keys() == {"detection"}


@pytest.mark.parametrize(("evaluate", "expected"), [("first", 0.75), ("second", 0.5), ("mean", 0.625)])
def test_prediction(evaluate, expected):
    made = method(odds([0.75]), odds([0.5]), evaluate=evaluate)
    assert made.predict(torch.zeros(1, 1, 1, 1))[0, 1].item() == pytest.approx(expected)


# --- the detector ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "expected"), [
    ((256, 256), [2, 2, 1, 2, 1, 2, 1, 2]),
    ((112, 112, 80), [2, 2, 1, 2, 1, 2, 1, (1, 1, 1)]),
    ((96, 96, 16), [2, 2, 1, (2, 2, 1), 1, (2, 2, 1), 1, 1]),
    ((8, 8), [2, 1, 1, 1, 1, 1, 1, 1]),
])
def test_the_detector_halves_sides_of_eight_voxels_and_more(patch, expected):
    dims = len(patch)
    with torch.device("meta"):
        detector = FlawDetector(dims, 3, 4, patch)
        convolutions = [layer for layer in detector.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d)]
        assert [c.stride for c in convolutions] == [e if isinstance(e, tuple) else (e,) * dims for e in expected]
        assert [c.out_channels for c in convolutions] == [4, 8, 8, 16, 16, 32, 32, 1]
        found = detector(torch.zeros(1, 1, *patch), torch.zeros(1, 2, *patch))
    assert found.shape == (1, 1, *patch) and found.dtype == torch.float32


def test_a_sample_is_judged_by_itself():
    torch.manual_seed(0)
    detector = FlawDetector(2, 3, 4, (32, 32))
    image, probability = torch.randn(2, 1, 32, 32), torch.randn(2, 2, 32, 32).softmax(1)
    together, alone = detector(image, probability), detector(image[:1], probability[:1])
    assert torch.allclose(together[:1], alone, atol=1e-6)
    assert together.min() < 0, "flaws are not cut off before the detector's loss"


def test_two_networks_that_start_elsewhere_and_a_detector_of_their_width():
    made = GCT(networks.Build("vnet", 2, NetSpec(1, (16, 16), 2)), Task(2, 2), Config())
    assert not torch.equal(next(made.first.parameters()), next(made.second.parameters()))
    assert made.detector.layers[0].weight.shape == (8, 3, 4, 4)


@pytest.mark.parametrize(("hp", "said"), [({"threshold": 1.5}, "threshold"), ({"weight": -1.0}, "weight"),
                                          ({"dilations": -1}, "dilations"), ({"ramp_every": 0}, "ramp_every")])
def test_impossible_hyper_parameters_are_refused(hp, said):
    with pytest.raises(UserError, match=said):
        Config(**hp)
