"""CML: boxes, mixtures, whose pseudo-labels teach whom, features that are pushed apart, and what it refuses."""

import pytest
import torch

import networks
from networks.base import Features, NetSpec, Output
from ssl4mis import copy_paste
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.errors import UserError
from ssl4mis.method import Task
from ssl4mis.methods import cml
from ssl4mis.methods.cml import CML, Config, cosines, paste

PATCH = (32, 32)


def make(network="vnet", **hp):
    torch.manual_seed(0)
    return CML(networks.Build(network, 2, NetSpec(1, PATCH, 2)), Task(2, 2), Config(component="none", **hp)).train()


def batch(n=2, unlabeled=2):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n + unlabeled, 1, *PATCH, generator=generator)
    label = torch.randint(2, (n, *PATCH), generator=generator)
    return Batch(image, Half(image[:n], label, ("l",) * n), Half(image[n:], None, ("u",) * unlabeled))


def output(features):
    return Output({}, Features([torch.zeros(0), features], []))


X = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(2, 2, 3, 3)


@pytest.mark.parametrize(("other", "value"), [(X, 2.0), (2 * X, 2.0), (-X, 0.0), (X.flip(1) * X.new_tensor([1, -1])
                                               .view(1, 2, 1, 1), 1.0)])  # fmt: skip
def test_alike_opposite_and_orthogonal_features(other, value):
    assert cosines(output(X), output(other)).item() == pytest.approx(2 * value, abs=1e-6)


def test_each_network_moves_away_from_the_other_as_it_is():
    """The cosine's own gradient in each, once: 0.6 of (3, 4) and (1, 0) falls by the part of (1, 0) across (3, 4)."""
    first, second = (x[:1, :, :1, :1].clone().requires_grad_() for x in (X, torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)))
    cosines(output(first), output(second)).backward()
    torch.testing.assert_close(first.grad.flatten(), torch.tensor([1 - 0.36, -0.48]) / 5)
    torch.testing.assert_close(second.grad.flatten(), torch.tensor([0.0, 0.8]))


def test_a_box_has_the_share_and_moves():
    image = torch.zeros(1, 1, 96, 96, 96)
    assert copy_paste.box(image, 2 / 3).float().mean().item() == pytest.approx(0.2963, abs=1e-4)
    boxes = [copy_paste.box(torch.zeros(1, 1, 9, 12), 1 / 3) for _ in range(50)]
    assert {box.sum().item() for box in boxes} == {3 * 4}
    starts = torch.stack([box.nonzero().amin(0) for box in boxes])
    assert starts.amin(0).tolist() == [0, 0] and starts.amax(0).tolist() == [5, 7], "the last place is never drawn"


def test_components():
    label = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])[None]
    probability = torch.stack([1 - label, label], 1).float()
    kept = {name: copy_paste.pseudo_labels(probability, name)().sum().item() for name in ("none", "corners", "faces")}
    assert kept == {"none": 5, "corners": 3, "faces": 2}
    three = torch.cat([probability, torch.zeros(1, 1, 4, 4)], 1)
    assert torch.equal(copy_paste.pseudo_labels(three, "faces")(), copy_paste.pseudo_labels(probability, "faces")())


def test_the_second_half_is_pasted_into_the_first():
    x, inside = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2), torch.eye(2).bool()
    expected = torch.tensor([[[3.0, 1.0], [1.0, 3.0]], [[4.0, 2.0], [2.0, 4.0]]])
    torch.testing.assert_close(paste(x, inside)[:, 0], expected)


def test_targets_are_the_others_labels_outside_and_own_inside(monkeypatch):
    """Pseudo-labels are 2 and 3 (first network), 5 and 7 (second) of the two unlabeled images."""
    method, seen, inside = make(), [], torch.zeros(PATCH, dtype=torch.bool)
    inside[4:9, 6:20] = True
    said = iter([torch.tensor(pair).view(2, 1, 1).expand(2, *PATCH) for pair in ([2, 3], [5, 7])])
    monkeypatch.setattr(copy_paste, "box", lambda *args: inside)

    def pseudo_labels(probability, component):
        label = next(said)
        return lambda: label

    monkeypatch.setattr(copy_paste, "pseudo_labels", pseudo_labels)
    real = cml.segmentation

    def segmentation(logits, label, **kind):
        seen.append(label)
        return real(logits, label.clamp(max=1), **kind)

    monkeypatch.setattr(cml, "segmentation", segmentation)
    images, step = [], batch()
    for net in (method.first, method.second):
        net.register_forward_pre_hook(lambda module, given: images.append(given[0]))
    terms = method(step, Clock(torch.tensor(0), 1, "train")).terms
    first, second = seen[2:]
    assert torch.equal(first[0], torch.where(inside, 3, 5)) and torch.equal(second[0], torch.where(inside, 7, 2))
    (one, two), (a, b) = step.labeled.label, step.labeled.image
    assert torch.equal(seen[0][0], torch.where(inside, two, one)) and seen[0] is seen[1]
    unlabeled, labeled, free = images[:2], images[2:4], images[4:]
    assert all(torch.equal(x, step.unlabeled.image) for x in unlabeled)
    assert all(torch.equal(x[0], torch.where(inside, b, a)) for x in labeled)
    assert all(torch.equal(x[0], torch.where(inside, *step.unlabeled.image.flip(0))) for x in free)
    assert terms.keys() == {"supervised", "pseudo", "discrepancy"}


def test_pseudo_labels_are_made_in_training_mode_without_gradients():
    method = make()
    norm = next(m for m in method.first.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = norm.num_batches_tracked.item()
    found = method.pseudo_labels(method.first, batch().unlabeled.image)()
    assert norm.num_batches_tracked.item() == before + 1 and found.dtype == torch.uint8 and not found.requires_grad


@pytest.mark.parametrize(("stage", "unlabeled"), [("pretrain", 2), ("train", 0)])
def test_labels_alone(stage, unlabeled):
    terms = make()(batch(2, unlabeled), Clock(torch.tensor(0), 1, stage)).terms
    assert terms.keys() == {"supervised", "discrepancy"}


def test_weights():
    values = []
    for factor in (1.0, 3.0):
        method = make(supervised=factor, weight=factor, discrepancy=factor)
        torch.manual_seed(1)
        values.append(method(batch(), Clock(torch.tensor(0), 1, "train")).terms)
    for name, value in values[0].items():
        assert values[1][name].item() == pytest.approx(3 * value.item(), rel=1e-5)


def test_the_networks_share_nothing_and_upsample_differently():
    method = make()
    assert not {p.data_ptr() for p in method.first.parameters()} & {p.data_ptr() for p in method.second.parameters()}
    assert isinstance(method.first.backbone.decoder.stages[0][0], torch.nn.ConvTranspose2d)
    assert method.second.backbone.decoder.stages[0][0].mode == "bilinear"
    assert method.remarks() == () and "weights alone" in make("nnunet").remarks()[0]


def test_the_mean_of_the_logits_predicts():
    image = torch.randn(2, 1, *PATCH)
    method = make().eval()
    logits = [net(image).logits for net in (method.first, method.second)]
    torch.testing.assert_close(method.predict(image), (sum(logits) / 2).softmax(1))
    torch.testing.assert_close(make(evaluate="second").eval().predict(image), logits[1].softmax(1))


@pytest.mark.parametrize("hp", [{"box": 1.0}, {"pretrain": 1.5}, {"discrepancy": -1.0}, {"supervised": -1.0}])
def test_nonsense_is_refused(hp):
    with pytest.raises(UserError) as error:
        Config(**hp)
    assert next(iter(hp)) in str(error.value) and "\n" not in str(error.value)
