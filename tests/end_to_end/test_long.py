"""A run of thousands of steps takes as much memory and as many files as one of hundreds."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARM = 2000, 500


def state() -> tuple[int, int]:
    """Resident memory of this process in KiB, and its open files."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]), len(os.listdir("/proc/self/fd"))


def main(method: str, out: str, leaks: str) -> None:
    """A run that prints its state after so many steps; with `leaks` it holds on to a tensor of each, and to files."""
    sys.path.insert(0, str(ROOT))
    import torch

    from ssl4mis import config, run, trainer

    held, original = [], trainer.Trainer._train_step

    def step(self, clock, stage):
        if self.done in (WARM, STEPS - 1):
            print("state", *state(), flush=True)
        if leaks == "True":
            held.append(torch.ones(1024))
            if self.done % 100 == 1:
                held.append(open(os.devnull))
        return original(self, clock, stage)

    trainer.Trainer._train_step = step
    run.evaluate_together = lambda *parts, **options: sys.exit(0)  # of training alone
    specs, options = config.parse([
        "--method", method, "--dataset", "phantom-2d2c", "--labeled", "2", "--width", "2", "--iterations", str(STEPS),
        "--patch", "[32,32]", "--stride", "[32,32]", "--network", "unet", "--device", "cpu", "--out", out])
    run.run(specs[0], options, lambda text: None)


def growth(method, out, leaks=False) -> tuple[int, int]:
    """KiB and files more at the end than after the first steps."""
    done = subprocess.run([sys.executable, __file__, method, out, str(leaks)], text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = ([int(word) for word in line.split()[1:]] for line in done.stdout.splitlines() if "state" in line)
    return last[0] - first[0], last[1] - first[1]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_memory_and_files_stay(tmp_path):
    grown, files = growth("mean_teacher", tmp_path)
    assert grown < 2 * (STEPS - WARM) and files == 0, (grown, files)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_leak_would_be_seen(tmp_path):
    """Of 4 KiB and a file in a hundred steps, which is twice what the test above lets pass."""
    grown, files = growth("supervised", tmp_path, leaks=True)
    assert grown > 3 * (STEPS - WARM) and files == (STEPS - WARM) // 100, (grown, files)


if __name__ == "__main__":
    main(*sys.argv[1:])
