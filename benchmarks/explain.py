"""Explanations beside pytorch-grad-cam, Captum and TorchCAM: speed, peak memory, agreement, and maps streamed to disk.

    make bench                        # installs the peers, then everything that needs no data
    python benchmarks/explain.py [--networks resnet18,resnet50] [--batches 1,16] [--rounds 7] [--stream 10000]
    python benchmarks/explain.py --precision RUN DATA    # bfloat16 beside float32 on a trained network

All in one run, with the same threads, weights, pictures and classes. The ways of a table alternate; printed are medians
after a warm-up. The networks have random weights, which changes no time. Upsampling to the pictures' size is included
for everybody; pytorch-grad-cam also scales to [0, 1] and moves to NumPy, which it cannot leave out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import captum
import numpy as np
import pytorch_grad_cam as pgc
import torch
import torch.nn.functional as F
import torchcam
from captum.attr import GuidedBackprop, GuidedGradCam, LayerAttribution, LayerGradCam, Saliency
from common import alternate
from PIL import Image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy.stats import spearmanr
from torch import Tensor, nn
from torchvision import models

import clearwing as cw
from clearwing.data import synthetic
from clearwing.jobs.environment import processor_name
from clearwing.train.devices import has_bfloat16

SIZE, STREAMED, STAGES = 224, 64, ["layer2", "layer3", "layer4"]
SIX = {  # ours: (pytorch-grad-cam's, TorchCAM's)
    "grad-cam": (pgc.GradCAM, torchcam.methods.GradCAM),
    "grad-cam++": (pgc.GradCAMPlusPlus, torchcam.methods.GradCAMpp),
    "xgrad-cam": (pgc.XGradCAM, torchcam.methods.XGradCAM),
    "layer-cam": (pgc.LayerCAM, torchcam.methods.LayerCAM),
    "hires-cam": (pgc.HiResCAM, None),
    "element-wise": (pgc.GradCAMElementWise, None),
}
Way = Callable[[], Any]


class Bench:
    """A network, pictures and classes, and every way to explain them."""

    def __init__(self, name: str, batch: int, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.model: nn.Module = getattr(models, name)().eval().to(device)
        self.images = torch.rand(batch, 3, SIZE, SIZE).to(device)
        self.leaf = self.images.clone().requires_grad_()  # the peers' input methods ask for it, and would set it
        self.target = torch.arange(batch, device=device) % 1000
        self.device = device
        last = torch.channels_last
        self.model_last = getattr(models, name)().eval().to(device, memory_format=last)
        self.model_last.load_state_dict(self.model.state_dict())
        self.images_last = self.images.contiguous(memory_format=last)

    def forward(self) -> None:
        with torch.inference_mode():
            self.model(self.images)

    def clearwing(self, methods: Any = "grad-cam", layers: Any = "layer4", precision: str | None = None) -> Any:
        return cw.explain(self.model, self.images, methods, layers, target=self.target, precision=precision)

    def captum_cam(self, layer: str = "layer4", last: bool = False) -> Tensor:
        model, images = (self.model_last, self.images_last) if last else (self.model, self.images)
        peer = LayerGradCam(model, getattr(model, layer))
        cam = peer.attribute(images, self.target, relu_attributions=True)
        return LayerAttribution.interpolate(cam, (SIZE, SIZE), "bilinear").detach()[:, 0]

    def captum_saliency(self) -> Tensor:
        return Saliency(self.model).attribute(self.leaf, self.target).amax(1)

    def captum_guided(self) -> Tensor:
        return GuidedBackprop(self.model).attribute(self.leaf, self.target)

    def captum_guided_cam(self) -> Tensor:
        peer = GuidedGradCam(self.model, self.model.layer4)
        return peer.attribute(self.leaf, self.target, interpolate_mode="bilinear")

    def pytorch_grad_cam(self, kind: Any = pgc.GradCAM, layer: str = "layer4") -> Any:
        with kind(self.model, [getattr(self.model, layer)]) as cam:
            return cam(self.images, [ClassifierOutputTarget(int(k)) for k in self.target])

    def torchcam(self, kind: Any = torchcam.methods.GradCAM, layer: str = "layer4") -> Tensor:
        with kind(self.model, layer) as extractor:
            logits = self.model(self.images)
            maps = extractor(self.target.tolist(), logits)[0]
        return F.interpolate(maps[:, None], (SIZE, SIZE), mode="bilinear")[:, 0]

    def twenty(self, six: Callable[[str, str], Any]) -> None:
        """Six CAM methods at three stages, saliency and guided backpropagation, a call each."""
        for method in SIX:
            for layer in STAGES:
                six(method, layer)
        self.captum_saliency()
        self.captum_guided()

    def quickest(self, method: str, layer: str) -> None:
        """The quickest peer that has the method."""
        if method == "grad-cam":
            self.captum_cam(layer)
        elif SIX[method][1] is not None:
            self.torchcam(SIX[method][1], layer)
        else:
            self.pytorch_grad_cam(SIX[method][0], layer)

    def tables(self) -> dict[str, dict[str, Way]]:
        """Ways by table; the first of each is what the ratios are to."""
        half = {"bfloat16"} if self.device != "cpu" or has_bfloat16("cpu") else set()

        def ours(*args: Any) -> dict[str, Way]:
            ways = {"clearwing": lambda: self.clearwing(*args)}
            return ways | {f"clearwing, {p}": lambda p=p: self.clearwing(*args, precision=p) for p in half}

        every = [*SIX, "saliency", "guided-backprop"]
        return {
            "Grad-CAM with upsampling": {
                "plain forward pass": self.forward,
                "pytorch-grad-cam": self.pytorch_grad_cam,
                "TorchCAM": self.torchcam,
                "Captum": self.captum_cam,
                "Captum in channels_last": lambda: self.captum_cam(last=True),
                **ours(),
            },
            "Guided backpropagation": {
                "plain forward pass": self.forward,
                "Captum": self.captum_guided,
                **ours("guided-backprop", None),
            },
            "Guided Grad-CAM": {
                "plain forward pass": self.forward,
                "Captum": self.captum_guided_cam,
                **ours("guided-grad-cam"),
            },
            "Six CAM methods at three stages, saliency and guided backpropagation: 20 maps": {
                "plain forward pass": self.forward,
                "pytorch-grad-cam and Captum, 20 calls": lambda: self.twenty(
                    lambda method, layer: self.pytorch_grad_cam(SIX[method][0], layer)
                ),
                "the quickest peer for each, 20 calls": lambda: self.twenty(self.quickest),
                **ours(every, STAGES),
            },
        }


def show(title: str, batch: int, seconds: dict[str, float]) -> None:
    """One table: pictures a second, and for each of ours how many times as fast as each other way."""
    own = [name for name in seconds if name.startswith("clearwing")]
    print(f"\n{title}, batch {batch}\n")
    print("| way | pictures/s | " + " | ".join(f"{name} is so many times as fast" for name in own) + " |")
    print("|---|---|" + "---|" * len(own))
    for name, value in seconds.items():
        ratios = " | ".join(f"{value / seconds[one]:.2f}" for one in own)
        print(f"| {name} | {batch / value:,.1f} | {ratios} |", flush=True)


def agreement(bench: Bench) -> None:
    """How far our float32 maps are from Captum's, relative to the largest value."""
    found, theirs = bench.clearwing().maps[:, 0], bench.captum_cam()
    cam = float((found - theirs).abs().max() / theirs.abs().max())
    found, theirs = bench.clearwing("guided-backprop", None).channels[:, 0], bench.captum_guided().detach()
    guided = float((found - theirs).abs().max() / theirs.abs().max())
    print(f"\nlargest difference to Captum's, over the largest value: Grad-CAM {cam:.1e}, guided backprop {guided:.1e}")


MEMORY = {  # each in a process of its own
    "plain forward pass": Bench.forward,
    "pytorch-grad-cam": Bench.pytorch_grad_cam,
    "TorchCAM": Bench.torchcam,
    "Captum": Bench.captum_cam,
    "Captum in channels_last": lambda bench: bench.captum_cam(last=True),
    "clearwing": Bench.clearwing,
    "clearwing, bfloat16": lambda bench: bench.clearwing(precision="bfloat16"),
}


def peak_of(way: str, name: str, batch: int) -> int:
    """Bytes by which one call raised the peak of this process above what it held before (Linux)."""
    bench = Bench(name, batch)
    small = Bench(name, 1)
    MEMORY[way](small)  # what is loaded and built at the first call
    del small
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed would hide what is asked for
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    MEMORY[way](bench)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory(name: str, batch: int) -> None:
    print(f"\nPeak memory of Grad-CAM beyond network and pictures, {name}, batch {batch}\n\n| way | MB |\n|---|---|")
    for way in MEMORY:
        command = [sys.executable, __file__, "--peak", way, "--networks", name, "--batches", str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {way} | {json.loads(done.stdout.splitlines()[-1]) / 1e6:,.0f} |", flush=True)


NET = """
import torch
import clearwing as cw


def net():
    torch.manual_seed(0)
    return cw.build("resnet14", num_classes=10).eval()
"""


def stream(count: int) -> None:
    """`clearwing explain --maps-only` on drawn pictures: time and peak memory of the command (Linux)."""
    print(f"\nRaw Grad-CAM maps to disk, resnet14, {STREAMED} px, the command with its start\n")
    print("| pictures | seconds | pictures/s | peak memory, MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "net.py").write_text(NET, encoding="utf-8")
        drawn, _, _ = synthetic.draw_split("train", 100, size=STREAMED)
        for n in (count // 10, count):
            pictures = folder / f"pictures{n}"
            for i in range(n):
                path = pictures / f"{i // 1000}" / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(drawn[i % len(drawn)]).save(path)
            line = [sys.executable, "-m", "clearwing.cli", "explain", f"{folder}/net.py:net", str(pictures), "--json"]
            line += ["--out", f"{folder}/maps{n}", "--size", str(STREAMED), "--maps-only"]
            began = time.perf_counter()
            process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
            _, code, usage = os.wait4(process.pid, 0)
            if code:
                raise SystemExit(f"{' '.join(line)}: exit {code}")
            seconds = time.perf_counter() - began
            print(f"| {n:,} | {seconds:.1f} | {n / seconds:,.0f} | {usage.ru_maxrss / 1e3:,.0f} |", flush=True)


def precision(where: str, folder: str) -> None:
    """Spearman correlation of bfloat16 maps before their ReLU with the float32 ones, on a trained network."""
    run = cw.Run.load(where)
    pictures = cw.load_pictures(cw.open_data(folder).split("val"), run.config["model"]["input_size"], fit="squash")
    print(f"\nbfloat16 beside float32 maps (relu=False), {run.config['train']['model']}, {len(pictures)} pictures\n")
    print("| map | Spearman, 5th percentile | median | smallest |\n|---|---|---|---|")
    methods, layers = ["grad-cam", "layer-cam"], ["layer1", "layer2", "layer3"]
    found: dict[str, list[float]] = {}
    for batch in pictures.batches(32):
        exact = cw.explain(run.model, batch, methods, layers, relu=False, precision="float32")
        target = next(iter(exact.values())).classes
        half = cw.explain(run.model, batch, methods, layers, relu=False, precision="bfloat16", target=target)
        for key, e in exact.items():
            pairs = zip(e.maps.flatten(1).numpy(), half[key].maps.flatten(1).numpy(), strict=True)
            found.setdefault(key, []).extend(float(spearmanr(a, b).statistic) for a, b in pairs)
    for key, values in found.items():
        low, middle = np.percentile(values, [5, 50])
        print(f"| {key} | {low:.5f} | {middle:.5f} | {min(values):.5f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet18,resnet50")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stream", type=int, default=10_000, metavar="PICTURES", help="0 leaves it out")
    parser.add_argument("--precision", nargs=2, metavar=("RUN", "DATA"), help="only this, on the val split of DATA")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="captum")
    warnings.filterwarnings("ignore", module="torch")  # of the full backward hooks that peers put on the network
    networks, batches = args.networks.split(","), [int(batch) for batch in args.batches.split(",")]
    if args.peak:
        print(json.dumps(peak_of(args.peak, networks[0], batches[0])))
        return
    peers = f"captum {captum.__version__}, torchcam {torchcam.__version__}, grad-cam {version('grad-cam')}"
    print(f"clearwing {cw.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {peers}")
    where = torch.cuda.get_device_name() if args.device == "cuda" else processor_name()
    print(
        f"{where}, {torch.get_num_threads()} threads; medians of {args.rounds} rounds, alternating, after one warm-up"
    )
    if args.precision:
        precision(*args.precision)
        return
    for name in networks:
        for batch in batches:
            bench = Bench(name, batch, args.device)
            print(f"\n### {name}, {SIZE} px, batch {batch}")
            agreement(bench)
            for title, ways in bench.tables().items():
                show(title, batch, alternate(ways, args.rounds))
    if args.device == "cpu":
        for name in networks:
            memory(name, max(batches))
        if args.stream:
            stream(args.stream)


if __name__ == "__main__":
    main()
