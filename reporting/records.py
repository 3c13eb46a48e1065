"""Run directories and sweeps as the report reads them: everything of a run but its curves, read once."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from crucible.cells import text_of
from crucible.command_line import command
from crucible.command_line import option as as_typed
from crucible.configuration import flatten
from crucible.console import epoch_named
from crucible.files import is_put_aside
from crucible.masking import masked, masked_in
from crucible.metrics import of_split
from crucible.options import ConfigError, suggest
from crucible.run import RunDirectory
from reporting.looks import Order
from reporting.request import SEE, Metric, Request

UNDER_CORRUPTIONS = ("acc_corrupted", "ece_corrupted", "mce")
Unit = tuple[int, int]  # (seed, fold): what a technique and the baseline are paired by
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Decides(NamedTuple):
    """What a sweep of `until=decided` fixed besides: its looks are `Sweep.planned`."""

    seeds: tuple[int, ...]  # in the order in which they are run
    fold: int
    metric: str
    futility: float
    order: Order


@dataclass(frozen=True)
class Sweep:
    """What a sweep fixed before its runs. `margin_points` in percentage points, `planned` seeds (or looks)."""

    folder: str
    design: str
    margin_points: float | None
    planned: tuple[int, ...]
    created: float
    runs: frozenset[str]
    baseline: str | None
    rivals: Mapping[str, str]  # arm -> the baseline trained for as long as that arm takes
    command: str
    rule: int  # of the verdicts, by which it was planned
    techniques: frozenset[str]  # the arms that were planned, but for the baseline and its rivals
    decides: Decides | None = None  # of `until=decided`
    identities: Mapping[str, str] = field(default_factory=dict)  # arm -> its runs'; older plans recorded none
    units: tuple[Unit, ...] = ()  # of each arm, in the order planned, where that is recorded

    @property
    def plan(self) -> tuple[Any, ...]:
        """Equal for all records of one plan of `until=decided`, and for those of no other."""
        known = frozenset(self.identities.items())
        return self.planned, self.techniques, self.decides, self.baseline, known

    def arm_of(self, run: Run) -> str | None:
        """The arm of this plan that a run is of, as the plan calls it; None: of none.

        By the run's identity, as a report over several sweeps may name arms otherwise, and has others of the same name;
        of what a plan recorded without identities, or before they were made otherwise, by name and plan.
        """
        for name, identity in self.identities.items():
            if identity == run.identity:
                return name
        planned = run.arm in self.techniques or run.arm == (self.baseline or "baseline")
        return run.arm if planned and run.sweep is not None and run.sweep.plan == self.plan else None


class Correctness(NamedTuple):
    """Which test examples a run got right: packed bits in the order of the samples' numbers."""

    bits: bytes
    examples: int
    samples: str  # digest of the samples' numbers
    calibration: NDArray[np.float64]  # (3, bins): examples, summed confidence, summed hits; by confidence

    def unpack(self) -> NDArray[np.bool_]:
        """(examples,)"""
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.examples).view(np.bool_)


class Tested(NamedTuple):
    """A test of a run's weights under all corruptions (`lab.robustness`).

    `values` holds the means over corruptions, and the clean ones as `clean_acc` and the like; `cells` every metric by
    corruption and severity; `kind` is equal for tests that can be compared.
    """

    values: Mapping[str, float]
    cells: Mapping[str, Mapping[str, Mapping[str, float]]]
    samples: int
    kind: str


@dataclass(frozen=True)
class Run:
    """A finished or diverged run: where it belongs and what came out."""

    path: Path
    data: str
    arm: str
    techniques: frozenset[str]
    unit: Unit
    final: Mapping[str, float]
    value: float | None
    diverged: str
    seconds: float | None
    images_per_s: float | None
    memory_mb: float | None
    parameters: int | None
    settings: Mapping[str, Any]
    owned: frozenset[str]
    overrides: tuple[str, ...]
    commit: str
    dirty: bool
    device: str
    versions: Mapping[str, str]
    started: float
    identity: str  # of all that changes the result but the seed; empty where none is recorded
    corrected: Mapping[str, int]  # {option: version} of numbers that have been corrected
    sweep: Sweep | None
    correctness: Correctness | None
    remark: str  # what is wrong with its records
    nonfinite: str  # what was done about numbers that were not finite
    unreadable: str  # what its data lacked
    ended_early: str  # why it did, and after how many epochs
    dropped: bool  # its sweep went on without it (`drop_failed`), whatever becomes of it
    tested: Mapping[str, Tested] = field(default_factory=dict)  # under corruptions, by whose weights
    kind: str = ""  # of runs whose steps take equally long, but for the technique's passes
    passes: float = 1.0
    steps: int = 0
    elapsed: float | None = None  # seconds, with all that is not training
    broke: str = ""  # why its training did not go on, if it diverged
    data_fingerprint: str = ""  # of what its data contain; empty where none is recorded
    contents: Mapping[str, str] = field(default_factory=dict)  # option -> fingerprint of its file
    files: frozenset[str] = frozenset()  # options whose settings `with_contents` made names of files
    recognised: bool = False  # its identity is by a fingerprint that is not made any more

    def scored_by(self, metric: Metric) -> Run:
        """The run as another report has it that reads this metric of the last epoch."""
        value = self.final.get(metric.name)
        return replace(self, value=value, diverged=self.broke or _why_diverged(value, metric, self.settings))

    @property
    def compiled(self) -> bool:
        return bool(self.settings.get("model.compile"))

    def curves(self) -> dict[str, NDArray[np.float64]]:
        """The columns of metrics.csv, (epochs,) each; NaN where an epoch has no value."""
        try:
            with (self.path / "metrics.csv").open(newline="", encoding="utf-8") as stream:
                head, *rows = csv.reader(stream)
            values = np.array([[float(cell or "nan") for cell in row] for row in rows], dtype=np.float64)
            return dict(zip(map(text_of, head), values.reshape(-1, len(head)).T, strict=True))
        except (OSError, ValueError):
            return {}


@dataclass(frozen=True)
class LeftOut:
    """A run directory that cannot be counted, and why."""

    path: Path
    status: str
    reason: str


Reader = Callable[[Path, Request, Sequence[Sweep]], Run | LeftOut]


def read_runs(request: Request, reader: Reader | None = None) -> tuple[list[Run], list[LeftOut]]:
    """All runs under the folders: those that count (finished or diverged), and the others.

    Args:
        request: says where.
        reader: reads one of them; None: `read_run`.

    Raises:
        ConfigError: where there is no run, or no run has the metric.
    """
    paths = {p.resolve(): p for folder in request.folders for p in find_runs(folder)}
    if not paths:
        names = ",".join(map(str, request.folders))
        raise ConfigError(f"runs={names}: no run directory there (one has a summary.json)", see=SEE)
    sweeps = _read_sweeps(paths)
    read = [(reader or read_run)(path, request, sweeps) for path in paths.values()]
    runs = [r for r in read if isinstance(r, Run)]
    if runs and all(r.value is None and not r.diverged for r in runs):
        if request.best and not of_split(request.metric.name, "val"):
            raise ConfigError(f"checkpoint=best: no run has tested its best weights{_to_test(runs)}", see=SEE)
        if request.metric.base in UNDER_CORRUPTIONS:
            which = "best" if request.best else "last"
            again = command(as_typed("run", f"{runs[0].path.parent}/*"), "task=test", "each=true", f"ckpt_path={which}",
                            "data.module.corruption=all")  # fmt: skip
            raise ConfigError(
                f"metric={request.metric.name}: no run has tested its {which} weights under all corruptions; {again} "
                "does",
                see=SEE,
            )
        known = sorted({name for run in runs for name in run.final})
        hint = suggest(request.metric.name, known) or "; they have none"
        raise ConfigError(f"metric={request.metric.name}: no finished run has it{hint}", see=SEE)
    return runs, [r for r in read if isinstance(r, LeftOut)]


def _to_test(runs: Sequence[Run]) -> str:
    """How a reader gets there; without best weights a test would be one of the last."""
    if remark := next((r.remark for r in runs if r.remark), ""):
        return f": {remark}"
    kept = next((r.path for r in runs if (r.path / "checkpoints" / "best.ckpt").is_file()), None)
    if kept is None:
        return (
            ", and none has kept them (as with sweep=ablation); train with checkpoint.keep=best fresh=true, then "
            "python main.py run=RUN task=test"
        )
    return f"; {shlex.join(['python', 'main.py', f'run={kept}', 'task=test'])} does, for one run"


def find_runs(folder: Path) -> Iterable[Path]:
    """The run directories at any depth below a folder, or the folder itself."""
    for place, folders, files in os.walk(folder):
        names = {*files, *folders}  # a folder may stand where a file belongs
        if "summary.json" in names or {"config.yaml", "overrides.yaml"} <= names:
            folders.clear()
            yield Path(place)
        else:
            folders[:] = sorted(f for f in folders if f[0] != "." and not is_put_aside(f))


def read_run(path: Path, request: Request, sweeps: Sequence[Sweep], dropped: bool = False) -> Run | LeftOut:
    """One run directory.

    Args:
        path: of the run.
        request: says by which metric.
        sweeps: those recorded beside it.
        dropped: whether its sweep is to go on without it, which its summary need not say yet.
    """
    try:
        summary, config = _read_record(path)
    except ConfigError as error:
        return LeftOut(path, "unreadable", str(error).removeprefix(f"run={path}: "))
    status, reason = str(summary.get("status", "unfinished")), str(summary.get("reason") or "")
    broke = ""
    if status == "failed" and reason.startswith("diverged"):
        broke = reason.removeprefix("diverged").lstrip(": ") or "stopped"
    dropped = dropped or bool(summary.get("dropped"))
    if status != "finished" and not broke and not dropped:
        return _left_out(path, status, reason)
    settings = {**_defaults(), **masked_in(flatten(config))}
    module = (config.get("data") or {}).get("module") or {}
    techniques = frozenset(summary.get("techniques") or ()) - {"baseline"}
    arm = str(summary.get("arm") or "+".join(sorted(techniques)) or "baseline")
    tested = read_tests(path, summary.get("data_fingerprint"))
    final = _numbers(summary.get("final")) | _means_of("last", tested)
    value, remark = _scored(path, summary, final, tested, request)
    diverged = broke or _why_diverged(value, request.metric, settings)
    correctness = None
    if value is not None and not diverged and request.metric.name == "test/acc":
        correctness, remark = _read_correctness(path, value, request.best)
    remark = "; ".join(text for text in (remark, _curve_remark(path)) if text)
    git = summary.get("git") or {}
    return Run(
        path=path,
        data=str(module.get("name") or path.resolve().parent.name),
        arm=arm,
        techniques=techniques,
        unit=(int(summary.get("seed", config.get("seed", 0)) or 0), int(module.get("fold") or 0)),
        final=final,
        value=value,
        diverged=diverged,
        seconds=_positive(summary.get("wall_time_s")),
        images_per_s=_positive(summary.get("images_per_s")),
        memory_mb=_positive(summary.get("peak_memory_mb")),
        parameters=summary.get("parameters"),
        settings=settings,
        owned=_owned(arm, config),
        overrides=_read_overrides(path),
        commit=str(git.get("commit") or "")[:10],
        dirty=bool(git.get("dirty")),
        device=str(summary.get("device") or ""),
        versions=summary.get("versions") or {},
        started=float(summary.get("started") or 0.0),
        identity=str(summary.get("identity") or ""),
        corrected=summary.get("corrected") or {},
        sweep=_sweep_of(path, summary, sweeps),
        correctness=correctness,
        remark=remark,
        nonfinite=_nonfinite(summary),
        unreadable=_unreadable(summary),
        ended_early=_ended_early(summary),
        dropped=dropped,
        tested=tested,
        kind=str(summary.get("kind") or ""),
        passes=_positive(summary.get("passes")) or 1.0,
        steps=int(_positive(summary.get("steps")) or 0),
        elapsed=_positive(summary.get("elapsed_s")),
        broke=broke,
        data_fingerprint=str(summary.get("data_fingerprint") or ""),
        contents=summary.get("contents") or {},
        recognised="recognised" in summary,
    )


def _read_record(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summary and configuration of a run.

    Raises:
        ConfigError: in one line, what is damaged or missing.
    """
    run = RunDirectory(path)
    summary = run.summary()
    try:
        config = parse_config((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    whole = isinstance(config, dict) and len(flatten(config)) >= summary.get("options", 0)
    return summary, config if whole else run.config()


def _curve_remark(path: Path) -> str:
    """Why a run has no curve, where its metrics.csv is damaged."""
    file = path / "metrics.csv"
    try:
        content = file.read_bytes()
        whole = content.endswith(b"\n") and b"epoch" in content.partition(b"\n")[0].split(b",")
    except FileNotFoundError:
        return ""
    except OSError:
        whole = False
    way_on = f"{shlex.join(['python', 'main.py', f'run={path}'])} keeps the rows that can be read"
    return "" if whole else f"metrics.csv is damaged, so that its curve is not drawn; {way_on}"


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    """What an option had that the code of a run did not know yet: a new option's default changes nothing."""
    file = Path(__file__).resolve().parent.parent / "cli_configs" / "train.yaml"
    options = flatten(_parse(file.read_text(encoding="utf-8")))
    rooms = ("model.", "data.", "trainer.", "on_nonfinite", "rollback_")
    return {
        k: v for k, v in options.items() if k.startswith(rooms) and not (isinstance(v, str) and "${" in v)
    }


def _left_out(path: Path, status: str, reason: str) -> LeftOut:
    resume = f"go on with: {shlex.join(['python', 'main.py', f'run={path}'])}"
    if status == "running":
        lives = RunDirectory(path).state() == "running"
        status, reason = ("running", "") if lives else ("lost", f"stopped without a word; {resume}")
    elif status in ("interrupted", "unfinished"):
        reason = f"{reason}; {resume}" if reason else resume
    return LeftOut(path, status, reason)


def _nonfinite(summary: Mapping[str, Any]) -> str:
    """What a run that came to its end left out, or went back for."""
    skipped = summary.get("skipped_nonfinite") or 0
    back = [e for e in summary.get("nonfinite") or () if str(e.get("action")).startswith("rollback")]
    parts = [f"{skipped} steps were not finite and left out"] if skipped else []
    parts += [f"{epoch_named(e['epoch'])}, step {e['step']}: {e['what']}; {e['action']}" for e in back]
    return "; ".join(parts)


def _ended_early(summary: Mapping[str, Any]) -> str:
    """That a run was shorter than what was asked for."""
    reason = summary.get("ended_early")
    return f"ended early, after {summary.get('epochs')} epochs: {reason}" if reason else ""


def _unreadable(summary: Mapping[str, Any]) -> str:
    """What a run left out of its data under `data.module.on_error=skip`."""
    splits = summary.get("unreadable") or {}
    parts = [
        f"{found['count']} of the {split} split ({', '.join(found['samples'][:3])})"
        for split, found in splits.items()
    ]
    return f"samples that could not be read were skipped: {'; '.join(parts)}" if parts else ""


def _numbers(values: Any) -> dict[str, float]:
    return {k: float(v) for k, v in (values or {}).items() if isinstance(v, (int, float))}


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


def _scored(
    path: Path,
    summary: Mapping[str, Any],
    final: Mapping[str, float],
    tested: Mapping[str, Tested],
    request: Request,
) -> tuple[float | None, str]:
    """The metric of the last weights, or of those that were best on validation; and why there is none."""
    name = request.metric.name
    if not request.best:
        return final.get(name), ""
    if of_split(name, "val"):
        return _numbers(summary.get("best")).get(name), ""
    if name in (means := _means_of("best", tested)):
        return means[name], ""
    again = command(as_typed("run", path), "task=test")
    try:
        record = json.loads((path / "test.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        return None, f"test.json is damaged; {again} makes it anew"
    if record.get("checkpoint") != "best.ckpt":
        return None, ""
    own = summary.get("data_fingerprint")
    if (own and record.get("data", own) != own) or _images_differ(path):
        return None, f"test.json is of other data than the run's; {again} tests its own"
    return _numbers(record.get("metrics")).get(name), ""


def _images_differ(path: Path) -> bool:
    """Whether the best weights were tested on other images than the last: older records do not say on which."""
    try:
        with np.load(path / "test_correct.npz") as last, np.load(path / "test_correct_best.npz") as best:
            return any(str(last[key]) != str(best[key]) for key in ("count", "samples"))
    except (OSError, ValueError, KeyError):
        return False


def read_tests(path: Path, own_data: Any) -> dict[str, Tested]:
    """A run's tests of its own data under all corruptions, by whose weights they are (`best`, `last`).

    Of several with the same weights, that with the most images.

    Args:
        path: the run's.
        own_data: fingerprint of its data; None: an older run's, which recorded none.
    """
    found: dict[str, Tested] = {}
    for file in sorted(path.glob("tests/*/corruptions_*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            test = Tested(
                values={f"clean_{k}": float(v) for k, v in record["clean"].items()}
                | {k: float(v) for k, v in record["averages"].items()},
                cells=record["cells"],
                samples=int(record["samples"]),
                kind=json.dumps([record[n] for n in ("data", "samples", "version")]),
            )
            mine = record["own_data"] and own_data in (None, record["data"])
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            continue  # the test that wrote it makes it anew
        weights = file.stem.removeprefix("corruptions_")
        known = found.get(weights)
        if mine and record["averages"] and (known is None or known.samples < test.samples):
            found[weights] = test
    return found


def _means_of(weights: str, tested: Mapping[str, Tested]) -> dict[str, float]:
    """The means over corruptions as metrics are logged."""
    values = tested[weights].values if weights in tested else {}
    return {f"test/{k}": v for k, v in values.items() if not k.startswith("clean_")}


def _why_diverged(value: float | None, metric: Metric, settings: Mapping[str, Any]) -> str:
    """Why the final value, if there is one, says that training failed: not a number, or no better than guessing."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return f"{metric.name} is {value}"
    classes = settings.get("data.num_classes")
    if metric.base == "acc" and isinstance(classes, int) and classes > 1:
        chance = 1 / classes
        if value < chance + 0.02 * (1 - chance):
            return f"{metric.name} is {metric.formatted(value)}%, which is guessing among {classes} classes"
    return ""


def _owned(arm: str, config: Mapping[str, Any]) -> frozenset[str]:
    """The options that make the arm: those its techniques set, and those its name spells out."""
    techniques = config.get("techniques") or {}
    names = {name for options in techniques.values() for name in options or {}}
    names |= {
        ".".join(name.split(".")[:2]) for name in names if name.startswith("callbacks.")
    }  # all of its node
    for option in re.findall(r"([\w.]+)=", arm):
        names |= {option, f"model.{option}"}
    return frozenset(names)


def _read_overrides(path: Path) -> tuple[str, ...]:
    try:
        overrides = _parse((path / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return ()
    return tuple(masked(str(o)) for o in overrides) if isinstance(overrides, list) else ()


def _read_correctness(path: Path, accuracy: float, best: bool) -> tuple[Correctness | None, str]:
    file = path / ("test_correct_best.npz" if best else "test_correct.npz")
    if not file.is_file():
        return None, ""
    try:
        with np.load(file) as content:
            found = Correctness(
                content["correct"].tobytes(),
                int(content["count"]),
                str(content["samples"]),
                content["calibration"].astype(np.float64),
            )
        hits = found.unpack().mean()
    except (OSError, ValueError, KeyError) as error:
        return None, f"{file.name} cannot be read ({error})"
    if abs(hits - accuracy) > 1e-6:
        return (
            None,
            f"{file.name} is of other weights: it has {hits:.4f} right, the summary says {accuracy:.4f}",
        )
    return found, ""


# Sweeps: exp_dir/sweeps/<time>/sweep.json


def _read_sweeps(paths: Iterable[Path]) -> list[Sweep]:
    """The sweeps recorded beside these runs, newest last."""
    found = []
    for folder in sorted({path.parent.parent for path in paths}):
        for file in sorted(folder.glob("sweeps/*/sweep.json")):
            try:
                record = json.loads(file.read_text(encoding="utf-8"))
                found.append(read_sweep(record, str(file.parent)))
            except (OSError, ValueError, TypeError, AttributeError):
                continue  # a sweep that is being written; its runs carry its facts themselves
    return sorted(found, key=lambda s: (s.created, s.folder))


def read_sweep(record: Mapping[str, Any], folder: str) -> Sweep:
    """What a sweep recorded, of itself or in one of its runs."""
    planned = record.get("planned_seeds")
    margin = record.get("margin_points")
    listed = record.get("runs") or ()
    runs = [r if isinstance(r, str) else (r.get("run") or r.get("path") or "") for r in listed]
    created = record.get("created")
    baseline, rivals = record.get("baseline"), record.get("rivals") or {}
    decides = record.get("decides")
    if decides:
        units = [(int(seed), int(decides["fold"])) for seed in decides["seeds"]]
    else:
        own = (r for r in listed if not isinstance(r, str) and r.get("seed") is not None)
        units = [(int(r["seed"]), int(r.get("fold") or 0)) for r in own]
    return Sweep(
        folder=folder,
        design=str(record.get("design") or ""),
        margin_points=None if margin is None else float(margin),
        planned=tuple(int(p) for p in (planned if isinstance(planned, list) else [planned]) if p),
        created=float(created) if isinstance(created, (int, float)) else 0.0,
        runs=frozenset(Path(r).name for r in runs),
        baseline=baseline,
        rivals=rivals,
        command=masked(str(record.get("command") or "")),
        rule=int(record.get("rule") or 1),
        techniques=frozenset(record.get("arms") or ()) - {*rivals.values(), baseline or "baseline"},
        decides=Decides(**{**decides, "seeds": tuple(decides["seeds"])}) if decides else None,
        identities=record.get("identities") or {},
        units=tuple(dict.fromkeys(units)),
    )


def _sweep_of(path: Path, summary: Mapping[str, Any], sweeps: Sequence[Sweep]) -> Sweep | None:
    listed = [s for s in sweeps if path.resolve().name in s.runs]
    if listed:
        return listed[0]  # the first that planned this run; what came later found it finished
    own = summary.get("sweep")
    return read_sweep(own, str(own.get("folder") or "")) if isinstance(own, dict) else None


# Configurations: thousands of them, nearly all of whose lines are the same


def parse_config(text: str) -> Any:
    """The YAML of a recorded configuration; lines that other configurations had too are parsed once."""
    if re.search(r"(^|\s)[&*]\w", text):  # anchors lead out of their lines
        return yaml.load(text, _LOADER)
    return _parse_mapping(text.splitlines())


def _parse_mapping(lines: list[str]) -> Any:
    """A block mapping, entry by entry: an entry goes to the next line that starts with a key."""
    starts = [i for i, line in enumerate(lines) if line and (line[0].isalnum() or line[0] in "_'\"")]
    if not starts or starts[0] != 0:
        return _parse("\n".join(lines))
    whole: dict[str, Any] = {}
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        head, rest = lines[start], lines[start + 1 : end]
        is_mapping = head.endswith(":") and rest and all(r.startswith("  ") for r in rest)
        if is_mapping and not rest[0].lstrip().startswith(("-", "'", '"')):
            key = _parse(head[:-1])
            whole[key] = _parse_mapping([r[2:] for r in rest])
        else:
            entry = _parse("\n".join([head, *rest]))
            if not isinstance(entry, dict):
                return _parse("\n".join(lines))
            whole.update(entry)
    return whole


@lru_cache(maxsize=65536)
def _parse(text: str) -> Any:
    return yaml.load(text, _LOADER)
