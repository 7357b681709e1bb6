"""Suites: files to runs, the same ones as typed by hand; one line for everything that cannot work."""

import dataclasses
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import data_prep
from ssl4mis import analysis, config, records, registry, suites
from ssl4mis.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SEMI = [name for name in registry.names() if registry.method_class(name).needs.unlabeled]
RUNS = {  # by hand, of 3 seeds but for the folds: supervised ones, those of each method
    "lite": 3 * (2 + 1 + 2) + 3 * len(SEMI),
    "paper": 3 * (3 + 2 * 4) + 3 * 2 * len(SEMI),
    "cv5": 4 * 5 * (2 + len(SEMI)) + 5 * (1 + 3),
    "label_efficiency": 3 * (5 + 3 * (5 + 3)),
    "controls": 3 * 3 + 3 * 4 * len(SEMI),
}
BLOCK = '[[runs]]\nmethods = ["ua_mt"]\ndatasets = ["phantom"]\n'
ABOUT = "about = 'what for'\n"


@cache
def shipped(name: str) -> suites.Suite:
    return suites.read(suites.find(name))


def write(folder: Path, text: str) -> Path:
    (folder / "mine.toml").write_text(text)
    return folder / "mine.toml"


def read(folder: Path, text: str, *options: str) -> list[suites.Run]:
    return suites.read(write(folder, ABOUT + text), options).runs


def test_all_files_are_known_here():
    assert {path.stem for path in suites.FOLDER.iterdir()} == set(RUNS)
    assert len(SEMI) >= 8 and "supervised" not in SEMI


@pytest.mark.parametrize("name", RUNS)
def test_a_suite_has_its_runs_and_none_twice(name):
    suite = shipped(name)
    assert (suite.name, len(suite.runs)) == (name, RUNS[name])
    assert len({run.spec.id for run in suite.runs}) == len(suite.runs) and suite.about


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_a_suite_is_the_command_typed_by_hand(name):
    runs = shipped(name).runs
    for run in [*runs[::9], runs[-1]]:
        assert config.parse(run.words)[0] == [run.spec]


@pytest.mark.parametrize(("name", "line"), [
    ("lite", "--method bcp --dataset LA --protocol lite --labeled 16 --seed 2"),
    ("lite", "--method supervised --protocol lite --labeled 100%"),
    ("lite", "--method supervised --protocol lite --labeled 16 --labeled_batch 4"),
    ("paper", "--method ua_mt --dataset LA --labeled 16"),
    ("paper", "--method corrmatch --dataset LA --labeled 8 --seed 1"),
    ("cv5", "--method ua_mt --dataset LA --fold 3"),
    ("cv5", "--method mt --dataset ACDC --protocol cv5 --fold 0"),
    ("cv5", "--method supervised --dataset LA --protocol cv5 --fold 4 --augmentation []"),
    ("label_efficiency", "--method urpc --protocol lite --labeled 32"),
    ("label_efficiency", "--method urpc --protocol lite --labeled 16 --unlabeled 25%"),
    ("label_efficiency", "--method urpc --protocol lite --labeled 16 --unlabeled 0"),
    ("controls", "--method mcf --protocol lite --labeled 16 --control other:phantom"),
    ("controls", "--method mcf --protocol lite --labeled 16"),
    ("controls", "--method supervised --protocol lite --labeled 16 --augmentation []"),
])
def test_runs_that_are_there(name, line):
    assert config.parse(line.split())[0][0].id in {run.spec.id for run in shipped(name).runs}


def test_every_control_stands_beside_the_run_without():
    found = Counter((run.spec.method, run.spec.seed, run.spec.control) for run in shipped("controls").runs)
    for method in SEMI:
        for seed in range(3):
            assert all(found[method, seed, control] == 1 for control in ("", "noise", "copies", "other:phantom"))


@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_its_baseline(name):
    """Supervised training on the same labels, equal in all that a comparison with it must not differ in."""
    same = ("dataset", "protocol", "fold", "seed", "labeled", *analysis.SAME_SETTINGS)
    found = {run.spec.id: str([getattr(run.spec, key) for key in same]) for run in shipped(name).runs}
    supervised = {found[run.spec.id] for run in shipped(name).runs if run.spec.method == "supervised"}
    assert {run for run, settings in found.items() if settings not in supervised} == set()


def test_shares_of_the_unlabeled_scans():
    shares = Counter(run.spec.unlabeled for run in shipped("label_efficiency").runs
                     if run.spec.labeled == 16 and run.spec.method == "ua_mt")
    assert shares == {0: 3, 16: 3, 32: 3, "all": 3}


def test_folds_of_every_data_set():
    runs = [run.spec for run in shipped("cv5").runs]
    found = Counter((run.dataset, run.fold) for run in runs if run.method in SEMI)
    assert set(found) == {(name, fold) for name in ("LA", "Pancreas", "ACDC", "BraTS") for fold in range(5)}
    assert set(found.values()) == {len(SEMI)}
    assert len({(run.dataset, run.iterations) for run in runs}) == 4, "as many iterations for every method"


def test_committed_records_of_a_suite_are_found():
    """Auto is one of these precisions; the two of the first supervised runs are both there."""
    ids = {dataclasses.replace(run.spec, precision=precision).id for run in shipped("lite").runs
           for precision in ("bf16-mixed", "32-true")}
    known = {path.stem for path in (ROOT / "results" / "records").glob("LA-lite-16-vnet-*.json")}
    plain = {name for name in known if not records.read(ROOT / "results" / "records" / f"{name}.json")["spec"]
             .get("control")}
    assert known and plain <= ids


def test_a_new_method_joins(tmp_path, monkeypatch):
    names = registry.names()
    monkeypatch.setattr(registry, "names", lambda: [*names, "brand_new"])
    found = registry.method_class
    monkeypatch.setattr(registry, "method_class", lambda name: found("mean_teacher" if name == "brand_new" else name))
    runs = read(tmp_path, '[[runs]]\nmethods = "all"\ndatasets = ["phantom"]\n')
    assert [run.spec.method for run in runs] == [*SEMI, "brand_new"]


def test_lists_are_combined_in_their_order_and_a_run_twice_is_one(tmp_path):
    runs = read(tmp_path, '[[runs]]\nseeds = [1, 0]\nmethods = ["mt", "supervised"]\ndatasets = ["phantom"]\n'
                          'unlabeled = ["50%", "all", "100%"]\nlabeled = [2]\nnetworks = ["unet"]\n')
    assert [(run.spec.seed, run.spec.method, run.spec.unlabeled) for run in runs] == [
        (1, "mean_teacher", 15), (1, "mean_teacher", "all"), (1, "supervised", "all"),
        (0, "mean_teacher", 15), (0, "mean_teacher", "all"), (0, "supervised", "all")]
    assert {run.spec.network for run in runs} == {"unet"}


def test_options_and_hyper_parameters_are_those_of_the_command_line(tmp_path):
    (run,) = read(tmp_path, BLOCK + 'options = { iterations = 7, patch = [16, 16, 16], stride = [8, 8, 8], '
                                    'schedule = "step", learning_rate = 1e-3, hp = { decay = 0.5, dice = "all" } }\n')
    line = ("--method ua_mt --dataset phantom --iterations 7 --patch [16,16,16] --stride [8,8,8] --schedule step "
            "--learning_rate 1e-3 --hp.decay 0.5 --hp.dice all")
    assert [run.spec] == config.parse(line.split())[0] == config.parse(run.words)[0]
    assert (run.spec.hp["decay"], run.spec.learning_rate) == (0.5, 1e-3)


def test_a_fold_is_one_run(tmp_path):
    some = read(tmp_path, BLOCK + 'protocols = ["cv5"]\nfolds = [3, 1]\n')
    every = read(tmp_path, BLOCK + 'protocols = ["cv5"]\nfolds = "all"\n')
    assert [run.spec.fold for run in some] == [3, 1] and [run.spec.fold for run in every] == [0, 1, 2, 3, 4]
    assert all(config.parse(run.words)[0] == [run.spec] for run in every) and some[0].spec == every[3].spec


def test_a_thousand_runs_take_one_parser_per_combination_and_keep_their_ids(tmp_path, monkeypatch):
    made = []
    make = config.make_parser
    monkeypatch.setattr(config, "make_parser", lambda argv, prog: made.append(argv) or make(argv, prog))
    runs = read(tmp_path, f'[[runs]]\nseeds = {list(range(20))}\nmethods = ["supervised", "ua_mt", "mt"]\n'
                          'datasets = ["LA"]\nfolds = "all"\nlabeled = ["100%", 8]\noptions = { iterations = 9 }')
    assert len(made) == 2 * 3 and len(runs) == 3 * 2 * 5 * 20
    for run in runs[::97]:
        assert config.parse(run.words)[0] == [run.spec]


def test_options_of_the_machine_are_words_of_every_run(tmp_path):
    plain = read(tmp_path, BLOCK)
    (run,) = read(tmp_path, BLOCK, "--device", "cpu", "--peek_test")
    assert run.spec == plain[0].spec and run.words == [*plain[0].words, "--device", "cpu", "--peek_test"]


@pytest.mark.parametrize(("text", "expected"), [
    ("", "runs is None, expected blocks"), ("runs = 3", "runs is 3, expected blocks that start with [[runs]]"),
    ("runs = []", "runs is [], expected blocks"),
    ("[[runs]\n", "cannot be read"),
    ("abut = 'x'\n" + BLOCK, "key 'abut' is not known: did you mean about?"),
    ("[[run]]\n", "key 'run' is not known: did you mean runs?"),
    (BLOCK + "seed = [1]", "runs 1: key 'seed' is not known: did you mean seeds?"),
    (BLOCK + BLOCK + "label = [1]", "runs 2: key 'label' is not known: did you mean labeled?"),
    ('[[runs]]\nmethods = ["ua_mt"]', "runs 1: no datasets, expected a list"),
    ('[[runs]]\ndatasets = ["phantom"]', "runs 1: no methods, expected a list"),
    (BLOCK + "seeds = []", "runs 1: seeds is [], expected a list of whole numbers"),
    (BLOCK + "seeds = 3", "runs 1: seeds is 3, expected a list of whole numbers"),
    (BLOCK + "seeds = [true]", "runs 1: seeds is [True], expected a list of whole numbers"),
    (BLOCK + 'seeds = ["1"]', "runs 1: seeds is ['1'], expected a list of whole numbers"),
    (BLOCK + 'seeds = "all"', "runs 1: seeds is 'all', expected a list of whole numbers"),
    (BLOCK + "folds = [0.5]", "runs 1: folds is [0.5], expected a list of whole numbers or all"),
    (BLOCK + "labeled = [1.5]", "runs 1: labeled is [1.5], expected a list of counts or shares"),
    ('[[runs]]\nmethods = "al"\ndatasets = ["LA"]', "runs 1: methods is 'al', expected a list of words or all"),
    (BLOCK + "options = 3", "runs 1: options is 3, expected a table"),
    (BLOCK + "options = { hp = 3 }", "runs 1: options.hp is 3, expected a table"),
    (BLOCK + "options = { widht = 3 }", "runs 1: key 'options.widht' is not known: did you mean options.width?"),
    (BLOCK + 'options = { device = "cpu" }', "runs 1: key 'options.device' is not known"),
    (BLOCK + "options = { seed = 3 }", "runs 1: key 'options.seed' is not known"),
])
def test_a_file_that_cannot_work_is_one_line_naming_file_and_key(tmp_path, text, expected):
    with pytest.raises(UserError) as stop:
        read(tmp_path, text)
    assert str(stop.value).startswith(f"{tmp_path / 'mine.toml'}: ") and "\n" not in str(stop.value)
    assert expected in str(stop.value)


@pytest.mark.parametrize(("text", "expected"), [
    ('[[runs]]\nmethods = ["ua_nt"]\ndatasets = ["LA"]', "method 'ua_nt' is not known: did you mean ua_mt?"),
    ('[[runs]]\nmethods = ["ua_mt"]\ndatasets = ["phanton"]', "did you mean 'phantom'?"),
    (BLOCK + "labeled = [99]", "labeled 99: expected 1 to 32 of the training cases"),
    (BLOCK + 'controls = ["nois"]', "did you mean noise?"), (BLOCK + "folds = [9]", "fold 9, expected 0 to 4"),
    (BLOCK + "options = { hp = { decy = 1 } }", "did you mean hp.decay?"),
    (BLOCK + 'options = { width = "x" }', "width x: expected a whole number"),
])
def test_settings_that_run_turns_away_end_the_same_way(tmp_path, capsys, text, expected):
    with pytest.raises(SystemExit) as stop:
        read(tmp_path, text)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"{tmp_path / 'mine.toml'}: runs 1: error: ") and expected in said.err


def test_a_suite_by_name_or_path(tmp_path):
    assert suites.find("lite") == suites.FOLDER / "lite.toml" and suites.find("a/b.toml") == Path("a/b.toml")
    with pytest.raises(UserError, match="suite 'contrls' is not known: did you mean controls"):
        suites.find("contrls")
    with pytest.raises(UserError, match="absent.toml: cannot be read"):
        suites.read(tmp_path / "absent.toml")
    for text, found in (("", None), ("about = 3\n", 3)):
        with pytest.raises(UserError, match=f"mine.toml: about is {found}, expected a line of text"):
            suites.read(write(tmp_path, text + BLOCK))


def test_importing_suites_and_sweep_loads_no_torch():
    program = "import sys, ssl4mis.sweep; print({'torch', 'monai', 'scipy', 'pandas', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_default_labels_of_five_folds_are_those_of_the_protocols():
    for run in shipped("cv5").runs:
        protocol = data_prep.dataset(run.spec.dataset).protocols["cv5"]
        assert run.spec.labeled == protocol.labeled[-1] or "100%" in run.words
