"""The suite's commands as a user types them, each in a process of its own with its own environment.

Scripts run in forks of an interpreter that has loaded torch and the suite, which saves seconds for each. What is to
show what is loaded, or how fast, takes a fresh interpreter.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600  # seconds
LOADED = ["ssl4mis.run", "ssl4mis.predict", "ssl4mis.reproduce", "ssl4mis.cards", "ssl4mis.report", "nibabel",
          "scipy.stats"]  # fmt: skip


def command(*words, cwd=ROOT, fresh=False, path=(), **env) -> subprocess.CompletedProcess:
    """What became of the words after `python`, with its output as text; LA is not at hand.

    Args:
        fresh: in a new interpreter, as what is no script or has an environment of its own is anyway.
        path: folders to import from, beside the suite's.
    """
    words = [str(word) for word in words]
    kept = {name: value for name, value in os.environ.items() if name != "SSL4MIS_DATA"}
    fresh = fresh or env or "forkserver" not in multiprocessing.get_all_start_methods()
    env = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))} | env
    if fresh or not words[0].endswith(".py"):
        return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True,
                              timeout=PATIENCE)  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("out", "err")]
        process = context.Process(target=_run, args=(words, str(cwd), env, list(map(str, streams))))
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, PATIENCE)
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in streams))


def _run(words: list[str], cwd: str, env: dict[str, str], streams: list[str]) -> None:
    """Become the interpreter of a script, whose exit status is that of this process."""
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    script = Path(words[0]).resolve()
    sys.argv = words
    sys.path[:0] = [str(script.parent), *env["PYTHONPATH"].split(os.pathsep)]
    runpy.run_path(str(script), run_name="__main__")
