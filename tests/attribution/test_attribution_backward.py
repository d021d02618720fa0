"""The ReLU rules: against references from the papers, for every spelling of ReLU, and refused where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captum.attr import GuidedBackprop
from torch import Tensor, nn

from clearwing.attribution.backward import RELU_RULES
from clearwing.attribution.trace import record
from clearwing.types import ClearwingError
from reference import forward, gradient, ruled_gradient, small_images, small_net

Activation = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("rule", RELU_RULES)
def test_each_rule_is_the_papers_on_a_network_with_a_pre_activation_block(rule: str) -> None:
    net, images = small_net(), small_images(2)
    trace = record(net, images, ["stem", "layer1"])
    found = trace.gradients(trace.scores(1), rule)
    one_hot = torch.eye(4, dtype=torch.float64)[1:2]
    with torch.no_grad():
        for n in range(2):
            image = images[n : n + 1]
            assert torch.allclose(ruled_gradient(net.steps(), image, one_hot, rule)[0], found["input"][n], atol=1e-12)
            for layer in ("stem", "layer1"):
                A = trace.features[layer][n : n + 1].detach()
                expected = ruled_gradient(net.steps(layer), A, one_hot, rule)[0]
                assert torch.allclose(expected, found[layer][n], atol=1e-12)


def test_the_references_agree_with_each_other() -> None:
    net, image = small_net(), small_images(1)
    with torch.no_grad():
        assert torch.allclose(forward(net.steps(), image), net(image), atol=1e-12)
        by_rule = ruled_gradient(net.steps(), image, torch.eye(4, dtype=torch.float64)[2:3], "plain")
        by_differences = gradient(lambda x: forward(net.steps(), x)[:, 2], image)
    assert torch.allclose(by_rule, by_differences, atol=1e-7)


class Spelled(nn.Module):
    """Three convolutions with a ReLU spelled in one way after each of the first two."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.one, self.two, self.three = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)
        self.activation = activation  # one module for both places where it is one
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.activation(self.two(self.activation(self.one(x))))).mean((2, 3))


def custom(name: str) -> Activation:
    """A ReLU with a backward of its own."""

    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad * (ctx.saved_tensors[0] > 0)  # type: ignore[attr-defined]

    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    both = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), both).apply  # type: ignore[attr-defined]


SPELLINGS: dict[str, Activation] = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU(inplace)": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "x.relu_": lambda x: x.relu_(),
    "F.relu(inplace)": lambda x: F.relu(x, inplace=True),
    "aten.relu": lambda x: torch.ops.aten.relu.default(x),
    "F.threshold": lambda x: F.threshold(x, 0, 0),
    "nn.Threshold(inplace)": nn.Threshold(0, 0, inplace=True),
    "nn.Sequential": nn.Sequential(nn.Identity(), nn.ReLU()),
}
NOT_RELU: dict[str, Activation] = {
    "Clamp x 2": lambda x: x.clamp(min=0),
    "ClampMin x 2": lambda x: torch.clamp_min(x, 0),
    "Hardtanh x 2": F.relu6,
    "Maximum x 2": lambda x: torch.maximum(x, torch.zeros((), dtype=x.dtype)),
    "Where x 2": lambda x: torch.where(x > 0, x, torch.zeros((), dtype=x.dtype)),
    "Gelu x 2": nn.GELU(),
    "Silu x 2": nn.SiLU(inplace=True),
    "LeakyRelu x 2": nn.LeakyReLU(),
    "Elu x 2": nn.SELU(inplace=True),
    "Hardswish x 2": nn.Hardswish(),
    "PreluKernel x 2": nn.PReLU(),
    "Threshold x 2": nn.Threshold(0.1, 0),
    "MyOwn x 2": custom("MyOwn"),
}


def under(rule: str, net: nn.Module, images: Tensor) -> Tensor:
    trace = record(net, images)
    return trace.gradients(trace.scores(0), rule)["input"]


@pytest.mark.parametrize("rule", ["guided", "deconvnet"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_relu_is_the_same(spelling: str, rule: str) -> None:
    images = small_images()
    found = under(rule, Spelled(SPELLINGS[spelling]), images)
    assert torch.equal(found, under(rule, Spelled(F.relu), images))
    assert not torch.allclose(found, under("plain", Spelled(F.relu), images))


@pytest.mark.parametrize("name", NOT_RELU)
def test_no_relu_on_the_path_is_refused_with_what_was_met(name: str) -> None:
    net = Spelled(NOT_RELU[name]).double()
    with pytest.raises(ClearwingError, match=f"model: no ReLU .* but {name}; the guided rule would be the plain"):
        under("guided", net, small_images())
    assert under("plain", net, small_images()).abs().sum() > 0


@pytest.mark.parametrize("name", NOT_RELU)
def test_other_non_linearities_beside_relu_are_named_in_one_warning(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), Spelled(NOT_RELU[name])).double().eval()
    trace = record(net, small_images())
    with pytest.warns(UserWarning, match=f"guided rule changed 1 ReLUs; .* keep their gradient: {name}$"):
        trace.gradients(trace.scores(0), "guided")
    trace.gradients(trace.scores(1), "guided")  # said once: a warning is an error here


def test_pooling_and_softmax_are_no_matter_for_a_warning() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4), nn.Softmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        under("guided", net.double().eval(), small_images())


def test_a_network_without_any_non_linearity_is_refused() -> None:
    with pytest.raises(ClearwingError, match="model: no ReLU between the scores and what is explained; the deconvnet"):
        under("deconvnet", Spelled(nn.Identity()), small_images())


def test_a_relu_beside_the_path_does_not_count() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 4, 3), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)) * F.relu(self.gate)

    net = Beside().double().eval()
    with pytest.raises(ClearwingError, match="model: no ReLU"):
        under("guided", net, small_images())


def test_between_a_layer_and_the_scores_only_what_lies_there_counts() -> None:
    net = small_net()
    trace = record(net, small_images(), ["layer1", "layer2"], inputs=False)
    trace.gradients(trace.scores(0), "guided", of=("layer1",))
    with pytest.raises(ClearwingError, match="model: no ReLU"):
        trace.gradients(trace.scores(0), "guided", of=("layer2",))


def test_channels_last_and_autocast() -> None:
    net, images = Spelled(F.relu).float(), small_images().float()
    expected = under("guided", net, images)
    last = under("guided", net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last))
    assert torch.allclose(last, expected, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = under("guided", net, images)
    assert F.cosine_similarity(half.flatten(), expected.flatten(), dim=0) > 0.999
    assert half.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it
def test_a_compiled_function_hides_its_relus_and_is_refused() -> None:
    net = Spelled(torch.compile(lambda x: F.relu(x), backend="aot_eager"))
    with pytest.raises(ClearwingError, match=r"model: compiled functions \(CompiledFunction x 2\)"):
        under("guided", net, small_images())
    torch._dynamo.reset()


def test_guided_backprop_equals_captum_where_its_relus_are_modules_of_their_own() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        net = nn.Sequential(trunk, nn.Flatten(), nn.Linear(128, 4))
    net, images = net.double().eval(), small_images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum says that it sets hooks and gradients
        peer = GuidedBackprop(net).attribute(images.clone().requires_grad_(), target=0)
    assert torch.allclose(under("guided", net, images), peer, atol=1e-14)
