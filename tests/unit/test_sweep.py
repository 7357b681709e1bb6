"""Handing out runs: what is tried again and what is not, how long it takes, what is said; by both engines."""

import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from ssl4mis import config, engines, lock, sweep
from ssl4mis.config import RunOptions, RunSpec
from ssl4mis.engines import Ended, Job
from ssl4mis.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STUB = '''import json, os, signal, sys, time
folder, plan = sys.argv[1], sys.argv[2].split(",")
state = os.path.join(folder, "state")
done = len(open(state).read().split(";")) - 1 if os.path.exists(state) else 0
with open(state, "a") as file:
    file.write(" ".join(sys.argv[3:]) + ";")
now = plan[min(done, len(plan) - 1)]
print("hello", now, flush=True)
if now == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if now == "memory":
    OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
if now == "held":
    print("run.py: error: run x: another process is at it (pid 1 on a)", file=sys.stderr)
    sys.exit(2)
if now == "wait":
    def stop(number, frame):
        open(os.path.join(folder, "saved"), "w").close()
        sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    time.sleep(60)
if now == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(60)
if now == "ok":
    open(os.path.join(folder, "record.json"), "w").close()
elif now != "nothing":
    print("some reason", file=sys.stderr)
    sys.exit(int(now))
'''


def job(folder: Path, name: str, plan: str) -> Job:
    """A stub that ends as the plan says, one word an attempt."""
    place = folder / name
    command = [sys.executable, "-I", "-S", "-c", STUB, str(place), plan]
    return Job(name, command, place, [place / "record.json"], 5, ["lean"])


def tries(one: Job) -> list[str]:
    """The further words of each attempt."""
    return (one.folder / "state").read_text().split(";")[:-1]


class Heard:
    """What a board would show."""

    def __init__(self):
        self.said, self.calls = [], 0

    def say(self, text):
        self.said.append(text)

    def __call__(self, running, waiting, outcome, at_once, last=False):
        self.calls += 1


@pytest.fixture(scope="module")
def ray_engine():
    pytest.importorskip("ray", reason="the extra sweep is not installed")
    engine = engines.Ray("local", 0.0, 1.0, 2, retries=2)
    yield engine
    engine.close()


@pytest.fixture(params=["local", "ray"])
def engine(request):
    if request.param == "ray":
        yield request.getfixturevalue("ray_engine")
    else:
        made = engines.Local(engines.environments(2, 0))
        yield made
        made.close()


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(sweep, "HELD_AGAIN", 0.0)


# --- one attempt -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "expected"), [
    ("ok", Ended(0, "hello ok")), ("2", Ended(2, "some reason")), ("1", Ended(1, "some reason")),
    ("kill", Ended(-9, "ended by SIGKILL")),
    ("memory", Ended(1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB", True)),
])
def test_an_attempt_tells_how_a_process_ended(tmp_path, plan, expected):
    one = job(tmp_path, "a", plan)
    assert engines.attempt("a", one.command, one.folder / "log.txt", tmp_path, {}) == expected


def test_the_log_keeps_every_attempt(tmp_path):
    one = job(tmp_path, "a", "kill,2")
    for _ in range(2):
        engines.attempt("a", one.command, one.folder / "log.txt", tmp_path, {})
    lines = [line for line in (one.folder / "log.txt").read_text().splitlines()
             if line.startswith(("---", "hello", "some"))]
    lines = [re.sub(r"^--- \S+ \S+ ", "--- ", line) for line in lines]
    assert lines[0].startswith("--- a on ") and lines[3].startswith("--- a on ")
    assert lines[1:3] == ["hello kill", "--- exit status -9"]
    assert lines[4:] == ["hello 2", "some reason", "--- exit status 2"]


def test_a_process_that_says_nothing_and_a_folder_that_cannot_be(tmp_path):
    def ended(*command, log=tmp_path / "log.txt"):
        return engines.attempt("a", command, log, tmp_path, {})

    assert ended(sys.executable, "-c", "raise SystemExit(3)") == Ended(3, "exit status 3 without a word")
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "a"
    assert ended("x", log=folder / "log.txt") == Ended(1, f"{folder}: Not a directory")


def test_variables_and_folder_are_those_that_are_given(tmp_path):
    script = "import os; print(os.environ['A'], os.getcwd(), os.getpgrp() == os.getpid())"
    end = engines.attempt("a", [sys.executable, "-c", script], tmp_path / "b" / "log.txt", tmp_path, {"A": "yes"})
    assert end == Ended(0, f"yes {tmp_path} True")  # Ctrl-C is for the sweep, which passes it on once


@pytest.mark.skipif(not engines.with_parent(), reason="setpriv is not installed")
def test_a_process_ends_well_where_the_sweep_is_killed(tmp_path):
    one = job(tmp_path, "a", "wait")
    code = f"""if True:
        from pathlib import Path
        from ssl4mis import engines
        engine = engines.Local([{{}}])
        engine.start(engines.Job("a", {list(one.command)!r}, Path({str(one.folder)!r}), []))
        engine.ended(60)"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(lambda: is_ready(one))
    parent.kill()
    parent.wait()
    wait_for((one.folder / "saved").exists)


def log_of(one: Job) -> str:
    path = one.folder / engines.LOG
    return path.read_text() if path.exists() else ""


def is_ready(one: Job) -> bool:
    return "\nready\n" in log_of(one)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- all of them -----------------------------------------------------------------------------------------------------


def test_what_is_tried_again_and_what_is_not(tmp_path, engine):
    plans = {"fails": "1", "bad": "2", "killed": "kill,kill,ok", "gone": "kill", "short": "memory,ok", "big": "memory",
             "held": "held,ok", "theirs": "held", "stopped": "130,ok", "empty": "nothing", "fine": "ok", "there": "1"}
    jobs = {name: job(tmp_path, name, plan) for name, plan in plans.items()}
    jobs["there"].folder.mkdir()
    jobs["there"].products[0].touch()
    show, finished = Heard(), []
    outcome = sweep.dispatch(jobs.values(), engine, 2, show, finished.append)
    assert {name: len(tries(one)) for name, one in jobs.items() if name != "there"} == {
        "fails": 1, "bad": 1, "killed": 3, "gone": 3, "short": 2, "big": 2, "held": 2, "theirs": 2, "stopped": 2,
        "empty": 1, "fine": 1}
    assert not (jobs["there"].folder / "state").exists()
    assert outcome.done == 6 and outcome.held == ["theirs"] and not outcome.stopped
    out_of_memory = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    assert outcome.failed == {
        "fails": "some reason", "bad": "some reason", "gone": "ended by SIGKILL", "big": out_of_memory,
        "empty": f"it ended well without {jobs['empty'].products[0]}"}
    assert tries(jobs["killed"]) == tries(jobs["gone"]) == ["", "", "lean"]
    assert tries(jobs["short"]) == tries(jobs["big"]) == ["", "lean"] and tries(jobs["held"]) == ["", ""]
    assert f"again short, with less memory: {out_of_memory}" in show.said and "failed bad: some reason" in show.said
    assert set(finished) == {one.products[0] for name, one in jobs.items()
                             if name in ("killed", "short", "held", "stopped", "fine")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_goes_on(tmp_path, engine, number):
    jobs = [job(tmp_path, name, "wait,ok") for name in "abcd"]
    threading.Thread(target=lambda: (wait_for(lambda: sum(is_ready(one) for one in jobs) == 2),
                                     os.kill(os.getpid(), number))).start()
    handler, show = signal.getsignal(number), Heard()
    outcome = sweep.dispatch(jobs, engine, 2, show)
    assert outcome.stopped and not outcome.done and not outcome.failed
    assert show.said == ["stopping: 2 save their state"]
    assert signal.getsignal(number) is handler
    assert sum((one.folder / "saved").exists() for one in jobs) == sum(one.folder.exists() for one in jobs) == 2
    if isinstance(engine, engines.Local):
        engine.stopping = False
    for one in jobs:  # those that have not begun have nothing to wait for
        one.folder.mkdir(exist_ok=True)
        (one.folder / "state").write_text(";")
    assert sweep.dispatch(jobs, engine, 2, show).done == 4


def test_a_second_signal_does_not_wait(tmp_path):
    engine, one = engines.Local([{}]), job(tmp_path, "a", "deaf")

    def press():
        wait_for(lambda: is_ready(one))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        assert not outcome
        os.kill(os.getpid(), signal.SIGINT)

    outcome = []
    threading.Thread(target=press).start()
    outcome.append(sweep.dispatch([one], engine, 2, Heard()))
    engine.close()
    assert outcome[0].stopped and "exit status -9" in log_of(one)


@pytest.mark.skipif(not engines.with_parent(), reason="setpriv is not installed")
def test_ray_tries_again_where_a_worker_is_lost(tmp_path, ray_engine):
    one = job(tmp_path, "a", "wait,ok")

    def kill():
        wait_for(lambda: is_ready(one))
        process = next(path.name for path in Path("/proc").glob("[0-9]*")
                       if str(one.folder) in command_line(path) and "-I" in command_line(path))
        os.kill(int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)

    threading.Thread(target=kill).start()
    outcome = sweep.dispatch([one], ray_engine, 0, Heard())
    assert outcome.done == 1 and len(tries(one)) == 2 and (one.folder / "saved").exists()


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def test_no_more_at_a_time_than_there_is_room_for(tmp_path):
    engine, most = engines.Local(engines.environments(3, 0)), []
    start = engine.start
    engine.start = lambda one: (start(one), most.append(len(engine.busy)))
    assert sweep.dispatch([job(tmp_path, str(n), "ok") for n in range(10)], engine, 0, Heard()).done == 10
    assert max(most) == 3 and len(engine.free) == 3
    engine.close()


@pytest.mark.parametrize(("processes", "gpus", "variable", "expected"), [
    (None, 0, None, [{}]), (1, 0, None, [{}]), (2, 0, None, [{"OMP_NUM_THREADS": "4"}] * 2),
    (9, 0, None, [{"OMP_NUM_THREADS": "1"}] * 9), (None, 1, None, [{"CUDA_VISIBLE_DEVICES": "0"}]),
    (None, 2, None, [{"CUDA_VISIBLE_DEVICES": n, "OMP_NUM_THREADS": "4"} for n in "01"]),
    (4, 2, "5,3", [{"CUDA_VISIBLE_DEVICES": n, "OMP_NUM_THREADS": "2"} for n in "5353"]),
])
def test_every_process_has_a_gpu_and_its_share_of_the_cores(monkeypatch, processes, gpus, variable, expected):
    monkeypatch.setattr(engines, "processors", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert engines.environments(processes, gpus) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert not any("OMP_NUM_THREADS" in env for env in engines.environments(processes, gpus))


def test_the_lock_of_a_run_is_known_by_its_line(tmp_path):
    with lock.alone(tmp_path, "x"), pytest.raises(UserError, match=sweep.HELD), lock.alone(tmp_path, "x"):
        pass


# --- the command -----------------------------------------------------------------------------------------------------


def test_options_that_differ_from_the_default_are_passed_on():
    assert sweep.passed_on(RunOptions(), False) == []
    options = RunOptions(device="cpu", out=Path("a b"), keep_every=5, checkpointing=True)
    words = sweep.passed_on(options, True)
    assert words == ["--device", "cpu", "--out", "a b", "--keep_every", "5", "--checkpointing", "True", "--peek_test"]
    assert config.parse(["--method", "supervised", "--dataset", "phantom", *words])[1] == options


def test_words_that_spare_memory_leave_the_run_as_it_is():
    words = ["--method", "supervised", "--dataset", "phantom", "--compile", "default", "--precision", "32-true"]
    (plain,), _ = config.parse(words)
    (lean,), options = config.parse([*words, *sweep.LEAN])
    assert lean == plain and options.checkpointing and options.compile == "none"


def test_the_state_of_a_run_is_what_its_folder_holds(tmp_path):
    def put(name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def found():
        return sweep.states(["x"], tmp_path)["x"], sweep.states(["x"], tmp_path, peek=True)["x"]

    assert found() == ("waiting", "waiting")
    put("runs/x/config.json")
    assert found() == ("waiting", "waiting")
    put("runs/x/latest.ckpt")
    assert found() == ("unfinished", "unfinished")
    put("records/x.json")
    assert found() == ("done", "unfinished")
    put("peeks/x.json")
    assert found() == ("done", "done")


@pytest.mark.parametrize(("words", "expected"), [
    (["--engine", "dask"], "engine dask: expected one of local, ray"), (["--processes", "0"], "processes 0: expected"),
    (["--retries", "-1"], "retries -1: expected at least 0"), (["--gpus-per-run", "0.5"], "gpus_per_run 0.5: expected "
                                                               "--engine ray"),
    (["--address", "auto"], "address auto: expected --engine ray"), (["--proceses", "2"], "did you mean processes?"),
])
def test_options_that_cannot_work_are_one_line(tmp_path, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sweep.main(["lite", *words])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and expected in said.err


def test_without_ray_its_engine_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    with pytest.raises(SystemExit) as stop:
        sweep.main(["lite", "--engine", "ray", "--device", "cpu"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "pip install 'ssl4mis[sweep]'" in err
    assert list(tmp_path.iterdir()) == []


# --- how long --------------------------------------------------------------------------------------------------------


SPEC = RunSpec(method="ua_mt", dataset="LA", patch=[8, 8, 8], iterations=100, precision="32-true")


def record(folder: Path, name: str, train: float, evaluate: float, device="cpu", iterations=1000, **changed) -> Path:
    spec = SPEC.stated | {"iterations": iterations} | changed
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"spec": spec, "timing": {"train_seconds": train, "evaluate_seconds": evaluate},
                                "device": {"type": device}}))
    return path


def events(folder: Path, *lines: str) -> Path:
    place = folder / "runs" / SPEC.id
    place.mkdir(parents=True, exist_ok=True)
    (place / "events.jsonl").write_text("".join(lines))
    return place


def test_a_price_is_the_median_of_runs_of_the_same_work(tmp_path):
    record(tmp_path, "a", 2000, 10)  # 2 s an iteration
    record(tmp_path, "b", 3000, 20, iterations=500, seed=3, labeled=8)  # 6 s
    record(tmp_path, "c", 4000, 90)
    record(tmp_path, "elsewhere", 1, 1, device="cuda")
    record(tmp_path, "other", 1, 1, method="dtc")
    record(tmp_path, "small", 1, 1, width=2)
    record(tmp_path, "bf16", 1, 1, precision="bf16-mixed")
    for name, text in {"broken": "{", "empty": "", "list": "[]", "old": '{"spec": {}}'}.items():
        (tmp_path / f"{name}.json").write_text(text)
    past = sweep.Past("cpu", [tmp_path, tmp_path, tmp_path / "absent"])  # the same folder twice counts once
    assert past.price(SPEC) == (4.0, 20.0)
    past.add(record(tmp_path, "d", 8000, 20))
    assert past.price(SPEC) == (5.0, 20.0)
    past.add(tmp_path / "d.json")
    assert past.price(SPEC) == (5.0, 20.0)
    assert sweep.Past("cuda", [tmp_path]).price(SPEC) == (0.001, 1.0)
    assert sweep.Past("cpu").price(SPEC) is None


def test_what_is_left_of_a_run(tmp_path):
    options, past = RunOptions(out=tmp_path), sweep.Past("cpu")
    assert sweep.remaining(SPEC, options, False, past) is None
    (tmp_path / "records").mkdir()
    past.add(record(tmp_path / "records", "a", 2000, 10))
    assert sweep.remaining(SPEC, options, False, past) == 100 * 2 + 10
    assert sweep.remaining(SPEC, options, True, past) == 100 * 2 + 10 * 10  # after every tenth of the iterations
    rare = RunOptions(out=tmp_path, keep_every=30)  # after 30, 60, 90 and 100
    assert sweep.remaining(SPEC, rare, True, past) == 100 * 2 + 4 * 10
    events(tmp_path, '{"done": 20, "rate": 4.0}\n', '{"done": 25, "rate": 5.0}\n', '{"done": 30, "ra')
    assert sweep.progress(tmp_path / "runs" / SPEC.id) == (25, 5.0)
    assert sweep.remaining(SPEC, options, False, past) == 75 / 5 + 10


def test_a_run_without_a_past_is_as_fast_as_its_like_now(tmp_path):
    past, options = sweep.Past("cpu"), RunOptions(out=tmp_path)
    events(tmp_path, '{"done": 50, "rate": 0.5}\n')
    twin = RunSpec(**{**SPEC.stated, "seed": 1})
    assert sweep.remaining(twin, options, False, past) is None
    assert sweep.remaining(SPEC, options, False, past) == 50 / 0.5
    assert sweep.remaining(twin, options, False, past) == 100 / 0.5


@pytest.mark.parametrize("text", ["", "\n", "{}\n", "[1]\n", '{"done": 3}\n', "x" * 9000])
def test_events_that_say_nothing(tmp_path, text):
    assert sweep.progress(events(tmp_path, text)) == (0, 0.0)
    assert sweep.progress(tmp_path / "absent") == (0, 0.0)


def test_runs_side_by_side_take_at_least_the_longest():
    assert sweep.together([30, 20, 10], 2) == 30 and sweep.together([10, 10, 10, 10], 2) == 20
    assert sweep.together([5], 8) == 5 and sweep.together([], 2) == 0
    assert sweep.how_long([3600, 3600], 1) == "about 2.0 h left, 1 at a time"
    assert sweep.how_long([60, None], 2) == ("about 60 s left, 2 at a time; no estimate of 1 runs, of whose like there "
                                             "is no record")
    assert sweep.how_long([None], 2).startswith("no estimate of 1 runs") and sweep.how_long([], 1) == "nothing left"


# --- what is shown ---------------------------------------------------------------------------------------------------


def board(tmp_path, monkeypatch, terminal: bool) -> str:
    place = events(tmp_path, '{"done": 25, "rate": 5.0}\n')
    (place / engines.LOG).write_text("begun")
    one = sweep.Try(Job(SPEC.id, [], place, [], 100))
    queued = sweep.Try(job(tmp_path, "queued", "ok"))  # given to the engine, which has no room yet
    text = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **given: Console(file=text, force_terminal=terminal, width=150))
    shown = sweep.Board({SPEC.id: 120.0, "later": 60.0, "queued": None}.get, 9, 4)
    shown.shown -= 100
    waiting = deque([sweep.Try(job(tmp_path, "later", "ok"))])
    shown([one, queued], waiting, sweep.Outcome(1, {"x": "y"}), 2)
    shown([], deque(), sweep.Outcome(), 2, last=True)
    return text.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path, monkeypatch):
    assert board(tmp_path, monkeypatch, False) == (
        "5/9 done, 1 running, 2 waiting, 1 failed, about 2 min left but for 1 runs\n")


def test_on_a_terminal_there_is_a_table(tmp_path, monkeypatch):
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", board(tmp_path, monkeypatch, True))
    assert "5/9 done, 1 running, 2 waiting, 1 failed, about 2 min left but for 1 runs" in text
    row = next(line for line in text.splitlines() if SPEC.id in line)
    assert row.split()[1:] == ["25/100", "5.00", "2", "min"]


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(("said", "why"), [
    (bytes([0, 0, 24, 4, 0, 0, 0, 0, 0]), None), (b"HTTP/1.0 400 Bad request", "something else answers"),
    (b"", "something else answers"), (None, "timed out")])
def test_a_cluster_that_does_not_answer_as_ray_does_is_one_line_soon(scheme, said, why, monkeypatch):
    def reply():
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            if said is not None:
                connection.sendall(said)
            else:
                given_up.wait()

    monkeypatch.setattr(engines, "PATIENCE", 0.5 if said is None else 10)
    given_up = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        other = threading.Thread(target=reply)
        other.start()
        with pytest.raises(UserError, match=f"^address {address}: no Ray there .{why}.") if why else nullcontext():
            engines.answers(address)
        given_up.set()
        other.join()
    with pytest.raises(UserError, match=f"^address {address}: no Ray there .*refused.*, expected local"):
        engines.answers(address)


def test_addresses_without_a_host_and_port():
    with pytest.raises(UserError, match="^address nowhere:ten: no Ray there"):
        engines.answers("nowhere:ten")
    for elsewhere in ("local", "auto"):  # names without a port are Ray's to find
        engines.answers(elsewhere)
