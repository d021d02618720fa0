"""The residual family: depth, counts, names, shortcuts, initialisation; and the layer summary."""

import pytest
import torch
import torchvision
from torch import nn

from clearwing.models.classifier import Classifier
from clearwing.models.resnet import BasicBlock, PadShortcut, ResNet, ResNet6n2, summary
from clearwing.models.zoo import BLOCKS, build
from clearwing.types import ClearwingError


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def weighted_layers(model: nn.Module) -> int:
    """The layers that He et al. count: 3x3 convolutions and the linear one."""
    return sum(
        isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)) for m in model.modules()
    )


def shuffle_batch_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics as after training, so that no batch norm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def test_cifar_resnet18_has_the_known_number_of_parameters():
    with torch.device("meta"):
        assert count(ResNet((2, 2, 2, 2), 10)) == 11_173_962


@pytest.mark.parametrize(("n", "parameters"), [(3, 269_722), (9, 853_018), (18, 1_727_962)])
def test_the_networks_of_the_paper(n, parameters):
    """He et al. table 6: 0.27 M, 0.85 M and 1.7 M parameters for 20, 56 and 110 layers."""
    with torch.device("meta"):
        net = ResNet6n2(n, 10, widths=(16, 32, 64), shortcut="pad")
    assert count(net) == parameters
    assert weighted_layers(net) == 6 * n + 2
    assert all(m.kernel_size == (3, 3) for m in net.modules() if isinstance(m, nn.Conv2d))


def test_defaults_are_the_issues():
    net = ResNet6n2(2, 100)
    assert [net.layer1[0].conv1.out_channels, net.layer2[0].conv1.out_channels, net.fc.in_features] == [32, 64, 128]
    assert net.layer2[0].conv1.stride == net.layer3[0].conv1.stride == (2, 2)
    assert net.layer1[0].downsample is None
    assert isinstance(net.layer2[0].downsample[1], nn.BatchNorm2d)
    assert weighted_layers(net) == 14
    assert {m.padding_mode for m in net.modules() if isinstance(m, nn.Conv2d)} == {"zeros"}


def test_separate_downsampling_leaves_three_convolutions_outside_the_blocks():
    net = ResNet6n2(2, 10, widths=(4, 6, 8), downsample="conv")
    inside = {id(m) for block in net.modules() if isinstance(block, BasicBlock) for m in block.modules()}
    outside = [m for m in net.modules() if isinstance(m, nn.Conv2d) and id(m) not in inside]
    assert [m.stride[0] for m in outside] == [1, 2, 2]
    assert weighted_layers(net) == 6 * 2 + 4
    assert all(block.downsample is None for block in net.modules() if isinstance(block, BasicBlock))


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@pytest.mark.parametrize("downsample", ["block", "conv"])
@pytest.mark.parametrize("size", [8, 9])
def test_every_option_runs_and_halves_twice(shortcut, downsample, size):
    net = ResNet6n2(1, 5, widths=(4, 6, 9), shortcut=shortcut, downsample=downsample, in_channels=1)
    images = torch.rand(2, 1, size, size)
    x = net.layer2(net.down2(net.layer1(net.conv1(images))))
    assert x.shape[2:] == (-(-size // 2),) * 2
    assert net.layer3(net.down3(x)).shape == (2, 9, -(-size // 4), -(-size // 4))
    assert net(images).shape == (2, 5)


def test_pad_shortcut_against_loops():
    x = torch.randn(2, 3, 5, 4)
    expected = torch.zeros(2, 8, 3, 2)
    for channel in range(3):
        for row in range(3):
            for column in range(2):
                expected[:, channel + 2, row, column] = x[:, channel, 2 * row, 2 * column]  # 2 before, 3 behind
    assert torch.equal(PadShortcut(3, 8, 2)(x), expected)


def test_blocks_against_the_equations():
    """y = relu(F(x) + W x), F = bn2(conv2(relu(bn1(conv1 x)))); and relu(shortcut) when F starts at zero."""
    block = shuffle_batch_norms(BasicBlock(4, 6, stride=2)).eval()
    x = torch.randn(2, 4, 8, 8)
    residual = block.bn2(block.conv2(block.bn1(block.conv1(x)).clamp(min=0)))
    assert torch.allclose(block(x), (residual + block.downsample(x)).clamp(min=0), atol=1e-6)
    net = ResNet6n2(1, 3, widths=(4, 6, 8), residual="zero")
    images = torch.randn(2, 4, 8, 8)
    assert torch.equal(net.layer1(images), images.clamp(min=0))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_imagenet_stem_has_torchvisions_names(name):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
        ours = build(name, 1000, stem="imagenet").backbone.state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [(key, value.shape) for key, value in theirs.items()]


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_the_imagenet_stem_has_torchvisions_logits(block):
    kind = getattr(torchvision.models.resnet, block)
    theirs = shuffle_batch_norms(torchvision.models.ResNet(kind, [2, 1, 2, 1], num_classes=7)).eval()
    ours = ResNet((2, 1, 2, 1), 7, stem="imagenet", bottleneck=block == "Bottleneck").eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize(("residual", "changed"), [("zero", {"bn3.weight"}), ("dirac", {"conv2.weight"})])
def test_how_bottlenecks_begin(residual, changed):
    def made(residual):
        torch.manual_seed(3)
        return ResNet((1, 2, 1, 1), 3, bottleneck=True, residual=residual).layer2[1].state_dict()

    he, other = made("he"), made(residual)
    assert {key for key, value in other.items() if not torch.equal(value, he[key])} == changed
    if residual == "zero":
        assert not other["bn3.weight"].any()
    else:
        x = torch.randn(1, 128, 5, 5)
        assert torch.equal(torch.nn.functional.conv2d(x, other["conv2.weight"], padding=1), x)


def test_initialisation_is_he_fan_out_and_seeded():
    torch.manual_seed(3)
    net = ResNet6n2(1, 10)
    torch.manual_seed(3)
    again = ResNet6n2(1, 10)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    weight = net.layer3[0].conv1.weight  # (128, 64, 3, 3): fan out 128 * 9
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert torch.equal(net.bn1.weight, torch.ones(32))


@pytest.mark.parametrize("residual", ["he", "zero", "dirac"])
def test_how_residual_branches_begin(residual):
    """The random numbers are the same; "zero" silences the last norm, "dirac" passes the input channels on."""
    torch.manual_seed(3)
    he = ResNet6n2(1, 3, widths=(4, 6, 8))
    torch.manual_seed(3)
    net = ResNet6n2(1, 3, widths=(4, 6, 8), residual=residual)
    names = {"he": set(), "zero": {"bn2.weight"}, "dirac": {"conv1.weight", "conv2.weight"}}[residual]
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, he.state_dict()[key])}
    assert changed == {f"layer{i}.0.{name}" for i in (1, 2, 3) for name in names}
    block, x = net.layer2[0], torch.randn(2, 4, 8, 8)
    if residual == "zero":
        assert block.bn2.weight.abs().max() == 0
    if residual == "dirac":
        y = block.conv1(x)
        assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
        assert torch.equal(y[:, 4:], he.layer2[0].conv1(x)[:, 4:])
        assert torch.equal(block.conv2(y), y)
        assert torch.equal(block.bn2.weight, torch.ones(6))
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"n": 0}, "n"),
        ({"residual": "none"}, "residual"),
        ({"num_classes": 0}, "num_classes"),
        ({"in_channels": 0}, "in_channels"),
        ({"widths": (8, 8)}, "widths"),
        ({"widths": (8, 0, 8)}, "widths"),
        ({"widths": (8, 4, 8), "shortcut": "pad"}, "widths"),
        ({"shortcut": "project"}, "shortcut"),
        ({"downsample": "pool"}, "downsample"),
    ],
)
def test_settings_out_of_range_are_refused(settings, argument):
    with pytest.raises(ClearwingError) as error:
        ResNet6n2(**{"n": 1, "num_classes": 3, **settings})
    assert error.value.argument == argument


def test_resnet_settings_out_of_range_are_refused():
    with pytest.raises(ClearwingError, match="did you mean imagenet"):
        ResNet((1, 1, 1, 1), 3, stem="image-net")
    with pytest.raises(ClearwingError, match="blocks"):
        ResNet((2, 2, 2), 3)


# ----------------------------------------------------------------------------------------------------------- summary


class Tiny(nn.Module):
    """Grouped and transposed convolutions, a layer called twice, dropout, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 2, 2, stride=2)
        self.twice = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        x = self.drop(self.up(self.norm(self.conv(x))))
        return self.twice(self.twice(x)).mean((2, 3))


def test_summary_counts_by_hand():
    found = summary(Tiny(), (4, 8, 8))
    rows = {row.name: row for row in found.rows}
    assert [row.name for row in found.rows] == ["conv", "norm", "up", "drop", "twice", "twice", ""]
    assert rows["conv"].output == (6, 4, 4)
    assert rows["conv"].parameters == 6 * 2 * 9 + 6
    assert rows["conv"].multiply_adds == 6 * 4 * 4 * 2 * 9
    assert rows["conv"].memory == 6 * 4 * 4 * 4
    assert rows["norm"].multiply_adds == 0
    assert rows["up"].multiply_adds == 6 * 4 * 4 * 2 * 2 * 2
    assert [row.parameters for row in found.rows if row.name == "twice"] == [72, 0]
    assert [row.multiply_adds for row in found.rows if row.name == "twice"] == [2 * 8 * 8 * 8] * 2
    assert found.parameters == sum(row.parameters for row in found.rows) == count(Tiny())
    assert found.trainable == found.parameters - 3
    assert found.multiply_adds == sum(row.multiply_adds for row in found.rows)


def test_summary_agrees_with_torchvisions_own_figure():
    figure = torchvision.models.ResNet18_Weights.DEFAULT.meta["_ops"]  # 1e9 multiply-adds at 224 pixels
    with torch.device("meta"):  # shapes alone
        model = ResNet((2, 2, 2, 2), 1000, stem="imagenet")
    assert summary(model, 224).multiply_adds / 1e9 == pytest.approx(figure, abs=0.001)


def test_summary_table_names_layers_as_users_do():
    model = Classifier(ResNet6n2(1, 10), input_size=8)
    table = str(summary(model))
    assert "layer3.0.conv2" in table
    assert "backbone" not in table
    assert table.splitlines()[-1].split() == ["total", "3", "x", "8", "x", "8", "308,650", *table.split()[-2:]]


def test_summary_leaves_everything_as_it_was():
    model = Tiny().train()
    model.norm.eval()
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    summary(model, (4, 8, 8))
    with pytest.raises(RuntimeError):
        summary(model, (3, 8, 8))  # three channels where four are taken
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.drop.training
    assert not model.norm.training
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())
    assert not any(layer._forward_hooks for layer in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_summary_wants_a_size():
    with pytest.raises(ClearwingError, match="input_size"):
        summary(Tiny())


@pytest.mark.parametrize("channels", [8, 16])
@pytest.mark.parametrize("size", [7, 8])
def test_the_projection_is_a_strided_1x1_convolution(channels, size):
    from clearwing.models.resnet import Projection

    torch.manual_seed(0)
    ours, usual = Projection(channels, 5, 2), torch.nn.Conv2d(channels, 5, 1, 2, bias=False)
    usual.load_state_dict(ours.state_dict())
    images = torch.rand(2, channels, size, size)
    torch.testing.assert_close(ours(images), usual(images), rtol=1e-5, atol=1e-6)


def test_narrow_networks_learn_without_breaking_the_process():
    import subprocess
    import sys

    code = (  # the kernel that writes out of bounds is noticed when the process ends
        "import torch, clearwing as cw\n"
        "net = cw.ResNet6n2(1, 3, widths=(4, 8, 8)).to(memory_format=torch.channels_last)\n"
        "for n in (6, 5, 12):\n"
        "    net(torch.rand(n, 3, 32, 32).to(memory_format=torch.channels_last)).sum().backward()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
