"""Data that a command can read."""

import numpy as np
import pytest

import data_prep
from data_prep.volumes import write_case


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A data folder with a small file for every case of LA."""
    folder, split = tmp_path_factory.mktemp("data"), data_prep.load_split("LA-paper", 0)
    for number, case in enumerate([*split.train, *split.test]):
        image = np.random.default_rng(number).normal(size=(18, 17, 20))
        write_case(folder / case / "mri_norm2.h5", image, image > 1)
    return folder
