"""A run that is killed again and again ends where the uninterrupted one does, to the bit."""

import json
import multiprocessing
import random
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from clearwing.cli import main

# The server has torch imported, but no threads yet: a process forked from it begins in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["clearwing.jobs.train", "clearwing.data.synthetic"])
KILLS = 20


def command(argv):
    torch.set_num_threads(1)
    sys.exit(main(argv))


def killed(argv, state, saves, delay):
    """Start the command, and kill -9 it after it has saved so often and a moment more; whether it was still running."""
    process = CONTEXT.Process(target=command, args=(argv,))
    process.start()
    seen, last = 0, state.stat().st_mtime_ns if state.exists() else 0
    while process.is_alive() and seen < saves:
        now = state.stat().st_mtime_ns if state.exists() else 0
        seen, last = seen + (now != last), now
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def curve(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s", "waited")} for row in rows]


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is a matter of POSIX")
def test_killed_at_twenty_random_points_nothing_is_lost(tmp_path, photos):
    settings = ["--model", "resnet8", "--widths", "4", "4", "4", "--size", "16", "--batch-size", "2", "--epochs", "16"]
    settings += ["--ema", "0.9", "--cutout", "8", "--cutout-off", "0.3", "--flip", "alternate", "--mixup", "0.2"]
    settings += ["--threads", "1", "--no-tensorboard", "--json", "--device", "cpu"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["train", str(photos), "--out", str(whole), *settings]) == 0
    argv = ["train", str(photos), "--out", str(broken), *settings, "--save-every", "0.0001"]
    draw, kills = random.Random(0), 0
    for _ in range(KILLS):
        resume = ["--resume"] if (broken / "config.json").exists() else []
        kills += killed([*argv, *resume], broken / "state.pt", draw.randint(0, 3), draw.random() * 0.01)
    assert kills == KILLS
    assert not (broken / "metrics.jsonl").exists() or len(curve(broken)) < 16
    assert main([*argv, "--resume"]) == 0
    assert curve(broken) == curve(whole)
    for name in ("model.safetensors", "best.safetensors"):
        one, two = load_file(whole / name), load_file(broken / name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not list(broken.rglob(".*.part"))
