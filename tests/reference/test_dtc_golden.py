"""DTC on stored heads against stored distance maps, masks, terms and gradients."""

import numpy as np
import pytest
import torch

from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.distance import class_distances, distance, signed_distance
from ssl4mis.losses import cross_entropy
from ssl4mis.method import Task
from ssl4mis.methods.dtc import DTC, Config

RTOL = 1e-5
EVERY = 150  # the file counts the ramp in blocks of 150 steps
TOTAL = 6000  # steps of the run; the file gives the ramp in steps


@pytest.fixture
def stored(golden, replay, stored_step):
    """The file, the method with its hyper-parameters, logits and tanh that take a gradient, batch and clock.

    The authors' one channel z is the softmax of (0, z), and their tanh a head's map that float64 gives back exactly.
    """
    data = golden("dtc")
    logits, batch, clock = stored_step(data, TOTAL)
    tanh = torch.tensor(data["student_tanh"], dtype=torch.float64, requires_grad=True)
    hp = Config(sdf=float(data["beta"]), weight=float(data["consistency"]), ramp_every=EVERY,
                ramp=float(data["consistency_rampup"]) * EVERY / TOTAL, compat="legacy")
    method = DTC(replay, Task(2, logits.ndim - 2), hp)
    method.net.waiting = [{"seg": torch.cat([torch.zeros_like(logits), logits], 1), "sdf": tanh.atanh()}]
    return data, method, logits, tanh, batch, clock


def test_signed_distance(golden):
    data = golden("dtc_sdf")
    mask = torch.tensor(data["labels"]) == 1
    np.testing.assert_allclose(signed_distance(mask, "legacy"), data["sdf"], 0, 1e-6)
    np.testing.assert_array_equal(distance(mask) == 1, data["inner_boundary"])


def test_a_mask_without_background(golden):
    """The one result not to be met: the authors divide 0 by 0, which would end a run."""
    data = golden("dtc_sdf")
    assert np.isnan(data["sdf_full"]).all()
    mask = torch.tensor(data["labels_full"]) == 1
    assert (signed_distance(mask, "legacy") == 0).all() and (signed_distance(mask, "right") == -1).all()


def test_maps(stored):
    data, method, _, tanh, batch, _ = stored
    true = class_distances(batch.labeled.label, method.task.classes, method.hp.compat)
    np.testing.assert_allclose(true[:, 0], data["sdf_ground_truth"], RTOL, 1e-6)
    np.testing.assert_allclose(method.soft_mask(tanh).detach(), data["sdf_to_mask"], RTOL, 2e-6)


def test_step(stored, same_gradient):
    data, method, logits, tanh, batch, clock = stored
    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    assert not method.net.waiting and torch.equal(method.net.seen[0], batch.image)
    n, z = len(batch.labeled.label), logits.detach()
    actual = {
        "loss_sdf": terms["sdf"] / method.hp.sdf, "loss_dice": terms["supervised"],
        "loss_ce": cross_entropy(torch.cat([torch.zeros_like(z), z], 1)[:n], batch.labeled.label),
        "loss_supervised": terms["supervised"] + terms["sdf"],
        "loss_consistency": terms["consistency"] / watch["weight"], "loss_total": total,
    }
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    same_gradient(logits.grad, data["grad_student_logits"])
    same_gradient(tanh.grad, data["grad_student_tanh"])


def test_what_each_term_teaches(stored):
    """The distance teaches its own head on labeled images only; consistency teaches both heads on all images."""
    _, method, logits, tanh, batch, clock = stored
    terms, _ = method(batch, clock)
    n = len(batch.labeled.image)
    moved = {}
    for name, value in terms.items():
        grads = torch.autograd.grad(value, (logits, tanh), retain_graph=True, allow_unused=True)
        moved[name] = [[bool(g is not None and half.any()) for half in (g[:n], g[n:])] if g is not None else None
                       for g in grads]
    assert moved == {"supervised": [[True, False], None], "sdf": [None, [True, False]],
                     "consistency": [[True, True], [True, True]]}


def test_without_unlabeled_images_it_is_supervised(stored):
    data, method, _, _, batch, clock = stored
    n = len(batch.labeled.image)
    method.net.waiting = [{name: map[:n] for name, map in method.net.waiting[0].items()}]
    nothing = batch.unlabeled._replace(image=batch.unlabeled.image[:0], cases=())
    terms, _ = method(batch._replace(image=batch.labeled.image, unlabeled=nothing), clock)
    assert set(terms) == {"supervised", "sdf"}
    np.testing.assert_allclose(sum(terms.values()).item(), data["loss_supervised"], RTOL)


@pytest.mark.parametrize("space", [(12, 16), (12, 16, 10)], ids=["2D", "3D"])
@pytest.mark.parametrize("classes", [2, 4])
def test_heads_that_know_the_truth(replay, classes, space):
    """Nothing is lost but the 0.5 of the soft mask on the boundaries; the stored heads are too small to need tanh."""
    label = torch.zeros(2, *space, dtype=torch.uint8)
    for index in range(1, classes):
        label[:, 3 * index - 2:3 * index + 1, index:-2] = index
    method = DTC(replay, Task(classes, len(space)), Config())
    true = torch.stack([signed_distance(label == index, "right") for index in range(1, classes)], 1)
    assert torch.equal(class_distances(label, method.task.classes, method.hp.compat), true)
    truth = torch.stack([label == index for index in range(classes)], 1)
    method.net.waiting = [{"seg": (100 * truth.float()).repeat(2, *[1] * (truth.ndim - 1)),
                           "sdf": true.clamp(-1 + 1e-7, 1 - 1e-7).atanh().repeat(2, *[1] * (true.ndim - 1))}]
    image = torch.zeros(4, 1, *space)
    batch = Batch(image, Half(image[:2], label, ("a", "b")), Half(image[2:], None, ("c", "d")))
    terms, watch = method(batch, Clock(torch.tensor(TOTAL), TOTAL))
    assert terms["supervised"] < 1e-6 and terms["sdf"] < 1e-6 and watch["weight"] == 1
    assert (true == 0).any()
    torch.testing.assert_close(terms["consistency"], 0.25 * (true == 0).float().mean(), check_dtype=False)


def test_every_array_is_compared(golden, every_array_is_in_one):
    """The names in this file are those of the reference files."""
    inputs = ("student_*", "labels", "labels_full", "labeled_bs", "iter_num", "beta", "consistency",
              "consistency_rampup")
    compared = ("sdf", "inner_boundary", "sdf_full", "sdf_ground_truth", "sdf_to_mask", "loss_*", "consistency_weight",
                "grad_student_*")
    for name in ("dtc", "dtc_sdf"):
        every_array_is_in_one(golden(name), inputs, compared)


@pytest.mark.parametrize(("compat", "empty", "full"), [("right", 1, -1), ("legacy", 0, 0)])
def test_patches_on_one_side_only(replay, compat, empty, full):
    """What the default mends: without foreground the distance is 1, without background -1."""
    method = DTC(replay, Task(2, 2), Config(compat=compat))
    label = torch.stack([torch.zeros(4, 5, dtype=torch.uint8), torch.ones(4, 5, dtype=torch.uint8)])
    distance = class_distances(label, method.task.classes, method.hp.compat)
    assert (distance[0] == empty).all() and (distance[1] == full).all()
