"""YAML and `section.key=value` to a Recipe and back; strict, with every problem in one report."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_xielu.recipes.schema import Recipe
from megatron_xielu.recipes.validate import RecipeError

_PRESETS = resources.files("megatron_xielu.recipes") / "presets"
_EXPECTED = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}


def preset_names() -> list[str]:
    """The recipes that come with the package."""
    names = (entry.name for entry in _PRESETS.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a preset or a YAML file and applies overrides such as "optimizer.lr=8e-4".

    An override's value is YAML, so null, true and 3 are no strings; a number may be written in any
    form that Python's float takes. Raises RecipeError, which lists every unknown key, every missing
    key and every value of a wrong type. Rules between fields are `check`'s.
    """
    subject = f"recipe {name_or_path!r}"
    document = _parse(_read(name_or_path), subject)
    problems: list[str] = []
    for override in overrides:
        _apply(override, document, problems)
    recipe = _build(Recipe, document, "", problems)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError(f"{subject} has {count}", problems)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """Every field in the schema's order; loading the text gives an equal recipe."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def diff(a: Recipe, b: Recipe) -> list[str]:
    """One line per field that differs, such as "model.num_layers: 4 -> 6"."""
    before, after = _leaves(dataclasses.asdict(a)), _leaves(dataclasses.asdict(b))
    return [
        f"{path}: {_show(before[path])} -> {_show(after[path])}"
        for path in before
        if before[path] != after[path]
    ]


def _read(name_or_path: str) -> str:
    if name_or_path in preset_names():
        return (_PRESETS / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    path = Path(name_or_path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        match = difflib.get_close_matches(name_or_path, preset_names(), n=1)
        reason = "neither a preset nor a file" + (f"; did you mean {match[0]}?" if match else "")
    except IsADirectoryError:
        reason = f"a folder; the recipe of a run is {path / 'recipe.yaml'}"
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read: {error}"
    known = f"presets: {', '.join(preset_names())}; or give the path of a YAML file"
    raise RecipeError(f"recipe {name_or_path!r}", [reason, known])


class _Loader(yaml.SafeLoader):
    """Plain YAML keeps the last of two equal keys; here the second one is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, (key_node, _) in enumerate(node.value):
            if keys[index] in keys[:index]:
                reason = f"the key {keys[index]!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, reason, key_node.start_mark)
        return super().construct_mapping(node, deep)


def _parse(text: str, subject: str) -> dict[str, Any]:
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{subject} is not valid YAML", str(error).splitlines()) from None
    if not isinstance(document, dict):
        expected = f"expected sections ({', '.join(_top_level())}), got {_show(document)}"
        raise RecipeError(subject, [expected])
    return document


def _apply(override: str, document: dict[str, Any], problems: list[str]) -> None:
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        problems.append(f"{override}: {text!r} is not a YAML value")
        return
    if not equals or (not dot and isinstance(document.get(section), dict)):
        problems.append(f"{override}: expected section.key=value")
    elif not dot:
        document[section] = value
    elif document.get(section) is None:
        document[section] = {key: value}
    elif isinstance(document[section], dict):
        document[section][key] = value


def _build(cls: Any, raw: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """Returns an instance of the dataclass, or None after adding to `problems`."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    before = len(problems)
    for key in raw:
        if key not in known:
            problems.append(_unknown(f"{prefix}{key}", raw[key]))
    for key, field in known.items():
        path = f"{prefix}{key}"
        if key in raw:
            values[key] = _value(path, hints[key], raw[key], problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            kind = "section" if dataclasses.is_dataclass(hints[key]) else "key"
            problems.append(f"{path}: this {kind} is required")
    return cls(**values) if len(problems) == before else None


def _value(path: str, hint: Any, raw: Any, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        if raw is None or isinstance(raw, dict):
            return _build(hint, raw or {}, f"{path}.", problems)
        problems.append(f"{path}: expected a section of keys, got {_show(raw)}")
        return None
    try:
        return _convert(hint, raw)
    except ValueError as error:
        problems.append(f"{path}: {error}, got {_show(raw)}")
        return None


def _convert(hint: Any, raw: Any) -> Any:
    """Returns `raw` as the field's type; raises ValueError that says what was expected."""
    # Literal[...] | None is typing's own kind of union
    if get_origin(hint) in (UnionType, Union):
        if raw is None:
            return None
        (hint,) = (option for option in get_args(hint) if option is not NoneType)
        try:
            return _convert(hint, raw)
        except ValueError as error:
            raise ValueError(f"{error} or null") from None
    if get_origin(hint) is Literal:
        # YAML 1.1 reads off as a boolean
        if raw is False and "off" in get_args(hint):
            return "off"
        if raw in get_args(hint):
            return raw
        raise ValueError(f"expected one of {', '.join(get_args(hint))}")
    # YAML 1.1 reads 8e-4 as a string
    if hint is float and type(raw) in (int, float, str):
        return _finite(raw)
    # not isinstance: a bool is an int in Python
    if type(raw) is hint:
        return raw
    raise ValueError(f"expected {_EXPECTED[hint]}")


def _finite(raw: int | float | str) -> float:
    try:
        number = float(raw)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected {_EXPECTED[float]}")
    return number


def _unknown(path: str, raw: Any) -> str:
    kind = "section" if "." not in path and isinstance(raw, dict) else "key"
    section, _, key = path.rpartition(".")
    in_section = [p for p in recipe_keys() if p.startswith(f"{section}.")]
    siblings = in_section if section else _top_level()
    if match := _closest(key, siblings, 0.6) or _closest(key, recipe_keys(), 0.8):
        return f"{path}: unknown {kind}; did you mean {match}?"
    return f"{path}: unknown {kind}; known: {', '.join(siblings)}"


def _closest(key: str, paths: Sequence[str], cutoff: float) -> str | None:
    by_key = {path.rpartition(".")[2]: path for path in paths}
    match = difflib.get_close_matches(key, by_key, n=1, cutoff=cutoff)
    return by_key[match[0]] if match else None


def _top_level() -> list[str]:
    return list(get_type_hints(Recipe))


def recipe_keys() -> list[str]:
    """Every key as "section.key", and the keys of the top level."""
    paths = []
    for name, hint in get_type_hints(Recipe).items():
        keys = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else []
        paths += [f"{name}.{key.name}" for key in keys] or [name]
    return paths


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    leaves = {}
    for name, branch in tree.items():
        section = branch if isinstance(branch, dict) else {"": branch}
        leaves.update({f"{name}.{key}".rstrip("."): value for key, value in section.items()})
    return leaves


def _show(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
