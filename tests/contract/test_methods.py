"""The laws that every method obeys, in 2D and 3D, with 2 and 4 classes; a new method file is tested as it is.

`--method package.module:Class` puts a method from elsewhere to the same tests. A law is a function that raises
AssertionError, so that the mutants below can prove that it would.
"""

import contextlib
import dataclasses
import io
import os
import re
import signal
import typing
import zlib

import pytest
import torch

import networks
import networks.batchnorm
from ssl4mis import registry
from ssl4mis.batch import Clock, Losses
from ssl4mis.errors import UserError
from ssl4mis.losses import segmentation
from ssl4mis.method import Method, Teacher
from ssl4mis.methods.mean_teacher import MeanTeacher
from ssl4mis.trainer import TrainingStopped

LONG_AGO = 10**7  # a step at which a teacher's decay has long reached its final value
ON_THE_HOST = {"bcp": {"component": "none"}}  # what a method leaves to the CPU by design: largest components
BF16 = 0.05  # relative, of each term: eight bits of mantissa through some twenty layers
ROUNDING = 1e-4  # of the sum of terms: a squared difference of nearly equal predictions magnifies what they lost


WORLDS = ((2, 2), (2, 4), (3, 2), (3, 4))  # dimensions, classes


@pytest.fixture(params=WORLDS, ids=lambda p: f"{p[0]}D-{p[1]}classes")
def world(request, setting):
    return lambda cls: setting(cls, *request.param)


@pytest.fixture
def case(method_name, world):
    return world(registry.method_class(method_name))


# --- laws ------------------------------------------------------------------------------------------------------------


def terms_are_finite(s, batch=None):
    for clock, losses in s.losses(batch):
        assert losses.terms, f"no terms in {clock.stage}/{clock.phase}"
        for name, value in losses.terms.items():
            assert value.ndim == 0 and value.isfinite(), f"{name} = {value}"
            assert value.requires_grad, f"{name} has no gradient"
        for name, value in losses.watch.items():
            assert torch.as_tensor(value).ndim == 0 and not torch.as_tensor(value).requires_grad, f"watch {name}"


def each_term_moves_a_parameter(s):
    """With fresh weights, or with confident networks, which terms behind a threshold wait for, or others in doubt."""
    moved = {}
    for seed, confident in ((0, False), (0, True), (1, False)):
        if moved and all(moved.values()):
            break
        method = s.method(seed, confident)
        for clock, losses in s.losses(method=method):
            parameters = method.trainable(clock.phase)
            for name, value in losses.terms.items():
                assert value.isfinite() and value.requires_grad, f"{name} = {value} has no gradient"
                grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                assert all(g is None or g.isfinite().all() for g in grads), f"{name} has a gradient that is not finite"
                place = (clock.stage, clock.phase, name)
                moved[place] = moved.get(place, False) or any(g is not None and g.abs().max() > 0 for g in grads)
    assert all(moved.values()), f"{[place for place, moves in moved.items() if not moves]}: moves no parameter"


def without_unlabeled_it_is_supervised(s, folder):
    """Some of the usual terms, all of them finite and moving, and a run to the end."""
    usual, alone = s, dataclasses.replace(s, unlabeled=False)
    assert len(alone.batch().unlabeled.image) == 0
    known = [set(losses.terms) for _, losses in usual.losses()]
    terms_are_finite(alone)
    each_term_moves_a_parameter(alone)
    for (_, losses), terms in zip(alone.losses(), known, strict=True):
        assert set(losses.terms) <= terms
    alone.trainer(folder, iterations=2).fit()


def predictions_are_probabilities(s):
    method = s.method()
    list(s.losses(method=method))  # batch-norm statistics that are not the initial ones
    method.eval()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    image = torch.cat([s.loader().batch(0, step).labeled.image for step in (0, 1)])[:3]
    with torch.inference_mode():
        together, alone = method.predict(image), method.predict(image[1:2])
    assert together.shape == (3, s.classes, *image.shape[2:])
    assert not together.requires_grad and all(p.grad is None for p in method.parameters())
    assert together.min() >= 0 and torch.allclose(together.sum(1), torch.ones(()), atol=1e-5)
    assert torch.allclose(together[1:2], alone, atol=1e-5), "depends on the other samples of the batch"
    assert same(before, method.state_dict()), "predicting changed the method's state"


def resumes_exactly(s, folder, stop):
    whole, parts = s.trainer(folder / "whole"), folder / "parts"
    curve = whole.fit()["curve"]
    with pytest.raises((TrainingStopped, Killed)):
        s.trainer(parts, stop(s.loader())).fit()
    torch.manual_seed(987)  # another process starts from other generators and other weights
    resumed = s.trainer(parts, seed=1)
    again = resumed.fit()["curve"]
    assert same(whole.method.state_dict(), resumed.method.state_dict()), "weights differ"
    assert whole.optimizers.keys() == resumed.optimizers.keys()
    for phase, optimizer in whole.optimizers.items():
        assert same(optimizer.state_dict(), resumed.optimizers[phase].state_dict()), f"optimizer of {phase} differs"
    image = s.batch().image
    with torch.inference_mode():
        mine, theirs = (trainer.method.eval().predict(image) for trainer in (whole, resumed))
    assert torch.equal(mine, theirs), "predictions differ"
    assert [e["done"] for e in curve] == [e["done"] for e in again] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(curve, again, strict=True):
        assert mine["terms"] == theirs["terms"] and mine["watch"] == theirs["watch"], f"losses of {mine['done']} differ"


def unlabeled_labels_cannot_matter(s, folder):
    s.trainer(folder, iterations=2).fit()  # the store raises where a label is read that must not be
    assert s.loader().batch(0, 0).unlabeled.label is None
    count, space = len(s.batch().unlabeled.image), s.batch().image.shape[2:]
    values = []
    for label in (None, torch.zeros(count, *space, dtype=torch.uint8), torch.ones(count, *space, dtype=torch.uint8)):
        values.append([losses.terms for _, losses in s.losses(s.batch(unlabeled_label=label))])
    assert all(same(values[0], other) for other in values[1:]), "labels of the unlabeled half change the loss"


def unlabeled_images_matter(s, store):
    """Only where the method says that it needs them."""
    if not s.cls.needs.unlabeled:
        assert s.batch().unlabeled.image.shape[0] == 0
        return
    other = s.loader(store(s.dims, s.classes, 1.0)).batch(0, 0)
    assert torch.equal(other.labeled.image, s.batch().labeled.image)
    with pytest.MonkeyPatch.context() as patch:  # batch statistics would carry any image into the labeled loss
        for layer in (torch.nn.modules.batchnorm._BatchNorm, networks.batchnorm._ExactBatchNorm):
            patch.setattr(layer, "forward", without_batch_statistics)
        mine, theirs = ([sum(x.terms.values()).detach() for seed in (0, 1)
                         for _, x in s.losses(b, s.method(seed, confident=True))] for b in (s.batch(), other))
    assert not same(mine, theirs), "unlabeled images do not change the loss"


def without_batch_statistics(layer, x, activation=None):
    """Batch norm as in evaluation: no sample sees another one."""
    out = torch.nn.functional.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return out if activation is None else activation(out)


def steps_are_shares_of_the_run(s):
    """A run of 100 steps is a run of 1,000 in small: at the same share of both every term is the same."""
    values = []
    for step, total in ((990, 1000), (99, 100)):
        method, batch = s.method(confident=True), s.batch()
        values.append([])
        for clock in s.moments(method):
            torch.manual_seed(1)
            terms = method(batch, clock._replace(step=torch.tensor(step), total=total)).terms
            values[-1].append({name: float(value.detach()) for name, value in terms.items()})
    for long, short in zip(*values, strict=True):
        assert short == pytest.approx(long, rel=1e-6), "a number of steps does not scale with the run"


def teachers_follow(s):
    method = s.method()
    teachers = {n: m for n, m in method.named_modules() if isinstance(m, Teacher)}
    if not teachers:
        return
    *_, clock = s.moments(method)
    for name, teacher in teachers.items():
        old = [p.clone() for p in teacher.parameters()]
        shake(method.trainable(clock.phase))
        method.after_step(clock._replace(step=torch.tensor(LONG_AGO)))
        assert not any(map(torch.equal, old, teacher.parameters())), f"{name} does not move"
    if "teacher" not in teachers:
        return
    mine, theirs = list(method.teacher.net.parameters()), list(method.student.parameters())
    shake(theirs)
    method.after_step(clock._replace(step=torch.tensor(0)))
    assert same(mine, theirs) == method.teacher.warm_up, "a teacher that warms up copies the student in the first step"
    shake(theirs)
    old = [p.clone() for p in mine]
    method.after_step(clock._replace(step=torch.tensor(LONG_AGO)))
    decay = method.teacher.decay
    assert 0 < decay < 1
    for new, before, student in zip(mine, old, theirs, strict=True):
        expected = decay * before.double() + (1 - decay) * student.double()
        assert (new - expected).abs().max() < 1e-6, "the teacher does not move by 1 - decay"
        assert not torch.equal(new, before), "the teacher does not move"
    for _, losses in s.losses(method=method):
        sum(losses.terms.values()).backward()
    for teacher in teachers.values():
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters()), "a teacher has gradients"


def half_precision_agrees(s, folder):
    s = dataclasses.replace(s, side=32)  # batch norm of a single voxel per sample would magnify every rounding
    batch, values = s.batch(), {}
    for precision in ("32-true", "bf16-mixed"):
        trainer = s.trainer(folder, precision=precision)
        values[precision] = []
        for clock in s.moments(trainer.method):
            torch.manual_seed(1)
            values[precision].append({k: v.detach().item() for k, v in trainer.model(batch, clock).terms.items()})
    for full, half in zip(*values.values(), strict=True):
        atol = ROUNDING * sum(full.values())
        for name, value in full.items():
            assert abs(half[name] - value) <= BF16 * abs(value) + atol, f"{name} is {half[name]} in bf16, not {value}"


def a_step_stays_on_its_device(s):
    """On torch's meta device there are no values: reading one, for which CUDA would wait, fails, as a CPU tensor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # there is none for meta
        method, batch = s.method().to("meta"), without_values(s.batch())
        for clock in s.moments(method):
            losses = method(batch, clock._replace(step=clock.step.to("meta")))
            total = sum(losses.terms.values())
            assert {x.device.type for x in (total, *losses.watch.values())} == {"meta"}, "a loss on another device"
            total.backward()
            method.after_step(clock._replace(step=clock.step.to("meta")))


def without_values(x):
    """A batch on the meta device."""
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    parts = map(without_values, x) if isinstance(x, tuple) else ()
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts) if isinstance(x, tuple) else x


def config_is_documented(cls):
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen, "Config is not a frozen dataclass"
    arguments = (cls.__doc__ or "").partition("Args:")[2]
    told = {name for line in re.findall(r"^ +([\w, ]+): +\S", arguments, re.M) for name in re.split(r", *", line)}
    silent = {f.name for f in dataclasses.fields(cls)} - told
    assert not silent, f"Config says nothing about {sorted(silent)}"
    cls()  # every field has a default


def state_is_complete(s):
    first, second, file = s.method(), s.method(seed=1), io.BytesIO()
    list(s.losses(method=first))
    shake(first.parameters())
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    image = s.batch().image
    with torch.inference_mode():
        assert torch.equal(first.eval().predict(image), second.eval().predict(image))


# --- helpers ---------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a power cut."""


def shake(parameters):
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn_like(p))


def same(a, b) -> bool:
    """Bitwise equality of nested containers of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def at_call(number, action):
    """A loader whose `batch` does something before it answers for the `number`th time, counted from 0."""
    def wrap(loader):
        original, calls = loader.batch, iter(range(10**6))

        def batch(stage, step):
            if next(calls) == number:
                action()
            return original(stage, step)

        loader.batch = batch
        return loader
    return wrap


def while_logging(trainer):
    """A trainer that is interrupted after a step has decided what to save."""
    original = trainer._log

    def log(*args):
        ctrl_c()
        return original(*args)

    trainer._log = log
    return trainer


def power_cut():
    raise Killed


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


# --- every method ----------------------------------------------------------------------------------------------------


def test_terms_are_finite_scalars_with_gradient(case):
    terms_are_finite(case)


def test_each_term_moves_a_parameter(case):
    each_term_moves_a_parameter(case)


def test_predictions_are_probabilities(case):
    predictions_are_probabilities(case)


def test_resumes_exactly_after_a_power_cut(case, tmp_path):
    resumes_exactly(case, tmp_path, at_call(4, power_cut))


def test_resumes_exactly_after_ctrl_c(method_name, setting, tmp_path):
    resumes_exactly(setting(registry.method_class(method_name), 2, 2), tmp_path, at_call(2, ctrl_c))


def test_a_signal_at_any_time_leaves_a_checkpoint(setting, tmp_path):
    trainer = while_logging(setting(MeanTeacher, 2, 2).trainer(tmp_path))
    trainer.save_every = 100
    with pytest.raises(TrainingStopped) as stop:
        trainer.fit()
    assert stop.value.resumable and (tmp_path / "latest.ckpt").is_file()


def test_labels_of_the_unlabeled_half_cannot_matter(case, tmp_path):
    unlabeled_labels_cannot_matter(case, tmp_path)


def test_without_unlabeled_samples_it_is_supervised_training(case, tmp_path):
    without_unlabeled_it_is_supervised(case, tmp_path)


@pytest.mark.parametrize("network", networks.NAMES)
def test_every_network_will_do(method_name, network, setting):
    """In one world each, so that every method sees all worlds and all networks."""
    turn = zlib.crc32(method_name.encode()) + networks.NAMES.index(network)
    every_network_will_do(setting(registry.method_class(method_name), *WORLDS[turn % len(WORLDS)], network=network))


@pytest.mark.long
@pytest.mark.parametrize("network", networks.NAMES)
def test_every_network_will_do_in_every_world(case, network):
    every_network_will_do(dataclasses.replace(case, network=network))


def every_network_will_do(s):
    """Or the method says in one line why not, before any training."""
    try:
        method = s.method()
    except UserError as refusal:
        assert s.network in str(refusal) and "\n" not in str(refusal)
        own = s.cls.__module__.startswith("ssl4mis.")
        assert not own or (s.cls.__name__, s.network) == ("MCF", "resvnet"), "the suite has no other refusal"
        return
    each_term_moves_a_parameter(s)
    image = s.batch().image
    with torch.inference_mode():
        probability = method.eval().predict(image)
    assert probability.shape == (len(image), s.classes, *image.shape[2:])
    assert probability.min() >= 0 and torch.allclose(probability.sum(1), torch.ones(()), atol=1e-5)


def test_unlabeled_images_matter(case, fake_store):
    unlabeled_images_matter(case, fake_store)


def test_steps_are_shares_of_the_run(case):
    steps_are_shares_of_the_run(case)


def test_labels_of_the_labeled_half_matter(case):
    other = case.batch(label=torch.zeros_like(case.batch().labeled.label))
    mine, theirs = ([sum(x.terms.values()).detach() for _, x in case.losses(b)] for b in (case.batch(), other))
    assert not same(mine, theirs)


def test_teachers_follow(case):
    teachers_follow(case)


def test_half_precision_agrees(case, tmp_path):
    half_precision_agrees(case, tmp_path)


def test_a_step_reads_no_value_and_stays_on_its_device(case, method_name):
    a_step_stays_on_its_device(dataclasses.replace(case, hp=ON_THE_HOST.get(method_name, {})))


def test_an_absent_class_is_harmless(case):
    label = case.batch().labeled.label
    terms_are_finite(case, case.batch(label=torch.zeros_like(label)))
    terms_are_finite(case, case.batch(label=torch.full_like(label, case.classes - 1)))


def test_state_is_complete(case):
    state_is_complete(case)


def test_config_is_documented(method_name):
    config_is_documented(registry.method_class(method_name).Config)


def test_every_choice_of_a_hyper_parameter_works(method_name, setting):
    """Those that are not the default, which the other laws are put to."""
    cls = registry.method_class(method_name)
    for field, kind in typing.get_type_hints(cls.Config).items():
        for choice in typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ():
            if choice == getattr(cls.Config, field):
                continue
            s = setting(cls, 2, 4, {field: choice})
            terms_are_finite(s)
            predictions_are_probabilities(s)
            by_design = ON_THE_HOST.get(method_name, {})
            if field not in by_design:
                a_step_stays_on_its_device(dataclasses.replace(s, hp=by_design | s.hp))


# --- mutants: the laws would notice ----------------------------------------------------------------------------------


class FrozenTeacher(MeanTeacher):
    """The bug of a copied `.add` for `.add_`: nothing is ever written to the teacher."""

    def after_step(self, clock):
        pass


class CopiedTeacher(MeanTeacher):
    """A teacher that is the student."""

    def after_step(self, clock):
        self.teacher.follow(self.student, torch.zeros_like(clock.step))


class UnnamedTeacher(MeanTeacher):
    """A teacher that never moves, under a name of its own."""

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.ema = Teacher(self.student, hp.decay)


class IgnoresUnlabeled(MeanTeacher):
    """Passes the unlabeled images through the network and looks away."""

    def forward(self, batch, clock):
        logits = self.student(batch.image).logits[:len(batch.labeled.image)]
        return Losses({"supervised": segmentation(logits, batch.labeled.label)})


class ForgetsForPredicting(MeanTeacher):
    """Counts steps in Python, and predicts accordingly."""

    steps = 0

    def after_step(self, clock):
        super().after_step(clock)
        self.steps += 1

    def predict(self, image):
        return super().predict(image + self.steps)


class ReadsItsLoss(MeanTeacher):
    """Waits for the device in every step."""

    def forward(self, batch, clock):
        losses = super().forward(batch, clock)
        return losses if losses.terms["supervised"].item() > 0 else Losses({})


class FromTheHost(MeanTeacher):
    """Uses a tensor that is on the CPU wherever the method is."""

    def forward(self, batch, clock):
        losses = super().forward(batch, clock)
        return Losses(losses.terms | {"supervised": losses.terms["supervised"] + torch.zeros(1)})


class CountsSteps(MeanTeacher):
    """A warm-up of a fixed number of steps."""

    def forward(self, batch, clock):
        losses = super().forward(batch, clock)
        return Losses({name: value * (clock.step / 6000).clamp(max=1) for name, value in losses.terms.items()})


class DeafConsistency(MeanTeacher):
    def forward(self, batch, clock):
        losses = super().forward(batch, clock)
        return Losses(losses.terms | {"consistency": losses.terms["consistency"].detach()})


class SilentConsistency(MeanTeacher):
    """Requires a gradient that is always zero."""

    def forward(self, batch, clock):
        losses = super().forward(batch, clock)
        return Losses(losses.terms | {"consistency": losses.terms["consistency"] * 0})


class ReadsUnlabeledLabels(MeanTeacher):
    def forward(self, batch, clock):
        losses, label = super().forward(batch, clock), batch.unlabeled.label
        if label is None:
            return losses
        return Losses(losses.terms | {"leak": segmentation(self.student(batch.unlabeled.image).logits, label)})


class ReadsTheStore(MeanTeacher):
    store = None

    def forward(self, batch, clock):
        for case in batch.unlabeled.cases:
            self.store.label(case)
        return super().forward(batch, clock)


class ForgetfulTeacher(MeanTeacher):
    """Keeps its own count of steps in Python, where no checkpoint finds it."""

    steps = 0

    def after_step(self, clock):
        self.teacher.follow(self.student, torch.tensor(self.steps))
        self.steps += 1


class BatchStatistics(MeanTeacher):
    """Normalizes over the batch, so the answer hangs on the other samples."""

    def predict(self, image):
        return super().predict(image - image.mean())


class NeedsUnlabeled(MeanTeacher):
    """The mean over no voxels is not a number."""

    def forward(self, batch, clock):
        losses = super().forward(batch, clock)
        distance = self.student(batch.image).logits[len(batch.labeled.image):].square().mean()
        return Losses(losses.terms | {"consistency": distance})


class Logarithm(MeanTeacher):
    """log 0 where a class is absent."""

    def forward(self, batch, clock):
        losses = super().forward(batch, clock)
        foreground = (batch.labeled.label == 1).float().mean()
        return Losses(losses.terms | {"size": losses.terms["supervised"] * foreground.log()})


@dataclasses.dataclass
class Undocumented:
    """Hyper-parameters.

    Args:
        decay: of the teacher.
    """

    decay: float = 0.9
    weight: float = 0.1


@pytest.mark.parametrize("mutant, law", [
    (FrozenTeacher, teachers_follow),
    (CopiedTeacher, teachers_follow),
    (UnnamedTeacher, teachers_follow),
    (CountsSteps, steps_are_shares_of_the_run),
    (FromTheHost, a_step_stays_on_its_device),
    (ReadsItsLoss, a_step_stays_on_its_device),
    (DeafConsistency, terms_are_finite),
    (DeafConsistency, each_term_moves_a_parameter),
    (SilentConsistency, each_term_moves_a_parameter),
    (BatchStatistics, predictions_are_probabilities),
], ids=lambda value: value.__name__)
def test_mutants_are_caught(mutant, law, setting):
    with pytest.raises((AssertionError, RuntimeError)):
        law(setting(mutant, 2, 2))


@pytest.mark.parametrize("mutant", [ReadsUnlabeledLabels, ReadsTheStore])
def test_leaks_are_caught(mutant, setting, fake_store, tmp_path, monkeypatch):
    monkeypatch.setattr(ReadsTheStore, "store", fake_store(2, 2))
    with pytest.raises(AssertionError):
        unlabeled_labels_cannot_matter(setting(mutant, 2, 2), tmp_path)


@pytest.mark.parametrize("mutant", [ForgetfulTeacher, ForgetsForPredicting])
def test_state_outside_the_checkpoint_is_caught(mutant, setting, tmp_path):
    with pytest.raises(AssertionError):
        resumes_exactly(setting(mutant, 2, 2), tmp_path, at_call(4, power_cut))


def test_a_method_that_ignores_unlabeled_images_is_caught(setting, fake_store):
    with pytest.raises(AssertionError):
        unlabeled_images_matter(setting(IgnoresUnlabeled, 2, 2), fake_store)


def test_a_loss_that_needs_unlabeled_samples_is_caught(setting, tmp_path):
    without_unlabeled_it_is_supervised(setting(MeanTeacher, 2, 2), tmp_path / "right")
    with pytest.raises(AssertionError):
        without_unlabeled_it_is_supervised(setting(NeedsUnlabeled, 2, 2), tmp_path / "wrong")


def test_a_loss_that_needs_every_class_is_caught(setting):
    s = setting(Logarithm, 2, 2)
    with pytest.raises(AssertionError):
        terms_are_finite(s, s.batch(label=torch.zeros_like(s.batch().labeled.label)))


@pytest.mark.parametrize("config", [Undocumented, dataclasses.make_dataclass("Config", [], frozen=False)])
def test_a_poor_config_is_caught(config):
    with pytest.raises(AssertionError):
        config_is_documented(config)


def test_the_base_class_says_what_is_missing(setting):
    method = Method(None, setting(MeanTeacher, 2, 2).task, None)
    with pytest.raises(TypeError, match="losses"):
        method(None, Clock(torch.tensor(0), 1))
    with pytest.raises(AttributeError, match="'net'"):  # what predicts where a method says nothing else
        method.predict(None)


def test_ua_mt_says_that_a_network_without_dropout_leaves_it_noise_alone(setting):
    cls = registry.method_class("ua_mt")
    assert setting(cls, 2, 2).method().remarks() == ()
    (remark,) = setting(cls, 2, 2, network="nnunet").method().remarks()
    assert "dropout" in remark and "\n" not in remark
