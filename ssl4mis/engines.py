"""Where the processes of a sweep run: on this machine, or wherever Ray has room. The folder of a job is its state."""
import importlib.util
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ssl4mis.errors import UserError

LOG = "log.txt"
TAIL = 16384  # bytes of what an attempt said last that are looked at
PASSED_ON = ("SSL4MIS_DATA", "PYTHONPATH", "OMP_NUM_THREADS")  # variables that mean the same on other machines
MEMORY = ("OutOfMemoryError", "MemoryError", "can't allocate memory", "Cannot allocate memory", "CUDA out of memory")
CUDA = "CUDA_VISIBLE_DEVICES"
PATIENCE = 10  # seconds that a cluster has to answer
# Ray speaks gRPC, whose two sides begin with HTTP/2's greeting and a frame of settings, of type 4 (RFC 9113, 3.4)
SETTINGS = 4
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, SETTINGS, 0, 0, 0, 0, 0])


class Job(NamedTuple):
    """A command that goes on where it was stopped, and its folder; once it is done its products are there."""

    name: str
    command: Sequence[str]
    folder: Path
    products: Sequence[Path]
    total: int = 0  # iterations
    lean: Sequence[str] = ()  # words that spare memory and leave the result as it is

    @property
    def done(self) -> bool:
        return all(path.exists() for path in self.products)


class Ended(NamedTuple):
    """How a process ended: its exit status (negative: by that signal), the last line it said, for want of memory?"""

    status: int
    line: str
    memory: bool = False


def attempt(name: str, command: Sequence[str], log: Path, where: Path, env: Mapping[str, str],
            started: Callable = lambda process: None) -> Ended:
    """One process of a job; what it says goes to the end of the log, between a line before and one after it.

    It gets SIGTERM where this process ends first: then nobody counts on it, and its state is saved.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            note(file, f"{name} on {socket.gethostname()}: {shlex.join(command)}")
            before = file.tell()
            # a group of its own: Ctrl-C reaches the sweep alone, which asks each process once to stop
            process = subprocess.Popen([*with_parent(), *command], cwd=where, stdin=subprocess.DEVNULL, stdout=file,
                                       stderr=subprocess.STDOUT, process_group=0,
                                       env={**os.environ, **env, "PYTHONUNBUFFERED": "1"})
            try:
                started(process)
                while process.poll() is None:  # Ray's interrupt does not end a wait
                    time.sleep(0.01)
            except BaseException:
                process.terminate()
                process.wait()
                raise
            finally:
                note(file, f"exit status {process.returncode}")
        return Ended(process.returncode, *last_words(log, before, process.returncode))
    except OSError as error:
        return Ended(1, f"{error.filename or log}: {error.strerror or error}")


def note(file, text: str) -> None:
    """A line of ours in a log."""
    file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())
    file.flush()


def with_parent() -> list[str]:
    """Words before a command that end it with the thread that started it, where the system can."""
    return ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []


def last_words(log: Path, before: int, status: int) -> tuple[str, bool]:
    """Of what was written from `before` on but for our note: the last line, and whether memory was short."""
    with open(log, "rb") as file:
        file.seek(max(before, log.stat().st_size - TAIL))
        lines = file.read().decode(errors="replace").splitlines()[:-1]
    said = [line.strip() for line in lines if line.strip()]
    if status < 0:
        with suppress(ValueError):
            return f"ended by {signal.Signals(-status).name}", False
    short = status == 1 and any(word in line for line in said[-5:] for word in MEMORY)
    return said[-1] if said else f"exit status {status} without a word", short


class Local:
    """Processes of this machine, as many at a time as there are environments, of which each has one."""

    def __init__(self, environments: Sequence[Mapping[str, str]]):
        self.free = list(environments)
        self.pool = futures.ThreadPoolExecutor(len(environments))
        self.busy: dict[futures.Future, tuple[Job, Mapping[str, str]]] = {}
        self.processes: dict[str, subprocess.Popen] = {}
        self.stopping = False
        self.capacity = self.places = len(environments)  # at a time, and that may be given to it

    def start(self, job: Job) -> None:
        """Hand over a job; at most `places` of them."""
        env = self.free.pop(0)
        self.busy[self.pool.submit(attempt, job.name, job.command, job.folder / LOG, Path.cwd(), env,
                                   lambda process: self._started(job, process))] = job, env

    def _started(self, job: Job, process: subprocess.Popen) -> None:
        self.processes[job.name] = process
        if self.stopping:
            process.terminate()

    def ended(self, seconds: float) -> list[tuple[Job, Ended]]:
        """Jobs that have ended since, after at most that long."""
        found = []
        for future in futures.wait(self.busy, seconds, futures.FIRST_COMPLETED).done:
            job, env = self.busy.pop(future)
            self.free.append(env)
            self.processes.pop(job.name, None)
            found.append((job, future.result()))
        return found

    def stop(self, kill: bool = False) -> None:
        """Ask all processes to save their state and end, or end them at once."""
        self.stopping = True
        for process in list(self.processes.values()):
            process.kill() if kill else process.terminate()

    def close(self) -> None:
        self.pool.shutdown()


def answers(address: str) -> None:
    """UserError where an address names a host and port at which no Ray answers; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                connection.sendall(GREETING)
                if connection.makefile("rb").read(4)[3:] != bytes([SETTINGS]):
                    raise OSError("something else answers")
    except (OSError, OverflowError, ValueError) as error:
        raise no_ray(address, error) from None


def no_ray(address: str, error: Exception) -> UserError:
    """The error of an address at which there is no Ray, with the reason."""
    reason = " ".join(str(error).split())
    return UserError(f"address {address}: no Ray there ({reason}), expected local, auto, host:port or ray://host:port")


class Ray:
    """Tasks of Ray, one per job, in a cluster or one started here. All machines see the same files at the same paths.

    Args:
        address: of a cluster, auto, host:port or ray://host:port, or local to start Ray here.
        gpus, cpus: what a job takes, None for a whole GPU where there are some, and its share of their processors.
        processes: at a time at most, None for as many as fit.
        retries: of a task whose worker or node is lost.
    """

    def __init__(self, address: str, gpus: float | None, cpus: float | None, processes: int | None, retries: int):
        if importlib.util.find_spec("ray") is None:
            raise UserError("engine ray: Ray is not installed, expected what `pip install 'ssl4mis[sweep]'` brings")
        answers(address)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # a run is no background job
        import ray

        self.ray, self.limit = ray, processes
        here = {"include_dashboard": False, "object_store_memory": 100 * 2**20} if address == "local" else {}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **here)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise no_ray(address, error) from None
        found = ray.cluster_resources()
        self.gpus = gpus if gpus is not None else float(found.get("GPU", 0) > 0)
        share = found.get("CPU", 1) * self.gpus / found["GPU"] if self.gpus and found.get("GPU") else 1
        self.cpus = cpus if cpus is not None else max(1, int(share))
        self.looked, self.capacity = -1e9, 0
        if not self.places:
            ray.shutdown()
            raise UserError(f"gpus_per_run {self.gpus:g}, cpus_per_run {self.cpus:g}: Ray has {found.get('GPU', 0):g} "
                            f"GPUs and {found.get('CPU', 0):g} CPUs, expected room for a run")
        self.env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self.env.setdefault("OMP_NUM_THREADS", str(max(1, int(self.cpus))))
        self.resources = {"num_gpus": self.gpus, "num_cpus": self.cpus}
        self.task, self.retries = ray.remote(attempt), retries
        self.busy: dict = {}

    @property
    def places(self) -> int:
        """Twice of what fits now: a cluster grows for what waits, and no worker waits for us."""
        if time.monotonic() - self.looked > 10:
            found = self.ray.cluster_resources()
            fits = [found.get(key, 0) // need for key, need in (("GPU", self.gpus), ("CPU", self.cpus)) if need]
            self.capacity, self.looked = int(min(fits, default=1)), time.monotonic()
            if self.limit:
                self.capacity = min(self.capacity, self.limit)
        return self.capacity if self.limit == self.capacity else 2 * self.capacity

    def ask(self, function: Callable, *arguments):
        """What a function gives where the jobs will run."""
        return self.ray.get(self.ray.remote(function).options(**self.resources).remote(*arguments))

    def start(self, job: Job) -> None:
        """As of `Local`."""
        words = job.name, list(job.command), job.folder.resolve() / LOG, Path.cwd(), self.env
        task = self.task.options(name=job.name, max_retries=self.retries, **self.resources)
        self.busy[task.remote(*words)] = job

    def ended(self, seconds: float) -> list[tuple[Job, Ended]]:
        """As of `Local`."""
        try:
            ready = self.ray.wait(list(self.busy), timeout=seconds)[0]
        except (self.ray.exceptions.RayError, ConnectionError) as error:
            raise UserError(f"Ray is gone ({' '.join(str(error).split())}); the same command goes on") from None
        return [(self.busy.pop(reference), self._result(reference)) for reference in ready]

    def _result(self, reference) -> Ended:
        lost = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except lost.TaskCancelledError:
            return Ended(-signal.SIGTERM, "stopped")
        except lost.OutOfMemoryError:
            return Ended(1, "ended by Ray: its machine ran out of memory", True)
        except lost.RayTaskError as error:
            return Ended(1, str(error).strip().splitlines()[-1])
        except lost.RayError as error:  # the worker or its node, each time that Ray tried
            return Ended(1, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")

    def stop(self, kill: bool = False) -> None:
        """As of `Local`."""
        for reference in self.busy:
            self.ray.cancel(reference, force=kill)

    def close(self) -> None:
        self.ray.shutdown()


def processors() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environments(processes: int | None, gpus: int) -> list[dict[str, str]]:
    """Variables for each of so many processes, by default one per GPU: a GPU in turn and a share of the cores."""
    named = os.environ.get(CUDA)
    devices = (named.split(",") if named else [str(number) for number in range(gpus)])[:gpus]
    count = processes or max(1, len(devices))
    found: list[dict[str, str]] = [{} for _ in range(count)]
    for number, env in enumerate(found):
        if devices:
            env[CUDA] = devices[number % len(devices)]
        if count > 1 and "OMP_NUM_THREADS" not in os.environ:
            env["OMP_NUM_THREADS"] = str(max(1, processors() // count))
    return found
