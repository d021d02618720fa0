"""Devices that are not there are refused; a process knows how it was started."""

import pytest
import torch

from clearwing.train import devices
from clearwing.train.devices import check_devices, is_child, make_fabric
from clearwing.train.processes import in_processes
from clearwing.types import ClearwingError


@pytest.mark.parametrize(
    ("device", "count", "word"),
    [
        ("cpu", 0, "give at least 1"),
        ("cpu", 10_000, "CPU cores"),
        ("mps:0", 1, "give auto, cpu"),
        ("tpu", 1, "give auto, cpu"),
    ],
)
def test_wrong_devices_are_refused(device, count, word):
    with pytest.raises(ClearwingError, match=word):
        check_devices(device, count)


def test_one_of_many_cuda_devices_is_not_many(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_devices("cuda", 4)
    check_devices("cuda:3")
    for device, count, word in (("cuda:1", 2, "one device"), ("cuda", 5, "at most 4"), ("cuda:4", 1, "has 4 CUDA")):
        with pytest.raises(ClearwingError, match=word):
            check_devices(device, count)


def test_several_devices_are_several_processes(monkeypatch):
    with pytest.raises(ClearwingError, match="this is one process"):
        make_fabric("cpu", "float32", devices=2)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 6, "LOCAL_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ClearwingError, match="3 processes on each of 2 machines"):
        make_fabric("cpu", "float32", devices=2)
    with pytest.raises(ClearwingError, match="set MASTER_ADDR, MASTER_PORT, NODE_RANK"):
        in_processes(print, devices=1, nodes=2)


def test_srun_is_understood(monkeypatch):
    assert not is_child()
    monkeypatch.setenv("SLURM_NTASKS", "4")  # what is asked for in a job is not yet a group of processes
    assert not is_child()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(ClearwingError, match="--ntasks-per-node"):
        is_child()
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    environment, local, machines = devices._group()
    assert (type(environment).__name__, local, machines) == ("SLURMEnvironment", 2, 2)
