"""The training loop on toy methods whose every step is known by hand."""

import itertools
import json
import math
import os
import random
import signal
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from ssl4mis import checkpoint, trainer
from ssl4mis.batch import Losses
from ssl4mis.config import RunSpec
from ssl4mis.errors import UserError
from ssl4mis.loading import Loader
from ssl4mis.method import Adam, Method, Phase, Stage, Task, through
from ssl4mis.schedules import learning_rate
from ssl4mis.trainer import Trainer, TrainingStopped, plan


class Store:
    def image(self, case):
        return np.zeros((1, 6, 6), dtype=np.float32)

    def label(self, case):
        return np.zeros((6, 6), dtype=np.uint8)


class Hp(NamedTuple):
    """What a toy does beyond its normal work."""

    act: object = None  # called with the global step before the losses


class Ramp(Method):
    """The loss is the sum of the weights, so every gradient is 1 and a weight tells the learning rates so far."""

    Config = Hp

    def __init__(self, build=None, task=None, hp=None):
        super().__init__(build, task or Task(2, 2), hp or Hp())
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.entered, self.trace, self.calls = [], [], 0

    def enter(self, stage):
        self.entered.append(stage)

    def forward(self, batch, clock):
        if self.hp.act:
            self.hp.act(self.calls)
        self.calls += 1
        return Losses({"sum": self.weight.sum()}, {"step": clock.step.float()})

    def after_step(self, clock):
        self.trace.append((clock.stage, int(clock.step), self.weight.detach().clone()))


def spec(**changes):
    return RunSpec(**{"method": "toy", "patch": [4, 4], "iterations": 12, "learning_rate": 1.0, "momentum": 0.0,
                      "weight_decay": 0.0, "schedule": "constant", "precision": "32-true"} | changes)


def make(folder, method=None, log_every=1, save_every=4, hint="", keep_every=0, **changes):
    loader = Loader(Store(), ("a", "b", "c"), ("d", "e"), (4, 4), (2, 2), 0, (), "cpu")
    return Trainer(method or Ramp(), loader, spec(**changes), folder, hint, log_every, save_every,
                   keep_every=keep_every)


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def deltas(method):
    """How far the first weight moved down in each step."""
    values = [0.0] + [float(weight[0]) for *_, weight in method.trace]
    return [before - after for before, after in itertools.pairwise(values)]


class Crash(Exception):
    """Stands for a power cut."""


def at(step, action):
    def act(now):
        if now == step:
            action()
    return Hp(act)


def crash():
    raise Crash


# --- plan and optimization -------------------------------------------------------------------------------------------


def test_plan_sums_to_the_iterations():
    rng = random.Random(0)
    for _ in range(200):
        parts = [rng.random() + 0.05 for _ in range(rng.randint(1, 5))]
        stages = [Stage(str(i), part / sum(parts)) for i, part in enumerate(parts)]
        total = rng.randint(10, 9999)
        steps = plan(stages, total)
        assert [stage for stage, _ in steps] == stages and sum(n for _, n in steps) == total
        assert all(abs(n - stage.share * total) <= 1 for stage, n in steps)


def test_plan_of_the_usual_method():
    assert plan(Ramp().stages(), 6000) == [(Stage(), 6000)]


@pytest.mark.parametrize("schedule", ["step", "poly", "constant"])
def test_the_learning_rate_is_set(tmp_path, schedule):
    method = Ramp()
    make(tmp_path, method, schedule=schedule, learning_rate=0.5).fit()
    assert deltas(method) == pytest.approx([learning_rate(schedule, 0.5, step, 12) for step in range(12)])
    assert [step for _, step, _ in method.trace] == list(range(12))


def test_momentum_and_weight_decay_are_set(tmp_path):
    method = Ramp()
    make(tmp_path, method, iterations=3, momentum=0.5, weight_decay=0.1).fit()
    weight, speed, expected = 0.0, 0.0, []
    for _ in range(3):
        speed = 0.5 * speed + 1 + 0.1 * weight
        weight -= speed
        expected.append(speed)
    assert deltas(method) == pytest.approx(expected)


def test_the_total_is_the_sum_of_the_terms(tmp_path):
    class Two(Ramp):
        def forward(self, batch, clock):
            return Losses({"two": 2 * self.weight.sum(), "three": 3 * self.weight.sum()}, {"huge": torch.tensor(1e9)})

    method = Two()
    make(tmp_path, method, iterations=2).fit()
    assert deltas(method) == [5.0, 5.0]
    assert events(tmp_path)[1]["terms"] == {"two": -20.0, "three": -30.0}


@pytest.mark.parametrize("clip, step", [(0.0, 1.0), (0.1, 0.1 / math.sqrt(2)), (9.0, 1.0)])
def test_gradients_are_clipped_by_norm(tmp_path, clip, step):
    method = Ramp()
    make(tmp_path, method, iterations=2, clip=clip).fit()
    assert deltas(method) == pytest.approx([step, step], rel=1e-4)


# --- losses that are not finite --------------------------------------------------------------------------------------


class Poisoned(Ramp):
    """A term is not finite in some steps."""

    bad = range(6, 99)
    value = math.nan

    def forward(self, batch, clock):
        poison = self.value if int(clock.step) in self.bad else 1.0
        return Losses({"fine": self.weight.sum(), "poisoned": self.weight.sum() * poison})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [range(6, 99), (6,)], ids=["from then on", "once"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value, bad):
    method = Poisoned()
    method.value, method.bad = value, bad
    run = make(tmp_path, method, log_every=100, save_every=4)
    with pytest.raises(TrainingStopped) as error:
        run.fit()
    message = str(error.value)
    assert "step 6" in message and "'poisoned'" in message and "\n" not in message
    assert all(case in message for case in run.loader.names(0, 6))
    assert not error.value.resumable
    state = checkpoint.load(tmp_path)
    assert state["done"] == 4 and torch.equal(state["method"]["weight"], torch.full((2,), -8.0, dtype=torch.float64))
    healthy = make(tmp_path)
    healthy.fit()  # goes on from there
    assert len(healthy.method.trace) == 8


def test_the_checkpoint_stays_whole_when_only_a_gradient_is_not_finite(tmp_path):
    """sqrt at 0 has a finite value and an infinite slope: the weights are lost one step before the loss tells."""
    class Root(Ramp):
        def forward(self, batch, clock):
            loss = self.weight.sum()
            return Losses({"root": loss + (0 * loss).sqrt() if int(clock.step) == 7 else loss})

    with pytest.raises(TrainingStopped):
        make(tmp_path, Root(), log_every=100, save_every=4).fit()
    assert checkpoint.load(tmp_path)["method"]["weight"].isfinite().all()


# --- Ctrl-C, crash and resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    former = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    method = Ramp(hp=at(5, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(TrainingStopped) as error:
        make(tmp_path, method, log_every=100, save_every=100).fit()
    assert error.value.resumable and "6 of 12" in str(error.value) and "\n" not in str(error.value)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == former
    assert len(method.trace) == checkpoint.load(tmp_path)["done"] == 6
    resumed = make(tmp_path)
    resumed.fit()
    assert resumed.method.weight.tolist() == [-12.0, -12.0] and len(resumed.method.trace) == 6


def test_a_signal_in_the_last_step_stops_before_the_evaluation(tmp_path):
    run = make(tmp_path, Ramp(hp=at(11, lambda: os.kill(os.getpid(), signal.SIGINT))))
    with pytest.raises(TrainingStopped, match="iteration 12 of 12") as stop:
        run.fit()
    assert stop.value.resumable
    again = make(tmp_path, Ramp(hp=at(0, crash)))  # no step is left to do
    assert again.fit()["curve"][-1]["done"] == 12


def test_handlers_come_back_after_a_crash(tmp_path):
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(Crash):
        make(tmp_path, Ramp(hp=at(0, crash))).fit()
    assert signal.getsignal(signal.SIGINT) == former


def test_events_are_rewound(tmp_path):
    with pytest.raises(Crash):
        make(tmp_path, Ramp(hp=at(7, crash))).fit()
    assert [e["done"] for e in events(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"done": 8, "te')  # cut in the middle
    curve = make(tmp_path).fit()["curve"]
    assert [e["done"] for e in events(tmp_path)] == [e["done"] for e in curve] == list(range(1, 13))
    assert [e["terms"]["sum"] for e in curve] == [-2.0 * step for step in range(12)]


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = make(tmp_path).fit()
    again = make(tmp_path)
    assert again.fit() == first
    assert again.method.trace == [] and again.method.entered == []


def test_a_run_says_where_it_resumes(tmp_path):
    with pytest.raises(Crash):
        make(tmp_path, Ramp(hp=at(7, crash))).fit()
    run, said = make(tmp_path), []
    run.reporter.say = said.append
    run.fit()
    assert "resuming at iteration 4 of 12" in said[0]


# --- stages and phases -----------------------------------------------------------------------------------------------


class Game(Ramp):
    """Two stages, the second with two phases; each phase's loss also reaches the weights of the other."""

    def __init__(self, hp=None):
        super().__init__(hp=hp)
        self.critic = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def stages(self):
        return Stage("alone", 0.5), Stage("game", 0.5, (Phase("segment"), Phase("criticize")))

    def trainable(self, phase):
        return [self.critic] if phase == "criticize" else [self.weight]

    def forward(self, batch, clock):
        losses = super().forward(batch, clock)
        if clock.stage == "alone":
            return losses
        if clock.phase == "segment":
            return Losses({"fool": self.weight.sum() - 5 * self.critic.sum()})
        return Losses({"critic": self.critic.sum()})

    def after_step(self, clock):
        self.trace.append((clock.stage, int(clock.step), torch.stack([self.weight[0], self.critic[0]]).detach()))


def test_each_stage_and_phase_has_its_own_optimizer(tmp_path):
    method = Game()
    run = make(tmp_path, method, momentum=0.5, iterations=8)
    run.fit()
    speeds = [1, 1.5, 1.75, 1.875]  # momentum starts anew with the stage
    assert deltas(method) == pytest.approx(speeds * 2)
    assert [(stage, step) for stage, step, _ in method.trace] == [(s, i) for s in ("alone", "game") for i in range(4)]
    assert set(run.optimizers) == {"segment", "criticize"}
    assert [float(w[1]) for *_, w in method.trace[:4]] == [0.0] * 4


def test_a_phase_leaves_no_gradient_to_the_next(tmp_path):
    """What `segment` sends into the critic must not be added to what `criticize` asks of it."""
    method = Game()
    make(tmp_path, method, iterations=4).fit()
    assert [float(w[1]) for *_, w in method.trace] == [0.0, 0.0, -1.0, -2.0]


def test_a_phase_may_have_adam_and_a_schedule_of_its_own(tmp_path):
    """Adam's first steps are as long as its rate, whatever the gradient."""

    class Critic(Game):
        def stages(self):
            return (Stage("game", 1, (Phase("segment"), Phase("criticize", Adam(0.25), "constant")), "poly"),)

        def forward(self, batch, clock):
            losses = super().forward(batch, clock)
            return Losses({"critic": 7 * self.critic.sum()}) if clock.phase == "criticize" else losses

    method = Critic()
    run = make(tmp_path, method, iterations=4)
    run.fit()
    assert [type(run.optimizers[name].optimizer) for name in ("segment", "criticize")] == [torch.optim.SGD,
                                                                                           torch.optim.Adam]
    assert [float(w[1]) for *_, w in method.trace] == pytest.approx([-0.25, -0.5, -0.75, -1.0], abs=1e-6)
    rates = [run.optimizers[name].param_groups[0]["lr"] for name in ("segment", "criticize")]
    assert rates == [learning_rate("poly", run.spec.learning_rate, 3, 4), 0.25]


def test_what_goes_through_a_network_does_not_reach_its_weights():
    net, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), torch.randn(2, 1, 8, 8, requires_grad=True)
    through(net, x).square().sum().backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net[1].running_mean.abs().max() > 0, "statistics of batch norm are still gathered"
    net.eval(), x.grad.zero_()
    assert torch.equal(through(net, x), net(x))


@pytest.mark.parametrize("stop, entered, later", [
    (2, ["alone"], ["game"]), (3, ["alone"], ["game"]), (5, ["alone", "game"], [])])
def test_a_stage_is_entered_once(tmp_path, stop, entered, later):
    """Stopped in the first stage, at its very end, and in the second one (where a step calls forward twice)."""
    whole, first, second = Game(), Game(), Game()
    calls = {2: 2, 3: 3, 5: 6}
    first.hp = at(calls[stop], lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingStopped):
        make(tmp_path, first, iterations=8, momentum=0.5).fit()
    assert checkpoint.load(tmp_path)["done"] == stop + 1
    make(tmp_path, second, iterations=8, momentum=0.5).fit()
    (tmp_path / "whole").mkdir()
    make(tmp_path / "whole", whole, iterations=8, momentum=0.5).fit()
    assert (whole.entered, first.entered, second.entered) == (["alone", "game"], entered, later)
    assert torch.equal(torch.cat([whole.weight, whole.critic]), torch.cat([second.weight, second.critic]))


def test_terms_of_all_phases_are_logged(tmp_path):
    make(tmp_path, Game(), iterations=4).fit()
    assert [set(e["terms"]) for e in events(tmp_path)] == [{"sum"}] * 2 + [{"segment/fool", "criticize/critic"}] * 2


# --- what is said and logged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours, hinted", [(-1.0, True), (1e9, False)])
@pytest.mark.parametrize("save_every", [100, 4])
def test_the_estimate_comes_after_ten_iterations(tmp_path, monkeypatch, hours, hinted, save_every):
    monkeypatch.setattr(trainer, "HOURS", hours)
    said = []
    method = Ramp(hp=Hp(lambda now: said.append(now)))
    run = make(tmp_path, method, hint="`--protocol lite` is quicker", log_every=100, save_every=save_every)
    run.reporter.say = said.append
    run.fit()
    lines = [text for text in said if isinstance(text, str)]
    assert len(lines) == 1 and said.index(lines[0]) == 10
    assert "for 2 more iterations on this cpu" in lines[0]
    assert ("lite" in lines[0]) == hinted


def test_losses_are_logged_every_so_many_steps(tmp_path):
    curve = make(tmp_path, log_every=3, save_every=100, iterations=9).fit()["curve"]
    assert [e["done"] for e in curve] == [3, 6, 9]
    assert [e["watch"]["step"] for e in curve] == [2.0, 5.0, 8.0]


def test_weights_are_kept_on_the_way_and_again_after_a_crash(tmp_path):
    """Every weight loses 1 in a step, so that it tells how many there were. The last ones are in the checkpoint."""
    def kept(folder):
        return {done: float(checkpoint.read(path)["weights"]["weight"][0])
                for done, path in checkpoint.kept(folder).items()}

    make(tmp_path, keep_every=3).fit()
    assert kept(tmp_path) == {3: -3, 6: -6, 9: -9}
    (tmp_path / "none").mkdir()
    make(tmp_path / "none").fit()
    assert kept(tmp_path / "none") == {}
    (tmp_path / "cut").mkdir()
    stopped = Ramp()
    stopped.hp = at(8, crash)
    with pytest.raises(Crash):
        make(tmp_path / "cut", stopped, keep_every=3).fit()
    assert kept(tmp_path / "cut") == {3: -3, 6: -6}
    make(tmp_path / "cut", keep_every=3).fit()
    assert kept(tmp_path / "cut") == kept(tmp_path)


def test_a_checkpoint_of_another_seed_is_passed_over(tmp_path):
    for name, seed in (("mine", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        with pytest.raises(Crash):
            make(tmp_path / name, Ramp(hp=at(9, crash)), seed=seed).fit()
    os.replace(tmp_path / "other" / checkpoint.LATEST, tmp_path / "mine" / checkpoint.LATEST)
    run, said = make(tmp_path / "mine"), []
    run.reporter.say = said.append
    run.fit()
    assert "a checkpoint of run " in said[0] and "-s1-" in said[0] and "trying the generation before it" in said[0]
    assert "resuming at iteration 4 of 12" in said[1] and run.method.weight.tolist() == [-12.0, -12.0]


def test_weights_that_do_not_fit_are_one_line(tmp_path):
    """As after a change of the code; the id of the run is of its settings."""
    make(tmp_path, iterations=4).fit()
    other = Ramp()
    other.weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match="do not fit toy on vnet of this version.*start again") as error:
        make(tmp_path, other, iterations=4).fit()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["[]", "null", "{}", '{"done": "x"}', "\xff\xfe", "[" * 10**5, ""])
def test_strange_lines_of_the_log_are_dropped(tmp_path, line):
    with pytest.raises(Crash):
        make(tmp_path, Ramp(hp=at(7, crash))).fit()
    with open(tmp_path / "events.jsonl", "a", encoding="latin-1") as file:
        file.write(line)
    assert [e["done"] for e in make(tmp_path).fit()["curve"]] == list(range(1, 13))


def test_the_log_on_a_full_disk_is_one_line(tmp_path):
    run = make(tmp_path)
    run.reporter.events = tmp_path / "folder"
    run.reporter.rewind = lambda done: []
    run.reporter.events.mkdir()
    with pytest.raises(UserError, match="folder: cannot be written") as error:
        run.fit()
    assert "\n" not in str(error.value)


def test_a_clock_that_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.time, "monotonic", lambda: 3.0)
    run = make(tmp_path)
    assert run.fit()["seconds"] == 0 and run.done == 12


def test_nothing_of_the_compiler_is_loaded_without_need(tmp_path, monkeypatch):
    """Importing it takes seconds, which a thousand short runs would pay."""
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", crash)
    make(tmp_path).fit()
