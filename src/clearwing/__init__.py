"""Train a residual network, see where it looks and why it errs, and get masks that nobody had to draw.

The public names stand in one list; each is loaded when it is used, so `import clearwing` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clearwing.types import Batch, ClearwingError, Explanation, Geometry, Status

__version__ = "0.1.0"

_WHERE = {
    "Augment": "clearwing.data.augment",
    "load_pictures": "clearwing.data.loader",
    "Pictures": "clearwing.data.loader",
    "open_data": "clearwing.data.sources",
    "read_mask": "clearwing.data.preprocess",
    "read_picture": "clearwing.data.preprocess",
    "restore": "clearwing.data.preprocess",
    "Classifier": "clearwing.models.classifier",
    "wrap": "clearwing.models.classifier",
    "Decoder": "clearwing.models.decoder",
    "Segmenter": "clearwing.models.decoder",
    "ResNet": "clearwing.models.resnet",
    "ResNet6n2": "clearwing.models.resnet",
    "summary": "clearwing.models.resnet",
    "adopt": "clearwing.models.zoo",
    "build": "clearwing.models.zoo",
    "load_model": "clearwing.models.zoo",
    "fit": "clearwing.train.fit",
    "Diagnosis": "clearwing.attribution.doctor",
    "examine": "clearwing.attribution.doctor",
    "METHODS": "clearwing.attribution.methods",
    "explain": "clearwing.attribution.methods",
    "Trace": "clearwing.attribution.trace",
    "find_layer": "clearwing.attribution.layers",
    "record": "clearwing.attribution.trace",
    "free_masks": "clearwing.jobs.maskers",
    "RECIPES": "clearwing.masks.pipeline",
    "segment": "clearwing.masks.pipeline",
    "segment_with": "clearwing.masks.pipeline",
    "max_box_accuracy": "clearwing.measure.curves",
    "threshold_curve": "clearwing.measure.curves",
    "bootstrap_interval": "clearwing.measure.overlap",
    "boundary_f": "clearwing.measure.overlap",
    "dice": "clearwing.measure.overlap",
    "iou": "clearwing.measure.overlap",
    "mean_class_iou": "clearwing.measure.overlap",
    "Run": "clearwing.run",
    "draw_explanation": "clearwing.show.sheet",
}

if TYPE_CHECKING:
    from clearwing.attribution.doctor import Diagnosis, examine
    from clearwing.attribution.layers import find_layer
    from clearwing.attribution.methods import METHODS, explain
    from clearwing.attribution.trace import Trace, record
    from clearwing.data.augment import Augment
    from clearwing.data.loader import Pictures, load_pictures
    from clearwing.data.preprocess import read_mask, read_picture, restore
    from clearwing.data.sources import open_data
    from clearwing.jobs.maskers import free_masks
    from clearwing.masks.pipeline import RECIPES, segment, segment_with
    from clearwing.measure.curves import max_box_accuracy, threshold_curve
    from clearwing.measure.overlap import bootstrap_interval, boundary_f, dice, iou, mean_class_iou
    from clearwing.models.classifier import Classifier, wrap
    from clearwing.models.decoder import Decoder, Segmenter
    from clearwing.models.resnet import ResNet, ResNet6n2, summary
    from clearwing.models.zoo import adopt, build, load_model
    from clearwing.run import Run
    from clearwing.show.sheet import draw_explanation
    from clearwing.train.fit import fit

__all__ = [
    "METHODS",
    "RECIPES",
    "Augment",
    "Batch",
    "Classifier",
    "ClearwingError",
    "Decoder",
    "Diagnosis",
    "Explanation",
    "Geometry",
    "Pictures",
    "ResNet",
    "ResNet6n2",
    "Run",
    "Segmenter",
    "Status",
    "Trace",
    "adopt",
    "bootstrap_interval",
    "boundary_f",
    "build",
    "dice",
    "draw_explanation",
    "examine",
    "explain",
    "find_layer",
    "fit",
    "free_masks",
    "iou",
    "load_model",
    "load_pictures",
    "max_box_accuracy",
    "mean_class_iou",
    "open_data",
    "read_mask",
    "read_picture",
    "record",
    "restore",
    "segment",
    "segment_with",
    "summary",
    "threshold_curve",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'clearwing' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
