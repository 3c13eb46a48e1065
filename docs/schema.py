"""JSON Schemas (draft 7) of the configuration files, from the same declarations that a run checks: for editors.

`docs/schema.json` is of files whose options are dotted from the top: train.yaml, and those with `# @package _global_`.
`docs/schema_model.json` is of those in a group `model/`. Files are partial, so nothing is required, and every value may
be an interpolation. A model's and a data set's options are those of all of them together: which ones a class takes is
the command's to say.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from lightning.pytorch import Callback

from augmentation.policies.base import Policy
from callbacks.checkpoints import Checkpoints
from callbacks.range_test import RangeOptions
from crucible import loggers
from crucible.command_line import import_from
from crucible.configuration import find_target
from crucible.options import signature_options
from datasets.base_datamodule import BaseDataModule
from datasets.packed import PackOptions
from lab.cluster import ClusterOptions
from lab.config import AUTOMATIC_FROM_DATA, DATA_TYPES, ROOT_TYPES, model_options, trainer_options
from lab.planning import SweepOptions
from lab.ray_engine import RayOptions
from lab.search import SearchOptions
from models.base_model import BaseModel
from models.exported import ExportOptions

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "cli_configs"
FILES = ("schema.json", "schema_model.json")
DRAFT = "http://json-schema.org/draft-07/schema#"
# ${...}, or ??? for what the command line has to give
INTERPOLATION = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}
_REFERENCE = {"$ref": "#/definitions/interpolation"}
_INTERVAL = re.compile(r"^([\[(])\s*([^,\s]+)\s*,\s*([^,\s]+)\s*([\])])$")
_KEY = re.compile(r"^( *)([\w.-]+):(?= |$)(?:.*?\s(#) ?(.*))?$")

Schema = dict[str, Any]
Declared = tuple[Any, Any]  # an annotation and a default


def of_annotation(annotation: Any) -> list[Schema]:
    """The alternatives that an annotation allows, by the rules of `crucible.options`; empty: anything."""
    origin, args = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, (str, TypeVar)) or annotation in (Any, object, inspect.Parameter.empty):
        return []
    if annotation is None or annotation is type(None):
        return [{"type": "null"}]
    if origin is Annotated:
        interval = next(
            (m for m in annotation.__metadata__ if isinstance(m, str) and _INTERVAL.match(m)), None
        )
        alternatives = of_annotation(args[0])
        return [_bounded(one, interval) for one in alternatives] if interval else alternatives
    if origin is Literal:
        return [{"enum": list(args)}]
    if origin in (Union, types.UnionType):
        parts = [of_annotation(part) for part in args]
        return [] if not all(parts) else [one for part in parts for one in part]
    plain = {bool: "boolean", int: "integer", float: "number", list: "array", tuple: "array", dict: "object"}
    if annotation in (str, Path):
        return [{"type": "string", "pattern": r"\S"}]
    if annotation in plain:
        return [{"type": plain[annotation]}]
    name = getattr(origin, "__name__", "")
    if origin in (list, tuple) or name in ("Sequence", "Iterable"):
        members = of_annotation(args[0]) if args else []
        return [{"type": "array", **({"items": _either([*members, _REFERENCE])} if members else {})}]
    if origin is dict or name == "Mapping" or inspect.isclass(annotation):
        return [{"type": "object"}]  # of a class what `_target_` makes
    return []


def _bounded(schema: Schema, interval: str) -> Schema:
    match = _INTERVAL.match(interval)
    assert match is not None
    if schema.get("type") == "array":
        members = schema.get("items", {}).get("anyOf", [])
        return {**schema, "items": {"anyOf": [_bounded(one, interval) for one in members]}}
    if schema.get("type") not in ("integer", "number"):
        return schema
    bounds: Schema = {}
    for text, closed, limit, beyond in (
        (match[2], match[1] == "[", "minimum", "exclusiveMinimum"),
        (match[3], match[4] == "]", "maximum", "exclusiveMaximum"),
    ):
        number = float(text)
        if math.isfinite(number):
            bounds[limit if closed else beyond] = int(number) if number.is_integer() else number
    return {**schema, **bounds}


def _either(alternatives: Sequence[Schema]) -> Schema:
    unique = [one for number, one in enumerate(alternatives) if one not in alternatives[:number]]
    return unique[0] if len(unique) == 1 else {"anyOf": unique}


def option(declared: Iterable[Declared], said: str = "") -> Schema:
    """An option with all that its declarations allow, its default, where they agree on one, and its meaning."""
    declared = list(declared)
    alternatives = [of_annotation(annotation) for annotation, _ in declared]
    texts = [
        text
        for annotation, _ in declared
        for text in getattr(annotation, "__metadata__", ())
        if isinstance(text, str) and not _INTERVAL.match(text)
    ]
    schema: Schema = {}
    if description := next(iter(texts), said):
        schema["description"] = description
    defaults = {json.dumps(d) for _, d in declared if _is_plain(d)}
    if len(defaults) == 1 and all(_is_plain(d) for _, d in declared):
        schema["default"] = json.loads(defaults.pop())
    if all(alternatives):
        schema |= _either([*(one for part in alternatives for one in part), _REFERENCE])
    return schema


def _is_plain(value: Any) -> bool:
    try:
        return value is not inspect.Parameter.empty and json.dumps(value, allow_nan=False) is not None
    except (TypeError, ValueError):
        return False


def group(properties: Mapping[str, Schema], **more: Any) -> Schema:
    """A mapping of these options, and of no others."""
    return {
        "type": "object",
        "properties": {**properties},
        "patternProperties": {"^_.*_$": {}},  # _target_ and its kin
        "additionalProperties": False,
        **more,
    }


def _mapping_or(schema: Schema, *others: Schema) -> Schema:
    """A mapping, whose faults are told one by one, as those of an `anyOf` are not; or something else."""
    return {"if": {"type": "object"}, "then": schema, "else": _either([*others, _REFERENCE])}


def _fields(kind: type) -> dict[str, Declared]:
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: (hints[f.name], f.default) for f in dataclasses.fields(kind)}


def _classes(package: str, base: type) -> Iterator[type]:
    """The classes of a room that are of a kind."""
    for file in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for kind in vars(importlib.import_module(name)).values():
            if inspect.isclass(kind) and issubclass(kind, base) and kind.__module__ == name:
                yield kind


def comments(text: str, prefix: str = "") -> dict[str, str]:
    """`{dotted option: the comment beside it}` of a YAML file, with the lines that go on with it."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    column, name = -1, ""
    for line in text.splitlines():
        if name and line[:column].strip() == "" and line[column : column + 1] == "#":
            found[name] += " " + line[column + 1 :].strip()
            continue
        name = ""
        if (match := _KEY.match(line)) is None:
            continue
        indent = len(match[1])
        above = [*(one for one in above if one[0] < indent), (indent, match[2])]
        if match[4]:
            name, column = (
                ".".join([*([prefix] if prefix else []), *(key for _, key in above)]),
                match.start(3),
            )
            found[name] = match[4].strip()
    return found


def _is_global(text: str) -> bool:
    return re.search(r"^# @package _global_\s*$", text, re.MULTILINE) is not None


@dataclasses.dataclass
class _Files:
    """Configuration files: what they say of options, and the classes that those of a user name."""

    folders: Sequence[Path]

    def texts(self) -> Iterator[tuple[str, str]]:
        """Prefix of the options, and text, of each file."""
        for folder in self.folders:
            for file in sorted(folder.rglob("*.yaml")):
                text = file.read_text(encoding="utf-8")
                inner = file.relative_to(folder).parts[:-1]
                yield ("" if not inner or _is_global(text) else inner[0]), text

    def said(self) -> dict[str, str]:
        """What the comments say; train.yaml comes last and wins."""
        found: dict[str, str] = {}
        for prefix, text in self.texts():
            found |= comments(text, prefix)
        return found | comments((CONFIGS / "train.yaml").read_text(encoding="utf-8"))

    def named(self) -> tuple[list[Any], dict[str, str]]:
        """The classes behind each `_target_`, and the techniques under `model.stages`."""
        targets: dict[str, None] = {}
        stages: dict[str, str] = {}

        def look(node: Any) -> None:
            if isinstance(node, Mapping):
                if isinstance(target := node.get("_target_"), str):
                    targets[target] = None
                if isinstance(known := node.get("stages"), Mapping):
                    stages.update(known)
                for value in node.values():
                    look(value)

        for _, text in self.texts():
            look(yaml.safe_load(text))
        return [find_target(target, "_target_") for target in targets], stages


def schemas(user_dir: Path | None = None) -> dict[str, Schema]:
    """The two schemas by their files' names.

    Args:
        user_dir: a folder of one's own models, data sets and techniques, whose options are taken in; None: none.
    """
    folders = [CONFIGS]
    users: list[Any] = []
    stages: dict[str, str] = {}
    if user_dir is not None:
        import_from(str(user_dir.resolve()))
        configs = user_dir / "cli_configs" if (user_dir / "cli_configs").is_dir() else user_dir
        folders.append(configs)
        users, stages = _Files([configs]).named()
    said = _Files(folders).said()

    def of(declared: Mapping[str, Declared], prefix: str) -> dict[str, Schema]:
        return {n: option([d], said.get(f"{prefix}{n}", "")) for n, d in declared.items()}

    def united(kinds: Iterable[Any], prefix: str, leave_out: Collection[str] = ()) -> dict[str, Schema]:
        every: dict[str, list[Declared]] = {}
        for kind in kinds:
            for name, declared in signature_options(kind).items():
                if name not in leave_out:
                    every.setdefault(name, []).append(declared)
        return {name: option(found, said.get(f"{prefix}{name}", "")) for name, found in sorted(every.items())}

    def with_target(kinds: Sequence[type], properties: Mapping[str, Schema], **more: Any) -> Schema:
        known = [f"{kind.__module__}.{kind.__name__}" for kind in kinds]
        target = {"type": "string", "description": "module.Class", "examples": known}
        return group({"_target_": target, **properties}, **more)

    models = [*_classes("models", BaseModel), *(k for k in users if _is_kind(k, BaseModel))]
    sets = [*_classes("datasets", BaseDataModule), *(k for k in users if _is_kind(k, BaseDataModule))]
    policies = [*_classes("augmentation/policies", Policy), *(k for k in users if _is_kind(k, Policy))]
    watchers = [k for k in _classes("callbacks", Callback) if not _needs_more(k)]

    model = united(models, "model.")
    model |= {
        name: option([declared], said.get(f"model.{name}", ""))
        for name, declared in model_options(BaseModel, stages).items()
    }
    short: dict[str, list[Any]] = {}
    for kind in models:
        for name, value in getattr(kind, "short", {}).items():
            short.setdefault(name, []).append(value)
    for name, values in short.items():
        own = model.get(name, {"anyOf": []})
        text = f"the short name of a variant: {said.get(f'model.{name}', '')}".rstrip(": ")
        variants = {"enum": [*values, None]}
        model[name] = {"description": text}
        if "anyOf" in own:  # else a family takes anything
            model[name] |= _either([variants, *own["anyOf"], _REFERENCE])
        else:
            model[name]["examples"] = values
    for name in (*AUTOMATIC_FROM_DATA, "num_classes"):  # null: the data say it
        model[name] = {**model[name], "anyOf": [{"type": "null"}, *model[name]["anyOf"]]}
    of_model = with_target(models, model)

    policy = with_target(policies, united(policies, "data.module.train_transforms."))
    nullable = _mapping_or(policy, {"type": "null"})
    roles = ("train_transforms", "test_transforms")
    module = united(sets, "data.module.", roles) | dict.fromkeys(roles, nullable)
    data = of({n: (t, inspect.Parameter.empty) for n, t in DATA_TYPES.items() if "." not in n}, "data.")
    data["cv"] = group(of({"k": (DATA_TYPES["cv.k"], 1)}, "data.cv."))
    data["module"] = with_target(sets, module)

    checkpoint = {n: d for n, d in signature_options(Checkpoints).items() if n != "folder"}

    def named_nodes(kinds: Sequence[Any], extra: Sequence[Any], handed_in: Collection[str] = ()) -> Schema:
        """Of `callbacks` and `logger`: null, or a node; one of ours has its options, another what its class takes."""
        rules = []
        for kind in kinds:
            path = f"{kind.__module__}.{kind.__name__}"
            own = {n: d for n, d in signature_options(kind).items() if n not in handed_in}
            rule = {"properties": {"_target_": {"const": path}}, "required": ["_target_"]}
            rules.append({"if": rule, "then": group(of(own, ""))})
        node = {"type": "object", "properties": {"_target_": {"type": "string"}}, "allOf": rules}
        return {"type": "object", "additionalProperties": _mapping_or(node, {"enum": list(extra)})}

    def engine(kind: type, name: str) -> Schema:
        options = group(of(_fields(kind), f"{name}."))
        return {"description": said.get(name, ""), **_mapping_or(options, {"type": "null"})}

    top = of({n: (t, inspect.Parameter.empty) for n, t in ROOT_TYPES.items()}, "")
    top |= of(_fields(SweepOptions), "")
    whole = group(
        {
            "defaults": {"type": "array", "description": "the files that this one is composed of (Hydra)"},
            **top,
            "pack": group(of(_fields(PackOptions), "pack.")),
            "tune": group(of(_fields(RangeOptions), "tune.")),
            "export": group(of(_fields(ExportOptions), "export.")),
            "cluster": engine(ClusterOptions, "cluster"),
            "ray": engine(RayOptions, "ray"),
            "search": engine(SearchOptions, "search"),
            "model": of_model,
            "data": group(data),
            "trainer": group(of(trainer_options(), "trainer.")),
            "checkpoint": group(of(checkpoint, "checkpoint.")),
            "callbacks": named_nodes(watchers, [None, False]),
            "logger": named_nodes(
                [loggers.Wandb, loggers.TensorBoard], [None, False, True], ("folder", "facts")
            ),
            "techniques": {
                "type": "object",
                "description": "written by the technique files: what each one set",
                "additionalProperties": {"type": ["object", "null"]},
            },
            "hydra": {"type": "object"},
        }
    )
    stated = yaml.safe_load((CONFIGS / "train.yaml").read_text(encoding="utf-8"))
    _state_defaults(whole, stated)
    head = {"$schema": DRAFT, "definitions": {"interpolation": INTERPOLATION}}
    return dict(zip(FILES, ({**head, **whole}, {**head, **of_model}), strict=True))


def _is_kind(kind: Any, base: type) -> bool:
    return inspect.isclass(kind) and issubclass(kind, base)


def _needs_more(kind: type) -> bool:
    """Whether it is made by Crucible, with what no option says."""
    return any(default is inspect.Parameter.empty for _, default in signature_options(kind).values())


def _state_defaults(schema: Schema, stated: Mapping[str, Any]) -> None:
    """Take the defaults that train.yaml states, in place."""
    for name, value in stated.items():
        own = schema.get("properties", {}).get(name)
        if own is None or name in ("defaults", "hydra"):
            continue
        if "properties" in own and isinstance(value, Mapping):
            _state_defaults(own, value)
        elif "description" in own or "anyOf" in own:
            own["default"] = value


def write(folder: Path, user_dir: Path | None = None) -> None:
    """Write both into a folder."""
    for name, schema in schemas(user_dir).items():
        (folder / name).write_text(as_text(schema), encoding="utf-8")


def as_text(schema: Schema) -> str:
    """As it is written."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
