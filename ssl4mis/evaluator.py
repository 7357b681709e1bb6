"""Test cases to scores: the only code that opens test labels."""
from collections.abc import Callable

import numpy as np
import torch

from networks.frozen import frozen
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
    return by_planes(predict, as_tensor(image).to(device), patch).cpu()


def _union(labels: np.ndarray, values) -> np.ndarray:
    # np.isin takes as long as the score itself
    return labels == values[0] if len(values) == 1 else np.isin(labels, values)


def evaluate(method: Method, store, cases, targets, patch, stride, device, tell=lambda done, case: None,
             slices=False, precision="32-true") -> list[dict]:
    """Scores of every test case and target, as rows of a record.

    Args:
        store: the only reader of test labels. targets: by the name that is scored, the classes whose union it is.
        tell: called as tell(number of finished cases, case id).
        slices: whether a 2D method predicts volumes plane by plane; there is no stride then.
        precision: of the predictions, 32-true or bf16-mixed.

    UserError naming a case whose image is not finite.
    """
    predict, rows = predictor(method, device, precision), []
    for done, case in enumerate(cases, 1):
        image = store.image(case)
        if not np.isfinite(image).all():  # mapped files are not gone through when they are opened
            raise UserError(f"test case {case}: NaN or infinity in the stored image, expected finite values; prepare "
                            "the data again, and the same command goes on")
        predicted = (segment_slices(predict, image, patch, device) if slices
                     else segment(predict, image, patch, stride, device)).numpy()
        truth, spacing = store.label(case), store.spacing(case)
        for name, values in targets.items():
            rows.append({"case": case, "class": name,
                         **score(_union(predicted, values), _union(truth, values), spacing)})
        tell(done, case)
    return rows
