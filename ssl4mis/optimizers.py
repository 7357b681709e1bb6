"""The optimizers of a stage, one per phase, and their learning rates."""
import torch

from ssl4mis.method import Method, Phase, Stage
from ssl4mis.schedules import learning_rate


def optimizers(method: Method, stage: Stage, spec) -> dict[str, torch.optim.Optimizer]:
    """New ones by the names of the phases, with the settings of the `RunSpec` where a phase has none of its own."""
    return {phase.name: _optimizer(phase, method.trainable(phase.name), spec) for phase in stage.phases}


def _optimizer(phase: Phase, parameters: list[torch.nn.Parameter], spec) -> torch.optim.Optimizer:
    # a GPU takes all parameters at once; on a CPU one after the other stays in the cache, with the same result
    together = any(parameter.is_cuda for parameter in parameters)
    if phase.adam:
        return torch.optim.Adam(parameters, phase.adam.rate, phase.adam.betas, weight_decay=phase.adam.weight_decay,
                                foreach=together)
    return torch.optim.SGD(parameters, spec.learning_rate, spec.momentum, weight_decay=spec.weight_decay,
                           foreach=together)


def rate(phase: Phase, stage: Stage, spec, step: int, total: int) -> float:
    """The learning rate of a phase at a step of a stage of `total` steps."""
    base = phase.adam.rate if phase.adam else spec.learning_rate
    schedule = phase.schedule or stage.schedule or spec.schedule
    return learning_rate(schedule, base, step, total, stage.drop)
