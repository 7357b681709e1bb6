"""Ramps, decays and learning rates against stored values; weights and thresholds as the methods report them."""

import numpy as np
import pytest
import torch
from torch import nn

from networks.base import Output
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.method import Task
from ssl4mis.methods import mean_teacher, ua_mt
from ssl4mis.schedules import ema_decay, learning_rate, sigmoid_ramp

EVERY = 150  # steps between two changes of the weight in the authors' code
WEIGHTS = ("uamt", "ssl4mis", "urpc", "rdrop", "dtc", "sassnet", "mcf", "upc", "acmt")
COVERED = ("sigmoid_rampup", *(f"consistency_weight_{name}" for name in WEIGHTS), "threshold_uamt_max*",
           "ema_alpha_decay*", "lr_step2500_used", "lr_poly_used")
INPUTS = ("iterations", "consistency_and_rampup_*", "rampup_args", "max_iterations_max*", "lr_steps", "base_lr",
          "lr_max_iterations", "epochs")
NOT_COVERED = {
    "consistency_weight_bcp_acdc": "the script never uses this weight",
    "consistency_weight_mcnet": "deviation by design: every ramp begins with step 0, MC-Net's with 1",
    "linear_rampup": "no method of the suite has a linear ramp",
    "threshold_acmt_*": "compared by test_ac_mt_golden.py",
    "lr_step2500_mcf_used": "deviation by design: one rule for all runs, MCF decays one step later",
    "lr_poly_cps_used": "deviation by design: one rule for all runs, CPS and R-Drop are one step ahead",
    "dycon_beta": "compared by test_dycon_golden.py",
}


class Silent(nn.Module):
    """A network of two classes that answers zero."""

    def forward(self, image):
        return Output({"seg": torch.zeros(len(image), 2, *image.shape[2:])}, None)


def watched(module, total, iterations, key, **hp):
    """What a method reports under `key` at each iteration."""
    image, label = torch.zeros(2, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8)
    batch = Batch(image, Half(image[:1], label, ("l",)), Half(image[1:], None, ("u",)))
    kind = module.UAMT if module is ua_mt else module.MeanTeacher
    method = kind(Silent, Task(2, 2), module.Config(**hp))
    return [float(method(batch, Clock(torch.tensor(int(k)), total)).watch[key]) for k in iterations]


def test_sigmoid_ramp(golden):
    data = golden("schedules")
    actual = [float(sigmoid_ramp(*row)) for row in data["rampup_args"].tolist()]
    np.testing.assert_allclose(actual, data["sigmoid_rampup"], 1e-9, 0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_consistency_weight(golden, name):
    data = golden("schedules")
    weight, length = data[f"consistency_and_rampup_{name}"].tolist()
    actual = [weight * float(sigmoid_ramp(k // EVERY, length)) for k in data["iterations"].tolist()]
    np.testing.assert_allclose(actual, data[f"consistency_weight_{name}"], 1e-9, 0)


@pytest.mark.parametrize("module", [mean_teacher, ua_mt], ids=["mean_teacher", "ua_mt"])
@pytest.mark.parametrize("name", ["uamt", "ssl4mis"])
def test_consistency_weight_as_the_methods_use_it(golden, module, name):
    data, total = golden("schedules"), 6000
    weight, length = data[f"consistency_and_rampup_{name}"].tolist()
    hp = {"weight": weight, "ramp": length * EVERY / total, "ramp_every": EVERY}
    actual = watched(module, total, data["iterations"], "weight", **hp)
    np.testing.assert_allclose(actual, data[f"consistency_weight_{name}"], 1e-9, 0)


def test_threshold_of_ua_mt(golden):
    data = golden("schedules")
    names = [name for name in data if name.startswith("threshold_uamt_max")]
    assert names
    for name in names:
        total = int(data[name.replace("threshold_uamt", "max_iterations")])
        actual = watched(ua_mt, total, data["iterations"], "threshold", passes=2)
        np.testing.assert_allclose(actual, data[name], 1e-9, 0, err_msg=name)


def test_decay_of_the_moving_average(golden):
    data = golden("schedules")
    names = [name for name in data if name.startswith("ema_alpha_decay")]
    assert names
    for name in names:
        decay = float(name.removeprefix("ema_alpha_decay"))
        actual = [float(ema_decay(k, decay)) for k in data["iterations"].tolist()]
        np.testing.assert_allclose(actual, data[name], 1e-9, 0, err_msg=name)


def test_learning_rates(golden):
    data = golden("schedules")
    base, steps, total = float(data["base_lr"]), data["lr_steps"].tolist(), int(data["lr_max_iterations"])
    step = [learning_rate("step", base, k, 6000) for k in steps]
    poly = [learning_rate("poly", base, k, total) for k in steps]
    np.testing.assert_allclose(step, data["lr_step2500_used"], 1e-9, 0)
    np.testing.assert_allclose(poly, data["lr_poly_used"], 1e-9, 0)


def test_every_array_is_accounted_for(golden, every_array_is_in_one):
    every_array_is_in_one(golden("schedules"), COVERED, INPUTS, NOT_COVERED)
