"""What decides a result (`RunSpec`), what does not (`RunOptions`), and the command line made from the two.

Defaults come from the data set's protocol and the method's `Config`; `--config` and the command line go over them.
No torch here unless a method is named, so that `--help` is quick.
"""
import argparse
import dataclasses
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ArgumentParser

import data_prep
import networks
from ssl4mis import controls, registry
from ssl4mis.errors import UserError
from ssl4mis.records import digest

# what a group of comparable runs may differ in
NOT_HYPER = ("dataset", "protocol", "recipe", "labeled", "unlabeled", "control", "fold", "seed")

LONGEST = 2**14  # characters of a config file; the parser takes minutes for some that are longer

# settings that the first records do not have, and what they were there
YOUNGER = {"recipe": "", "evaluation_precision": "32-true", "unlabeled": "all", "control": ""}


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that decides the result of a run; its hash is part of the run's id.

    Args:
        method: a name that --list shows, or package.module:Class.
        dataset: a name that --list shows, or the folder of a prepared data set.
        protocol: of the data set: split, resolution and defaults for what follows; cv5 where only a fold is named.
        labeled: number of labeled training cases (of patients where each has several), or a share of them such as 20%.
        unlabeled: number of the other training cases that are read, without labels, a share such as 50%, or all.
        control: noise, copies (of labeled images) or other:DATASET for the unlabeled images; no method may gain by it.
        fold: of the protocol's split, or all.
        recipe: how raw scans became cases, paper or clean; empty for the protocol's.
        seed: of weights, batches, dropout and noise.
        network: backbone.
        width: channels at full resolution; they double at each level.
        patch: voxels per axis, written [112,112,80].
        stride: of the sliding window, voxels per axis, written [18,18,4]; it is part of what a score means.
        iterations: over all stages; ramps and learning-rate drops scale with it.
        labeled_batch: labeled samples per step.
        unlabeled_batch: unlabeled samples per step.
        learning_rate: of SGD.
        schedule: of the learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
        clip: largest gradient norm; 0 for none.
        augmentation: of the training patches, written [rotflip], or [] for none; [dihedral] has all eight
            orientations of the plane, [rotflip] the four mirrored ones alone, as in the published code.
        precision: of training; auto takes bf16 where the processor has it.
        evaluation_precision: of the predictions that are scored; bf16-mixed is faster and moves scores a little.
        storage: how training images are kept in memory.
        hp: hyper-parameters of the method.
    """

    method: str
    dataset: str = "LA"
    protocol: str = "paper"
    labeled: int | str = 16
    unlabeled: int | str = "all"
    control: str = ""
    fold: int | str = 0
    recipe: str = ""
    seed: int = 0
    network: str = "vnet"
    width: int = 16
    patch: list[int] = field(default_factory=list)
    stride: list[int] = field(default_factory=list)
    iterations: int = 6000
    labeled_batch: int = 2
    unlabeled_batch: int = 2
    learning_rate: float = 0.01
    schedule: Literal["step", "poly", "constant"] = "step"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 0.0
    augmentation: list[str] = field(default_factory=list)
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    evaluation_precision: Literal["32-true", "bf16-mixed"] = "32-true"
    storage: Literal["float32", "float16"] = "float32"
    hp: dict = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Readable name of the run, unique by its hash."""
        method = re.sub(r"[^\w.]+", ".", self.method)
        part = () if self.unlabeled == "all" else (f"u{self.unlabeled}",)
        control = (self.control.replace(":", "."),) if self.control else ()
        parts = (self.dataset, self.protocol, self.labeled, *part, self.network, method, *control, f"f{self.fold}",
                 f"s{self.seed}", digest(self.stated))
        return "-".join(map(str, parts))

    @property
    def stated(self) -> dict:
        """The settings by name; those younger than the first records only where they are set, so that ids stay."""
        return {name: value for name, value in dataclasses.asdict(self).items()
                if name not in YOUNGER or value != YOUNGER[name]}

    @property
    def hp_hash(self) -> str:
        """Hash of what all folds and seeds of one leaderboard row share, data set and protocol apart."""
        return digest({name: value for name, value in self.stated.items() if name not in NOT_HYPER})


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What leaves the result as it is.

    Args:
        device: cpu, cuda, or auto.
        data_root: folder of the data set; default is the environment variable SSL4MIS_DATA.
        out: folder for records and runs.
        log_every: iterations between logged losses.
        save_every: iterations between checkpoints.
        keep_every: iterations between weights that stay, for --peek_test; 0 for none, or for a tenth of a peeked run.
        compile: the networks in training, by torch.compile; reduce-overhead makes CUDA graphs, which spares launches.
        checkpointing: recompute activations in the backward pass: less memory for more time, the same result.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    data_root: Path | None = None
    out: Path = Path("results")
    log_every: int = 25
    save_every: int = 250
    keep_every: int = 0
    compile: Literal["none", "default", "reduce-overhead"] = "none"
    checkpointing: bool = False


WRONG_VALUE = (r'Parser key "([\w.]+)": Expected an? (?:<class \'(\w+)\'>|typing\.Literal\[(.*?)\])\. '
               r"Got value: (.*)")
KINDS = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a word"}


def expected(found: re.Match) -> str:
    """jsonargparse's message of a wrong value in the words of this suite, without Python's names of types."""
    name, kind, choices, value = found.groups()
    wanted = KINDS.get(kind, kind) if kind else "one of " + choices.replace("'", "")
    return f"{name} {value}: expected {wanted}"


class Parser(ArgumentParser):
    """A parser whose errors are one line and name the nearest option."""

    def error(self, message, ex=None):
        text = re.sub(WRONG_VALUE, expected, " ".join(str(message).split()))
        known = [o.lstrip("-") for action in self._actions for o in action.option_strings]
        own = isinstance(message, Exception)  # a line of ours, which may name options of other commands
        for wrong in () if own else re.findall(r"--([\w.]+)|(?:[Kk]ey|[Oo]ption) '([\w.-]+)'", text):
            name = wrong[0] or wrong[1]
            if name not in known:
                text = registry.nearest("option", name, known)
        print(f"{self.prog}: error: {text}", file=sys.stderr)
        sys.exit(2)


def in_order(argv: list[str]) -> list[str]:
    """The command line with `--data-root` spelled `--data_root`, and config files first: the rest goes over them."""
    words = [re.sub(r"^--[\w.-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    files, rest = [], []
    while words:
        word = words.pop(0)
        if word == "--config" and words:
            files += [word, words.pop(0)]
        else:
            (files if word.startswith("--config=") else rest).append(word)
    return files + rest


def peek(argv: list[str]) -> dict[str, str]:
    """Method, data set (and its folder), protocol and fold that the command line or its config files name.

    They decide the other defaults.

    UserError naming a config file that is not a YAML mapping.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("--config", action="append", default=[], type=Path)
    scan.add_argument("--data_root", type=Path)
    for name in ("method", "dataset", "protocol", "fold"):
        scan.add_argument(f"--{name}")
    try:
        named = vars(scan.parse_known_args(argv)[0])
    except argparse.ArgumentError:  # the real parser will say what is wrong
        return {}
    found = {}
    for file in named.pop("config"):
        try:
            text = file.read_text(encoding="utf-8")
            if len(text) > LONGEST:
                raise ValueError(f"{len(text)} characters, at most {LONGEST} are read")
            settings = yaml.safe_load(text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"config {file}: expected a YAML file ({error})") from None
        if not isinstance(settings, dict):
            raise UserError(f"config {file}: expected a YAML mapping of options, found {type(settings).__name__}")
        found |= {k: str(v) for k, v in settings.items() if k in named and v is not None}
    return found | {k: v for k, v in named.items() if v is not None}


def make_parser(argv: list[str], prog: str = "run.py") -> Parser:
    """The parser for a command line; method, data set and protocol in it decide defaults and the `--hp.*` options."""
    parser = Parser(prog=prog, allow_abbrev=False,
                    description="Train one method on one data set, evaluate it, write one record. "
                                "The same command again resumes; a finished run is left alone.")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--list", action="store_true", help="show methods, networks, data sets and protocols")
    parser.add_argument("--describe", metavar="METHOD", help="print a method's card: idea, options, cost, scores")
    parser.add_argument("--memory_plan", action="store_true", help="say what memory the run will need; train nothing")
    parser.add_argument("--reproduce", metavar="RECORD", help="run a record again and say whether the result holds")
    parser.add_argument("--peek_test", action="store_true",
                        help="score the kept weights on the test list, too, for the report's selection gap; no ranking "
                             "can read them")
    parser.add_class_arguments(RunSpec, skip={"hp"})
    parser.add_class_arguments(RunOptions)
    try:
        named = peek(argv)
        spec, folder = data_prep.locate(named.get("dataset", "LA"), named.get("data_root"))
        # a fold says that there are several; the first protocol of a data set has one
        folds = "cv5" if "fold" in named and "cv5" in spec.protocols else None
        protocol = find_protocol(spec, named.get("protocol", folds))
        defaults = {"dataset": spec.name, "protocol": protocol.name, "labeled": protocol.labeled[-1]}
        if folder and folder.is_dir():
            defaults["recipe"] = data_prep.recipe_at(folder, spec.name)
        shared = {f.name for f in dataclasses.fields(RunSpec)} & {f.name for f in dataclasses.fields(protocol)}
        for name in shared - {"labeled", "recipe"}:
            value = getattr(protocol, name)
            defaults[name] = list(value) if isinstance(value, tuple) else value
        if "method" in named:
            method = registry.method_class(named["method"])
            parser.add_class_arguments(method.Config, "hp")
            defaults |= method_defaults(method, spec, protocol)
        parser.set_defaults(defaults)
    except (UserError, data_prep.DataError) as error:
        parser.error(error)
    return parser


def method_defaults(method: type, dataset, protocol) -> dict:
    """What a method's preset for a data set changes, by option: hyper-parameters, run settings, published length."""
    from ssl4mis.method import Preset

    preset = method.presets.get(dataset.name, Preset())
    if preset.dims not in (None, dataset.dims(protocol)):
        preset = Preset()
    defaults = {f"hp.{name}": value for name, value in preset.hp.items()} | preset.run
    if preset.iterations and protocol.published:
        defaults["iterations"] = preset.iterations
    if not method.needs.unlabeled:
        defaults["unlabeled_batch"] = 0
    return defaults


def catalog() -> str:
    """Methods, networks, data sets and protocols, a line each."""
    lines = ["methods", *(f"  {name:21} {registry.title(name)}" for name in registry.names())]
    folder = Path(networks.__file__).parent
    lines += ["networks", *(f"  {name:21} {registry.title(name, folder)}" for name in networks.NAMES), "data sets"]
    for dataset in map(data_prep.dataset, data_prep.names()):
        lines.append(f"  {dataset.name:21} {dataset.title}")
        lines += [f"    {p.name:12} {p.about}" for p in dataset.protocols.values()]
    return "\n".join(lines)


def find_protocol(dataset, name: str | None):
    """A protocol of a data set, the first one without a name; UserError naming the nearest one."""
    if name is None:
        return next(iter(dataset.protocols.values()))
    if name not in dataset.protocols:
        raise UserError(registry.nearest(f"protocol of {dataset.name}", name, dataset.protocols))
    return dataset.protocols[name]


def parse(argv: list[str], prog: str = "run.py") -> tuple[list[RunSpec], RunOptions]:
    """A command line to resolved runs (several for `--fold all`); exits with status 2 and one line on bad input."""
    argv = in_order(argv)
    parser = make_parser(argv, prog)
    try:
        settings = parser.parse_args(argv).as_dict()
    except (OverflowError, RecursionError) as error:
        parser.error(UserError(f"a value that no setting can have ({error})"))
    hp = settings.get("hp")
    nested = {f"hp.{name}": value for name, value in hp.items()} if isinstance(hp, dict) else {}
    for name, value in (settings | nested).items():
        if value is None and parser.get_defaults().get(name) is not None:  # `seed:` in YAML
            parser.error(UserError(f"{name}: no value, expected one"))
    options = RunOptions(**{f.name: settings[f.name] for f in dataclasses.fields(RunOptions)})
    spec = RunSpec(**{f.name: settings[f.name] for f in dataclasses.fields(RunSpec) if f.name in settings})
    try:
        for name in ("log_every", "save_every"):
            at_least(1, name, getattr(options, name))
        at_least(0, "keep_every", options.keep_every)
        if settings["peek_test"] and not options.keep_every:
            options = dataclasses.replace(options, keep_every=max(1, spec.iterations // 10))
        if options.checkpointing and options.compile != "none":
            raise UserError(f"compile {options.compile}: expected none with checkpointing True")
        dataset, root = data_prep.locate(spec.dataset, options.data_root)
        return resolve(spec, dataset), dataclasses.replace(options, data_root=root)
    except (UserError, data_prep.DataError) as error:
        parser.error(error)


def resolve(spec: RunSpec, dataset) -> list[RunSpec]:
    """Canonical names, counts for shares, one spec per fold; UserError or DataError on impossible values."""
    protocol = find_protocol(dataset, spec.protocol)
    check_values(spec, dataset.dims(protocol), protocol.slices)
    split = data_prep.load_split(protocol.split, 0, dataset.splits)
    folds = range(split.folds) if spec.fold == "all" else [whole_number("fold", spec.fold)]
    known = dataclasses.replace(spec, method=registry.canonical(spec.method), dataset=dataset.name,
                                recipe="" if spec.recipe == protocol.recipe else spec.recipe,
                                control=controls.canonical(spec.control, dataset.name),
                                stride=spec.patch if protocol.slices else spec.stride)  # whole slices have no stride
    takes = registry.method_class(spec.method).needs.unlabeled
    runs = []
    for fold in folds:
        split = data_prep.load_split(protocol.split, fold, dataset.splits)
        unit = "patients" if split.per_patient > 1 else "cases"
        labeled = case_count("labeled", spec.labeled, 1, split.patients, f"training {unit}")
        left, part = split.unlabeled(labeled), spec.unlabeled
        most = len(left) // split.per_patient
        if part != "all":
            part = case_count("unlabeled", part, 0, most, f"other training {unit}, or all")
        batch = spec.unlabeled_batch if left and part else 0
        if part == most or not takes:
            part = "all"  # one id for one run
        if known.control and not batch:
            raise UserError(f"control {known.control}: no unlabeled images to replace (method {known.method}, labeled "
                            f"{labeled}, unlabeled {part}), expected unlabeled_batch of at least 1")
        runs.append(dataclasses.replace(known, fold=fold, labeled=labeled, unlabeled=part, unlabeled_batch=batch))
    return runs


def check_values(spec: RunSpec, dims: int, slices: bool = False) -> None:
    """UserError, one line, on values that cannot work, alone or together."""
    from ssl4mis.augment import NAMES

    method = registry.method_class(spec.method)
    if spec.network not in networks.NAMES:
        raise UserError(registry.nearest("network", spec.network, networks.NAMES))
    if spec.recipe and not re.fullmatch(r"\w+", spec.recipe):
        raise UserError(f"recipe {spec.recipe!r}: expected paper or clean")
    for name in spec.augmentation:
        if name not in NAMES:
            raise UserError(registry.nearest("augmentation", name, NAMES))
        if name == "rotflip_or_rotate" and not slices:
            raise UserError(f"augmentation {name}: turns whole slices, expected rotflip, dihedral or [] for crops")
    if len(spec.augmentation) > 1:
        raise UserError(f"augmentation {', '.join(spec.augmentation)}: expected one of them, or []")
    for name in ("patch", "stride"):
        if len(getattr(spec, name)) != dims or min(getattr(spec, name)) < 1:
            raise UserError(f"{name} {getattr(spec, name)}: expected {dims} positive numbers")
    if not slices and any(step > side for step, side in zip(spec.stride, spec.patch, strict=True)):
        raise UserError(f"stride {spec.stride}: expected at most the patch {spec.patch}, or voxels are left out")
    for name in ("iterations", "labeled_batch", "width"):
        at_least(1, name, getattr(spec, name))
    for name in ("seed", "unlabeled_batch", "learning_rate", "momentum", "weight_decay", "clip"):
        at_least(0, name, getattr(spec, name))
    if spec.unlabeled_batch and not method.needs.unlabeled:
        raise UserError(f"unlabeled_batch {spec.unlabeled_batch}: method {spec.method} expects 0")
    if method.needs.equal and spec.unlabeled_batch not in (0, spec.labeled_batch):
        raise UserError(f"unlabeled_batch {spec.unlabeled_batch}: method {spec.method} expects as many as "
                        f"labeled_batch, {spec.labeled_batch}")
    for name in ("labeled_batch", "unlabeled_batch"):
        if getattr(spec, name) % method.needs.multiple:
            raise UserError(f"{name} {getattr(spec, name)}: method {spec.method} expects a multiple of "
                            f"{method.needs.multiple}")
    try:
        method.Config(**spec.hp)
    except TypeError as error:
        raise UserError(f"hp {spec.hp}: not the hyper-parameters of {spec.method} ({error})") from None


def at_least(least: float, name: str, value: float) -> None:
    """UserError unless the value is that large."""
    if not value >= least:
        raise UserError(f"{name} {value}: expected at least {least}")


def whole_number(name: str, value) -> int:
    """An int from what the command line gave; UserError otherwise."""
    try:
        return int(str(value))
    except ValueError:
        raise UserError(f"{name} {value!r}: expected a whole number") from None


def case_count(name: str, value: int | str, least: int, most: int, unit: str) -> int:
    """16, "16" or "20%" of `most` cases or patients as a count; UserError outside least..most."""
    text = str(value)
    try:
        count = round(float(text[:-1]) / 100 * most) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):
        raise UserError(f"{name} {text!r}: expected a whole number or a share such as 20%") from None
    if not least <= count <= most:
        raise UserError(f"{name} {text}: expected {least} to {most} of the {unit}")
    return count
