"""Plain values checked against the fields of a dataclass, and the one way they are hashed.

Owns the conversion between config dataclasses and plain mappings (what YAML, JSON and the
database hold), near-match suggestions, canonical JSON and content hashes. Knows no spec.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin

_QUOTE = "YAML reads a bare on, off, yes or no as a boolean: put it in quotes"


class FieldError(ValueError):
    """A value that does not fit its field; the message begins with the place."""


def suggest(name: str, valid: Iterable[str], noun: str = "Known") -> str:
    """The tail of an error about a name: the nearest valid name, then all of them."""
    known = sorted({str(item) for item in valid})
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if not near:
        folded = {item.casefold(): item for item in known}
        near = [folded[str(name).casefold()]] if str(name).casefold() in folded else []
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}{noun}: {', '.join(known) if known else 'none'}"


def at(place: str, key: object) -> str:
    """The place of `key` within `place`: 'file.yaml: config' and 'steps' give '...config.steps'."""
    if not place or place.endswith(": "):
        return f"{place}{key}"
    return f"{place}.{key}"


def refuse_unknown(mapping: Mapping[Any, Any], valid: Collection[str], place: str) -> None:
    """Raises FieldError for the first key that is not in `valid`."""
    for key in mapping:
        if key not in valid:
            raise FieldError(f"{at(place, key)}: unknown key {key!r}. {suggest(key, valid)}")


def expect_mapping(value: Any, place: str) -> dict[str, Any]:
    """`value` as a dict with string keys; None (an empty YAML block) is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FieldError(f"{place}: expected a mapping, got {_shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise FieldError(f"{place}: keys must be strings, got {_shown(key)}; quote it")
    return dict(value)


# ------------------------------------------------------------------------------ dataclass fields


@lru_cache(maxsize=256)
def field_types(cls: type) -> dict[str, Any]:
    """Name -> annotation of every init field of a dataclass, in order.

    Raises:
        TypeError: if `cls` is not a dataclass or an annotation is not one of the supported kinds
            (bool, int, float, str, None, Literal, Optional and unions of these, tuple, Mapping
            with string keys, dataclass, Any).
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"{cls!r} is not a dataclass; a config must be a frozen dataclass")
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:
        raise TypeError(f"cannot resolve the annotations of {_qualified(cls)}: {error}") from error
    found = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    for name, annotation in found.items():
        if not _supported(annotation):
            raise TypeError(
                f"{_qualified(cls)}.{name} is annotated {_type_name(annotation)}, which cannot be "
                "read from a spec. Use bool, int, float, str, Literal, Optional, tuple, "
                "Mapping[str, ...] or a nested dataclass"
            )
    return found


def convert(annotation: Any, value: Any, place: str) -> Any:
    """`value` as the type `annotation` says, strictly.

    An int is accepted for a float and a list for a tuple; nothing else is converted (a bool is
    not an int, "3" is not a number). Floats must be finite, and -0.0 becomes 0.0.

    Raises:
        FieldError: naming `place`, the value and what was expected.
    """
    if annotation is Any:
        return plain(value, place)
    origin = get_origin(annotation)
    if origin is Literal:
        choices = get_args(annotation)
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return choice
        hint = suggest(value, [c for c in choices if isinstance(c, str)], "Valid")
        listed = ", ".join(repr(choice) for choice in choices)
        near = hint.split("?")[0] + "?" if isinstance(value, str) and "Did you" in hint else ""
        near = _QUOTE if isinstance(value, bool) else near
        raise FieldError(f"{place}: expected one of {listed}, got {_shown(value)}. {near}".strip())
    if origin in (Union, types.UnionType):
        return _convert_union(annotation, value, place)
    if annotation is None or annotation is type(None):
        if value is None:
            return None
    elif annotation is bool:
        if isinstance(value, bool):
            return value
    elif annotation is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return int(value)
        if isinstance(value, float) and value.is_integer():
            raise FieldError(f"{place}: expected int, got {_shown(value)}. Write {int(value)}")
    elif annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _finite(value, place)
    elif annotation is str:
        if isinstance(value, str):
            return str(value)
    elif annotation is tuple or origin is tuple:
        return _convert_tuple(annotation, value, place)
    elif isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        if isinstance(value, annotation):
            value = config_to_dict(value)
        return config_from_dict(annotation, expect_mapping(value, place), place)
    elif annotation in (dict, Mapping) or _is_mapping(origin):
        arguments = get_args(annotation)
        of = arguments[1] if arguments else Any
        items = expect_mapping(value, place)
        return {key: convert(of, item, at(place, key)) for key, item in items.items()}
    hint = f". {_QUOTE}" if annotation is str and isinstance(value, bool) else ""
    raise FieldError(f"{place}: expected {_type_name(annotation)}, got {_shown(value)}{hint}")


def config_from_dict(cls: type, values: Mapping[str, Any], place: str = "") -> Any:
    """An instance of the dataclass `cls` from a plain mapping; absent fields take their default.

    Args:
        place: where the mapping stands, for messages ("quickstart.yaml: config").

    Raises:
        FieldError: for an unknown key, a wrong type, a missing field without default, or when
            `cls` itself refuses the values.
    """
    place = place or cls.__name__
    values = expect_mapping(values, place)
    annotations = field_types(cls)
    refuse_unknown(values, annotations, place)
    checked = {name: convert(annotations[name], values[name], at(place, name)) for name in values}
    try:
        return cls(**checked)
    except (TypeError, ValueError) as error:
        raise FieldError(f"{place}: {error}") from error


def check_values(cls: type, values: Mapping[str, Any] | None, place: str) -> dict[str, Any]:
    """`values` checked field by field against the dataclass `cls`, absent fields left out."""
    values = expect_mapping(values, place)
    annotations = field_types(cls)
    refuse_unknown(values, annotations, place)
    return {name: convert(annotations[name], values[name], at(place, name)) for name in values}


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values, floats where floats are declared.

    `config_from_dict(type(config), config_to_dict(config)) == config` for configs whose values
    have their declared types.
    """
    cls: type = type(config)
    place = cls.__name__
    return {
        name: plain(convert(annotation, getattr(config, name), at(place, name)), at(place, name))
        for name, annotation in field_types(cls).items()
    }


def plain(value: Any, place: str = "value") -> Any:
    """`value` as JSON values: mappings to dict, sequences to list, dataclasses to dict.

    Raises:
        FieldError: for anything JSON cannot hold, a float that is not finite included.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _finite(value, place)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return config_to_dict(value)
    if isinstance(value, Mapping):
        items = expect_mapping(value, place)
        return {key: plain(item, at(place, key)) for key, item in items.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise FieldError(f"{place}: {_shown(value)} is not a value that JSON can hold")


# -------------------------------------------------------------------------------------- identity


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and the shortest text of each float; -0.0 is 0.0."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


# -------------------------------------------------------------------------------------- internal


def _finite(value: float, place: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FieldError(
            f"{place}: {value} is not a finite number. Use null where a field can be switched off"
        )
    return number + 0.0  # -0.0 + 0.0 is 0.0


def _convert_union(annotation: Any, value: Any, place: str) -> Any:
    members = get_args(annotation)
    if value is None and type(None) in members:
        return None
    # An int stays an int in `int | float`; only without an int member does it become a float.
    exact = [member for member in members if isinstance(member, type) and type(value) is member]
    failures: list[FieldError] = []
    for member in (*exact, *members):
        if member is type(None):
            continue
        try:
            return convert(member, value, place)
        except FieldError as error:
            failures.append(error)
    if len(members) == 2 and type(None) in members and failures:
        raise failures[0]
    raise FieldError(f"{place}: expected {_type_name(annotation)}, got {_shown(value)}")


def _convert_tuple(annotation: Any, value: Any, place: str) -> tuple[Any, ...]:
    arguments = get_args(annotation)
    if not isinstance(value, list | tuple):
        raise FieldError(f"{place}: expected a list, got {_shown(value)}")
    if not arguments:
        kinds: tuple[Any, ...] = (Any,) * len(value)
    elif len(arguments) == 2 and arguments[1] is Ellipsis:
        kinds = (arguments[0],) * len(value)
    else:
        kinds = () if arguments == ((),) else arguments
    if len(kinds) != len(value):
        raise FieldError(f"{place}: expected {len(kinds)} values, got {len(value)}: {value!r}")
    return tuple(
        convert(kind, item, f"{place}[{index}]")
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _supported(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if annotation in (Any, bool, int, float, str, None, type(None), tuple, dict, Mapping):
        return True
    if origin is Literal:
        return all(isinstance(item, str | int | bool | None) for item in get_args(annotation))
    if origin in (Union, types.UnionType):
        return all(_supported(item) for item in get_args(annotation))
    if origin is tuple:
        return all(_supported(a) for a in get_args(annotation) if a not in (Ellipsis, ()))
    if _is_mapping(origin):
        key, item = get_args(annotation)
        return key is str and _supported(item)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        field_types(annotation)
        return True
    return False


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("None", "null")


def _shown(value: Any) -> str:
    text = repr(value)
    if len(text) > 80:
        text = text[:77] + "..."
    return "null" if value is None else f"{text} ({type(value).__name__})"
