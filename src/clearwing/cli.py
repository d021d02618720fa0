"""The command line: parse, call a job, print. Torch is imported only when a job is called."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clearwing import config as configs
from clearwing.settings import from_file, from_recipe
from clearwing.types import ClearwingError, near

COMMANDS: dict[str, tuple[type[configs.Common], str]] = {
    "train": (configs.TrainConfig, "clearwing.jobs.train:train"),
    "lr-find": (configs.LrFindConfig, "clearwing.jobs.lr_find:lr_find"),
    "evaluate": (configs.EvaluateConfig, "clearwing.jobs.evaluate:evaluate"),
    "predict": (configs.PredictConfig, "clearwing.jobs.evaluate:predict"),
    "explain": (configs.ExplainConfig, "clearwing.jobs.explain:explain"),
    "segment": (configs.SegmentConfig, "clearwing.jobs.segment:segment"),
    "export": (configs.ExportConfig, "clearwing.jobs.export:export"),
    "report": (configs.ReportConfig, "clearwing.jobs.report:report"),
    "doctor": (configs.DoctorConfig, "clearwing.jobs.doctor:doctor"),
    "demo": (configs.DemoConfig, "clearwing.jobs.demo:demo"),
}
_ABOUT = "Train an image classifier, see where it looks and why it errs, and get masks that nobody had to draw."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 found before work started, 1 later."""
    began = time.monotonic()  # importing torch takes seconds that belong to a time budget
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    try:
        name, config = parse(argv)
        # With --json stdout holds one object: what anything else prints (a model's own file, say) goes to stderr.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            timed = {"began": began} if name == "train" else {}
            result = _job(COMMANDS[name][1])(config, **timed)
    except ClearwingError as error:
        return _failed(error, as_json)
    except KeyboardInterrupt:
        return _failed(ClearwingError("command", argv[0], "stopped by Ctrl-C", exit_code=1), as_json)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        path = error.filename or argv[0]
        return _failed(ClearwingError("file", path, error.strerror or str(error), exit_code=1), as_json)
    if "text" not in result:  # one of several processes, not the first
        return int(result["exit_code"])
    print(json.dumps(result["json"]) if as_json else result["text"])
    return int(result.get("exit_code", 0))


def parse(argv: list[str]) -> tuple[str, configs.Common]:
    """The command and its settings. `--help` and `--version` print and exit 0; what is wrong raises ClearwingError."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        raise SystemExit(0)
    if argv[0] in ("-V", "--version"):
        from clearwing import __version__

        print(f"clearwing {__version__}")
        raise SystemExit(0)
    name = argv[0]
    if name not in COMMANDS:
        raise ClearwingError("command", name, near(name, list(COMMANDS)))
    kind = COMMANDS[name][0]
    return name, _parse_settings(name, kind, argv[1:])


def _parse_settings(name: str, kind: type[configs.Common], argv: list[str]) -> configs.Common:
    import tyro

    defaults = _stored_settings(kind, argv) if issubclass(kind, configs.TrainConfig) else {}
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            parsed = tyro.cli(
                _with_defaults(kind, defaults),
                prog=f"clearwing {name}",
                args=argv,
                config=(tyro.conf.HelptextFromCommentsOff,),
            )
            # The class with other defaults has no name that another process could find it by.
            return kind(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(kind)})
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise _one_line(written.getvalue(), name, kind) from None


_DROPPED = (
    ("--size", (), "train_size"),
    ("--crop", ("none",), "train_size"),
    ("--cutout", ("0",), "cutout_off"),
    ("--schedule", ("step", "constant"), "warmup"),
    ("--weights", (), "whiten"),
)
"""Settings of a recipe that say nothing any more when the one they belong to is given (as one of these values)."""


def _stored_settings(kind: type[configs.Common], argv: list[str]) -> dict[str, Any]:
    """Settings from --recipe and --config FILE, or with --resume from the run; not those that are about one call."""
    path, recipe = _value_of("--config", argv), _value_of("--recipe", argv)
    out = _value_of("--out", argv)
    if path is None and "--resume" in argv and out is not None and Path(out, "config.json").is_file():
        path = str(Path(out, "config.json"))
    if path is not None and recipe is not None and "--resume" not in argv:
        raise ClearwingError("--recipe", recipe, "give --recipe or --config, not both")
    if path is not None:
        settings = from_file(kind, path)
    elif recipe is not None:
        settings = from_recipe(recipe)
    else:
        return {}
    lengths = {"--epochs": "epochs", "--time-budget": "time_budget", "--replay": "replay"}
    if any(_value_of(option, argv) is not None for option in lengths):  # what is given wins over its rivals, too
        settings = {key: item for key, item in settings.items() if key not in lengths.values()}
    if "--resume" not in argv:
        for option, values, partner in _DROPPED:
            given = _value_of(option, argv)
            if given is not None and (not values or given in values):
                settings.pop(partner, None)
    once = {"resume", "overwrite", "json", "config"} | ({"out"} if kind is configs.LrFindConfig else set())
    return {key: item for key, item in settings.items() if key not in once}


def _value_of(option: str, argv: list[str]) -> str | None:
    """What is given for an option as `--option value` or `--option=value`, before the parser runs."""
    for at, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == option:
            return value if equals else (argv[at + 1] if at + 1 < len(argv) else "")
    return None


def _with_defaults(kind: type[configs.Common], defaults: dict[str, Any]) -> type[configs.Common]:
    """The same settings with other defaults (those of a config.json); required ones that it gives are optional then."""
    if not defaults:
        return kind
    fields = {field.name: field for field in dataclasses.fields(kind)}
    namespace: dict[str, Any] = {"__doc__": kind.__doc__, "__module__": kind.__module__}
    for key, value in defaults.items():
        namespace[key] = dataclasses.field(default=value, kw_only=fields[key].kw_only)
    namespace["__annotations__"] = {key: fields[key].type for key in defaults}
    return dataclasses.dataclass(frozen=True, kw_only=True)(type(kind.__name__, (kind,), namespace))


def _one_line(text: str, name: str, kind: type[configs.Common]) -> ClearwingError:
    """The parser's boxed message as an error with argument, value and mend."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    words = " ".join(re.sub(r"[│╭╮╰╯─]+|[+|]?-{5,}[+|]?", " ", text).split())
    mend = f"see clearwing {name} --help"
    if found := re.search(r"Error parsing (--[\w-]+).*? could be instantiated from \['(.*?)'\]", words):
        needed = re.search(r"no type matching (\S+)", words)
        kinds = needed.group(1).replace("{None}|", "") if needed else "another value"
        return ClearwingError(found.group(1), found.group(2), f"give {kinds}; {mend}")
    if found := re.search(r"invalid choice '(.*?)' for argument '(--[\w-]+)'. Expected one of \((.*?)\)", words):
        return ClearwingError(found.group(2), found.group(1), f"choose one of {found.group(3)}".replace("'", ""))
    if found := re.search(r"Unrecognized options: (.*?)(?: Perhaps| Similar| For full|$)", words):
        strange = found.group(1).partition("For full helptext")[0].replace(",", " ").split() or ["''"]
        wrong = next((word for word in strange if word[:1] == "-"), strange[0])
        options = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(kind)]
        if wrong[:1] != "-":
            return ClearwingError(wrong, "one word too many", f"put names with spaces in quotes; {mend}")
        return ClearwingError(wrong, "no such option", near(wrong, options))
    if "Missing from" in words:
        fields = [field for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
        shown = [field.name.upper() if _positional(field) else f"--{field.name}" for field in fields]
        return ClearwingError(name, "something is missing", f"needs {', '.join(shown)}; {mend}")
    if found := re.search(r"(--[\w-]+)", words):
        return ClearwingError(found.group(1), words.partition("For full helptext")[0], mend)
    return ClearwingError(name, words.partition("For full helptext")[0], mend)


def _positional(field: dataclasses.Field[Any]) -> bool:
    return str(field.type).startswith("Positional")


def _help() -> str:
    lines = ["usage: clearwing COMMAND ...", "", _ABOUT, "", "commands:"]
    for name, (kind, _) in COMMANDS.items():
        lines.append(f"  {name:<10}{(kind.__doc__ or '').strip().splitlines()[0]}")
    lines += ["", "clearwing COMMAND --help says what a command can be told. Start with: clearwing demo"]
    return "\n".join(lines)


def _job(where: str) -> Any:
    module, _, function = where.partition(":")
    return getattr(importlib.import_module(module), function)


def _failed(error: ClearwingError, as_json: bool) -> int:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if as_json and rank == "0":  # one object for all processes
        print(json.dumps({"error": {"argument": error.argument, "value": error.value, "mend": error.mend}}))
    else:
        print(f"clearwing: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
