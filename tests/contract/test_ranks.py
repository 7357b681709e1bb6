"""Two processes that train as one: the same result as one, for every method."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract.ranks_worker import NETWORKS, networks_of, setting, trained

from ssl4mis import registry

HERE = Path(__file__).resolve().parent
UNEVEN = "uneven/mean_teacher"  # also with activation checkpointing
TOLERANCE = 1e-6  # of what has moved most: the losses are float32


@pytest.fixture(scope="session")
def together(tmp_path_factory, request):
    """A folder with what two processes made of every method."""
    out = tmp_path_factory.mktemp("ranks")
    names = request.config.getoption("--method") or registry.names()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, HERE.parents[:2]))}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           HERE / "ranks_worker.py", out, UNEVEN, *names],
                          env=env, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def check(name, network, together, folder):
    """The state of one process against those of two, which are the same to the last bit."""
    case = setting(name, network)
    before, alone = case.method().state_dict(), trained(case, folder)
    first, second = (torch.load(together / f"{name.replace('/', '-')}-{network}-{rank}.pt", weights_only=True)
                     for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    keys = [key for key in alone if alone[key].is_floating_point()]
    moved = max(float((alone[key] - before[key]).abs().max()) for key in keys)
    wrong = {key: float((first[key] - alone[key]).abs().max()) for key in keys}
    assert moved > 1e-4
    assert max(wrong.values()) < TOLERANCE * moved, max(wrong, key=wrong.get)
    assert all(torch.equal(first[key], alone[key]) for key in alone.keys() - keys)


def test_the_result_is_that_of_one_process(method_name, together, tmp_path):
    """Losses, thresholds, mixtures and the statistics of batch norms are of the whole batch."""
    for network in networks_of(method_name):
        check(method_name, network, together, tmp_path / network)


@pytest.mark.parametrize("network", NETWORKS)
def test_samples_that_cannot_be_shared_out_evenly(network, together, tmp_path):
    check(UNEVEN, network, together, tmp_path)


def test_one_process_writes(together):
    lines = (together / f"uneven-mean_teacher-{NETWORKS[0]}" / "events.jsonl").read_text().splitlines()
    assert len(lines) == 2
