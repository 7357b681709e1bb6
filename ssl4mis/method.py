"""What a method is: an `nn.Module` whose `forward(batch, clock)` names the losses of one paper.

Data order, optimizer, precision, devices, checkpoints, evaluation and records are written once, elsewhere. Everything
that a method remembers (teachers, thresholds, memories) is a submodule or a buffer, so that `state_dict` is its state.
"""
import copy
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssl4mis.batch import Batch, Clock, Losses
from ssl4mis.errors import UserError
from ssl4mis.schedules import DROP, ema_decay, sigmoid_ramp


class Adam(NamedTuple):
    """Settings of an Adam optimizer, by default those of the field's discriminators."""

    rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0


class Phase(NamedTuple):
    """A part of a step, with a forward pass and an optimizer of its own: an adversary and its opponent take turns.

    Without `adam` the optimizer is the run's SGD; `schedule` goes over that of the stage. What a phase computes for a
    later one of the same step may wait in a plain attribute.
    """

    name: str = "segment"
    adam: Adam | None = None
    schedule: str | None = None


class Stage(NamedTuple):
    """A part of a run: `share` of its steps, one optimizer per phase; the clock restarts in each stage.

    `schedule` goes over the run's learning-rate schedule; `drop` is, for the schedule "step", after what share of the
    stage the rate is divided by ten, again and again.
    """

    name: str = "train"
    share: float = 1.0
    phases: tuple[Phase, ...] = (Phase(),)
    schedule: str | None = None
    drop: float = DROP


class Preset(NamedTuple):
    """What a method's authors did otherwise on one data set.

    Attributes:
        hp: hyper-parameters.
        run: fields of `RunSpec`, such as batch sizes and augmentation, for every protocol of the data set.
        iterations: length of the published runs, for protocols that follow the publications.
        dims: number of dimensions that this is for, where the publications have one that the suite may have otherwise.
    """

    hp: dict = {}
    run: dict = {}
    iterations: int | None = None
    dims: int | None = None


@dataclass(frozen=True)
class Needs:
    """What a method asks of the loader.

    Attributes:
        unlabeled: unlabeled samples; a method that needs none is a supervised one.
        multiple: both batch sizes must be multiples of it.
        equal: as many unlabeled samples as labeled ones.
        strong: how many strongly augmented views of every unlabeled sample.
        partner: another draw of unlabeled samples to mix with.
    """

    unlabeled: bool = True
    multiple: int = 1
    equal: bool = False
    strong: int = 0
    partner: bool = False


@dataclass(frozen=True)
class Task:
    """What is to be learned: number of classes (background included), spatial dimensions, image channels.

    `batch` is the number of labeled and of unlabeled samples per step.
    """

    classes: int
    spatial_dims: int = 3
    channels: int = 1
    batch: tuple[int, int] = (2, 2)


class Method(nn.Module):
    """Base of all methods.

    Attributes:
        Config: frozen dataclass of the hyper-parameters, in the method's own file; the defaults are the LA recipe.
        needs: what the loader must provide.
        presets: by data set, what goes over protocol and defaults there.
    """

    Config: ClassVar[type]
    needs: ClassVar[Needs] = Needs()
    presets: ClassVar[dict[str, Preset]] = {}

    def __init__(self, build, task: Task, hp):
        """`build` is a `networks.Build`; UserError where the chosen backbone makes no sense for the method."""
        super().__init__()
        self.task, self.hp = task, hp

    def remarks(self) -> tuple[str, ...]:
        """What a user should know of this combination before training, a line each."""
        return ()

    def stages(self) -> tuple[Stage, ...]:
        """The stages of a run, in order; their shares sum to 1."""
        return (Stage(),)

    def enter(self, stage: str) -> None:
        """Called once at the start of each stage, never on resume."""

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        """The losses of one step in the phase that `clock` names.

        Where no unlabeled cases are left the unlabeled half is empty, and only supervised terms are due.
        """
        raise TypeError(f"{type(self).__name__} does not say what its losses are")

    def after_step(self, clock: Clock) -> None:
        """Called after the optimizers of a step: moving averages, memories, thresholds."""

    def trainable(self, phase: str) -> list[nn.Parameter]:
        """Parameters that the optimizer of a phase moves."""
        return [p for p in self.parameters() if p.requires_grad]

    def consistency_weight(self, clock: Clock) -> Tensor:
        """`hp.weight`, ramped up over the share `hp.ramp` of the stage, in steps of `hp.ramp_every`."""
        step = clock.step // self.hp.ramp_every * self.hp.ramp_every
        return self.hp.weight * sigmoid_ramp(step, self.hp.ramp * clock.total)

    def predict(self, image: Tensor) -> Tensor:
        """Image (B, C, *space) -> class probabilities (B, K, *space), by `net`; the trainer has called `eval()`."""
        return self.net(image).logits.softmax(1)


class Adversarial(Method):
    """A segmenter, `net`, and a `critic` of what it predicts, which learns by Adam in a phase of its own.

    `hp` has critic_rate.

    Attributes:
        critic_schedule: of the critic's learning rate.
    """

    critic_schedule: ClassVar[str] = "poly"

    def stages(self):
        return (Stage(phases=(Phase(), Phase("criticize", Adam(self.hp.critic_rate), self.critic_schedule))),)

    def trainable(self, phase):
        return [p for p in (self.critic if phase == "criticize" else self.net).parameters() if p.requires_grad]

    def forward(self, batch, clock):
        return self.criticize(batch) if clock.phase == "criticize" else self.segment(batch, clock)

    def segment(self, batch: Batch, clock: Clock) -> Losses:
        """The losses of the segmenter."""
        raise TypeError(f"{type(self).__name__} does not say what its losses are")

    def criticize(self, batch: Batch) -> Losses:
        """The losses of the critic, after the segmenter's step."""
        raise TypeError(f"{type(self).__name__} does not say what its critic's losses are")


class CoTraining(Method):
    """Two networks, `first` and `second`, that teach each other; `second` is None where one network does for both.

    `hp` has evaluate: what predicts, "first", "second" or the "mean" of their probabilities.
    """

    def predict(self, image):
        chosen = {"first": [self.first], "second": [self.second], "mean": [self.first, self.second]}[self.hp.evaluate]
        return torch.stack([net(image).logits.softmax(1) for net in chosen if net is not None]).mean(0)


def at_least_one(hp, *names: str) -> None:
    """For a `Config`'s `__post_init__`: UserError unless these hyper-parameters are 1 or more."""
    for name in names:
        if getattr(hp, name) < 1:
            raise UserError(f"hp.{name} {getattr(hp, name)}: expected at least 1")


def within(hp, low: float, high: float, *names: str) -> None:
    """For a `Config`'s `__post_init__`: UserError unless these hyper-parameters lie in [low, high]."""
    for name in names:
        if not low <= getattr(hp, name) <= high:
            raise UserError(f"hp.{name} {getattr(hp, name)}: expected {low:g} to {high:g}")


def through(module: nn.Module, *inputs):
    """What a module makes of its inputs, with gradients to the inputs and none to its weights: an adversary's judgement
    of what it is not to learn from."""
    return torch.func.functional_call(module, module.state_dict(), inputs)


class Teacher(nn.Module):
    """An exponential moving average of a network's parameters, without gradients.

    In training it stays in train mode, dropout active, and gathers batch-norm statistics of its own, as in UA-MT and
    SSL4MIS.

    Args:
        student: what it starts as.
        decay: of the average.
        warm_up: whether the decay is smaller in the first steps; the first one then copies the student.
        average: "parameters", or "state" for batch-norm statistics too (BCP on ACDC).
    """

    def __init__(self, student: nn.Module, decay: float, warm_up: bool = True, average: str = "parameters"):
        super().__init__()
        self.net, self.decay = copy.deepcopy(student).requires_grad_(False), decay
        self.warm_up, self.average = warm_up, average

    @torch.no_grad()
    def forward(self, image: Tensor):
        return self.net(image)

    @torch.no_grad()
    def follow(self, student: nn.Module, step: Tensor) -> None:
        """Move by 1 - decay towards the student; warming up, decay is 1 - 1/(step+1) if that is less, step from 0."""
        mine, theirs = list(self.net.parameters()), list(student.parameters())
        if self.average == "state":  # but for counters and index tables, which are no averages
            mine += filter(torch.is_floating_point, self.net.buffers())
            theirs += filter(torch.is_floating_point, student.buffers())
        share = 1 - self.decay  # a number: bringing a tensor to the device would wait for all that is queued there
        if self.warm_up:
            share = [(1 - ema_decay(step, self.decay)).to(mine[0].device, mine[0].dtype)] * len(mine)
        torch._foreach_lerp_(mine, theirs, share)

    @torch.no_grad()
    def copy(self, student: nn.Module) -> None:
        """Become the student, batch-norm statistics included."""
        self.net.load_state_dict(student.state_dict())


class StudentTeacher(Method):
    """A student that learns and a teacher that follows it.

    `hp` has weight, ramp, ramp_every, decay, noise, noise_limit and evaluate, as in `methods/mean_teacher.py`.
    """

    def __init__(self, build, task: Task, hp):
        super().__init__(build, task, hp)
        self.student = build()
        self.teacher = Teacher(self.student, hp.decay)

    def noisy(self, image: Tensor) -> Tensor:
        """The image plus clipped Gaussian noise, in the image's units."""
        limit = self.hp.noise_limit
        return image + (torch.randn_like(image) * self.hp.noise).clamp_(-limit, limit)

    def after_step(self, clock: Clock) -> None:
        self.teacher.follow(self.student, clock.step)

    def predict(self, image: Tensor) -> Tensor:
        net = self.student if self.hp.evaluate == "student" else self.teacher
        return net(image).logits.softmax(1)
