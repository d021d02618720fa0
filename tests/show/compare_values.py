"""A small comparison with every part filled, for the tests of the page."""

import numpy as np

from clearwing.show import compare as C

NAMES = ("runs_a", "runs_b", "a/long-name-of-a-third-run")


def full_comparison(names=NAMES, key="val/Danaus_plexippus/a_0001.jpg", true="Danaus_plexippus"):
    noise = np.random.default_rng(0)

    def rows(speed):
        return tuple(
            {"epoch": e, "train_loss": 2 / e, "val_loss": 2.2 / e, "lr": 0.1 / e, "seconds": speed}
            | ({"val_accuracy": 0.95 - 0.5 / e} if e % 2 == 0 else {})
            for e in range(1, 13)
        )

    def disputed(first, second):
        return C.Disputed(key, noise.integers(0, 255, (90, 120, 3), np.uint8), true, first, second)

    right, wrong = (true, 0.9), ("Pieris_rapae", 0.6)
    three = tuple(C.Estimate(v, v - 0.04, v + 0.03) for v in (0.9, 0.92, 0.88))
    return C.Comparison(
        runs=tuple(
            C.Contender(name, f"/runs/{name}", rows(20.0 + i), three[i], "167 pictures of val")
            for i, name in enumerate(names)
        ),
        figures=(
            C.Figure("Accuracy on val", three, "share", "last weights"),
            C.Figure("Best accuracy on val", three, "share", "", ("epoch 7", "epoch 9", "")),
            C.Figure("Parameters", (C.Estimate(696618), C.Estimate(3e6), None), "count"),
            C.Figure("Time of all epochs", tuple(map(C.Estimate, (83.0, 7300.0, 2.0))), "time"),
            C.Figure("Loss on val", (C.Estimate(0.31234), None, None)),
        ),
        settings=(C.Setting("train.lr", ("0.1", "not set", None)), C.Setting("train.seed", ("0", "1", "2"))),
        pairs=(
            C.Pair(
                "val", "last", names[0], names[1], 100, 80, (key,), (f"{key}2", f"{key}3"), 1.0,
                (disputed(right, wrong), disputed(wrong, right), disputed(wrong, right)),
            ),
            C.Pair("val", "best", names[0], names[2], 100, 80, (), (), 1.0),
        ),
        notes=("the runs watched different pictures",),
        commands=("clearwing report runs/a runs/b",),
        when="20 November 2025",
    )  # fmt: skip
