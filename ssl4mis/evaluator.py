"""Test cases to scores: the only code that opens test labels."""
import torch

from networks.base import channels_last
from ssl4mis.inference import sliding_window
from ssl4mis.method import Method
from ssl4mis.metrics import score


def segment(method: Method, image, patch, stride, device) -> torch.Tensor:
    """Image array (C, *space) -> class map (*space) uint8 on the CPU, computed in float32."""
    probability = sliding_window(method.predict, torch.from_numpy(image).to(device), patch, stride)
    return probability.argmax(0).to(torch.uint8).cpu()


def evaluate(method: Method, store, cases, classes, patch, stride, device, tell=lambda done, case: None) -> list[dict]:
    """Scores of every test case and foreground class, as rows of a record.

    Args:
        store: the only reader of test labels. classes: names, background first.
        tell: called as tell(number of finished cases, case id).
    """
    method.eval().to(memory_format=channels_last(method.task.spatial_dims))
    rows = []
    for done, case in enumerate(cases, 1):
        predicted = segment(method, store.image(case), patch, stride, device).numpy()
        truth = store.label(case)
        for index, name in enumerate(classes[1:], 1):
            rows.append({"case": case, "class": name, **score(predicted == index, truth == index, store.spacing(case))})
        tell(done, case)
    return rows
