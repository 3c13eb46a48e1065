"""What the user typed, and what went wrong with it in one line. Imports nothing heavy."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from crucible.files import missing
from crucible.handover import pass_on, received
from crucible.masking import masked
from crucible.options import ConfigError, is_number, suggest
from crucible.other_words import flag_here, option_here
from crucible.writing import Unwritable, is_of_the_place, unwritable

BAD_INPUT = 2
_CONFIGS = Path(__file__).resolve().parent.parent / "cli_configs"
_imported_from: list[str] = []


def wants_tracebacks() -> bool:
    """Whether the user set HYDRA_FULL_ERROR=1; remembered for the processes that this one starts."""
    if received().tracebacks is None:
        pass_on(tracebacks=os.environ.get("HYDRA_FULL_ERROR", "0") == "1")
    return bool(received().tracebacks)


# Quoting: one rule for Hydra's grammar, which every option passes, and one for shells


def quoted(value: object) -> str:
    """A text as the value of an override, for Hydra's grammar; plain words and paths stay as they are."""
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _TYPED and not is_number(text):
        return text
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.+@%-]*")
_TYPED = ("true", "false", "null")


def unquoted(value: str) -> str:
    """The text that a value of the command line stands for: of a quoted one what is within, else the value itself."""
    quote = value[:1]
    if len(value) < 2 or quote not in ("'", '"') or not value.endswith(quote):
        return value
    return re.sub(rf"(\\+)(?={quote}|$)", lambda m: m[1][: len(m[1]) // 2], value[1:-1])


def as_typed(value: object) -> str:
    """A value that was read, as YAML writes it: `true`, `null`, `[1, 2]`."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n")[0]


def option(name: str, value: object) -> str:
    """`name=value` as Hydra reads it, for a text of any characters."""
    return f"{name}={quoted(value)}"


def command(*arguments: str, script: str = "main.py") -> str:
    """What to paste into a shell to give these arguments."""
    return shlex.join(["python", script, *arguments])


def typed_here() -> list[str]:
    """What this process was called with, but for the search path that `prepare` makes of a `user_dir`."""
    arguments = sys.argv[1:]
    paths = [number for number, a in enumerate(arguments) if a.startswith("hydra.searchpath=")]
    if paths and value_of(arguments, "user_dir") not in (None, "null", ""):
        del arguments[paths[-1]]
    return arguments


def value_of(arguments: Sequence[str], key: str) -> str | None:
    """The value of the last `key=value` among the arguments, without its quotes."""
    values = [a.split("=", 1)[1] for a in arguments if a.lstrip("+").startswith(f"{key}=")]
    return unquoted(values[-1]) if values else None


class Typed(NamedTuple):
    """An argument as Hydra reads it; `value` is a list where several were given, and None where it is taken away."""

    name: str
    value: Any


def parse(argument: str) -> Typed:
    """Read one `option=value` or `~option` by Hydra's grammar.

    Raises:
        ConfigError: where it cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(readable(argument))
        value: Any = None if override.is_delete() else override.value()
        if override.is_sweep_override():
            value = [_plain(v) for v in override.sweep_iterator()]
    except HydraException as error:
        raise ConfigError(_unreadable(argument), see="README.md") from error
    return Typed(override.key_or_group, value)


def _plain(value: Any) -> Any:
    return getattr(value, "text", value)


def _unreadable(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if not equals:
        return f"{argument}: options are NAME=VALUE, such as seed=1, or ~NAME to leave one out"
    way = shlex.quote(option(name, unquoted(value)))
    return f"{argument}: Hydra's grammar cannot read this value; as a text it is written {way}"


_OPEN = re.compile(r"[\[\](){}'\"]")
_NOT_HYDRAS = re.compile(r"[^A-Za-z0-9_/.,:+@%*?|$ \t\\-]")


def readable(argument: str) -> str:
    """An argument whose value has characters that Hydra's grammar has no place for, as the text that it is.

    So umlauts, `#`, `~/data` and names with `=` need no quotes; lists, mappings and quoted texts are left alone.
    """
    name, equals, value = argument.partition("=")
    if not equals or _OPEN.search(value) or not _NOT_HYDRAS.search(value):
        return argument
    return f"{name}={','.join(quoted(part) for part in value.split(','))}"


# Hydra's flags, by whether a value follows
_FLAGS = {
    "--help": False, "-h": False, "--hydra-help": False, "--version": False, "--cfg": True, "-c": True,
    "--resolve": False, "--package": True, "-p": True, "--run": False, "-r": False, "--multirun": False, "-m": False,
    "--shell-completion": False, "-sc": False, "--config-path": True, "-cp": True, "--config-name": True, "-cn": True,
    "--config-dir": True, "-cd": True, "--experimental-rerun": True, "--info": True, "-i": True,
}  # fmt: skip
_CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
_CHOICES |= {"-c": _CHOICES["--cfg"], "-i": _CHOICES["--info"]}


def _divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options and the flags among the arguments, in whatever order they were typed.

    Raises:
        ConfigError: for a flag that Hydra does not have, or one without its value.
    """
    options: list[str] = []
    flags: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            options.append(argument)
            continue
        name, equals, value = argument.partition("=")
        if name not in _FLAGS:
            follows = value if equals else next(iter(rest), "-")
            if here := flag_here(name, None if follows.startswith("-") or "=" in follows else follows):
                raise ConfigError(
                    f"{name}: no flag of Crucible's; here it is {here}", see="cli_configs/train.yaml"
                )
            bare = argument.lstrip("-")
            way = (
                f"options are written without dashes: {bare}"
                if equals
                else suggest(name, _FLAGS).lstrip("; ")
            )
            raise ConfigError(f"{argument}: no such flag; {way}", see="python main.py --help")
        flags.append(argument)
        if not _FLAGS[name]:
            continue
        if not equals:
            if not rest or rest[0].startswith("-") or "=" in rest[0]:
                if name in ("--info", "-i"):
                    continue  # its value may be left out
                allowed = f" ({', '.join(_CHOICES[name])})" if name in _CHOICES else ""
                raise ConfigError(
                    f"{name}: a value has to follow{allowed}", see="python main.py --hydra-help"
                )
            value = rest.pop(0)
            flags.append(value)
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ConfigError(
                f"{name} {value}: must be one of {', '.join(_CHOICES[name])}",
                see="python main.py --hydra-help",
            )
    return options, flags


def names_a_run(arguments: Sequence[str]) -> bool:
    """Whether the command works on a recorded run (`run=RUN`) instead of composing a new one."""
    return value_of(arguments, "run") is not None


def prepare(arguments: Sequence[str], root: Path) -> list[str]:
    """Put the user's folder on the import and config paths, and note which options a multirun sweeps.

    Args:
        arguments: as typed, without the program.
        root: the checkout.

    Returns:
        the arguments for Hydra.

    Raises:
        ConfigError: for a `user_dir` that is not there.
    """
    options, flags = _divided(arguments)
    options = [readable(_without_null(o)) for o in options]
    paths = [str(root)]
    user_dir = value_of(options, "user_dir")
    if user_dir not in (None, "null", ""):
        folder = Path(str(user_dir)).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(
                f"user_dir={user_dir}: {missing(Path(str(user_dir)).expanduser())}", see="docs/extending.md"
            )
        pass_on(user_dir=str(folder))
        configs = folder / "cli_configs" if (folder / "cli_configs").is_dir() else folder
        if not names_a_run(options):
            options.append(f"hydra.searchpath=[{quoted(f'file://{configs}')}]")
    if (told := received().user_dir) is not None:
        import_from(told)
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in paths]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths + inherited)  # for the processes of jobs and ranks
    if names_a_run(options) and flags:
        if {"-m", "--multirun"} & set(flags):
            raise ConfigError(
                "run=RUN works on one recorded run; it cannot be combined with -m", see="README.md"
            )
        if not {"-h", "--help"} & set(flags):
            raise ConfigError(
                f"{flags[0]}: run=RUN takes no flags; its options are name=value", see="README.md"
            )
        return flags
    return [*options, *flags]  # Hydra takes its options in one piece


_LISTS = ("technique", "sweep")
_GROUPS = ("debug", "recipe")


def _without_null(argument: str) -> str:
    """Groups that ask for nothing by default may be typed so: Hydra has no word for it."""
    name, _, value = argument.partition("=")
    if name in _LISTS and value == "null":
        return f"{name}=[]"
    return f"~{name}" if name in _GROUPS and value == "null" else argument


def with_plus(arguments: Sequence[str], error: Exception) -> list[str] | None:
    """The arguments for another try, where `error` is Hydra's of an option that no file of the configuration names.

    A class may take more options than its file holds (`data.module.train_transforms.padding`), and a mapping that
    is null may be given piece by piece; the checks that follow know what each class takes. None: it is no such error.
    """
    match = _MISSING.search(str(error))
    if match is None or "." not in match[1]:
        return None
    name = match[1]
    parent = name.rpartition(".")[0]
    if parent.split(".")[0] not in _WITH_CLASSES or not _takes_more(parent):
        return None
    changed = [f"+{a}" if a.partition("=")[0] == name else a for a in arguments]
    return changed if changed != list(arguments) else None


_MISSING = re.compile(r"Could not (?:override|append to config|delete from config).*?'([^']+)'")
_WITH_CLASSES = ("model", "data", "callbacks", "logger", "cluster")


def _takes_more(parent: str) -> bool:
    """Whether the mapping `parent` has a class that knows its options, or is null and may become one."""
    config = _composed("")
    if config is None or parent in ("model", "data", "callbacks", "logger", "cluster"):
        return False
    above, _, leaf = parent.rpartition(".")
    holder = OmegaConf.select(config, above) if above else config
    if not OmegaConf.is_dict(holder) or leaf not in holder:
        return False
    node = holder[leaf]
    return node is None or (OmegaConf.is_dict(node) and ("_target_" in node or leaf.endswith("_kwargs")))


def import_from(user_dir: str) -> None:
    """Put the user's folder at the end of the import path, where it shadows nothing; one at a time.

    The processes that this one starts are told of it and do the same: PYTHONPATH would put it before the
    installed packages.
    """
    for earlier in set(_imported_from) - {user_dir}:
        sys.path[:] = [path for path in sys.path if path != earlier]
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(f"{earlier}{os.sep}"):
                del sys.modules[name]
    _imported_from[:] = [user_dir]
    if user_dir not in sys.path:
        sys.path.append(user_dir)


def explain(error: Exception) -> int:
    """Print the one line that says what is wrong; the exit status.

    Mistakes of the user give status 2; anything else status 1, with the way to its traceback.
    """
    message, see = describe(error)
    if message is None:
        text = str(error).strip().splitlines()
        line = masked(text[0]) if text else ""
        print(
            f"error: {type(error).__name__}: {line} (HYDRA_FULL_ERROR=1 shows where)",
            file=sys.stderr,
        )
        return 1
    message = masked(_at_home(message))
    print(f"error: {message} (see {see})" if see else f"error: {message}", file=sys.stderr)
    # Hydra's error of a group without that choice is an OSError by its class
    of_the_system = any(
        isinstance(c, OSError) and (c.errno or isinstance(c, Unwritable)) for c in _causes(error)
    )
    mistaken = not of_the_system or any(isinstance(cause, ConfigError) for cause in _causes(error))
    return BAD_INPUT if mistaken else 1


def _at_home(message: str) -> str:
    """The message; where another project's word is what it complains of, what that is called here instead."""
    for argument in sys.argv[1:]:
        name, _, value = argument.lstrip("+~").partition("=")
        # a class is complained of by its own name
        named = name in message or ("." in value and value.rpartition(".")[2] in message)
        if named and (here := option_here(argument)):
            return f"{argument}: here it is {here}"
    return message


def describe(error: Exception) -> tuple[str | None, str]:
    """The one-line message of a mistake, and where to look; (None, "") for what is not the user's mistake."""
    mistake = next((e for e in _causes(error) if isinstance(e, ConfigError)), None)
    if mistake is not None:
        return str(mistake), mistake.see
    for cause in _causes(error):
        if isinstance(cause, Unwritable):
            return str(cause), ""
        if isinstance(cause, OSError) and is_of_the_place(cause):
            return str(unwritable(Path(cause.filename or "."), cause)), ""
    type_name, text, see = type(error).__name__, str(error), "cli_configs/train.yaml"
    chain = " ".join(str(e) for e in _causes(error))
    if match := re.search(r"Environment variable '(\w+)' not found", chain):
        return (
            f"the environment variable {match.group(1)} is not set; env=cluster needs it",
            "cli_configs/env",
        )
    if match := re.search(r"Ambiguous value for argument '([^']*(?:'[^=]*')?[^']*)'", text):
        name, _, value = match[1].partition("=")
        return (
            f"{match[1]}: several values are a sweep, python main.py -m ...; a list is {name}=[{value}], and a text "
            f"with commas {shlex.quote(option(name, value))}",
            "docs/sweeps.md",
        )
    if "Config group override must be a string or a list" in text:
        groups = {folder.name for folder in _CONFIGS.iterdir() if folder.is_dir()}
        typed = [a for a in sys.argv[1:] if a.lstrip("+").partition("=")[0] in groups]
        wrong = next((a for a in typed if not isinstance(parse(a).value, (str, list))), " ".join(typed))
        group = wrong.partition("=")[0]
        names = ", ".join(sorted(f.stem for f in (_CONFIGS / group).glob("*.yaml")))
        return f"{wrong}: must be the name of a file in cli_configs/{group}: {names}", f"cli_configs/{group}"
    if match := _MISSING.search(text):
        key = match.group(1)
        return f"{_as_typed(key)}: no such option{suggest(key.rsplit('.', 1)[-1], _siblings(key))}", see
    damaged = next((e for e in _causes(error) if isinstance(e, yaml.MarkedYAMLError)), None)
    if damaged is not None and damaged.problem_mark is not None:
        mark = damaged.problem_mark
        return (
            f"{mark.name}, line {mark.line + 1}: no valid YAML: {damaged.problem or damaged.context}; "
            "mend that line",
            "https://yaml.org",
        )
    if match := re.search(r"(?:Could not find|In '[^']*': Could not find) '([^']+)/([^'/]+)'", text):
        group, choice = match.groups()
        available = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        near = difflib.get_close_matches(choice, available, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return (
            f"{group}={choice}: no such choice; there are {', '.join(sorted(available))}{hint}",
            f"cli_configs/{group}",
        )
    if (
        type_name in ("OverrideParseException", "LexerNoViableAltException", "HydraException")
        or "parsing override" in text
    ):
        override = getattr(error, "override", None)
        if not override and (match := re.search(r"parsing override '(.*)'", text)):
            override = match[1]
        if override:
            return _unreadable(str(override)), see
        return (
            f"cannot read the command line: {text.splitlines()[0]}; options are NAME=VALUE, lists quoted",
            see,
        )
    if match := re.search(
        r"Error in call to target '([^']+)':\s*(.*?)(?:\s*full_key: (\S+))?\s*$", text, re.DOTALL
    ):
        reason = " ".join(match[2].replace("\\n", " ").split())
        where = f"{match[3]}._target_={match[1]}" if match[3] else f"_target_={match[1]}"
        return f"{where}: it cannot be made of its options: {reason}; change them", see
    if type_name in (
        "ConfigCompositionException",
        "MissingConfigException",
        "ConfigAttributeError",
        "ConfigKeyError",
        "MissingMandatoryValue",
        "InterpolationKeyError",
        "ValidationError",
        "ConfigTypeError",
    ):
        first = [line for line in text.splitlines() if line.strip()]
        return "; ".join(first[:2]), see
    return None, ""


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _siblings(key: str) -> list[str]:
    """The options that stand where `key` was looked for, in the configuration composed without it.

    Empty where it cannot be composed either.
    """
    config = _composed(key)
    if config is None:
        return []
    parent = key.rpartition(".")[0]
    while parent and not OmegaConf.is_dict(OmegaConf.select(config, parent)):
        parent = parent.rpartition(".")[0]
    return [str(k) for k in (OmegaConf.select(config, parent) if parent else config)]


def _composed(key: str) -> Any:
    """The configuration of the groups that were typed, without the option `key`; None where it cannot be composed."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import initialize_config_dir

    groups = r"^(env|model|data|recipe|technique|sweep|debug|hydra\.searchpath)=(\[.*\]|[^,]+)$"
    arguments = [a for a in sys.argv[1:] if re.match(groups, a) and not a.startswith(f"{key}=")]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(_CONFIGS), version_base="1.3"):
            return compose("train", arguments)
    except Exception:  # whatever is wrong there, the one line is about `key`
        return None


def _as_typed(key: str) -> str:
    """`key=value` as it stands on the command line; the key alone where it does not."""
    return next((a for a in sys.argv[1:] if a.lstrip("+~").partition("=")[0] == key), key)
