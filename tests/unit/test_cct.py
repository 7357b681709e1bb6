"""CCT: what perturbations do to features, which decoder learns from what, and what it refuses."""

import pytest
import torch
from reference.several_decoders import SeveralDecoders

import networks
from networks.base import NetSpec, channels_last
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import Task
from ssl4mis.methods.cct import CCT, Config
from ssl4mis.passes import count_samples

TOTAL = 1000
END = Clock(torch.tensor(TOTAL), TOTAL)
LABEL = torch.tensor([[[0, 1], [1, 1]]])


def logits(seed):
    return torch.randn(2, 2, 2, 2, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def cct(maps=None, **hp):
    """The method with decoders that say these maps."""
    maps = maps or [logits(seed) for seed in range(4)]
    return CCT(lambda: SeveralDecoders(maps), Task(2, 2), Config(**hp))


def batch():
    image = torch.zeros(2, 1, 2, 2)
    return Batch(image, Half(image[:1], LABEL, ("l",)), Half(image[1:], None, ("u",)))


def features(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) + 0.5


def test_noise_is_relative_bounded_and_shared_by_the_samples():
    x = features(3, 8, 10, 10)
    ratio = cct(noise=0.3).noisy(x) / x - 1
    assert torch.allclose(ratio[0], ratio[1], atol=1e-6) and torch.allclose(ratio[0], ratio[2], atol=1e-6)
    assert 0.29 < ratio.abs().max() <= 0.3 + 1e-6 and ratio.mean().abs() < 0.02 and ratio[0].std() > 0.15


def test_dropout_is_of_single_features_and_keeps_the_mean():
    x = features(2, 8, 30, 30)
    ratio = cct(dropout=0.25).dropped_out(x) / x
    values = ratio.unique()
    assert values.min() == 0 and torch.allclose(values[values > 0], torch.tensor(4 / 3))
    assert (ratio == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert ((ratio == 0).float().mean((2, 3)) - 0.25).abs().max() < 0.1, "whole channels"


def test_the_most_active_positions_are_dropped_in_each_sample():
    """Channel means 1, 2, 8 and 10 in one sample, and ten times less in the other; thresholds are from 7 to 9."""
    means = torch.tensor([1.0, 2.0, 8.0, 10.0])
    x = torch.stack([means - 0.5, means + 0.5])[None].repeat(2, 1, 1)[..., None]
    x[1] /= 10
    method, seen = cct(), set()
    for seed in range(20):
        torch.manual_seed(seed)
        kept = method.without_peaks(x) / x
        assert torch.equal(kept[0], kept[1]) and torch.equal(kept[:, 0], kept[:, 1])
        assert kept[0, 0, :2].all() and not kept[0, 0, 3].any()
        seen.add(kept[0, 0, 2].item())
    assert seen == {0.0, 1.0}, "the share is drawn"


def test_what_is_drawn_does_not_depend_on_the_layout():
    x, method = features(2, 4, 6, 6), cct()
    for name, perturb in method.perturbations.items():
        found = []
        for layout in (torch.contiguous_format, channels_last(2)):
            torch.manual_seed(0)
            found.append(perturb(x.contiguous(memory_format=layout)))
        assert torch.equal(*found), name
        assert not torch.equal(found[0], x), name


@pytest.mark.parametrize(("levels", "changed"), [("all", [True] * 3), ("bottom", [False, False, True])])
def test_levels(levels, changed):
    method = cct(levels=levels)
    skips = [features(2, 2, 4, 4) for _ in range(3)]
    found = method.perturbed(skips, method.noisy)
    assert [new is not old for new, old in zip(found, skips, strict=True)] == changed


def test_each_auxiliary_decoder_sees_another_perturbation(monkeypatch):
    method = cct()
    told = {"noise": 2.0, "dropout": 3.0, "peaks": 5.0}
    monkeypatch.setattr(CCT, "perturbations", {name: (lambda x, f=f: f * x) for name, f in told.items()})
    method(batch(), END)
    assert [skips[0].max().item() for skips in method.net.seen.values()] == [2.0, 3.0, 5.0]
    assert all(len(skips[0]) == 2 for skips in method.net.seen.values())


@pytest.mark.parametrize("auxiliary", [True, False])
def test_who_learns_from_labels(auxiliary):
    maps = [logits(seed) for seed in range(4)]
    term = cct(maps, auxiliary=auxiliary)(batch(), END).terms["supervised"]
    taught = maps if auxiliary else maps[:1]
    expected = sum(segmentation(x[:1], LABEL).item() for x in taught) / len(taught)
    assert term.item() == pytest.approx(expected)
    found = torch.autograd.grad(term, maps, allow_unused=True)
    assert [gradient is not None for gradient in found] == [True] + [auxiliary] * 3
    assert all(gradient[0].any() and not gradient[1].any() for gradient in found if gradient is not None)


@pytest.mark.parametrize("detach", [True, False])
def test_the_main_prediction_is_a_target(detach):
    maps = [logits(seed) for seed in range(4)]
    terms = cct(maps, weight=6.0, detach=detach)(batch(), END).terms
    for name, other in zip(("noise", "dropout", "peaks"), maps[1:], strict=True):
        term = terms[f"consistency/{name}"]
        expected = (maps[0][1:].softmax(1) - other[1:].softmax(1)).square().mean()
        assert term.item() == pytest.approx(6 / 3 * expected.item(), rel=1e-5)
        main, own = torch.autograd.grad(term, (maps[0], other), allow_unused=True, retain_graph=True)
        assert (main is None) == detach and own[1].any() and not own[0].any()


def test_the_main_decoder_predicts_alone():
    method = CCT(networks.Build("vnet", 2, NetSpec(1, (32, 32), 2)), Task(2, 2), Config()).eval()
    counts, image = count_samples(method), torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(method.predict(image), method.predict(image))
    assert sum(count for key, count in counts.items() if key[1] == "decoded") == 2 * 2


@pytest.mark.parametrize(("hp", "name"), [({"dropout": 1.0}, "dropout"), ({"noise": -0.1}, "noise"),
                                          ({"drop_min": 0.95}, "drop_min"), ({"weight": -1.0}, "weight")])
def test_nonsense_is_refused(hp, name):
    with pytest.raises(UserError) as error:
        Config(**hp)
    assert name in str(error.value) and "\n" not in str(error.value)
