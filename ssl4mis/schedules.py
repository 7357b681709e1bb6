"""Ramps, decays and learning rates as pure functions of the step.

Steps count from 0. Ramps accept numbers or 0-d tensors and are float64, so that published values are met to 1e-9.
"""
import torch
from torch import Tensor

DROP = 5 / 12  # 2,500 of 6,000 steps


def sigmoid_ramp(step, length) -> Tensor:
    """exp(-5 (1 - t/length)^2), t clipped to [0, length]; 1 where length is 0 (Laine & Aila 2017). 0.0067 at 0."""
    step = torch.as_tensor(step, dtype=torch.float64)
    return torch.exp(-5 * (1 - step.clamp(0, length) / length) ** 2) if length else torch.ones_like(step)


def ema_decay(step, decay: float) -> Tensor:
    """min(1 - 1/(step + 1), decay): the first update copies the student (Tarvainen & Valpola 2017)."""
    return (1 - 1 / (torch.as_tensor(step, dtype=torch.float64) + 1)).clamp(max=decay)


def learning_rate(schedule: str, base: float, step: int, total: int, drop: float = DROP) -> float:
    """The rate used at a step of a run of `total` steps.

    "step": x0.1 after every `drop` of the run, by default 2,500 of 6,000 steps (UA-MT, DTC); "poly":
    base (1 - (step-1)/total)^0.9, one step late as in SSL4MIS; "constant". ValueError for other names.
    """
    if schedule == "step":
        return base * 0.1 ** int(step / (drop * total) + 1e-9)
    if schedule == "poly":
        return base * (1 - max(step - 1, 0) / total) ** 0.9
    if schedule == "constant":
        return base
    raise ValueError(f"schedule {schedule!r}: expected step, poly or constant")
