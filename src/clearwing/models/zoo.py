"""Networks by name, with pretrained weights, and from the weights files that people have."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clearwing.models.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, wrap
from clearwing.models.resnet import ResNet, ResNet6n2, conv3x3
from clearwing.types import ClearwingError, near

DEPTHS_6N2 = {f"resnet{6 * n + 2}": n for n in (1, 2, 3, 5, 7, 9, 18)}
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
BOTTLENECKS = ("resnet50", "resnet101")
NAMES = (*DEPTHS_6N2, *BLOCKS)
UNKNOWN = "any network known here"
SPECS = "torchvision:NAME, torchvision:NAME:random, timm:NAME, a weights file, or file.py:factory"
DOWNLOAD_ERRORS = (OSError, RuntimeError, HTTPException)  # URLError is an OSError; a bad hash a RuntimeError


def build(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    stem: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    input_size: int | None = None,
    weights: str | Path | Mapping[str, Any] | None = None,
    new_head: bool = False,
    **settings: Any,
) -> Classifier:
    """A network by name, in training mode: resnet8, 14, 20, 32, 44, 56, 110 (6n+2), resnet18, 34, 50, 101.

    stem: "cifar" (the default) or "imagenet", for resnet18, 34, 50 and 101.
    weights: None (initialised from the global generator of torch); "imagenet" (resnet18, 34, 50, 101: torchvision's
    weights with a new head, the ImageNet stem, mean and std, and 224 pixels); or a weights file as `adopt` reads it,
    whose settings (stem, widths ...), mean and std hold where none are given. With another number of classes, or to
    train it anew, ask for a fresh last layer by `new_head=True`.
    settings: what `ResNet6n2` or `ResNet` takes, such as widths, shortcut, downsample, residual.

    >>> build("resnet14", num_classes=100)(torch.rand(5, 3, 32, 32)).shape
    torch.Size([5, 100])

    Raises ClearwingError for an unknown name or setting, and for weights that do not fit.
    """
    if name not in NAMES:
        raise ClearwingError("model", name, near(name, NAMES))
    if num_classes < 2:
        raise ClearwingError("num_classes", num_classes, "give at least 2 classes")
    if name in DEPTHS_6N2 and stem is not None:
        raise ClearwingError("stem", stem, f"{name} has one stem only; leave it out")
    if stem is not None:
        settings["stem"] = stem
    names = class_names or ()
    if weights is None:
        return Classifier(_backbone(name, num_classes, in_channels, settings), mean, std, names, input_size)
    if weights == "imagenet":
        if settings.setdefault("stem", "imagenet") != "imagenet" or in_channels != 3 or name not in BLOCKS:
            mend = 'ImageNet weights are for resnet18, 34, 50 and 101 with stem="imagenet" and 3 channels'
            raise ClearwingError("weights", weights, mend)
        found = Weights(_imagenet_state(name), "imagenet", IMAGENET_MEAN, IMAGENET_STD)
        new_head, input_size = True, input_size or 224
    else:
        found = read_weights(weights)
        inferred = _infer(found)
        own = ("widths", "shortcut", "downsample") if name in DEPTHS_6N2 else ("stem",)
        settings = {key: inferred[key] for key in own if key in inferred} | settings
    backbone = _backbone(name, num_classes, in_channels, settings)
    _load(backbone, found, name, new_head)
    mean, std = _given_or_found(mean, std, found)
    if class_names is None and not new_head:
        names = found.class_names
    return Classifier(backbone, mean, std, names, input_size)


def _backbone(name: str, num_classes: int, in_channels: int, settings: dict[str, Any]) -> nn.Module:
    kind = ResNet6n2 if name in DEPTHS_6N2 else ResNet
    named = ("n", "blocks", "bottleneck", "num_classes")
    known = [key for key in inspect.signature(kind).parameters if key not in named]
    for key, value in settings.items():
        if key not in known:
            raise ClearwingError(key, value, f"{name} has no such setting; {near(key, known)}")
    if kind is ResNet6n2:
        return ResNet6n2(DEPTHS_6N2[name], num_classes, in_channels=in_channels, **settings)
    deep = name in BOTTLENECKS
    return ResNet(BLOCKS[name], num_classes, in_channels=in_channels, bottleneck=deep, **settings)


def _imagenet_state(name: str) -> dict[str, Tensor]:
    weights = _default_weights(name)
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except DOWNLOAD_ERRORS as error:
        raise _download_error("weights", "imagenet", weights.url, error, "train without weights") from error


def _default_weights(name: str) -> Any:
    return torchvision.models.get_model_weights(name)["DEFAULT"]


def _download_error(argument: str, value: str, url: str, error: BaseException, instead: str) -> ClearwingError:
    place = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    mend = f"could not be downloaded ({error}); put {url} at {place}, or {instead}"
    return ClearwingError(argument, value, mend)


# ---------------------------------------------------------------------------------------------------------------
# Weights files


@dataclass(frozen=True)
class Weights:
    """A state dict in our naming, and what else the file told."""

    state: dict[str, Tensor] = field(repr=False)
    where: str
    mean: Sequence[float] | Tensor | None = None
    std: Sequence[float] | Tensor | None = None
    class_names: tuple[str, ...] = ()


WRAPPERS = ("state_dict", "model_state_dict", "model_state", "net", "model")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # DataParallel, compile, and attributes of a trainer
OUR_NAMES = re.compile(r"(conv1|bn1|fc|down[23]\.[01]|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))\.[a-z_]+")


def adopt(
    weights: str | Path | Mapping[str, Any],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    *,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> Classifier:
    """A `Classifier` in eval mode from a public state dict (a file or a dict); the network is read off its shapes.

    Known are torchvision's ResNets (also wide ones and ResNeXt), kuangliu's pytorch-cifar (post-activation ResNets),
    akamaster's pytorch_resnet_cifar10 (option A), and ours. A file is read with `weights_only=True`, or as
    safetensors; `module.` prefixes and the dicts of checkpoints are taken off. Without mean and std, those that the
    file holds are used, else pictures go in as they are.

    >>> model = adopt("resnet56.th", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    Raises ClearwingError where a file does not fit, with the names that are missing or left over, and where
    num_classes or class_names contradict it.
    """
    found = read_weights(weights)
    settings = _infer(found)
    classes = settings["num_classes"]
    if num_classes is not None and num_classes != max(classes, 2):  # one logit is two classes
        raise ClearwingError("num_classes", num_classes, f"{found.where} has {classes} classes")
    with torch.device("meta"):  # initial values would be overwritten
        backbone = _from_settings(settings)
    backbone.to_empty(device="cpu")
    _load(backbone, found, UNKNOWN)
    mean, std = _given_or_found(mean, std, found)
    names = found.class_names if class_names is None else class_names
    return Classifier(backbone, mean, std, names, input_size).eval()


def read_weights(weights: str | Path | Mapping[str, Any]) -> Weights:
    """Read a state dict from a file, or take it from a dict, and bring its names to ours."""
    where, loaded = "the state dict", weights
    if isinstance(weights, str | Path):
        where, loaded = str(weights), _read_file(Path(weights))
    if not isinstance(loaded, Mapping):
        mend = "give a state dict or a file that holds one; a network itself goes to wrap()"
        raise ClearwingError("weights", where, f"holds a {type(loaded).__name__}; {mend}")
    about = loaded
    while inner := next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None):
        loaded = inner
    state = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    while prefix := next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    mean = std = None
    if "backbone.conv1.weight" in state:  # a Classifier of ours
        mean, std = state.pop("mean", None), state.pop("std", None)
        state = {key.removeprefix("backbone."): value for key, value in state.items()}
    names = about.get("class_names", ())
    if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        names = ()
    return Weights(_our_names(state), where, mean, std, tuple(names))


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise ClearwingError("weights", path, "no such file; give a state dict saved by torch.save or safetensors")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        mend = "holds more than weights, or is no weights file; save model.state_dict() with torch.save"
        raise ClearwingError("weights", path, mend) from error
    except (SafetensorError, EOFError, RuntimeError, ValueError, LookupError) as error:
        reason = str(error).split("\n")[0]
        raise ClearwingError("weights", path, f"is no weights file that can be read ({reason})") from error


def _our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """kuangliu's and akamaster's names (linear, shortcut) become torchvision's (fc, downsample), which are ours."""
    renamed = {
        re.sub(r"^linear\.", "fc.", key).replace(".shortcut.", ".downsample."): value for key, value in state.items()
    }
    return renamed if len(renamed) == len(state) else state


def _infer(found: Weights) -> dict[str, Any]:
    """Stages, depth, widths, classes and channels, read off the names and shapes.

    Only a plausible reading: `_load` then checks every name and shape.
    """
    state = found.state
    needed = {"conv1.weight": 4, "bn1.weight": 1, "layer1.0.conv1.weight": 4, "fc.weight": 2}  # dimensions
    missing = [key for key, ndim in needed.items() if key not in state or state[key].ndim != ndim]
    if missing:
        left = [key for key in state if key in missing or not OUR_NAMES.fullmatch(key)]
        raise _misfit(found.where, UNKNOWN, missing, left)
    stages = 4 if any(key.startswith("layer4.") for key in state) else 3
    blocks = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) or 1
        for stage in range(1, stages + 1)
    )
    bottleneck = "layer1.0.conv3.weight" in state
    settings: dict[str, Any] = {
        "num_classes": state["fc.weight"].shape[0],
        "in_channels": state["conv1.weight"].shape[1],
        "blocks": blocks,
    }
    if stages == 4:
        settings["stem"] = "imagenet" if state["conv1.weight"].shape[-1] == 7 else "cifar"
        if bottleneck:
            inner = state.get("layer1.0.conv2.weight", state["layer1.0.conv1.weight"])
            settings["bottleneck"] = True
            if inner.shape[:2] != (64, 64):  # a wide one, or ResNeXt
                settings["groups"] = inner.shape[0] // max(inner.shape[1], 1)
                settings["width_per_group"] = inner.shape[1]
        return settings
    firsts = [state.get(f"layer{stage}.0.conv1.weight", state["layer1.0.conv1.weight"]) for stage in (1, 2, 3)]
    settings["widths"] = tuple(first.shape[0] for first in firsts)
    settings["downsample"] = "conv" if "down2.0.weight" in state else "block"
    settings["shortcut"] = "pad"
    if settings["downsample"] == "conv" or "layer2.0.downsample.0.weight" in state:
        settings["shortcut"] = "projection"
    return settings


def settings_of(weights: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """What `build` is told for the network of a weights file, with its name; and `num_classes`, those it knows.

    Raises ClearwingError for a file that holds no residual network, or one that `build` has no name for.
    """
    found = _infer(read_weights(weights))
    blocks, deep = found.pop("blocks"), found.pop("bottleneck", False)
    named: dict[tuple[int, ...], str] = {(n, n, n): name for name, n in DEPTHS_6N2.items()}
    named |= {count: name for name, count in BLOCKS.items() if deep == (name in BOTTLENECKS)}
    if blocks not in named or "groups" in found:
        other = ", wide or in groups" if "groups" in found else ""
        mend = f"holds a residual network of {blocks} blocks{other}; train takes {', '.join(NAMES)}"
        raise ClearwingError("weights", weights, mend)
    return {"name": named[blocks]} | found


def _from_settings(settings: dict[str, Any]) -> nn.Module:
    settings = dict(settings)
    blocks = settings.pop("blocks")
    if "widths" in settings:
        return ResNet6n2(blocks[0], **settings)
    if "groups" not in settings:
        return ResNet(blocks, **settings)
    del settings["bottleneck"]
    stem, channels = settings.pop("stem"), settings.pop("in_channels")
    network: Any = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, list(blocks), **settings)
    if stem == "cifar":
        network.conv1, network.maxpool = conv3x3(channels, 64), nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return network


def _load(network: nn.Module, found: Weights, name: str, new_head: bool = False) -> None:
    """Copy every weight into the network (but for `fc` when it shall be new), or refuse with what does not fit."""
    state, own = dict(found.state), network.state_dict()
    if not new_head and "fc.weight" in state and len(state["fc.weight"]) != len(own["fc.weight"]):
        value = f"{len(own['fc.weight'])}, but {found.where} has {len(state['fc.weight'])} classes"
        raise ClearwingError("num_classes", value, "give that number, or ask for a new last layer by new_head=True")
    if new_head:
        state.update({key: own[key] for key in ("fc.weight", "fc.bias")})
    for key in own:
        if key.endswith("num_batches_tracked"):  # files from before torch 0.4.1 lack it
            state.setdefault(key, torch.tensor(0))
    missing = [key for key in own if key not in state]
    left = [key for key in state if key not in own]
    other = [
        f"{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or left or other:
        raise _misfit(found.where, name, missing, left, other)
    network.load_state_dict(state)


def _misfit(where: str, name: str, missing: list[str], left: list[str], other: Sequence[str] = ()) -> ClearwingError:
    parts = [
        f"{what} ({len(names)}): {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("left over", left), ("of another shape", other))
        if names
    ]
    return ClearwingError("weights", where, f"does not fit {name}; {'; '.join(parts)}")


def _given_or_found(mean: Any, std: Any, found: Weights) -> tuple[Any, Any]:
    return found.mean if mean is None else mean, found.std if std is None else std


# ---------------------------------------------------------------------------------------------------------------
# Networks by MODEL, as the command line names them


def load_model(
    spec: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    input_size: int | None = None,
    output: str | int | None = None,
    seed: int = 0,
) -> Classifier:
    """A trained network, in eval mode, by what names it; settings given here replace the network's own.

    spec: "torchvision:resnet18" (its default weights, with ImageNet's class names, mean and std);
    "torchvision:resnet18:random" (the same untrained, from `seed`, without a download); "timm:NAME", also with
    ":random"; a weights file for `adopt`; or "file.py:factory": the file is run, and the factory, called without
    arguments, returns a Module or a Classifier.

    Raises ClearwingError where the name is unknown or the download fails.
    """
    text = str(spec)
    kind, _, name = text.partition(":")
    if kind in ("torchvision", "timm"):
        random = name.endswith(":random")
        load = _from_torchvision if kind == "torchvision" else _from_timm
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = load(name.removesuffix(":random"), random)
        return wrap(model, mean, std, class_names, input_size, output).eval()
    path, _, factory = text.rpartition(":")
    if path.endswith(".py"):
        return wrap(_from_factory(Path(path), factory), mean, std, class_names, input_size, output).eval()
    if Path(text).is_file() and not text.endswith(".py"):
        return adopt(text, mean, std, class_names, input_size=input_size)
    if text in torchvision.models.list_models(module=torchvision.models):
        raise ClearwingError("model", text, f"did you mean torchvision:{text}?")
    raise ClearwingError("model", text, f"no such file or model; give {SPECS}")


def _from_torchvision(name: str, random: bool) -> Classifier:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ClearwingError("model", f"torchvision:{name}", near(name, names))
    weights = _default_weights(name)
    # GoogLeNet and Inception ask to be told, as they change their own initialisation some day
    extra = {"init_weights": True} if random and name in ("googlenet", "inception_v3") else {}
    try:
        network = torchvision.models.get_model(name, weights=None if random else weights, **extra)
    except DOWNLOAD_ERRORS as error:
        spec = f"torchvision:{name}"
        raise _download_error("model", spec, weights.url, error, f"take {spec}:random, untrained") from error
    preset = weights.transforms()
    size = getattr(network, "image_size", preset.crop_size[0])  # a vision transformer takes one size only
    return wrap(network, preset.mean, preset.std, weights.meta["categories"], size)


def _from_timm(name: str, random: bool) -> Classifier:
    try:
        import timm  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        mend = 'timm is not installed; install it with pip install "clearwing[bench]"'
        raise ClearwingError("model", f"timm:{name}", mend) from error
    if not timm.is_model(name):
        raise ClearwingError("model", f"timm:{name}", near(name, timm.list_models()))
    try:
        network = timm.create_model(name, pretrained=not random)
    except DOWNLOAD_ERRORS as error:
        mend = f"could not be loaded ({error}); take timm:{name}:random, untrained"
        raise ClearwingError("model", f"timm:{name}", mend) from error
    preset = timm.data.resolve_model_data_config(network)
    names: Sequence[str] = ()
    if network.num_classes == 1000:  # ImageNet-1k, in torchvision's order
        names = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    return wrap(network, preset["mean"], preset["std"], names, preset["input_size"][-1])


def _from_factory(path: Path, name: str) -> nn.Module:
    """Run a Python file, as `python file.py` would find its imports, and call its factory."""
    spec = f"{path}:{name}"
    if not path.is_file():
        raise ClearwingError("model", spec, f"no such file; give {SPECS}")
    about = importlib.util.spec_from_file_location(f"clearwing_user_{path.stem}", path)
    if about is None or about.loader is None:
        raise ClearwingError("model", spec, "is no Python file")
    module = importlib.util.module_from_spec(about)
    folder = str(path.resolve().parent)
    sys.modules[about.name] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, folder)
    try:
        about.loader.exec_module(module)
        factory: Callable[[], Any] | None = getattr(module, name, None)
        if not callable(factory):
            functions = [key for key, value in vars(module).items() if callable(value)]
            raise ClearwingError("model", spec, f"{path.name} has no such function; {near(name, functions)}")
        made = factory()
    except (ImportError, SyntaxError) as error:
        raise ClearwingError("model", spec, f"could not be run ({error})") from error
    finally:
        sys.path.remove(folder)
    if not isinstance(made, nn.Module):
        raise ClearwingError("model", spec, f"returned {type(made).__name__}; return a torch.nn.Module")
    return made
