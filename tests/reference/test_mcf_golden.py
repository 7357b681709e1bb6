"""One step of MCF on stored logits of both networks against stored mask, targets, terms and gradients."""

import numpy as np
import pytest

from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.mcf import MCF, Config, difference, sharpened

RTOL, ATOL = 1e-5, 2e-6
EVERY, TOTAL = 150, 6000  # the files count the ramp in blocks of 150 steps; the run's length drops out
ROLES = {"first": "vnet", "second": "resnet"}


@pytest.fixture(params=["mcf_vnet_better", "mcf_resnet_better"])
def stored(request, golden, replay, stored_step):
    """The file, the method with its hyper-parameters, both networks' logits, batch and clock."""
    data = golden(request.param)
    first, batch, clock = stored_step(data, TOTAL, "student_logits_vnet")
    second, _, _ = stored_step(data, TOTAL, "student_logits_resnet")
    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY, temperature=float(data["sharpen_temperature"]))
    method = MCF(replay, Task(first.shape[1], first.ndim - 2), hp)
    method.first.waiting, method.second.waiting = [first], [second]
    return data, method, {"first": first, "second": second}, batch, clock


def test_difference_and_targets(stored):
    data, method, logits, batch, _ = stored
    n = len(batch.labeled.image)
    np.testing.assert_array_equal(difference(logits["first"][:n], logits["second"][:n]), data["difference_mask"])
    winner = list(logits.values())[int(data["better_network"])].detach()
    targets = sharpened(winner[n:], method.hp.temperature)
    np.testing.assert_allclose(targets, data["pseudo_labels_soft"], RTOL, ATOL)


def test_step(stored, same_gradient):
    data, method, logits, batch, clock = stored
    terms, watch = method(batch, clock)
    sum(terms.values()).backward()

    assert not method.first.waiting and not method.second.waiting
    n, label = len(batch.labeled.label), batch.labeled.label
    loser = "second" if watch["first_wins"] else "first"
    actual = {"loss_consistency": terms["consistency"] / watch["weight"]}
    for role, name in ROLES.items():
        supervised = terms[f"supervised/{role}"]
        actual |= {
            f"loss_ce_{name}": cross_entropy(logits[role][:n], label),
            f"loss_dice_{name}": dice(logits[role][:n].softmax(1), label, "foreground"),
            f"loss_rectification_{name}": watch[f"rectification/{role}"], f"loss_supervised_{name}": supervised,
            f"loss_total_{name}": supervised + (terms["consistency"] if role == loser else 0),
        }
        same_gradient(logits[role].grad, data[f"grad_student_logits_{name}"], name)
    assert actual.keys() == {name for name in data if name.startswith("loss_")}
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    np.testing.assert_allclose(watch["differing"], data["difference_mask"].mean(), RTOL)
    assert list(ROLES).index(loser) == 1 - data["better_network"]


def test_every_array_is_compared(stored, every_array_is_in_one):
    """`test_step` has all losses, by name."""
    step = ("loss_*", "grad_student_logits_vnet", "grad_student_logits_resnet", "consistency_weight", "better_network")
    inputs = ("student_logits_*", "labels", "labeled_bs", "iter_num", "consistency", "consistency_rampup",
              "sharpen_temperature")
    every_array_is_in_one(stored[0], step, ("difference_mask", "pseudo_labels_soft"), inputs)
