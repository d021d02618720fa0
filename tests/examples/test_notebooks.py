"""The notebooks run from top to bottom on a few pictures, define nothing, and hold no outputs."""

import ast
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import clearwing as cw

FOLDER = Path(__file__).parents[2] / "notebooks"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def executed(name, folder, monkeypatch, **settings):
    """The notebook after a run in `folder`; an error in a cell raises."""
    for key, value in {"MODEL": "resnet8", "EPOCHS": 1, "OUT": folder / "run", **settings}.items():
        monkeypatch.setenv(f"CLEARWING_NOTEBOOK_{key}", str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))  # no profile or history in the user's home
    notebook = read(name)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def printed(notebook):
    return "".join(
        output.text
        for cell in code(notebook)
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


def shown(notebook):
    """How many pictures the notebook displays."""
    return sum("image/png" in output.get("data", ()) for cell in code(notebook) for output in cell.outputs)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_defines_nothing_and_is_stripped(path):
    notebook = read(path.stem)
    for cell in code(notebook):
        assert not cell.outputs
        assert cell.execution_count is None
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, DEFINITIONS)]
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert "clearwing" in json.dumps([cell.source for cell in code(notebook)])


def test_cifar10_from_the_pictures_to_the_mistakes(tmp_path, monkeypatch, parquet):
    notebook = executed("cifar10", tmp_path, monkeypatch, DATA=parquet)
    text = printed(notebook)
    assert "{'train': 9, 'val': 3, 'test': 6}" in text
    assert "test: accuracy " in text
    assert "grad-cam@layer3          maps (4, 1, 32, 32)" in text
    assert shown(notebook) == 7
    assert (tmp_path / "run" / "report.html").is_file()
    assert cw.Run.load(tmp_path / "run").config["train"]["cutout"] == 16


def test_fine_tuning_from_named_files_to_masks(tmp_path, monkeypatch, checkpoint):
    monkeypatch.delenv("CLEARWING_NOTEBOOK_DATA", raising=False)  # so it draws its own
    settings = {"WEIGHTS": checkpoint / "resnet_model.pth", "SIZE": 32, "DRAWN": 40}
    notebook = executed("fine_tuning", tmp_path, monkeypatch, **settings)
    text = printed(notebook)
    assert "{'train': 20, 'val': 10, 'test': 10}" in text
    assert "test: accuracy " in text
    assert "centre-gaussian" in text
    assert shown(notebook) == 5
    run = cw.Run.load(tmp_path / "run")
    dataset = cw.open_data(run.config["data"]["where"], val_fraction=0.15, test_fraction=0.15)
    masks = sorted((run.path / "masks").glob("*.png"))
    assert [path.stem for path in masks] == [Path(sample.key).stem for sample in dataset.split("test")]
    assert all(cw.read_mask(path).shape == (32, 32) for path in masks)
    assert cw.adopt(run.path / "checkpoint.pth").class_names == run.class_names
    assert (run.path / "report.html").is_file()


def test_grad_cam_from_the_formula_to_the_library(tmp_path, monkeypatch, photos):
    notebook = executed("grad_cam", tmp_path, monkeypatch, DATA=photos, SIZE=32)
    text = printed(notebook)
    assert "A is (6, 128, 8, 8), y is (6, 3), Z = 64" in text
    assert text.count("species_") >= 6  # the account of the six logits
    assert shown(notebook) == 7
    assert cw.Run.load(tmp_path / "run").config["train"]["padding"] == 8


@pytest.mark.parametrize(
    ("name", "line", "pictures"),
    [
        ("layers_and_parameters", "128 steps   gained", 9),
        ("guided_backpropagation", "guided     by hand and by the library", 4),
        ("guided_grad_cam", "without the tenth of guided-grad-cam", 3),
    ],
)
def test_a_notebook_on_methods_checks_its_formulas(name, line, pictures, tmp_path, monkeypatch, photos, trained):
    shutil.copytree(trained, tmp_path / "run")  # what is there is not trained again
    notebook = executed(name, tmp_path, monkeypatch, DATA=photos, PASSES=32)
    assert line in printed(notebook)
    assert shown(notebook) == pictures
