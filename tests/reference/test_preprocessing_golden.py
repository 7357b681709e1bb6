"""Recipes against what the authors' scripts made of raw volumes: LA, BraTS and ACDC as published."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.recipes import Crop, Recipe, Step, apply
from data_prep.scans import Scan

INPUTS = ("la_image", "la_label", "la_output_size", "la_draws", "brats_image", "brats_label", "brats_percent",
          "acdc_volume")
COVERED = ("*_processed",)


@pytest.fixture
def data(golden):
    return golden("preprocessing")


def scan(voxels):
    return Scan(voxels, np.eye(4), Path("stored.nii"))


def la(data, *before):
    """The published recipe with the stored margins in place of fixed ones."""
    low, high = data["la_draws"][:4:2].tolist(), data["la_draws"][1:4:2].tolist()
    x, y, _ = data["la_output_size"].tolist()
    crop = Crop("label", margin=(*zip(low, high, strict=True), None), voxels=True, smallest=(x, y, 0), exclusive=True)
    return Recipe("LA", "stored", 1, "", orientation=None, before=before, crop=crop)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6)


def test_la_scores_of_the_whole_scan_and_box_around_the_label(data):
    stored = apply(la(data, Step("zscore")), scan(data["la_image"]), scan(data["la_label"]))
    close(stored.image[0], data["la_image_processed"])
    np.testing.assert_array_equal(stored.label == 255, data["la_label_processed"])


def test_la_as_mcf_stores_it(data):
    """The same box, and intensities cast to 8 bit (modulo 256) instead of normalized."""
    codes = data["la_image"].astype(np.int64).astype(np.uint8)
    stored = apply(la(data), scan(codes), scan(data["la_label"]))
    np.testing.assert_array_equal(stored.image[0], data["la_mcf_image_processed"])
    np.testing.assert_array_equal(stored.label == 255, data["la_mcf_label_processed"])


def test_brats_box_without_its_last_planes_share_and_positive_scores(data):
    after = (Step("clip_share", {"share": float(data["brats_percent"])}), Step("zscore", {"over": "positive"}))
    recipe = Recipe("BraTS", "stored", 1, "", None, crop=Crop("nonzero", channel=0, exclusive=True), after=after)
    stored = apply(recipe, scan(data["brats_image"]), scan(data["brats_label"]))
    close(stored.image[0], data["brats_image_processed"])
    np.testing.assert_array_equal(stored.label > 0, data["brats_label_processed"])


def test_acdc_range_of_the_volume(data):
    stored = apply(Recipe("ACDC", "stored", 1, "", None, after=(Step("minmax"),)), scan(data["acdc_volume"]))
    close(stored.image[0], data["acdc_volume_processed"])


def test_every_array_is_accounted_for(data, every_array_is_in_one):
    every_array_is_in_one(data, COVERED, INPUTS)
