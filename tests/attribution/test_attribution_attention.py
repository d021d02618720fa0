"""Attention: what is kept of a pass, its gradients, and the rules on it against slow references."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from clearwing.attribution.attention import attention_rollout, gradient_attention
from clearwing.attribution.fold import KeepAttention
from clearwing.attribution.methods import explain
from clearwing.attribution.trace import record
from clearwing.types import ClearwingError, Status
from reference import TinyViT, small_images, small_net, tiny_vit

BOTH = ["attention-rollout", "gradient-attention"]
READS = [(1, "first", [0]), (2, "both", [0, 1]), (3, "mean", [3, 4, 5, 6]), (0, "mean", [0, 1, 2, 3])]


class WithModules(TinyViT):
    """Attention of torch's own modules, with and without the weights that they give on the side."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0, batch_first=True, norm_first=True)
        self.kind, self.layers = kind, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        if self.kind == "encoder":
            return self.answer(self.layers(x))
        for layer in self.layers.layers:
            x = layer.norm1(x)
            x = x + layer.self_attn(x, x, x, need_weights=self.kind == "weights")[0]
        return self.answer(x)


def with_modules(kind: str) -> WithModules:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return WithModules(kind).double().eval()


def graph(tensor: Tensor) -> set[str]:
    """The names of all nodes of its graph."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return {node.name() for node in seen}


# what is kept


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("spelled", ["fused", "function", "method"])
def test_matrices_and_their_gradients_equal_the_reference(spelled: str, mode: Callable[[], Any]) -> None:
    net, images = tiny_vit(spelled=spelled).requires_grad_(mode is torch.enable_grad), small_images(2)
    with mode():
        trace = record(net, images, ["blocks.0"], inputs=False, attention=True)
        gradients = trace.gradients(trace.scores(2))
    assert list(trace.attention) == ["(attention 0)", "(attention 1)"]
    with torch.no_grad():
        logits, matrices = reference.attention_pass(net, images)
        assert torch.allclose(trace.logits, logits, atol=1e-12)
        assert torch.allclose(trace.logits, net(images), atol=1e-12)
        for number, A in enumerate(matrices):
            assert torch.allclose(trace.attention[f"(attention {number})"], A, atol=1e-13)
            for n in range(2):

                def score(moved: Tensor, n: int = n, number: int = number) -> Tensor:
                    pictures = images[n : n + 1].expand(len(moved), -1, -1, -1)
                    return reference.attention_pass(net, pictures, {number: moved})[0][:, 2]

                expected = reference.gradient(score, A[n : n + 1])[0]
                assert torch.allclose(gradients[f"(attention {number})"][n], expected, atol=1e-7)
                assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["encoder", "plain", "weights"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_modules_of_torch_hide_nothing(kind: str, mode: Callable[[], Any]) -> None:
    net, images = with_modules(kind).requires_grad_(False), small_images(2)
    expected = net(images)
    with mode():
        trace = record(net, images, attention=True)
        gradients = trace.gradients(trace.scores(0))
    assert torch.allclose(trace.logits, expected, atol=1e-13)
    assert len(trace.attention) == 2
    for name, A in trace.attention.items():
        assert A.shape == gradients[name].shape == (2, 2, 5, 5)
        assert torch.allclose(A.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
    attention = net.layers.layers[0].self_attn
    x = net.layers.layers[0].norm1(net.tokens(images))
    assert torch.allclose(trace.attention["(attention 0)"], attention(x, x, x, average_attn_weights=False)[1])


def test_without_it_networks_run_their_own_attention() -> None:
    net, images = tiny_vit(), small_images(2)
    plain = record(net, images, ["blocks.0"])
    assert any("ScaledDotProduct" in name for name in graph(plain.logits))
    assert torch.equal(plain.logits, net(images))
    assert not plain.attention
    spelled = graph(record(net, images, ["blocks.0"], attention=True).logits)
    assert not any("ScaledDotProduct" in name for name in spelled)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > 0.3},
        {"attn_mask": torch.linspace(-2, 2, 25, dtype=torch.float64).reshape(5, 5)},
        {"enable_gqa": True},
    ],
)
def test_fused_attention_is_computed_as_torch_does(more: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.rand(2, 4, 5, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    if "enable_gqa" in more:
        k, v = k[:, :2], v[:, :2]
    expected = F.scaled_dot_product_attention(q, k, v, **more)
    with KeepAttention(2) as mode:
        found = F.scaled_dot_product_attention(q, k, v, **more)
    assert torch.allclose(found, expected, atol=1e-14)
    assert [A.shape for A in mode.kept] == [(2, 4, 5, 5)]


def test_other_softmaxes_are_passed_by() -> None:
    x = torch.rand(2, 4, 4, 4)
    with KeepAttention(2) as mode:
        for found in (
            x.softmax(1),
            torch.softmax(x, 2),
            F.softmax(x[..., :3], -1),
            F.softmax(x[:, 0, :2, 0], -1),
            F.softmax(x[..., :1, :1], 3),
        ):
            assert found.isfinite().all()
        assert not mode.kept
        x.softmax(3)
        torch.softmax(x, dim=-1)
        nn.Softmax(dim=-1)(x)
    assert len(mode.kept) == 3


def test_another_thread_is_not_listened_to() -> None:
    class Calls(TinyViT):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is threading.main_thread():
                other = threading.Thread(target=self, args=(x.detach() + 1,))
                other.start()
                other.join()
            return super().forward(x)

    trace = record(Calls().double().eval(), small_images(2), attention=True)
    assert len(trace.attention) == 2


# the rules


@pytest.mark.parametrize(("prefix", "read", "rows"), READS)
def test_rules_equal_the_references(prefix: int, read: str, rows: list[int]) -> None:
    net, images = tiny_vit(prefix, read), small_images(2)
    trace = record(net, images, attention=True)
    scores = trace.scores(3)
    rollout, relevance = attention_rollout(trace, scores), gradient_attention(trace, scores)
    G = trace.gradients(scores)
    assert rollout.shape == relevance.shape == (2, 2, 2)
    for n in range(2):
        matrices = [A[n].detach() for A in trace.attention.values()]
        R = reference.attention_rollout(matrices)
        C = reference.gradient_attention(matrices, [G[name][n] for name in trace.attention])
        C -= torch.eye(len(C), dtype=torch.float64)
        for i in range(2):
            for j in range(2):
                column = prefix + 2 * i + j
                assert torch.isclose(rollout[n, i, j], R[rows, column].mean(), rtol=1e-12)
                assert torch.isclose(relevance[n, i, j], C[rows, column].mean(), rtol=1e-10)
    assert relevance.max() > 1e-3


def test_the_maps_of_the_door() -> None:
    net, images = tiny_vit(), small_images(2)
    trace = record(net, images, attention=True)
    found = explain(net, images, [*BOTH, "grad-cam", "saliency"], target="top-2")
    assert list(found) == [*BOTH, "grad-cam@blocks.1.norm1", "saliency"]
    classes = found["saliency"].classes
    for m in range(2):
        scores = trace.scores(classes[:, m])
        for name, rule in zip(BOTH, (attention_rollout, gradient_attention), strict=True):
            expected = F.interpolate(rule(trace, scores)[:, None], (8, 8), mode="bilinear")[:, 0]
            assert torch.allclose(found[name].maps[:, m], expected, atol=1e-13)
            assert (found[name].status[:, m] == Status.OK).all()
    rollout, relevance = (found[name].maps for name in BOTH)
    assert torch.equal(rollout[:, 0], rollout[:, 1])
    assert not torch.allclose(relevance[:, 0], relevance[:, 1])
    assert torch.allclose(found["saliency"].maps, explain(net, images, "saliency", target="top-2").maps, atol=1e-13)


def test_a_batch_equals_one_by_one_in_every_mode_and_nothing_changes() -> None:
    net, images = tiny_vit(2, "both"), small_images(3)
    whole = explain(net, images, BOTH, target=1)
    for name in BOTH:
        for n in range(3):
            alone = explain(net, images[n : n + 1], name, target=1)
            assert torch.allclose(alone.maps, whole[name].maps[n : n + 1], atol=1e-14)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                frozen = explain(tiny_vit(2, "both").requires_grad_(False), images, name, target=1, chunk=2)
            assert torch.allclose(frozen.maps, whole[name].maps, atol=1e-14)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    assert torch.overrides._get_current_function_mode() is None


def test_bfloat16() -> None:
    net, images = tiny_vit(), small_images(2)
    exact = explain(net, images, BOTH, target=1)
    for low in (
        explain(net, images, BOTH, target=1, precision="bfloat16"),
        explain(net.bfloat16(), images, BOTH, target=1),
    ):
        for name in BOTH:
            assert low[name].maps.dtype == torch.float32
            assert F.cosine_similarity(low[name].maps.double().flatten(), exact[name].maps.flatten(), dim=0) > 0.98


def test_a_head_before_its_training() -> None:
    net, images = tiny_vit(), small_images(2)
    expected = explain(net, images, "attention-rollout").maps
    nn.init.zeros_(net.head.weight)
    found = explain(net, images, BOTH)
    assert torch.equal(found["attention-rollout"].maps, expected)
    assert (found["gradient-attention"].status == Status.ZERO).all()


# what is refused


class Partly(nn.Module):
    """Attention in windows of four tokens, from one query to all tokens, or over fewer tokens each time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, x = len(x), x.flatten(2).mT[:, None]  # (N, 1, T, 3)
        attend = F.scaled_dot_product_attention
        if self.kind == "windows":
            x = x.reshape(-1, 1, 4, 3)
            x = attend(x, x, x).reshape(n, 1, -1, 3)
        elif self.kind == "spelled windows":
            x = x.reshape(n, -1, 1, 4, 3)
            x = (x @ x.mT).softmax(-1) @ x
            x = x.reshape(n, 1, -1, 3)
        elif self.kind == "query":
            x = attend(x[:, :, :1], x, x)
        elif self.kind == "pyramid":
            x = attend(x, x, x)[:, :, ::4]
            x = attend(x, x, x)
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("kind", ["windows", "spelled windows", "query", "pyramid"])
def test_attention_that_is_not_global_is_refused(kind: str) -> None:
    net = Partly(kind).double().eval()
    for name in BOTH:
        with pytest.raises(ClearwingError, match=r"attention: a matrix .* of 2 pictures; .* needs global attention"):
            explain(net, small_images(2), name)
    explain(net, small_images(2), "saliency")
    assert torch.overrides._get_current_function_mode() is None


def test_networks_without_attention_are_refused() -> None:
    for net in (small_net(), Partly("none").double().eval()):
        with pytest.raises(ClearwingError, match=r"attention: .* has no self-attention; .*grad-cam"):
            explain(net, small_images(2), "attention-rollout")
