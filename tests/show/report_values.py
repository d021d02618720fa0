"""A small report with every part filled, for the tests of the page."""

import numpy as np

from clearwing.show import report as R


def full_report(names=("Danaus_plexippus", "Pieris_rapae", "Vanessa_cardui"), key="val/a_0001.jpg"):
    noise = np.random.default_rng(0)

    def tile():
        return noise.integers(0, 255, (96, 96, 3), np.uint8)

    rows = tuple(
        {
            "epoch": e,
            "train_loss": 2 / e,
            "train_accuracy": 1 - 1 / e,
            "val_loss": 2.2 / e,
            "val_accuracy": 0.95 - 1 / (e + 1),
            "lr": 0.1 / e,
            "seconds": 4.0,
            "images_per_s": 120.5,
        }
        for e in range(1, 13)
    )
    estimate = R.Estimate
    return R.Report(
        title="Butterflies, resnet14",
        when="20 November 2025",
        facts={"Model": "resnet14", "Parameters": "2.8 million"},
        specimen=R.Specimen(key, {"picture": tile(), "Grad-CAM": tile(), "mask": tile()}, "median IoU"),
        data=R.DataFacts("demo", names, {"train": 90, "val": 40}, ("val is a stratified 20 % slice of train",)),
        training=R.Training(rows, 83.0),
        evaluations=(
            R.Evaluation(
                "val",
                40,
                estimate(0.9, 0.762, 0.961),
                loss=0.31,
                top5=1.0,
                per_class=tuple(R.ClassScore(name, 13, estimate(0.8, 0.5, 0.95)) for name in names),
                confusion=((12, 1, 0), (0, 13, 0), (2, 1, 11)),
                class_names=names,
            ),
        ),
        mistakes=tuple(R.Mistake(key, names[0], names[1], 0.71, tile(), tile(), tile()) for _ in range(3)),
        mistakes_total=4,
        methods=tuple(
            R.MethodRow(key, tile(), {"saliency": tile(), "Grad-CAM": tile(), "LayerCAM": tile()}, names[0])
            for _ in range(2)
        ),
        timeline=R.Timeline(
            tuple(R.TimelineRow(key, names[0], tile(), {e: (tile(), e / 20) for e in (0, 6, 12)}) for _ in range(2)),
            {e: e / 24 for e in range(13)},
            masked=40,
            baseline=0.4,
            about="Otsu's threshold.",
        ),
        segmentation=R.Segmentation(
            "val",
            40,
            (
                R.Pipeline("refine", "first", estimate(0.786, 0.765, 0.806), about="HiResCAM seeds, GrabCut"),
                R.Pipeline("classic", "other", estimate(0.498, 0.478, 0.517), estimate(0.288, 0.262, 0.313)),
                R.Pipeline(
                    "GrabCut from a centre box",
                    "baseline",
                    estimate(0.703, 0.676, 0.729),
                    estimate(0.083, 0.061, 0.106),
                    "no network",
                    best=True,
                ),
                R.Pipeline("everything", "baseline", estimate(0.25, 0.24, 0.26), estimate(0.536, 0.51, 0.56)),
            ),
            per_image=tuple(np.linspace(0.3, 0.95, 40).tolist()),
            gallery=tuple(R.MaskPicture(key, tile(), iou) for iou in (0.3, 0.95, 0.6, 0.5, 0.8)),
            metrics=(R.Metric("Dice", estimate(0.861, 0.84, 0.88)), R.Metric("Boundary F", estimate(0.7), "outlines")),
            curve=R.ThresholdCurve(
                tuple(t / 10 for t in range(11)),
                (0.25, 0.4, 0.55, 0.61, 0.58, 0.5, 0.4, 0.3, 0.2, 0.1, 0.02),
                (0.61, 0.3),
                n=40,
                pxap=0.712,
                max_box_acc=0.825,
                max_box_acc_v2=0.654,
            ),
            causes=(
                R.Cause("empty map", 0, "no evidence"),
                R.Cause("wrong class", 2, "another class", tuple(R.MaskPicture(key, tile(), 0.2) for _ in range(2))),
                R.Cause("too big", 9, "more pixels", tuple(R.MaskPicture(key, tile(), 0.4) for _ in range(7))),
                R.Cause("too small", 0, "fewer pixels"),
            ),
            wrong_reason=R.WrongReason(
                3,
                (
                    R.MaskPicture(key, tile(), 0.11, "Pieris_rapae (91%)", looked=tile()),
                    R.MaskPicture(key, tile(), 0.24),
                ),
            ),
            fell_back=2,
        ),
        skipped=(("train/broken.jpg", "truncated JPEG"),),
        commands=("clearwing train DATA --out RUN", "clearwing report RUN DATA"),
        environment={"torch": "2.15.0", "device": "2 CPU cores"},
    )
