"""Recording: what is kept, what is left as it was, what is refused; and the default layer."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from clearwing.attribution.layers import find_layer
from clearwing.attribution.methods import explain
from clearwing.attribution.trace import record
from clearwing.types import Batch, ClearwingError
from reference import SmallNet, small_images, small_net

LAYERS = ("stem", "layer1", "layer2")


def tail(net: SmallNet, layer: str, x: Tensor) -> Tensor:
    for stage in LAYERS[LAYERS.index(layer) + 1 :]:
        x = getattr(net, stage)(x.clone())
    return net.head(x)


def by_hand(net: SmallNet, images: Tensor, layer: str, k: int) -> Tensor:
    """The gradient of logit k at a stage, with the network split there."""
    x = images
    with torch.no_grad():
        for stage in LAYERS[: LAYERS.index(layer) + 1]:
            x = getattr(net, stage)(x)
    x.requires_grad_()
    return torch.autograd.grad(tail(net, layer, x)[:, k].sum(), x)[0]


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_are_those_of_the_split_network(inputs: bool, frozen: bool, mode: Callable[[], Any]) -> None:
    net = small_net().requires_grad_(not frozen)
    images = small_images()
    with mode():
        trace = record(net, images, LAYERS, inputs=inputs)
        found = trace.gradients(trace.scores(2))
    for layer in LAYERS:
        assert torch.allclose(found[layer], by_hand(net, images, layer, 2), atol=1e-14)
        assert torch.equal(tail(net, layer, trace.features[layer].detach()), trace.logits.detach())
    assert ("input" in found) is inputs


def test_images_and_parameters_made_under_inference_mode() -> None:
    plain = small_net()
    images = small_images()
    with torch.inference_mode():
        net, inside = copy.deepcopy(plain), images.clone()
        assert net.fc.weight.is_inference()
        assert inside.is_inference()
    expected = record(plain, images, LAYERS)
    for trace in (record(net, inside, LAYERS), record(net, inside, LAYERS, inputs=False)):
        found = trace.gradients(trace.scores(0))
        for name, gradient in found.items():
            assert torch.equal(gradient, expected.gradients(expected.scores(0))[name])


def test_what_left_the_layer_is_kept_where_an_inplace_operation_follows() -> None:
    net, images = small_net(), small_images()
    with torch.no_grad():
        before_relu = net.stem[1](net.stem[0](images))
    assert (before_relu < 0).any()
    for inputs in (True, False):
        assert torch.equal(record(net, images, "stem.1", inputs=inputs).features["stem.1"], before_relu)


def test_the_trunk_below_a_cut_has_no_graph() -> None:
    net, images = small_net(), small_images()
    seen: list[bool] = []
    handle = net.stem.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    trace = record(net, images, ["layer1"], inputs=False)
    handle.remove()
    assert seen == [False]
    assert trace.features["layer1"].is_leaf
    assert trace.logits.requires_grad
    with pytest.raises(ClearwingError, match=r"input: .*inputs=True"):
        trace.gradients(trace.scores(0))["input"]
    with pytest.raises(ClearwingError, match=r"input: .*inputs=True"):
        trace.gradients(trace.scores(0), of=("input",))


def test_a_parallel_branch_on_a_cut_graph() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) * self.b(x)).mean((2, 3))

    images = small_images()
    for frozen in (True, False):
        net = Two().double().eval().requires_grad_(not frozen)
        trace = record(net, images, ["b", "a"], inputs=False)
        found = trace.gradients(trace.scores(1))
        whole = record(net, images, ["b", "a"])
        for name in ("a", "b"):
            assert torch.allclose(found[name], whole.gradients(whole.scores(1))[name])


def test_gradients_are_computed_once_a_tensor_and_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = record(small_net(), small_images(), LAYERS)
    calls: list[int] = []
    plain = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (calls.append(1), plain(*args, **kwargs))[1])
    scores = trace.scores(0)
    first = trace.gradients(scores, of=("layer1",))["layer1"]
    assert trace.gradients(scores, of=("layer1",))["layer1"] is first
    assert len(calls) == 1
    assert set(trace.gradients(scores)) == {"input", *LAYERS}
    assert trace.gradients(scores)["layer1"] is first
    assert len(calls) == 2
    trace.gradients(scores, "guided")
    trace.gradients(trace.scores(0))
    assert len(calls) == 4


def state(net: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "tensors": {name: value.clone() for name, value in net.state_dict().items()},
        "grad": [p.grad for p in net.parameters()],
        "requires_grad": [p.requires_grad for p in net.parameters()],
        "modes": [m.training for m in net.modules()],
        "hooks": [len(getattr(m, name)) for m in net.modules() for name in hooks],
        "rng": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_same(one: Any, two: Any) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=0)


class Broken(SmallNet):
    """Writes on its input, draws random numbers, and fails after its layers have run."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        torch.rand(3)
        super().forward(x)
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_of_the_callers_changes(inputs: bool, fails: bool) -> None:
    net: nn.Module = Broken().double().eval() if fails else small_net()
    next(net.parameters()).requires_grad_(False)
    images = small_images().requires_grad_()
    before, pixels = state(net), images.detach().clone()
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            record(net, images, LAYERS, inputs=inputs)
    else:
        trace = record(net, images, LAYERS, inputs=inputs)
        trace.gradients(trace.scores(0))
        trace.gradients(trace.scores(0), "guided")
        find_layer(net, images)
    assert_same(state(net), before)
    assert torch.equal(images, pixels)
    assert images.grad is None
    assert images.requires_grad


def test_the_graph_dies_with_the_trace() -> None:
    trace = record(small_net(), small_images(), LAYERS)
    trace.gradients(trace.scores(1))
    logits, node = weakref.ref(trace.logits), weakref.ref(trace.features["layer1"])
    del trace
    assert logits() is None
    assert node() is None


def test_another_thread_on_the_same_model_is_not_recorded() -> None:
    class Calls(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is threading.main_thread():
                other = threading.Thread(target=self, args=(x.detach() + 1,))
                result = super().forward(x)
                other.start()
                other.join()
                return result
            return super().forward(x)

    net = Calls().double().eval()
    images = small_images()
    trace = record(net, images, LAYERS)
    assert torch.equal(trace.features["stem"], net.stem(images))


def test_layers_by_name_by_module_and_below_the_backbone() -> None:
    class Wrapped(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone, self.class_names = backbone, ("a", "b", "c", "d")

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)

    net = small_net()
    model = Wrapped(net).eval()
    for layer in ("layer1", "backbone.layer1", net.layer1):
        trace = record(model, small_images(), [layer])
        assert list(trace.features) == ["layer1"]
        assert trace.features["backbone.layer1"] is trace.features["layer1"]
    assert find_layer(model, small_images()) == "layer2"
    assert list(record(net, small_images(), net.layer1).features) == ["layer1"]
    with pytest.raises(ClearwingError, match="layer: Conv2d"):
        record(net, small_images(), nn.Conv2d(3, 3, 3))


def test_a_batch_is_taken_as_its_images() -> None:
    images = small_images()
    assert torch.equal(record(small_net(), Batch(images)).logits, record(small_net(), images).logits)


def test_parameters_that_stand_in() -> None:
    net, other, images = small_net(0), small_net(5), small_images()
    trace = record(net, images, parameters={**dict(other.named_parameters()), **dict(other.named_buffers())})
    assert torch.equal(trace.logits, other(images))


def test_wrappers_are_taken_off() -> None:
    net, images = small_net(), small_images()
    expected = record(net, images).logits
    compiled = torch.compile(net, backend="eager")  # never run, so nothing is compiled
    parallel = nn.DataParallel(net, device_ids=[]).eval()
    own = copy.deepcopy(net)
    own.compile(backend="eager")
    for model in (compiled, parallel, own):
        assert torch.equal(record(model, images, ["layer1"]).logits, expected)
    inside = nn.Sequential(small_net(), nn.Identity()).eval()
    inside[0].compile(backend="eager")
    with pytest.raises(ClearwingError, match="model: 0 is compiled"):
        record(inside, images)


def refused(message: str, net: nn.Module | None = None, images: Any = None, layers: Any = (), **more: Any) -> None:
    net = small_net() if net is None else net
    before = [len(m._forward_hooks) for m in net.modules()]
    with pytest.raises(ClearwingError, match=message):
        record(net, small_images() if images is None else images, layers, **more)
    assert [len(m._forward_hooks) for m in net.modules()] == before


def test_unknown_layer_lists_near_names() -> None:
    refused("layer: layer3; did you mean .*layer2", layers=["layer3"])
    refused("layer: layer1.con; did you mean layer1.conv", layers="layer1.con")


def test_training_mode_is_refused() -> None:
    refused(r"model: SmallNet is in training mode; call model.eval\(\)", small_net().train())
    net = small_net()
    net.stem[1].train()
    refused("model: stem.1 is in training mode", net)
    net = small_net()
    net.drop = nn.Dropout()
    refused("model: drop is in training mode", net)
    net = small_net()
    net.fc = nn.Linear(5, 4).double()  # a new head after eval(): its flag says training, but it has one behaviour
    assert net.fc.training
    record(net, small_images())


def test_images_are_checked() -> None:
    refused(r"images: torch.uint8; .*255", images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    refused(r"images: \(3, 8, 8\); give \(N, C, H, W\), images\[None\]", images=torch.zeros(3, 8, 8))
    refused(r"images: \(0, 3, 8, 8\)", images=torch.zeros(0, 3, 8, 8))
    refused("images: str", images="picture.png")
    with pytest.raises(ClearwingError, match="model: builtin_function"):
        record(torch.relu, small_images())  # type: ignore[arg-type]


class Shared(nn.Module):
    """One ReLU for two places, a stage that is called past its hooks, and outputs of many kinds."""

    def __init__(self, kind: str = "logits") -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two, self.unused = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 3, 1)
        self.relu, self.pair = nn.ReLU(), Pair()

    def forward(self, x: Tensor) -> Any:
        x = self.relu(self.two(self.relu(self.one.forward(x))))
        self.unused(x[:, :3])
        logits = self.pair(x)[0].mean((2, 3))
        others = {"tuple": (logits, x), "dict": {"out": logits}, "map": x, "single": logits[:, 0]}
        return others.get(self.kind, logits.detach() if self.kind == "detached" else logits)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize("inputs", [True, False])
def test_of_a_module_that_runs_twice_the_call_is_chosen(inputs: bool) -> None:
    net, images = small_net(), small_images()
    net.layer1 = net.stem[2]  # one ReLU in two places
    net.layer2.insert(0, nn.BatchNorm2d(6).double())
    net.eval()
    with pytest.warns(UserWarning, match="runs 2 times .*; its last call is explained: stem.2#0 to stem.2#1 choose"):
        last = record(net, images, ["layer1"], inputs=inputs)
    trace = record(net, images, ["layer1#0", "stem.2#1", "stem.2#-1"], inputs=inputs)
    assert list(trace.features) == ["stem.2#0", "stem.2#1", "stem.2#-1"]
    first = torch.relu(net.stem[:2](images)).detach()
    assert torch.equal(trace.features["stem.2#0"], first)
    for name in ("stem.2#1", "stem.2#-1"):
        assert torch.equal(trace.features[name], last.features["stem.2"])
    gradients = trace.gradients(trace.scores(1))
    own = first.clone().requires_grad_()
    score = net.head(net.layer2(torch.relu(own)))[:, 1].sum()
    assert torch.allclose(gradients["stem.2#0"], torch.autograd.grad(score, own)[0], atol=1e-14)


def test_layers_that_cannot_be_recorded_are_refused() -> None:
    net = Shared().double().eval()
    refused("layer: relu#2; the module runs 2 times: relu#0 to relu#1", net, layers=["relu#2"])
    refused("layer: one; it did not run", net, layers=["one"])
    refused("layer: pair; it gives a tuple", net, layers=["pair"])
    refused(r"layer: fc; it gives \(3, 4\)", layers=["fc"])
    refused("layer: ReLU; ", net, layers=[nn.ReLU()])
    trace = record(net, small_images(), ["unused", "two"])
    with pytest.raises(ClearwingError, match="layer: unused; the scores do not depend"):
        trace.gradients(trace.scores(0))
    with pytest.raises(ClearwingError, match="layer: one; it was not recorded; the trace holds two, unused"):
        record(net, small_images(), ["two", "unused"]).features["one"]


@pytest.mark.parametrize("kind", ["tuple", "dict", "map", "single"])
def test_outputs_that_are_no_logits_are_refused(kind: str) -> None:
    refused("model: it gives .* not logits .*clearwing.wrap", Shared(kind).double().eval())


def test_a_forward_pass_without_a_graph_is_refused() -> None:
    refused("model: the logits of Shared have no graph", Shared("detached").double().eval())

    class Off(SmallNet):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    refused("have no graph; .*disables gradients", Off().double().eval())


def test_an_output_overwritten_through_another_name_is_refused() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.skip = nn.Conv2d(3, 4, 1), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            kept = self.skip(x)
            return (F.relu_(x) + kept).mean((2, 3))

    for inputs in (True, False):
        refused("layer: skip; its output is overwritten", Alias().double().eval(), layers=["skip"], inputs=inputs)


def test_scores_are_checked() -> None:
    trace = record(small_net(), small_images())
    with pytest.raises(ClearwingError, match="scores: they have no graph"):
        trace.gradients(trace.logits[:, 0].detach())
    with torch.no_grad():
        loose = trace.logits.unbind(1)[0]  # says that it requires grad, and has no graph
    with pytest.raises(ClearwingError, match="scores: they have no graph"):
        trace.gradients(loose)
    with pytest.raises(ClearwingError, match=r"scores: \(3, 4\)"):
        trace.gradients(trace.logits)
    with pytest.raises(ClearwingError, match="classes: 4; the model has 4 classes, 0 to 3"):
        trace.scores(4)
    with pytest.raises(ClearwingError, match="against: -1"):
        trace.scores(0, torch.tensor([0, -1, 2]))
    with pytest.raises(ClearwingError, match="relu_rule: guide; did you mean guided"):
        trace.gradients(trace.scores(0), "guide")
    classes = torch.tensor([3, 0, 1])
    assert torch.equal(trace.scores(classes), trace.logits[range(3), classes])
    assert torch.equal(trace.scores(classes, 2), trace.logits[range(3), classes] - trace.logits[:, 2])


def test_no_class_of_any_network_reaches_another_picture() -> None:
    net, images = small_net(), small_images(4)
    trace = record(net, images, LAYERS)
    together = trace.gradients(trace.scores(1))
    for n in range(4):
        alone = record(net, images[n : n + 1], LAYERS)
        for name, gradient in alone.gradients(alone.scores(1)).items():
            assert torch.allclose(gradient[0], together[name][n], atol=1e-14)


@pytest.mark.parametrize(
    ("name", "pixels", "larger_than", "expected"),
    [
        ("resnet18", 64, None, "layer4"),
        ("resnet18", 64, 3, "layer3"),
        ("resnet50", 64, 3, "layer3"),  # not layer4.0.bn1, of the same size
        ("squeezenet1_1", 64, None, "features"),
        ("mobilenet_v3_small", 64, None, "features"),
        ("mobilenet_v3_small", 64, 3, "features.8"),  # not features.9.block.0, of the same size
        ("vgg11", 64, None, "features"),  # not the pooling to 7 x 7 that follows
    ],
)
def test_the_default_layer_of_known_networks(name: str, pixels: int, larger_than: int | None, expected: str) -> None:
    with torch.device("meta"):
        net = getattr(torchvision.models, name)(weights=None).eval()
        images = torch.rand(1, 3, pixels, pixels)
    assert find_layer(net, images, larger_than) == expected


def test_the_default_layer_passes_over_pooling_dropout_and_shared_modules() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Identity(), nn.Flatten(), nn.Linear(36, 2)
    )
    assert find_layer(net.double().eval(), small_images()) == "1"
    assert find_layer(Shared().double().eval(), small_images()) == "unused"


def test_no_layer_with_space_is_refused() -> None:
    with pytest.raises(ClearwingError, match="layers: no layer has a map larger than 8 x 8; found 8 x 8, 4 x 4"):
        find_layer(small_net(), small_images(), larger_than=8)
    with pytest.raises(ClearwingError, match="layers: no layer has more than one place; found no 4-D output"):
        find_layer(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double().eval(), small_images())
    with pytest.raises(ClearwingError, match="training mode"):
        find_layer(small_net().train(), small_images())


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_a_network_that_takes_no_channels_last_pictures_gets_none(precision: str | None) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x))
            return self.fc(x.view(x.size(0), -1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Views().eval()
    images = small_images(8).float()
    methods = ["grad-cam", "saliency", "guided-backprop", "occlusion", "ablation-cam", "lrp-zplus", "smoothgrad"]
    found = explain(net, images, methods, ["conv"], target=1, precision=precision)
    for key, e in explain(net, images, methods, ["conv"], target=1, precision=precision, chunk=1).items():
        assert torch.allclose(found[key].maps, e.maps, atol=1e-2 if precision else 1e-5), key
    assert not net.conv._forward_hooks
