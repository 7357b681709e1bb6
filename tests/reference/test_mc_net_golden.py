"""Steps of MC-Net on stored logits of all decoders against stored terms, sharpened probabilities and gradients.

And its inference by sliding windows.
"""

import numpy as np
import pytest
import torch
from reference.several_decoders import SeveralDecoders
from reference.test_sliding_window_golden import ATOL as WINDOW_ATOL
from reference.test_sliding_window_golden import RTOL as WINDOW_RTOL
from reference.test_sliding_window_golden import windows
from torch.nn import functional as F

from ssl4mis.inference import sliding_window, window_starts
from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.mc_net import DICE, Config, MCNet

RTOL, ATOL = 1e-5, 2e-6
EVERY, TOTAL = 150, 15000  # the files count the ramp in blocks of 150 steps; the run's length drops out
FILES = {  # the Dice, and what it is multiplied by to be the file's, which lacks a factor 2: d = 1/2 + ours/2
    "mcnet_3d": ("linear", 1.0),
    "mcnet_2d": ("squared", 0.5),
}
WINDOWS = {  # logits of each decoder, as multiples of the stored network's
    "sliding_window_mcnet_first": (1.0,),
    "sliding_window_mcnet_average": (1.0, 0.5),  # not in the file, whose score is 0.75 times the network's
}


@pytest.fixture(params=FILES)
def stored(request, golden, stored_step):
    """The file, the method, the logits of its decoders, batch, clock and the share of our Dice in theirs."""
    data, (kind, share) = golden(request.param), FILES[request.param]
    decoders = sum(name.startswith("student_logits_") for name in data)
    first, batch, clock = stored_step(data, TOTAL, "student_logits_1")
    logits = [first, *(torch.tensor(data[f"student_logits_{k}"], requires_grad=True) for k in range(2, decoders + 1))]
    hp = Config(decoders, share * float(data["lamda"]), kind, float(data["consistency"]),
                float(data["consistency_rampup"]) * EVERY / TOTAL, EVERY, float(data["sharpen_temperature"]))
    method = MCNet(lambda: SeveralDecoders(logits), Task(first.shape[1], first.ndim - 2), hp)
    return data, method, logits, batch, clock._replace(step=clock.step + 1), share  # the script is a step ahead


def test_step(stored, same_gradient):
    data, method, logits, batch, clock, share = stored
    terms, watch = method(batch, clock)
    sum(terms.values()).backward()

    assert list(method.net.seen) == list(range(1, len(logits)))
    assert all(skips is method.net.skips for skips in method.net.seen.values())
    n, label, hp = len(batch.labeled.image), batch.labeled.label, method.hp
    constant = (1 - share) * len(logits)  # what the missing factor adds to their Dice
    overlap = share * sum(dice(x[:n].softmax(1), label, **DICE[hp.dice]) for x in logits) + constant
    actual = {"loss_ce": sum(cross_entropy(x[:n], label) for x in logits), "loss_dice": overlap,
              "loss_consistency": terms["consistency"] / watch["weight"],
              "loss_total": sum(terms.values()) + float(data["lamda"]) * constant}
    assert actual.keys() == {name for name in data if name.startswith("loss_")}
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(terms["supervised"].item() + float(data["lamda"]) * constant,
                               data["lamda"] * data["loss_dice"], RTOL)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    for index, x in enumerate(logits, 1):
        same_gradient(x.grad, data[f"grad_student_logits_{index}"], f"decoder {index}")


def test_sharpened_probabilities(stored):
    data, method, logits, *_ = stored
    np.testing.assert_allclose(method.sharpened(logits[0].softmax(1)).detach(), data["sharpened_1"], RTOL, ATOL)


def test_every_array_is_compared(stored, every_array_is_in_one):
    """`test_step` has all losses, by name."""
    compared = ("loss_*", "grad_student_logits_?", "consistency_weight", "sharpened_1")
    inputs = ("student_logits_?", "labels", "labeled_bs", "iter_num", "lamda", "consistency", "consistency_rampup",
              "sharpen_temperature")
    every_array_is_in_one(stored[0], compared, inputs)


@pytest.mark.parametrize("name", WINDOWS)
def test_sliding_windows(golden, name):
    """The first decoder's probability of the foreground, or (authors) its mean logit, is cut at 0.5."""
    data = golden(name)
    patch, stride = windows(data)
    padded = [max(sides) for sides in zip(data["image"].shape, patch, strict=True)]
    np.testing.assert_array_equal(window_starts(padded, patch, stride), data["window_starts"])

    weight, bias, position = (torch.tensor(data[f"net_{part}"]) for part in ("weight", "bias", "position"))

    def predict(x):
        """A 3x3x3 convolution plus a linear function of the voxel's place in the patch."""
        place = torch.stack(torch.meshgrid(*(torch.arange(size) / (size - 1) - 0.5 for size in x.shape[2:]),
                                           indexing="ij"))
        logits = F.conv3d(x, weight, bias, padding=1) + torch.einsum("ka,axyz->kxyz", position, place)
        decoders = [times * logits for times in WINDOWS[name]]
        return logits.softmax(1) if len(decoders) == 1 else sum(decoders) / len(decoders)

    score = sliding_window(predict, torch.tensor(data["image"])[None], patch, stride, 4)
    assert len(score) == data["num_classes"]
    np.testing.assert_allclose(score[1].expand(data["score_map"].shape), data["score_map"], WINDOW_RTOL, WINDOW_ATOL)
    np.testing.assert_array_equal(score[1] > 0.5, data["label_map"])
