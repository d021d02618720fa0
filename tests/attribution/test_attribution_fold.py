"""Tokens and channels-last maps: the layout found by shape, and recorded features that the graph goes through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from clearwing.attribution.fold import layout_of, token_grid
from clearwing.attribution.layers import find_layer
from clearwing.attribution.methods import explain
from clearwing.attribution.trace import record
from clearwing.types import ClearwingError
from reference import TinyViT, small_images, tiny_vit

TALL = (16, 8)


def tall_images(n: int = 2) -> Tensor:
    return torch.rand(n, 3, *TALL, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("T", "pixels", "found"),
    [
        (196, (224, 224), (14, 14)),
        (197, (224, 224), (14, 14)),
        (198, (224, 224), (14, 14)),
        (261, (224, 224), (16, 16)),  # a class token and four registers
        (1374, (518, 518), (37, 37)),
        (785, (224, 224), (28, 28)),
        (17, (32, 32), (4, 4)),
        (9, (16, 8), (4, 2)),
        (25, (48, 32), (6, 4)),
        (50, (230, 230), (7, 7)),  # the border is left over
        (60, (32, 32), None),  # 7 x 7 does not divide, and has eleven tokens more
        (10, (32, 32), None),  # 3 x 3 and a class token, or 2 x 2 and six registers
        (17, (31, 32), None),
        (2, (32, 32), None),
        (0, (32, 32), None),
    ],
)
def test_the_grid_is_found_by_shape(T: int, pixels: tuple[int, int], found: tuple[int, int] | None) -> None:
    images = torch.empty(1, 3, *pixels)
    assert token_grid(T, images) == found


def test_a_given_grid_wins() -> None:
    images = torch.empty(1, 3, 32, 32)
    assert token_grid(17, images, (2, 8)) == (2, 8)
    assert token_grid(15, images, (4, 4)) is None


@pytest.mark.parametrize(
    ("shape", "pixels", "kind", "size"),
    [
        ((2, 8, 7, 7), (224, 224), "map", (7, 7)),
        ((2, 7, 7, 8), (224, 224), "last", (7, 7)),
        ((2, 7, 7, 7), (224, 224), "map", (7, 7)),
        ((2, 64, 4, 6), (64, 96), "map", (4, 6)),
        ((2, 4, 6, 64), (64, 96), "last", (4, 6)),
        ((2, 3, 3, 64), (50, 40), "last", (3, 3)),  # rounded on its way down
        ((2, 64, 4, 3), (50, 40), "map", (4, 3)),
        ((2, 12, 5, 1), (32, 32), "map", (5, 1)),  # no square at all: as torch has it
        ((2, 32, 1, 1), (32, 32), "map", (1, 1)),
        ((2, 17, 8), (32, 32), "tokens", (4, 4)),
    ],
)
def test_the_layout_is_found_by_shape(
    shape: tuple[int, ...], pixels: tuple[int, int], kind: str, size: tuple[int, int]
) -> None:
    output = torch.rand(shape)
    model = nn.Sequential(nn.LayerNorm(shape[-1]))
    layout = layout_of(output, torch.empty(2, 3, *pixels), None, model, model[0])
    assert layout is not None
    assert (layout.kind, layout.size) == (kind, size)
    feature = layout.fold(output)
    assert feature.shape[2:] == size
    assert feature.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    back = layout.unfold(feature, output)
    assert torch.equal(back, output)
    assert back.untyped_storage().data_ptr() != output.untyped_storage().data_ptr()
    assert back.is_contiguous()


def test_what_holds_no_places_has_no_layout() -> None:
    images = torch.empty(2, 3, 32, 32)
    for output in (
        None,
        torch.empty(2, 8),
        torch.empty(17, 2, 8),
        torch.empty(8, 16, 8),
        torch.empty(8, 3, 4, 4),
        torch.empty(2, 3, 4, 4, 4),
        torch.zeros(2, 8, 4, 4, dtype=torch.int64),
    ):
        assert layout_of(output, images, None, nn.Linear(8, 8), nn.Linear(8, 8)) is None


class Tall(nn.Module):
    """Convolutions whose maps are as wide as the picture, so that channels and height look like a picture's sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1, stride=(2, 1))
        self.b = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, stride=(2, 1)), nn.ReLU())
        self.along = nn.Sequential(nn.Flatten(2), nn.Conv1d(16, 16, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.along(self.b(torch.relu(self.a(x)))).mean(2))


def test_maps_of_convolutions_keep_their_channels_first() -> None:
    net, images = Tall().double().eval(), small_images(2, size=64)
    trace = record(net, images, ["a", "b"])
    assert trace.features["a"].shape == (2, 16, 32, 64)
    assert trace.features["b"].shape == (2, 16, 16, 64)
    assert find_layer(net, images) == "b"
    for layer in ("along.0", "along.1"):  # (N, C, h w) holds no tokens
        with pytest.raises(ClearwingError, match=f"layer: {layer}; it gives"):
            record(net, images, [layer])


def test_queries_are_no_places() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 16, 8, stride=8), nn.Linear(16, 1)
            self.decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
            self.queries = nn.Parameter(torch.rand(1, 4, 16))

        def forward(self, x: Tensor) -> Tensor:
            places = self.conv(x).flatten(2).mT
            return self.fc(self.decoder(self.queries.expand(len(x), -1, -1), places))[..., 0]

    net, images = Queries().double().eval(), small_images(2, size=32)
    with pytest.raises(ClearwingError, match="layer: decoder; it gives"):
        record(net, images, ["decoder"])


def by_hand(net: TinyViT, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Tokens after the first block, and the gradient of logit k there, with the network split."""
    with torch.no_grad():
        tokens = net.blocks[0](net.tokens(images))
    tokens.requires_grad_()
    score = net.answer(net.blocks[1](tokens))[:, k].sum()
    return tokens.detach(), torch.autograd.grad(score, tokens)[0]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_gradients_at_tokens_are_those_of_the_split_network(prefix: int, inputs: bool, frozen: bool) -> None:
    net = tiny_vit(prefix, "mean").requires_grad_(not frozen)
    images = tall_images()
    trace = record(net, images, ["blocks.0", "blocks.1.norm1"], inputs)
    assert torch.allclose(trace.logits, net(images), atol=1e-13)
    A, G = trace.features["blocks.0"], trace.gradients(trace.scores(2))["blocks.0"]
    tokens, gradient = by_hand(net, images, 2)
    assert A.shape == G.shape == (2, 8, 4, 2)
    for i in range(4):
        for j in range(2):
            assert torch.allclose(A[:, :, i, j], tokens[:, prefix + 2 * i + j], atol=1e-14)
            assert torch.allclose(G[:, :, i, j], gradient[:, prefix + 2 * i + j], atol=1e-14)
    assert G.abs().min() > 0
    if inputs:  # the graph goes through the feature, and past it for the prefix tokens
        own = images.clone().requires_grad_()
        expected = torch.autograd.grad(net(own)[:, 2].sum(), own)[0]
        assert torch.allclose(trace.gradients(trace.scores(2))["input"], expected, atol=1e-14)


def test_grad_cam_of_tokens_equals_the_reference() -> None:
    net, images = tiny_vit(), tall_images()
    found = explain(net, images, ["grad-cam", "layer-cam"], ["blocks.0"], target=1, relu=False)
    tokens, gradient = by_hand(net, images, 1)
    for n in range(2):
        A, G = (t[n, 1:].T.reshape(8, 4, 2) for t in (tokens, gradient))
        for name, rule in (("grad-cam", reference.grad_cam), ("layer-cam", reference.layer_cam)):
            expected = reference.upsample(rule(A, G), *TALL)
            assert torch.allclose(found[f"{name}@blocks.0"].maps[n, 0], expected, atol=1e-13)
            assert expected.abs().max() > 1e-3


class Last(nn.Module):
    """A network of channels-last maps, with an in-place operation on one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.mix, self.head = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), Mix(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).permute(0, 2, 3, 1))
        return self.head(self.mix(x.relu_()).mean((1, 2)))


class Mix(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


@pytest.mark.parametrize("inputs", [True, False])
def test_channels_last_maps_are_folded(inputs: bool) -> None:
    net, images = Last().double().eval(), tall_images()
    trace = record(net, images, ["norm"], inputs)
    values = net.norm(net.embed(images).permute(0, 2, 3, 1)).detach()
    assert (values < 0).any()
    assert torch.equal(trace.features["norm"], values.permute(0, 3, 1, 2))
    values.requires_grad_()
    expected = torch.autograd.grad(net.head(net.mix(values.relu()).mean((1, 2)))[:, 3].sum(), values)[0]
    assert torch.allclose(trace.gradients(trace.scores(3))["norm"], expected.permute(0, 3, 1, 2), atol=1e-15)
    assert torch.equal(trace.logits, net(images))


def test_a_grid_that_the_number_of_tokens_does_not_tell() -> None:
    net, images = tiny_vit(9, "mean"), small_images(2, size=16)  # 4 x 4 and nine more are 5 x 5
    mend = r"which is no grid of the pictures, or not the given one; give grid=\(h, w\)"
    with pytest.raises(ClearwingError, match=rf"layer: blocks.0; it gives \(N, T, C\) = \(2, 25, 8\), {mend}"):
        record(net, images, ["blocks.0"])
    assert find_layer(net, images) == "embed"
    assert find_layer(net, images, grid=(4, 4)) == "norm"
    tokens = net.blocks[0](net.tokens(images))
    feature = record(net, images, ["blocks.0"], grid=(4, 4)).features["blocks.0"]
    assert torch.equal(feature.flatten(2).mT, tokens[:, 9:])
    assert explain(net, images, grid=(4, 4)).layer == "norm"
    with pytest.raises(ClearwingError, match="attention: it is over 25 tokens"):
        explain(net, images, "attention-rollout")
    assert explain(net, images, "attention-rollout", grid=(4, 4)).maps.shape == (2, 1, 16, 16)
    for wrong in ((8, 8), (2, 2)):
        with pytest.raises(ClearwingError, match=r"layer: blocks.0; .* or not the given one; give grid"):
            record(net, images, ["blocks.0"], grid=wrong)
    with pytest.raises(ClearwingError, match=r"grid: \(4, 4\); it is of one size of the pictures"):
        explain(net, images, grid=(4, 4), average=("flip", 1.5))


@pytest.mark.parametrize("grid", [(4,), (0, 4), (4.0, 4), "4x4", 4, (True, 4)])
def test_what_is_no_grid_is_refused(grid: Any) -> None:
    for call in (record, find_layer):
        with pytest.raises(ClearwingError, match=r"grid: .* two whole numbers"):
            call(tiny_vit(), tall_images(), grid=grid)


class Odd(nn.Module):
    """Tokens first, windows of tokens, and windows of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.windows, self.parts = nn.Linear(3, 3), nn.LayerNorm(3), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x.flatten(2).permute(2, 0, 1))
        windows = self.windows(x.flatten(2).mT.reshape(-1, 4, 3))
        parts = self.parts(x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
        return first.mean(0) + windows.unflatten(0, (len(x), -1)).mean((1, 2)) + parts.mean() + x.mean((2, 3))


def test_tokens_first_and_windows_are_refused() -> None:
    net, images = Odd().double().eval(), tall_images()
    for name in ("first", "windows", "parts"):
        with pytest.raises(ClearwingError, match=rf"layer: {name}; it gives .* for 2 pictures: windows, or tokens"):
            record(net, images, [name])
    with pytest.raises(ClearwingError, match="no layer has more than one place"):
        find_layer(net, images)


# the default layer


@pytest.mark.parametrize(
    ("prefix", "read", "expected"),
    [(1, "first", "blocks.1.norm1"), (2, "both", "blocks.1.norm1"), (3, "mean", "norm"), (0, "mean", "norm")],
)
def test_the_default_layer_is_the_last_of_which_every_place_is_read(prefix: int, read: str, expected: str) -> None:
    net, images = tiny_vit(prefix, read), tall_images()
    assert find_layer(net, images) == expected
    trace = record(net, images, [expected, "blocks.1.norm2"])
    G = trace.gradients(trace.scores(0))
    assert G[expected].abs().sum(1).min() > 0
    assert bool((G["blocks.1.norm2"] != 0).any()) == (read == "mean")
    fresh = tiny_vit(prefix, read).requires_grad_(False)
    nn.init.zeros_(fresh.head.weight)  # as torchvision begins, with no gradient anywhere
    with torch.inference_mode():
        assert find_layer(fresh, images) == expected
    wrapped = nn.ModuleDict({"backbone": net})
    wrapped.class_names, wrapped.forward = ("a", "b", "c", "d"), net.forward  # as a Classifier is
    assert find_layer(wrapped.eval(), images) == expected


def test_the_default_layer_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = tiny_vit(), tall_images()
    runs: list[int] = []
    net.register_forward_hook(lambda *_: runs.append(1))

    def passes(expected: str, pictures: Tensor = images, larger_than: int | None = None) -> int:
        runs.clear()
        assert find_layer(net, pictures, larger_than) == expected
        return len(runs)

    assert passes("blocks.1.norm1") == 2  # and one backward pass
    assert passes("blocks.1.norm1") == 0
    assert passes("blocks.1.norm1", tall_images(1)) == 0
    assert passes("blocks.1.norm1", small_images(1, size=16)) == 2
    assert passes("blocks.1.norm1", images, 1) == 2
    assert passes("blocks.1.norm1") == 0
    net.blocks.append(reference.TinyBlock("fused").double().eval())
    assert passes("blocks.2.norm1") == 2
    net.blocks[2] = nn.Identity()
    assert passes("blocks.1.norm1") == 2
    net.embed = nn.Conv2d(3, 8, 8, 8).double().eval()  # of the same type
    assert passes("blocks.1.norm1") == 2
    with pytest.raises(ClearwingError, match="larger than 8 x 8"):
        find_layer(net, images, 8)
    cnn = reference.small_net()
    cnn.register_forward_hook(lambda *_: runs.append(1))
    runs.clear()
    assert find_layer(cnn, small_images()) == find_layer(cnn, small_images()) == "layer2"
    assert len(runs) == 1


def test_what_is_kept_of_a_model_dies_with_it() -> None:
    from clearwing.attribution import layers

    before = len(layers._FOUND)
    net = tiny_vit()
    find_layer(net, tall_images())
    assert len(layers._FOUND) == before + 1
    del net
    assert len(layers._FOUND) == before
