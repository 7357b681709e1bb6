"""CorrMatch as a method: what it becomes with its switches off, where gradients go, its threshold and its refusals."""

import copy

import pytest
import torch
from torch.nn import functional as F

import networks
from networks.base import NetSpec
from ssl4mis import augment, config, correlation
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import dice, segmentation
from ssl4mis.method import Task
from ssl4mis.methods.corrmatch import Config, CorrMatch, Target

SIDE, LAST = 16, Clock(torch.tensor(999), 1000)
FIXMATCH = {"pixel_prop": False, "region_prop": False, "kl": False, "fp": False, "dynamic_tau": False}
STEADY = {"corr_dropout": 0.0, "feature_dropout": 0.0}


def method(dims=3, classes=2, width=2, side=SIDE, confident=1.0, samples=(2, 2), **hp):
    torch.manual_seed(0)
    build = networks.Build("vnet", classes, NetSpec(1, (side,) * dims, width))
    made = CorrMatch(build, Task(classes, dims, batch=samples), Config(**hp)).train()
    made.net.heads["seg"].conv.weight.data *= confident
    return made


def batch(dims=3, classes=2, labeled=2, unlabeled=2, side=SIDE):
    torch.manual_seed(1)
    space = (side,) * dims
    image = torch.randn(labeled + unlabeled, 1, *space)
    inside = torch.ones(unlabeled, *space, dtype=torch.bool)
    inside[:, :3] = False
    label = torch.randint(classes, (labeled, *space), dtype=torch.uint8)
    half, other = (Half(x, None, ("u",) * unlabeled, (x + 0.3 * torch.randn_like(x),), valid) for x, valid in (
        (image[labeled:], inside), (torch.randn(unlabeled, 1, *space), inside.flip(1))))
    return Batch(image, Half(image[:labeled], label, ("l",) * labeled), half, other if unlabeled else None)


def some_boxes(count, space, *_):
    box = torch.zeros(count, *space, dtype=torch.bool)
    box[0, 4:12, 2:9] = True
    return box


@pytest.fixture
def fixed_boxes(monkeypatch):
    monkeypatch.setattr(augment, "boxes", some_boxes)


# --- FixMatch --------------------------------------------------------------------------------------------------------


def fixmatch(net, data, tau, with_dice):
    """FixMatch, written down a second time: half the supervised loss and half that of confident pseudo-labels."""
    u, v, n = data.unlabeled, data.partner, len(data.labeled.image)
    with torch.no_grad():
        other = net.eval()(v.image).logits.softmax(1)
    weak = net.train()(data.image).logits
    box = some_boxes(len(u.image), u.image.shape[2:])
    image, target, valid = u.strong[0].clone(), weak[n:].detach().softmax(1), u.valid.clone()
    for sample in range(len(image)):
        for new, old in ((image, v.strong[0]), (target, other)):
            new[sample][:, box[sample]] = old[sample][:, box[sample]]
        valid[sample][box[sample]] = v.valid[sample][box[sample]]
    confidence, label = target.max(1)
    # one log-softmax for both terms: gradients near 0 would show the rounding of two
    strong, sure = net(image).logits.log_softmax(1), (confidence >= tau) & valid
    unsupervised = (F.nll_loss(strong, label, reduction="none") * sure).sum() / valid.sum()
    supervised = F.cross_entropy(weak[:n], data.labeled.label.long())
    if with_dice:
        supervised = segmentation(weak[:n], data.labeled.label)
        unsupervised = (unsupervised + dice(strong.exp(), label, mask=sure)) / 2
    return (supervised + unsupervised) / 2, sure


@pytest.mark.parametrize(("dims", "classes"), [(2, 4), (3, 2)])
@pytest.mark.parametrize("with_dice", [False, True])
def test_with_its_switches_off_it_is_fixmatch(dims, classes, with_dice, fixed_boxes):
    made = method(dims, classes, confident=20, tau=0.95, dice=with_dice, u_dice=with_dice, **FIXMATCH)
    net, data = copy.deepcopy(made.net), batch(dims, classes)
    expected, sure = fixmatch(net, data, 0.95, with_dice)
    assert 0.1 < sure.float().mean() < 0.9
    terms = made(data, LAST).terms
    assert set(terms) == {"supervised", "hard"} and not hasattr(made, "head")
    assert sum(terms.values()).item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    sum(terms.values()).backward()
    for mine, theirs in zip(made.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_nobody_is_sure_enough_for_a_threshold_above_one():
    terms = method(confident=50, tau=1.01, tau_max=1.01, **FIXMATCH)(batch(), LAST).terms
    assert terms["hard"] == 0


def test_without_threshold_and_with_equal_views_pseudo_labels_are_its_own(monkeypatch):
    monkeypatch.setattr(augment, "boxes", lambda count, space, *_: torch.zeros(count, *space, dtype=torch.bool))
    data = batch(labeled=2)
    data = data._replace(labeled=data.labeled._replace(image=data.unlabeled.image),
                         image=torch.cat([data.unlabeled.image] * 2),
                         unlabeled=data.unlabeled._replace(strong=(data.unlabeled.image,)))
    made = method(tau=0.0, tau_max=0.0, dice=False, u_dice=False, **FIXMATCH)
    logits, valid = copy.deepcopy(made.net)(data.image).logits[2:], data.unlabeled.valid
    own = (F.cross_entropy(logits, logits.argmax(1), reduction="none") * valid).sum() / valid.sum()
    assert made(data, LAST).terms["hard"].item() == pytest.approx(own.item() / 2, rel=1e-5)


# --- terms -----------------------------------------------------------------------------------------------------------


def gradients(term, module):
    found = torch.autograd.grad(term, list(module.parameters()), retain_graph=True, allow_unused=True)
    return sum(0.0 if g is None else g.abs().sum().item() for g in found)


def test_where_gradients_go():
    """The spread logits are detached: their losses reach the encoder and the correlation, not the decoder."""
    made = method(confident=20)
    terms = made(batch(), LAST).terms
    assert list(terms) == ["supervised", "supervised_corr", "hard", "kl", "feature", "corr"]
    for name, term in terms.items():
        spread = name in ("supervised_corr", "corr")
        assert gradients(term, made.net.backbone.stages) > 0, name
        assert (gradients(term, made.net.backbone.decoder) == 0) == spread, name
        assert (gradients(term, made.net.heads) == 0) == spread, name
        assert (gradients(term, made.head) > 0) == spread, name


@pytest.mark.parametrize("off", [(), ("fp",), ("kl",), ("region_prop",), ("kl", "fp"), ("pixel_prop", "region_prop"),
                                 ("pixel_prop", "region_prop", "kl", "fp")])
def test_weights_of_both_halves_sum_to_one_half(off, monkeypatch):
    """Every loss replaced by one: what is left are the weights."""
    ones = {"mean": lambda *_: torch.tensor(1.0), "masked": lambda *_: torch.tensor(1.0)}
    for name, value in ones.items():
        monkeypatch.setattr(f"ssl4mis.methods.corrmatch.{name}", value)
    terms = method(**dict.fromkeys(off, False))(batch(), LAST).terms
    supervised = sum(v for name, v in terms.items() if name.startswith("supervised"))
    assert supervised == 0.5 and sum(terms.values()) == 1.0
    if not off:
        assert {k: v.item() for k, v in terms.items()} == {"supervised": 0.25, "supervised_corr": 0.25, "hard": 0.125,
                                                           "kl": 0.125, "feature": 0.125, "corr": 0.125}
    if off == ("fp",):  # the paper's weights
        assert terms["hard"] == 0.25


def test_kl_of_equal_logits_is_zero(monkeypatch):
    monkeypatch.setattr(augment, "boxes", lambda count, space, *_: torch.zeros(count, *space, dtype=torch.bool))
    data = batch()
    data = data._replace(labeled=data.labeled._replace(image=data.unlabeled.image),
                         image=torch.cat([data.unlabeled.image] * 2),
                         unlabeled=data.unlabeled._replace(strong=(data.unlabeled.image,)))
    terms = method(tau=0.0, tau_max=0.0)(data, LAST).terms
    assert terms["kl"].item() == pytest.approx(0, abs=1e-6) and terms["hard"] > 0.01


@pytest.mark.parametrize("mixed", [True, False])
def test_the_target_of_kl(mixed, fixed_boxes):
    made, data = method(tau=0.0, tau_max=0.0, kl_target_cutmix=mixed, **STEADY), batch()
    net, box = copy.deepcopy(made.net), some_boxes(2, data.image.shape[2:])
    with torch.no_grad():
        other = net.eval()(data.partner.image).logits.softmax(1)
        target = net.train()(data.image).logits[2:].softmax(1)
        strong = net(torch.where(box[:, None], data.partner.strong[0], data.unlabeled.strong[0])).logits.softmax(1)
    if mixed:
        target = torch.where(box[:, None], other, target)
    valid = torch.where(box, data.partner.valid, data.unlabeled.valid)
    expected = ((target * (target.log() - strong.log())).sum(1) * valid).sum() / valid.sum()
    assert made(data, LAST).terms["kl"].item() == pytest.approx(0.125 * expected.item(), rel=1e-4)


def test_perturbed_features_are_those_of_the_unlabeled_half(monkeypatch):
    made, seen = method(confident=20), []
    decode = made.net.decode
    monkeypatch.setattr(made.net, "decode", lambda skips: seen.append(skips) or decode(skips))
    made(batch(labeled=2, unlabeled=3), LAST)
    _, weak, _, perturbed = seen  # partner, weak, strong, perturbed
    assert len(perturbed) == len(weak) == 5
    dropped = 0
    for whole, part in zip(weak, perturbed, strict=True):
        assert part.shape == whole[2:].shape
        zero = part.flatten(2).abs().amax(2) == 0
        dropped += zero.sum()
        assert torch.equal(part[~zero], 2 * whole[2:][~zero])
    channels = sum(x.shape[1] for x in weak) * 3
    assert 0.3 < dropped / channels < 0.7


def test_the_partner_leaves_batch_statistics_alone():
    made = method()
    before = copy.deepcopy(made.net.state_dict())
    probability = made.steady(batch().partner.image)
    assert not probability.requires_grad and made.net.training
    assert all(torch.equal(value, before[name]) for name, value in made.net.state_dict().items())
    with torch.no_grad():
        expected = made.eval().net(batch().partner.image).logits.softmax(1)
    assert torch.equal(probability, expected)


def test_dropout_of_the_backbone_is_off():
    made = method()
    assert torch.equal(made.net(batch().image).logits, made.net(batch().image).logits)


def test_regions_stay_outside_box_and_padding(fixed_boxes, monkeypatch):
    """Shapes that cover all and a label that is the same everywhere: only the box and the padding stay as they were."""
    monkeypatch.setattr(correlation, "shapes", lambda *_: [torch.ones(2, 1, 16, 16, 16, dtype=torch.bool)])
    made = method(tau_max=0.8, tau_reg_max=0.5)
    space, box = (16,) * 3, some_boxes(2, (16,) * 3)
    probability = torch.zeros(2, 2, *space)
    probability[:, 1] = torch.rand(2, *space) * 0.2 + 0.75
    probability[:, 0] = 1 - probability[:, 1]
    data = batch()
    mine, mixed = (Target.of(probability, valid) for valid in (data.unlabeled.valid, data.partner.valid))
    sure = mixed.sure(torch.tensor(0.8))
    label, mask = made.regions(made.view(data.image), mine, mixed, box, torch.tensor(0.9))
    assert 0 < sure.sum() < mask.sum()
    assert torch.equal(mask, sure | (mixed.valid & ~box)) and (label == 1).all()


def test_shapes_come_from_the_unlabeled_half_and_carry_no_gradient(monkeypatch):
    made, data, seen = method(n_rows=5), batch(labeled=1, unlabeled=2), []
    monkeypatch.setattr(correlation, "shapes", lambda *given: seen.append(given) or [torch.ones(2, 5, 16, 16, 16) > 0])
    mine = Target.of(torch.rand(2, 2, 16, 16, 16), data.unlabeled.valid)
    weak = made.view(data.image)
    made.regions(weak, mine, mine, some_boxes(2, (16,) * 3), made.tau)
    (matrix, rows, grid, space, mode), = seen
    assert torch.equal(matrix, weak.matrix[1:]) and not matrix.requires_grad
    assert (rows.shape, grid, tuple(space), mode) == ((2, 5), (2, 2, 2), (16, 16, 16), "soft_full")


def test_a_label_of_255_is_ignored():
    made, data = method(**STEADY), batch()
    label = data.labeled.label.clone()
    label[:, 8:] = 255
    half = data._replace(labeled=data.labeled._replace(label=label))
    weak = made.view(data.image)
    found = made.supervised(weak, half.labeled.label)
    logits = weak.logits[:2, :, :8], weak.spread[:2, :, :8]
    assert found["supervised"].item() == pytest.approx(0.25 * segmentation(logits[0], label[:, :8]).item(), rel=1e-5)
    entropy = F.cross_entropy(logits[1], label[:, :8].long()).item()
    assert found["supervised_corr"].item() == pytest.approx(0.25 * entropy, rel=1e-5)


def test_without_unlabeled_samples_it_is_supervised():
    terms = method()(batch(unlabeled=0), LAST).terms
    assert set(terms) == {"supervised", "supervised_corr"}
    assert set(method(**FIXMATCH)(batch(unlabeled=0), LAST).terms) == {"supervised"}


# --- threshold and warm-up -------------------------------------------------------------------------------------------


def sure_target(confidence=1.0):
    probability = torch.full((1, 2, 2, 2), confidence)
    probability[:, 1] = 1 - confidence
    return Target.of(probability, torch.ones(1, 2, 2, dtype=torch.bool))


def test_threshold_of_a_network_that_is_always_sure():
    made = method(2)
    for step in range(1, 3001):
        tau = made.threshold(sure_target(), sure_target(), torch.tensor(True))
        if step in (1, 1000, 3000):
            assert tau.item() == pytest.approx(1 - 0.15 * 0.999**step, rel=1e-12)
    assert made.tau.dtype == torch.float64 and "tau" in made.state_dict()


def test_the_threshold_waits_for_the_warm_up_as_the_terms_do():
    made, data = method(confident=50, warm_up=0.25), batch()
    for step, active in ((0, False), (249, False), (250, True), (999, True)):
        before = made.tau.clone()
        terms = made(data, Clock(torch.tensor(step), 1000)).terms
        assert torch.equal(made.tau, before) != active
        assert (terms["hard"] != 0) == active and terms["supervised"] > 0


def test_a_fixed_threshold_does_not_move():
    made = method(confident=50, dynamic_tau=False)
    made(batch(), LAST)
    assert made.tau == 0.85


def test_thresholds_are_capped(monkeypatch):
    seen, hp = [], {"confident": 5, "tau": 0.99, "dynamic_tau": False, "tau_reg_max": 0.6}
    monkeypatch.setattr(correlation, "propagate_regions", lambda *given: seen.append(given) or given[:2])
    watches = [method(**hp, tau_max=tau_max)(batch(), LAST).watch for tau_max in (0.7, 1.0)]
    assert [watch["tau"] for watch in watches] == [0.99, 0.99]
    for (_, sure, _, _, tau, *_), watch in zip(seen, watches, strict=True):
        assert tau.item() == 0.6 and sure.float().mean() == watch["sure"]
    assert watches[0]["sure"] > watches[1]["sure"] > 0


@pytest.mark.parametrize("where", ["weak", "mixed"])
def test_the_voxels_that_the_threshold_follows(where):
    made = method(2, tau_mask=where, tau_momentum=0.0)
    probability = torch.tensor([[[[0.9, 0.6]], [[0.1, 0.4]]]])
    mine, mixed = (Target.of(probability, torch.tensor([[valid]])) for valid in ([True, False], [False, True]))
    assert made.threshold(mine, mixed, torch.tensor(True)).item() == pytest.approx(0.9 if where == "weak" else 0.6)


# --- refusals, cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hp", "message"), [
    ({"n_rows": 0}, "hp.n_rows 0"), ({"corr_stride": 0}, "hp.corr_stride 0"), ({"channels": 0}, "hp.channels 0"),
    ({"cutmix": 1.5}, "hp.cutmix 1.5: expected 0 to 1"), ({"warm_up": -0.1}, "hp.warm_up"),
    ({"box_min": 0.5}, "hp.box_min 0.5: expected at most hp.box_max 0.4"),
    ({"pixel_prop": False}, "hp.region_prop True: expected hp.pixel_prop True"),
])
def test_bad_values_are_refused(hp, message):
    with pytest.raises(UserError, match=message):
        Config(**hp)


def test_large_correlations_are_refused_before_training():
    with pytest.raises(UserError, match="hp.corr_stride"):
        method(side=32, corr_stride=1)
    method(corr_memory=1, corr_stride=4)  # 64 positions
    with pytest.raises(UserError, match="18 samples"):
        method(corr_memory=1, corr_stride=4, samples=(2, 8))


@pytest.mark.parametrize(("words", "iterations", "batch"), [
    ("LA", 15000, 4), ("Pancreas", 15000, 4), ("BraTS", 30000, 4), ("ACDC --protocol slices", 30000, 24),
])
def test_presets(words, iterations, batch):
    (spec,), _ = config.parse(f"--method corrmatch --dataset {words}".split())
    assert (spec.iterations, spec.schedule, spec.labeled_batch + spec.unlabeled_batch) == (iterations, "poly", batch)
    assert round(spec.hp["warm_up"] * iterations) == 1000
