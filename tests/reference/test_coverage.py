"""Every reference file is compared by a test of this folder or listed here with the reason why not."""

import json
import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
COVERED = {
    "ac_mt_entropy": "test_ac_mt_golden.py",
    "ac_mt_model_uncertainty": "test_ac_mt_golden.py",
    "ac_mt_prototype_error": "test_ac_mt_golden.py",
    "augmentation_3d": "test_augmentation_golden.py",
    "bcp_acdc": "test_bcp_golden.py",
    "bcp_la": "test_bcp_golden.py",
    "bcp_pancreas": "test_bcp_golden.py",
    "cct": "test_cct_golden.py",
    "cml": "test_cml_golden.py",
    "corrmatch_correlation": "test_corrmatch_golden.py",
    "corrmatch_step": "test_corrmatch_golden.py",
    "corrmatch_threshold": "test_corrmatch_golden.py",
    "cps": "test_cps_golden.py",
    "dan": "test_dan_golden.py",
    "dct": "test_dct_golden.py",
    "dtc": "test_dtc_golden.py",
    "dtc_sdf": "test_dtc_golden.py",
    "dycon": "test_dycon_golden.py",
    "ema": "test_ema_golden.py",
    "entropy_minimization": "test_entropy_minimization_golden.py",
    "fixmatch_cta": "test_fixmatch_golden.py",
    "fixmatch_standard": "test_fixmatch_golden.py",
    "ict": "test_ict_golden.py",
    "losses": "test_losses_golden.py",
    "mcf_resnet_better": "test_mcf_golden.py",
    "mcf_vnet_better": "test_mcf_golden.py",
    "mcnet_2d": "test_mc_net_golden.py",
    "mcnet_3d": "test_mc_net_golden.py",
    "mean_teacher": "test_mean_teacher_golden.py",
    "metrics": "test_metrics_golden.py",
    "net_cml": "test_mcnet_networks_golden.py",
    "net_discriminator_dan": "test_discriminator_golden.py",
    "net_discriminator_sassnet": "test_discriminator_golden.py",
    "net_mcf_resnet34": "test_vnet_golden.py",
    "net_mcnet": "test_mcnet_networks_golden.py",
    "net_nnunet": "test_nnunet_golden.py",
    "net_param_counts": "test_vnet_golden.py",
    "net_unet3d": "test_unet_golden.py",
    "net_unet3d_dv_semi": "test_unet_golden.py",
    "net_vnet": "test_vnet_golden.py",
    "net_vnet_sdf": "test_vnet_golden.py",
    "preprocessing": "test_preprocessing_golden.py",
    "r_drop": "test_r_drop_golden.py",
    "sassnet": "test_sassnet_golden.py",
    "schedules": "test_schedules_golden.py",
    "sliding_window_bcp": "test_sliding_window_golden.py",
    "sliding_window_dtc": "test_sliding_window_golden.py",
    "sliding_window_mcf": "test_sliding_window_golden.py",
    "sliding_window_mcnet_average": "test_mc_net_golden.py",
    "sliding_window_mcnet_first": "test_mc_net_golden.py",
    "sliding_window_ssl4mis": "test_sliding_window_golden.py",
    "sliding_window_uamt": "test_sliding_window_golden.py",
    "ua_mt_binary": "test_ua_mt_golden.py",
    "ua_mt_binary_ssl4mis": "test_ua_mt_golden.py",
    "ua_mt_multiclass": "test_ua_mt_golden.py",
    "upc": "test_upc_golden.py",
    "urpc": "test_urpc_golden.py",
}
NOT_COVERED = {
    "samplers": "deviation by design: both streams are endless chains of permutations, so that a batch depends on seed "
                "and step only; the authors drop the labeled remainder and restart the unlabeled stream in each epoch",
}


def test_every_file_is_covered_or_has_a_reason():
    default = HERE.parents[1].parent / "shared" / "goldens"
    folder = Path(os.environ.get("SSL4MIS_GOLDENS") or default)
    names = {path.stem for path in folder.glob("*.npz")}
    if not names:
        pytest.skip("no reference files: set SSL4MIS_GOLDENS to their folder")
    index = folder / "index.json"
    if index.is_file():
        names |= set(json.loads(index.read_text(encoding="utf-8")))
    assert sorted(names - {*COVERED, *NOT_COVERED}) == []


def test_no_file_is_in_both_tables():
    assert not COVERED.keys() & NOT_COVERED.keys()


@pytest.mark.parametrize("name", COVERED)
def test_the_named_test_reads_the_file(name):
    assert f'"{name}"' in (HERE / COVERED[name]).read_text(encoding="utf-8")
