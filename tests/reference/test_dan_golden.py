"""Both turns of a step of DAN on stored logits of segmenter and critic against stored terms and gradients."""

import numpy as np
import pytest
import torch
from reference.critics import Critic

from ssl4mis.losses import cross_entropy, dice
from ssl4mis.method import Task
from ssl4mis.methods.dan import DAN, Config

RTOL = 1e-5
EVERY, TOTAL = 150, 30000  # the file counts the ramp in blocks of 150 steps; the run's length drops out


@pytest.fixture
def stored(golden, replay, stored_step):
    """The file, the method with its hyper-parameters, the segmenter's and both of the critic's logits, batch, clock."""
    data = golden("dan")
    logits, batch, clock = stored_step(data, TOTAL)
    judged = [torch.tensor(data[f"discriminator_logits_{which}"], requires_grad=True) for which in ("unlabeled", "all")]
    hp = Config(weight=float(data["consistency"]), ramp=float(data["consistency_rampup"]) * EVERY / TOTAL,
                ramp_every=EVERY)
    method = DAN(replay, Task(logits.shape[1], logits.ndim - 2), hp)
    method.net.waiting, method.critic = [logits, logits.detach()], Critic(*judged)
    return data, method, logits, judged, batch, clock


def test_segmenter(stored, same_gradient):
    data, method, logits, (judged, _), batch, clock = stored
    terms, watch = method(batch, clock)
    total = sum(terms.values())
    total.backward()

    n, label = len(batch.labeled.label), batch.labeled.label
    actual = {
        "loss_ce": cross_entropy(logits[:n], label), "loss_dice": dice(logits[:n].softmax(1), label),
        "loss_supervised": terms["supervised"], "loss_consistency": terms["adversarial"] / watch["weight"],
        "loss_total": total,
    }
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(watch["weight"], data["consistency_weight"], 1e-9, 0)
    same_gradient(logits.grad, data["grad_student_logits"])
    same_gradient(judged.grad, data["grad_discriminator_logits_unlabeled"])
    assert watch["fooled"] == pytest.approx(float(judged.detach().argmax(1).float().mean()))


def test_critic(stored, same_gradient):
    data, method, logits, (_, judged), batch, clock = stored
    method(batch, clock)
    terms, watch = method(batch, clock._replace(phase="criticize"))
    sum(terms.values()).backward()

    np.testing.assert_allclose(terms["critic"].item(), data["loss_discriminator"], RTOL)
    same_gradient(judged.grad, data["grad_discriminator_logits_all"])
    says, n = judged.detach().argmax(1).tolist(), len(batch.labeled.label)
    right = [answer == (place < n) for place, answer in enumerate(says)]
    assert watch["accuracy"] == pytest.approx(sum(right) / len(right))


def test_what_the_critic_sees(stored):
    """First the unlabeled images without its dropout, then all with it."""
    _, method, logits, _, batch, clock = stored
    for phase in ("segment", "criticize"):
        method(batch, clock._replace(phase=phase))
    assert not method.net.waiting and not method.critic.waiting
    (first, image, training), (again, images, later) = method.critic.seen
    n, probability = len(batch.labeled.image), logits.detach().softmax(1)
    assert torch.equal(first, probability[n:]) and torch.equal(image, batch.unlabeled.image) and not training
    assert torch.equal(again, probability) and torch.equal(images, batch.image) and later
    assert first.requires_grad


def test_every_array_is_compared(golden, every_array_is_in_one):
    inputs = ("student_logits", "labels", "discriminator_logits_*", "labeled_bs", "iter_num", "consistency",
              "consistency_rampup")
    every_array_is_in_one(golden("dan"), inputs, ("loss_*", "consistency_weight", "grad_*"))
