"""What the comparisons with reference files share."""

from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks.base import Output
from ssl4mis.batch import Batch, Clock, Half


class Replay(nn.Module):
    """A network that answers its calls with stored maps, in order; a wrong batch or shape is an error.

    `waiting` holds logits, or dictionaries of the maps of several heads. What it saw is in `seen`.
    """

    def __init__(self, heads=None, network=None, dropout=None):
        super().__init__()
        self.waiting, self.seen = [], []

    def forward(self, image: Tensor) -> Output:
        heads = self.waiting.pop(0)
        heads = heads if isinstance(heads, dict) else {"seg": heads}
        self.seen.append(image)
        for map in heads.values():
            assert len(image) == len(map) and image.shape[2:] == map.shape[2:]
        return Output(heads, None)


@pytest.fixture
def replay():
    """The class of networks that answer with stored maps; a method takes it in place of `networks.Build`."""
    return Replay


@pytest.fixture
def stored_step():
    """stored_step(data, total, name) -> (logits that take a gradient, batch, clock) of a reference file."""

    def make(data: dict[str, np.ndarray], total: int, name: str = "student_logits") -> tuple[Tensor, Batch, Clock]:
        logits = torch.tensor(data[name], requires_grad=True)
        n, image = int(data["labeled_bs"]), torch.zeros(len(logits), 1, *logits.shape[2:])
        label = torch.tensor(data["labels"][:n]).to(torch.uint8)
        labeled = Half(image[:n], label, tuple(f"l{i}" for i in range(n)))
        unlabeled = Half(image[n:], None, tuple(f"u{i}" for i in range(len(logits) - n)))
        return logits, Batch(image, labeled, unlabeled), Clock(torch.tensor(int(data["iter_num"])), total)

    return make


@pytest.fixture
def same_gradient():
    """same_gradient(actual, expected): rtol 1e-4, atol 1e-5 times the largest gradient of each sample."""

    def compare(actual, expected, message=""):
        actual = np.asarray(actual)
        assert actual.shape == expected.shape, message
        for sample, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
            atol = 1e-5 * np.abs(theirs).max()
            np.testing.assert_allclose(mine, theirs, 1e-4, atol, err_msg=f"{message}, sample {sample}")

    return compare


@pytest.fixture
def every_array_is_in_one():
    """every_array_is_in_one(names, *tables): each name matches exactly one of the tables of names or patterns."""

    def check(names, *tables):
        for name in names:
            hits = sum(any(fnmatchcase(str(name), pattern) for pattern in table) for table in tables)
            assert hits == 1, f"{name}: expected in exactly one table, found in {hits}"

    return check
