"""The command line: what it resolves to, what names a run, and one line for everything that cannot work."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import data_prep
from ssl4mis import config, records
from ssl4mis.config import NOT_HYPER, RunOptions, RunSpec

ROOT = Path(__file__).resolve().parents[2]
USER = "--method ua_mt --dataset LA --labeled 16"


def parse(line: str) -> tuple[list[RunSpec], RunOptions]:
    return config.parse(line.split())


def one(line: str) -> RunSpec:
    (spec,), _ = parse(line)
    return spec


def turned_away(capsys, line: str) -> str:
    """The single line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        parse(line)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1 and said.err.endswith("\n")
    return said.err


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_users_command_is_the_papers_protocol():
    specs, options = parse(USER)
    assert options == RunOptions()
    assert specs == [RunSpec(
        method="ua_mt", dataset="LA", protocol="paper", labeled=16, fold=0, seed=0, network="vnet", width=16,
        patch=[112, 112, 80], stride=[18, 18, 4], iterations=6000, labeled_batch=2, unlabeled_batch=2,
        learning_rate=0.01, schedule="step", momentum=0.9, weight_decay=1e-4, clip=0.0, augmentation=["rotflip"],
        precision="32-true", storage="float32", hp=specs[0].hp,
    )]  # fmt: skip
    assert re.fullmatch(r"LA-paper-16-vnet-ua_mt-f0-s0-[0-9a-f]{8}", specs[0].id)


def test_hyper_parameters_start_as_the_methods_dataclass():
    from ssl4mis.methods.ua_mt import Config

    assert one(USER).hp == dataclasses.asdict(Config())


@pytest.mark.parametrize("name", data_prep.names())
def test_every_protocol_sets_its_own_defaults(name):
    dataset = data_prep.dataset(name)
    for protocol in dataset.protocols.values():
        spec = one(f"--method ua_mt --dataset {name} --protocol {protocol.name}")
        assert (spec.dataset, spec.protocol, spec.labeled) == (name, protocol.name, protocol.labeled[-1])
        for key in ("iterations", "labeled_batch", "unlabeled_batch", "learning_rate", "schedule", "width",
                    "precision"):
            assert getattr(spec, key) == getattr(protocol, key)
        for key in ("patch", "stride", "augmentation"):
            assert getattr(spec, key) == list(getattr(protocol, key))


def test_without_a_protocol_the_first_one_counts():
    assert one("--method ua_mt --dataset phantom").protocol == next(iter(data_prep.dataset("phantom").protocols))


def test_a_fold_alone_asks_for_the_five_folds():
    spec = one(f"{USER} --fold 0")
    assert (spec.protocol, spec.fold) == ("cv5", 0)
    assert one(f"{USER} --fold 0 --protocol paper") == one(USER)
    assert [spec.protocol for spec in parse(f"{USER} --fold all")[0]] == ["cv5"] * 5


def test_the_protocols_own_recipe_is_the_default():
    assert one(f"{USER} --recipe paper") == one(USER)
    clean = one(f"{USER} --recipe clean")
    assert clean.recipe == "clean" and clean.id != one(USER).id and clean.hp_hash == one(USER).hp_hash


def test_scoring_in_half_precision_is_another_row():
    fast = one(f"{USER} --evaluation_precision bf16-mixed")
    assert fast.stated["evaluation_precision"] == "bf16-mixed" and "evaluation_precision" not in one(USER).stated
    assert fast.id != one(USER).id and fast.hp_hash != one(USER).hp_hash


def test_ids_of_the_first_records_stay():
    """A finished run is found again: what was added to the settings later is left out where it is not set."""
    assert "recipe" not in one(USER).stated and one(f"{USER} --recipe clean").stated["recipe"] == "clean"
    paths = list((ROOT / "results" / "records").glob("*.json"))
    assert paths
    for path in paths:
        record = records.read(path)
        spec = RunSpec(**record["spec"])
        assert (spec.id, spec.hp_hash) == (record["id"], record["hp_hash"])
        assert config.resolve(spec, data_prep.dataset(spec.dataset)) == [spec]


def test_a_method_without_unlabeled_data_gets_none():
    assert one("--method supervised").unlabeled_batch == 0


@pytest.mark.parametrize(("same", "as_this"), [
    ("--method ua_mt --labeled 20%", USER),  # 20% of 80
    ("--method UA-MT", USER),
    ("--method ua_mt --dataset la", USER),
    ("--method=ua_mt --dataset=LA --labeled=16", USER),
    ("--method mt", "--method mean_teacher"),
    ("--method MT --labeled 10%", "--method mean_teacher --labeled 8"),
    ("--method ua_mt --learning-rate 0.1", "--method ua_mt --learning_rate=0.1"),
    ("--method ua_mt --hp.noise-limit 0.5", "--method ua_mt --hp.noise_limit=0.5"),
])
def test_spellings_of_one_run_have_one_id(same, as_this):
    assert one(same) == one(as_this)
    assert one(same).id == one(as_this).id


@pytest.mark.parametrize("text", ["--data-root /a-b/c_d", "--data_root /a-b/c_d", "--data-root=/a-b/c_d",
                                  "--data_root=/a-b/c_d"])
def test_both_spellings_of_the_data_folder(text):
    assert parse(f"{USER} {text}")[1].data_root == Path("/a-b/c_d")


def test_hyper_parameters_and_lists_on_the_command_line():
    spec = one(f"{USER} --hp.decay 0.5 --patch [16,32,48] --stride=[8,8,8]")
    assert spec.hp["decay"] == 0.5
    assert (spec.patch, spec.stride) == ([16, 32, 48], [8, 8, 8])


def test_all_folds_are_one_spec_each():
    specs, _ = parse("--method ua_mt --protocol cv5 --fold all")
    assert [spec.fold for spec in specs] == list(range(data_prep.load_split("LA-cv5", 0).folds))
    assert specs[3] == one("--method ua_mt --protocol cv5 --fold 3")
    assert len({spec.id for spec in specs}) == len(specs)
    assert len({spec.hp_hash for spec in specs}) == 1


def test_a_file_goes_over_the_defaults_and_the_command_line_over_the_file(tmp_path):
    file = write(tmp_path / "run.yaml", "method: mt\ndataset: phantom\nlabeled: 4\nseed: 7\nhp:\n  decay: 0.5\n")
    spec = one(f"--config {file} --labeled 2 --hp.noise 0.3")
    assert (spec.method, spec.dataset, spec.protocol) == ("mean_teacher", "phantom", "demo")
    assert (spec.labeled, spec.seed) == (2, 7)
    assert (spec.hp["decay"], spec.hp["noise"]) == (0.5, 0.3)
    assert spec.patch == list(data_prep.dataset("phantom").protocols["demo"].patch)


@pytest.mark.parametrize("extra", ["", " --labeled 20% --hp.decay 0.9", " --protocol cv5 --fold all --out elsewhere"])
def test_the_printed_config_gives_the_same_runs(tmp_path, capsys, extra):
    with pytest.raises(SystemExit) as stop:
        parse(f"{USER}{extra} --print_config")
    assert stop.value.code == 0
    file = write(tmp_path / "printed.yaml", capsys.readouterr().out)
    assert parse(f"--config {file}") == parse(USER + extra)


def test_a_spec_written_as_yaml_gives_the_same_run(tmp_path):
    spec = one(f"{USER} --seed 3 --hp.decay 0.5")
    file = write(tmp_path / "spec.yaml", yaml.safe_dump(dataclasses.asdict(spec)))
    assert one(f"--config {file}").id == spec.id


def test_two_files_that_share_the_settings(tmp_path):
    first = write(tmp_path / "a.yaml", "method: ua_mt\n")
    second = write(tmp_path / "b.yaml", "labeled: 4\n")
    assert one(f"--config {first} --config {second}").id == one("--method ua_mt --labeled 4").id


OTHER = {
    "method": "mean_teacher", "dataset": "phantom", "protocol": "lite", "labeled": 8, "unlabeled": 32,
    "control": "noise", "fold": 1, "seed": 1, "recipe": "clean",
    "network": "unet", "width": 8, "patch": [96, 112, 80], "stride": [18, 18, 8], "iterations": 3000,
    "labeled_batch": 1, "unlabeled_batch": 1, "learning_rate": 0.02, "schedule": "poly", "momentum": 0.8,
    "weight_decay": 0.0, "clip": 1.0, "augmentation": [], "precision": "bf16-mixed", "storage": "float16",
    "evaluation_precision": "bf16-mixed", "hp": {"decay": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RunSpec)])
def test_every_deciding_value_is_part_of_the_id(field):
    spec = one(USER)
    other = dataclasses.replace(spec, **{field: OTHER[field]})
    assert getattr(other, field) != getattr(spec, field)
    assert other.id.rsplit("-", 1)[1] != spec.id.rsplit("-", 1)[1]
    assert (other.hp_hash == spec.hp_hash) == (field in NOT_HYPER)


def test_what_leaves_the_result_alone_is_not_part_of_the_id():
    settings = ("--device cpu --data_root /x --out /y --log_every 1 --save_every 2 --keep_every 3 --compile none "
                "--checkpointing true")
    assert {name for name in dataclasses.asdict(RunOptions())} == set(re.findall(r"--(\w+)", settings))
    assert one(f"{USER} {settings}").id == one(USER).id


def test_one_leaderboard_row_is_one_hash():
    spec = one("--method ua_mt --protocol cv5")
    same = one("--method ua_mt --protocol cv5 --fold 2 --seed 5 --labeled 4")
    assert same.hp_hash == spec.hp_hash
    assert one("--method ua_mt --protocol cv5 --hp.decay 0.9").hp_hash != spec.hp_hash


@pytest.mark.parametrize(("line", "expected"), [
    ("--metod ua_mt", "did you mean method?"),
    (f"{USER} --labelled 4", "did you mean labeled?"),
    (f"{USER} --hp.decy 0.5", "did you mean hp.decay?"),
    (f"{USER} --data-rot x", "did you mean data_root?"),
    ("--method ua_nt", "did you mean ua_mt?"),
    ("--method ua_mt --dataset phanton", "did you mean 'phantom'?"),
    ("--method ua_mt --protocol papr", "did you mean paper?"),
    ("--method ua_mt --network vnt", "did you mean vnet?"),
])
def test_typing_errors_name_the_nearest(capsys, line, expected):
    assert expected in turned_away(capsys, line)


@pytest.mark.parametrize(("options", "expected"), [
    ("--seed x", "seed x: expected a whole number"), ("--iterations 1.5", "iterations 1.5: expected a whole"),
    ("--patch [16,a,16]", "patch a: expected a whole"), ("--schedule stepp", "schedule stepp: expected one of step"),
    ("--device gpu", "device gpu: expected one of auto, cpu"), ("--hp.decay high", "hp.decay high: expected a number"),
    ("--labeled 0", "labeled 0: expected 1 to 80"), ("--labeled 81", "labeled 81: expected 1 to 80"),
    ("--labeled 0%", "labeled 0%: expected 1 to 80"), ("--labeled many", "expected a whole number"),
    ("--labeled x%", "expected a whole number or a share"), ("--fold 5", "split LA-cv5: fold 5, expected 0 to 4"),
    ("--protocol paper --fold 1", "fold 1, expected 0 to 0"), ("--recipe ../x", "expected paper or clean"),
    ("--augmentation [rotflip_or_rotate]", "turns whole slices"),
    ("--augmentation [rotflip,dihedral]", "augmentation rotflip, dihedral: expected one of them, or []"),
    ("--fold first", "fold 'first': expected a whole number"), ("--iterations 0", "iterations 0: expected at least 1"),
    ("--labeled_batch 0", "labeled_batch 0: expected at least 1"), ("--patch [16,16]", "expected 3 positive numbers"),
    ("--stride [0,8,8]", "expected 3 positive numbers"), ("--config absent.yaml", "absent.yaml"), ("word", "word"),
])
def test_impossible_values_are_named(capsys, options, expected):
    assert expected in turned_away(capsys, f"{USER} {options}")


@pytest.mark.parametrize("method", ["supervised", "ua_mt"])
def test_where_all_are_labeled_there_is_no_unlabeled_batch(method):
    spec = one(f"--method {method} --labeled 100%")
    assert (spec.labeled, spec.unlabeled_batch) == (80, 0)


@pytest.mark.parametrize(("part", "count"), [("8", 8), ("25%", 16), ("50%", 32), ("63", 63), ("0", 0), ("0%", 0)])
def test_a_part_of_the_unlabeled_cases(part, count):
    spec, all_of_them = one(f"{USER} --unlabeled {part}"), one(USER)
    assert (spec.unlabeled, spec.stated["unlabeled"]) == (count, count)
    assert spec.unlabeled_batch == (2 if count else 0)
    assert re.fullmatch(rf"LA-paper-16-u{count}-vnet-ua_mt-f0-s0-[0-9a-f]{{8}}", spec.id)
    assert (spec.hp_hash == all_of_them.hp_hash) == bool(count)  # without unlabeled samples the batch is another
    assert config.resolve(spec, data_prep.dataset("LA")) == [spec]


@pytest.mark.parametrize("line", [f"{USER} --unlabeled all", f"{USER} --unlabeled 64", f"{USER} --unlabeled 100%"])
def test_all_unlabeled_cases_have_one_spelling(line):
    assert one(line) == one(USER) and "unlabeled" not in one(line).stated


def test_a_part_of_what_nobody_reads_is_the_same_run():
    assert one("--method supervised --unlabeled 8") == one("--method supervised")
    assert one("--method ua_mt --labeled 80 --unlabeled 0") == one("--method ua_mt --labeled 80")


def test_every_fold_has_its_own_number_of_unlabeled_cases():
    assert {spec.unlabeled for spec in parse("--method ua_mt --protocol cv5 --fold all --unlabeled 50%")[0]} == {32}


@pytest.mark.parametrize(("control", "stated", "name"), [
    ("noise", "noise", "noise"), ("copies", "copies", "copies"), ("other:Phantom", "other:phantom", "other.phantom"),
    ("other:mine", "other:mine", "other.mine")])
def test_a_control_is_named_in_settings_and_id(control, stated, name):
    spec = one(f"{USER} --control {control}")
    assert (spec.control, spec.stated["control"], spec.hp_hash) == (stated, stated, one(USER).hp_hash)
    assert re.fullmatch(rf"LA-paper-16-vnet-ua_mt-{name}-f0-s0-[0-9a-f]{{8}}", spec.id)
    assert "control" not in one(USER).stated and config.resolve(spec, data_prep.dataset("LA")) == [spec]


@pytest.mark.parametrize(("line", "expected"), [
    (f"{USER} --unlabeled 65", "unlabeled 65: expected 0 to 64 of the other training cases, or all"),
    (f"{USER} --unlabeled -1", "unlabeled -1: expected 0 to 64"), (f"{USER} --unlabeled 101%", "expected 0 to 64"),
    (f"{USER} --unlabeled some", "unlabeled 'some': expected a whole number or a share"),
    ("--method ua_mt --dataset ACDC --protocol volumes --labeled 60 --unlabeled 11",
     "unlabeled 11: expected 0 to 10 of the other training patients"),
    (f"{USER} --control nois", "control 'nois' is not known: did you mean noise?"),
    (f"{USER} --control other", "control 'other' is not known: did you mean other:DATASET?"),
    (f"{USER} --control other:../LA", "control 'other:../LA' is not known"),
    (f"{USER} --control other:la", "control other:la: the data set of the run itself, expected another one"),
    ("--method supervised --control noise", "control noise: no unlabeled images to replace (method supervised"),
    (f"{USER} --unlabeled 0 --control noise", "no unlabeled images to replace"),
    ("--method ua_mt --labeled 80 --control copies", "no unlabeled images to replace"),
    (f"{USER} --unlabeled_batch 0 --control copies", "expected unlabeled_batch of at least 1"),
])
def test_unlabeled_data_that_cannot_be(capsys, line, expected):
    assert expected in turned_away(capsys, line)


def test_labels_are_counted_in_patients_where_each_has_several_cases(capsys):
    acdc = "--method ua_mt --dataset ACDC --protocol volumes"
    assert one(f"{acdc} --labeled 20%").labeled == 14 and one(f"{acdc} --labeled 70").unlabeled_batch == 0
    assert "labeled 71: expected 1 to 70 of the training patients" in turned_away(capsys, f"{acdc} --labeled 71")
    assert "labeled 81: expected 1 to 80 of the training cases" in turned_away(capsys, f"{USER} --labeled 81")


def test_whole_slices_have_no_stride():
    slices = "--method ua_mt --dataset ACDC --protocol slices --patch [128,128]"
    assert one(slices).stride == [128, 128] and one(f"{slices} --stride [64,64]").id == one(slices).id


def test_a_method_is_required(capsys):
    assert "method" in turned_away(capsys, "--dataset LA")


@pytest.mark.parametrize("options", [
    "--stride [18,18,4] --patch [16,16,16]",  # voxels between the windows would have no prediction
    "--augmentation [rotflp]",
    "--unlabeled_batch -1",
    "--seed -1",
    "--save_every 0",
    "--log_every 0",
    "--learning_rate -1",
    "--labeled inf%",
    "--hp.passes 0",
    "--hp.decay 2",
    "--hp.weight -1",
    "--hp.noise_limit -1",
    "--hp.ramp_every 0",
])
def test_values_that_cannot_work_are_turned_away_before_the_run(capsys, options):
    name = re.match(r"--([\w.]+)", options)[1]
    assert name.split(".")[-1] in turned_away(capsys, f"{USER} {options}")


@pytest.mark.parametrize(("options", "expected"), [
    ("--labeled_batch 4 --unlabeled_batch 2", "unlabeled_batch 2: method bcp expects as many as labeled_batch, 4"),
    ("--labeled_batch 3 --unlabeled_batch 3", "labeled_batch 3: method bcp expects a multiple of 2")])
def test_bcp_pastes_pairs_of_as_many_samples(capsys, options, expected):
    assert expected in turned_away(capsys, f"--method bcp {options}")
    assert one("--method bcp --labeled_batch 2 --unlabeled_batch 2").unlabeled_batch == 2


def test_supervised_takes_no_unlabeled_batch(capsys):
    assert "unlabeled_batch" in turned_away(capsys, "--method supervised --unlabeled_batch 2")


@pytest.mark.parametrize("method", [":Class", "json:", "no_such_module:Class", "json:Class"])
def test_methods_from_elsewhere_that_are_not_there(capsys, method):
    assert "method" in turned_away(capsys, f"--method {method}")


@pytest.mark.parametrize(("text", "expected"), [
    ("method: ua_mt\nlabelled: 4\n", "labeled"),
    ("method: ua_mt\nhp:\n  decy: 0.5\n", "hp.decay"),
    ("method: ua_mt\nseed: x\n", "seed"),
    ("method: ua_mt\nhp: 3\n", "hp"),
    ("method: ua_nt\n", "ua_mt"),
    ("method: [}\n", "run.yaml"),
    ("- ua_mt\n", "onfig"),
    ("", "onfig"),
])
def test_a_file_that_cannot_work_is_one_line(tmp_path, capsys, text, expected):
    assert expected in turned_away(capsys, f"--config {write(tmp_path / 'run.yaml', text)}")


def test_a_file_that_is_not_text_is_one_line(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert "run.yaml" in turned_away(capsys, f"--config {file}")


@pytest.mark.parametrize("line", ["--method supervised --config {}", "--config {} --method supervised"])
def test_the_order_of_file_and_command_line_keeps_method_and_defaults_together(tmp_path, line):
    """Whichever of the two methods wins, its own hyper-parameters and batch sizes must come with it."""
    spec = one(line.format(write(tmp_path / "run.yaml", "method: ua_mt\n")))
    plain = one(f"--method {spec.method}")
    assert (spec.hp, spec.unlabeled_batch) == (plain.hp, plain.unlabeled_batch)


@pytest.mark.parametrize("line", ["--dataset phantom --config {}", "--config {} --dataset phantom"])
def test_the_order_of_file_and_command_line_keeps_data_set_and_defaults_together(tmp_path, line):
    spec = one(line.format(write(tmp_path / "run.yaml", "method: ua_mt\ndataset: LA\n")))
    assert spec == one(f"--method ua_mt --dataset {spec.dataset}")
