"""The job `export`: a network as one ONNX file, tried in onnxruntime beside torch before it gets its name."""

from __future__ import annotations

import copy
import importlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clearwing import __version__
from clearwing.attribution.network import exact
from clearwing.config import ExportConfig
from clearwing.jobs import inputs
from clearwing.jobs.decoder import has_decoder
from clearwing.jobs.doctor import drawn
from clearwing.jobs.progress import Progress
from clearwing.measure.overlap import iou
from clearwing.models.decoder import Segmenter
from clearwing.run import make_folder, plain
from clearwing.types import ClearwingError, atomic_path

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OPSETS = range(18, 24)
"""From the first that torch writes without a conversion to the last that torch 2.11 to 2.15 say they know."""
LARGEST = 2**31 - 2**24
"""Bytes of weights that fit one file: protobuf ends at 2 GiB; what is kept back is for the graph."""
PICTURES, BATCHES = 10, (1, 5)
TOLERANCE = 1e-3
"""The most by which onnxruntime and torch may differ: in logits as a share of the largest one, in probabilities."""
FITS = {
    "squash": "resize the whole picture to {size} x {size}",
    "crop": "cut out the largest centred square and resize it to {size} x {size}",
    "pad": "pad the picture to a square with its mean colour and resize it to {size} x {size}",
}


@dataclass(frozen=True)
class Agreement:
    """How near onnxruntime came to torch in float32, over all pictures and sizes of batch."""

    pictures: int
    logits: float  # the largest difference, as a share of the largest logit
    same_class: float  # share of the answers
    masks: float | None = None  # the largest difference of a probability, where the class is the same
    mask_iou: float | None = None  # the smallest


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a network as ONNX; returns what the command prints."""
    check_packages()
    out = Path(config.out)
    check(out, config.opset, config.limit, config.overwrite)
    loaded = inputs.open_model(config.model, size=config.size, fit=config.fit, classes=config.classes)
    module = with_decoder(loaded, config.decoder)
    check_weights(module)
    device = inputs.pick_device(config.device)
    about = description(loaded, isinstance(module, Segmenter))
    began = time.monotonic()
    with Progress(config.json) as progress:
        if loaded.run is not None and loaded.run.decoder_about() and not isinstance(module, Segmenter):
            why = "" if config.decoder == "no" else ", it is of other weights, or not whole"
            progress.say(f"note: the decoder is left out{why}")
        progress.say(f"exporting {loaded.name}, then comparing onnxruntime with torch")
        images = pictures(config.limit or PICTURES, loaded.size, loaded.channels)
        agreement = export_onnx(module, out, images, opset=config.opset, about=about, device=device)
    result: dict[str, Any] = {
        "model": loaded.name,
        "out": str(out),
        "bytes": out.stat().st_size,
        "seconds": time.monotonic() - began,
        "opset": config.opset,
        "decoder": isinstance(module, Segmenter),
        "size": loaded.size,
        "fit": loaded.fit,
        "input": about["images"],
        "outputs": {name: about[name] for name in outputs_of(module)},
        "tolerance": TOLERANCE,
        "agreement": asdict(agreement),
    }
    text = [
        f"{out}: {result['bytes'] / 1e6:.1f} MB, opset {config.opset}; {told(agreement)}",
        *(f"{name}: {about[name]}" for name in ("images", *outputs_of(module))),
    ]
    return {"json": plain(result), "text": "\n".join(text)}


def check(out: Path, opset: int, limit: int | None, overwrite: bool) -> None:
    """Refuse what cannot be meant, and files that are in the way."""
    if out.suffix.lower() != ".onnx":
        raise ClearwingError("--out", out, "give a file that ends in .onnx")
    if out.is_dir():
        raise ClearwingError("--out", out, "a folder is in the way; give another name")
    if out.exists() and not overwrite:
        raise ClearwingError("--out", out, "exists; use --overwrite or another name")
    if opset not in OPSETS:
        raise ClearwingError("--opset", opset, f"give {OPSETS[0]} to {OPSETS[-1]}")
    if limit is not None and limit < 1:
        raise ClearwingError("--limit", limit, "give at least 1 picture")


def check_packages() -> None:
    """Raise ClearwingError where one of the packages of the extra [onnx] is missing."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            mend = "pip install 'clearwing[onnx]'"
            raise ClearwingError("export", f"{package} is not installed", mend) from error


def check_weights(module: nn.Module) -> None:
    weights = 4 * sum(held.numel() for held in (*module.parameters(), *module.buffers()))
    if weights > LARGEST:
        raise ClearwingError("MODEL", f"{weights / 2**30:.1f} GiB of weights", "one ONNX file holds less than 2 GiB")


def with_decoder(loaded: inputs.Loaded, decoder: str) -> nn.Module:
    """The network, or the Segmenter of a run that has a decoder of its present weights."""
    if loaded.run is not None and decoder != "no" and has_decoder(loaded.run):
        return loaded.run.load_segmenter()
    if decoder == "yes":
        mend = "has no decoder of its weights; clearwing segment RUN DATA --pipeline decoder trains one for a RUN"
        raise ClearwingError("--decoder", decoder, f"{loaded.name} {mend}")
    return loaded.model


def description(loaded: inputs.Loaded, masks: bool) -> dict[str, str]:
    """What the file says of itself: its metadata, all of them text."""
    size, names = loaded.size, loaded.model.class_names
    colours = "RGB" if loaded.channels == 3 else "grey" if loaded.channels == 1 else "with all channels"
    about = {
        "clearwing": __version__,
        "model": loaded.name,
        "class_names": json.dumps(names),
        "input_size": str(size),
        "fit": loaded.fit,
        "images": f"float32 (N, {loaded.channels}, {size}, {size}), {colours}, in [0, 1]; any N. Mean and std are "
        f"inside. {FITS[loaded.fit].format(size=size).capitalize()}, bilinear with antialiasing.",
        "logits": f"float32 (N, {loaded.model.num_classes or 'K'}), softmax over the classes gives probabilities"
        + ("; class_names has the names in this order." if names else "."),
    }
    if masks:
        about["masks"] = (
            f"float32 (N, {size}, {size}), the probability that a pixel is foreground; the mask is where it is at "
            "least 0.5. Bring it back to the picture by the inverse of the resizing."
        )
    return about


def pictures(count: int, size: int, channels: int) -> Tensor:
    """What both are tried on: noise and drawn insects by turns, (count, C, size, size) in [0, 1]."""
    insects = drawn((count + 1) // 2, size, channels)
    noise = torch.rand(insects.shape, generator=torch.Generator().manual_seed(0))
    return torch.stack((noise, insects), 1).flatten(0, 1)[:count]


def outputs_of(module: nn.Module) -> tuple[str, ...]:
    return ("logits", "masks") if isinstance(module, Segmenter) else ("logits",)


class Exported(nn.Module):
    """What the file computes: logits (N, K), and of a Segmenter the probability of foreground (N, H, W), in float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # (N, C, H, W) in [0, 1]
        if not isinstance(self.module, Segmenter):
            return (self.module(images).float(),)
        logits, masks = self.module(images)
        return logits.float(), masks.float().sigmoid()


def export_onnx(
    module: nn.Module,
    out: str | Path,
    images: Tensor,
    *,
    opset: int = OPSETS[0],
    about: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
) -> Agreement:
    """Write a network (a Classifier, a Segmenter, or any that maps pictures to logits) as one ONNX file, and try it.

    The file takes any number of pictures "images" of the size of these, and gives "logits", and of a Segmenter
    "masks", probabilities of that size. It has its name, or replaces a file of that name, only after onnxruntime (on
    the CPU) agreed with torch about these pictures. The module is left as it is; the file holds its weights in float32.

    images: (N, C, H, W) in [0, 1].
    about: the file's metadata.
    device: where torch computes what it is compared with, with TF32 off.

    >>> export_onnx(model, "model.onnx", torch.rand(5, 3, 128, 128)).logits
    2.1e-07

    Raises ClearwingError where the network cannot be exported, or onnxruntime differs (see `compare`).
    """
    out = Path(out)
    check_packages()
    check_weights(module)
    make_folder(out.parent)
    exported = Exported(copy.deepcopy(module).float().cpu().to(memory_format=torch.contiguous_format))
    model = to_onnx(exported, images, opset)
    describe(model, about or {})
    with atomic_path(out) as temporary:
        temporary.write_bytes(model.SerializeToString())
        return compare(temporary, exported.to(device), images)


def to_onnx(exported: Exported, images: Tensor, opset: int) -> Any:
    """The onnx.ModelProto of a network, with N free."""
    import onnx

    names = outputs_of(exported.module)
    two = torch.zeros(2, *images.shape[1:])  # of one picture, torch would export a network for one
    try:
        with warnings.catch_warnings():  # torch 2.11 warns of its own use of LeafSpec
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            program = torch.onnx.export(
                exported,
                (two,),
                dynamo=True,
                dynamic_shapes=({0: "N"},),  # a Dim would be fixed at 2 in silence where the network reads its value
                input_names=["images"],
                output_names=list(names),
                opset_version=opset,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        if isinstance(cause, ClearwingError):
            raise cause from error
        mend = "check --size; its forward must neither fix N (len(x) does, x.shape[0] does not) nor branch on values"
        raise ClearwingError("MODEL", f"cannot be exported ({short(cause)})", mend, exit_code=1) from error
    model = program.model_proto  # type: ignore[union-attr]
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        value = f"torch exported what onnx rejects ({short(error)})"
        raise ClearwingError("MODEL", value, "try another --opset", exit_code=1) from error
    made = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    batches = [value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)]
    if made != [opset] or set(batches) != {"N"}:
        value = f"exported with opset {made} and batches {batches}"
        raise ClearwingError("MODEL", value, "try another --opset", exit_code=1)
    return model


def describe(model: Any, about: Mapping[str, str]) -> None:
    """Give the ModelProto its metadata; take away those of its nodes, in which torch tells of the source files."""
    import onnx

    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
    onnx.helper.set_model_props(model, dict(about))
    model.doc_string = "\n".join(f"{name}: {about[name]}" for name in ("images", "logits", "masks") if name in about)


def compare(path: str | Path, exported: Exported, images: Tensor) -> Agreement:
    """How near onnxruntime comes to torch on the images, in batches of 1 and of 5.

    Raises ClearwingError where the logits differ by more than `TOLERANCE` of the largest one, where another class
    wins (but for a tie within the tolerance), or where the probability of a pixel differs by more than that. The
    masks of pictures whose class is such a tie, broken in two ways, are not compared.
    """
    found, expected = [], []
    for theirs, ours in answers(path, exported, images):
        found.append(theirs)
        expected.append(ours)
    logits, true = (torch.cat([answer[0] for answer in side]) for side in (found, expected))
    scale = max(float(true.abs().max()), 1e-6)  # an untrained head may say 0 to everything
    difference = float((logits - true).abs().max()) / scale
    chosen, best = logits.argmax(1), true.max(1)
    near = true.gather(1, chosen[:, None])[:, 0] >= best.values - TOLERANCE * scale
    agreement = Agreement(len(images), difference, float((chosen == best.indices).float().mean()))
    good = difference <= TOLERANCE and bool(near.all())  # NaN is not
    same = chosen == best.indices  # of a tie, each masks the class that it named
    if len(found[0]) > 1 and same.any():
        masks, truth = (torch.cat([answer[1] for answer in side])[same] for side in (found, expected))
        apart = float((masks - truth).abs().max())
        overlap = float(iou(masks >= 0.5, truth >= 0.5).min())
        agreement = Agreement(len(images), difference, agreement.same_class, apart, overlap)
        good = good and apart <= TOLERANCE
    if not good:
        mend = f"more than {TOLERANCE:g} is too much, so nothing was written; try another --opset"
        raise ClearwingError("export", f"onnxruntime and torch differ: {told(agreement)}", mend, exit_code=1)
    return agreement


def answers(
    path: str | Path, exported: Exported, images: Tensor
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """What onnxruntime and what torch say, a batch at a time, float32 on the CPU."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, not warnings
    options.intra_op_num_threads = torch.get_num_threads()  # else it pins threads to cores that may not be ours
    device = next((held.device for held in (*exported.parameters(), *exported.buffers())), images.device)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for size in BATCHES:
            for part in images.float().cpu().split(size):
                theirs = session.run(list(outputs_of(exported.module)), {"images": part.numpy()})
                with torch.inference_mode(), exact(device.type):
                    ours = exported(part.to(device))
                yield tuple(map(torch.from_numpy, theirs)), tuple(answer.cpu() for answer in ours)
    except (errors.Fail, errors.InvalidGraph, errors.NotImplemented, errors.RuntimeException) as error:
        mend = "try another --opset, or a newer onnxruntime"
        raise ClearwingError("export", f"onnxruntime cannot run it ({short(error)})", mend, exit_code=1) from error


def told(agreement: Agreement) -> str:
    text = f"logits within {agreement.logits:.1e} of the largest, {agreement.same_class:.0%} of the classes the same"
    if agreement.masks is not None:
        text += f", masks within {agreement.masks:.1e}, their IoU at least {agreement.mask_iou:.4f}"
    return f"{text} on {agreement.pictures} pictures"


def short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
