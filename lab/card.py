"""A model card: what the record of a run says of its weights, in Markdown. What it does not say is said to be unknown.

python main.py run=RUN task=card
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy.stats import binomtest

from crucible.calibration import recorded_calibrations
from crucible.command_line import command
from crucible.configuration import Config, find_target
from crucible.console import say
from crucible.files import why_not_writable, write_atomically
from crucible.machine import world_size
from crucible.metrics import base_name, of_split
from crucible.options import ConfigError, option_text
from crucible.run import RunDirectory
from datasets.base_datamodule import BaseDataModule
from datasets.images import SampleError
from lab.build import file_fingerprint, read_checkpoint
from lab.recorded import completed
from lab.scoring import DataToScore, data_if_there, trained_classes
from lab.summary import build_on_meta, count_multiply_adds, input_shape
from lab.use import described_transform
from models.base_model import BASICS
from models.techniques import technique_kinds

SEE = "docs/export.md"
LEVEL = 0.95
LAST = "last step"
UNEQUAL = 1.5  # the largest class by the smallest, from which on a card says so
_NAMED = 20  # classes that are listed
_ARXIV = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")
_PIPELINES = {("classification", 2): "image-classification"}
_UNKNOWN = "not known"


class Shipped(NamedTuple):
    """The file that a card lies beside: name, format, bytes, what it says of itself, and how it was checked."""

    name: str
    kind: str
    size: int
    says: Mapping[str, Any]
    checked: str


class Value(NamedTuple):
    """A metric of some weights on some images; `samples` is None where their number is not recorded."""

    weights: str
    on: str
    name: str
    value: float
    samples: int | None


def write_card(run: RunDirectory, config: Config, checkpoint: Path, out: Path | None) -> int:
    """Write the card of the weights of `checkpoint`, and say where; the exit status.

    Args:
        run: the recorded run.
        config: its configuration, with what was typed.
        checkpoint: the weights.
        out: the file; None: `RUN/card.md`, of other weights than the best ones `RUN/card-<checkpoint>.md`.

    Raises:
        ConfigError: where it cannot be written.
    """
    name = "card.md" if checkpoint.stem == "best" else f"card-{checkpoint.stem}.md"
    file = out or run.path / name
    if file.is_dir():
        raise ConfigError(f"out={file}: is a folder; name the file", SEE)
    if reason := why_not_writable(file.parent.absolute()):
        raise ConfigError(f"out={file}: cannot be written ({reason}); out=FILE writes elsewhere", SEE)
    found, why_not = data_if_there(run, config, checkpoint)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, card(run, config, checkpoint, found))
    unread = f" (the data cannot be read here: {why_not})" if found is None else ""
    say(f"card of {run.path.name}/{checkpoint.name}  ->  {file}{unread}")
    return 0


def card(
    run: RunDirectory,
    config: Config,
    checkpoint: Path,
    found: DataToScore | None,
    shipped: Shipped | None = None,
) -> str:
    """The card of the weights of `checkpoint`.

    Args:
        run: the recorded run.
        config: its configuration, with what was typed.
        checkpoint: the weights.
        found: the data that the run is scored on; None: they cannot be read here.
        shipped: the file that the card is to describe besides.
    """
    facts = _Facts(run, config, checkpoint, found)
    sections = {
        "Use": _use(facts, shipped), "Data": _data(facts), "Network": _network(facts), "Training": _training(facts),
        "Results": _results(facts), "Calibration": _calibration(facts), "Robustness": _robustness(facts),
        "Limits": [f"- {line}" for line in _limits(facts)], "How it was made": _made(facts),
        "References": [f"- {line}" for line in _references(facts)] or ["None of the options names a paper."],
    }  # fmt: skip
    parts = [_header(facts), f"# {facts.model_name} on {facts.data_name}", ""]
    parts.append(
        f"Run `{facts.run_id}`, weights `{checkpoint.name}`. Every line is from the run's record or counted from its "
        "data; what is not there is called unknown or untested."
    )
    for title, lines in sections.items():
        parts += ["", f"## {title}", "", *lines]
    return "\n".join(parts) + "\n"


class _Facts:
    """What is known of a run and of some of its weights, read once."""

    def __init__(
        self, run: RunDirectory, config: Config, checkpoint: Path, found: DataToScore | None
    ) -> None:
        self.run, self.checkpoint = run, checkpoint
        self.config = completed(run.config())
        self.summary = run.known()
        self.content = read_checkpoint(checkpoint)
        self.classes, self.guessed = trained_classes(run, self.config, checkpoint)
        self.given: str | None = self.summary.get("given")
        self.run_id = str(self.summary.get("run_id") or run.path.name)
        self.data_name = str(self.config["data"]["module"]["name"])
        self.model_name = str(self.config["model"]["_target_"]).rpartition(".")[2]
        known = self.summary.get("data_fingerprint")
        own = found is not None and config["data"]["module"].get("predict_dir") is None
        own = own and found is not None and (found.own or found.fingerprint == known)
        self.data: BaseDataModule | None = found.data if own and found is not None else None
        self.unread = "they cannot be read here" if found is None else "others were named for this card"
        self.sizes = dict(self._sizes())
        self.counts = self._counts()
        self.values = list(self._values())
        self.corrupted = list(self._corrupted())
        self.calibrations = self._calibrations()

    @property
    def classifies(self) -> bool:
        return self.config["data"]["task"] == "classification"

    @property
    def averaged(self) -> bool:
        return bool(self.content.get("averaged_state_dict"))

    def _sizes(self) -> Iterator[tuple[str, int]]:
        splits: tuple[Any, ...] = ("test",) if self.given else ("train", "val", "test")
        for split in splits:
            with contextlib.suppress(ConfigError, SampleError, OSError, TypeError, AttributeError):
                if self.data is not None:
                    yield split, len(self.data.samples(split))

    def _counts(self) -> np.ndarray | None:
        """Training samples of each class."""
        if self.data is not None and self.classifies and not self.given:
            with contextlib.suppress(ConfigError, SampleError, OSError, ValueError, IndexError):
                return self.data.class_counts()
        return None

    def _values(self) -> Iterator[Value]:
        own = self.checkpoint.name
        validated = self.content.get("validated") or {}
        limited = self.config["trainer"].get("limit_val_batches") is not None
        validation = None if limited else self.sizes.get("val")
        yield from _of(own, f"{self.data_name}, val", validated.get("metrics"), "val", validation)
        # the test at the training's end is of the weights after its last step
        same = self.content.get("global_step") == self.summary.get("steps") is not None
        whose = own if same else LAST
        yield from _of(whose, f"{self.data_name}, test", self.summary.get("final"), "test", self._tested())
        for record in self._records("test.json", "tests/*/test.json"):
            if record.get("checkpoint") != own or not isinstance(record.get("metrics"), dict):
                continue
            folder = Path(str(record.get("folder") or "")).name or self.data_name
            where = (
                f"{self.data_name}, test" if record.get("own_data") else f"{folder} ({record.get('data')})"
            )
            read = [f"tta={'+'.join(record['tta'])}"] if record.get("tta") else []
            read += ["at the temperature"] if record.get("calibration") else []
            if not (same and record.get("own_data") and not read):  # which are the training's own
                yield from _of(
                    own, ", ".join([where, *read]), record["metrics"], "test", record.get("samples")
                )

    def _tested(self) -> int | None:
        """Images of the test at the training's end."""
        with (
            contextlib.suppress(OSError, KeyError, ValueError),
            np.load(self.run.path / "test_correct.npz") as found,
        ):
            return int(found["count"])
        return None

    def _records(self, *patterns: str) -> Iterator[dict[str, Any]]:
        for file in sorted(f for pattern in patterns for f in self.run.path.glob(pattern)):
            with contextlib.suppress(OSError, ValueError):
                if isinstance(record := json.loads(file.read_text(encoding="utf-8")), dict):
                    yield record

    def _corrupted(self) -> Iterator[dict[str, Any]]:
        for record in self._records(f"tests/*/corruptions_{self.checkpoint.stem}.json"):
            if record.get("cells") and record.get("weights") == self._weights():
                yield record

    def _weights(self) -> str:
        return file_fingerprint("ckpt_path", str(self.checkpoint))

    def _calibrations(self) -> list[dict[str, Any]]:
        with contextlib.suppress(ConfigError):
            return [e for e in recorded_calibrations(self.run.path) if e["weights"] == self._weights()]
        return []

    def seeds(self) -> dict[int, float]:
        """Test accuracy (or error) of the finished runs beside this one that differ in their seed alone."""
        identity, found = self.summary.get("identity"), {}
        for folder in sorted(self.run.path.parent.glob(f"{identity}-s*")) if identity else ():
            if re.fullmatch(rf"{identity}-s\d+", folder.name):
                summary = RunDirectory(folder).known()
                value = (summary.get("final") or {}).get(self.headline)
                if summary.get("status") == "finished" and isinstance(value, int | float):
                    found[int(summary.get("seed", -1))] = float(value)
        return found

    @property
    def headline(self) -> str:
        return "test/acc" if self.classifies else "test/mse"


def _of(
    weights: str, on: str, metrics: Mapping[str, Any] | None, split: str, samples: int | None
) -> Iterator[Value]:
    """The values of a split, and of its groups, whose number of samples is not recorded; of the weights that ship."""
    for name, value in (metrics or {}).items():
        if of_split(name, split) and not name.startswith(f"{split}_raw/") and name.count("/") == 1:
            yield Value(weights, on, name, float(value), samples if name.startswith(f"{split}/") else None)


# its parts


def _text(value: object) -> str:
    """A text that stays within a cell of a table, and a line."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _rows(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(_text(cell) for cell in row)} |" for row in lines]


def _listed(pairs: Iterable[tuple[str, object]]) -> list[str]:
    return [f"- {name}: {_text(value)}" for name, value in pairs if value not in (None, "")]


def interval(value: float, samples: int | None) -> str:
    """Wilson's interval of an accuracy over so many images, at 95 %; empty where their number is not known."""
    if not samples or not 0 <= value <= 1:
        return ""
    found = binomtest(round(value * samples), samples).proportion_ci(LEVEL, method="wilson")
    return f"{found.low:.4f} to {found.high:.4f}"


def _is_accuracy(name: str) -> bool:
    return name.count("/") == 1 and base_name(name) in ("acc", "acc_top5")


def _header(facts: _Facts) -> str:
    """What Hugging Face reads of a card; a licence is not the record's to give."""
    data = facts.config["data"]
    metrics = [
        {
            "type": "accuracy" if base_name(v.name) == "acc" else base_name(v.name),
            "name": v.name,
            "value": round(v.value, 6),
        }
        for v in facts.values
        if v.weights == facts.checkpoint.name
        and v.on == f"{facts.data_name}, test"
        and base_name(v.name) != "loss"
    ]
    task = _PIPELINES.get((data["task"], data["input_dim"]), f"{data['input_dim']}-D {data['task']}")
    header: dict[str, Any] = {"library_name": "crucible"}
    if pipeline := _PIPELINES.get((data["task"], data["input_dim"])):
        header["pipeline_tag"] = pipeline
    header["tags"] = [
        "crucible",
        facts.model_name,
        facts.data_name,
        *sorted(facts.config.get("techniques") or {}),
    ]
    if metrics:
        result = {
            "task": {"type": task},
            "dataset": {"name": facts.data_name, "type": facts.data_name},
            "metrics": metrics,
        }
        header["model-index"] = [{"name": facts.run_id, "results": [result]}]
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n"


def _use(facts: _Facts, shipped: Shipped | None) -> list[str]:
    lines = []
    if shipped is not None:
        given, output = shipped.says["input"], shipped.says["output"]
        lines = _listed([
            ("file", f"`{shipped.name}`, {shipped.kind}, {shipped.size / 1e6:.2f} MB"),
            ("input", f"`{given['name']}`, {given['dtype']} ({', '.join(map(str, given['shape']))})"),
            ("output", f"`{output['name']}`, {output['dtype']} ({', '.join(map(str, output['shape']))})"),
            ("in the graph besides the network", ", ".join(shipped.says["included"]) or "nothing"),
            ("checked", shipped.checked),
        ])  # fmt: skip
    transform = described_transform(facts.config)
    before = ", ".join(f"{n} {v}" for n, v in transform.items() if n != "_target_")
    lines += _listed([
        ("transform of the input", f"`{transform['_target_']}`" + (f": {before}" if before else "")),
        ("with Crucible", '`load_run("RUN").predict(images)`, `python main.py run=RUN task=predict`'),
    ])  # fmt: skip
    return lines


def _data(facts: _Facts) -> list[str]:
    data = facts.config["data"]
    size = " x ".join([str(data["input_channels"]), *[str(data["input_size"])] * data["input_dim"]])
    sizes = ", ".join(f"{number} {split}" for split, number in facts.sizes.items())
    lines = _listed([
        ("name", f"{facts.data_name}, {data['task']}, input {size}"),
        ("samples", sizes or f"{_UNKNOWN} ({facts.unread})"),
        ("fingerprint", facts.summary.get("data_fingerprint") or _UNKNOWN),
    ])  # fmt: skip
    if facts.classifies:
        names = facts.classes
        if names is None:
            shown = f"{facts.config['data']['num_classes'] or _UNKNOWN}, whose names are not recorded"
        else:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            shown = f"{len(names)}: {', '.join(names[:_NAMED])}{more}"
        lines += _listed([("classes", shown)])
        if facts.counts is not None:
            lines += _listed(
                [("training samples of a class", f"{facts.counts.min()} to {facts.counts.max()}")]
            )
    return lines


def _network(facts: _Facts) -> list[str]:
    try:
        shape = input_shape(facts.config, 1)
        adds = f"{count_multiply_adds(build_on_meta(facts.config).model, shape):,} a sample, forward"
    except Exception:  # an operation that nothing is known of without data
        adds = _UNKNOWN
    parameters = facts.summary.get("parameters")
    own = {
        n: v
        for n, v in facts.config["model"].items()
        if n in ("type", "depth", "norm", "activation", "cifar_size")
    }
    options = ", ".join(f"{n}={v}" for n, v in own.items() if v is not None)
    return _listed([
        ("network", f"`{facts.config['model']['_target_']}`" + (f" ({options})" if options else "")),
        ("parameters", f"{parameters:,}" if isinstance(parameters, int) else _counted(facts)),
        ("multiply-adds", adds),
        ("weights", "averaged over the training" if facts.averaged else "as the optimizer left them"),
    ])  # fmt: skip


def _counted(facts: _Facts) -> str:
    try:
        return f"{sum(p.numel() for p in build_on_meta(facts.config).model.parameters()):,}"
    except Exception:  # as above
        return _UNKNOWN


def _training(facts: _Facts) -> list[str]:
    if facts.given is not None:
        whose = _text(Path(facts.given).name)
        return [
            f"Not trained here: the weights are those of `{whose}`. How they were trained is not recorded."
        ]
    model, trainer, summary = facts.config["model"], facts.config["trainer"], facts.summary
    devices = summary.get("devices") or world_size(trainer)
    size, window = facts.config["data"]["module"]["batch_size"], trainer["accumulate_grad_batches"]
    length = (
        f"{trainer['max_epochs']} epochs"
        if (trainer["max_steps"] or -1) < 0
        else f"{trainer['max_steps']} steps"
    )
    begun, ended = summary.get("started"), summary.get("ended")
    epoch = (facts.content.get("validated") or {}).get("epoch")
    over = model.get("warmstart")
    warm = f", warm-up over {over:g} epoch{'s' * (over != 1)}" if over else ""
    versions = ", ".join(f"{n} {v}" for n, v in (summary.get("versions") or {}).items())
    policy = facts.config["data"]["module"].get("train_transforms") or {}
    return _listed([
        ("techniques", ", ".join(facts.config.get("techniques") or ()) or "none by name"),
        ("length", f"{length} planned; status {summary.get('status', _UNKNOWN)}"
                   + (f" ({summary['reason']})" if summary.get("reason") else "")),
        ("these weights are of", f"epoch {epoch + 1}" if isinstance(epoch, int) else _UNKNOWN),
        ("optimizer", f"{model['optimizer']}, rate {model['lr']:g}, weight decay {model['weight_decay']:g}"),
        ("schedule", f"{model['scheduler'] or 'none'}{warm}"),
        ("batch", f"{size * devices * window} ({size} a device; devices {devices}, accumulated {window})"),
        ("augmentation", f"`{policy['_target_']}`" if policy.get("_target_") else "none"),
        ("started from", f"`{Path(str(model['init_from'])).name}`" if model.get("init_from") else
                         "pretrained weights" if model.get("pretrained") else "weights drawn at random"),
        ("precision", summary.get("precision") or trainer.get("precision")),
        ("seed", facts.config["seed"]),
        ("device", summary.get("device")),
        ("time", f"{(ended - begun) / 60:.1f} minutes from start to end" if begun and ended else _UNKNOWN),
        ("versions", versions or _UNKNOWN),
    ])  # fmt: skip


def _results(facts: _Facts) -> list[str]:
    if not facts.values:
        return ["Not scored: the record has no metrics of these weights."]
    rows = [
        [f"`{v.weights}`" if v.weights != LAST else v.weights, v.on, v.name, f"{v.value:.4f}",
         interval(v.value, v.samples) if _is_accuracy(v.name) else "", v.samples or _UNKNOWN]
        for v in facts.values
    ]  # fmt: skip
    return [
        *_rows(["weights", "data", "metric", "value", "95 % interval", "n"], rows), "",
        "Intervals are Wilson's, of the accuracy over images like these; they say nothing of another seed's training.",
    ]  # fmt: skip


def _calibration(facts: _Facts) -> list[str]:
    if not facts.classifies:
        return ["A regression has no probabilities."]
    lines = []
    for entry in facts.calibrations:
        views = f", tta={'+'.join(entry['tta'])}" if entry["tta"] else ""
        lines.append(
            f"- temperature {entry['temperature']:.4f}{views}, fitted to {entry['samples']} validation samples: "
            f"expected calibration error {entry['ece_before']:.4f} before, {entry['ece_after']:.4f} after; negative "
            f"log-likelihood {entry['nll_before']:.4f} before, {entry['nll_after']:.4f} after (on those samples)"
        )
    found = [v for v in facts.values if base_name(v.name) in ("ece", "ece_before")]
    lines += [f"- {v.name} {v.value:.4f} (15 bins; {v.weights}; {v.on})" for v in found]
    if not facts.calibrations:
        lines.append("- no temperature was fitted to these weights (`task=test calibrate=true` does)")
    return lines


def _robustness(facts: _Facts) -> list[str]:
    lines: list[str] = []
    for record in facts.corrupted:
        cells: Mapping[str, Mapping[str, Mapping[str, float]]] = record["cells"]
        where = Path(str(record.get("folder") or "")).name or facts.data_name
        lines += [f"Corruptions on {where}, {record.get('samples', _UNKNOWN)} images a cell:", ""]
        clean = record.get("clean") or {}
        rows: list[list[object]] = [["none", "", f"{clean['acc']:.4f}"]] if "acc" in clean else []
        for name, by_severity in cells.items():
            of = [cell["acc"] for cell in by_severity.values() if "acc" in cell]
            rows.append(
                [name, ", ".join(sorted(by_severity)), f"{sum(of) / len(of):.4f}" if of else _UNKNOWN]
            )
        lines += _rows(["corruption", "severities", "mean accuracy"], rows)
        lines += ["", *(f"- {n} {v:.4f}" for n, v in (record.get("averages") or {}).items())]
    others = sorted({v.on for v in facts.values if not v.on.startswith(f"{facts.data_name}, ")})
    if others:
        lines.append(f"Scored on other data: {', '.join(others)} (Results).")
    return lines or ["Not tested: neither under corruptions nor on other data."]


def _limits(facts: _Facts) -> Iterator[str]:
    """What follows from the facts; each by a rule, none by judgement."""
    config, summary = facts.config, facts.summary
    tests = [v for v in facts.values if of_split(v.name, "test")]
    if not tests:
        yield "Never scored on a test split."
    elif not any(v.weights == facts.checkpoint.name for v in tests):
        yield f"These weights ({facts.checkpoint.name}) were never scored on a test split; those of the last step were."
    if facts.data is not None and not facts.given and facts.data.test_is_val:
        yield "The test split is the validation split, by which the epoch was chosen: its values are optimistic."
    if limit := config["trainer"].get("limit_test_batches"):
        yield f"The test was on a part of its split (trainer.limit_test_batches={limit})."
    if facts.given:
        yield "What the weights were trained on is not recorded: the images that they are scored on may be among them."
    else:
        seeds = facts.seeds()
        if len(seeds) > 1:
            low, high = min(seeds.values()), max(seeds.values())
            spread = f"{facts.headline} from {low:.4f} to {high:.4f}"
            yield f"{len(seeds)} seeds of this configuration are recorded: {spread}."
        else:
            yield f"A single seed ({config['seed']}): how much another one differs is not known."
        if (status := summary.get("status")) != "finished":
            yield f"The training has not ended as planned (status {status})."
        if reason := summary.get("ended_early"):
            yield f"The training ended early: {reason}."
    if facts.counts is not None and len(facts.counts):
        least, most = int(facts.counts.min()), int(facts.counts.max())
        if not least:
            names = facts.classes or []
            absent = [names[k] if k < len(names) else str(k) for k in np.flatnonzero(facts.counts == 0)]
            yield f"Classes without a training sample: {', '.join(absent[:_NAMED])}."
        elif most >= UNEQUAL * least:
            yield f"Unequal classes: the largest has {most} training samples, the smallest {least}."
    elif facts.classifies and not facts.given:
        yield "Whether its classes are equal in number is not known: the data cannot be read here."
    if not facts.corrupted:
        yield "Never tested under corruptions."
    if all(v.on.startswith(f"{facts.data_name}, ") for v in facts.values):
        yield f"Never scored on other data than {facts.data_name}."
    if facts.classifies and not facts.calibrations:
        yield "Probabilities are not calibrated."
    if facts.guessed:
        yield f"{facts.guessed[0].upper()}{facts.guessed[1:]}."
    if (summary.get("git") or {}).get("dirty"):
        yield "The code had changes that no commit holds."


def _made(facts: _Facts) -> list[str]:
    overrides = facts.run.overrides()
    git = facts.summary.get("git") or {}
    changes = ", with changes that are not committed" if git.get("dirty") else ""
    lines = ["    " + command(*overrides), ""]
    return [
        *lines,
        f"Crucible at commit {git['commit']}{changes}."
        if git.get("commit")
        else "The commit is not recorded.",
    ]


def _references(facts: _Facts) -> Iterator[str]:
    """The papers that the network's code and the options that were set name."""
    model = facts.config["model"]
    said: dict[str, str] = {}
    target = find_target(model["_target_"], "model._target_")
    module = sys.modules[target.__module__]
    for text in (inspect.getdoc(target) or "", module.__doc__ or ""):
        for number in _ARXIV.findall(text):
            said.setdefault(number, f"the network: {_text(text.splitlines()[0]).rstrip('.')}")
        if said:
            break
    if facts.given is None:
        for name in facts.config.get("techniques") or ():
            for number in _ARXIV.findall(_words_of(name, facts.config.get("user_dir"))):
                said.setdefault(number, f"`technique={name}`")
        for kind in (*BASICS, *technique_kinds(model.get("stages"))):
            for field in fields(kind):
                value, text = model.get(field.name, field.default), option_text(kind, field.name)
                if value != field.default and value is not None:
                    for number in _ARXIV.findall(text):
                        said.setdefault(number, f"`model.{field.name}={value}`")
    for number, whose in said.items():
        yield f"[arXiv {number}](https://arxiv.org/abs/{number}), {whose}"


def _words_of(technique: str, user_dir: str | None) -> str:
    """The header of a technique's file, wherever it is; empty where there is none."""
    own = [Path(user_dir), Path(user_dir) / "cli_configs"] if user_dir else []
    for folder in (Path(__file__).resolve().parent.parent / "cli_configs", *own):
        with contextlib.suppress(OSError):
            text = (folder / "technique" / f"{technique}.yaml").read_text(encoding="utf-8")
            return "\n".join(line for line in text.splitlines() if line.startswith("#"))
    return ""
