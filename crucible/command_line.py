"""What the user typed, and what went wrong with it in one line. Imports nothing heavy."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from crucible.handover import VARIABLE, pass_on, received
from crucible.options import ConfigError, suggest
from crucible.writing import Unwritable, is_of_the_place, unwritable

BAD_INPUT = 2


def wants_tracebacks() -> bool:
    """Whether the user set HYDRA_FULL_ERROR=1; remembered for the processes that this one starts."""
    if os.environ.get(VARIABLE) is None:
        pass_on(tracebacks=os.environ.get("HYDRA_FULL_ERROR", "0") == "1")
    return received().tracebacks


def value_of(arguments: Sequence[str], key: str) -> str | None:
    """The value of the last `key=value` among the arguments."""
    values = [a.split("=", 1)[1] for a in arguments if a.startswith(f"{key}=")]
    return values[-1].strip("'\"") if values else None


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
    arguments = list(arguments)
    paths = [str(root)]
    user_dir = value_of(arguments, "user_dir")
    if user_dir not in (None, "null"):
        folder = Path(str(user_dir)).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"user_dir={user_dir}: no such folder", see="docs/extending.md")
        sys.path.insert(1, str(folder))
        paths.append(str(folder))
        configs = folder / "cli_configs" if (folder / "cli_configs").is_dir() else folder
        if not names_a_run(arguments):
            arguments.append(f"hydra.searchpath=[file://{configs}]")
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in paths]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths + inherited)  # for the processes of jobs and ranks
    if {"-m", "--multirun"} & set(arguments) and names_a_run(arguments):
        raise ConfigError("run=RUN works on one recorded run; it cannot be combined with -m")
    return arguments


def explain(error: Exception) -> int:
    """Print the one line that says what is wrong; the exit status.

    Mistakes of the user give status 2; anything else status 1, with the way to its traceback.
    """
    message, see = describe(error)
    if message is None:
        text = str(error).strip().splitlines()
        print(
            f"error: {type(error).__name__}: {text[0] if text else ''} (HYDRA_FULL_ERROR=1 shows where)",
            file=sys.stderr,
        )
        return 1
    print(f"error: {message} (see {see})" if see else f"error: {message}", file=sys.stderr)
    mistaken = not any(isinstance(cause, OSError) for cause in _causes(error)) or any(
        isinstance(cause, ConfigError) for cause in _causes(error)
    )
    return BAD_INPUT if mistaken else 1


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
    if match := re.search(r"Could not (?:override|append to config|delete from config).*?'([^']+)'", text):
        key = match.group(1)
        return f"{key}: no such option{suggest(key.rsplit('.', 1)[-1], _siblings(key))}", see
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
        return (
            f"cannot read the command line: {text.splitlines()[0]}; options are NAME=VALUE, lists quoted",
            see,
        )
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
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import initialize_config_dir

    groups = r"^(env|model|data|recipe|technique|sweep|debug|hydra\.searchpath)=(\[.*\]|[^,]+)$"
    arguments = [a for a in sys.argv[1:] if re.match(groups, a) and not a.startswith(f"{key}=")]
    GlobalHydra.instance().clear()
    folder = Path(__file__).resolve().parent.parent / "cli_configs"
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = compose("train", arguments)
    except Exception:  # whatever is wrong there, the one line is about `key`
        return []
    parent = key.rsplit(".", 1)[0] if "." in key else None
    node = OmegaConf.select(config, parent) if parent else config
    return [str(k) for k in node] if OmegaConf.is_dict(node) else [str(k) for k in config]


def quoted(value: str) -> str:
    """A text as the value of an override, for Hydra's grammar; plain words stay as they are."""
    if re.fullmatch(r"[A-Za-z][\w.+-]*", value):
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\'", value)
    return f"'{escaped}'"
