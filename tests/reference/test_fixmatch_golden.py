"""One step of FixMatch on stored logits against masks, pseudo labels, terms and gradients of SSL4MIS's two scripts."""

import numpy as np
import pytest
import torch

from ssl4mis.batch import Half
from ssl4mis.losses import cross_entropy
from ssl4mis.matching import Target
from ssl4mis.method import Task
from ssl4mis.methods.fixmatch import Config, FixMatch, certainty, lead

RTOL = 1e-5
EVERY, TOTAL = 150, 30000  # the files count the ramp in blocks of 150 steps; the run's length drops out
AUTHORS = {  # the scripts add cross-entropy and Dice up, where the suite takes their mean
    "fixmatch_standard": {"pseudo": "shared", "confidence": "range", "unsure": "background", "complementary": 0.5},
    "fixmatch_cta": {"pseudo": "teacher", "tau": 0.0},
}


class Step:
    """A step on the logits of a file: what went into it and what came out."""

    def __init__(self, name, golden, replay, stored_step):
        self.data = data = golden(name)
        self.weak, batch, clock = stored_step(data, TOTAL, "student_logits_weak")
        self.strong = torch.tensor(data["student_logits_strong"], requires_grad=True)
        self.n, self.label, classes = len(batch.labeled.image), batch.labeled.label, self.weak.shape[1]
        hp = AUTHORS[name] | ({"tau": float(data["confidence_threshold"])} if "confidence_threshold" in data else {})
        ramp = float(data["consistency_rampup"]) * EVERY / TOTAL
        self.method = FixMatch(replay, Task(classes, self.weak.ndim - 2), Config(
            supervised=2.0, weight=2 * float(data["consistency"]), ramp=ramp, ramp_every=EVERY, cutmix=0.0, **hp))

        unlabeled = batch.unlabeled.image
        half = Half(unlabeled, None, batch.unlabeled.cases, (unlabeled,), torch.ones(unlabeled[:, 0].shape).bool())
        nothing = torch.zeros_like(self.weak[self.n:])  # said of the partners, of which no box is taken
        student = self.method.student
        if name == "fixmatch_cta":
            self.method.teacher.net.waiting = [torch.cat([torch.tensor(data["teacher_logits"])[self.n:], nothing])]
            student.waiting = [self.weak, self.strong[self.n:]]
        else:
            student.waiting = [self.weak, nothing, self.strong]
        self.seen, labels = [], self.method.pseudo_labels
        self.method.pseudo_labels = lambda target: self.seen.append((target, *labels(target))) or self.seen[-1][1:]
        self.terms, self.watch = self.method(batch._replace(unlabeled=half, partner=half), clock)
        assert not student.waiting


@pytest.fixture(params=AUTHORS)
def step(request, golden, replay, stored_step):
    return Step(request.param, golden, replay, stored_step)


@pytest.fixture
def standard(golden, replay, stored_step):
    return Step("fixmatch_standard", golden, replay, stored_step)


@pytest.fixture
def cta(golden, replay, stored_step):
    return Step("fixmatch_cta", golden, replay, stored_step)


def compare(step, actual, same_gradient):
    sum(step.terms.values()).backward()
    for name, value in actual.items():
        np.testing.assert_allclose(value.item(), step.data[name], RTOL, 0, err_msg=name)
    np.testing.assert_allclose(step.watch["weight"] / 2, step.data["consistency_weight"], 1e-9, 0)
    for name in ("weak", "strong"):
        same_gradient(getattr(step, name).grad, step.data[f"grad_student_logits_{name}"], name)


def test_standard(standard, same_gradient):
    terms, weight = standard.terms, standard.watch["weight"] / 2
    assert set(terms) == {"supervised", "pseudo", "complementary"}
    scale = certainty(standard.strong)
    compare(standard, {
        "loss_supervised": terms["supervised"], "adaptive_weight": scale,
        "loss_complementary": scale * cross_entropy(1 - standard.strong.softmax(1), standard.weak.argmin(1)),
        "loss_unsupervised": (terms["pseudo"] + terms["complementary"]) / weight,
        "loss_total": sum(terms.values()),
    }, same_gradient)


def test_cta(cta, same_gradient):
    terms, weight = cta.terms, cta.watch["weight"] / 2
    assert set(terms) == {"supervised", "pseudo"} and not cta.method.teacher.net.waiting
    compare(cta, {"loss_supervised": terms["supervised"], "loss_unsupervised": terms["pseudo"] / weight,
                  "loss_total": sum(terms.values())}, same_gradient)


def test_pseudo_labels_of_standard(standard):
    """Of the probabilities of all samples, and of the unlabeled ones as the step took them."""
    ahead = lead(standard.weak.detach().softmax(1))
    np.testing.assert_array_equal(ahead >= standard.method.hp.tau, standard.data["pseudo_mask"])
    (_, label, mask, sure), = standard.seen
    np.testing.assert_array_equal(label, standard.data["pseudo_labels"])
    np.testing.assert_array_equal(sure, standard.data["pseudo_mask"][standard.n:].any(1))
    assert mask.all() and not sure.all()


def test_pseudo_labels_of_cta(cta):
    (target, label, mask, _), = cta.seen
    everywhere = Target.of(torch.tensor(cta.data["teacher_logits"]).softmax(1), None)
    np.testing.assert_array_equal(everywhere.label, cta.data["pseudo_labels"])
    np.testing.assert_array_equal(label, cta.data["pseudo_labels"][cta.n:])
    assert mask.all() and torch.equal(target.label, label)


def test_every_array_is_compared(step, every_array_is_in_one):
    """The labeled half of CTA's strong logits and of its teacher's is in no loss, as its zero gradient tells."""
    compared = ("loss_*", "grad_student_logits_*", "consistency_weight", "adaptive_weight", "pseudo_mask",
                "pseudo_labels")
    inputs = ("student_logits_*", "teacher_logits", "labels", "labeled_bs", "iter_num", "consistency",
              "consistency_rampup", "confidence_threshold")
    every_array_is_in_one(step.data, compared, inputs)
