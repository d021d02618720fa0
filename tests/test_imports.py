"""The direction of imports, and that the package and its help load nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clearwing

SOURCE = Path(clearwing.__file__).parent
LOW = {"types", "config"}
# A room may import from these rooms (and from itself). `types` and `config` are below all.
ALLOWED = {
    "types": set(),
    "config": {"types"},
    "settings": {"types", "config"},
    "data": {"types", "config"},
    "models": {"types", "config"},
    "measure": {"types"},
    "attribution": {"types"},
    "masks": {"types"},
    "show": {"types"},
    "train": {"types", "config", "data", "models", "measure"},
    "run": {"types", "config", "data", "models", "measure"},
    "jobs": LOW | {"settings", "data", "models", "measure", "attribution", "masks", "show", "train", "run"},
    "__main__": {"cli"},
    "cli": {"types", "config", "settings"},  # jobs are imported by name when a command is called
    "__init__": {"types"},
}


def room_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def imported_rooms(path: Path) -> set[str]:
    """The rooms of clearwing that a file imports, wherever in the file; not those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "clearwing" else [module]
    return {name.split(".")[1] for name in names if name.startswith("clearwing.")} - {"__version__"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    room = room_of(path)
    assert imported_rooms(path) - {room} <= ALLOWED[room]


def test_every_public_name_is_there():
    for name in clearwing.__all__:
        assert getattr(clearwing, name) is not None
    assert set(clearwing.__all__) <= set(dir(clearwing))
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        _ = clearwing.explian


def test_nothing_heavy_is_loaded_by_import_or_help():
    code = (
        "import sys, clearwing, clearwing.cli\n"
        "try: clearwing.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'cv2', 'matplotlib', 'PIL', 'pyarrow', 'skimage', 'jinja2'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "--time-budget" in done.stdout


def test_no_package_bears_the_name_of_a_public_function():
    packages = {path.name for path in SOURCE.iterdir() if path.is_dir()} | {path.stem for path in SOURCE.glob("*.py")}
    assert not packages & set(clearwing.__all__)


def test_config_names_what_the_rooms_hold():
    from clearwing import config
    from clearwing.attribution.methods import METHODS
    from clearwing.masks.pipeline import RECIPES
    from clearwing.models.zoo import NAMES

    assert set(config.METHODS) == set(METHODS)
    assert set(config.MODELS) == set(NAMES)
    assert set(config.RECIPES) == set(RECIPES)
