"""CorrMatch on stored features and logits against stored propagation, shapes, thresholds, pseudo-labels and losses.

The files hold numbers of the authors' 2D code, so the method runs with the values that restore its behavior.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from networks.base import Features, Output
from ssl4mis import augment, correlation
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.method import Task
from ssl4mis.methods.corrmatch import Config, CorrMatch, Target, View, masked

RTOL, ATOL = 1e-5, 2e-6
AUTHORS = {"tau_max": 1.0, "tau_reg_max": 1.0, "tau_mask": "mixed", "kl_target_cutmix": False, "sampling": "shared",
           "shape_mode": "soft_full", "corr_down": "interp", "warm_up": 0.0, "dice": False, "u_dice": False,
           "corr_memory": 2**40}


def backbone(dims, channels):
    """What the correlation head asks of a backbone: here one level, at the resolution of the image."""
    return SimpleNamespace(spatial_dims=dims, encoder_channels=(channels,), encoder_strides=((1,) * dims,))


class Replayed(CorrMatch):
    """CorrMatch with stored maps in place of the head's, which tells what its losses were computed from."""

    def view(self, image):
        return View(self.net(image).logits, self.spread.pop(0), torch.zeros(len(image), 1, 1), [image])

    def unsupervised(self, *seen):
        self.seen, self.losses = seen, super().unsupervised(*seen)
        return self.losses


@pytest.fixture
def stored_method(replay):
    """stored_method(classes, space, hp) -> `Replayed` with the authors' values and networks that replay."""

    def make(classes, space, **hp):
        class Network(replay):
            def decode(self, skips):
                logits = self.decoded.pop(0)
                assert len(logits) == len(skips[0])
                return Output({"seg": logits}, Features(skips, []))

        Network.spec, Network.backbone = SimpleNamespace(patch=space), backbone(len(space), 1)
        return Replayed(Network, Task(classes, len(space)), Config(**AUTHORS | hp))

    return make


def test_correlation(golden, same_gradient):
    data = golden("corrmatch_correlation")
    features, logits, grad = (torch.tensor(data[name]) for name in ("features", "logits", "grad_output"))
    grid, space, channels = features.shape[2:], logits.shape[2:], features.shape[1]
    head = correlation.CorrelationHead(backbone(len(grid), channels), 1, channels, len(data["conv1_weight"]), 0.0)
    for conv, name in ((head.one, "conv1"), (head.other, "conv2")):
        conv.weight.data, conv.bias.data = (torch.tensor(data[f"{name}_{part}"]) for part in ("weight", "bias"))

    matrix = head.compare(features.requires_grad_())
    spread = correlation.propagate(logits, matrix, grid, AUTHORS["corr_down"], Config().corr_apply)
    rows = torch.tensor(data["sample_index"]).expand(len(features), -1)
    maps = torch.cat(list(correlation.shapes(matrix.detach(), rows, grid, space, AUTHORS["shape_mode"])), 1)
    spread.backward(grad)

    np.testing.assert_allclose(spread.detach(), data["propagated_logits"], RTOL, ATOL)
    np.testing.assert_array_equal(maps, data["correlation_map"])
    same_gradient(features.grad, data["grad_features"])
    for name in ("conv1_weight", "conv2_weight", "conv1_bias"):
        conv, part = name.split("_")
        actual = getattr({"conv1": head.one, "conv2": head.other}[conv], part).grad
        peak = np.abs(data[f"grad_{name}"]).max()
        np.testing.assert_allclose(actual, data[f"grad_{name}"], 1e-4, 1e-5 * peak, err_msg=name)


def test_threshold(golden, stored_method):
    data = golden("corrmatch_threshold")
    logits, valid = torch.tensor(data["logits"]), torch.tensor(data["ignore_mask"] != 255)
    classes, space = logits.shape[2], logits.shape[3:]
    method = stored_method(classes, space, tau=float(data["threshold_init"]), tau_momentum=float(data["momentum"]))
    for step, (one, inside) in enumerate(zip(logits, valid, strict=True)):
        target = Target.of(one.softmax(1), inside)
        seen = correlation.class_confidence(target.confidence, target.label, inside, classes)
        tau = method.threshold(target, target, torch.tensor(True))
        np.testing.assert_allclose(seen, data["new_global"][step], 1e-6, 0, err_msg=f"step {step}")
        np.testing.assert_allclose(tau, data["threshold"][step], 1e-6, 0, err_msg=f"step {step}")


@pytest.fixture
def step(golden, stored_method, monkeypatch):
    """The file, the method after one step of it, its terms, and the stored logits by name, which took gradients."""
    data = golden("corrmatch_step")
    weak = np.concatenate([data["logits_labeled"], data["logits_unlabeled_weak"]])
    leaves = {"weak": weak} | {name: data[f"logits_{name}"] for name in (
        "feature_perturbed", "correlation_weak", "unlabeled_strong", "correlation_strong")}
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in leaves.items()}
    (n, classes), space = data["logits_labeled"].shape[:2], weak.shape[2:]

    method = stored_method(classes, space, tau=float(data["threshold_before"]), tau_momentum=float(data["momentum"]),
                           n_rows=data["correlation_map_weak"].shape[1])
    method.net.waiting = [torch.tensor(data["logits_unlabeled_weak_mix"]), leaves["weak"], leaves["unlabeled_strong"]]
    method.net.decoded = [leaves["feature_perturbed"][n:]]
    method.spread = [leaves["correlation_weak"], leaves["correlation_strong"]]
    shapes = torch.tensor(data["correlation_map_weak"][n:]).bool()
    monkeypatch.setattr(correlation, "shapes", lambda *_: iter(shapes.split(5, 1)))
    monkeypatch.setattr(augment, "boxes", lambda *_: torch.tensor(data["cutmix_box"]).bool())

    image = torch.zeros(len(weak), 1, *space)
    labeled = Half(image[:n], torch.tensor(data["labels"]).to(torch.uint8), ("l",) * n)
    halves = [Half(image[n:], None, ("u",) * (len(weak) - n), (image[n:],), torch.tensor(data[name] != 255))
              for name in ("ignore_mask", "ignore_mask_mix")]
    terms = method(Batch(image, labeled, *halves), Clock(torch.tensor(0), 1000)).terms
    sum(terms.values()).backward()
    assert not method.net.waiting and not method.net.decoded and not method.spread
    return data, method, terms, leaves


def test_pseudo_labels(step):
    data, method, _, _ = step
    _, _, _, mixed, label, mask, tau = method.seen
    np.testing.assert_allclose(method.tau, data["threshold_after"], 1e-6, 0)
    np.testing.assert_array_equal(mixed.label, data["pseudo_labels_cutmix_before"])
    np.testing.assert_allclose(mixed.confidence, data["confidence_cutmix"], RTOL, ATOL)
    np.testing.assert_array_equal(mixed.sure(tau), data["confident_mask"])
    np.testing.assert_array_equal(label, data["pseudo_labels_cutmix"])
    np.testing.assert_array_equal(mask, data["confident_mask_propagated"])
    assert (data["confident_mask_propagated"] != data["confident_mask"]).any(), "the file has no region to propagate"


def test_losses(step):
    data, method, terms, _ = step
    weak, strong, mine, mixed, label, mask, tau = method.seen
    n, losses = -len(label), method.losses
    actual = {
        "supervised": 4 * terms["supervised"], "supervised_corr": 4 * terms["supervised_corr"],
        "hard": losses["hard"], "soft_kl": losses["kl"], "feature_perturbed": losses["feature"],
        "corr_strong": masked(strong.spread, label, mask, mixed.valid),
        "corr_weak": masked(weak.spread[n:], mine.label, mine.sure(tau), mine.valid),
        "corr_unlabeled": losses["corr"], "total": sum(terms.values()),
    }
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[f"loss_{name}"], RTOL, 0, err_msg=name)


def test_gradients(step, same_gradient):
    data, _, _, leaves = step
    for name, leaf in leaves.items():
        same_gradient(leaf.grad, data[f"grad_logits_{name}"], name)
