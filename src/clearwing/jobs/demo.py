"""The job `demo`: the whole path on the built-in data set."""

from __future__ import annotations

import time
from typing import Any

from clearwing.config import DemoConfig, EvaluateConfig, ReportConfig, SegmentConfig, TrainConfig
from clearwing.jobs.evaluate import evaluate
from clearwing.jobs.report import report
from clearwing.jobs.segment import segment
from clearwing.jobs.train import train

MODEL, SIZE, EPOCHS = "resnet8", 64, 16


def demo(config: DemoConfig) -> dict[str, Any]:
    """Draw, train, evaluate, segment twice, report; returns what the command prints."""
    began = time.monotonic()
    common: dict[str, Any] = {"device": config.device, "limit": config.limit, "json": config.json}
    trained = train(
        TrainConfig(
            data="demo",
            out=config.out,
            model=MODEL,
            size=SIZE,
            epochs=config.epochs or EPOCHS,
            # The insects lie anywhere in the frame: shifts keep them whole, where resized crops would often lose them.
            crop="padded",
            padding=8,
            jitter=0.1,
            batch_size=32,
            seed=config.seed,
            overwrite=config.overwrite,
            tensorboard=False,
            **common,
        )
    )
    if trained["exit_code"]:
        return trained
    scored = evaluate(EvaluateConfig(run=config.out, data="demo", split="test", **common))
    masks = {
        pipeline: segment(
            SegmentConfig(
                run=config.out,
                data="demo",
                split="test",
                pipeline=pipeline,
                out=f"{config.out}/masks/{pipeline}",
                baselines=pipeline == "refine",
                overwrite=config.overwrite,
                **common,
            )
        )
        for pipeline in ("refine", "classic")
    }
    written = report(ReportConfig(run=config.out, data="demo", split="test", **common))
    seconds = time.monotonic() - began
    result = {
        "run": config.out,
        "seconds": seconds,
        "accuracy": scored["json"]["accuracy"],
        "ci95": scored["json"]["ci95"],
        "mean_iou": masks["refine"]["json"]["mean_iou"],
        "classic_mean_iou": masks["classic"]["json"]["mean_iou"],
        "baselines": masks["refine"]["json"]["baselines"],
        "differences": masks["refine"]["json"]["differences"],
        "report": written["json"]["report"],
        "skipped": 0,
    }
    text = [
        scored["text"].splitlines()[0],
        *masks["refine"]["text"].splitlines()[1:-1],
        f"  {'classic recipe':<20}{result['classic_mean_iou']:.3f}",
        f"done in {seconds:.0f} s; open {written['json']['report']}",
    ]
    return {"json": result, "text": "\n".join(text)}
