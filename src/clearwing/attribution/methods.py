"""The table of attribution methods, and `explain`: one forward pass, any number of methods, layers and classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from clearwing.attribution import attention, cams, fullgrad, gradients, perturb, relevance, sampled
from clearwing.attribution.layers import find_layer
from clearwing.attribution.memory import in_chunks
from clearwing.attribution.modules import named_layers, pictures, ready
from clearwing.attribution.network import Network, check_precision, exact, float32_parameters, like_the_model
from clearwing.attribution.targets import Target, read_target
from clearwing.attribution.task import FUSE, Job, Method, Task
from clearwing.attribution.views import views
from clearwing.types import Batch, ClearwingError, Explanation, near

Layer = str | nn.Module


METHODS: dict[str, Method] = {
    "saliency": Method("input", gradients.saliency, "Simonyan et al. 2014"),
    "guided-backprop": Method("input", gradients.guided_backprop, "Springenberg et al. 2015", relu_rule="guided"),
    "grad-cam": Method("cam", cams.grad_cam, "Selvaraju et al. 2017", needs_layer=True),
    "cam": Method("layer", cams.cam, "Zhou et al. 2016", needs_layer=True),
    "grad-cam++": Method("cam", cams.grad_cam_plus_plus, "Chattopadhay et al. 2018", needs_layer=True),
    "xgrad-cam": Method("cam", cams.xgrad_cam, "Fu et al. 2020", needs_layer=True),
    "hires-cam": Method("cam", cams.hires_cam, "Draelos and Carin 2020", needs_layer=True),
    "layer-cam": Method("cam", cams.layer_cam, "Jiang et al. 2021", needs_layer=True),
    "element-wise": Method("cam", cams.element_wise, "Gildenblat 2021", needs_layer=True),
    "eigen-cam": Method("layer", cams.eigen_cam, "Muhammad and Yeasin 2020", needs_layer=True),
    "eigengrad-cam": Method("cam", cams.eigengrad_cam, "Gildenblat 2021", needs_layer=True),
    "fullgrad": Method("input", fullgrad.fullgrad, "Srinivas and Fleuret 2019", records=fullgrad.biased),
    "guided-grad-cam": Method(
        "input", gradients.guided_grad_cam, "Selvaraju et al. 2017", needs_layer=True, relu_rule="guided"
    ),
    "deconvnet": Method("input", gradients.deconvnet, "Zeiler and Fergus 2014", relu_rule="deconvnet"),
    "input-x-gradient": Method("input", gradients.input_x_gradient, "Shrikumar et al. 2016", reduce="sum"),
    "smoothgrad": Method("passes", sampled.smoothgrad, "Smilkov et al. 2017", options=("samples", "noise")),
    "vargrad": Method("passes", sampled.vargrad, "Adebayo et al. 2018", options=("samples", "noise")),
    "integrated-gradients": Method(
        "passes",
        sampled.integrated_gradients,
        "Sundararajan et al. 2017",
        options=("steps", "baseline"),
        reduce="sum",
    ),
    "expected-gradients": Method(
        "passes", sampled.expected_gradients, "Erion et al. 2021", options=("samples", "references"), reduce="sum"
    ),
    "smooth-grad-cam++": Method(
        "passes",
        sampled.smooth_grad_cam_plus_plus,
        "Omeiza et al. 2019",
        needs_layer=True,
        options=("samples", "noise"),
    ),
    "lrp-epsilon": Method("passes", relevance.lrp_epsilon, "Bach et al. 2015", options=("epsilon",), reduce="sum"),
    "lrp-gamma": Method(
        "passes", relevance.lrp_gamma, "Montavon et al. 2019", options=("gamma", "epsilon"), reduce="sum"
    ),
    "lrp-zplus": Method("passes", relevance.lrp_zplus, "Bach et al. 2015", options=("epsilon",), reduce="sum"),
    "score-cam": Method("passes", perturb.score_cam, "Wang et al. 2020", needs_layer=True, options=("budget",)),
    "ablation-cam": Method(
        "passes", perturb.ablation_cam, "Desai and Ramaswamy 2020", needs_layer=True, options=("budget",)
    ),
    "rise": Method("passes", perturb.rise, "Petsiuk et al. 2018", options=("masks", "cells", "probability")),
    "occlusion": Method("passes", perturb.occlusion, "Zeiler and Fergus 2014", options=("window", "stride", "value")),
    "attention-rollout": Method("input", attention.attention_rollout, "Abnar and Zuidema 2020", attention=True),
    "gradient-attention": Method("input", attention.gradient_attention, "Chefer et al. 2021", attention=True),
}


def explain(
    model: nn.Module,
    images: Tensor | Batch,
    methods: str | Sequence[str] = "grad-cam",
    layers: Layer | Sequence[Layer] | None = None,
    target: Target = "pred",
    labels: Tensor | Sequence[int] | None = None,
    relu: bool = True,
    precision: str | None = None,
    seed: int = 0,
    chunk: int | None = None,
    fuse: str | None = None,
    options: Mapping[str, Any] | None = None,
    larger_than: int | None = None,
    average: Sequence[str | float] = (),
    memory: float | None = None,
    grid: tuple[int, int] | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> Any:
    """Where the model looks: raw attribution maps at the size of the images, never scaled.

    model: any network in evaluation mode that maps (N, C, H, W) to logits (N, K).
    images: (N, C, H, W) floating, or a Batch, whose labels, keys and geometry go along.
    methods: names of METHODS. Input methods give one map whatever the layers; "guided-grad-cam" gives one a layer.
    layers: names or modules; None is `find_layer(model, images, larger_than, grid)`. "relu#1" is the second call of a
        module that runs several times in a forward pass.
    target: "pred"; "label"; "top-3"; a class number or name; a tensor (N,) with a class for each picture, or (N, M);
        a pair ("cat", "dog") for the evidence for the first against the second (names or numbers); or a function of
        the logits (N, K) that gives scores (N,), each of its own picture alone. A class whose name is one of the
        words here is asked for by its number.
    labels: (N,) for "label"; a Batch brings its own.
    relu: rectify the maps of layers as their papers do, before upsampling (bilinear); False keeps the sign. The maps
        of input methods are the largest magnitude over the colour channels either way, or the signed sum for those
        that share out the score (integrated gradients, LRP ...); the signed values are in `channels`.
    precision: None runs the model in its own floating type without TF32; "float32" in float32, without TF32;
        "bfloat16" under autocast, for speed. Maps are float32, of a float64 model float64.
    seed: of methods that sample. The same noise goes to every picture, so that a batch equals one by one.
    chunk: pictures in one pass; None is as many as `memory` holds. The maps are the same.
    fuse: "max", "mean" or "product" joins the layers' maps of each method to one. Each rectified map is first divided
        by its own maximum, for the layers' scales differ. "guided-grad-cam" takes the joined Grad-CAM.
    options: settings of a method's own, such as {"steps": 32} for integrated gradients.
    average: test-time averaging over views: "flip" mirrors, a number resizes, as in ("flip", 0.75, 1.25). The mean of
        the raw maps (and channels) of all views and of the picture as it is, for the classes asked of the latter.
    memory: bytes that one pass may take, estimated from the first; None is 1 GiB, on a GPU half of what is free.
    grid: (h, w) of the tokens of a vision transformer where their number does not tell it.
    progress: called with (pictures done, pictures in all), in fractions where a method needs many passes.

    One forward pass serves all methods that read activations and gradients; one backward pass for each asked class all
    on the plain gradient, and one more those on the guided gradient. Methods that sample, perturb or propagate
    relevance (kind "passes") run passes of their own. No `.grad` is filled, and no graph outlives the call.

    Returns an Explanation for one method and at most one layer; where methods or layers is a list, a dict in the order
    asked, keyed "grad-cam@layer3", "saliency", or with fuse "grad-cam@layer2+layer3".

    >>> e = explain(model, images, "grad-cam", target="top-3")
    >>> e.maps.shape, e.classes.shape
    (torch.Size([8, 3, 224, 224]), torch.Size([8, 3]))
    >>> list(explain(model, images, ["layer-cam", "saliency"], layers=["layer2", "layer3"]))
    ['layer-cam@layer2', 'layer-cam@layer3', 'saliency']

    Raises ClearwingError for what `record` refuses, an unknown method, class or setting, labels that are missing, and a
    network without ReLU under a guided method. Warns where a guided method met other non-linearities than ReLU.
    """
    batch = images if isinstance(images, Batch) else Batch(pictures(images))
    labels = batch.labels if labels is None else labels
    names = _method_names(methods, options or {})
    check_precision(precision)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ClearwingError("seed", seed, "give a whole number")
    if larger_than is not None and (isinstance(larger_than, bool) or not isinstance(larger_than, int)):
        raise ClearwingError("larger_than", larger_than, "give a whole number of places on a side")
    model = ready(model)
    images = like_the_model(model, pictures(batch.images), precision)
    class_names = tuple(getattr(model, "class_names", ()))
    asked = read_target(target, labels, class_names, images)
    jobs = _jobs(model, like_the_model(model, batch.images[:1]), names, layers, larger_than, grid, fuse, relu)
    network = Network(model, precision, float32_parameters(model) if precision else {}, grid=grid)
    seen_as = views(average)
    if grid is not None and any(view.scale != 1 for view in seen_as):
        raise ClearwingError("grid", grid, "it is of one size of the pictures; leave the scales out of average")
    task = Task(network, jobs, relu, seed, options or {}, seen_as)
    parts: list[list[Explanation]] = [[] for _ in jobs]

    def work(part: slice, most: int) -> None:
        def tell(share: float) -> None:
            if progress is not None:
                progress(part.start + share * (part.stop - part.start), len(images))

        sized = replace(task, network=replace(network, batch=most))
        for found, made in zip(parts, sized.explain(images[part], asked, part, tell), strict=True):
            found.append(made)

    with exact(images.device.type):
        in_chunks(model, images, chunk, memory, work)
    about: dict[str, Any] = {"geometry": batch.geometry, "keys": batch.keys, "class_names": class_names}
    about["images"] = batch.images.detach()
    whole = [replace(Explanation.cat(found) if len(found) > 1 else found[0], **about) for found in parts]
    if isinstance(methods, str) and (layers is None or isinstance(layers, str | nn.Module)):
        return whole[0]
    return {job.key: explanation for job, explanation in zip(jobs, whole, strict=True)}


def _method_names(methods: str | Sequence[str], options: Mapping[str, Any]) -> list[str]:
    if not isinstance(methods, str | Sequence) or not all(isinstance(name, str) for name in methods):
        raise ClearwingError("methods", methods, "give the name of a method, or a list of names")
    names = [methods] if isinstance(methods, str) else list(methods)
    if not names:
        raise ClearwingError("methods", "[]", near("", list(METHODS)))
    for name in names:
        if name not in METHODS:
            raise ClearwingError("methods", name, near(str(name), list(METHODS)))
    known = [option for name in names for option in METHODS[name].options]
    for option in options:
        if option not in known:
            mend = near(option, known) if known else "these methods have no options"
            raise ClearwingError("options", option, mend)
    return list(dict.fromkeys(names))


def _jobs(
    model: nn.Module,
    images: Tensor,
    methods: Sequence[str],
    layers: Layer | Sequence[Layer] | None,
    larger_than: int | None,
    grid: tuple[int, int] | None,
    fuse: str | None,
    relu: bool,
) -> list[Job]:
    """The Explanations to make, in the order asked: methods first, layers within."""
    if fuse is not None and (not isinstance(fuse, str) or fuse not in FUSE):
        raise ClearwingError("fuse", fuse, near(str(fuse), list(FUSE)))
    if fuse is not None and not relu:
        raise ClearwingError("fuse", fuse, "it joins rectified maps; leave relu=True")
    if layers is not None and larger_than is not None:
        raise ClearwingError(
            "larger_than", larger_than, "it chooses a layer where none is named; leave one of the two out"
        )
    need = any(METHODS[name].needs_layer for name in methods)
    if layers is not None:
        chosen = tuple(named_layers(model, layers))
    else:
        chosen = (find_layer(model, images, larger_than, grid),) if need else ()
    if need and not chosen:
        raise ClearwingError("layers", "[]", "name at least one layer, or leave it out for the default")
    if fuse is not None and need and len(chosen) < 2:
        raise ClearwingError("fuse", fuse, "name at least two layers to join")
    jobs = []
    for name in methods:
        if not METHODS[name].needs_layer:
            jobs.append(Job(name, METHODS[name]))
        elif fuse is not None:
            jobs.append(Job(name, METHODS[name], chosen, fuse))
        else:
            jobs += [Job(name, METHODS[name], (layer,)) for layer in chosen]
    return jobs
