"""Run a command of the command line in this process."""

import json

from clearwing.cli import main


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def failure(capsys, *argv):
    """The one line on stderr of a command that must fail with 2, and the error object that --json gives for it."""
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("clearwing: ")
    assert err.count("\n") == 1, err
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 2
    error = json.loads(out)["error"]
    assert set(error) == {"argument", "value", "mend"}
    return err
