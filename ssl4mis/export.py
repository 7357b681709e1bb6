"""What a trained model is apart from its run: a card of plain values and the tensors of its method.

Both come from the folder of a run or from an exported model, `model.safetensors` with `card.json` beside it; nothing in
an exported model is unpickled.
"""
import hashlib
import inspect
import json
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

import data_prep
from data_prep.volumes import whole_file
from ssl4mis import __version__, checkpoint, records, registry
from ssl4mis.config import RunSpec, find_protocol
from ssl4mis.errors import UserError
from ssl4mis.selection import run_scores

SCHEMA = 1
WEIGHTS, CARD = "model.safetensors", "card.json"
LICENSE = ("Code: Apache-2.0. Weights carry the terms of the data they were trained on: cite data and method, and see "
           "the data set's own terms before passing them on.")


def export(name: str, results: Path, output: Path, say=print) -> Path:
    """Write `output`/<id>/model.safetensors and card.json of a run; returns that folder.

    The card is written last and knows the checksum of the tensors, so that half an export is none. UserError where
    there is no such run or only its record is left.
    """
    card, tensors = read_run(find(name, results), say)
    data = _safetensors(tensors)
    card["weights"] = {"file": WEIGHTS, "sha256": hashlib.sha256(data).hexdigest(), "tensors": len(tensors),
                       "numbers": sum(tensor.numel() for tensor in tensors.values())}
    folder = output / card["id"]
    with whole_file(folder / WEIGHTS) as temporary:
        temporary.write_bytes(data)
    with whole_file(folder / CARD) as temporary:
        temporary.write_text(json.dumps(card, indent=1, allow_nan=False) + "\n", encoding="utf-8", newline="\n")
    return folder


def read(name: str, results: Path, say=print) -> tuple[dict, dict[str, Tensor]]:
    """Card and tensors of a run, by its id, the start of it or its folder, or of the folder of an exported model."""
    folder = find(name, results)
    return read_exported(folder) if (folder / CARD).exists() else read_run(folder, say)


def find(name: str, results: Path) -> Path:
    """The folder behind a run's id, the beginning of one, or a path; UserError naming the nearest id."""
    place = Path(name).expanduser()
    if any((place / file).is_file() for file in (CARD, "config.json")):
        return place
    runs = {path.parent.name: path.parent for path in sorted((results / "runs").glob("*/config.json"))}
    recorded = {path.stem: None for path in sorted((results / "records").glob("*.json"))}
    for known in (runs, recorded):
        found = [name] if name in known else [key for key in known if key.startswith(name)]
        if len(found) > 1:
            more = ", ..." if len(found) > 4 else ""
            raise UserError(f"run {name!r}: {len(found)} runs begin so, expected one: {', '.join(found[:4])}{more}")
        if found and known is runs:
            return runs[found[0]]
        if found:
            raise UserError(f"run {found[0]}: only its record is in {results}, expected its last checkpoint in "
                            f"{results / 'runs' / found[0]}; copy that folder here, or train it again (run.py)")
    if place.is_dir():
        raise UserError(f"{place}: no model, expected a run's folder (config.json and {checkpoint.LATEST}) or an "
                        f"exported model ({CARD} and {WEIGHTS})")
    nearest = get_close_matches(name, runs | recorded, 1, 0)
    hint = f"did you mean {nearest[0]}?" if nearest else f"no runs in {results}, --results names another folder"
    raise UserError(f"run {name!r} is not known: {hint}")


def read_run(folder: Path, say=print) -> tuple[dict, dict[str, Tensor]]:
    """Card and tensors of a run's last checkpoint; says where it is unfinished. UserError naming what is missing."""
    spec = _spec(records.read_json(folder / "config.json"), folder / "config.json")
    state = checkpoint.load(folder, say, spec.id)
    if state is None:
        raise UserError(f"{folder}: no checkpoint, expected {checkpoint.LATEST}; train the run (benchmarks/run.py), or "
                        "copy the file from where it was trained")
    path = folder.resolve().parents[1] / "records" / f"{spec.id}.json"
    record = _record(path) if path.exists() else {}
    if state["done"] < spec.iterations:
        say(f"{spec.id} is unfinished: iteration {state['done']} of {spec.iterations}")
    elif not record:
        say(f"{spec.id} has no record in {path.parent}: the card has no scores")
    return _card(spec, _data(spec, folder), record, state["done"]), dict(state["method"])


def read_exported(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Card and tensors of an exported model; UserError where a file is missing, damaged or of another export."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    card = records.read_json(folder / CARD)
    weights = card.get("weights")
    if (card.get("schema") != SCHEMA or not {"id", "spec", "task", "input"} <= card.keys()
            or not isinstance(weights, dict) or not isinstance(weights.get("sha256"), str)):
        raise UserError(f"{folder / CARD}: schema {card.get('schema')!r}, expected the card of an export, {SCHEMA}")
    path = folder / WEIGHTS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected the tensors of {CARD}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != weights["sha256"]:
        raise UserError(f"{path}: damaged or of another export, sha256 {found}, expected {weights['sha256']!r:.80}")
    try:
        return card, load(data)
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no file of safetensors ({reason}), expected an export") from None


def run_spec(card: dict) -> RunSpec:
    """The settings of the run that a card tells of."""
    return _spec(card["spec"], card["id"])


def _card(spec: RunSpec, data: dict, record: dict, done: int) -> dict:
    """What is to be known of a model without opening its tensors: plain values in a fixed order."""
    split = record.get("split", {})
    return {
        "schema": SCHEMA, "id": spec.id, "spec": spec.stated,
        "task": {"classes": data["classes"], "dims": len(spec.patch), "channels": data["modalities"],
                 "targets": data["targets"], "slices": data["slices"]},
        "input": {key: data[key] for key in ("replay", "spacing", "spacing_known", "downsample")},
        "training": {"iterations": done, "of": spec.iterations, "precision": spec.precision},
        "data": {"title": data["title"], "recipe": data["recipe"], "sha256": data["sha256"]}
        | ({"split": {key: split[key] for key in ("name", "fold", "folds", "sha256")}} if split else {}),
        "scores": run_scores(record) if record else None,
        "method": _method(spec.method), "citation": data["citation"],
        "code": record.get("code", {"version": __version__}), "license": LICENSE,
    }


def _data(spec: RunSpec, folder: Path) -> dict:
    """What a run's data.json says; what it lacks (runs older than the file) follows from the data set's description.

    UserError where neither tells.
    """
    path = folder / "data.json"
    told = records.read_json(path) if path.exists() else {}
    told = {key: value for key, value in told.items() if value is not None}
    data = (_described(spec) if spec.dataset in data_prep.names() else {}) | told
    missing = [key for key in ("classes", "modalities", "targets", "slices", "spacing") if key not in data]
    if missing:
        raise UserError(f"{path}: tells nothing of {', '.join(missing)}, expected it to, since {spec.dataset} is no "
                        "data set of the suite")
    rest = {"replay": None, "downsample": 1, "spacing_known": True, "recipe": "", "sha256": "", "title": spec.dataset,
            "citation": ""}
    return rest | data


def _described(spec: RunSpec) -> dict:
    dataset = data_prep.dataset(spec.dataset)
    protocol = find_protocol(dataset, spec.protocol)
    recipes = getattr(data_prep.module(spec.dataset), "RECIPES", {})
    recipe = recipes.get(spec.recipe or protocol.recipe)
    dims = dataset.dims(protocol)
    return {
        "replay": recipe and recipe.to_dict(), "classes": list(dataset.task(protocol)),
        "modalities": list(dataset.channels(protocol)),
        "targets": {name: list(values) for name, values in dataset.targets(protocol).items()},
        "slices": protocol.slices, "downsample": protocol.downsample, "title": dataset.title,
        "spacing": [mm * protocol.downsample for mm in dataset.spacing[:dims]], "citation": dataset.citation,
    }


def _method(name: str) -> dict:
    """Title and paper of a method, from its docstring."""
    from ssl4mis import docstring

    text = docstring.read(inspect.getdoc(inspect.getmodule(registry.method_class(name))))
    return {"title": text.title, "paper": text.paper}


def _record(path: Path) -> dict:
    try:
        return records.read(path)
    except ValueError as error:
        raise UserError(str(error)) from None


def _spec(settings: dict, where) -> RunSpec:
    try:
        return RunSpec(**settings)
    except TypeError as error:
        raise UserError(f"{where}: not the settings of a run of this version ({error})") from None


def _safetensors(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    # a copy each: the format takes no two names for the same memory, nor memory with holes
    return save({name: tensor.detach().clone(memory_format=torch.contiguous_format)
                 for name, tensor in tensors.items()})
