"""Settings that stand in a file, and those that are a text: recipes, a run's config.json, times and lists.

Nothing heavy is imported here, so that `clearwing --help` is fast.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from clearwing.config import Common, TrainConfig
from clearwing.types import ClearwingError, near


def recipes() -> dict[str, Path]:
    """The recipes that come with the package: name -> the file."""
    return {path.stem: path for path in sorted(Path(__file__).with_name("recipes").glob("*.toml"))}


def from_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, by name or as a .toml file; ClearwingError for what is no setting of train."""
    known = recipes()
    path = known.get(name, Path(name))
    if not path.is_file():
        mend = "no such file" if path.suffix == ".toml" else f"{near(name, list(known))}; or give a .toml file"
        raise ClearwingError("--recipe", name, mend)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClearwingError("--recipe", name, f"cannot be read ({error})") from error
    return _settings(TrainConfig, values, "--recipe", str(path))


def from_file(kind: type[Common], path: str | Path) -> dict[str, Any]:
    """The settings in a config.json that are fields of `kind`; unknown ones are refused with the near names."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClearwingError("--config", path, f"give a RUN/config.json ({error})") from error
    if not isinstance(values, dict):
        raise ClearwingError("--config", path, "give a JSON object of settings, as in RUN/config.json")
    return _settings(kind, values.get("train", values), "--config", path)


def _settings(kind: type[Common], values: dict[str, Any], argument: str, path: str | Path) -> dict[str, Any]:
    """The values as settings of `kind`; ClearwingError where a name or a type is none of it."""
    types, hints = {field.name: str(field.type) for field in dataclasses.fields(kind)}, get_type_hints(kind)
    for name, value in values.items():
        if name not in types:
            raise ClearwingError(argument, f"{path}: {name}", near(name, list(types)))
        if not _is_a(value, hints[name]):
            raise ClearwingError(argument, f"{path}: {name} = {value!r}", f"give {_in_words(types[name])}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _in_words(kind: str) -> str:
    """`float | None` as "a number", `Literal["a", "b"]` as "a or b"."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    plain = re.sub("Literal\\[(.*?)]", "\\1", kind).replace("'", "").replace('"', "")
    parts = [part for part in plain.split(" | ") if part != "None"]
    lists = [f"a list of {part.count('int')} whole numbers" if part.startswith("tuple") else part for part in parts]
    return " or ".join(words.get(part, part.replace(", ", " or ")) for part in lists)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value of JSON or TOML fits the type of a setting."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_a(value, part) for part in parts)
    if get_origin(kind) is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if get_origin(kind) is tuple:
        repeated = parts[-1] is Ellipsis
        kinds = parts[:1] * len(value) if isinstance(value, list) and repeated else parts
        return isinstance(value, list) and len(value) == len(kinds) and all(map(_is_a, value, kinds))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def seconds(text: str, argument: str = "--time-budget") -> float:
    """`90s`, `20m`, `1h`, `1h30m` or plain seconds, as seconds."""
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip().lower())
    value = (
        sum(float(part or 0) * unit for part, unit in zip(parts.groups(), (3600, 60, 1), strict=True)) if parts else 0
    )
    if value <= 0:
        raise ClearwingError(argument, text, "give a time such as 90s, 20m or 1h30m")
    return value


def comma_list(text: str | None) -> list[str]:
    """`a, b` as ["a", "b"]; None as []."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def class_list(text: str | None) -> list[str] | None:
    """Class names from a comma-separated list or a text file with one name a line."""
    if text is None:
        return None
    path = Path(text)
    # Many names in one list are too long for a file's name: asking the system whether it is one would fail.
    content = path.read_text(encoding="utf-8") if len(text) < 255 and path.is_file() else None
    if content is None:
        names = comma_list(text)
    elif path.suffix == ".json":
        try:
            found = json.loads(content)
        except ValueError as error:
            raise ClearwingError("--classes", text, f"is no JSON ({error})") from error
        names = [str(name) for name in (found.values() if isinstance(found, dict) else found)]
    else:
        names = [line.strip() for line in content.splitlines() if line.strip()]
    if len(set(names)) != len(names) or not names:
        raise ClearwingError("--classes", text, "give each class once: a,b,c or a text file with one name a line")
    return names
