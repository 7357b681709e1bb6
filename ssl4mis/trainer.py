"""The training loop: stages, phases, precision, schedules, checkpoints, exact resume. It knows no method by name.

A step is a pure function of (state, seed, step number): the loader and torch's generators are keyed by them, so a run
that was killed and started again is the same run.
"""
import math
import signal
import threading
import time
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from networks import ranks
from networks.base import channels_last
from networks.compiled import compile_networks
from ssl4mis import checkpoint
from ssl4mis.batch import Clock
from ssl4mis.config import RunSpec
from ssl4mis.errors import UserError
from ssl4mis.loading import Loader, noise_seed
from ssl4mis.method import Method
from ssl4mis.optimizers import optimizers, rate
from ssl4mis.progress import Reporter, duration

HOURS = 2 * 3600  # from here on a run on a CPU names the protocol made for it


class TrainingStopped(Exception):
    """A run that ended early, in one line for the user; `resumable` if the same command goes on from there."""

    def __init__(self, message: str, resumable: bool):
        super().__init__(message)
        self.resumable = resumable


class Trainer:
    """Trains one method on one loader as a `RunSpec` says, resuming from `folder` when a checkpoint is there.

    `hint` is said where the run would take hours on a CPU; the others are as in `RunOptions`.
    """

    def __init__(self, method: Method, loader: Loader, spec: RunSpec, folder: Path, hint: str = "",
                 log_every: int = 25, save_every: int = 250, compile: str = "none", keep_every: int = 0):
        self.method, self.loader, self.spec, self.folder, self.hint = method, loader, spec, folder, hint
        self.log_every, self.save_every, self.keep_every = log_every, save_every, keep_every
        together = DDPStrategy(find_unused_parameters=True) if ranks.count() > 1 else "auto"
        self.fabric = Fabric(accelerator=loader.device.type, devices=ranks.local_count(), precision=spec.precision,
                             num_nodes=ranks.count() // ranks.local_count(), strategy=together)
        self.fabric.launch()
        self.first = ranks.rank() == 0  # the one that writes and speaks
        self.model = self.fabric.setup_module(method.to(memory_format=channels_last(method.task.spatial_dims)))
        self.compiled = compile != "none"
        if self.compiled:
            compile_networks(method, compile)
        self.plan = plan(method.stages(), spec.iterations)
        self.reporter = Reporter(folder / "events.jsonl" if self.first else None, spec.iterations, spec.method)
        self.stage, self.step, self.done, self.seconds = 0, 0, 0, 0.0
        self.optimizers: dict = {}
        self.interrupted = False

    def fit(self) -> dict:
        """Train to the end; returns {"seconds", "curve"}: of training alone, and the logged events.

        TrainingStopped after Ctrl-C or SIGTERM (state saved) and on a loss that is not finite (state not saved);
        UserError where checkpoints are of no use or nothing can be written.
        """
        state = checkpoint.load(self.folder, self.reporter.say, self.spec.id)
        self.fabric.barrier()  # nobody writes while another one reads
        with self.reporter, _Signals(self):
            if state:
                self._restore(state)
                self.reporter.say(f"resuming at iteration {self.done} of {self.spec.iterations}")
            self.curve = self.reporter.rewind(self.done)
            while self.stage < len(self.plan):
                self._run_stage(fresh=self.step == 0)
                self.stage, self.step = self.stage + 1, 0
        return {"seconds": self.seconds, "curve": self.curve}

    def _run_stage(self, fresh: bool) -> None:
        stage, total = self.plan[self.stage]
        if fresh:
            self.method.enter(stage.name)
            self._make_optimizers(stage)
        self.method.train()
        self.bad = None  # per term, the first step whose value was not finite
        clock = Clock(torch.tensor(self.step, device=self.loader.device), total, stage.name)
        started, since, first = time.monotonic(), self.done, self.done
        while self.step < total:
            if self.compiled:  # an import of seconds
                torch.compiler.cudagraph_mark_step_begin()  # what CUDA graphs gave in the last step may be overwritten
            terms, watched = self._train_step(clock, stage)
            self.step, self.done = self.step + 1, self.done + 1
            clock = clock._replace(step=clock.step + 1)
            log = self.step == total or self.done % self.log_every == 0
            # read once: a signal from here on is seen in the next step; several processes agree when they log
            stop = self.interrupted if ranks.count() == 1 else log and ranks.everywhere(self.interrupted, clock.step)
            save = stop or self.step == total or self.done % self.save_every == 0
            keep = self.keep_every and self.done % self.keep_every == 0 and self.done < self.spec.iterations
            if log or save or keep:
                self._refuse_bad(terms, stage)
            if log:
                self._log(terms, watched, stage, (self.done - since) / past(started))
            if self.done == first + 10:
                self._estimate((time.monotonic() - started) / (self.done - since))
            if keep and self.first:
                checkpoint.keep(self.folder, self.done, self.spec.id, self.method.state_dict())
            if save:
                spent = time.monotonic() - started
                self.seconds, started, since = self.seconds + spent, started + spent, self.done
                self._save()
            if stop:
                raise TrainingStopped(f"stopped at iteration {self.done} of {self.spec.iterations}; "
                                      "the same command goes on from there", resumable=True)

    def _train_step(self, clock: Clock, stage):
        seed = noise_seed(self.spec.seed, self.stage, self.step)
        torch.manual_seed(seed)
        batch = self.loader.batch(self.stage, self.step)
        seen, watched = {}, {}
        for phase in stage.phases:
            optimizer = self.optimizers[phase.name]
            self.method.zero_grad()  # of all phases: one phase's backward pass reaches the others' parameters
            for group in optimizer.param_groups:
                group["lr"] = rate(phase, stage, self.spec, self.step, clock.total)
            with ranks.spread(seed):
                losses = self.model(batch, clock._replace(phase=phase.name))
                self.fabric.backward(sum(losses.terms.values()))
            if self.spec.clip:
                self.fabric.clip_gradients(self.model, optimizer, max_norm=self.spec.clip)
            optimizer.step()
            prefix = f"{phase.name}/" if len(stage.phases) > 1 else ""
            seen.update({prefix + name: value for name, value in losses.terms.items()})
            watched.update({prefix + name: value for name, value in losses.watch.items()})
        self.method.after_step(clock)
        self._note_bad(seen, clock.step)
        return seen, watched

    def _note_bad(self, terms: dict, step: torch.Tensor) -> None:
        """Keep on the device which step first made a term non-finite; it is read when logging, so no step waits."""
        finite = torch.isfinite(torch.stack([term.detach().float() for term in terms.values()]))
        if self.bad is None:
            self.bad = torch.full(finite.shape, -1, device=finite.device)
        self.bad = torch.where((self.bad < 0) & ~finite, step, self.bad)

    def _refuse_bad(self, terms: dict, stage) -> None:
        """TrainingStopped if a loss term or, where all terms were finite, a weight is not finite."""
        bad = sorted((step, name) for name, step in zip(terms, self.bad.tolist(), strict=True) if step >= 0)
        if bad:
            step, name = bad[0]
            cases = ", ".join(self.loader.names(self.stage, step))
            what = f"step {step}: the loss term '{name}' is not finite, expected a finite number; cases {cases}"
        elif all(p.isfinite().all() for p in self.method.parameters()):
            return
        else:
            what = f"step {self.step - 1} or shortly before: a weight is not finite although all losses were"
        raise TrainingStopped(f"stage {stage.name}, {what}; the last checkpoint before it is kept", resumable=False)

    def _log(self, terms: dict, watched: dict, stage, rate: float) -> None:
        event = {"done": self.done, "stage": stage.name, "rate": round(rate, 3),
                 "terms": {name: float(value.detach()) for name, value in terms.items()},
                 "watch": {name: number if math.isfinite(number := float(value)) else None
                           for name, value in watched.items()}}
        self.reporter.step(event)
        self.curve.append(event)

    def _estimate(self, seconds: float) -> None:
        left = seconds * (self.spec.iterations - self.done)
        device = self.loader.device.type
        slow = f"; {self.hint}" if device == "cpu" and left > HOURS and self.hint else ""
        self.reporter.say(f"about {duration(left)} for {self.spec.iterations - self.done} more iterations on this "
                          f"{device} ({seconds:.2f} s each){slow}")

    def _make_optimizers(self, stage) -> None:
        self.optimizers = {phase: self.fabric.setup_optimizers(optimizer)
                           for phase, optimizer in optimizers(self.method, stage, self.spec).items()}

    def _save(self) -> None:
        if not self.first:
            return
        checkpoint.save(self.folder, {
            "run": self.spec.id,
            "method": self.method.state_dict(), "precision": self.fabric.strategy.precision.state_dict(),
            "optimizers": {phase: optimizer.state_dict() for phase, optimizer in self.optimizers.items()},
            "stage": self.stage, "step": self.step, "done": self.done, "seconds": self.seconds})

    def _restore(self, state: dict) -> None:
        self.stage, self.step = state["stage"], state["step"]
        self.done, self.seconds = state["done"], state["seconds"]
        try:
            self.method.load_state_dict(state["method"])
        except RuntimeError as error:
            raise UserError(f"{self.folder}: the weights of the checkpoint do not fit {self.spec.method} on "
                            f"{self.spec.network} of this version ({' '.join(str(error).split())[:200]}); remove the "
                            "checkpoints to start again") from None
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        stage, total = self.plan[self.stage]
        if self.step == total:  # saved at the end of a stage: the next one starts afresh
            self.stage, self.step = self.stage + 1, 0
            return
        self._make_optimizers(stage)
        for phase, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][phase])


class _Signals:
    """Turns Ctrl-C and SIGTERM into a flag that is looked at between steps, so that what is saved is whole."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.former = trainer, {}

    def _stop(self, number, frame):
        self.trainer.interrupted = True

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self.former[number] = signal.signal(number, self._stop)

    def __exit__(self, *error):
        for number, handler in self.former.items():
            signal.signal(number, handler)


def past(started: float) -> float:
    """Seconds since then, more than 0: the clocks of some systems stand still for as long as a small step takes."""
    return max(time.monotonic() - started, 1e-9)


def plan(stages, iterations: int) -> list:
    """Stages with their numbers of steps, which sum to `iterations`; ValueError if the shares do not sum to 1."""
    if abs(sum(stage.share for stage in stages) - 1) > 1e-9:
        raise ValueError(f"stages {[tuple(stage) for stage in stages]}: expected shares that sum to 1")
    ends, share = [0], 0.0
    for stage in stages:
        share += stage.share
        ends.append(round(iterations * share))
    return [(stage, high - low) for stage, low, high in zip(stages, ends[:-1], ends[1:], strict=True)]
