"""The doctor: what it names in healthy and in sick networks, and that each identity finds the fault it is for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import clearwing
from clearwing.attribution import selfcheck
from clearwing.attribution.anatomy import Strided, guided, receptive_field, watch
from clearwing.attribution.doctor import Diagnosis, examine
from clearwing.attribution.layers import find_layer
from clearwing.attribution.methods import METHODS
from clearwing.attribution.trace import record
from clearwing.types import Batch, ClearwingError
from reference import small_images, small_net

SIZE = 16


def pictures(n: int = 3, size: int = SIZE) -> Tensor:
    return small_images(n, size=size).float()


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Net(nn.Module):
    """Two convolutions and a pooled linear head, with a choice of what stands between them."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.norm, self.fc = norm or nn.Identity(), nn.Linear(6, 4)
        self.act = act

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.act(self.two(self.act(self.norm(self.one(x))))).mean((2, 3)))


def check(diagnosis: Diagnosis, start: str) -> selfcheck.Check:
    return next(one for one in diagnosis.checks if one.name.startswith(start))


# receptive fields


def test_receptive_fields_of_resnet18_are_those_known_by_hand() -> None:
    """43 = 11 + 4 convolutions of 3 x 3 with 4 pixels between places, and so on; conv1 and max-pool give 11."""
    net = torchvision.models.resnet18(num_classes=2).eval()
    layers = ["conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    trace = record(net, torch.rand(1, 3, 448, 448), layers)
    fields = [receptive_field(trace.images, trace.features[layer]) for layer in layers]
    assert fields == [((size, size), False) for size in (7, 11, 43, 99, 211, 435)]
    trace = record(net, torch.rand(1, 3, 224, 224), ["layer3", "layer4"])
    assert receptive_field(trace.images, trace.features["layer3"]) == ((211, 211), False)
    assert receptive_field(trace.images, trace.features["layer4"]) == ((224, 224), True)


def test_receptive_fields_of_vgg11() -> None:
    cfg = [4, "M", 4, "M", 4, 4, "M", 4, 4, "M", 4, 4, "M"]
    net = nn.Sequential(torchvision.models.vgg.make_layers(cfg, batch_norm=True), nn.Flatten(), nn.Linear(4 * 49, 2))
    layers = ["0.0", "0.3", "0.4", "0.13", "0.27", "0"]
    trace = record(net.eval(), torch.rand(1, 3, 224, 224), layers)
    fields = [receptive_field(trace.images, trace.features[layer])[0][0] for layer in layers]
    assert fields == [3, 4, 8, 26, 134, 150]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (nn.Conv2d(3, 4, (3, 5), padding=(1, 2)), ((3, 5), False)),
        (nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3), ((5, 5), False)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.AvgPool2d(3, 1)), ((3, 3), False)),
        (nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ConvTranspose2d(4, 4, 4, 4)), ((4, 4), False)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4)), ((16, 16), True)),  # its mean is of the whole map
    ],
)
def test_receptive_field_of_any_wiring(body: nn.Module, expected: Any) -> None:
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.copy_(-tensor.abs())  # dead ReLUs do not hide a place
    trace = record(net, pictures(1), ["0"])
    assert receptive_field(trace.images, trace.features["0"]) == expected


# what a pass shows


def test_activations_are_named_with_the_module_that_runs_them() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.gelu = nn.ReLU(inplace=True), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.one(x))
            x = self.relu(self.gelu(self.two(x)) + F.relu6(x[:, :, ::2, ::2] * 2, inplace=True))
            return self.fc(F.silu(x).mean((2, 3)))

    seen = watch(Mixed().eval(), pictures())
    found = {(a.operator, a.module, a.kind, a.in_place, a.functional, a.calls) for a in seen.activations}
    itself = "the network itself"
    assert found == {
        ("relu", "relu", "ReLU", True, False, 2),
        ("gelu", "gelu", "GELU", False, False, 1),
        ("hardtanh", itself, "Mixed", True, True, 1),
        ("silu", itself, "Mixed", False, True, 1),
    }
    assert seen.calls["relu"] == 2
    assert [(one.module, one.kernel, one.stride) for one in seen.strided] == [
        ("two", (3, 3), (2, 2)),
        (itself, (1, 1), (2, 2)),
    ]


def test_guided_counts_what_it_replaces_and_what_stays() -> None:
    trace = record(torchvision.models.resnet18(num_classes=3).eval(), torch.rand(1, 3, 32, 32))
    assert dataclasses.astuple(guided(trace)) == (17, {}, "")
    with pytest.warns(UserWarning, match="keep their gradient"):
        met = guided(record(nn.Sequential(Net(lambda x: F.relu(F.silu(x)))).eval(), pictures()))
    assert dataclasses.astuple(met) == (2, {"Silu": 2}, "")
    met = guided(record(Net(F.gelu).eval(), pictures()))
    assert (met.replaced, met.kept) == (0, {"Gelu": 2})
    assert "no ReLU" in met.refused


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "even", "unread"),
    [(1, 2, 1, False, 0.75), (2, 2, 1, True, 0), (3, 2, 1, False, 0), (4, 2, 1, True, 0), (3, 2, 2, False, 0.75)],
)
def test_strided_convolutions_read_places_evenly_or_not(
    kernel: int, stride: int, dilation: int, even: bool, unread: float
) -> None:
    one = Strided("conv", (kernel, kernel), (stride, stride), (dilation, dilation), (8, 8))
    assert (one.even, one.unread) == (even, unread)
    conv = nn.Conv2d(1, 1, kernel, stride, dilation=dilation, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.ones(1, 1, 25, 25, requires_grad=True)
    (reads,) = torch.autograd.grad(conv(x).sum(), x)
    inner = reads[0, 0, 8 : 8 + stride, 8 : 8 + stride]  # how often each place of a cell is read, away from the border
    assert (inner.max() == inner.min()) == even
    assert float((inner == 0).float().mean()) == unread


def test_layers_before_an_uneven_convolution_have_their_grid_measured() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1, stride=2), nn.ReLU())
    net = nn.Sequential(net, nn.Conv2d(6, 6, 2, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    diagnosis = examine(net, pictures())
    layers = {layer.name: layer for layer in diagnosis.layers}
    assert list(layers) == ["input", "0.1", "0", "2"]
    assert layers["0.1"].before == ("0.2",)
    assert layers["0.1"].grid == math.inf
    assert "never read: 0.2 75% of the places" in diagnosis.findings[0].about
    assert all(layers[name].grid is None and not layers[name].before for name in ("input", "0", "2"))


# healthy networks


def test_a_healthy_network_passes_every_identity() -> None:
    net, images = small_net(), small_images(3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rng, told = torch.get_rng_state(), []
    diagnosis = clearwing.examine(net, images, lambda done, total: told.append((done, total)))
    assert diagnosis.verdict == "warning"  # its strided convolution
    assert [finding.verdict for finding in diagnosis.findings] == ["warning"]
    assert {one.verdict for one in diagnosis.checks} == {"passed"}
    assert len(diagnosis.checks) == len(selfcheck.IDENTITIES) + 1
    assert all(one.error is not None and one.error <= one.tolerance for one in diagnosis.checks)
    assert diagnosis.layer == find_layer(net, images) == "layer2"
    assert [layer.name for layer in diagnosis.layers] == ["input", "layer1", "layer2"]
    last = diagnosis.layers[-1]
    assert (last.channels, last.map, last.stride) == (5, (4, 4), (2, 2))
    assert diagnosis.head is not None
    assert diagnosis.head.closed_form
    assert (diagnosis.classes, diagnosis.arithmetic) == (4, "float64 on cpu")
    assert set(diagnosis.refused) == {"attention-rollout", "gradient-attention"}
    assert told[-1] == (len(diagnosis.checks), len(diagnosis.checks))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in net.modules())


def test_the_report_is_short_and_its_plain_values_are_json() -> None:
    diagnosis = examine(small_net(), Batch(small_images(2)))
    lines = str(diagnosis).splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) <= 120
    assert lines[1] == f"Healthy: {len(diagnosis.checks)} of {len(diagnosis.checks)} identities hold, 1 warning"
    assert any(line.endswith("<- default") and "layer2" in line for line in lines)
    values = json.loads(json.dumps(diagnosis.plain()))
    assert values["verdict"] == "warning"
    assert {row["name"] for row in values["checks"]} > set(selfcheck.IDENTITIES)


def test_without_pictures_random_ones_are_drawn_at_the_size_of_the_model() -> None:
    net = Net().eval()
    net.input_size = 24  # type: ignore[assignment]
    rng = torch.get_rng_state()
    assert examine(net).pictures == (4, 3, 24, 24)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_narrow_and_wide_networks_are_healthy_too(dtype: torch.dtype) -> None:
    diagnosis = examine(Net().eval().to(dtype), pictures())
    assert {one.verdict for one in diagnosis.checks} == {"passed", "not applicable"}


def test_one_picture_and_one_class_leave_identities_out() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)).eval()
    diagnosis = examine(net, pictures(1))
    left_out = {one.name: one.about for one in diagnosis.checks if one.verdict == "not applicable"}
    assert sorted(left_out.values()) == ["one picture only; give more"] * 2 + ["there is one class only"] * 2
    assert diagnosis.verdict == "passed"


# sick networks


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


class WithoutGraph(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Rounded(Net):
    """Its gradient knows of a fiftieth of the score."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z + 49 * z.detach()


class Overwriting(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).sigmoid()
        x.mul_(2)
        return self.fc(x.mean((2, 3)))


class Centred(Net):
    """A picture's logits depend on the others where there are more than two."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y - y.mean(0) if len(y) > 2 else y


class InADict(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


def poisoned() -> nn.Module:
    net = Net()
    with torch.no_grad():
        net.two.weight[0, 0, 0, 0] = math.nan
    return net


SICK: list[tuple[Callable[[], nn.Module], str, str]] = [  # network, what it is told, the identity that fails
    (lambda: Net(norm=nn.BatchNorm2d(6, track_running_stats=False)), "norm has no running statistics", "a batch ="),
    (
        lambda: Net(lambda x: F.dropout(F.relu(x))),
        "draws random numbers: bernoulli_ in the network itself",
        "a batch =",
    ),
    (Centred, "", "a batch ="),
    (Counting, "", "modes, buffers"),
    (Rounded, "", "integrated gradients sum to the change of score"),
    (WithoutGraph, "the logits have no graph", ""),
    (Overwriting, "modified by an inplace operation", ""),
    (InADict, "it gives a dict, not logits", ""),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), "give pictures that it takes", ""),
    (poisoned, "two.weight holds NaN", ""),
    (lambda: Net(lambda x: (x * (x > 0)).sqrt()), "receives a gradient of NaN or infinity", ""),
]


@pytest.mark.parametrize(("make", "told", "failing"), SICK)
def test_sick_networks_are_described_and_not_refused(make: Any, told: str, failing: str) -> None:
    diagnosis = examine(make().eval(), pictures())
    assert diagnosis.verdict == "failed"
    assert told in " ".join(f"{one.about} {one.mend}" for one in diagnosis.findings if one.verdict == "failed")
    if failing:
        assert check(diagnosis, failing).verdict == "failed"
        assert check(diagnosis, failing).mend
    else:
        assert not diagnosis.checks
        assert "were not tried" in str(diagnosis)
    json.dumps(diagnosis.plain())


class Optimized(nn.Module):
    """As torch.compile(module) is; that takes seconds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


@pytest.mark.parametrize("compiled", ["", "torch.compile(module)", "module.compile()"])
def test_training_mode_and_compiled_modules_are_told_and_a_copy_is_examined(compiled: str) -> None:
    net = Net(norm=nn.BatchNorm2d(6))
    if compiled == "torch.compile(module)":
        net.two = Optimized(net.two)  # type: ignore[assignment]
    elif compiled:
        net.two._compiled_call_impl = net.two._call_impl  # type: ignore[assignment]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    diagnosis = examine(net, pictures())
    faults = [one.about for one in diagnosis.findings if one.verdict == "failed"]
    expected = ["compiled, and closed to hooks and ReLU rules: two"] if compiled else []
    assert faults[:-1] == expected
    assert faults[-1].startswith("in training mode: the network itself, one, two")
    assert diagnosis.verdict == "failed"
    assert diagnosis.checks
    assert {one.verdict for one in diagnosis.checks} == {"passed", "not applicable"}
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_no_layer_and_no_relu_are_warnings_and_methods_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    diagnosis = examine(net, pictures())
    assert diagnosis.verdict == "warning"
    about = [one.about for one in diagnosis.findings]
    assert about[0].startswith("no layer has more than one place")
    assert about[1].startswith("guided backprop, guided Grad-CAM and deconvnet are refused: no ReLU")
    assert diagnosis.layer is None
    assert {"grad-cam", "guided-backprop"} < set(diagnosis.refused)
    assert check(diagnosis, "a batch =").verdict == "passed"
    assert check(diagnosis, "Grad-CAM = HiRes").about == "no layer has a map"


def test_a_branch_that_the_logits_do_not_hang_on_is_named() -> None:
    class Branched(Net):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Conv2d(6, 2, 3, stride=2)
            self.register_buffer("mask", torch.full((1,), -math.inf))

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x := self.act(self.two(self.act(self.one(x)))))
            return self.fc(x.mean((2, 3)))

    diagnosis = examine(Branched().eval(), pictures())
    about = {one.about: one.mend for one in diagnosis.findings}
    assert next(iter(about)).startswith("layer aside: the scores do not depend on its output")
    assert next(iter(about.values())) == "name a layer, such as two"
    assert (diagnosis.verdict, diagnosis.layer) == ("warning", "two")


def test_a_refused_layer_does_not_hide_another_of_its_size() -> None:
    class Detached(Net):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.two(self.act(self.one(x))))
            return self.fc((x + self.aside(x).detach()).mean((2, 3)))

    diagnosis = examine(Detached().eval(), pictures())
    assert diagnosis.layer == "two"
    assert [layer.name for layer in diagnosis.layers] == ["input", "one", "two"]
    assert [one.mend for one in diagnosis.findings if one.about.startswith("layer aside: ")] == [
        "name a layer, such as two"
    ]


def test_maps_of_zeros_are_equal_not_infinite() -> None:
    net = Net().eval()
    nn.init.zeros_(net.fc.weight)
    diagnosis = examine(net, pictures())
    assert {one.verdict for one in diagnosis.checks} == {"passed"}
    assert all(one.error == 0 for one in diagnosis.checks)


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(ClearwingError, match="model: str; give a torch"):
        examine("resnet18")  # type: ignore[arg-type]
    with pytest.raises(ClearwingError, match=r"images: \(3, 16, 16\)"):
        examine(Net(), pictures(1)[0])


# each identity finds the fault it is for


def spoilt(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **more: rule(*args, **more) + 0.01


def by_the_batch(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **more: (found := rule(*args, **more)) * len(found)


FAULTS = [
    ("xgrad-cam", spoilt, "Grad-CAM = HiResCAM"),
    ("cam", spoilt, "Grad-CAM = HiResCAM"),
    ("hires-cam", spoilt, "map(a against b)"),
    ("saliency", by_the_batch, "a batch ="),
    ("layer-cam", by_the_batch, "in chunks"),
    ("guided-grad-cam", spoilt, "guided Grad-CAM"),
    ("smoothgrad", spoilt, "SmoothGrad"),
    ("integrated-gradients", spoilt, "integrated gradients = mean slope"),
]


@pytest.mark.parametrize(("method", "fault", "failing"), FAULTS)
def test_a_method_that_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, method: str, fault: Any, failing: str
) -> None:
    row = METHODS[method]
    monkeypatch.setitem(METHODS, method, dataclasses.replace(row, rule=fault(row.rule)))
    found = check(examine(small_net(), small_images(3)), failing)
    assert found.verdict == "failed"
    assert found.error > found.tolerance


def test_a_method_that_breaks_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(METHODS, "saliency", dataclasses.replace(METHODS["saliency"], rule=broken))
    monkeypatch.setitem(METHODS, "rise", dataclasses.replace(METHODS["rise"], rule=lambda n, x, *_, **__: x / 0))
    found = check(examine(small_net(), small_images(2)), "each method")
    assert (found.verdict, found.error) == ("failed", 2)
    assert found.about == "saliency raised RuntimeError: no kernel; rise gives NaN or infinity"


def test_what_float32_blurs_is_tried_again_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def blurred(s: Any) -> tuple[float, float, str]:
        return (0.1, s.tolerance, "(saliency)") if s.images.dtype == torch.float32 else (0.0, s.tolerance, "")

    monkeypatch.setattr(selfcheck, "IDENTITIES", {"blurred": blurred, "wrong": lambda s: (0.1, s.tolerance, "")})
    net, images = Net().eval(), pictures()
    found = selfcheck.self_check(net, images, torch.zeros(3, dtype=torch.int64), "two").checks
    assert [one.verdict for one in found] == ["passed", "failed", "passed"]
    assert found[0].about == "in float64; rounding in float32 moves maps by 1e-01 (saliency)"
    assert found[0].tolerance == torch.finfo(torch.float64).eps ** 0.5
    assert next(net.parameters()).dtype == torch.float32


@pytest.mark.parametrize("error", [0.11, 1.0])
def test_rounding_that_moves_maps_far_is_a_warning_and_float64_sees_all_pictures(
    monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    seen = []

    def blurred(s: Any) -> tuple[float, float, str]:
        seen.append((len(s.images), s.images.dtype))
        return (error, s.tolerance, "(saliency)") if s.images.dtype == torch.float32 else (0.0, s.tolerance, "")

    monkeypatch.setattr(selfcheck, "IDENTITIES", {"blurred": blurred, "count": lambda s: (1, 0, "rise gives NaN")})
    found = selfcheck.self_check(Net().eval(), pictures(), torch.zeros(3, dtype=torch.int64), "two").checks
    assert seen == [(3, torch.float32), (3, torch.float64)]
    assert [one.verdict for one in found] == ["warning", "failed", "passed"]
    assert found[0].about == f"float32 rounding moves maps by {error:.0e} (saliency)"
    assert (found[0].error, found[0].mend[:19]) == (error, "in float64 it holds")


def test_probabilities_and_a_head_of_zeros_are_named() -> None:
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pooled, nn.Linear(4, 3), nn.Softmax(1))
    found = [finding.about for finding in examine(net.eval(), torch.rand(2, 3, 16, 16)).findings]
    assert any("the outputs are probabilities" in about for about in found)
    nn.init.zeros_(net[3].weight)
    found = [finding.about for finding in examine(net[:4].eval(), torch.rand(2, 3, 16, 16)).findings]
    assert not any("probabilities" in about for about in found)
    assert any("the logits are the same for all pictures" in about for about in found)
