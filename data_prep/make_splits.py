"""Writes the case lists of all data sets but LA and the phantom in `splits`, byte for byte the committed ones.

The five folds follow from the rules below. The published lists follow from nothing: they are read from the text files
of their repositories (--lists, one id per line), or without these from the JSON already here.

    python -m data_prep.make_splits [--lists DIR] [--out DIR]
"""

import argparse
import json
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from data_prep.spec import SPLITS, ids_sha256

Fold = dict[str, list[str]]  # "train", "test" and, where published, "validation"; own data have "extra"

FOLDS = 5
SEEDS = {"Pancreas": 20160, "ACDC": 20170, "BraTS2019": 20190, "PROMISE12": 20120, "ISLES2022": 20220}
DUPLICATES = (25, 70)  # the same scan as case 2; withdrawn by TCIA
ACDC_GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")  # twenty patients each, in the order of their numbers
# The archive sorts its cases into the folders HGG and LGG, the ids do not say which; these are the LGG. The rule gives
# 76, the published number, and the folder of each of the 285 cases that BraTS 2018 had already.
LGG_CENTERS = ("TCIA09", "TCIA10", "TCIA12", "TCIA13")
LGG_OTHERS = (*(f"2013_{n}" for n in (0, 1, 6, 8, 9, 15, 16, 24, 28, 29)), "TMC_09043")
# Neither ids nor files of PROMISE12 tell the center; its cases share a matrix and their number of slices is alike.
PROMISE12_CENTERS = {"BIDMC": (0, *range(2, 13)), "RUNMC": range(13, 26), "UCL": (1, *range(26, 38)),
                     "HK": range(38, 50)}

RULE = (
    "Rule with seed {seed} and rng = numpy.random.default_rng: the sorted {units} of group g (from 0) in the order of "
    "rng([{seed}, 5, g]).permutation, the groups one after the other; number i of this row is tested in fold i mod 5. "
    "Train list of fold k: the sorted other {units} of group g in the order of rng([{seed}, k, g]).permutation; number "
    "i (from 0) of n stands at (2i + 1)/(2n), and the groups are merged by these places, ties in the order of groups "
    "k, k + 1, ... and around."
)
PANCREAS_IDS = "Ids are TCIA's patient names; the published list writes {spelling} for PANCREAS_0001."
LEAK = (
    "All 82 scans of the old release: TCIA withdrew 0025 and 0070 as the same scan as 0002, so {where}; not possible "
    "with a download of today."
)
ACDC_IDS = (
    "Ids are frames (evaluation is per frame), named as in the SSL4MIS export: the two annotated frames of a patient "
    "are frame01 and frame02, the lower number of the archive first. Both stand together and no fold or labeled "
    "set divides them: labels are counted in patients, labeled = both frames of the first n patients of train{counts}."
)
LITE = {"train": 28, "test": 14}  # frames of ACDC-lite
PER_PATIENT = {"ACDC": 2}  # cases of one patient, where there are several
ABOUT = {
    "Pancreas-mcnet": (
        "62 train and 20 test cases in the published (shuffled) order; labeled = the first 6 or 12 of train. "
        + PANCREAS_IDS.format(spelling="image0001")
        + " "
        + LEAK.format(where="with 12 labels the test case 0025 is also the labeled case 0070, and 0002 is unlabeled"),
        "MC-Net, also used by Co-BioNet and TraCoCo",
    ),
    "Pancreas-coranet": (
        "The 80 scans without the duplicates 0025 and 0070: 12 labeled, then 50 unlabeled, and 18 test cases; labeled "
        "= the first n of train. The list for 6 labels that BCP used was never released; here it is the first 6 of the "
        "12. " + PANCREAS_IDS.format(spelling="0001"),
        "CoraNet, used by BCP (train_lab, train_unlab, test)",
    ),
    "Pancreas-mcf4": (
        "Four folds as published (there is no fifth); labeled = the first n of train, 12 in the paper, so folds 0, 2 "
        "and 3 share their labeled cases. Ids are TCIA's patient names, as published. "
        + LEAK.format(where="folds 0, 1 and 2 train and test on one scan"),
        "MCF (Wang et al., CVPR 2023), dataset/Pancreas/Flods",
    ),
    "Pancreas-cv5": (
        "Five folds of 16 test cases over the 80 scans of today's release (1 to 82 without 25 and 70, the same scan as "
        "2), with other labeled cases in every fold; labeled = the first n of train, so 6 lie in 12. One group. "
        "Ids are TCIA's patient names. " + RULE.format(seed=SEEDS["Pancreas"], units="cases"),
        "the rule stated here",
    ),
    "ACDC-paper": (
        "Fixed split of the field by patients, 70 train, 10 validation and 20 test, in the published order. "
        + ACDC_IDS.format(counts="; 1, 3, 7, 14, 70 patients are the papers' 32, 68, 136, 256, 1312 slices")
        + " The validation cases, by which the papers choose a checkpoint, stand under the extra key 'validation' and "
        "are neither train nor test.",
        "SSL4MIS, data/ACDC; the same lists are used by BCP, CML, SS-Net, MC-Net, UniMatch",
    ),
    "ACDC-cv5": (
        "Five folds of 20 test patients over all 100 training patients, 4 of each pathology group: patients 1 to 20 "
        "DCM, 21 to 40 HCM, 41 to 60 MINF, 61 to 80 NOR, 81 to 100 RV. Any five patients in a row of train are of five "
        "groups, and over the folds every group comes first once. "
        + ACDC_IDS.format(counts=", so 3 lie in 7 and 7 in 14")
        + " "
        + RULE.format(seed=SEEDS["ACDC"], units="patients"),
        "groups: Info.cfg of the archive; folds: the rule stated here",
    ),
    "ACDC-lite": (
        "The first 14 training and the first 7 test patients of ACDC-paper in its order, for the track without a GPU. "
        + ACDC_IDS.format(counts=", so 3 lie in 7"),
        "the first lines of ACDC-paper",
    ),
    "BraTS2019-paper": (
        "Fixed split of the field, 250 train, 25 validation and 60 test cases, in the published (shuffled) order; "
        "labeled = the first 25 or 50 of train. The validation cases, by which the papers choose a checkpoint, stand "
        "under the extra key 'validation' and are neither train nor test.",
        "SSL4MIS, data/BraTS2019",
    ),
    "BraTS2019-cv5": (
        "Five folds of 67 test cases over all 335 training cases, with other labeled cases in every fold; labeled = "
        "the first n of train, so 25 lie in 50. Groups: 259 HGG and 76 LGG, the folders of the archive. The published "
        f"lists do not tell the grade; LGG are all cases of {', '.join(LGG_CENTERS)} and {', '.join(LGG_OTHERS)}. "
        + RULE.format(seed=SEEDS["BraTS2019"], units="cases"),
        "cases: the lists of BraTS2019-paper; grades: folder names of the archive; folds: the rule stated here",
    ),
    "PROMISE12-cv5": (
        "Five folds of 10 test cases over the 50 training cases, with other labeled cases in every fold; labeled = the "
        "first n of train, so 4 lie in 8. Groups: the four centers, "
        + ", ".join(f"{len(numbers)} cases of {center}" for center, numbers in PROMISE12_CENTERS.items())
        + "; the first 4 of every train list are of four centers, the first 8 two of each. "
        + RULE.format(seed=SEEDS["PROMISE12"], units="cases"),
        "centers: as in the multi-site prostate data of Liu et al. (IEEE TMI 2020); folds: the rule stated here",
    ),
    "ISLES2022-cv5": (
        "Five folds of 50 test cases over the 250 training cases, with other labeled cases in every fold; labeled = "
        "the first n of train, so 10 lie in 20 and 20 in 40. One group: the centers stand in a table beside the "
        "archive and not in the ids. " + RULE.format(seed=SEEDS["ISLES2022"], units="cases"),
        "the rule stated here",
    ),
}
FILES = {  # name -> per fold, which text files make up which list
    "Pancreas-mcnet": [{"train": ["pancreas_mcnet_train"], "test": ["pancreas_mcnet_test"]}],
    "Pancreas-coranet": [
        {
            "train": ["pancreas_coranet_bcp_20pct_train_lab", "pancreas_coranet_bcp_20pct_train_unlab"],
            "test": ["pancreas_coranet_bcp_20pct_test"],
        }
    ],
    "Pancreas-mcf4": [{part: [f"pancreas_mcf_fold{k}_{part}"] for part in ("train", "test")} for k in range(4)],
    "ACDC-paper": [{"train": ["acdc_train"], "test": ["acdc_test"], "validation": ["acdc_val"]}],
    "BraTS2019-paper": [{"train": ["brats2019_train"], "test": ["brats2019_test"], "validation": ["brats2019_val"]}],
}


def pancreas(number: int) -> str:
    """Id of a scan by its number: TCIA's patient name."""
    return f"PANCREAS_{number:04d}"


def is_lgg(case: str) -> bool:
    """Whether a BraTS-2019 case lies in the archive's folder LGG."""
    middle = case.removeprefix("BraTS19_").removesuffix("_1")
    return middle.split("_")[0] in LGG_CENTERS or middle in LGG_OTHERS


def published(folder: Path) -> dict[str, list[Fold]]:
    """The published lists from text files. Raises OSError when one is missing."""

    def ids(name: str, file: str) -> list[str]:
        lines = (folder / f"{file}.txt").read_text(encoding="utf-8").split()
        # Three spellings of one scan would be three data sets: image0001, 0001 and PANCREAS_0001.
        return [pancreas(int(line[-4:])) for line in lines] if name.startswith("Pancreas") else lines

    return {
        name: [{part: [i for file in files for i in ids(name, file)] for part, files in fold.items()} for fold in folds]
        for name, folds in FILES.items()
    }


def frozen() -> dict[str, list[Fold]]:
    """The published lists from the JSON files of this folder."""
    folds = {name: json.loads((SPLITS / f"{name}.json").read_text(encoding="utf-8"))["folds"] for name in FILES}
    return {
        name: [{part: folds[name][k][part] for part in fold} for k, fold in enumerate(FILES[name])] for name in FILES
    }


def cv5(seed: int, groups: Sequence[Sequence[str]], folds: int = FOLDS) -> list[Fold]:
    """Five folds by `RULE`: test lists with equal shares of every group, train lists that stay mixed from the start.

    Another number of `folds` takes the place of both fives in the rule.
    """
    row = [case for g, group in enumerate(groups) for case in _shuffled(group, seed, folds, g)]
    tests = [sorted(row[k::folds]) for k in range(folds)]
    return [{"train": mixed(seed, k, groups, test), "test": test} for k, test in enumerate(tests)]


def mixed(seed: int, k: int, groups: Sequence[Sequence[str]], test: Collection[str]) -> list[str]:
    """The train list of fold k by `RULE`: what is not tested, every group spread evenly over the list."""
    places = []
    for g, group in enumerate(groups):
        rest = _shuffled([case for case in group if case not in test], seed, k, g)
        tie = (g - k) % len(groups)
        places += [(Fraction(2 * i + 1, 2 * len(rest)), tie, case) for i, case in enumerate(rest)]
    return [case for *_, case in sorted(places)]


def _shuffled(cases: Sequence[str], *key: int) -> list[str]:
    return [sorted(cases)[i] for i in np.random.default_rng(key).permutation(len(cases))]


def frames(patients: Sequence[str]) -> list[str]:
    """Both ids of every patient, one after the other, so that a list by patients becomes one by frames."""
    return [f"{patient}_frame0{n}" for patient in patients for n in (1, 2)]


def own(lists: dict[str, list[Fold]]) -> dict[str, list[Fold]]:
    """The five folds and the small list of ACDC; that and the cases of BraTS-2019 come from the published lists."""
    scans = [pancreas(n) for n in range(1, 83) if n not in DUPLICATES]
    patients = [[f"patient{20 * g + n:03d}" for n in range(1, 21)] for g in range(len(ACDC_GROUPS))]
    tumors = [case for part in lists["BraTS2019-paper"][0].values() for case in part]
    grades = [[case for case in tumors if is_lgg(case) == lgg] for lgg in (False, True)]
    centers = [[f"Case{n:02d}" for n in numbers] for numbers in PROMISE12_CENTERS.values()]
    return {
        "Pancreas-cv5": cv5(SEEDS["Pancreas"], [scans]),
        "ACDC-cv5": [{part: frames(ids) for part, ids in fold.items()} for fold in cv5(SEEDS["ACDC"], patients)],
        "ACDC-lite": [{part: lists["ACDC-paper"][0][part][:count] for part, count in LITE.items()}],
        "BraTS2019-cv5": cv5(SEEDS["BraTS2019"], grades),
        "PROMISE12-cv5": cv5(SEEDS["PROMISE12"], centers),
        "ISLES2022-cv5": cv5(SEEDS["ISLES2022"], [[f"sub-strokecase{n:04d}" for n in range(1, 251)]]),
    }


def text(name: str, folds: Sequence[Fold]) -> str:
    """The JSON file of a split, with a checksum per list."""
    about, source = ABOUT[name]
    dataset = name.split("-")[0]
    content = {"name": name, "dataset": dataset, "about": about, "source": source}
    content |= {"per_patient": PER_PATIENT[dataset]} if dataset in PER_PATIENT else {}
    content["folds"] = []
    for fold in folds:
        entry = {"train": fold["train"], "test": fold["test"]}
        entry |= {f"sha256_{part}": ids_sha256(fold[part]) for part in ("train", "test")}
        if "validation" in fold:
            entry |= {"validation": fold["validation"], "sha256_validation": ids_sha256(fold["validation"])}
        content["folds"].append(entry)
    return json.dumps(content, indent=1) + "\n"


def make(lists: dict[str, list[Fold]]) -> dict[str, str]:
    """All files as texts by name of the split, from the published lists."""
    return {name: text(name, folds) for name, folds in (lists | own(lists)).items()}


def main() -> None:
    """Writes the files; see the module's text for the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=Path, help="folder of the published lists (default: the JSON files here)")
    parser.add_argument("--out", type=Path, default=SPLITS, help="folder to write to (default: this one)")
    args = parser.parse_args()
    for name, content in make(published(args.lists) if args.lists else frozen()).items():
        (args.out / f"{name}.json").write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
