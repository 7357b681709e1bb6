"""What passes between the loader, the trainer and a method."""
from typing import NamedTuple

from torch import Tensor


class Clock(NamedTuple):
    """Where a stage stands: `step` counts from 0 and is a 0-d tensor, so schedules need no host synchronization."""

    step: Tensor
    total: int
    stage: str = "train"
    phase: str = "segment"


class Half(NamedTuple):
    """The labeled or the unlabeled half of a batch.

    Attributes:
        image: (B, C, *space) float32, or in mixed precision the half type. label: (B, *space) uint8, or None.
        cases: ids of the samples' cases.
        strong: where the method needs them, the same crops with random intensities, each like `image`.
        valid: with strong views, (B, *space) bool, False where a crop reaches beyond its volume.
    """

    image: Tensor
    label: Tensor | None
    cases: tuple[str, ...]
    strong: tuple[Tensor, ...] = ()
    valid: Tensor | None = None


class Batch(NamedTuple):
    """One step's data: `image` holds the labeled samples, then the unlabeled ones; the halves are views of it.

    The unlabeled half carries no label at all. `partner`, where the method needs it, is another draw of unlabeled
    samples, as many as `unlabeled` has, to mix with.
    """

    image: Tensor
    labeled: Half
    unlabeled: Half
    partner: Half | None = None


class Losses(NamedTuple):
    """The named terms of a paper, weighted: the trainer adds them up. `watch` is logged only."""

    terms: dict[str, Tensor]
    watch: dict[str, Tensor] = {}
