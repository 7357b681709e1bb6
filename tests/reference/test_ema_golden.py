"""The teacher's moving average against stored parameters."""

import numpy as np
import pytest
import torch
from torch import nn

from ssl4mis.method import Teacher

RTOL, ATOL = 1e-6, 2e-6  # the average of opposite signs cancels, so that a relative error alone is not bounded
COVERED = ("teacher_after_uamt", "teacher_after_uamt_from0", "teacher_after_bcp", "acdc_weight_after",
           "acdc_running_mean_after")
INPUTS = ("teacher_initial", "student_params", "ema_decay", "first_iter_num", "bn_running_mean_student_teacher",
          "bn_num_batches_student_teacher")
NOT_COVERED = {
    "acdc_num_batches_after": "batch norm's counter of steps, which nothing reads, is left alone",
}


class OneParameter(nn.Module):
    """A vector of parameters and a batch norm that has statistics but no parameters."""

    def __init__(self, weight, running_mean, batches):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.norm = nn.BatchNorm1d(len(weight), affine=False)
        self.norm.running_mean.copy_(torch.tensor(running_mean))
        self.norm.num_batches_tracked.fill_(int(batches))


@pytest.mark.parametrize(("name", "first", "warm_up"), [
    ("teacher_after_uamt", None, True), ("teacher_after_uamt_from0", 0, True), ("teacher_after_bcp", None, False)])
def test_parameters_move_and_statistics_stay(golden, name, first, warm_up):
    data = golden("ema")
    first = int(data["first_iter_num"]) if first is None else first
    means, batches = data["bn_running_mean_student_teacher"], data["bn_num_batches_student_teacher"]
    student = OneParameter(data["student_params"][0], means[0], batches[0])
    initial = OneParameter(data["teacher_initial"], means[1], batches[1])
    teacher = Teacher(initial, float(data["ema_decay"]), warm_up)
    for k, (parameters, expected) in enumerate(zip(data["student_params"], data[name], strict=True)):
        student.weight.data = torch.tensor(parameters)
        teacher.follow(student, torch.tensor(first + k))
        np.testing.assert_allclose(teacher.net.weight, expected, RTOL, ATOL, err_msg=f"update {k}")
        np.testing.assert_array_equal(teacher.net.norm.running_mean, means[1])
        assert teacher.net.norm.num_batches_tracked == batches[1]


def test_statistics_are_averaged_with_the_state(golden):
    """BCP's rule on ACDC, one update."""
    data = golden("ema")
    means, batches = data["bn_running_mean_student_teacher"], data["bn_num_batches_student_teacher"]
    student = OneParameter(data["student_params"][0], means[0], batches[0])
    initial = OneParameter(data["teacher_initial"], means[1], batches[1])
    teacher = Teacher(initial, float(data["ema_decay"]), warm_up=False, average="state")
    teacher.follow(student, torch.tensor(int(data["first_iter_num"])))
    np.testing.assert_allclose(teacher.net.weight, data["acdc_weight_after"], RTOL, ATOL)
    np.testing.assert_allclose(teacher.net.norm.running_mean, data["acdc_running_mean_after"], RTOL, ATOL)
    assert teacher.net.norm.num_batches_tracked == batches[1]


def test_every_array_is_accounted_for(golden, every_array_is_in_one):
    every_array_is_in_one(golden("ema"), COVERED, INPUTS, NOT_COVERED)
