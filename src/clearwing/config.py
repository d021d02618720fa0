"""What each command can be told: one frozen dataclass a command, whose field docs are the `--help`.

Nothing heavy is imported here, so that `clearwing --help` is fast.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

MODELS = (
    "resnet8",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
)
METHODS = (
    "saliency",
    "grad-cam",
    "cam",
    "grad-cam++",
    "xgrad-cam",
    "hires-cam",
    "layer-cam",
    "element-wise",
    "eigen-cam",
    "eigengrad-cam",
    "fullgrad",
    "guided-backprop",
    "guided-grad-cam",
    "deconvnet",
    "input-x-gradient",
    "smoothgrad",
    "vargrad",
    "integrated-gradients",
    "expected-gradients",
    "smooth-grad-cam++",
    "lrp-epsilon",
    "lrp-gamma",
    "lrp-zplus",
    "score-cam",
    "ablation-cam",
    "rise",
    "occlusion",
    "attention-rollout",
    "gradient-attention",
)
RECIPES = ("refine", "classic")

Fit = Literal["squash", "crop", "pad"]


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command understands."""

    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    limit: int | None = None
    """Use only the first N pictures of each split (for a quick look)."""
    json: bool = False
    """Print one JSON object on stdout and nothing else there."""


@dataclass(frozen=True, kw_only=True)
class Source(Common):
    """How a folder of pictures is read."""

    classes: str | None = None
    """Class names in order: a comma-separated list, or a text file with one name a line."""
    pattern: str | None = None
    """How the files of a flat folder are named, such as "{class}_{id}.jpg"."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Source):
    """Train a residual network on DATA; writes the RUN directory.

    Example: clearwing train photos --model resnet14 --size 128 --time-budget 20m --out runs/photos
    A recipe: clearwing train cifar10 --recipe cifar-resnet18-20 --out runs/cifar
    """

    data: Positional[str]
    """Class folders (train/ val/ test/ or one level), {class}_{id}.jpg files, Parquet, cifar10, cifar100 or demo."""
    out: str
    """The RUN directory to write."""
    recipe: str | None = None
    """Start from the settings of a recipe, by name or as a .toml file; what is given on the command line wins."""
    model: str = "resnet14"
    """resnet8/14/20/32/44/56/110 (the 6n+2 family), or resnet18/34/50/101."""
    size: int | None = None
    """Side of the network's input in pixels. Default: CIFAR 32, demo 64, --weights imagenet 224, else 128."""
    train_size: int | None = None
    """Side of the crops that are trained on. Default: the size. A smaller one is quicker (Touvron et al. 2019)."""
    fit: Fit = "squash"
    """How a picture meets the size: squash both sides, crop the middle, or pad to a square."""
    channels: Literal[1, 3] = 3
    """1 trains a one-channel network on grey pictures."""
    widths: tuple[int, int, int] = (32, 64, 128)
    """Channels of the three stages of a 6n+2 network."""
    shortcut: Literal["projection", "pad"] = "projection"
    """Where the width changes: a 1x1 convolution, or zero padding (option A of He et al. 2016)."""
    downsample: Literal["block", "conv"] = "block"
    """Where the size halves: in a stage's first block, or in a 3x3 stride-2 convolution before the stage."""
    stem: Literal["cifar", "imagenet"] | None = None
    """Stem of resnet18 and deeper. Default: cifar below 96 pixels, imagenet from there on, and with its weights."""
    residual: Literal["he", "zero", "dirac"] = "he"
    """How residual branches begin: as He et al., silent (last norm zero), or passing their input on (dirac)."""
    whiten: bool = False
    """Begin the first convolution with filters that whiten the training pictures' patches."""
    weights: str | None = None
    """Start from these: imagenet (resnet18/34/50/101), or a weights file, which says itself which network it holds."""
    freeze: int = 0
    """Keep so many stages as they are, counted from the stem (stem, layer1, layer2 ...)."""
    thaw: int = 0
    """Free one more frozen stage every so many epochs, the last first; 0: they stay frozen."""
    layer_decay: float = 1.0
    """Each stage further from the head learns so many times as fast as the one above it."""
    head_factor: float = 1.0
    """The head learns so many times as fast as --lr says."""
    epochs: int | None = None
    """Train so many passes over the pictures. Default: 60, or 30 when fine-tuning, unless --time-budget is given."""
    time_budget: str | None = None
    """Train, evaluate and save within this time, such as 90s, 20m or 1h; the schedule is run down to its end."""
    plan: Literal["share", "first-epoch"] = "share"
    """Under a time budget: follow the share used, or time the first epoch and plan 80 % of what fits."""
    replay: str | None = None
    """Repeat a run under a time budget step by step from its plan.json."""
    batch_size: int | Literal["auto"] | None = None
    """Pictures a batch, over all devices; auto: as fit the memory, up to an eighth of all. Default: 16 to 128."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    optimizer: Literal["sgd", "adamw", "adam"] = "sgd"
    """The optimiser."""
    lr: float | None = None
    """Peak learning rate. Default: 0.2 x batch / 128 for sgd (a tenth when fine-tuning), 0.001 for adam, adamw."""
    momentum: float = 0.9
    """Momentum of sgd."""
    nesterov: bool = True
    """Nesterov's form of it."""
    weight_decay: float = 5e-4
    """L2 penalty (decoupled for adamw) on weights; biases and norms are left alone."""
    schedule: Literal["one-cycle", "cosine", "step", "constant"] = "one-cycle"
    """How the learning rate moves over the run."""
    warmup: float | None = None
    """Share of the run in which it rises. Default: 0.25 for one-cycle, 0.05 for cosine."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes (Szegedy et al. 2016)."""
    ema: float = 0.0
    """Keep an average of the weights with this decay a step, such as 0.99, and hand it on; 0: none."""
    sam: float = 0.0
    """Radius of sharpness-aware minimisation (Foret et al. 2021), such as 0.05; twice the time; 0: none."""
    clip: float = 0.0
    """Largest norm of the gradient; 0: no limit."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: the loss of a class weighs the more, the fewer its pictures."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """balanced: every class comes equally often in an epoch, however few its pictures."""
    patience: int = 0
    """End after so many epochs without a lower loss on the watched split; 0: never."""
    crop: Literal["auto", "resized", "padded", "none"] = "auto"
    """resized: part of the picture, rescaled; padded: shifted by --padding. Auto: padded for CIFAR, else resized."""
    crop_scale: float = 0.35
    """Smallest share of the picture's area that a resized crop keeps."""
    padding: int = 4
    """Pixels that a padded crop may shift."""
    padding_mode: Literal["zero", "reflect"] = "zero"
    """What comes in at the border of a padded crop."""
    flip: Literal["random", "alternate", "none"] = "random"
    """Mirror half of the pictures: drawn anew, or each picture in every second epoch (Jordan 2024)."""
    cutout: int = 0
    """Side of a square painted in the mean colour (DeVries and Taylor 2017); 0: none."""
    cutout_off: float = 0.0
    """Share of the run, at its end, without cutout."""
    auto_augment: Literal["none", "trivial", "rand"] = "none"
    """TrivialAugment (Mueller and Hutter 2021) or RandAugment (Cubuk et al. 2020), on top of the rest."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0: none."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al. 2019); 0: none."""
    jitter: float = 0.3
    """Strength of random brightness, contrast and saturation; 0: none."""
    rotate: float = 0.0
    """Random rotation up to so many degrees; 0: none."""
    val: str | None = None
    """Split to watch. Default: val, else a seeded stratified slice of train. `--val test` is said in the report."""
    val_fraction: float = 0.2
    """Share of each class taken from train when there is no val (with `--val test`, nothing is taken)."""
    test_fraction: float = 0.0
    """Share of each class taken from train when there is no test; 0: none."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the processor has it, else float32."""
    threads: int | None = None
    """CPU threads. Default: all."""
    devices: int = 1
    """Processes on this machine, each with a device of its own (torchrun and SLURM are found by themselves)."""
    nodes: int = 1
    """Machines."""
    compile: bool = False
    """Compile the network (torch.compile); goes on without where that fails."""
    stream: bool = False
    """Read the pictures from Parquet shards as they are needed: for sets larger than the memory."""
    seed: int = 0
    """With --epochs, a run on the CPU with the same seed repeats to the bit."""
    explain: int = 0
    """Grad-CAM of so many watched pictures after every epoch, and the IoU of masks where there are; 0: none."""
    save_every: str = "60s"
    """The longest time that a killed run can lose; the state is saved after epochs, too, unless they are very short."""
    tensorboard: bool = True
    """Write TensorBoard logs into RUN/tensorboard."""
    resume: bool = False
    """Go on with the run that RUN holds."""
    overwrite: bool = False
    """Replace the run that RUN holds."""
    config: str | None = None
    """Take the settings of RUN/config.json; what is given on the command line wins."""


@dataclass(frozen=True, kw_only=True)
class LrFindConfig(TrainConfig):
    """Find a learning rate for `clearwing train` with the same settings: the LR range test, on training pictures alone.

    Example: clearwing lr-find photos --model resnet14 --size 128 --out lr.png
    """

    out: str = ""
    """Write the plot to this file (.png or .svg), and its values to a .json beside it. Default: nothing is written."""
    low: float = 1e-6
    """The first learning rate; it grows by the same factor at every step."""
    high: float = 10.0
    """The last learning rate; the test ends before it where the loss diverges."""
    steps: int = 100
    """Steps from the one to the other."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Source):
    """Score a RUN on a split of DATA; writes RUN/evaluation/<split>.json and predictions.csv."""

    run: Positional[str]
    """A RUN directory."""
    data: Positional[str]
    """Pictures with labels, as for train."""
    split: str = "val"
    """Which part of DATA: train, val, test, or all of it."""
    weights: Literal["last", "best"] = "last"
    """The last weights, or the best on val (never a headline on val itself)."""
    flip: bool = False
    """Also score the mean of what the network says of each picture and of its mirror image."""
    masks: str | None = None
    """Folder of true masks: also segment and score them."""
    batch_size: int | None = None
    """Pictures a step. Default: what is quickest on the device."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Common):
    """Name the class of PICTURES and its probability, as CSV or JSON."""

    model: Positional[str]
    """A RUN, torchvision:NAME, timm:NAME, a weights file, or file.py:factory."""
    pictures: Positional[tuple[str, ...]]
    """Files or folders."""
    out: str | None = None
    """Write here (.csv or .json) instead of to stdout."""
    top: int = 1
    """Classes a picture."""
    size: int | None = None
    """Side of the network's input, where the model does not know it."""
    fit: Fit | None = None
    """How a picture meets the size. Default: as the model was trained, else squash."""
    classes: str | None = None
    """Class names, where the model does not know them: a list or a file."""
    batch_size: int | None = None
    """Pictures a step. Default: what is quickest on the device."""
    overwrite: bool = False
    """Replace OUT."""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(Common):
    """Show where a network looks: PNG overlays and raw maps of PICTURES.

    Example: clearwing explain torchvision:resnet18 cat.jpg --methods grad-cam,guided-backprop --out maps
    """

    model: Positional[str]
    """A RUN, torchvision:NAME, timm:NAME, a weights file, or file.py:factory."""
    pictures: Positional[tuple[str, ...]]
    """Files or folders."""
    out: str
    """Folder to write."""
    methods: str = "grad-cam"
    """Comma-separated, such as saliency,grad-cam,guided-grad-cam; a wrong name lists those there are."""
    layers: str | None = None
    """Comma-separated layer names; relu#1 is the second call of a module. Default: the last one with spatial extent."""
    larger_than: int | None = None
    """Default layer: the deepest whose map is larger than N x N."""
    target: str = "pred"
    """pred, a class name or index, top-3, or A,B for class A against B."""
    fuse: Literal["max", "mean", "product"] | None = None
    """Join the layers' maps of each method to one."""
    average: str | None = None
    """Average the raw maps over views: flip and scales, such as flip,0.75,1.25."""
    options: str | None = None
    """Settings of the methods' own, such as steps=64,samples=50."""
    edges: bool = False
    """Also draw the picture's edges (Canny) over each attribution."""
    maps_only: bool = False
    """Write the raw maps alone, a file for each method and batch: for large sets."""
    size: int | None = None
    """Side of the network's input, where the model does not know it."""
    fit: Fit | None = None
    """How a picture meets the size. Default: as the model was trained, else squash."""
    classes: str | None = None
    """Class names, where the model does not know them: a list or a file."""
    precision: Literal["model", "float32", "bfloat16"] = "model"
    """Arithmetic of the network."""
    batch_size: int = 32
    """Pictures a step."""
    seed: int = 0
    """For methods with noise."""
    overwrite: bool = False
    """Replace what OUT holds."""


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(Source):
    """Turn explanations into foreground masks, PNG 0/255 in the original size, scored where true masks are known.

    Example: clearwing segment runs/photos photos --split val --out runs/photos/masks
    """

    run: Positional[str]
    """A RUN directory (or another MODEL)."""
    data: Positional[str]
    """Pictures: as for train, or a flat folder without labels."""
    out: str
    """Folder for the masks and segmentation.json."""
    split: str = "val"
    """Which part of DATA: train, val, test, or all of it."""
    masks: str | None = None
    """Folder of true masks to score against. Default: DATA/MASKS, if there."""
    pipeline: Literal["refine", "decoder", "classic"] = "refine"
    """refine: layer maps seed GrabCut. decoder: one forward pass; trained at its first use, on masks of the run's
    training pictures, refine's and then its own. classic: input gradient, 80th percentile, 5x5 max-pool."""
    format: Literal["png", "coco", "geojson", "voc"] = "png"
    """png: 0/255. coco: one coco.json. geojson: one a picture. voc: palette PNG and XML. Boxes are in boxes.csv."""
    cutouts: bool = False
    """Also write the objects alone, transparent elsewhere, into OUT/cutouts."""
    calibrate: int = 0
    """Choose method and threshold (leave these out) on so many of the true masks, where others than the defaults are
    surely better, and score the rest of the masks; 0: no mask is looked at."""
    retrain: bool = False
    """Train the decoder anew."""
    method: str | None = None
    """Another method than the recipe's."""
    layers: str | None = None
    """Other layers than the recipe's, comma-separated."""
    threshold: str | None = None
    """Another threshold than the recipe's: percentile:80, otsu, mean, or auto."""
    refine: Literal["none", "maxpool", "grabcut"] | None = None
    """Another refinement than the recipe's; of the decoder's masks, grabcut (or none, the default)."""
    size: int | None = None
    """Side of the network's input, where the model does not know it."""
    fit: Fit | None = None
    """How a picture meets the size. Default: as the model was trained, else squash."""
    baselines: bool = True
    """Score the baselines beside it: everything, a centre Gaussian, an edge map, GrabCut alone, an untrained net."""
    batch_size: int = 32
    """Pictures a step."""
    devices: int = 1
    """Processes on this machine, each with its part of the pictures (torchrun and SLURM are found by themselves)."""
    nodes: int = 1
    """Machines, which share OUT."""
    seed: int = 0
    """Of the intervals and of the untrained network."""
    resume: bool = False
    """Go on with what a stopped call left in OUT, with the same settings; a new OUT is begun."""
    overwrite: bool = False
    """Replace what OUT holds: the masks that an earlier call left there go."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Common):
    """Write MODEL as an ONNX file that holds its preprocessing, and check that onnxruntime says what torch says.

    Example: clearwing export runs/photos --out photos.onnx
    """

    model: Positional[str]
    """A RUN, torchvision:NAME, timm:NAME, a weights file, or file.py:factory."""
    out: str
    """The .onnx file to write."""
    decoder: Literal["auto", "yes", "no"] = "auto"
    """Also give masks, by the RUN's decoder. auto: where it has one."""
    size: int | None = None
    """Side of the network's input, where the model does not know it."""
    fit: Fit | None = None
    """How a picture meets the size, for whoever reads the file. Default: as the model was trained, else squash."""
    classes: str | None = None
    """Class names, where the model does not know them: a list or a file."""
    opset: int = 18
    """Version of ONNX's operators, 18 to 23."""
    overwrite: bool = False
    """Replace OUT."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Source):
    """Write RUN/report.html: curves, accuracy by class, the misclassified with Grad-CAM, masks; or compare runs.

    Examples: clearwing report runs/photos
              clearwing report runs/one runs/two
    """

    run: Positional[str]
    """A RUN directory."""
    data: Positional[str | None] = None
    """Pictures (default: what the run was trained on), or a second RUN to set beside the first."""
    more: Positional[tuple[str, ...]] = ()
    """Further RUNs to compare with."""
    split: str | None = None
    """Which part of DATA the galleries show. Default: the one the run watched; when comparing, all scored ones."""
    most: int = 24
    """Pictures a gallery."""
    larger_than: int | None = None
    """Grad-CAM's layer: the deepest whose map is larger than N x N. Default: the last one with spatial extent."""
    out: str | None = None
    """The HTML file to write. Default: RUN/report.html, or RUN/compare.html for a comparison."""
    overwrite: bool = False
    """Replace the file that --out names."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Common):
    """Say what in a network can fool an explanation, and try on it what explanations must fulfil.

    Example: clearwing doctor torchvision:resnet18 cat.jpg dog.jpg
    """

    model: Positional[str]
    """A RUN, torchvision:NAME, timm:NAME, a weights file, or file.py:factory."""
    pictures: Positional[tuple[str, ...]] = ()
    """Files or folders. Default: drawn insects. Four of them are used, or --limit."""
    size: int | None = None
    """Side of the network's input, where the model does not know it."""
    fit: Fit | None = None
    """How a picture meets the size. Default: as the model was trained, else squash."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Common):
    """All of it on the built-in data set: draw, train, evaluate, explain, segment, score, report."""

    out: str = "runs/demo"
    """The RUN directory to write."""
    seed: int = 0
    """Of the drawing and of the training."""
    epochs: int | None = None
    """Passes over the pictures. Default: enough for about two minutes on two cores."""
    overwrite: bool = False
    """Replace the run that OUT holds."""


def as_json(config: Common) -> dict[str, Any]:
    """The settings as plain values, for config.json."""
    return dataclasses.asdict(config)


def split_settings(config: TrainConfig) -> dict[str, Any]:
    """How `open_data` slices train: the same for every command that works on one run."""
    val = config.val_fraction if config.val in (None, "val") else 0.0
    return {"val_fraction": val, "test_fraction": config.test_fraction, "seed": config.seed}
