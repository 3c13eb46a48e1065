"""A trained network to be used: `load_run` gives what its run, or one checkpoint, says that it takes and gives.

Nothing here knows of data sets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from augmentation.five_crops import FiveCrops
from augmentation.policies.base import ImagePolicy, Policy
from crucible import rooms
from crucible.calibration import known_calibration
from crucible.cells import text_of
from crucible.configuration import Config, find_target
from crucible.files import missing
from crucible.keyed import keyed_rng, stream_key
from crucible.listing import EXTENSIONS, image_files
from crucible.options import ConfigError, shown, signature_options, suggest
from crucible.pictures import PictureError, decode, from_pil, grey
from crucible.private import AnyConvolution
from crucible.run import RunDirectory
from crucible.trust import judge
from lab.build import file_fingerprint, made, read_checkpoint, with_weights
from lab.recorded import completed
from models.base_model import BaseModel
from models.views import Views, views_asked

SCHEMA = 1
SEE = "docs/use.md"
_IDENTITY = {"_target_": "augmentation.policies.default.IdentityTransform"}
_CHANNELS_LAST = (1, 3, 4)  # of an array whose last axis is taken for its colours


# what a checkpoint says of its network


def described_transform(config: Config) -> dict[str, Any]:
    """The evaluation policy of a configuration: its `_target_`, and each option that acts, with its number."""
    node = config["data"]["module"].get("test_transforms") or _IDENTITY
    signature = signature_options(find_target(node["_target_"], "data.module.test_transforms._target_"))
    defaults = {
        name: default for name, (_, default) in signature.items() if isinstance(default, (int, float, str))
    }
    policy: Policy = made(node, "data.module.test_transforms")
    own = policy.options if isinstance(policy, ImagePolicy) else {}
    whole = {**defaults, **own, **node}
    return {"_target_": whole.pop("_target_"), **{n: v for n, v in sorted(whole.items()) if v is not None}}


def network_facts(config: Config) -> dict[str, Any]:
    """What a checkpoint holds beside its weights and the names of the classes, so that it can be used alone."""
    data = config["data"]
    return {
        "schema": SCHEMA,
        "task": data["task"],
        "input": {"dim": data["input_dim"], "channels": data["input_channels"], "size": data["input_size"]},
        "transform": described_transform(config),
        "model": {**config["model"], "init_from": None},
        "seed": config["seed"],
        "user_dir": config["user_dir"],
        "data": data["module"]["name"],
    }


# what is given to it


class Sample(NamedTuple):
    """One input before its transform: its name, and a tensor (C, *spatial) of storage dtype."""

    name: str
    raw: Tensor


class Transform:
    """The evaluation transform of a run: the same operations, in the same order, with the same numbers.

        image -> float32 (C, *size), normalised

    Args:
        described: as recorded.
        dim: spatial dimensions of the input.
        channels: of the input.
        seed: of the run, for a policy that draws in evaluation too.
    """

    def __init__(self, described: Mapping[str, Any], dim: int, channels: int, seed: int = 0) -> None:
        self._described = dict(described)
        self.dim, self.channels, self.seed = dim, channels, seed
        self.policy: Policy = made(self._described, "the evaluation transform")

    def describe(self) -> dict[str, Any]:
        """`_target_`, size, mean, std, and each other option that acts."""
        return dict(self._described)

    def __repr__(self) -> str:
        name, options = self._described["_target_"], self._described.items()
        return f"{name}({', '.join(f'{n}={v!r}' for n, v in options if n != '_target_')})"

    def __call__(self, image: Any) -> Tensor:
        """One image (a path, a PIL image, an array or a tensor) as the network takes it, without the batch axis."""
        (sample,) = self.samples(image)
        return self.batch(self.stored(sample.raw)[None])[0]

    def five_crops(self) -> Transform:
        """The transform of `tta=five_crops`."""
        several = Transform(self._described, self.dim, self.channels, self.seed)
        several.policy = FiveCrops(several.policy)
        return several

    def stored(self, raw: Tensor, number: int = 0) -> Tensor:
        """The part done for each image: crops and resizes; uint8 for pictures."""
        if self.policy.draws is not None:
            return self.policy.from_draws(raw, [0.5] * self.policy.draws)
        with keyed_rng(stream_key(self.seed, "evaluate", 0, number)):
            return self.policy.sample(raw)

    def batch(self, stored: Tensor, first: int = 0) -> Tensor:
        """The part done for a batch on its device: to float32, and normalised."""
        index = torch.arange(first, first + len(stored), device=stored.device)
        return self.policy.to(stored.device).batch(stored, index, stream_key(self.seed, "batch", 0))

    def samples(self, images: Any) -> Iterator[Sample]:
        """What `images` holds, one by one; see `LoadedRun.predict`.

        Raises:
            ConfigError: for what is no image, or does not fit.
        """
        if isinstance(images, (str, Path)):
            yield from self._from_path(Path(images).expanduser())
        elif isinstance(images, Image.Image):
            yield Sample("0", self._picture(images))
        elif isinstance(images, np.ndarray):
            yield from self._numbered(self._from_array(images))
        elif isinstance(images, Tensor):
            yield from self._numbered(self._several(images))
        elif isinstance(images, Iterable):
            number = 0
            for image in images:
                for sample in self.samples(image):
                    by_name = isinstance(image, (str, Path))
                    yield sample if by_name else sample._replace(name=str(number))
                    number += 1
        else:
            raise ConfigError(
                f"predict: {type(images).__name__} is no image; give paths, folders, PIL images, arrays or tensors",
                SEE,
            )

    @staticmethod
    def _numbered(raws: Tensor) -> Iterator[Sample]:
        return (Sample(str(number), raw) for number, raw in enumerate(raws))

    def _from_path(self, path: Path) -> Iterator[Sample]:
        if path.is_dir():
            names = image_files(path)
            if not names:
                raise ConfigError(f"predict: {path}: no images in it ({', '.join(EXTENSIONS)})", SEE)
            for name in names:
                yield Sample(name, self._read(path / name))
        else:
            yield Sample(str(path), self._read(path))

    def _read(self, file: Path) -> Tensor:
        if not file.is_file():
            raise ConfigError(f"predict: {file}: {missing(file, 'file')}", SEE)
        self._needs_pictures()
        try:
            draws = self.policy.draws
            least = None if draws is None else self.policy.large_enough([0.5] * draws)
            return decode(file.read_bytes(), self.channels, least=least)
        except (PictureError, OSError) as error:
            raise ConfigError(f"predict: {file}: cannot be read as an image ({error})", SEE) from error

    def _picture(self, image: Image.Image) -> Tensor:
        self._needs_pictures()
        try:
            return from_pil(image, self.channels)
        except PictureError as error:
            raise ConfigError(f"predict: a PIL image of mode {image.mode}: {error}", SEE) from error

    def _needs_pictures(self) -> None:
        if self.dim != 2 or self.channels not in (1, 3):
            raise ConfigError(
                f"predict: the network takes {self._wanted()}, which no picture is; give arrays or tensors",
                SEE,
            )

    def _wanted(self) -> str:
        return f"input of {self.channels} channels and {self.dim} spatial dimensions"

    def _from_array(self, array: np.ndarray) -> Tensor:
        """Pictures as NumPy has them, colours last; other input as tensors have it."""
        try:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
        except TypeError as error:
            raise ConfigError(f"predict: an array of {array.dtype} is no image", SEE) from error
        if self.dim != 2 or tensor.ndim == 2:
            return self._several(tensor)
        colours = tensor.shape[-1] in (*_CHANNELS_LAST, self.channels)
        if tensor.ndim == 3 and not colours:
            return self._several(tensor[:, None])  # grey pictures
        if tensor.ndim not in (3, 4) or not colours:
            raise ConfigError(
                f"predict: an array of {_shape(tensor)}; pictures are (H, W), (H, W, C), (N, H, W) or (N, H, W, C)",
                SEE,
            )
        tensor = tensor[..., :3] if tensor.shape[-1] == 4 != self.channels else tensor  # without transparency
        return self._several(tensor.movedim(-1, -3))

    def _several(self, tensor: Tensor) -> Tensor:
        """`(N, C, *spatial)` of a tensor with or without the first two axes."""
        tensor = tensor.detach()
        pictures = isinstance(self.policy, ImagePolicy)
        if pictures:
            tensor = _as_bytes(tensor)
        if tensor.ndim == self.dim and (pictures or self.channels == 1):
            tensor = tensor[None]
        if tensor.ndim == self.dim + 1:
            tensor = tensor[None]
        if tensor.ndim != self.dim + 2:
            raise ConfigError(
                f"predict: a tensor of {_shape(tensor)}; the network takes {self._wanted()}", SEE
            )
        if pictures and tensor.shape[1] in (1, 3) and tensor.shape[1] != self.channels in (1, 3):
            tensor = tensor.expand(-1, 3, -1, -1) if self.channels == 3 else grey(tensor)
        if tensor.shape[1] != self.channels:
            raise ConfigError(
                f"predict: a tensor of {_shape(tensor)}; the network takes {self._wanted()}", SEE
            )
        return tensor


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _as_bytes(pixels: Tensor) -> Tensor:
    """uint8 pixels, of floats from 0 to 1 rounded."""
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise ConfigError(f"predict: pixels of {pixels.dtype}; they are uint8, or floats from 0 to 1", SEE)
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.numel() else (0.0, 0.0)
    if not 0 <= low <= high <= 1:
        raise ConfigError(
            f"predict: float pixels from {low:.4g} to {high:.4g}; they are 0 to 1, and not normalised yet "
            "(`run.network` takes what is)",
            SEE,
        )
    return (pixels * 255).round().to(torch.uint8)


# what it gives


class Prediction(NamedTuple):
    """Of one image: its name, the class (or value), and how probable it is (NaN for a value)."""

    name: str
    label: str | float
    probability: float


@dataclass(frozen=True)
class Predictions(Sequence[Prediction]):
    """Of images, in their order.

    Attributes:
        names: paths as given, of a folder's images relative to it; of others their numbers.
        classes: of the network; empty for a regression.
        probabilities: (N, K) float32 on the CPU; None for a regression.
        values: (N,) float32 on the CPU, of a regression; None for a classification.
    """

    names: list[str]
    classes: list[str]
    probabilities: Tensor | None = None
    values: Tensor | None = None

    @property
    def labels(self) -> list[str]:
        """The most probable class of each image."""
        if self.probabilities is None:
            raise ConfigError("labels: a regression has values", SEE)
        return [self.classes[number] for number in self.probabilities.argmax(dim=1).tolist()]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """The `k` most probable classes of each image, with their probabilities."""
        if self.probabilities is None:
            raise ConfigError("top: a regression has values", SEE)
        best = self.probabilities.topk(min(k, len(self.classes)), dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(self.classes[n], p) for n, p in zip(*row, strict=True)] for row in rows]

    def table(self) -> Any:
        """A table of pandas: sample, prediction, and `p(<class>)` for each class; as `task=predict` writes it."""
        import pandas

        if self.values is not None:
            return pandas.DataFrame({"sample": self.names, "prediction": self.values.numpy()})
        assert self.probabilities is not None
        columns = {f"p({name})": self.probabilities[:, n].numpy() for n, name in enumerate(self.classes)}
        return pandas.DataFrame({"sample": self.names, "prediction": self.labels, **columns})

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            of = [None if part is None else part[index] for part in (self.probabilities, self.values)]
            return Predictions(self.names[index], self.classes, *of)
        if self.values is not None:
            return Prediction(self.names[index], float(self.values[index]), float("nan"))
        assert self.probabilities is not None
        probability, number = self.probabilities[index].max(dim=0)
        return Prediction(self.names[index], self.classes[int(number)], float(probability))


@dataclass
class LoadedRun:
    """A trained network as a whole, in evaluation mode.

    Attributes:
        model: the LightningModule.
        classes: names of its outputs, in their order; empty for a regression.
        task: classification or regression.
        input: `dim`, `channels` and `size` of its input.
        transform: what its input goes through, with its numbers.
        chosen_by: the validation's metrics of these weights, and the epoch and step that they are of.
        checkpoint: the file of the weights.
        config: the run's configuration; of a file alone, what it says of it.
        metrics: metrics.csv, a table of pandas; of a file alone empty.
        summary: summary.json; of a file alone empty.
        lacks: what the record of an earlier version does not say, in one line; empty.
    """

    model: BaseModel
    classes: list[str]
    task: str
    input: dict[str, int]
    transform: Transform
    chosen_by: dict[str, Any]
    checkpoint: Path
    config: Config
    metrics: Any = field(repr=False)
    summary: dict[str, Any] = field(default_factory=dict, repr=False)
    lacks: str = ""

    @property
    def network(self) -> nn.Module:
        """`(N, C, *spatial)` float32, transformed, to `(N, K)` logits, or `(N, 1)` values."""
        return self.model.model

    def to(self, device: str | torch.device) -> LoadedRun:
        """Move the network; what it is given goes there by itself."""
        self.model.to(device)
        return self

    def predict(
        self,
        images: Any,
        *,
        batch_size: int = 64,
        tta: str | Sequence[str] | None = None,
        calibrate: bool = False,
    ) -> Predictions:
        """Labels and probabilities of images, or the values of a regression.

        Args:
            images: one or several: a path of an image file; of a folder, whose images are taken at any depth; a PIL
                image; an array (H, W), (H, W, C), (N, H, W) or (N, H, W, C); a tensor (C, H, W) or (N, C, H, W); a list
                or generator of these. Pixels are uint8, or floats from 0 to 1. Other input than pictures is an array
                or tensor with the channels first, as the data set gave it.
            batch_size: images that go to the device at once.
            tta: `flip`, `five_crops` or both: the mean over views of each image.
            calibrate: probabilities at the temperature that `task=test calibrate=true` recorded for these weights.

        Raises:
            ConfigError: for what cannot be read or does not fit, in one line that names it.
        """
        asked = views_asked(tta)
        views = Views(asked, self.temperature(asked) if calibrate else 1.0)
        names, parts = [], []
        for batch_names, input in self._batches(images, batch_size, asked):
            with torch.inference_mode():
                logits = views.read(self.model.outputs, input)
            parts.append((logits.softmax(dim=1) if self.task == "classification" else logits).float().cpu())
            names += batch_names
        if self.task == "classification":
            return Predictions(
                names, self.classes, torch.cat(parts) if parts else torch.empty(0, len(self.classes))
            )
        return Predictions(names, [], None, torch.cat(parts) if parts else torch.empty(0))

    def features(self, images: Any, layer: str | None = None, *, batch_size: int = 64) -> Tensor:
        """What the network makes of images inside, float32 on the CPU.

        Args:
            images: as of `predict`.
            layer: a module of `network` by its name (`dict(run.network.named_modules())`), whose output it is; None:
                the pooled features, (N, D), which the last layer takes.
            batch_size: images that go to the device at once.

        Raises:
            ConfigError: for a layer that there is not, or whose output is no tensor; without one named, for a network
                without a last layer.
        """
        module: nn.Module | None = None
        if layer is not None:
            known = dict(self.network.named_modules())
            if layer not in known:
                raise ConfigError(
                    f"layer={layer}: the network has no such module{suggest(layer, known, ())}", SEE
                )
            module = known[layer]
        parts = [
            (self._pooled(input) if module is None else self._of(module, str(layer), input)).float().cpu()
            for _, input in self._batches(images, batch_size, ())
        ]
        return torch.cat(parts) if parts else torch.empty(0)

    def temperature(self, views: Sequence[str] = ()) -> float:
        """The recorded temperature of these weights.

        Raises:
            ConfigError: where none is recorded.
        """
        folder = self.checkpoint.parent.parent
        known = known_calibration(folder, file_fingerprint("ckpt_path", str(self.checkpoint)), views)
        if known is None:
            more = f" tta=[{','.join(views)}]" if views else ""
            raise ConfigError(
                f"calibrate=true: {folder} has no temperature for {self.checkpoint.name}; "
                f"python main.py run=RUN ckpt_path={self.checkpoint.stem} task=test calibrate=true{more} fits it",
                SEE,
            )
        return known.temperature

    def _batches(self, images: Any, size: int, asked: Sequence[str]) -> Iterator[tuple[list[str], Tensor]]:
        """Names and input, transformed and on the network's device; input of one shape a batch."""
        if asked and self.input["dim"] != 2:
            raise ConfigError(f"tta={','.join(asked)}: is for pictures", SEE)
        if size < 1:
            raise ConfigError(f"batch_size={size}: must be at least 1", SEE)
        transform = self.transform.five_crops() if "five_crops" in asked else self.transform
        device = next(self.model.parameters()).device
        names: list[str] = []
        stored: list[Tensor] = []
        first = 0
        for number, sample in enumerate(self.transform.samples(images)):
            one = transform.stored(sample.raw, number)
            if stored and (
                len(stored) == size or (one.shape, one.dtype) != (stored[0].shape, stored[0].dtype)
            ):
                yield names, transform.batch(torch.stack(stored).to(device), first)
                names, stored, first = [], [], number
            names.append(sample.name)
            stored.append(one)
        if stored:
            yield names, transform.batch(torch.stack(stored).to(device), first)

    def _of(self, module: nn.Module, name: str, input: Tensor) -> Tensor:
        seen: list[Any] = []
        hook = module.register_forward_hook(lambda module, given, output: seen.append(output))
        try:
            with torch.inference_mode():
                self.model.outputs(input)
        finally:
            hook.remove()
        if not seen or not isinstance(seen[-1], Tensor):
            what = f"gives {type(seen[-1]).__name__}" if seen else "is not called"
            raise ConfigError(f"layer={name}: it {what}, and has no features", SEE)
        return seen[-1]

    def _pooled(self, input: Tensor) -> Tensor:
        seen: list[Tensor] = []
        heads = [
            module
            for module in self.network.modules()
            if self.model.num_outputs
            == (
                module.out_features
                if isinstance(module, nn.Linear)
                else module.out_channels
                if isinstance(module, AnyConvolution)
                else None
            )
        ]
        hooks = [head.register_forward_pre_hook(lambda head, given: seen.append(given[0])) for head in heads]
        try:
            with torch.inference_mode():
                self.model.outputs(input)
        finally:
            for hook in hooks:
                hook.remove()
        if not seen:
            raise ConfigError(
                f"features: {type(self.network).__name__} has no last layer of {self.model.num_outputs} outputs; "
                "layer=NAME names one",
                SEE,
            )
        return seen[-1].flatten(2).mean(dim=2) if seen[-1].ndim > 2 else seen[-1]


# where it comes from


def load_run(
    path: str | Path,
    checkpoint: str = "best",
    user_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> LoadedRun:
    """A trained network with all that is needed to use it, from its run's folder or one checkpoint alone.

    Neither the data that it was trained on nor Crucible's `datasets` are needed, and nothing is imported under names
    that other packages may have. Where weights were averaged, these are taken.

    Args:
        path: the run's folder, or the file of a checkpoint.
        checkpoint: of the folder: `best`, `last` or a file; where there is no best.ckpt, last.ckpt is taken.
        user_dir: the folder of one's own code that the run was made with. What the run records is not asked: its
            folder may be somebody else's.
        device: where the network goes.

    Raises:
        ConfigError: where its record is damaged, of another version, or names code that is neither Crucible's nor
            in `user_dir`: one line says the file and the way on.
    """
    folder = None if user_dir is None else str(Path(user_dir).expanduser().resolve())
    place = Path(path).expanduser()
    with rooms.user_dir(folder):
        loaded = _of_file(place, folder) if place.is_file() else _of_run(place, checkpoint, folder)
    if loaded.lacks:
        warnings.warn(loaded.lacks, stacklevel=2)
    return loaded.to(device)


def _of_run(path: Path, checkpoint: str, user_dir: str | None) -> LoadedRun:
    import pandas

    run = RunDirectory(path)
    recorded, summary, rows = run.config(), run.summary(), run.metrics()
    _judge(recorded, f"run={run.path}", user_dir)
    config = completed(recorded)
    file = run.pick_checkpoint(checkpoint)
    content = read_checkpoint(file)
    here, lacks = network_facts(config), []
    facts = content.get("network")
    if facts is None:
        facts = here
        lacks.append("the numbers of its evaluation transform (today's defaults are taken)")
    else:
        _check_facts(file, facts)
        facts = {**facts, **{name: here[name] for name in ("task", "input", "model")}}
    table = pandas.read_csv(run.path / "metrics.csv").rename(columns=text_of) if rows else pandas.DataFrame()
    return _loaded(file, content, facts, summary.get("classes"), lacks, config, table, summary, user_dir)


def _of_file(file: Path, user_dir: str | None) -> LoadedRun:
    import pandas

    content = read_checkpoint(file)
    facts = content.get("network")
    if facts is None:
        run = file.absolute().parent.parent
        if not (run / "config.yaml").is_file():
            raise ConfigError(
                f"{file}: holds weights, and not what network they are of; load_run(RUN) takes that from the run's "
                "folder (model.init_from=FILE starts a training from it)",
                SEE,
            )
        return _of_run(run, str(file.absolute()), user_dir)
    return _loaded(file, content, facts, None, [], None, pandas.DataFrame(), {}, user_dir)


def _judge(config: Mapping[str, Any], where: str, user_dir: str | None) -> None:
    """What is built of a record is judged; nothing else of it is followed."""
    data = config.get("data")
    module = data.get("module") if isinstance(data, Mapping) else None
    transforms = module.get("test_transforms") if isinstance(module, Mapping) else None
    followed = {"model": config.get("model"), "data": {"module": {"test_transforms": transforms}}}
    judge({**followed, "user_dir": config.get("user_dir")}, where, user_dir)


def _loaded(
    file: Path,
    content: Mapping[str, Any],
    facts: Mapping[str, Any],
    classes: Sequence[str] | None,
    lacks: list[str],
    config: Config | None,
    metrics: Any,
    summary: dict[str, Any],
    user_dir: str | None,
) -> LoadedRun:
    _check_facts(file, facts)
    module = {"name": facts["data"], "test_transforms": facts["transform"]}
    _judge(
        {"model": facts["model"], "data": {"module": module}, "user_dir": facts["user_dir"]},
        f"{file}",
        user_dir,
    )
    if config is None:
        config = {
            "seed": facts["seed"], "user_dir": facts["user_dir"], "model": facts["model"],
            "data": {"task": facts["task"], **{f"input_{n}": v for n, v in facts["input"].items()}, "module": module},
        }  # fmt: skip
    model = with_weights(config, file, content)
    names = [str(name) for name in content.get("class_names") or classes or ()]
    if facts["task"] == "classification" and len(names) != model.num_outputs:
        lacks.append("the names of its classes (numbers are taken)")
        names = [str(number) for number in range(model.num_outputs)]
    size = facts["input"]
    return LoadedRun(
        model=model,
        classes=names if facts["task"] == "classification" else [],
        task=facts["task"],
        input=dict(size),
        transform=Transform(facts["transform"], size["dim"], size["channels"], facts["seed"]),
        chosen_by=dict(content.get("validated") or {}),
        checkpoint=file,
        config=config,
        metrics=metrics,
        summary=summary,
        lacks=f"{file}: of an earlier version, which did not record {' and '.join(lacks)}" if lacks else "",
    )


def _check_facts(file: Path, facts: Any) -> None:
    """What a checkpoint says of its network has the form that this version reads.

    Raises:
        ConfigError: for another form, or that of a later version.
    """
    schema = facts.get("schema") if isinstance(facts, Mapping) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ConfigError(
            f"{file}: says of its network what a later Crucible reads (schema {schema}, here {SCHEMA}); git pull",
            see="CHANGELOG.md",
        )
    kinds = {"task": str, "input": Mapping, "transform": Mapping, "model": Mapping, "seed": int, "data": str}
    for name, kind in kinds.items():
        if not isinstance(facts, Mapping) or not isinstance(facts.get(name), kind) or "user_dir" not in facts:
            raise ConfigError(f"{file}: what it says of its network is damaged ({name}: {shown(facts)})", SEE)
    if not all(isinstance(facts["input"].get(name), int) for name in ("dim", "channels", "size")):
        raise ConfigError(
            f"{file}: what it says of its network is damaged (input: {shown(facts['input'])})", SEE
        )
