"""Test cases to scores: the only code that opens test labels."""
import numpy as np
import torch

from networks.base import channels_last
from ssl4mis.errors import UserError
from ssl4mis.inference import by_planes, sliding_window
from ssl4mis.loading import as_tensor
from ssl4mis.method import Method
from ssl4mis.metrics import score


def probabilities(method: Method, image, patch, stride, device) -> torch.Tensor:
    """Image array (C, *space) -> class probabilities (K, *space) float32 on the CPU, of a method in evaluation mode."""
    return _probabilities(method, image, patch, stride, device).cpu()


def segment(method: Method, image, patch, stride, device) -> torch.Tensor:
    """Image array (C, *space) -> class map (*space) uint8 on the CPU, computed in float32; no label is needed."""
    return _probabilities(method, image, patch, stride, device).argmax(0).to(torch.uint8).cpu()


def segment_slices(method: Method, image, patch, device) -> torch.Tensor:
    """Like `segment`, of a 2D method plane by plane: image array (C, x, y, planes) -> (x, y, planes)."""
    return by_planes(method.predict, as_tensor(image).to(device), patch).cpu()


def _probabilities(method: Method, image, patch, stride, device) -> torch.Tensor:
    return sliding_window(method.predict, as_tensor(image).to(device), patch, stride)


def _union(labels: np.ndarray, values) -> np.ndarray:
    # np.isin takes as long as the score itself
    return labels == values[0] if len(values) == 1 else np.isin(labels, values)


def evaluate(method: Method, store, cases, targets, patch, stride, device, tell=lambda done, case: None,
             slices=False) -> list[dict]:
    """Scores of every test case and target, as rows of a record.

    Args:
        store: the only reader of test labels. targets: by the name that is scored, the classes whose union it is.
        tell: called as tell(number of finished cases, case id).
        slices: whether a 2D method predicts volumes plane by plane; there is no stride then.

    UserError naming a case whose image is not finite.
    """
    method.eval().to(memory_format=channels_last(method.task.spatial_dims))
    rows = []
    for done, case in enumerate(cases, 1):
        image = store.image(case)
        if not np.isfinite(image).all():  # mapped files are not gone through when they are opened
            raise UserError(f"test case {case}: NaN or infinity in the stored image, expected finite values; prepare "
                            "the data again, and the same command goes on")
        predicted = (segment_slices(method, image, patch, device) if slices
                     else segment(method, image, patch, stride, device)).numpy()
        truth, spacing = store.label(case), store.spacing(case)
        for name, values in targets.items():
            rows.append({"case": case, "class": name,
                         **score(_union(predicted, values), _union(truth, values), spacing)})
        tell(done, case)
    return rows
