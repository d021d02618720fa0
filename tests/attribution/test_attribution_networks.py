"""Networks of torchvision and timm, tiny: the default layer, maps that are right, and what transformers need."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.vgg import make_layers

import reference
from clearwing.attribution.layers import find_layer
from clearwing.attribution.methods import explain
from clearwing.attribution.trace import record
from clearwing.types import ClearwingError, Explanation, Status
from reference import small_images

METHODS = ["grad-cam", "layer-cam", "saliency"]
SWIN: dict[str, Any] = {"embed_dim": 12, "depths": [1, 2], "num_heads": [1, 2], "num_classes": 5}
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def vit() -> nn.Module:
    net = tv.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    nn.init.normal_(net.heads.head.weight)  # torchvision begins with zeros
    return net


def vgg() -> nn.Module:
    with torch.device("meta"):  # its own head is of a hundred million weights
        net = tv.VGG(nn.Identity(), init_weights=False)
    net.features = make_layers([8, "M", 16, "M", 16])
    net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(2), nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5))
    return net


EFFICIENT = [MBConvConfig(1, 3, 1, 8, 8, 1, 1.0, 1.0), MBConvConfig(4, 3, 2, 8, 16, 1, 1.0, 1.0)]
REGNET = BlockParams.from_init_params(depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25)
TORCHVISION: dict[str, tuple[Callable[[], nn.Module], int, str]] = {  # name: how to build it, pixels, default layer
    "vit": (vit, 32, "encoder.layers.encoder_layer_1.ln_1"),
    "swin": (lambda: tv.SwinTransformer([4, 4], window_size=[4, 4], **SWIN), 32, "permute"),
    "swin v2": (
        lambda: tv.SwinTransformer(
            [4, 4], window_size=[4, 4], block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2, **SWIN
        ),
        32,
        "permute",
    ),
    "maxvit": (lambda: tv.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 8, 0.0, num_classes=5), 32, "blocks.1"),
    "convnext": (
        lambda: tv.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5),
        32,
        "features",
    ),
    "densenet": (lambda: tv.DenseNet(4, (2, 2), 8, num_classes=5), 32, "features"),
    "vgg": (vgg, 32, "features"),
    "mobilenet v3": (lambda: tv.mobilenet_v3_small(num_classes=5), 64, "features"),
    "efficientnet": (lambda: tv.EfficientNet(EFFICIENT, 0.1, num_classes=5), 32, "features"),
    "regnet": (lambda: tv.RegNet(REGNET, num_classes=5), 64, "trunk_output"),
    "shufflenet": (lambda: tv.shufflenet_v2_x0_5(num_classes=5), 64, "conv5"),
    "googlenet": (lambda: tv.GoogLeNet(num_classes=5, init_weights=False), 64, "inception5b"),
    "inception": (lambda: tv.Inception3(num_classes=5, init_weights=False), 75, "Mixed_6e"),
}


def timm_networks() -> dict[str, tuple[Callable[[Any], nn.Module], int, str]]:
    def named(name: str, **more: Any) -> Callable[[Any], nn.Module]:
        return lambda timm: timm.create_model(name, **more)

    def gap(timm: Any, **more: Any) -> nn.Module:
        return timm.models.VisionTransformer(**VIT, global_pool="avg", **more)

    def efficient(timm: Any) -> nn.Module:
        blocks = timm.models._efficientnet_builder.decode_arch_def([["ds_r1_k3_s1_e1_c8"], ["ir_r1_k3_s2_e4_c16"]])
        return timm.models.EfficientNet(blocks, num_classes=5, num_features=16, stem_size=8)

    last = "blocks.1.norm1"
    stages: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16), "num_classes": 5}
    swin: dict[str, Any] = {"img_size": 32, "patch_size": 4, "window_size": 4, **SWIN}
    return {
        "vit": (named("vit_tiny_patch16_224", **VIT), 32, last),
        "deit distilled": (named("deit_tiny_distilled_patch16_224", **VIT), 32, last),
        "registers": (lambda timm: timm.models.VisionTransformer(**VIT, reg_tokens=4), 32, last),
        "normed queries": (lambda timm: timm.models.VisionTransformer(**VIT, qk_norm=True), 32, last),
        "mean of tokens": (gap, 32, "blocks"),
        "registers and mean": (lambda timm: gap(timm, reg_tokens=4, class_token=False), 32, "blocks"),
        "swin": (named("swin_tiny_patch4_window7_224", **swin), 32, "norm"),
        "swin v2": (named("swinv2_tiny_window8_256", **swin), 32, "norm"),
        "convnext": (named("convnext_atto", **stages), 64, "stages"),
        "efficientnet": (efficient, 32, "bn2"),
        "resnet": (named("resnet18", num_classes=5, channels=(8, 8, 8, 16)), 64, "layer4"),
        "mixer": (
            lambda timm: timm.models.MlpMixer(img_size=32, patch_size=8, embed_dim=16, num_blocks=2, num_classes=5),
            32,
            "norm",
        ),
    }


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """In float64 and evaluation mode, every value that starts at zero or nearly so moved away from it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build().eval().double()
        for parameter in net.parameters():
            if parameter.abs().max() < 1e-3:  # layer scales, heads and biases
                nn.init.normal_(parameter, std=0.5)
    return net.requires_grad_(False)


def check(net: nn.Module, images: Tensor, layer: str) -> None:
    """Maps at the default layer: there, the same one by one, and the same as without the cut."""
    assert find_layer(net, images) == layer
    found = explain(net, images, METHODS, target=1, relu=False)
    assert list(found) == [f"grad-cam@{layer}", f"layer-cam@{layer}", "saliency"]
    for e in found.values():
        assert (e.status == Status.OK).all()
        assert torch.allclose(e.logits, net(images), atol=1e-10)
    singles = [explain(net, images[n : n + 1], METHODS, target=1, relu=False) for n in range(len(images))]
    for key, e in found.items():
        alone = Explanation.cat([single[key] for single in singles]).maps
        assert torch.allclose(alone, e.maps, rtol=1e-7, atol=1e-12 * float(e.maps.abs().max()) + 1e-300), key
    cut, whole = (record(net, images, [layer], inputs) for inputs in (False, True))
    G, expected = (trace.gradients(trace.scores(1))[layer] for trace in (cut, whole))
    assert torch.allclose(cut.features[layer], whole.features[layer], atol=1e-10)
    assert (G - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert expected.abs().sum(1).amin((1, 2)).min() > 0  # every place matters
    assert cut.features[layer].shape[2] > 1


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    build, pixels, layer = TORCHVISION[name]
    check(built(build), small_images(2, size=pixels), layer)


@pytest.fixture(scope="module")
def timm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations in what it imports
        return pytest.importorskip("timm")


@pytest.mark.parametrize("name", timm_networks())
def test_timm(name: str, timm: Any) -> None:
    build, pixels, layer = timm_networks()[name]
    check(built(lambda: build(timm)), small_images(2, size=pixels), layer)


def test_grad_cam_of_torchvisions_vit_equals_the_reference_on_the_split_network() -> None:
    net, images = built(vit), small_images(2, size=32)
    last = net.encoder.layers[-1]
    with torch.no_grad():
        x = net.conv_proj(images).flatten(2).mT
        x = torch.cat((net.class_token.expand(2, -1, -1), x), 1) + net.encoder.pos_embedding
        x = net.encoder.layers[0](x)
        y = last.ln_1(x)
    y.requires_grad_()
    z = x + last.self_attention(y, y, y, need_weights=False)[0]
    z = z + last.mlp(last.ln_2(z))
    score = net.heads(net.encoder.ln(z)[:, 0])[:, 3].sum()
    G = torch.autograd.grad(score, y)[0]
    found = explain(net, images, target=3, relu=False)
    for n in range(2):
        grids = [torch.stack([t[n, 1 + 4 * i : 5 + 4 * i].T for i in range(4)], 1) for t in (y.detach(), G)]
        expected = reference.upsample(reference.grad_cam(*grids), 32, 32)
        assert torch.allclose(found.maps[n, 0], expected, atol=1e-12)
        assert expected.abs().max() > 1e-4


def test_attention_of_torchvision_and_timm(timm: Any) -> None:
    images = small_images(2, size=32)
    fused = built(lambda: timm.models.VisionTransformer(**VIT))
    spelled = built(lambda: timm.models.VisionTransformer(**VIT))
    for block in spelled.blocks:
        assert block.attn.fused_attn
        block.attn.fused_attn = False
    one, two = (record(net, images, attention=True) for net in (fused, spelled))
    assert list(one.attention) == list(two.attention) == ["(attention 0)", "(attention 1)"]
    for name, A in one.attention.items():
        assert A.shape == (2, 2, 17, 17)
        assert torch.allclose(A, two.attention[name], atol=1e-14)
        assert torch.allclose(one.gradients(one.scores(0))[name], two.gradients(two.scores(0))[name], atol=1e-14)
    net = built(vit)
    with torch.no_grad():
        x = net.conv_proj(images).flatten(2).mT
        x = torch.cat((net.class_token.expand(2, -1, -1), x), 1) + net.encoder.pos_embedding
        matrices = []
        for block in net.encoder.layers:
            y = block.ln_1(x)
            matrices.append(block.self_attention(y, y, y, average_attn_weights=False)[1])
            x = block(x)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            found = explain(net, images, ["attention-rollout", "gradient-attention"])
        for n in range(2):
            R = reference.attention_rollout([A[n] for A in matrices])
            expected = reference.upsample(R[0, 1:].reshape(4, 4), 32, 32)
            assert torch.allclose(found["attention-rollout"].maps[n, 0], expected, atol=1e-13)
        assert (found["gradient-attention"].status == Status.OK).all()


@pytest.mark.parametrize("name", ["swin", "maxvit", "convnext"])
def test_attention_in_windows_or_none_is_refused(name: str) -> None:
    build, pixels, _ = TORCHVISION[name]
    mend = "has no self-attention" if name == "convnext" else "needs global attention"
    with pytest.raises(ClearwingError, match=f"attention: .* {mend}"):
        explain(built(build), small_images(2, size=pixels), "attention-rollout")


def test_bfloat16_of_a_transformer() -> None:
    net, images = built(vit).float(), small_images(2, size=32).float()
    for method in ("grad-cam", "saliency", "attention-rollout", "gradient-attention"):
        exact, half = (explain(net, images, method, target=1, relu=False, precision=p) for p in (None, "bfloat16"))
        assert half.maps.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(exact.maps.flatten(), half.maps.flatten(), dim=0) > 0.97
