"""What the tests of the scripts and of the notebooks share: the scripts, and tiny data in the layouts they read."""

import importlib.util
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def script():
    """Gives the `main` of a script in examples/ by its name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main

    return load


@pytest.fixture(scope="session")
def checkpoint(script, tmp_path_factory, photos):
    """What train.py makes of the photographs in one epoch."""
    folder = tmp_path_factory.mktemp("checkpoint") / "CKPT"
    assert script("train")([str(photos), str(folder), "--model", "resnet8", "--epochs", "1", "--size", "32"]) == 0
    return folder


@pytest.fixture(scope="session")
def flat(tmp_path_factory, drawn):
    """The drawn pictures as {class}_{id}.jpg, upright."""
    folder = tmp_path_factory.mktemp("flat")
    for i, (image, label) in enumerate(zip(drawn[0], drawn[1], strict=True)):
        Image.fromarray(image).resize((40, 50)).save(folder / f"species_{label}_{i:03}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def parquet(tmp_path_factory, drawn):
    """Twelve pictures to train and six to test, in the schema of a Hugging Face data set."""
    folder = tmp_path_factory.mktemp("parquet")
    features = {
        "img": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["species_0", "species_1", "species_2"]},
    }
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, part in (("train", slice(0, 12)), ("test", slice(12, 18))):
        rows = []
        for image in drawn[0][part]:
            written = io.BytesIO()
            Image.fromarray(image).resize((32, 32)).save(written, "PNG")
            rows.append({"bytes": written.getvalue(), "path": None})
        made = pa.table({"img": rows, "label": drawn[1][part]}).replace_schema_metadata(about)
        pq.write_table(made, folder / f"{split}.parquet")
    return folder
