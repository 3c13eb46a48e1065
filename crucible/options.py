"""Typed options, checked before anything runs; every complaint is one line that names the option.

A room declares its options as a frozen dataclass, or an object as an annotated signature:

    powergrad_alpha: Annotated[float, "(0, 1]", "exponent of the class probabilities; 1 is off"] = 1.0

The type may be a plain type, a union, a Literal, or a list or dict of them. A string that reads as an
interval bounds the number; any other string is the meaning.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Options = TypeVar("Options")
_INTERVAL = re.compile(r"^([\[(])\s*([^,\s]+)\s*,\s*([^,\s]+)\s*([\])])$")
_LARGEST = 2**63 - 1  # what a tensor, a file and a counter hold
_SHOWN = 100  # characters of a value
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


class ConfigError(Exception):
    """A mistake in what the user asked for: one line that says which option, what value, what is allowed.

    Args:
        message: the line.
        see: where the reader finds more; printed behind the message.
    """

    def __init__(self, message: str, see: str = "cli_configs/train.yaml") -> None:
        super().__init__(message)
        self.see = see


def suggest(name: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """The nearest of `known` as `; did you mean X?`; where nothing is near, all of `listed` (else of `known`)."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    shown = known if listed is None else sorted(set(listed))
    return f"; known: {', '.join(shown)}" if shown else ""


def is_number(text: str) -> bool:
    """Whether a text is read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def in_interval(value: float, interval: str) -> bool:
    """Whether `value` lies in an interval written as in mathematics, such as `(0, 1]` or `[0, inf)`."""
    match = _INTERVAL.match(interval)
    if match is None:
        raise ValueError(f"not an interval: {interval!r}")
    left, low, high, right = match.groups()
    above = value >= float(low) if left == "[" else value > float(low)
    below = value <= float(high) if right == "]" else value < float(high)
    return above and below and not math.isnan(value)


def _describe(annotation: Any) -> str:
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        interval = _interval(annotation)
        return f"{_describe(args[0])} in {interval}" if interval else _describe(args[0])
    if origin is Literal:
        return "one of " + ", ".join("null" if a is None else str(a) for a in args)
    if origin in (Union, types.UnionType):
        literals = [a for arg in args if get_origin(arg) is Literal for a in get_args(arg)]
        named = ["one of " + ", ".join(map(str, literals))] if literals else []
        rest = [_describe(a) for a in args if get_origin(a) is not Literal]
        return " or ".join(named + rest)
    if origin in (list, tuple, Sequence, Iterable):
        return f"a list (each {_describe(args[0])})" if args else "a list"
    if origin in (dict, Mapping):
        return "a mapping"
    return getattr(annotation, "__name__", str(annotation))


def _interval(annotation: Any) -> str | None:
    return next((m for m in annotation.__metadata__ if isinstance(m, str) and _INTERVAL.match(m)), None)


class _Refused(Exception):
    pass


def shown(value: Any) -> str:
    """A value as a line shows it: its beginning, where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 40]}... ({len(text)} characters)"


def _accept(value: Any, annotation: Any) -> Any:
    """`value` as `annotation` wants it, or `_Refused`. Types that YAML cannot write are not judged."""
    if isinstance(annotation, (str, TypeVar)) or annotation in (Any, inspect.Parameter.empty):
        return value
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        if value is None:
            return None
        raise _Refused
    if origin is Annotated:
        value, interval = _accept(value, args[0]), _interval(annotation)
        if interval is not None:
            for number in value if isinstance(value, (list, tuple)) else [value]:
                numeric = isinstance(number, (int, float)) and not isinstance(number, bool)
                if numeric and not in_interval(number, interval):
                    raise _Refused
        return value
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in args):
            return value
        raise _Refused
    if origin in (Union, types.UnionType):
        for member in args:
            try:
                return _accept(value, member)
            except _Refused:
                continue
        raise _Refused
    if annotation is bool:
        if isinstance(value, bool):
            return value
        raise _Refused
    if annotation is str or annotation is Path:  # null is what asks for nothing, not an empty text
        if isinstance(value, (str, annotation)) and str(value).strip():
            return value
        raise _Refused
    if annotation is int:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST:
            return value
        raise _Refused
    if annotation is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _as_float(value)
        raise _Refused
    if annotation in (list, tuple, dict):
        if isinstance(value, Mapping if annotation is dict else (list, tuple)):
            return value
        raise _Refused
    if origin in (list, tuple, Sequence, Iterable) or getattr(origin, "__name__", "") in (
        "Sequence",
        "Iterable",
    ):
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise _Refused
        member = args[0] if args else Any
        return type(value)(_accept(v, member) for v in value)
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        if not isinstance(value, Mapping):
            raise _Refused
        return value
    plain = value is None or isinstance(value, (bool, int, float, str, list))
    if plain and inspect.isclass(annotation) and annotation is not object:
        raise _Refused
    return value


def _as_float(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        raise _Refused from None
    if math.isnan(number):
        raise _Refused
    return number


def check_value(name: str, value: Any, annotation: Any) -> Any:
    """`value` converted to `annotation` (an int where a float is asked for), or a `ConfigError`.

    Args:
        name: the option as a user types it, such as `model.lr`.
        value: what was given.
        annotation: a type as in the module's docstring.
    """
    try:
        return _accept(value, annotation)
    except _Refused:
        allowed = _describe(annotation)
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if numeric and abs(value) > _LARGEST and math.inf > abs(value):
            allowed += " and of at most 64 bits"
        elif (
            numeric
            and get_origin(annotation) is Annotated
            and allowed.startswith(("a number in", "a whole number in"))
        ):
            try:
                _accept(value, get_args(annotation)[0])
                allowed = "in " + allowed.split(" in ", 1)[1]
            except _Refused:
                pass
        literals = re.search(r"one of ([^()]*?)(?: or |$)", allowed)
        hint = ""
        if isinstance(value, str) and literals:
            choices = literals.group(1).split(", ")
            near = [c for c in choices if c.lower() == value.lower()] or difflib.get_close_matches(
                value, choices, n=1
            )
            hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name} must be {allowed}, got {shown(value)}{hint}") from None


def read_options(cls: type[Options], values: Mapping[str, Any], prefix: str = "model") -> Options:
    """Build the frozen dataclass `cls` from those of `values` that are its fields, each checked.

    Keys that are not fields of `cls` are left to the other rooms.
    """
    hints = _hints(cls)  # type: ignore[arg-type]
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    typed = {n: f"{prefix}.{n}" if prefix else n for n in names if n in values}
    return cls(**{n: check_value(name, values[n], hints[n]) for n, name in typed.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def option_names(cls: type) -> list[str]:
    """The names of the options that the dataclass `cls` declares."""
    return [f.name for f in dataclasses.fields(cls)]


def option_text(cls: type, name: str) -> str:
    """The meaning of an option that the dataclass `cls` declares; empty where it gives none."""
    texts = [m for m in getattr(_hints(cls)[name], "__metadata__", ()) if isinstance(m, str)]
    return next((text for text in texts if not _INTERVAL.match(text)), "")


def option_range(cls: type, name: str) -> str:
    """What the values of an option of the dataclass `cls` are: an interval or choices; empty for any of its type."""
    annotation = _hints(cls)[name]
    if get_origin(annotation) is Annotated and (interval := _interval(annotation)):
        return interval
    inner = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    members = [inner, *(get_args(inner) if get_origin(inner) in (Union, types.UnionType) else ())]
    return ", ".join(str(a) for m in members if get_origin(m) is Literal for a in get_args(m))


def signature_options(target: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """`{name: (annotation, default)}` of what `target` takes by keyword; kept, so not to be changed.

    For a class whose `__init__` passes `**kwargs` on, the arguments of its base classes are included.
    """
    return _signature_options(target)


@cache
def _signature_options(target: Any) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    calls = (
        [vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c)]
        if inspect.isclass(target)
        else [target]
    )
    for call in calls:
        if call is object.__init__:
            continue
        try:
            hints = get_type_hints(call, include_extras=True)
        except NameError:  # an annotation imported for type checkers only
            hints = {}
        parameters = inspect.signature(call).parameters.values()
        for p in parameters:
            if p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(p.name, (hints.get(p.name, Any), p.default))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def check_arguments(
    target: Callable[..., Any],
    values: Mapping[str, Any],
    prefix: str,
    known: Mapping[str, tuple[Any, Any]] | None = None,
    given: Collection[str] = (),
    listed: Collection[str] | None = None,
) -> None:
    """Refuse keys of `values` that `target` does not take, values of the wrong type or range, and gaps.

    Args:
        target: what will be called.
        values: its arguments; keys such as `_target_` are passed over.
        prefix: of the options' names in the message.
        known: `{name: (annotation, default)}` of what it takes; None: its signature's.
        given: names whose values are not judged here.
        listed: names shown where none is near the wrong one; None: all.

    Raises:
        ConfigError: naming the option.
    """
    known = signature_options(target) if known is None else known
    name_of_target = getattr(target, "__name__", str(target))
    listed = known if listed is None else listed
    judged = {
        n: v for n, v in values.items() if n not in given and not (n.startswith("_") and n.endswith("_"))
    }
    for name in [*given, *judged]:
        if name not in known:
            value = f"={shown(judged[name])}" if name in judged else ""
            raise ConfigError(
                f"{prefix}.{name}{value}: {name_of_target} has no such option{suggest(name, known, listed)}"
            )
    for name, value in judged.items():
        annotation, default = known[name]
        if not (isinstance(value, str) and value == default):  # some classes of others have an empty text
            check_value(f"{prefix}.{name}", value, annotation)
    for name, (_, default) in known.items():
        if default is inspect.Parameter.empty and name not in judged and name not in given:
            raise ConfigError(f"{prefix}.{name} is missing: {name_of_target} needs it")
