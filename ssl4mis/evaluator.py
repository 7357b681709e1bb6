"""Test cases to scores: the only code that opens test labels."""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from networks.frozen import frozen
from ssl4mis.calibration import calibration
from ssl4mis.errors import UserError
from ssl4mis.inference import by_planes, sliding_window
from ssl4mis.loading import as_tensor
from ssl4mis.method import Method
from ssl4mis.metrics import score


def predictor(method: Method, device, precision: str = "32-true") -> Callable[[torch.Tensor], torch.Tensor]:
    """What a method predicts, (B, C, *patch) -> (B, K, *patch) probabilities float32, by a frozen copy of it.

    Args:
        precision: 32-true, or bf16-mixed, which is faster and another result.
    """
    device, dims = torch.device(device), method.task.spatial_dims
    if precision == "32-true":
        return frozen(method, dims, device).predict
    copy = frozen(method, dims, device, torch.bfloat16)

    def predict(image: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return copy.predict(image).float()

    return predict


def probabilities(predict, image, patch, stride, device) -> torch.Tensor:
    """Image array (C, *space) -> class probabilities (K, *space) float32 on the CPU; `predict` is a `predictor`."""
    return sliding_window(predict, as_tensor(image).to(device), patch, stride).cpu()


def segment(predict, image, patch, stride, device) -> torch.Tensor:
    """Image array (C, *space) -> class map (*space) uint8 on the CPU; no label is needed."""
    found = sliding_window(predict, as_tensor(image).to(device), patch, stride)
    return found.argmax(0).to(torch.uint8).cpu()


def segment_slices(predict, image, patch, device) -> torch.Tensor:
    """Like `segment`, of a 2D method plane by plane: image array (C, x, y, planes) -> (x, y, planes)."""
    return by_planes(predict, as_tensor(image).to(device), patch).argmax(0).to(torch.uint8).cpu()


def _union(labels: np.ndarray, values) -> np.ndarray:
    # np.isin takes as long as the score itself
    return labels == values[0] if len(values) == 1 else np.isin(labels, values)


class Evaluation(NamedTuple):
    """What a record holds of the test cases: `cases`, a row per case and target; `calibration`, a row per case."""

    cases: list[dict]
    calibration: list[dict]


def evaluate(method: Method, store, cases, targets, patch, stride, device, tell=lambda done, case: None,
             slices=False, precision="32-true", keep=lambda case, predicted: None) -> Evaluation:
    """Scores and calibration of every test case.

    Args:
        store: the only reader of test labels. targets: by the name that is scored, the classes whose union it is.
        tell: called as tell(number of finished cases, case id).
        slices: whether a 2D method predicts volumes plane by plane; there is no stride then.
        precision: of the predictions, 32-true or bf16-mixed.
        keep: called with every case and its class map, an array (*space) uint8.

    UserError naming a case whose image is not finite.
    """
    predict, done = predictor(method, device, precision), Evaluation([], [])
    for number, case in enumerate(cases, 1):
        image = store.image(case)
        if not np.isfinite(image).all():  # mapped files are not gone through when they are opened
            raise UserError(f"test case {case}: NaN or infinity in the stored image, expected finite values; prepare "
                            "the data again, and the same command goes on")
        image = as_tensor(image).to(device)
        found = by_planes(predict, image, patch) if slices else sliding_window(predict, image, patch, stride)
        predicted = found.argmax(0).to(torch.uint8).cpu().numpy()
        truth, spacing = store.label(case), store.spacing(case)
        for name, values in targets.items():
            scores = score(_union(predicted, values), _union(truth, values), spacing)
            done.cases.append({"case": case, "class": name, **scores})
        done.calibration.append({"case": case, **calibration(found, as_tensor(truth).to(found.device))})
        keep(case, predicted)
        tell(number, case)
    return done
