"""What the tests of the command `segment` share: a call that must do, what it wrote, and a network that is no run."""

import csv
import json

from commands import run

FAST = ["--no-baselines"]


def segmented(capsys, *argv):
    """The result of a call that must do."""
    code, text, err = run(capsys, "segment", *argv, "--json")
    assert code == 0, text + err
    return json.loads(text)


def contents(folder, *, but=()):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in but}


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def factory(folder):
    """`file.py:factory` of a network that is no run, of four classes without a name."""
    (folder / "mine.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(1)\n"
        "    first, last = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Conv2d(8, 8, 3, 2, 1)\n"
        "    head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4)\n"
        "    net = torch.nn.Sequential(first, torch.nn.ReLU(), last, torch.nn.ReLU(), *head)\n"
        "    net[-1].bias.data = torch.tensor([0.0, 0.0, 9.0, 0.0])\n"
        "    return net.eval()\n"
    )
    return f"{folder / 'mine.py'}:make"
