"""`clearwing export`: the ONNX file says what the network says, for any number of pictures, or is not written."""

import json
import shutil
import sys

import pytest
import torch
from torch.testing import assert_close

from clearwing import Run
from clearwing.jobs import export, inputs
from clearwing.models.decoder import Decoder, Segmenter
from clearwing.types import ClearwingError
from commands import failure, run

onnx = pytest.importorskip("onnx", reason="needs the extra clearwing[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra clearwing[onnx]")
pytest.importorskip("onnxscript", reason="needs the extra clearwing[onnx]")

GREY = """
import torch
import torch.nn.functional as F

class Grey(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Conv2d(1, 8, 3, 2, 1), torch.nn.Conv2d(8, 8, 3, 2, 1)
        self.fc = torch.nn.Linear(8, 1)

    def forward(self, x):
        x = F.relu(self.two(F.relu_(self.one(x))))
        return {"z": self.fc(x.mean((2, 3)).view(x.shape[0], -1))}

class Branching(Grey):
    def forward(self, x):
        return super().forward(x if x.sum() > 3 else -x)

def grey(kind=Grey):
    from clearwing import wrap
    torch.manual_seed(0)
    return wrap(kind(), mean=[0.4], std=[0.2], output="z")

def branching():
    return grey(Branching)
"""


@pytest.fixture(scope="module")
def with_decoder(tmp_path_factory, trained):
    """A copy of the run with an untrained decoder."""
    copy = shutil.copytree(trained, tmp_path_factory.mktemp("decoder") / "moths")
    held = Run.load(copy)
    torch.manual_seed(0)
    layers = ["layer1", "layer2", "layer3"]
    held.save_decoder(
        Segmenter(held.model, Decoder((5, 9, 10), width=8), layers, "fc"),
        {"weights_sha256": inputs.weights_hash(held), "rounds": [{}]},
    )
    return copy


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "grey.py"
    path.write_text(GREY)
    return path


def opened(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def shapes(nodes):
    return {node.name: (node.type, node.shape) for node in nodes}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_without_a_decoder(capsys, trained, tmp_path):
    out = tmp_path / "new" / "tiny.onnx"
    code, text, _ = run(capsys, "export", trained, "--out", out, "--json")
    assert code == 0, text
    assert files(out.parent) == ["tiny.onnx"]  # no second file with the weights, no temporary one
    held, result = Run.load(trained), json.loads(text)
    assert (result["bytes"], result["opset"], result["decoder"]) == (out.stat().st_size, 18, False)
    assert result["agreement"]["pictures"] == 10
    assert result["agreement"]["logits"] < 1e-4
    assert result["agreement"]["same_class"] == 1
    session = opened(out)
    assert shapes(session.get_inputs()) == {"images": ("tensor(float)", ["N", 3, 32, 32])}
    assert shapes(session.get_outputs()) == {"logits": ("tensor(float)", ["N", 3])}
    for count in (1, 7):
        images = torch.rand(count, 3, 32, 32)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(logits), held.model(images), rtol=1e-4, atol=1e-5)
    model = onnx.load(out)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["class_names"]) == list(held.class_names)
    assert (about["model"], about["input_size"], about["fit"]) == ("tiny", "32", "squash")
    assert about["clearwing"]
    assert "resize the whole picture to 32 x 32" in about["images"].lower()
    assert "softmax" in model.doc_string
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert "exists; use --overwrite or another name" in failure(capsys, "export", trained, "--out", out)
    disturbed = held.load_model()
    disturbed.mean.add_(0.3)
    with pytest.raises(ClearwingError, match="onnxruntime and torch differ: logits within") as raised:
        export.compare(out, export.Exported(disturbed), torch.rand(2, 3, 32, 32))
    assert raised.value.exit_code == 1


def test_a_run_with_a_decoder_gives_probabilities_of_foreground(capsys, with_decoder, tmp_path):
    out = tmp_path / "moths.onnx"
    out.write_text("an earlier file")
    code, text, err = run(capsys, "export", with_decoder, "--out", out, "--overwrite")
    assert code == 0, err
    lines = text.splitlines()
    assert lines[0].startswith(f"{out}: ")
    assert "their IoU at least" in lines[0]
    assert [line.partition(":")[0] for line in lines[1:]] == ["images", "logits", "masks"]
    assert "[torch.onnx]" not in text + err
    session = opened(out)
    assert shapes(session.get_outputs())["masks"] == ("tensor(float)", ["N", 32, 32])
    assert "at least 0.5" in session.get_modelmeta().custom_metadata_map["masks"]
    images = torch.rand(3, 3, 32, 32)
    logits, masks = map(torch.from_numpy, session.run(["logits", "masks"], {"images": images.numpy()}))
    with torch.no_grad():
        expected, mask_logits = Run.load(with_decoder).load_segmenter()(images)
    assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert_close(masks, mask_logits.sigmoid(), rtol=1e-4, atol=1e-5)
    assert 0 < masks.min() < masks.max() < 1
    loaded = inputs.open_model(str(with_decoder))
    assert export.with_decoder(loaded, "no") is loaded.model


def test_masks_of_tied_classes_are_not_compared(monkeypatch):
    images, tie = torch.rand(2, 3, 8, 8), export.TOLERANCE / 2
    true = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.rand(2, 8, 8)
    found = torch.tensor([[1.0, 0.0], [1.0, 1.0 + tie]]), true[1].clone()
    found[1][1] = 1 - found[1][1]  # the mask of the other class
    monkeypatch.setattr(export, "answers", lambda *_: iter([(found, true)]))
    agreement = export.compare("any.onnx", export.Exported(torch.nn.Identity()), images)
    assert (agreement.same_class, agreement.masks, agreement.mask_iou) == (0.5, 0, 1)
    found[0][1, 1] = 1.0  # no tie any more: both say class 0
    with pytest.raises(ClearwingError, match="onnxruntime and torch differ"):
        export.compare("any.onnx", export.Exported(torch.nn.Identity()), images)


def test_a_decoder_of_other_weights_is_left_out(capsys, with_decoder, tmp_path):
    copy = Run.load(shutil.copytree(with_decoder, tmp_path / "copy"))
    copy.model.mean.add_(0.01)
    copy.save_weights(copy.model.state_dict())
    code, text, err = run(capsys, "export", copy.path, "--out", tmp_path / "copy.onnx")
    assert code == 0, err
    assert "note: the decoder is left out, it is of other weights, or not whole" in " ".join(err.split())
    assert "masks" not in text
    refused = failure(capsys, "export", copy.path, "--out", tmp_path / "none.onnx", "--decoder", "yes")
    assert "has no decoder of its weights" in refused


def test_a_network_of_the_users_own(capsys, factory, tmp_path):
    out = tmp_path / "grey.onnx"
    options = ["--size", "24", "--classes", "moth,butterfly", "--fit", "pad", "--opset", "20", "--limit", "3", "--json"]
    code, text, _ = run(capsys, "export", f"{factory}:grey", "--out", out, *options)
    assert code == 0, text
    result = json.loads(text)
    assert (result["size"], result["fit"]) == (24, "pad")
    assert result["agreement"]["pictures"] == 3
    assert "float32 (N, 1, 24, 24), grey" in result["input"]
    assert onnx.load(out).opset_import[0].version == 20
    images, session = torch.rand(4, 1, 24, 24), opened(out)
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == ["moth", "butterfly"]
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert_close(torch.from_numpy(logits), inputs.open_model(f"{factory}:grey", size=24).model(images))


def test_a_file_that_says_something_else_is_not_kept(capsys, monkeypatch, factory, tmp_path):
    out = tmp_path / "grey.onnx"
    out.write_text("an earlier file")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    command = ["export", f"{factory}:grey", "--size", "24", "--out", out, "--overwrite"]
    code, text, err = run(capsys, *command)
    assert (code, text) == (1, "")
    assert err.splitlines()[-1].startswith("clearwing: export: onnxruntime and torch differ: ")
    assert out.read_text() == "an earlier file"
    assert not list(tmp_path.glob(".*.part"))


def test_a_network_that_torch_cannot_export(capsys, factory, tmp_path):
    command = ["export", f"{factory}:branching", "--size", "24", "--out", tmp_path / "grey.onnx", "--json"]
    code, text, _ = run(capsys, *command)
    assert code == 1
    error = json.loads(text)["error"]
    assert error["argument"] == "MODEL"
    assert error["value"].startswith("cannot be exported (")
    assert "branch on values" in error["mend"]
    assert files(tmp_path) == ["grey.py"]


def test_what_is_refused_before_any_work(capsys, monkeypatch, trained, factory, tmp_path):
    def refused(*options, model=trained, out=tmp_path / "none.onnx"):
        return failure(capsys, "export", model, "--out", out, *options)

    assert "needs MODEL, --out" in failure(capsys, "export")
    assert "has no decoder of its weights; clearwing segment RUN DATA --pipeline decoder" in refused("--decoder", "yes")
    assert "has no decoder" in refused("--decoder", "yes", "--size", "24", model=f"{factory}:grey")
    assert "--decoder: maybe; choose one of auto, yes, no" in refused("--decoder", "maybe")
    assert "--opset: 17; give 18 to 23" in refused("--opset", "17")
    assert "--limit: 0; give at least 1" in refused("--limit", "0")
    assert "give a file that ends in .onnx" in refused(out=tmp_path / "none.pt")
    (tmp_path / "folder.onnx").mkdir()
    assert "a folder is in the way" in refused("--overwrite", out=tmp_path / "folder.onnx")
    (tmp_path / "there.onnx").write_text("an earlier file")
    assert "exists; use --overwrite or another name" in refused(out=tmp_path / "there.onnx")
    monkeypatch.setattr(export, "LARGEST", 1000)
    assert "one ONNX file holds less than 2 GiB" in refused("--limit", "1")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "export: onnxscript is not installed; pip install 'clearwing[onnx]'" in refused()
    assert files(tmp_path) == ["folder.onnx", "grey.py", "there.onnx"]
