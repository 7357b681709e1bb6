"""Every method learns: a simple phantom to a Dice above 0.9 on cases that it has not seen."""

import numpy as np
import pytest

from ssl4mis import registry
from ssl4mis.evaluator import evaluate
from ssl4mis.loading import Loader
from ssl4mis.trainer import Trainer

LABELED, UNLABELED, TEST = ("0", "1", "2", "3"), ("4", "5", "6", "7"), ("8", "9")
SIDE, PATCH, STEPS = 40, 32, 60


class Ellipses:
    """A bright ellipse under noise; the classes are background and ellipse."""

    def _case(self, case):
        rng = np.random.default_rng(int(case))
        axes = np.indices((SIDE, SIDE)) / SIDE * 2 - 1
        center, radii = rng.uniform(-0.2, 0.2, 2), rng.uniform(0.4, 0.7, 2)
        label = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, center, radii, strict=True)) < 1
        return 2 * label - 0.5 + 0.5 * rng.normal(size=label.shape), label

    def image(self, case):
        return self._case(case)[0][None].astype(np.float32)

    def label(self, case):
        return self._case(case)[1].astype(np.uint8)

    def spacing(self, case):
        return (1.0, 1.0)


@pytest.mark.slow
def test_it_learns(method_name, setting, tmp_path):
    s = setting(registry.method_class(method_name), 2, 2, network="nnunet")  # the fastest of the suite's own here
    spec = s.spec(patch=[PATCH, PATCH], iterations=STEPS, schedule="poly", learning_rate=0.1)
    loader = Loader(Ellipses(), LABELED, UNLABELED, spec.patch, (spec.labeled_batch, spec.unlabeled_batch), 0,
                    spec.augmentation, "cpu", needs=s.cls.needs)
    method = s.method(width=4)
    Trainer(method, loader, spec, tmp_path).fit()
    rows = evaluate(method, Ellipses(), TEST, {"ellipse": (1,)}, spec.patch, [8, 8], "cpu").cases
    assert min(row["dice"] for row in rows) > 0.9, rows
