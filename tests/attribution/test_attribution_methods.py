"""The explain door: slow references and a peer, the identities of its maps, its targets, and what it refuses."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import GuidedBackprop, LayerAttribution, LayerGradCam, Saliency
from torch import Tensor, nn

import reference
from clearwing.attribution import cams
from clearwing.attribution.methods import METHODS, Method, explain
from clearwing.attribution.trace import record
from clearwing.types import Batch, ClearwingError, Explanation, Geometry, Status
from reference import small_images, small_net

SPECIAL = {"cam", "attention-rollout", "gradient-attention"}  # for a pooled linear head, and for transformers
EVERY = [name for name in METHODS if name not in SPECIAL]
QUICK = {"samples": 3, "steps": 3, "masks": 8, "budget": 4}


def quick(name: str) -> dict[str, int]:
    return {option: value for option, value in QUICK.items() if option in METHODS[name].options}


LAYERS = ["stem", "layer1", "layer2"]


def assert_same(one: Any, two: Any, atol: float = 1e-13) -> None:
    """Explanations (or dicts of them) that are equal in all parts."""
    if isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_same(one[key], two[key], atol)
        return
    for part in fields(Explanation):
        a, b = getattr(one, part.name), getattr(two, part.name)
        if isinstance(a, Tensor) and a.is_floating_point():
            assert torch.allclose(a, b, rtol=0, atol=atol * max(1.0, float(b.abs().max()))), part.name
        elif isinstance(a, Tensor):
            assert torch.equal(a, b), part.name
        else:
            assert a == b, part.name


# against references written from the papers


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("relu", [True, False])
def test_cam_methods_equal_the_references(layer: str, relu: bool) -> None:
    net, images = small_net(), small_images(2)
    found = explain(net, images, ["grad-cam", "layer-cam"], [layer], target=0, relu=relu)
    features = record(net, images, [layer]).features[layer].detach()
    with torch.no_grad():
        for n in range(2):
            A = features[n : n + 1]
            G = reference.gradient(lambda x: reference.forward(net.steps(layer), x)[:, 0], A)
            for name, rule in (("grad-cam", reference.grad_cam), ("layer-cam", reference.layer_cam)):
                coarse = rule(A[0], G[0])
                expected = reference.upsample(reference.rectified(coarse) if relu else coarse, 8, 8)
                assert torch.allclose(found[f"{name}@{layer}"].maps[n, 0], expected, atol=1e-7)
                assert expected.abs().max() > 1e-3


def test_input_methods_equal_the_references() -> None:
    net, images = small_net(), small_images(1)
    found = explain(net, images, ["saliency", "guided-backprop", "guided-grad-cam", "grad-cam"], ["layer1"], target=3)
    with torch.no_grad():
        plain = reference.gradient(lambda x: reference.forward(net.steps(), x)[:, 3], images)[0]
        guided = reference.ruled_gradient(net.steps(), images, torch.eye(4, dtype=torch.float64)[3:], "guided")[0]
    cam = found["grad-cam@layer1"].maps[0, 0]
    for name, channels, atol in (
        ("saliency", plain, 1e-7),
        ("guided-backprop", guided, 1e-12),
        ("guided-grad-cam@layer1", guided * cam, 1e-12),
    ):
        assert torch.allclose(found[name].channels[0, 0], channels, rtol=0, atol=atol)
        assert torch.allclose(found[name].maps[0, 0], reference.strongest(channels), rtol=0, atol=atol)
        assert found[name].maps.max() > 1e4 * atol
    assert found["grad-cam@layer1"].channels is None


# against an installed peer, where it is right


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torchvision.models.resnet18(num_classes=10).eval().double()


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum warns of its hooks, and that it sets requires_grad on the input
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("layer", ["layer2", "layer3", "layer4"])
def test_grad_cam_equals_captum(resnet: nn.Module, layer: str) -> None:
    images = small_images(2, size=64)
    peer = LayerGradCam(resnet, getattr(resnet, layer)).attribute(images, target=3, relu_attributions=True)
    peer = LayerAttribution.interpolate(peer, (64, 64), interpolate_mode="bilinear")
    found = explain(resnet, images, "grad-cam", layer, target=3)
    assert torch.allclose(found.maps, peer.detach(), atol=1e-12)
    assert found.maps.max() > 0


@pytest.mark.usefixtures("quiet")
def test_input_methods_equal_captum() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(net, nn.Linear(54, 4)).double().eval()
    images = small_images(3, size=9)
    found = explain(net, images, ["saliency", "guided-backprop", "guided-grad-cam"], "0.3", target=2)
    own = images.clone().requires_grad_()
    assert torch.allclose(found["saliency"].channels[:, 0], Saliency(net).attribute(own, target=2, abs=False))
    assert torch.allclose(found["guided-backprop"].channels[:, 0], GuidedBackprop(net).attribute(own, target=2))
    cam = LayerGradCam(net, net[0][3]).attribute(own, target=2, relu_attributions=True)
    expected = GuidedBackprop(net).attribute(own, target=2) * LayerAttribution.interpolate(cam, (9, 9), "bilinear")
    assert torch.allclose(found["guided-grad-cam@0.3"].channels[:, 0], expected)


# identities


def test_at_the_last_stage_grad_cam_is_cam_and_hires_cam() -> None:
    """Zhou et al. 2016 eq. 2: with mean pooling and a linear head, CAM = sum_k w_k A^k = Grad-CAM * hw."""
    net, images = small_net(), small_images()
    trace = record(net, images, ["layer2"], inputs=False)
    A = trace.features["layer2"].detach()
    G = trace.gradients(trace.scores(3))["layer2"]
    coarse = cams.grad_cam(A, G)
    cam = torch.einsum("k,nkij->nij", net.fc.weight[3].detach(), A)
    assert torch.allclose(coarse, cam / (A.shape[2] * A.shape[3]), atol=1e-14)
    assert torch.allclose(coarse.sum((1, 2)), (trace.logits[:, 3] - net.fc.bias[3]).detach(), atol=1e-13)
    found = explain(net, images, ["grad-cam", "hires-cam"], "layer2", target=3)
    assert torch.allclose(found["grad-cam@layer2"].maps, found["hires-cam@layer2"].maps, atol=1e-14)


@pytest.mark.parametrize("layer", LAYERS)
def test_grad_cam_is_linear_in_the_target_before_its_relu(layer: str) -> None:
    net, images = small_net(), small_images()

    def signed(target: Any) -> Tensor:
        return explain(net, images, "grad-cam", layer, target=target, relu=False).maps

    assert torch.allclose(signed((2, 0)), signed(2) - signed(0), atol=1e-13)
    assert torch.allclose(signed(lambda z: z[:, 2] - 0.5 * z[:, 1]), signed(2) - 0.5 * signed(1), atol=1e-13)


def test_a_batch_equals_one_by_one_and_chunked_equals_whole() -> None:
    net, images = small_net(), small_images(5)
    target = torch.tensor([3, 1, 0, 2, 1])
    whole = explain(net, images, EVERY, LAYERS, target=target, options=QUICK)
    for chunk in (1, 2, 5, 9):
        assert_same(explain(net, images, EVERY, LAYERS, target=target, chunk=chunk, options=QUICK), whole)
    singles = [explain(net, images[n : n + 1], EVERY, LAYERS, target=int(target[n]), options=QUICK) for n in range(5)]
    assert_same({key: Explanation.cat([single[key] for single in singles]) for key in whole}, whole)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_frozen_equals_unfrozen_in_every_mode(mode: Callable[[], Any]) -> None:
    images = small_images()
    expected = explain(small_net(), images, EVERY, LAYERS, target="top-2", options=QUICK)
    for frozen in (True, False):
        net = small_net().requires_grad_(not frozen)
        with mode():
            assert_same(explain(net, images, EVERY, LAYERS, target="top-2", options=QUICK), expected)
    with torch.inference_mode():
        assert_same(
            explain(copy.deepcopy(small_net()), images.clone(), EVERY, LAYERS, target="top-2", options=QUICK), expected
        )


def test_many_methods_in_one_call_equal_each_alone() -> None:
    net, images = small_net(), small_images()
    together = explain(net, images, EVERY, LAYERS, options=QUICK)
    for key, found in together.items():
        name, _, layer = key.partition("@")
        assert_same(explain(net, images, name, layer or None, options=quick(name)), found)
    keys = [[f"{name}@{layer}" for layer in LAYERS] if METHODS[name].needs_layer else [name] for name in EVERY]
    assert list(together) == [key for some in keys for key in some]


def test_top_k_equals_separate_calls() -> None:
    net, images = small_net(), small_images()
    top = explain(net, images, EVERY, LAYERS, target="top-3", options=QUICK)
    order = top["saliency"].logits.argsort(1, descending=True)
    for m in range(3):
        alone = explain(net, images, EVERY, LAYERS, target=order[:, m], options=QUICK)
        for key, found in top.items():
            assert torch.equal(found.classes[:, m], order[:, m])
            assert torch.allclose(found.maps[:, m], alone[key].maps[:, 0], atol=1e-13)
            assert torch.equal(found.status[:, m], alone[key].status[:, 0])
    assert_same(explain(net, images, "saliency", target=order[:, :3]), top["saliency"])


def test_one_forward_and_one_backward_a_class_and_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = small_net(), small_images()
    forwards: list[int] = []
    backwards: list[int] = []
    plain = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **more: (backwards.append(1), plain(*args, **more))[1])
    net.register_forward_hook(lambda *_: forwards.append(1))
    one_pass = [name for name in EVERY if METHODS[name].kind != "passes" and name != "fullgrad"]
    rules = {"plain"} | {METHODS[name].relu_rule for name in one_pass}
    explain(net, images, one_pass, LAYERS, target="top-2")
    assert (len(forwards), len(backwards)) == (1, 2 * len(rules))
    explain(net, images, ["grad-cam", "layer-cam"], LAYERS)
    assert (len(forwards), len(backwards)) == (2, 2 * len(rules) + 1)
    explain(
        net, images, ["fullgrad", "saliency"]
    )  # the shares of the linear layers' biases take a backward of their own
    assert (len(forwards), len(backwards)) == (3, 2 * len(rules) + 3)


def test_nothing_of_the_callers_changes_and_no_graph_is_left() -> None:
    net, images = small_net(), small_images().requires_grad_()
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    seen: list[weakref.ref[Tensor]] = []
    handle = net.layer1.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    tensors = {name: value.clone() for name, value in net.state_dict().items()}
    pixels, rng = images.detach().clone(), torch.get_rng_state()
    gc.disable()
    try:
        found = explain(net, images, EVERY, LAYERS, target="top-2", options=QUICK)
        with pytest.raises(ClearwingError):
            explain(net, images, EVERY, LAYERS, target=7, options=QUICK)
        assert len(seen) >= 2
        assert all(alive() is None for alive in seen)
    finally:
        gc.enable()
        handle.remove()
    for e in found.values():
        assert not any(tensor.requires_grad for tensor in e.tensors().values())
    assert all(torch.equal(value, tensors[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for name, p in net.named_parameters() if name != "fc.weight")
    assert torch.equal(net.fc.weight.grad, torch.ones_like(net.fc.weight))
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m.training or m._forward_hooks for m in net.modules())
    assert torch.equal(images, pixels)
    assert images.grad is None
    assert torch.equal(torch.get_rng_state(), rng)


# targets


class Named(nn.Module):
    """A network with class names around a SmallNet, as a Classifier is."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.class_names = small_net(), ("ant", "bee", "cat", "dog")
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def test_every_target_asks_for_its_class() -> None:
    net, images = Named(), small_images()
    labels = torch.tensor([1, 3, 0])
    logits = net(images).detach()
    pred = logits.argmax(1)

    def classes(target: Any, **more: Any) -> list[list[int]]:
        e = explain(net, images, "saliency", target=target, **more)
        assert e.maps.shape[:2] == e.classes.shape == e.status.shape
        assert torch.allclose(e.logits, logits)
        assert e.class_names == net.class_names
        return e.classes.tolist()

    assert classes("pred") == pred[:, None].tolist()
    assert classes("label", labels=labels) == classes("label", labels=[1, 3, 0]) == [[1], [3], [0]]
    assert classes(2) == classes("cat") == classes(torch.tensor(2)) == [[2], [2], [2]]
    assert classes(labels) == classes(labels.int()) == [[1], [3], [0]]
    assert classes("top-4") == logits.argsort(1, descending=True).tolist()
    assert classes(("bee", "dog")) == classes((1, 3)) == [[1], [1], [1]]
    assert explain(net, images, target=("bee", 3)).against.tolist() == [[3], [3], [3]]
    assert classes(lambda z: z.logsumexp(1)) == [[-1], [-1], [-1]]
    contrast = explain(net, images, "saliency", target=("bee", "dog"))
    by_function = explain(net, images, "saliency", target=lambda z: z[:, 1] - z[:, 3])
    assert torch.allclose(contrast.maps, by_function.maps, atol=1e-14)
    assert explain(net, images, target=2).against is None


def test_a_batch_brings_labels_keys_and_geometry() -> None:
    geometry = tuple(Geometry(20 + n, 30, 0, 0, 20, 30, (8, 8)) for n in range(3))
    batch = Batch(small_images(), torch.tensor([1, 0, 2]), ("a", "b", "c"), geometry)
    for chunk in (None, 2):
        found = explain(small_net(), batch, ["grad-cam", "saliency"], target="label", chunk=chunk)
        for e in found.values():
            assert e.classes.flatten().tolist() == [1, 0, 2]
            assert (e.keys, e.geometry) == (batch.keys, geometry)
    assert explain(small_net(), batch, target="label", labels=torch.tensor([3, 3, 3])).classes.tolist() == [[3]] * 3


@pytest.mark.parametrize(
    ("message", "target", "more"),
    [
        ("target: bea; did you mean bee", "bea", {}),
        ("target: 4; the model has 4 classes, 0 to 3", 4, {}),
        ("target: 9; the model has 4 classes", (0, 9), {}),
        ("labels: -1; the model has 4 classes", "label", {"labels": [0, 1, -1]}),
        ("target: -1; the model has 4 classes", torch.tensor([0, -1, 2]), {}),
        (r"target: torch.int64 \(2,\); give class numbers, one for each picture: \(3,\)", torch.tensor([0, 1]), {}),
        ("target: torch.float32", torch.rand(3), {}),
        ("target: label; give labels=", "label", {}),
        (r"labels: torch.int64 \(2,\)", "label", {"labels": [0, 1]}),
        (r"labels: torch.int64 \(3, 1\)", "label", {"labels": [[0], [1], [2]]}),
        ("target: top-5; the model has 4 classes", "top-5", {}),
        ("target: top-0; choose one of ant", "top-0", {}),
        (r"target: \(1, 2, 3\); give \"pred\"", (1, 2, 3), {}),
        ("target: True; give", True, {}),
        ("target: None; give", None, {}),
        (r"target: \(3, 4\); the function must give one", lambda z: z, {}),
        (r"target: \(3,\); the function must give one differentiable", lambda z: z.detach()[:, 0], {}),
        ("target: float; the function", lambda z: 1.0, {}),
    ],
)
def test_targets_that_are_no_class_are_refused(message: str, target: Any, more: dict[str, Any]) -> None:
    with pytest.raises(ClearwingError, match=message):
        explain(Named(), small_images(), target=target, **more)


def test_a_class_name_without_names_is_refused() -> None:
    with pytest.raises(ClearwingError, match="target: bee; the model has no class names"):
        explain(small_net(), small_images(), target="bee")


# layers, methods, fusion, options


def test_what_comes_back_for_one_and_for_lists() -> None:
    net, images = small_net(), small_images()
    alone = explain(net, images)
    assert isinstance(alone, Explanation)
    assert (alone.method, alone.layer, alone.maps.shape) == ("grad-cam", "layer2", (3, 1, 8, 8))
    assert explain(net, images, layers=net.layer1).layer == "layer1"
    assert explain(net, images, larger_than=4).layer == "layer1"
    assert explain(net, images, "saliency").layer is None
    assert explain(net, images, "guided-grad-cam").layer == "layer2"
    assert list(explain(net, images, ["grad-cam"])) == ["grad-cam@layer2"]
    assert list(explain(net, images, "saliency", ["stem", "layer1"])) == ["saliency"]
    assert list(explain(net, images, ["layer-cam", "saliency", "layer-cam"], ("layer1", "stem", net.stem))) == [
        "layer-cam@layer1",
        "layer-cam@stem",
        "saliency",
    ]
    named = explain(Named(), images, layers=["backbone.layer1"])
    assert list(named) == ["grad-cam@layer1"]
    assert named["grad-cam@layer1"].layer == "layer1"


@pytest.mark.parametrize("fuse", ["max", "mean", "product"])
def test_fusion_joins_maps_divided_by_their_own_maximum(fuse: str) -> None:
    net, images = small_net(), small_images()
    apart = explain(net, images, ["layer-cam", "guided-backprop", "grad-cam"], ["stem", "layer2"], target="top-2")

    def joined(name: str) -> Tensor:
        one, two = (apart[f"{name}@{layer}"].maps for layer in ("stem", "layer2"))
        one, two = (maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-300) for maps in (one, two))
        return {"max": torch.maximum(one, two), "mean": (one + two) / 2, "product": one * two}[fuse]

    found = explain(net, images, ["layer-cam", "guided-grad-cam"], ["stem", "layer2"], target="top-2", fuse=fuse)
    assert list(found) == ["layer-cam@stem+layer2", "guided-grad-cam@stem+layer2"]
    assert torch.allclose(found["layer-cam@stem+layer2"].maps, joined("layer-cam"), atol=1e-13)
    assert found["layer-cam@stem+layer2"].layer == "stem+layer2"
    guided = apart["guided-backprop"].channels * joined("grad-cam")[:, :, None]
    assert torch.allclose(found["guided-grad-cam@stem+layer2"].channels, guided, atol=1e-13)


def test_options_reach_the_method_that_owns_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def powered(A: Tensor, G: Tensor, power: float = 1) -> Tensor:
        return (A**power * G).sum(1)

    monkeypatch.setitem(METHODS, "powered", Method("cam", powered, "none", needs_layer=True, options=("power",)))
    net, images = small_net(), small_images()
    one = explain(net, images, ["grad-cam", "powered"], options={"power": 2})
    two = explain(net, images, ["grad-cam", "powered"])
    assert torch.equal(one["grad-cam@layer2"].maps, two["grad-cam@layer2"].maps)
    assert not torch.allclose(one["powered@layer2"].maps, two["powered@layer2"].maps)
    with pytest.raises(ClearwingError, match="options: powr; did you mean power"):
        explain(net, images, "powered", options={"powr": 2})


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("methods: grad_cam; did you mean .*grad-cam", {"methods": "grad_cam"}),
        (r"methods: \[\]; choose one of", {"methods": []}),
        ("methods: None; give the name of a method", {"methods": None}),
        ("methods: .*; give the name of a method", {"methods": [["grad-cam"]]}),
        ("options: steps; these methods have no options", {"options": {"steps": 3}}),
        ("layers: 3; give the name of a module", {"layers": 3}),
        ("larger_than: a; give a whole number", {"larger_than": "a"}),
        ("seed: 1.5; give a whole number", {"seed": 1.5}),
        ("average: None; give", {"average": None}),
        (r"fuse: \['max'\]; ", {"fuse": ["max"], "layers": LAYERS}),
        ("layer: layer3; did you mean .*layer1", {"layers": "layer3"}),
        (r"layers: \[\]; name at least one layer", {"layers": []}),
        ("larger_than: 7; .*leave one of the two out", {"layers": "stem", "larger_than": 7}),
        ("layers: no layer has a map larger than 8 x 8", {"larger_than": 8}),
        ("fuse: maxi; did you mean max", {"fuse": "maxi", "layers": LAYERS}),
        ("fuse: max; name at least two layers", {"fuse": "max"}),
        ("fuse: max; it joins rectified maps", {"fuse": "max", "layers": LAYERS, "relu": False}),
        ("precision: float16; did you mean .*float", {"precision": "float16"}),
        ("chunk: 0; give how many pictures", {"chunk": 0}),
        (r"images: \(3, 8, 8\)", {"images": torch.rand(3, 8, 8)}),
        ("images: torch.uint8; .*255", {"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}),
        (r"model: SmallNet is in training mode; call model.eval\(\)", {"model": small_net().train()}),
        ("model: no ReLU .* but Gelu x 1; the guided rule", {"methods": "guided-backprop", "model": "gelu"}),
    ],
)
def test_what_is_wrong_at_the_door_is_refused(message: str, call: dict[str, Any]) -> None:
    if call.get("model") == "gelu":
        call = {**call, "model": nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 4)).eval()}
    with pytest.raises(ClearwingError, match=message):
        explain(**{"model": small_net(), "images": small_images(), **call})


def test_one_warning_for_all_chunks_and_classes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 4))
    with pytest.warns(UserWarning, match="keep their gradient: Gelu x 1") as caught:
        explain(net.eval(), small_images(), "guided-backprop", target="top-2", chunk=1)
    assert len(caught) == 1


# status, precision


def test_status_says_what_a_map_holds() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x).mean((2, 3))
            return torch.stack((z[:, 0], -z[:, 0], z[:, 1] * 0), 1)

    net = Flat().eval()
    with torch.no_grad():
        net.conv.weight.abs_()
        net.conv.bias.zero_()
    images = torch.rand(3, 3, 8, 8)
    images[1] = 0.3  # one colour, so one value at every place
    images[2, 0, 3, 3] = torch.nan
    e = explain(net, images, "grad-cam", "conv", target=torch.arange(3).expand(3, 3))
    assert e.status.tolist() == [
        [Status.OK, Status.ZERO, Status.ZERO],
        [Status.CONSTANT, Status.ZERO, Status.ZERO],
        [Status.NONFINITE] * 3,
    ]
    assert explain(net, images, "saliency", target=0).status.tolist() == [[Status.OK]] * 3


def test_precision() -> None:
    images = small_images()
    exact = explain(small_net(), images, EVERY, LAYERS, target=1, options=QUICK)
    assert exact["saliency"].maps.dtype == torch.float64
    single = explain(small_net(), images, EVERY, LAYERS, target=1, precision="float32", options=QUICK)
    own = explain(small_net().float(), images, EVERY, LAYERS, target=1, options=QUICK)
    assert_same(single, own, atol=0)
    half = explain(small_net(), images, EVERY, LAYERS, target=1, precision="bfloat16", options=QUICK)
    low = explain(small_net().bfloat16(), images, EVERY, LAYERS, target=1, options=QUICK)
    for key, e in exact.items():
        for other, close in ((single, 1e-6), (half, 2e-2), (low, 5e-2)):
            assert other[key].maps.dtype == other[key].logits.dtype == torch.float32
            assert 1 - F.cosine_similarity(other[key].maps.double().flatten(), e.maps.flatten(), dim=0) < close
    assert not torch.equal(half["saliency"].maps, single["saliency"].maps)
    with torch.autocast("cpu", torch.bfloat16):  # the caller's autocast does not reach in
        assert_same(explain(small_net().float(), images, EVERY, LAYERS, target=1, options=QUICK), own, atol=0)
    assert next(small_net().parameters()).dtype == torch.float64
