"""The whole command in two processes: the run of one, one writer, and after a kill it goes on where it was saved."""

import json
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from clearwing.cli import main, parse
from clearwing.config import TrainConfig
from clearwing.train.processes import in_processes
from clearwing.types import ClearwingError

OPTIONS = {"model": "resnet8", "widths": (4, 8, 8), "size": 32, "epochs": 4, "batch_size": 4, "precision": "float32"}


def words(options):
    for name, value in options.items():
        yield f"--{name.replace('_', '-')}"
        yield from map(str, value if isinstance(value, tuple) else [value])


def killed_in_the_third_epoch(config):
    """What one of the processes does: the second dies when two epochs are saved."""
    from clearwing.jobs.session import Session
    from clearwing.jobs.train import train

    begin = Session.prepare

    def prepare(self, module, epoch):
        if epoch == 2 and self.fabric.global_rank == 1:
            for _ in range(6000):  # the first process may still be writing
                if len((Path(config.out) / "metrics.jsonl").read_text().splitlines()) == 2:
                    break
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(self, module, epoch)

    Session.prepare = prepare
    return train(config)


def test_two_processes_killed_and_resumed_are_one_run_in_one_process(photos, tmp_path, capfd):
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert main(["train", str(photos), "--out", str(alone), *words(OPTIONS), "--json"]) == 0
    # Saved after every epoch, also where a busy disk makes saving slow: it would be passed over for a while.
    config = TrainConfig(data=str(photos), out=str(both), devices=2, json=True, save_every="0.001s", **OPTIONS)
    capfd.readouterr()
    with pytest.raises(ClearwingError, match=r"rank 1 was killed by SIGKILL.*--resume"):
        in_processes(killed_in_the_third_epoch, config, devices=2)
    assert capfd.readouterr().out == ""  # the result of a command is its only object there
    rows = (both / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2
    assert main(["train", str(photos), "--out", str(both), "--resume", "--devices", "1", "--json"]) == 0

    lines = {run: (run / "metrics.jsonl").read_text().splitlines() for run in (alone, both)}
    assert lines[both][:2] == rows
    for one, two in zip(*(map(json.loads, lines[run]) for run in (alone, both)), strict=True):
        assert one.keys() == two.keys()
        assert one["val_accuracy"] == two["val_accuracy"]
        for name in ("train_loss", "val_loss", "train_accuracy", "lr"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    for name in ("model.safetensors", "best.safetensors"):
        weights = load_file(alone / name)
        assert weights.keys() == load_file(both / name).keys()
        for key, value in load_file(both / name).items():
            assert_close(value, weights[key], rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    assert {file.name for file in both.iterdir()} == {file.name for file in alone.iterdir()}
    assert not list(both.glob(".*.part"))


def test_settings_from_a_file_reach_other_processes(photos, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"train": {"epochs": 3}}))
    argv = ["train", str(photos), "--out", str(tmp_path / "run"), "--config", str(tmp_path / "config.json")]
    config = parse(argv)[1]
    assert config.epochs == 3
    assert pickle.loads(pickle.dumps(config)) == config
