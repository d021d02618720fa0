"""What many tests share: the reference data where it is there, and a tiny trained run."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder of the reference photographs; the test is skipped where it is not there."""
    folder = Path(os.environ.get("CLEARWING_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the reference photographs, which are not part of the project ({folder} is not there)")
    return folder


@pytest.fixture(scope="session")
def drawn():
    """Eighteen drawn pictures of three species: images uint8 (N, H, W, 3), labels (N,), masks (N, H, W)."""
    from clearwing.data import synthetic

    images, labels, masks = synthetic.draw_split("train", 60, seed=3, size=48)
    kept = labels < 3
    return images[kept], labels[kept], masks[kept]


@pytest.fixture(scope="session")
def photos(tmp_path_factory, drawn) -> Path:
    """A data set on disk: train/ and val/ with three class folders, and MASKS/val."""
    root = tmp_path_factory.mktemp("photos")
    for i, (image, label, mask) in enumerate(zip(*drawn, strict=True)):
        split = "val" if i // 3 % 3 == 2 else "train"
        name = f"species_{label}"
        path = root / split / name / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((56, 40)).save(path)
        if split == "val":
            path = root / "MASKS" / split / name / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((mask * 255).astype(np.uint8)).resize((56, 40), Image.Resampling.NEAREST).save(path)
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory, photos) -> Path:
    """A run of two epochs on `photos`; copy it before changing it."""
    from clearwing.cli import main

    out = tmp_path_factory.mktemp("runs") / "tiny"
    options = ["--model", "resnet8", "--widths", "4", "8", "8", "--size", "32", "--epochs", "2"]
    assert main(["train", str(photos), "--out", str(out), *options, "--json"]) == 0
    return out


@pytest.fixture(scope="module")
def one_thread():
    """Two would wait for each other longer than they work on pictures as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
