"""RunSpec -> record: the only file that knows all parts."""
import dataclasses
import gzip
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data_prep
import networks
from data_prep.volumes import whole_file
from networks import ranks
from networks.base import NetSpec, PatchError, parameter_count
from networks.checkpointing import recompute_stages
from ssl4mis import __version__, checkpoint, controls, lock, memory, memory_plan, passes, peeks, records, registry
from ssl4mis.config import RunOptions, RunSpec, find_protocol
from ssl4mis.errors import UserError
from ssl4mis.evaluator import Evaluation, evaluate
from ssl4mis.leaderboard import data_of
from ssl4mis.loading import Loader
from ssl4mis.method import Method, Task
from ssl4mis.progress import duration, paced
from ssl4mis.selection import run_scores
from ssl4mis.trainer import Trainer, TrainingStopped

PACKAGES = ("torch", "monai", "numpy", "scipy", "h5py", "lightning-fabric")
PREDICTIONS = "predictions"  # folder of a run


class Parts(NamedTuple):
    """What a resolved run stands on; `spec` has its precision."""

    spec: RunSpec
    device: torch.device
    dataset: data_prep.DatasetSpec
    root: Path | None
    protocol: data_prep.Protocol
    split: data_prep.Split

    @property
    def cases(self) -> list[str]:
        """All that must be there before training."""
        return [*self.split.train, *self.split.extra, *self.split.test]


def parts_of(spec: RunSpec, options: RunOptions) -> Parts:
    """What a run stands on here; UserError or DataError where it does not exist."""
    device = pick_device(options.device)
    spec = dataclasses.replace(spec, precision=pick_precision(spec.precision, device))
    dataset, root = data_prep.locate(spec.dataset, options.data_root)
    protocol = protocol_of(spec, dataset)
    return Parts(spec, device, dataset, root, protocol, data_prep.load_split(protocol.split, spec.fold, dataset.splits))


def run(spec: RunSpec, options: RunOptions, say=print) -> Path:
    """Train, evaluate, write the record; returns its path.

    A finished run is left alone, an unfinished one goes on. DataError or UserError, one line, before any training if
    the data, the settings or the folder for results cannot work, or another process is at the run; TrainingStopped if
    training ended early.
    """
    memory.keep_pages()
    ranks.join(pick_device(options.device).type)
    if ranks.rank():
        say = silent
    if ranks.count() > 1 and options.compile != "none":
        raise UserError(f"compile {options.compile}: expected none with {ranks.count()} processes")
    parts = parts_of(spec, options)
    spec, device, dataset, root, protocol, split = parts
    record_path = options.out / "records" / f"{spec.id}.json"
    folder = options.out / "runs" / spec.id
    if is_done(parts, record_path, folder, say):
        return record_path
    store = dataset.open(root, protocol)
    store.check(parts.cases)
    scans, unlabeled = controls.for_training(store, split, spec, dataset, protocol, root)

    code = code_version()
    method = new_method(spec, options, dataset, protocol)
    data = store.provenance(parts.cases) | describe_data(dataset, protocol, store)
    with alone(folder, spec.id, say):
        if is_done(parts, record_path, folder, say):  # by a process that had the lock until now
            return record_path
        if not ranks.rank():
            records.check_folder(record_path)
            drop_remains(folder.rglob(".*.tmp"), record_path)
            keep_description(folder, spec, data)
        counts = [len(part) for part in (split.labeled(spec.labeled), unlabeled, split.test)]
        patients = f" ({spec.labeled} labeled patients)" if split.per_patient > 1 else ""
        say(f"{spec.id}\nreading {spec.dataset}: {counts[0]} labeled and {counts[1]} unlabeled training cases, "
            f"{counts[2]} test cases{patients}")
        for remark in method.remarks():
            say(remark)
        if spec.control:
            say(controls.describe(spec.control))
        if method.needs.unlabeled and not spec.unlabeled_batch:
            say(f"no unlabeled samples: {spec.method} trains with its supervised terms alone")
        spent = costs(method, spec, options, dataset, protocol)  # before training: sizes that cannot work are refused
        loader = Loader(scans, split.labeled(spec.labeled), unlabeled, spec.patch,
                        (spec.labeled_batch, spec.unlabeled_batch), spec.seed, spec.augmentation, device,
                        getattr(torch, spec.storage), method.needs, protocol.slices)
        trainer = Trainer(method, loader, spec, folder, cheaper(dataset, spec), options.log_every, options.save_every,
                          options.compile, options.keep_every)
        trained = trainer.fit()

        say(f"evaluating {len(split.test)} test cases with the last weights")
        started = time.monotonic()
        found = evaluate_together(
            method, store, split.test, dataset.targets(protocol), spec.patch, spec.stride, device,
            paced(say, "evaluated", len(split.test)), protocol.slices, spec.evaluation_precision,
            keep=lambda case, predicted: write_prediction(folder, case, predicted, store.spacing(case)))
        timing = {"train_seconds": trained["seconds"], "evaluate_seconds": time.monotonic() - started,
                  "iterations_per_second": spec.iterations / max(trained["seconds"], 1e-9)}
        record = describe(spec, data, split, unlabeled, device) | {
            "cases": found.cases, "calibration": found.calibration, "timing": timing,
            "memory": {"peak_mib": peak_mib(device)}, "code": code, "curve": trained["curve"],
            "weights_sha256": checkpoint.fingerprint(method.state_dict()),
            "costs": spent,
        }
        record["environment"] |= {"compile": options.compile, "checkpointing": options.checkpointing,
                                  "processes": ranks.count()}
        if ranks.rank():
            return record_path
        path = records.write(record, record_path.parent)
        checkpoint.drop_previous(folder)
    scores = run_scores(records.read(path))
    say(f"Dice {100 * scores['dice']:.2f} %, 95HD {scores['hd95_voxel']:.2f} voxels, {scores['missed']} missed, "
        f"{duration(timing['train_seconds'])} of training: {path}")
    return path


def is_done(parts: Parts, record: Path, folder: Path, say) -> bool:
    """Whether the record is there, which is said; UserError where it is broken or of other data.

    Finishes what is left to do in the folder of the run where a process was killed right after it wrote the record.
    """
    if not record.exists():
        return False
    try:
        found = records.read(record)
    except UserError as error:
        raise UserError(f"{error}; remove it, and the same command writes it again from the last checkpoint") from None
    with suppress(data_prep.DataError):  # without the data a record is as good
        same_data(record, found, parts.dataset.open(parts.root, parts.protocol).provenance(parts.cases))
    with suppress(OSError):  # it may not be ours to write to
        checkpoint.drop_previous(folder)
        drop_remains((), record)
    say(f"{parts.spec.id} is finished: {record}")
    return True


@contextmanager
def alone(folder: Path, run: str, say=print) -> Iterator[None]:
    """Be the only one at a run, or the processes that torchrun started for it; UserError where another one is.

    The first of these processes holds the lock, and the others hear of it.
    """
    with ExitStack() as held:
        refused = ""
        if not ranks.rank():
            try:
                held.enter_context(lock.alone(folder, run, say))
            except UserError as error:
                refused = str(error)
        refused = "".join(ranks.collect([refused]))
        if refused:
            raise UserError(refused)
        yield


def exit_status(job) -> int:
    """Do a job of `run.py`: 0 done, 1 the loss was not finite, 2 bad input, 130 stopped and resumable; says why."""
    try:
        with stopped_by_sigterm():
            return _status(job)
    except KeyboardInterrupt:  # another one, while the first was spoken of
        return 130


def _status(job) -> int:
    try:
        job()
    except (UserError, data_prep.DataError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # what no other line says better: a full disk under the log, a file that vanished
        print(f"run.py: error: {' '.join(str(error).split())}; what is saved stays, and the same command goes on",
              file=sys.stderr)
        return 2
    except TrainingStopped as stop:
        print(stop, file=sys.stderr)
        return 130 if stop.resumable else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM is as Ctrl-C, in training (see `Trainer`) and around it; not where torchrun would wait for it."""
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if together or threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def peek_test(spec: RunSpec, options: RunOptions, say=print) -> Path:
    """Score the kept weights of a finished run on the test list, which no ranking reads; returns the path of the peeks.

    What was scored before stays. UserError where no weights were kept, or a file of them is damaged.
    """
    spec, device, dataset, root, protocol, split = parts_of(spec, options)
    path, folder = options.out / "peeks" / f"{spec.id}.json", options.out / "runs" / spec.id
    if path.exists():
        try:
            peeks.read(path)
        except UserError as error:
            raise UserError(f"{error}; remove it, and the same command writes it again") from None
        say(f"{spec.id} has peeks: {path}")
        return path
    record = records.read(options.out / "records" / f"{spec.id}.json")
    kept = checkpoint.kept(folder)
    if not kept:
        raise UserError(f"{folder / checkpoint.KEPT}: no weights, expected those that a run with "
                        "--peek_test or --keep_every keeps; train again with another --out")
    with alone(folder, spec.id, say):
        store, method = dataset.open(root, protocol), new_method(spec, options, dataset, protocol)
        found = {spec.iterations: record["cases"]}
        for done, file in kept.items():
            scored = file.with_suffix(".json")
            rows = read_scored(scored)
            if rows is None:
                say(f"scoring the weights of iteration {done} on {len(split.test)} test cases")
                load_kept(method, file, spec.id)
                rows = evaluate(method, store, split.test, dataset.targets(protocol), spec.patch, spec.stride, device,
                                paced(say, "scored", len(split.test)), protocol.slices, spec.evaluation_precision).cases
                records.write_text(scored, json.dumps({"cases": records.plain(rows)}))
            found[done] = rows
        peeks.write(options.out / "peeks", spec.id, found)
    say(f"peeks of {len(found)} checkpoints, for the report's selection gap: {path}")
    return path


def read_scored(path: Path) -> list[dict] | None:
    """The rows of kept weights that were scored before; None where there are none or the file is damaged."""
    try:
        rows = records.read_json(path)["cases"]
        for number, row in enumerate(rows):
            records.check_case(row, str(path), f"cases[{number}]")
    except (ValueError, KeyError, TypeError):
        return None
    return rows


def load_kept(method: Method, path: Path, run: str) -> None:
    """Give a method the weights that a run kept; UserError saying what to do where they are damaged or others."""
    try:
        method.load_state_dict(checkpoint.read_kept(path, run))
    except (UserError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] if isinstance(error, UserError) else f"{path}: of another network"
        raise UserError(f"{reason}; remove it, and the same command scores the others") from None


def show_plan(spec: RunSpec, options: RunOptions, say=print) -> None:
    """Say what memory a run will need, by what it is for; nothing is trained, and the data need not be there."""
    parts = parts_of(spec, options)
    spec, device, dataset, root, protocol, split = parts
    unlabeled = controls.unlabeled_cases(split, spec) if spec.unlabeled_batch else ()
    scans, remark = None, ""
    try:
        store = dataset.open(root, protocol)
        store.check(parts.cases)
        scans = memory_plan.sizes(store, (split.labeled(spec.labeled), unlabeled, split.test), protocol.downsample,
                                  len(dataset.channels(protocol)), getattr(torch, spec.storage))
    except data_prep.DataError as error:
        remark = f"without the scans, for one window of a test case: {error}\n"
    found = memory_plan.plan(lambda: new_method(spec, options, dataset, protocol), spec, device, scans)
    say(f"{remark}{spec.method} on {device.type} in {spec.precision}, {spec.labeled_batch} + {spec.unlabeled_batch} "
        f"samples of {'x'.join(map(str, spec.patch))}, {'with' if options.checkpointing else 'without'} checkpointing"
        f"{'' if options.compile == 'none' else ', as if not compiled'}\n\n{found}")


def silent(text: str) -> None:
    """What all processes of a run but the first one say."""


def evaluate_together(method: Method, store, cases, targets, *settings, **options) -> Evaluation:
    """`evaluate`, each process its share of the cases; all have all rows."""
    own = evaluate(method, store, cases[ranks.rank()::ranks.count()], targets, *settings, **options)
    rows = ranks.collect([own.cases[at:at + len(targets)] for at in range(0, len(own.cases), len(targets))])
    return Evaluation([row for case in rows for row in case], ranks.collect(own.calibration))


def write_prediction(folder: Path, case: str, predicted: np.ndarray, spacing) -> None:
    """Write a class map into a run's folder as NIfTI on the stored grid, for pictures of the case; whole or not at all.

    DataError where it cannot be written.
    """
    import nibabel

    affine = np.diag([*spacing, 1.0, 1.0, 1.0][:3] + [1.0])  # in 2D a plane of 1 mm
    data = nibabel.Nifti1Image(predicted, affine).to_bytes()
    with whole_file(folder / PREDICTIONS / f"{case}.nii.gz", "a writable folder with space left") as temporary:
        temporary.write_bytes(gzip.compress(data, 1, mtime=0))


def costs(method: Method, spec: RunSpec, options: RunOptions, dataset, protocol) -> dict:
    """Trainable parameters, and samples through networks per step; None where a step decides by its values.

    UserError where the step cannot take samples of this size, such as a batch norm of a single voxel.
    """
    found = dict.fromkeys(records.PASSES)
    try:
        counted = passes.per_step(lambda: new_method(spec, options, dataset, protocol), spec)
        found = dict(zip(records.PASSES, counted, strict=True))
    except UserError:
        pass
    except ValueError as error:
        raise UserError(f"patch {spec.patch}, batch {spec.labeled_batch}+{spec.unlabeled_batch}: {spec.method} on "
                        f"{spec.network} cannot take it ({' '.join(str(error).split())}); expected more") from None
    return {"parameters": parameter_count(method)} | found


def protocol_of(spec: RunSpec, dataset):
    """The protocol of a run, with the run's recipe."""
    protocol = find_protocol(dataset, spec.protocol)
    return dataclasses.replace(protocol, recipe=spec.recipe) if spec.recipe else protocol


def describe_data(dataset, protocol, store) -> dict:
    """What a prediction with a run must replay and say; with where the cases are from it lies in the run's folder."""
    return {
        "replay": store.replay(), "modalities": list(dataset.channels(protocol)),
        "classes": list(dataset.task(protocol)),
        "targets": {name: list(values) for name, values in dataset.targets(protocol).items()},
        "slices": protocol.slices, "downsample": protocol.downsample,
        "spacing": [mm * protocol.downsample for mm in dataset.spacing[: dataset.dims(protocol)]],
        "title": dataset.title, "citation": dataset.citation,
    }


def drop_remains(files: Iterable[Path], record: Path) -> None:
    """Remove what a killed process was writing: these files, and a record under another name."""
    for folder in record.parents[:2]:  # see `records.check_folder`
        files = [*files, *folder.glob(f".{record.name}.*.tmp")]
    for path in files:
        path.unlink(missing_ok=True)


def keep_description(folder: Path, spec: RunSpec, data: dict) -> None:
    """Write the settings and the description of the data into a run's folder; UserError where it holds other data."""
    kept = folder / "data.json"
    if kept.exists() or any(folder.glob("*.ckpt")):  # checkpoints are of these data, too
        same_data(folder, {"spec": spec.stated} | ({"data": records.read_json(kept)} if kept.exists() else {}), data)
    records.write_text(folder / "config.json", json.dumps(spec.stated, indent=1) + "\n")
    records.write_text(kept, json.dumps(data, indent=1) + "\n")


def same_data(path: Path, record: dict, data: dict) -> None:
    """UserError unless what is in a file was made of these cases; of older records only the recipe is known."""
    before = record.get("data", {"recipe": data_of(record)})
    for key in ("recipe", "sha256"):
        if before.get(key, data[key]) != data[key]:
            raise UserError(f"{path}: made of other data, {key} {before[key] or 'none'}, expected "
                            f"{data[key] or 'none'} as now; remove it to start again, or take another --out")


def describe(spec: RunSpec, data: dict, split, unlabeled: tuple[str, ...], device: torch.device) -> dict:
    """The part of a record that is known before training."""
    return {
        "schema": records.SCHEMA, "id": spec.id, "spec": spec.stated, "hp_hash": spec.hp_hash,
        "data": {key: data[key] for key in ("recipe", "sha256", "label_guided", "spacing_known")},
        "split": {"name": split.name, "fold": split.fold, "folds": split.folds, "sha256": split.sha256,
                  "per_patient": split.per_patient,
                  "labeled": split.labeled(spec.labeled), "unlabeled": unlabeled,
                  "test": split.test},
        "selection": "last",
        "evaluation": {"precision": spec.evaluation_precision, "patch": spec.patch, "stride": spec.stride,
                       "postprocess": "none"},
        "classes": [data["classes"][0], *data["targets"]], "device": {"type": device.type, "name": device_name(device)},
        "environment": environment(),
    }


def new_method(spec: RunSpec, options: RunOptions, dataset, protocol) -> Method:
    """The method of a run as it starts; UserError as of `build_method`."""
    torch.manual_seed(spec.seed)
    dims = dataset.dims(protocol)
    spacing = tuple(mm * protocol.downsample for mm in dataset.spacing[:dims])
    task = Task(len(dataset.task(protocol)), dims, len(dataset.channels(protocol)),
                (spec.labeled_batch, spec.unlabeled_batch))
    method = build_method(spec, task, spacing)
    if options.checkpointing:
        recompute_stages(method)
    return method


def build_method(spec: RunSpec, task: Task, spacing: tuple[float, ...]) -> Method:
    """The method of a run with fresh weights; UserError if patch, network and method do not fit together."""
    cls = registry.method_class(spec.method)
    build = networks.Build(spec.network, task.classes, NetSpec(task.channels, tuple(spec.patch), spec.width, spacing))
    try:
        return cls(build, task, cls.Config(**spec.hp))
    except PatchError as error:
        raise UserError(str(error)) from None


def cheaper(dataset, spec: RunSpec) -> str:
    """What to say where a run would take hours on a CPU: the protocol made for it, if the data set has another."""
    if "lite" in dataset.protocols and spec.protocol != "lite":
        return "`--protocol lite` is the track for machines without a GPU"
    return ""


def pick_device(name: str) -> torch.device:
    """The torch device behind auto, cpu or cuda; UserError where there is no CUDA."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no CUDA device here, expected one; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.count() == 1:
        return torch.device("cuda")
    if ranks.local_rank() >= torch.cuda.device_count():
        raise UserError(f"{ranks.local_count()} processes on this machine, expected at most one for each of its "
                        f"{torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(ranks.local_rank())
    return torch.device("cuda", ranks.local_rank())


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` as bf16-mixed where the processor computes in it, else 32-true."""
    if name != "auto":
        return name
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16-mixed" if fast else "32-true"


def peak_mib(device: torch.device) -> float | None:
    """Peak memory in MiB: of the device on CUDA, of the process on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def device_name(device: torch.device) -> str:
    """What the record calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def code_version() -> dict:
    """Version, commit and whether tracked code differs from it; the commit is None outside a git checkout."""
    here = Path(__file__).resolve().parents[1]

    def git(*words):
        try:
            done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
        except OSError:  # there is no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--", "ssl4mis", "networks", "data_prep", "benchmarks")
    return {"version": __version__, "commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}


def environment() -> dict:
    """Versions and settings that can move a result."""
    return {"python": platform.python_version(), "platform": platform.system() + "-" + platform.machine(),
            "threads": torch.get_num_threads(), "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES}}
