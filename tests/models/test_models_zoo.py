"""build, adopt and load_model: public weights against re-implementations of their networks, and the error lines.

The doubles of kuangliu's pytorch-cifar and akamaster's pytorch_resnet_cifar10 are written from those repositories'
behaviour: the same parameter names, functional ReLUs and pools.
"""

import sys
import types
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from clearwing.models.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier
from clearwing.models.resnet import ResNet, ResNet6n2
from clearwing.models.zoo import BLOCKS, NAMES, adopt, build, load_model, settings_of
from clearwing.types import ClearwingError

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with seeded weights and statistics none of which is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if value.ndim > 1:
            bound = (6 / value[0].numel()) ** 0.5
            value.copy_((torch.rand(value.shape, generator=generator) * 2 - 1) * bound)
        elif value.is_floating_point():
            middle = 0.0 if key.endswith(("bias", "mean")) else 1.0
            value.copy_(torch.rand(value.shape, generator=generator) * 0.4 - 0.2 + middle)
    return model.eval()


def same_logits(ours: nn.Module, theirs: nn.Module, images: torch.Tensor = IMAGES) -> bool:
    with torch.no_grad():
        expected = theirs(images)
        assert expected.abs().max() > 0.01
        return torch.allclose(ours(images), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ doubles


class Block(nn.Module):
    """The blocks of both repositories; `pad` is option A, which has no parameters; `wide` is a bottleneck's output."""

    def __init__(self, inside, width, stride, pad=False, wide=0):
        super().__init__()
        out, self.wide = wide or width, wide
        if wide:
            self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.conv3, self.bn3 = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        else:
            self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        self.pad = out // 4 if pad and (stride != 1 or inside != out) else 0
        if not pad and (stride != 1 or inside != out):
            self.shortcut = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.wide:
            out = self.bn3(self.conv3(F.relu(out)))
        if self.pad:
            return F.relu(out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad), "constant", 0))
        return F.relu(out + self.shortcut(x))


class Public(nn.Module):
    """kuangliu's network (four stages from 64, pool 4) or akamaster's (three stages from 16, pool everything)."""

    def __init__(self, blocks, classes, first, pad=False, expansion=0):
        super().__init__()
        self.stages = len(blocks)
        self.conv1, self.bn1 = nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first)
        inside = first
        for index, count in enumerate(blocks):
            width = first * 2**index
            layers = []
            for block in range(count):
                stride = 2 if index and not block else 1
                layers.append(Block(inside, width, stride, pad, width * expansion))
                inside = width * (expansion or 1)
            self.add_module(f"layer{index + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(inside, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        x = F.avg_pool2d(x, 4 if self.stages == 4 else x.shape[3])
        return self.linear(x.view(len(x), -1))


@pytest.fixture(scope="module")
def akamaster() -> nn.Module:
    return trained(Public((1, 1, 1), 10, 16, pad=True))


# -------------------------------------------------------------------------------------------------------------- build


@pytest.mark.parametrize("name", NAMES)
def test_build_gives_the_depth_in_the_name(name):
    with torch.device("meta"):
        model = build(name, 10)
    weighted = [
        m for key, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and "downsample" not in key
    ]
    assert f"resnet{len(weighted)}" == name
    assert model.num_classes == 10
    assert model.training


def test_build_passes_settings_on():
    names = [f"c{i}" for i in range(4)]
    model = build(
        "resnet8", 4, in_channels=1, mean=(0.5,), std=(0.2,), class_names=names, input_size=8, widths=(4, 6, 8),
        shortcut="pad", downsample="conv",
    )  # fmt: skip
    assert model(IMAGES[:, :1]).shape == (2, 4)
    assert model.class_names == tuple(names)
    assert (model.input_size, model.in_channels, model.mean.item()) == (8, 1, 0.5)
    assert "backbone.down2.0.weight" in model.state_dict()
    with torch.device("meta"):
        assert build("resnet18", 3, stem="imagenet").backbone.conv1.kernel_size == (7, 7)


@pytest.mark.parametrize(
    ("call", "argument", "mend"),
    [
        (("resnet19", 10, {}), "model", "did you mean"),
        (("vgg", 10, {}), "model", "resnet8"),
        (("resnet8", 1, {}), "num_classes", "at least 2"),
        (("resnet8", 3, {"stem": "imagenet"}), "stem", "leave it out"),
        (("resnet18", 3, {"stem": "imagnet"}), "stem", "did you mean imagenet?"),
        (("resnet8", 3, {"width": (1, 2, 3)}), "width", "did you mean widths?"),
        (("resnet18", 3, {"widths": (1, 2, 3)}), "widths", "no such setting"),
        (("resnet8", 3, {"mean": (0.5,)}), "mean", "3 values"),
        (("resnet8", 3, {"class_names": ("a",)}), "class_names", "3 classes"),
        (("resnet8", 3, {"weights": "imagenet"}), "weights", "resnet18, 34, 50 and 101"),
        (("resnet18", 3, {"weights": "imagenet", "stem": "cifar"}), "weights", 'stem="imagenet"'),
        (("resnet18", 3, {"weights": "imagenet", "in_channels": 1}), "weights", "3 channels"),
        (("resnet8", 3, {"weights": "no.pt"}), "weights", "no such file"),
    ],
)
def test_build_refuses(call, argument, mend):
    name, classes, settings = call
    with torch.device("meta"), pytest.raises(ClearwingError) as error:
        build(name, classes, **settings)
    assert error.value.argument == argument
    assert mend in error.value.mend


def test_build_with_imagenet_weights_and_a_new_head(monkeypatch):
    theirs = trained(torchvision.models.resnet18())
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *a, **k: {**theirs.state_dict()}
    )  # what would be downloaded
    model = build("resnet18", 3, weights="imagenet")
    state = model.backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items() if key[:2] != "fc")
    assert model.backbone.fc.weight.shape == (3, 512)
    assert model.training
    assert model.input_size == 224
    assert torch.allclose(model.mean.flatten(), torch.tensor(IMAGENET_MEAN))
    assert torch.allclose(model.std.flatten(), torch.tensor(IMAGENET_STD))


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("invalid hash value"), OSError("disk full")])
def test_no_network_is_one_line(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ClearwingError, match=r"could not be downloaded .*resnet18-f37072fd\.pth") as found:
        build("resnet18", 3, weights="imagenet")
    assert "\n" not in str(found.value)
    with torch.device("meta"), pytest.raises(ClearwingError, match=r"take torchvision:resnet34:random"):
        load_model("torchvision:resnet34")


def test_build_from_a_file_reads_its_settings(tmp_path, akamaster):
    path = tmp_path / "akamaster.th"
    torch.save({"state_dict": akamaster.state_dict(), "best_prec1": 91.7}, path)
    model = build("resnet8", 10, weights=path)  # widths 16, 32, 64 and option A are read off the file
    assert model.training
    assert same_logits(model.eval(), akamaster)
    fresh = build("resnet8", 4, weights=path, new_head=True)
    assert fresh.backbone.fc.weight.shape == (4, 64)
    assert torch.equal(fresh.backbone.layer3[0].conv2.weight, akamaster.layer3[0].conv2.weight)
    again = build("resnet8", 10, weights=path, new_head=True)
    assert not torch.equal(again.backbone.fc.weight, akamaster.linear.weight)


def test_build_refuses_a_file_that_does_not_fit(akamaster):
    state = akamaster.state_dict()
    with pytest.raises(ClearwingError, match=r"num_classes: 4, but .* has 10 classes; .*new_head=True"):
        build("resnet8", 4, weights=state)
    with pytest.raises(ClearwingError, match=r"does not fit resnet14; missing \(30\): layer1\.1\.conv1\.weight, "):
        build("resnet14", 10, weights=state)
    with pytest.raises(ClearwingError, match=r"of another shape \(.*\): conv1\.weight \(16, 3, 3, 3\), not \(8, "):
        build("resnet8", 10, weights=state, widths=(8, 32, 64))
    with torch.device("meta"), pytest.raises(ClearwingError, match="does not fit resnet18; missing"):
        build("resnet18", 10, weights=state)


# -------------------------------------------------------------------------------------------------------------- adopt


def test_adopt_akamaster_as_the_file_is_published(tmp_path, akamaster):
    path = tmp_path / "resnet8.th"
    state = {f"module.{key}": value for key, value in akamaster.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": torch.tensor(91.7)}, path)
    model = adopt(path, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), class_names=list("abcdefghij"))
    normal = (IMAGES - torch.tensor((0.4, 0.5, 0.6)).view(3, 1, 1)) / torch.tensor((0.2, 0.2, 0.3)).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), akamaster(normal), atol=1e-5)
    assert not any(layer.training for layer in model.modules())
    assert isinstance(model.backbone, ResNet6n2)
    assert same_logits(adopt(str(path)), akamaster)


@pytest.mark.parametrize(("blocks", "expansion", "kind"), [((2, 1, 1, 1), 0, ResNet), ((1, 2, 1, 1), 4, ResNet)])
def test_adopt_kuangliu(blocks, expansion, kind):
    theirs = trained(Public(blocks, 10, 64, expansion=expansion))
    model = adopt({"net": theirs.state_dict(), "acc": 95.0, "epoch": 3})
    assert isinstance(model.backbone, kind)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))  # its pool is of 4 pixels
    assert same_logits(model, theirs, images)


@pytest.mark.parametrize(
    ("block", "settings"),
    [
        ("BasicBlock", {}),
        ("Bottleneck", {}),
        ("Bottleneck", {"groups": 4, "width_per_group": 8}),
        ("Bottleneck", {"width_per_group": 96}),
    ],
)
def test_adopt_torchvision(block, settings):
    kind = getattr(torchvision.models.resnet, block)
    theirs = trained(torchvision.models.ResNet(kind, [1, 2, 1, 1], num_classes=5, **settings))
    assert same_logits(adopt(theirs.state_dict()), theirs, torch.rand(2, 3, 40, 40))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ResNet6n2(1, 5, widths=(4, 6, 8)),
        lambda: ResNet6n2(2, 5, widths=(4, 6, 8), shortcut="pad", in_channels=3),
        lambda: ResNet6n2(1, 5, widths=(4, 6, 8), downsample="conv"),
        lambda: ResNet((1, 1, 1, 1), 5),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_adopt_ours(tmp_path, make, suffix):
    theirs, path = trained(make()), tmp_path / f"net{suffix}"
    (torch.save if suffix == ".pt" else save_file)(theirs.state_dict(), path)
    assert same_logits(adopt(path), theirs)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_state_dict_says_which_network_it_is_of(name):
    with torch.device("meta"):
        state = torchvision.models.get_model(name, weights=None).state_dict()
    found = settings_of(state)
    assert (found["name"], found["stem"], found["num_classes"]) == (name, "imagenet", 1000)
    with torch.device("meta"):
        wide = torchvision.models.wide_resnet50_2().state_dict()
    with pytest.raises(ClearwingError, match="train takes"):
        settings_of(wide)


def test_adopt_takes_other_channels_and_one_logit():
    for net in (
        ResNet6n2(1, 1, widths=(4, 6, 8), in_channels=1),
        torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=1),
    ):
        if not isinstance(net, ResNet6n2):
            net.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        trained(net)
        model = adopt(net.state_dict(), class_names=("no", "yes"), num_classes=2)
        with torch.no_grad():
            z = net(IMAGES[:, :1]).flatten()
            assert torch.allclose(model(IMAGES[:, :1]).softmax(1)[:, 1], z.sigmoid(), atol=1e-6)


def test_adopt_a_classifier_with_its_mean_and_std():
    theirs = build("resnet8", 4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), widths=(4, 6, 8)).eval()
    trained(theirs.backbone)
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    checkpoint = {"model_state_dict": state, "class_names": list("abcd"), "epoch": 7, "val_acc": 0.9}
    model = adopt(checkpoint)
    assert same_logits(model, theirs)
    assert model.class_names == ("a", "b", "c", "d")
    given = adopt(checkpoint, mean=(0, 0, 0), std=(1, 1, 1), class_names=list("wxyz"))
    assert same_logits(given, theirs.backbone)
    assert given.class_names == ("w", "x", "y", "z")


@pytest.mark.parametrize("key", ["state_dict", "net", "model", "model_state_dict", "model_state"])
def test_adopt_opens_the_dicts_of_checkpoints(akamaster, key):
    assert same_logits(adopt({key: akamaster.state_dict(), "epoch": 1}), akamaster)


def test_adopt_takes_files_without_batch_counts(akamaster):
    state = {key: value for key, value in akamaster.state_dict().items() if "num_batches" not in key}
    assert same_logits(adopt(state), akamaster)


def test_adopt_leaves_the_generator_and_the_state_dict_alone(akamaster):
    before, state = torch.get_rng_state(), akamaster.state_dict()
    model = adopt(state)
    assert torch.equal(torch.get_rng_state(), before)
    model.backbone.conv1.weight.data.zero_()
    assert state["conv1.weight"].abs().max() > 0


def test_adopt_refuses_with_the_names(akamaster):
    state = akamaster.state_dict()
    less = {key: value for key, value in state.items() if not key.startswith(("bn1.", "layer2.0.conv1"))}
    with pytest.raises(ClearwingError, match=r"missing \(1\): bn1\.weight"):
        adopt(less)
    less["bn1.weight"] = state["bn1.weight"]
    with pytest.raises(
        ClearwingError, match=r"missing \(4\): bn1\.bias, bn1\.running_mean, bn1\.running_var \.\.\.; of ano"
    ):
        adopt(less)
    with pytest.raises(ClearwingError, match=r"left over \(1\): layer1\.0\.se\.weight$"):
        adopt({**state, "layer1.0.se.weight": torch.zeros(3)})
    with pytest.raises(ClearwingError, match=r"of another shape \(1\): layer3\.0\.bn2\.bias \(3,\), not \(64,\)$"):
        adopt({**state, "layer3.0.bn2.bias": torch.zeros(3)})
    with pytest.raises(
        ClearwingError, match=r"missing \(4\).*; left over \(2\): features\.0\.weight, features\.0\.bias"
    ):
        adopt(nn.ModuleDict({"features": nn.Sequential(nn.Linear(2, 2))}).state_dict())
    with pytest.raises(ClearwingError, match=r"missing \(1\): fc\.weight; left over \(2\): fc\.1\.weight, fc\.1\.bias"):
        adopt({key.replace("linear", "fc.1"): value for key, value in state.items()})
    with pytest.raises(ClearwingError, match=r"missing \(\d+\): conv1\.weight"):
        adopt({})


def test_adopt_names_the_wrong_number_of_classes(akamaster):
    with pytest.raises(ClearwingError, match="num_classes: 100; the state dict has 10 classes"):
        adopt(akamaster.state_dict(), num_classes=100)
    with pytest.raises(ClearwingError, match="class_names: 2 names; the network has 10 classes"):
        adopt(akamaster.state_dict(), class_names=("a", "b"))


def test_adopt_refuses_what_is_no_weights_file(tmp_path, akamaster):
    path = tmp_path / "x.pt"
    for content in (b"", b"words, not weights", b"PK\x03\x04broken", b"\x80\x02."):
        path.write_bytes(content)
        with pytest.raises(ClearwingError, match=r"weights: .*x\.pt; ") as error:
            adopt(path)
        assert "\n" not in str(error.value)
    torch.save(akamaster, path)
    with pytest.raises(ClearwingError, match=r"save model\.state_dict\(\)"):
        adopt(path)
    torch.save([1, 2], path)
    with pytest.raises(ClearwingError, match="holds a list"):
        adopt(path)
    with pytest.raises(ClearwingError, match="goes to wrap"):
        adopt(akamaster)
    with pytest.raises(ClearwingError, match="no such file"):
        adopt(tmp_path)
    broken = tmp_path / "x.safetensors"
    broken.write_bytes(b"broken")
    with pytest.raises(ClearwingError, match="no weights file"):
        adopt(broken)


# --------------------------------------------------------------------------------------------------------- load_model


def test_load_torchvision_random_is_seeded_and_named():
    before = torch.get_rng_state()
    model, again, other = (load_model("torchvision:squeezenet1_1:random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weight = "backbone.features.0.weight"
    assert torch.equal(model.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(model.state_dict()[weight], other.state_dict()[weight])
    assert model.class_names[:2] == ("tench", "goldfish")
    assert len(model.class_names) == 1000
    assert model.input_size == 224
    assert torch.allclose(model.std.flatten(), torch.tensor(IMAGENET_STD))
    assert not model.training
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


def test_load_torchvision_with_weights(monkeypatch):
    state = trained(torchvision.models.squeezenet1_1()).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: dict(state))
    model = load_model("torchvision:squeezenet1_1", input_size=64)
    assert torch.equal(model.backbone.classifier[1].weight, state["classifier.1.weight"])
    assert model.input_size == 64


def test_load_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ClearwingError, match=r"clearwing\[bench\]"):
        load_model("timm:resnet10t")

    def create_model(name, pretrained):
        if pretrained:
            raise OSError("no network")
        return ResNet6n2(1, 3, widths=(4, 6, 8))

    preset = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 32, 32)}
    fake = types.SimpleNamespace(
        is_model=lambda name: name == "resnet10t",
        list_models=lambda: ["resnet10t", "vit"],
        create_model=create_model,
        data=types.SimpleNamespace(resolve_model_data_config=lambda net: preset),
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    model = load_model("timm:resnet10t:random")
    assert model.input_size == 32
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(ClearwingError, match=r"no network.*timm:resnet10t:random"):
        load_model("timm:resnet10t")
    with pytest.raises(ClearwingError, match=r"did you mean resnet10t\?"):
        load_model("timm:resnet10")


def test_load_a_weights_file(tmp_path, akamaster):
    path = tmp_path / "a.th"
    torch.save(akamaster.state_dict(), path)
    model = load_model(path, input_size=32, class_names=list("abcdefghij"))
    assert same_logits(model, akamaster)
    assert (model.input_size, model.class_names[0]) == (32, "a")


FACTORY = """
from torch import nn
from clearwing_test_sibling import WIDTH
from clearwing.models.classifier import Classifier
def plain():
    return nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def ours():
    return Classifier(plain(), mean=(0.5, 0.5, 0.5), class_names=("a", "b"))
def number():
    return 7
"""


def test_load_a_factory(tmp_path):
    (tmp_path / "clearwing_test_sibling.py").write_text("WIDTH = 2")
    file = tmp_path / "net.py"
    file.write_text(FACTORY)
    path = list(sys.path)
    model = load_model(f"{file}:plain", class_names=("x", "y"))
    assert isinstance(model, Classifier)
    assert not model.training
    assert model(IMAGES).shape == (2, 2)
    kept = load_model(f"{file}:ours")
    assert (kept.class_names, kept.mean.flatten().tolist()) == (("a", "b"), [0.5] * 3)
    for name, line in (("plane", "did you mean plain"), ("number", "returned int"), ("", "no such function")):
        with pytest.raises(ClearwingError, match=line):
            load_model(f"{file}:{name}")
    file.write_text("import no_such_module_of_clearwing")
    with pytest.raises(ClearwingError, match="No module named"):
        load_model(f"{file}:plain")
    file.write_text("def f(:")
    with pytest.raises(ClearwingError, match="could not be run"):
        load_model(f"{file}:plain")
    assert sys.path == path


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("torchvision:resnet180", "did you mean resnet18"),
        ("torchvision:fcn_resnet50", "did you mean"),
        ("resnet18", r"did you mean torchvision:resnet18\?"),
        ("no/such.pt", r"no such file or model; give .*timm:NAME"),
        ("no/such.py:net", "no such file"),
        ("net.py", "no such file or model"),
    ],
)
def test_load_refuses(spec, line):
    with pytest.raises(ClearwingError, match=line) as error:
        load_model(spec)
    assert error.value.argument == "model"
