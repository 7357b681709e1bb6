"""One step of ICT on stored images, factors and logits against stored mixtures, terms and gradients."""

import numpy as np
import pytest
import torch

from ssl4mis.batch import Batch, Half
from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.ict import ICT, Config

RTOL, ATOL = 1e-5, 2e-6
EVERY, TOTAL = 150, 30000  # the file counts the ramp in blocks of 150 steps; the run's length drops out


class Stored(ICT):
    """Draws the file's factors and keeps its target."""

    def factors(self, image):
        assert self.drawn.shape == (len(image), *[1] * (image.ndim - 1))
        return self.drawn

    def target(self, pairs, factor):
        self.kept = super().target(pairs, factor)
        return self.kept


@pytest.fixture
def data(golden):
    return golden("ict")


def for_each_factor(pair, count):
    """Stored tensors of one pair, or of as many as there are factors, as (first images, second images)."""
    first, second = torch.tensor(pair).chunk(2)
    times = count // len(first)  # the script mixes its one pair by each factor
    return [half.repeat(times, *[1] * (half.ndim - 1)) for half in (first, second)]


@pytest.mark.parametrize("passes", ["halves", "together"])
def test_step(data, replay, stored_step, same_gradient, passes):
    student, stored, clock = stored_step(data, TOTAL)
    n, factors = len(stored.labeled.image), torch.tensor(data["mix_factors"], dtype=torch.float32)
    labeled = stored.labeled._replace(image=torch.tensor(data["images"][:n]))
    unlabeled = torch.cat(for_each_factor(data["images"][n:], len(factors)))
    batch = Batch(torch.cat([labeled.image, unlabeled]), labeled, Half(unlabeled, None, ("u",) * len(unlabeled)))
    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY, passes=passes)
    method = Stored(replay, Task(student.shape[1], student.ndim - 2), hp)
    answers = for_each_factor(data["teacher_logits"], len(factors))
    method.drawn, method.student.waiting = factors, [student]
    method.teacher.net.waiting = answers if passes == "halves" else [torch.cat(answers)]

    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    assert not method.student.waiting and not method.teacher.net.waiting
    assert torch.equal(torch.cat(method.teacher.net.seen), unlabeled)
    (seen,) = method.student.seen
    assert torch.equal(seen[:n], labeled.image)
    np.testing.assert_allclose(seen[n:], data["mixed_input"], RTOL, ATOL)
    np.testing.assert_allclose(method.kept, data["teacher_prob_mixed"], RTOL, ATOL)
    label = labeled.label
    actual = {
        "loss_ce": cross_entropy(student[:n], label), "loss_dice": dice(student[:n].softmax(1), label),
        "loss_supervised": terms["supervised"], "loss_consistency": terms["consistency"] / watch["weight"],
        "loss_total": total,
    }
    assert actual.keys() == {name for name in data if name.startswith("loss_")}
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    same_gradient(student.grad, data["grad_student_logits"])


def test_every_array_is_compared(data, every_array_is_in_one):
    """`test_step` has all losses, by name."""
    inputs = ("images", "mix_factors", "student_logits", "teacher_logits", "labels", "labeled_bs", "iter_num",
              "consistency", "consistency_rampup")
    step = ("loss_*", "mixed_input", "teacher_prob_mixed", "consistency_weight", "grad_student_logits")
    every_array_is_in_one(data, step, inputs)
