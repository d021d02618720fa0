"""Beside the peers: equal to them where they are right, and to the slow truth where they are not.

Each test of a peer's error asserts both halves, the peer's distance from the truth and ours; the truth is the network
taken apart by hand, or tests/reference.py. Seen with Captum 0.9.0, TorchCAM 0.5.0, zennit 0.5.1 and pytorch-grad-cam
1.5.7 on a CPU. Where a peer mends an error, its half fails: then keep the equality alone.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import reference
from clearwing.attribution.methods import explain
from clearwing.types import ClearwingError
from reference import small_images, small_net

K = 3  # the class that is explained


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers warn of their hooks, and of what they import
        yield


def peer(name: str) -> Any:
    package = name.partition(".")[0]
    extra = (
        "which is not in the extra: it installs a second OpenCV" if package == "pytorch_grad_cam" else "of the extra"
    )
    pytest.importorskip(package, reason=f"needs {package}, {extra}")
    return importlib.import_module(name)


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make().double().eval()


@pytest.fixture(scope="module")
def made() -> nn.Module:
    return seeded(lambda: torchvision.models.resnet18(num_classes=10))


@pytest.fixture
def resnet(made: nn.Module) -> nn.Module:
    """A copy for each test: peers fill `.grad` and leave modes and hooks behind."""
    return copy.deepcopy(made)


def fine(coarse: Tensor, side: int = 64) -> Tensor:
    """Maps (N, h, w), rectified and brought to (N, 1, side, side)."""
    return F.interpolate(coarse.detach().clamp(min=0)[:, None], (side, side), mode="bilinear")


def far(found: Tensor, truth: Tensor) -> float:
    """The largest difference, in parts of the truth's own largest value."""
    assert truth.abs().max() > 0
    return float((found - truth).abs().max() / truth.abs().max())


# the peers, each by one function: raw maps (N, h, w) of class K


def by_captum(net: nn.Module, images: Tensor, layer: str) -> Tensor:
    attr = peer("captum.attr")
    return attr.LayerGradCam(net, net.get_submodule(layer)).attribute(images, target=K)[:, 0].detach()


def by_torchcam(net: nn.Module, images: Tensor, layer: str, method: str = "GradCAM") -> Tensor:
    extractor = getattr(peer("torchcam.methods"), method)(net, layer)
    try:
        return extractor([K] * len(images), net(images), normalized=False)[0].detach()
    finally:
        extractor.remove_hooks()


def by_grad_cam_package(net: nn.Module, images: Tensor, layer: str) -> Tensor:
    """Its maps come at the size of the images, and scaled to [0, 1]: `scaled` does the same."""
    package, targets = peer("pytorch_grad_cam"), peer("pytorch_grad_cam.utils.model_targets")
    with package.GradCAM(net, [net.get_submodule(layer)]) as cam:
        chosen = [targets.ClassifierOutputTarget(K)] * len(images)
        return torch.from_numpy(cam(input_tensor=images, targets=chosen)).double()[:, None]


def scaled(maps: Tensor) -> Tensor:
    low = maps.amin((2, 3), keepdim=True)
    return (maps - low) / (1e-7 + (maps - low).amax((2, 3), keepdim=True))


def guided_by_captum(net: nn.Module, images: Tensor) -> Tensor:
    return peer("captum.attr").GuidedBackprop(net).attribute(images.clone(), target=K).detach()


def guided_by_grad_cam_package(net: nn.Module, images: Tensor) -> Tensor:
    """Of one picture: (1, C, H, W)."""
    model = peer("pytorch_grad_cam").GuidedBackpropReLUModel(net, "cpu")
    return torch.from_numpy(model(images.clone(), target_category=K)).movedim(-1, 0)[None]


GRAD_CAM = {"captum": by_captum, "torchcam": by_torchcam}
GUIDED = {"captum": guided_by_captum, "grad-cam": guided_by_grad_cam_package}


def ours(net: nn.Module, images: Tensor, layer: str, method: str = "grad-cam", **more: Any) -> Tensor:
    return explain(net, images, method, layer, target=K, **more).maps


def ours_guided(net: nn.Module, images: Tensor) -> Tensor:
    return explain(net, images, "guided-backprop", target=K).channels[:, 0]


def one_hot() -> Tensor:
    return torch.eye(4, dtype=torch.float64)[K : K + 1]


# where they are right


@pytest.mark.parametrize("layer", ["layer1", "layer3", "layer4"])
@pytest.mark.parametrize("name", GRAD_CAM)
def test_grad_cam_equals_captum_and_torchcam(resnet: nn.Module, name: str, layer: str) -> None:
    images = small_images(2, size=64)
    expected = fine(GRAD_CAM[name](resnet, images, layer))
    assert far(ours(resnet, images, layer), expected) < 1e-12


def test_grad_cam_equals_pytorch_grad_cam_up_to_its_scaling(resnet: nn.Module) -> None:
    images = small_images(2, size=64)
    expected = by_grad_cam_package(resnet, images, "layer3")
    assert far(scaled(ours(resnet, images, "layer3")), expected) < 1e-4  # it resizes in float32


@pytest.mark.parametrize("layer", ["layer2", "layer4"])
def test_layer_cam_equals_torchcam(resnet: nn.Module, layer: str) -> None:
    images = small_images(2, size=64)
    assert far(ours(resnet, images, layer, "layer-cam"), fine(by_torchcam(resnet, images, layer, "LayerCAM"))) < 1e-12


def test_integrated_gradients_equal_captum_on_the_same_points(resnet: nn.Module) -> None:
    images = small_images(1, size=64)
    attr = peer("captum.attr")
    e = explain(resnet, images, "integrated-gradients", target=K, options={"steps": 6, "baseline": 0.25})
    expected = attr.IntegratedGradients(resnet).attribute(images, 0.25, target=K, n_steps=6, method="riemann_middle")
    assert far(e.channels[:, 0], expected) < 1e-6  # captum's points are float32


def test_smoothgrad_equals_captum_on_the_same_noise(resnet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images = small_images(1, size=64)
    attr = peer("captum.attr")
    e = explain(resnet, images, "smoothgrad", target=K, seed=5, options={"samples": 4, "noise": 0.1})
    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for _ in range(4)])
    monkeypatch.setattr(torch, "normal", lambda mean, std: noise * std)  # captum draws its own, from the global state
    sigma = 0.1 * float(images.max() - images.min())
    tunnel = attr.NoiseTunnel(attr.Saliency(resnet))
    expected = tunnel.attribute(images.clone(), "smoothgrad", 4, stdevs=sigma, target=K, abs=False).detach()
    assert far(e.channels[:, 0], expected) < 1e-10


@pytest.mark.parametrize("name", GUIDED)
def test_guided_backprop_equals_them_where_every_relu_is_a_module_of_its_own(name: str) -> None:
    net, images = seeded(ModuleReLUs), small_images(1)
    assert far(ours_guided(net, images), GUIDED[name](net, images)) < 1e-12


class Unbiased(nn.Module):
    """A plain network without biases: the peers' z+ rules differ in where a bias goes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Conv2d(6, 5, 3, bias=False)
        self.fc = nn.Linear(20, 4, bias=False)
        self.first, self.pool, self.second = nn.ReLU(), nn.MaxPool2d(2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.two(self.pool(self.first(self.one(x))))).flatten(1))


def lrp(rule: str) -> tuple[Tensor, Unbiased, Tensor]:
    net, images = seeded(Unbiased), small_images(1)
    e = explain(net, images, f"lrp-{rule}", target=K, options={"epsilon": 1e-9})
    assert torch.allclose(e.maps.sum((2, 3)), net(images)[:, K : K + 1], rtol=1e-5)  # all relevance arrives
    return e.channels[:, 0], net, images


@pytest.mark.parametrize("rule", ["epsilon", "zplus"])
def test_lrp_equals_zennit(rule: str) -> None:
    found, net, images = lrp(rule)
    composites, attribution = peer("zennit.composites"), peer("zennit.attribution")
    rules, types = peer("zennit.rules"), peer("zennit.types")
    of_convolutions = rules.Epsilon(epsilon=1e-12) if rule == "epsilon" else rules.ZPlus(stabilizer=1e-12)
    layers = [(types.Activation, rules.Pass()), (types.Convolution, of_convolutions), (nn.Linear, rules.Epsilon(1e-12))]
    with attribution.Gradient(model=net, composite=composites.LayerMapComposite(layers)) as attributor:
        _, expected = attributor(images, lambda logits: logits * one_hot())
    assert far(found, expected) < 1e-6


@pytest.mark.parametrize("rule", ["epsilon", "zplus"])
def test_lrp_equals_captum(rule: str) -> None:
    rules = peer("captum.attr._utils.lrp_rules")
    found, net, images = lrp(rule)
    for layer in (net.one, net.two, net.fc):
        other = rule == "zplus" and layer is not net.fc
        layer.rule = rules.Alpha1_Beta0_Rule() if other else rules.EpsilonRule(1e-12)  # type: ignore[assignment]
    expected = peer("captum.attr").LRP(net).attribute(images, target=K).detach()
    assert far(found, expected) < 1e-6


# a layer that an in-place ReLU follows


def taken_apart(net: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What leaves layer4.1.bn2 of a ResNet-18, before its ReLU in place, and the gradient of logit K there."""
    with torch.no_grad():
        x = net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))))
        x = net.layer4[0](x)
        block = net.layer4[1]
        A = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    A.requires_grad_()
    score = net.fc(torch.relu(A + x).mean((2, 3)))[:, K].sum()
    return A.detach(), torch.autograd.grad(score, A)[0]


def by_reference(rule: Callable[[Tensor, Tensor], Tensor], A: Tensor, G: Tensor) -> Tensor:
    return torch.stack([rule(a, g) for a, g in zip(A, G, strict=True)])


def test_before_an_in_place_relu_torchcam_explains_what_overwrote_it(resnet: nn.Module) -> None:
    images, layer = small_images(2, size=64), "layer4.1.bn2"
    A, G = taken_apart(resnet, images)
    truth = by_reference(reference.grad_cam, A, G)
    assert far(ours(resnet, images, layer), fine(truth)) < 1e-12
    assert far(by_captum(resnet, images, layer), truth) < 1e-12  # it is right, too
    assert far(fine(by_torchcam(resnet, images, layer)), fine(truth)) > 0.5
    local = by_reference(reference.layer_cam, A, G)
    assert far(ours(resnet, images, layer, "layer-cam"), fine(local)) < 1e-12
    assert far(fine(by_torchcam(resnet, images, layer, "LayerCAM")), fine(local)) > 0.5


def test_before_an_in_place_relu_pytorch_grad_cam_explains_what_overwrote_it(resnet: nn.Module) -> None:
    images, layer = small_images(2, size=64), "layer4.1.bn2"
    truth = scaled(fine(by_reference(reference.grad_cam, *taken_apart(resnet, images))))
    assert far(scaled(ours(resnet, images, layer)), truth) < 1e-12
    assert far(by_grad_cam_package(resnet, images, layer), truth) > 0.2


# guided backpropagation


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.fc = nn.Linear(5, 4)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(x)))))

    def steps(self) -> list[Any]:
        return [self.one, "relu", self.two, "relu", self.head]


class ModuleReLUs(Functional):
    """The same network, its ReLUs modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.two(self.first(self.one(x)))))


class PreActivated(Functional):
    """x + conv(relu(x)): what enters the ReLU is read by the shortcut as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.ReLU()
        nn.init.normal_(self.conv.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.head(self.second(self.two(x + self.conv(self.first(x)))))

    def steps(self) -> list[Any]:
        return [self.one, ("residual", ["relu", self.conv], []), self.two, "relu", self.head]


def ruled(net: Functional, images: Tensor, rule: str) -> Tensor:
    with torch.no_grad():
        return reference.ruled_gradient(net.steps(), images, one_hot(), rule)


@pytest.mark.parametrize("name", GUIDED)
def test_of_functional_relus_captum_and_pytorch_grad_cam_return_the_plain_gradient(name: str) -> None:
    net, images = seeded(Functional), small_images(1)
    guided, plain = ruled(net, images, "guided"), ruled(net, images, "plain")
    assert far(ours_guided(net, images), guided) < 1e-12
    found = GUIDED[name](net, images)
    assert far(found, plain) < 1e-12
    assert far(found, guided) > 0.5


@pytest.mark.parametrize("name", GUIDED)
def test_on_a_pre_activation_block_captum_clamps_the_sum_of_the_branches(name: str) -> None:
    """Its hook on the ReLU's input meets the shortcut's gradient too. With a batch norm between them it is right."""
    net, images = seeded(PreActivated), small_images(1)
    guided = ruled(net, images, "guided")
    assert far(ours_guided(net, images), guided) < 1e-12
    found = far(GUIDED[name](net, images), guided)
    assert found > 0.05 if name == "captum" else found < 1e-12


def test_called_twice_pytorch_grad_cam_adds_up_guided_gradients() -> None:
    net, images = seeded(ModuleReLUs), small_images(1)
    guided = ruled(net, images, "guided")
    for _ in range(2):
        assert far(ours_guided(net, images), guided) < 1e-12
    assert images.grad is None
    assert not any(p.grad is not None for p in net.parameters())
    model = peer("pytorch_grad_cam").GuidedBackpropReLUModel(net, "cpu")
    once, twice = (torch.from_numpy(model(images, target_category=K).copy()).movedim(-1, 0)[None] for _ in range(2))
    assert far(once, guided) < 1e-12
    assert far(twice, 2 * guided) < 1e-12
    assert images.grad is not None
    assert all(p.grad is not None for p in net.parameters())


# frozen networks, and the caller's modes


@pytest.mark.parametrize("head", [False, True])
def test_of_a_frozen_network_torchcam_raises(resnet: Any, head: bool) -> None:
    images = small_images(2, size=64)
    expected = ours(resnet, images, "layer3")
    resnet.requires_grad_(False)
    resnet.fc.requires_grad_(head)
    assert torch.equal(ours(resnet, images, "layer3"), expected)
    assert far(fine(by_captum(resnet, images, "layer3")), expected) < 1e-12  # right: it sets requires_grad on the input
    with pytest.raises(RuntimeError, match="not connected"):
        by_torchcam(resnet, images, "layer3")
    by_hand = images.clone().requires_grad_()  # TorchCAM's own mend
    assert far(fine(by_torchcam(resnet, by_hand, "layer3")), expected) < 1e-12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_captum_alone_works_and_under_inference_mode_no_peer(resnet: nn.Module, mode: Any) -> None:
    images = small_images(1, size=64)
    expected = ours(resnet, images, "layer3")
    with mode():
        assert torch.equal(ours(resnet, images, "layer3"), expected)
        with pytest.raises(RuntimeError, match="not connected"):
            by_torchcam(resnet, images, "layer3")
        if mode is torch.no_grad:
            assert far(fine(by_captum(resnet, images, "layer3")), expected) < 1e-12
            return
        with pytest.raises(RuntimeError, match="does not require grad"):
            by_captum(resnet, images, "layer3")
        with pytest.raises(RuntimeError, match="require gradient"):
            guided_by_captum(resnet, images)


@pytest.mark.parametrize("where", ["frozen", "frozen but for its head", "no_grad", "inference_mode"])
def test_where_parameters_or_modes_have_no_gradient_pytorch_grad_cam_raises(resnet: Any, where: str) -> None:
    images = small_images(1, size=64)
    expected = ours(resnet, images, "layer3")
    if where.startswith("frozen"):
        resnet.requires_grad_(False)
        resnet.fc.requires_grad_(where != "frozen")
    with getattr(torch, where, contextlib.nullcontext)():
        with pytest.raises((RuntimeError, AttributeError)):
            by_grad_cam_package(resnet, images, "layer3")
        assert torch.equal(ours(resnet, images, "layer3"), expected)


def test_in_bfloat16_ours_is_near_and_so_are_captum_and_torchcam(resnet: nn.Module) -> None:
    images = small_images(2, size=64)
    expected = ours(resnet, images, "layer3")
    low, few = copy.deepcopy(resnet).bfloat16(), images.bfloat16()
    for maps in (ours(low, few, "layer3"), *(fine(by(low, few, "layer3")) for by in GRAD_CAM.values())):
        assert 1 - F.cosine_similarity(maps.double().flatten(), expected.flatten(), dim=0) < 1e-3


def test_in_bfloat16_pytorch_grad_cam_raises(resnet: nn.Module) -> None:
    images = small_images(1, size=64)
    with pytest.raises(TypeError, match="BFloat16"):
        by_grad_cam_package(copy.deepcopy(resnet).bfloat16(), images.bfloat16(), "layer3")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="BFloat16"):
        by_grad_cam_package(copy.deepcopy(resnet).float(), images.float(), "layer3")


@pytest.mark.parametrize("name", ["captum", "grad-cam"])
def test_in_training_mode_captum_updates_batch_norms_and_pytorch_grad_cam_leaves_it(resnet: Any, name: str) -> None:
    images = small_images(2, size=64)
    resnet.train()
    before = {name: value.clone() for name, value in resnet.named_buffers()}
    with pytest.raises(ClearwingError, match=r"model: .* is in training mode; call model.eval\(\)"):
        ours(resnet, images, "layer3")
    assert all(torch.equal(value, before[name]) for name, value in resnet.named_buffers())
    assert resnet.training
    if name == "captum":
        by_captum(resnet, images, "layer3")
        assert not torch.equal(resnet.bn1.running_mean, before["bn1.running_mean"])
    else:
        by_grad_cam_package(resnet, images, "layer3")
        assert not resnet.training
        assert any(p.grad is not None for p in resnet.parameters())


# a module that runs twice


class Twice(Functional):
    """One ReLU in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.two, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)
        nn.init.normal_(self.two.weight, mean=0.05, std=0.2)
        nn.init.uniform_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.two(self.relu(self.one(x)))))


def calls(net: Twice, images: Tensor) -> list[Tensor]:
    """Grad-CAM of each call of the ReLU, by hand."""
    with torch.no_grad():
        first = torch.relu(net.one(images))
        second = torch.relu(net.two(first))
    found = []
    for A, rest in ((first, lambda x: net.head(torch.relu(net.two(x)))), (second, net.head)):
        A.requires_grad_()
        G = torch.autograd.grad(rest(A)[:, K].sum(), A)[0]
        found.append(by_reference(reference.grad_cam, A.detach(), G))
    return found


def test_of_a_module_that_runs_twice_peers_explain_one_call_in_silence() -> None:
    net, images = seeded(Twice), small_images(2)
    first, last = calls(net, images)
    assert far(fine(last), fine(first)) > 0.2
    for name, truth in (("relu#0", first), ("relu#1", last), ("relu#-1", last)):
        assert far(ours(net, images, name, relu=False)[:, 0], truth) < 1e-12
    with pytest.warns(UserWarning, match="layer relu runs 2 times"):
        assert far(ours(net, images, "relu", relu=False)[:, 0], last) < 1e-12
    for by in GRAD_CAM.values():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = by(net, images, "relu")
        assert far(found.clamp(min=0), last.clamp(min=0)) < 1e-12
        assert not any("time" in str(warning.message) or "twice" in str(warning.message) for warning in told)


def test_of_a_module_that_runs_twice_pytorch_grad_cam_explains_the_other_call() -> None:
    net, images = seeded(Twice), small_images(2)
    first, last = (scaled(fine(one, 8)) for one in calls(net, images))
    found = by_grad_cam_package(net, images, "relu")
    assert far(found, first) < 1e-2  # its scaling adds 1e-7
    assert far(found, last) > 0.2
    for name, truth in (("relu#0", first), ("relu#1", last)):
        assert far(scaled(ours(net, images, name)), truth) < 1e-10


# Grad-CAM++


def test_the_weights_of_torchcams_grad_cam_plus_plus_are_not_the_papers() -> None:
    """Chattopadhay et al. 2018 eq. 19: alpha is a quotient, which TorchCAM computes into a copy and drops."""
    net, images = small_net(), small_images(2)
    with torch.no_grad():
        A = net.layer2(net.layer1(net.stem(images)))
        G = torch.stack([reference.gradient(lambda x: net.head(x)[:, K], a[None])[0] for a in A])
    truth = torch.stack([reference.grad_cam_plus_plus(a, g, g**2, g**3) for a, g in zip(A, G, strict=True)])
    assert far(ours(net, images, "layer2", "grad-cam++"), fine(truth, 8)) < 1e-6
    grad_cam = by_torchcam(net, images, "layer2")
    assert far(grad_cam, by_reference(reference.grad_cam, A, G)) < 1e-6  # it is given the same A and G
    found = by_torchcam(net, images, "layer2", "GradCAMpp")
    assert far(found, truth) > 0.2
    undivided = torch.einsum("nk,nkij->nij", (G**2 * G.clamp(min=0)).sum((2, 3)), A)
    assert far(found, undivided) < 1e-6
