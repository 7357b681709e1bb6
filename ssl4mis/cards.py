"""Method cards: what a method is, what it asks for, costs and scores, from its code and the run records.

Nothing in a card is written by hand. Networks are counted as built for LA at full size, and samples are counted while
they pass through small ones, so that a card says what the code does.
"""
import argparse
import dataclasses
import re
import sys
import typing
from collections import Counter
from functools import lru_cache
from inspect import getmodule
from pathlib import Path

import torch
from docstring_parser import DocstringStyle, ParseError, parse

import data_prep
import networks
from networks.base import NetSpec, SegNet
from ssl4mis import docstring, leaderboard, registry
from ssl4mis.batch import Batch, Clock, Half
from ssl4mis.config import RunSpec
from ssl4mis.errors import UserError
from ssl4mis.leaderboard import markdown_table
from ssl4mis.method import Phase, Preset, Stage, Task
from ssl4mis.passes import count_samples, segnets

DATASET, PROTOCOL = "LA", "paper"  # whose recipe is built and measured
LABELED = 16  # whose scores are in the overview
SIDE, WIDTH, TOTAL = 32, 2, 1000  # voxels, channels and steps of the measurement
MORE = r"[;:,(]| read in "  # where the short name of a source ends
INTRODUCTION = """# Methods

Generated from the code, the published numbers and the run records by `python benchmarks/methods.py`: do not edit.
`python benchmarks/run.py --describe NAME` prints one card, also of a method that lives elsewhere.
"""
OVERVIEW = f"""\
As built for {DATASET}. Passes are samples that go through a network and a decoder per sample of the batch, in a step of
the last stage: with a gradient + without one. Scores are mean Dice in %, the smallest and the largest; published ones
are those of papers and of their re-runs by others, with splits and checkpoints of their own, so ours stand beside them
and not in one ranking.
"""
COMPARABLE = """\
Comparable only where protocol and selection agree: ours are means over runs of the last weights, ± the standard
deviation over seeds; papers differ in split, checkpoint (often the best one on the test list) and treatment of empty
masks, and where ours follows them, it is said where it stands in their range. Sources in full are in
`results/reported.csv`, all our columns in `results/leaderboard.csv`.
"""


def meanings(config: type) -> dict[str, str]:
    """What a `Config`'s docstring says of each hyper-parameter."""
    try:
        documented = parse(config.__doc__ or "", DocstringStyle.GOOGLE).params
    except ParseError:
        return {}
    return {name: docstring.flat(p.description or "") for p in documented for name in re.split(r", *", p.arg_name)}


def type_text(kind) -> str:
    """A type for readers: `float`, or the values of a Literal."""
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def make(cls: type, width: int, patch):
    """A method with its recipe for LA and networks of this size."""
    dataset, preset = data_prep.dataset(DATASET), cls.presets.get(DATASET, Preset())
    task = Task(len(dataset.classes), dataset.spatial_dims, len(dataset.modalities))
    spec = NetSpec(task.channels, tuple(patch), width, dataset.spacing)
    build = networks.Build(preset.run.get("network", RunSpec.network), task.classes, spec)
    return cls(build, task, cls.Config(**preset.hp))


def batch_sizes(cls: type) -> tuple[int, int]:
    """Labeled and unlabeled samples of the measured step: two each, or the recipe's where a method needs a multiple."""
    run = cls.presets.get(DATASET, Preset()).run if cls.needs.multiple > 1 else {}
    least = max(2, cls.needs.multiple)
    return run.get("labeled_batch", least), run.get("unlabeled_batch", least) if cls.needs.unlabeled else 0


def random_batch(task: Task, needs, labeled: int, unlabeled: int) -> Batch:
    """A batch of noise with every class in the labels, and all that the method needs."""
    space = (SIDE,) * task.spatial_dims
    image = torch.randn(labeled + unlabeled, task.channels, *space)
    label = (torch.arange(SIDE) * task.classes // SIDE).to(torch.uint8).expand(labeled, *space).contiguous()

    def half(images):
        strong = tuple(torch.randn_like(images) for _ in range(needs.strong))
        valid = torch.ones(len(images), *space, dtype=torch.bool) if strong else None
        return Half(images, None, ("unlabeled",) * len(images), strong, valid)

    partner = half(torch.randn_like(image[labeled:])) if needs.partner else None
    return Batch(image, Half(image[:labeled], label, ("labeled",) * labeled), half(image[labeled:]), partner)


def measure(cls: type) -> tuple[dict[str, Counter], list[str]]:
    """Stage -> samples through each network in one of its last steps, all phases; and the networks that predict."""
    method = make(cls, WIDTH, (SIDE,) * data_prep.dataset(DATASET).spatial_dims)
    batch, counts, found = random_batch(method.task, cls.needs, *batch_sizes(cls)), count_samples(method), {}
    for stage in method.stages():
        method.enter(stage.name)
        method.train()
        counts.clear()
        for phase in stage.phases:
            clock = Clock(torch.tensor(TOTAL - 1), TOTAL, stage.name, phase.name)
            method(batch, clock)
        method.after_step(clock)
        found[stage.name] = counts.copy()
    counts.clear()
    with torch.no_grad():
        method.eval().predict(batch.image[:1])
    return found, sorted({name for name, _, _ in counts})


def numbers(results: Path, broken=None) -> list[dict[str, str]]:
    """Leaderboard rows, measured and published, of a results folder; none where there is no such folder.

    UserError; for a broken record only where `broken` is not given, as of `records.read_all`.
    """
    if not results.is_dir():
        return []
    try:
        return leaderboard.read_table(results, broken)
    except ValueError as error:
        raise UserError(str(error)) from None


def card(name: str, table=()) -> str:
    """The card of a method as Markdown, with its rows of a leaderboard table; UserError for an unknown name."""
    name = registry.canonical(name)
    cls = registry.method_class(name)
    text = docstring.read(getmodule(cls).__doc__ or cls.__doc__)
    parts = [f"## {name}\n", f"{text.title}\n", f"{text.idea}\n", facts(text, cls.needs)]
    parts += section("Hyper-parameters", hyper_parameters(cls.Config))
    parts += section("Presets", presets(cls))
    parts += section("Networks and steps", cost(cls))
    parts += section("Differs from the code", "".join(f"- {item}\n" for item in text.differs))
    parts += section("Published and ours", scores(name, table))
    return "\n".join(part for part in parts if part.strip())


def document(table=()) -> str:
    """All methods of this package: a table, with what is on top of their networks, and the cards."""
    names = [name for name in registry.names() if (registry.FOLDER / f"{name}.py").is_file()]
    rows, texts = [], []
    for name in names:
        rows.append([f"[{name}](#{name})", *summary(name), *dice_range(name, table)])
        texts.append(card(name, table))
    title, header = f"{DATASET}, {LABELED} labeled", ["method", "family", "networks", "passes", "heads and more"]
    overview = markdown_table([*header, f"published ({title})", f"ours ({title})"], rows)
    return "\n".join([INTRODUCTION, OVERVIEW, overview, *texts])


def summary(name: str) -> list[str]:
    """Family, networks, samples that pass with and without gradient in a step, and other heads and modules."""
    cls = registry.method_class(name)
    method, (measured, _) = build(cls)
    nets, batch = segnets(method), sum(batch_sizes(cls))
    kinds = Counter((type(net.backbone).__name__, any(p.requires_grad for p in net.parameters()))
                    for net in nets.values())
    passed = {gradient: sum(n for (_, part, g), n in last(measured).items() if part == "decoded" and g == gradient)
              for gradient in (True, False)}
    more = [f"{head} {size}" for net in nets.values() for head, size in head_sizes(net) if head != "seg"]
    more += [f"{count} more decoder" + "s" * (count > 1) for net in nets.values() if (count := len(net.branches))]
    if others := outside(method):
        more.append(f"{millions(others)[0]} M outside of the networks")
    family = docstring.read(getmodule(cls).__doc__).family
    return [family, ", ".join(f"{n} {kind}" + " (average)" * (not trained) for (kind, trained), n in kinds.items()),
            f"{passed[True] / batch:.3g} + {passed[False] / batch:.3g}", ", ".join(dict.fromkeys(more))]


def last(measured: dict):
    """The samples of the last stage, which has the most of a run."""
    return list(measured.values())[-1]


def dice_range(name: str, table) -> list[str]:
    """The smallest and the largest mean Dice that is published, and that we measured, with the number of runs."""
    rows = [row for row in table if (row["method"], row["dataset"], row["labeled"]) == (name, DATASET, str(LABELED))
            and row["Dice"] and not row["control"]]
    cells = []
    for ours in (False, True):
        found = [row for row in rows if (row["source"] == "measured") == ours]
        values = [float(row["Dice"]) for row in found]
        text = "–".join(f"{value:.2f}" for value in dict.fromkeys((min(values), max(values)))) if values else ""
        if ours and found:
            runs = sum(int(row["runs"]) for row in found)
            text += f" ({', '.join(sorted({row['protocol'] for row in found}))}; {runs} run{'s' * (runs > 1)})"
        cells.append(text)
    return cells


def section(title: str, body: str) -> list[str]:
    """A heading and its text; nothing where there is no text."""
    return [f"### {title}\n", body] if body else []


def facts(text: docstring.Text, needs) -> str:
    """Paper, code and what the loader must provide, a line each."""
    paper = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", text.paper)
    code = re.sub(r"^[\w.-]+/[\w.-]+\w", r"[\g<0>](https://github.com/\g<0>)", text.code)
    asks = ["" if needs.unlabeled else "labeled samples only",
            f"batch sizes in multiples of {needs.multiple}" if needs.multiple > 1 else "",
            "as many unlabeled samples as labeled ones" if needs.equal else "",
            f"strongly augmented views of each unlabeled sample: {needs.strong}" if needs.strong else "",
            "a second draw of unlabeled samples" if needs.partner else ""]
    lines = {"Paper": paper, "Code": code, "Needs": "; ".join(filter(None, asks))}
    return "".join(f"- {label}: {line}\n" for label, line in lines.items() if line)


def hyper_parameters(config: type) -> str:
    """Type, default and meaning of every hyper-parameter."""
    told, kinds, hp = meanings(config), typing.get_type_hints(config), config()
    lines = [[f"`{f.name}`", type_text(kinds[f.name]), getattr(hp, f.name), told.get(f.name, "")]
             for f in dataclasses.fields(config)]
    return markdown_table(["`--hp.`", "type", "default", "meaning"], lines) if lines else ""


def presets(cls: type) -> str:
    """What the method's authors did otherwise on each data set."""
    lines = [[dataset, settings({f"hp.{key}": value for key, value in preset.hp.items()} | preset.run),
              preset.iterations or ""] for dataset, preset in sorted(cls.presets.items())]
    return markdown_table(["data set", "settings", "published iterations"], lines) if lines else ""


def settings(values: dict) -> str:
    """Options as they are written on the command line."""
    return ", ".join(f"`{key} {str(value).replace(' ', '')}`" for key, value in values.items())


def cost(cls: type) -> str:
    """Networks at full size, stages, and the samples that pass through each network in a step."""
    protocol = data_prep.dataset(DATASET).protocols[PROTOCOL]
    method, (measured, predicting) = build(cls)
    nets = segnets(method)
    rows = [[f"`{name}`", type(net.backbone).__name__, heads(net), *millions(net.parameters())]
            for name, net in nets.items()]
    if others := outside(method):
        rows.append(["outside of them", "", "", *millions(others)])
    steps = [[f"`{stage}`", f"`{name}`", *(samples(counts, name, gradient) for gradient in (True, False))]
             for stage, counts in measured.items() for name in nets if any(key[0] == name for key in counts)]
    labeled, unlabeled = batch_sizes(cls)
    return "\n".join([
        f"As built for {DATASET}, protocol {PROTOCOL} (width {protocol.width}, patch "
        f"{'x'.join(map(str, protocol.patch))}):\n",
        markdown_table(["network", "backbone", "heads", "parameters (M)", "trained (M)"], rows),
        f"Samples through each network in one step, late in the stage, of a batch of {labeled} labeled and {unlabeled} "
        f"unlabeled samples; prediction takes {' and '.join(f'`{name}`' for name in predicting)}:\n",
        markdown_table(["stage", "network", "with gradient", "without gradient"], steps),
        "Stages:\n", "".join(map(stage_line, method.stages())),
    ])


@lru_cache(1)  # full-size networks: one method after another
def build(cls: type):
    """A method at full size, without content, and what `measure` finds."""
    protocol = data_prep.dataset(DATASET).protocols[PROTOCOL]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(cls, protocol.width, protocol.patch), measure(cls)


def outside(method) -> list:
    """The parameters that are in none of a method's networks."""
    inside = {parameter for net in segnets(method).values() for parameter in net.parameters()}
    return [parameter for parameter in method.parameters() if parameter not in inside]


def heads(net: SegNet) -> str:
    """Names, channels and decoder levels of a network's heads, and how many more decoders it has."""
    found = ", ".join(f"{name} {size}" for name, size in head_sizes(net))
    return found + (f"; {len(net.branches)} more decoders" if net.branches else "")


def head_sizes(net: SegNet) -> list[tuple[str, str]]:
    """Name, and channels with the decoder level, of each head."""
    return [(name, f"{head.conv.out_channels}" + (f" (level {head.level})" if head.level else ""))
            for name, head in net.heads.items()]


def millions(parameters) -> list[str]:
    """How many scalars there are and how many are trained, in millions."""
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in parameters]
    return [f"{sum(column) / 1e6:.3f}" for column in zip(*sizes, strict=True)]


def samples(counts: Counter, name: str, gradient: bool) -> str:
    """How many samples a network saw; encoder and decoder apart where they differ."""
    encoded, decoded = (counts[name, part, gradient] for part in ("encoded", "decoded"))
    return str(encoded) if encoded == decoded else f"{encoded} encoded, {decoded} decoded"


def stage_line(stage: Stage) -> str:
    """A stage in words."""
    schedule = "the run's schedule" if stage.schedule is None else f"schedule {stage.schedule}"
    if stage.drop != Stage().drop:
        schedule += f" (a drop after every {stage.drop:.4g} of the stage)"
    phases = " and ".join(map(phase_words, stage.phases))
    return f"- `{stage.name}`: {100 * stage.share:.4g} % of the run; {phases}; {schedule}\n"


def phase_words(phase: Phase) -> str:
    """A phase by its name, with the optimizer and the schedule that are not the run's."""
    own = [*([f"Adam, rate {phase.adam.rate:g}"] if phase.adam else []),
           *([f"schedule {phase.schedule}"] if phase.schedule else [])]
    return f"`{phase.name}`" + (f" ({', '.join(own)})" if own else "")


def scores(name: str, table) -> str:
    """Ours and the published Dice by data set and number of labeled cases."""
    mine = sorted((row for row in table if row["method"] == name),
                  key=lambda row: (row["dataset"], int(row["labeled"] or 0)))  # stable: ours stay first
    if not mine:
        return ""
    header = ["data set", "labeled", "unlabeled", "Dice (%)", "runs", "protocol or split", "source"]
    return markdown_table(header, map(score_cells, mine)) + "\n" + COMPARABLE


def score_cells(row: dict[str, str]) -> list[str]:
    """A leaderboard row, shortened."""
    head = [row["dataset"], row["labeled"], row["unlabeled"]]
    if row["source"] != "measured":
        return [*head, row["Dice"], "", row["split"], re.split(MORE, row["reference"])[0].strip()]
    dice = row["Dice"] + (f" ± {row['Dice_sd_seeds']}" if row["Dice_sd_seeds"] else "")
    where = f"{row['protocol']}, {row['split']}, {row['network']}, {row['batch']}, {row['precision']}"
    states = {f"control {row['control']}": row["control"], "folds missing": row["complete"] != "yes",
              f"{row['versus_published']} published": row["versus_published"]}
    told = "".join(f", {state}" for state, holds in states.items() if holds)
    return [*head, f"**{dice}**", row["runs"], where, f"ours, settings {row['hp_hash']}{told}"]


def show(argv: list[str]) -> int:
    """Print the card that `--describe NAME` asks for; exit status 2 and one line where the name is not known."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--describe", nargs="?", const="")
    try:
        table = numbers(Path("results"), lambda error: print(error, file=sys.stderr))
        print(card(scan.parse_known_args(argv)[0].describe, table), end="")
    except UserError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    return 0
