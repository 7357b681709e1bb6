"""One step of CCT on stored logits of four decoders against stored terms and gradients."""

import numpy as np
import pytest
import torch
from reference.several_decoders import SeveralDecoders

from ssl4mis.method import Task
from ssl4mis.methods.cct import CCT, Config

RTOL = 1e-5
EVERY, TOTAL = 150, 30000  # the file counts the ramp in blocks of 150 steps; the run's length drops out
AUXILIARY = ("noise", "dropout", "peaks")


@pytest.fixture
def stored(golden, stored_step):
    """The file, the method with the released target, the logits of its decoders, batch and clock."""
    data = golden("cct")
    main, batch, clock = stored_step(data, TOTAL, "student_logits_0")
    logits = [main, *(torch.tensor(data[f"student_logits_{k}"], requires_grad=True) for k in (1, 2, 3))]
    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY, detach=False)
    return data, CCT(lambda: SeveralDecoders(logits), Task(main.shape[1], main.ndim - 2), hp), logits, batch, clock


def test_step(stored, same_gradient):
    data, method, logits, batch, clock = stored
    terms, watch = method(batch, clock)
    sum(terms.values()).backward()

    assert list(method.net.seen) == [1, 2, 3]
    each = [terms[f"consistency/{name}"] / watch["weight"] for name in AUXILIARY]
    actual = {"loss_supervised": terms["supervised"], "loss_total": sum(terms.values()), "loss_consistency": sum(each)}
    actual |= {f"loss_consistency_{index}": len(each) * loss for index, loss in enumerate(each, 1)}
    assert actual.keys() == {name for name in data if name.startswith("loss_")}
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    for index, x in enumerate(logits):
        same_gradient(x.grad, data[f"grad_student_logits_{index}"], f"decoder {index}")


def test_every_array_is_compared(stored, every_array_is_in_one):
    """`test_step` has all losses, by name."""
    inputs = ("student_logits_?", "labels", "labeled_bs", "iter_num", "consistency", "consistency_rampup")
    every_array_is_in_one(stored[0], ("loss_*", "grad_student_logits_?", "consistency_weight"), inputs)
