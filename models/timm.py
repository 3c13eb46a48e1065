"""The networks of timm (pytorch-image-models): families under names of their own, and any other by timm's name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import timm
import torch
from timm.data import ImageNetInfo, resolve_data_config
from timm.layers import DropPath
from timm.models.resnest import ResNestBottleneck
from torch import nn

from crucible.corrections import Correction
from crucible.options import ConfigError, signature_options
from models.base_model import BaseModel
from models.weights import hub_folder, stem_words
from norms import is_synchronised

# arguments of timm's that have an option of their own
OPTION_OF = {
    "num_classes": "data.num_classes",
    "in_chans": "data.input_channels",
    "drop_path_rate": "model.stochastic_depth",
    "drop_rate": "model.resnet_dropout",
    "pretrained": "model.pretrained",
    "checkpoint_path": "model.init_from",
}


CROP_MODES = ("center", "squash")  # that our evaluation policy has


class OwnData(NamedTuple):
    """What weights of timm's were made for, as `timm.data.resolve_data_config` gives it.

    Attributes:
        source: the weights' name.
        size: height and width in pixels.
        mean: a value a channel, on the scale 0 to 1.
        std: likewise.
        interpolation: filter of the resizing.
        crop_pct: side of the square by that of the resized picture.
        crop_mode: `center` or `squash`.
        num_classes: of the weights.
        label_names: of their classes; None: unknown.
    """

    source: str
    size: int
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float
    crop_mode: str
    num_classes: int
    label_names: list[str] | None

    def __str__(self) -> str:
        numbers = (f"{name} {[round(v, 4) for v in getattr(self, name)]}" for name in ("mean", "std"))
        return (
            f"timm's data configuration of {self.source}: {len(self.mean)}x{self.size}x{self.size}, "
            f"{self.interpolation}, crop_pct {self.crop_pct:g}, crop_mode {self.crop_mode}, {', '.join(numbers)}"
        )


def _created(name: str, **arguments: Any) -> nn.Module:
    """timm's network, on the default device.

    A constructor may compute with tensors (RegNet's widths), for which the meta device of torch 2.11 lacks operators:
    there it computes on the CPU.
    """
    try:
        return timm.create_model(name, **arguments)
    except NotImplementedError:
        device = torch.get_default_device()
        if device.type != "meta":
            raise
        with torch.device("cpu"):
            return timm.create_model(name, **arguments).to(device)


def build_timm(
    name: str,
    model: BaseModel,
    *,
    stochastic_depth: float | None,
    resnet_dropout: float | None,
    pretrained: bool,
    timm_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """timm's network `name`, `(N, C, H, W)` float to `(N, model.num_outputs)`.

    Args:
        name: as in `timm.list_models()`, with or without the tag of the weights behind a dot.
        model: whose data the network is for.
        stochastic_depth: timm's `drop_path_rate`; None: the network's own.
        resnet_dropout: timm's `drop_rate`; None: the network's own.
        pretrained: timm's weights; a head of another size is new.
        timm_kwargs: further arguments of the network.

    Raises:
        ConfigError: for a name timm does not have, an option this network cannot honour, data that are not
            2-D, or weights that cannot be fetched.
    """
    if model.input_dim != 2:
        raise ConfigError(f"data.input_dim={model.input_dim}: the networks of timm are for 2-D input")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them"
        raise ConfigError(f"model.type={name}: timm has no such model; {hint}")
    if pretrained and not timm.is_model_pretrained(name):
        raise ConfigError(f"model.pretrained=true: timm has no weights for model.type={name}")
    extra = timm_kwargs or {}
    for argument in extra.keys() & OPTION_OF.keys():
        raise ConfigError(
            f"model.timm_kwargs.{argument}={extra[argument]!r}: set {_option(argument)} instead"
        )
    arguments = {
        "num_classes": model.num_outputs,
        "in_chans": model.input_channels,
        "drop_path_rate": stochastic_depth,
        "drop_rate": resnet_dropout,
        **extra,
    }
    given = {argument: value for argument, value in arguments.items() if value is not None}
    try:
        network = _created(name, pretrained=pretrained, **given)
    except TypeError as error:
        refused = [f"{_option(a)}={value!r}" for a, value in given.items() if f"'{a}'" in str(error)]
        option = refused[0] if refused else "model.timm_kwargs"
        raise ConfigError(f"{option}: timm's {name} does not take it ({error})") from error
    except Exception as error:  # whatever a network's constructor or a download raises
        option = "model.pretrained=true" if pretrained else f"model.type={name}"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{option}: timm cannot build {name} ({reason})") from error
    if stochastic_depth and not _drops_paths(network):
        raise ConfigError(f"model.stochastic_depth={stochastic_depth} has no effect in timm's {name}")
    if resnet_dropout and not _drops_features(network):
        raise ConfigError(f"model.resnet_dropout={resnet_dropout} has no effect in timm's {name}")
    return network


def _option(argument: str) -> str:
    return OPTION_OF.get(argument, f"model.timm_kwargs.{argument}")


def _drops_paths(network: nn.Module) -> bool:
    def acts(block: nn.Module) -> bool:
        # without a shortcut nothing calls a block's DropPath; ResNeSt's drops some shortcuts, not the branches
        return getattr(block, "has_skip", True) and not isinstance(block, ResNestBottleneck)

    return any(
        isinstance(child, DropPath) and child.drop_prob > 0 and acts(block)
        for block in network.modules()
        for child in block.children()
    )


def _drops_features(network: nn.Module) -> bool:
    # about a third of timm's families have no dropout module: they apply F.dropout with their `drop_rate`
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "drop_rate", 0.0) > 0
        for module in network.modules()
    )


class TimmFamily(BaseModel):
    """A network of timm for 2-D data; a family says which, and how its variants are called.

    Args:
        type: the variant; one of `variants`, where there are any, else timm's own name.
        stochastic_depth: timm's `drop_path_rate`.
        resnet_dropout: timm's `drop_rate`.
        pretrained: start from timm's weights.
        timm_kwargs: further arguments of the network.
        data_config: whether size, mean, std, filter and crop are those that timm gives with the weights.
    """

    corrections: ClassVar = (
        Correction(
            "trainer.sync_batchnorm", 2, is_synchronised,
            "norms with an activation within them lost it, where statistics were those of all processes",
        ),
    )  # fmt: skip
    variants: ClassVar[dict[Any, str]] = {}  # this family's names to timm's

    @classmethod
    def settle_network(cls, options: dict[str, Any], typed: Collection[str]) -> list[str]:
        """Let a folder of timm's say what network its weights are of, in place; what was settled, in a few words.

        Args:
            options: of `model`.
            typed: the options that were typed.
        """
        return []

    @classmethod
    def own_data(cls, options: Mapping[str, Any], *, evaluates: bool) -> OwnData | None:
        """What the weights that `model.*` names were made for; None where the data's own facts are to hold.

        Args:
            options: of `model`.
            evaluates: the weights are tested as they are: in the size of timm's own tests, where it differs, and
                for files that describe nothing, too.

        Raises:
            ConfigError: for what the evaluation policy cannot do.
        """
        wanted, path = options.get("data_config"), options.get("init_from")
        hub = hub_folder(path) if path else None
        if wanted is False or not (wanted or options.get("pretrained") or hub or (evaluates and path)):
            return None
        variant = options.get("type", signature_options(cls)["type"][1])
        name = cls.variants.get(variant, variant)
        if hub:
            described = hub[1]
            known, source = described.get("pretrained_cfg") or described, hub[0].parent.name
        else:
            found = timm.get_pretrained_cfg(name, allow_unregistered=True)
            if found is None:
                return None  # what there is to say of the name, building it will
            described, known = {}, found.to_dict()
            source = f"{name.split('.')[0]}.{found.tag}" if found.tag else name
        resolved = resolve_data_config(pretrained_cfg=known, use_test_size=evaluates)
        _, height, width = resolved["input_size"]
        refused = None
        if height != width:
            refused = f"input of {height}x{width}"
        elif resolved["crop_mode"] not in CROP_MODES:
            refused = f"crop_mode={resolved['crop_mode']}"
        elif resolved["interpolation"] not in ("bilinear", "bicubic", "lanczos"):
            refused = f"interpolation={resolved['interpolation']}"
        if refused:
            raise ConfigError(
                f"model.data_config={str(wanted).lower()}: {source} wants {refused}, which the evaluation policy does "
                "not have; model.data_config=false keeps the data's own", "docs/weights.md",
            )  # fmt: skip
        count = described.get("num_classes") or known.get("num_classes") or 0
        names = described.get("label_names") or known.get("label_names")
        if names is None and count == 1000:
            names = ImageNetInfo("imagenet-1k").label_names()
        if not isinstance(names, (list, tuple)) or len(names) != count:
            names = None
        return OwnData(
            source, height, list(resolved["mean"]), list(resolved["std"]), resolved["interpolation"],
            resolved["crop_pct"], resolved["crop_mode"], count, None if names is None else [str(n) for n in names],
        )  # fmt: skip

    def __init__(
        self,
        type: Any,
        stochastic_depth: Annotated[
            float | None, "[0, 1)", "drop rate of the last block (arXiv 1603.09382); null: the network's own"
        ] = None,
        resnet_dropout: Annotated[
            float | None, "[0, 1)", "dropout rate before the head; null: the network's own"
        ] = None,
        pretrained: Annotated[bool, "start from timm's weights of this name"] = False,
        timm_kwargs: Annotated[dict[str, Any] | None, "further arguments of the network"] = None,
        data_config: Annotated[
            bool | None,
            "size, mean, std, filter and crop as timm gives them with the weights; null: with weights of timm's",
        ] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = self.variants.get(type, type)
        if pretrained:
            self.weights_report = self._adapted(name)
        self.model = build_timm(
            name,
            self,
            stochastic_depth=stochastic_depth,
            resnet_dropout=resnet_dropout,
            pretrained=pretrained,
            timm_kwargs=timm_kwargs,
        )

    def _adapted(self, name: str) -> str:
        """What timm changes in its weights for other data, for people."""
        found, lines = timm.get_pretrained_cfg(name, allow_unregistered=True), []
        if found is None:
            return ""
        if (channels := found.input_size[0]) != self.input_channels:
            lines.append(f"  first convolution: {stem_words(channels, self.input_channels)}")
        if found.num_classes != self.num_outputs:
            lines.append(f"  head: new, of {self.num_outputs} outputs; the weights' has {found.num_classes}")
        return "\n".join([f"model.pretrained=true: timm's weights of {name}", *lines])


class TimmModel(TimmFamily):
    """Any network of timm, by its name there."""

    @classmethod
    def settle_network(cls, options: dict[str, Any], typed: Collection[str]) -> list[str]:
        if not options.get("init_from") or (hub := hub_folder(options["init_from"])) is None:
            return []
        name, arguments = hub[1]["architecture"], hub[1].get("model_args") or {}
        if "model.type" in typed and options["type"].split(".")[0] != name:
            raise ConfigError(
                f"model.type={options['type']}: model.init_from={options['init_from']} is of {name}"
            )
        options["type"] = name
        others = {n: v for n, v in arguments.items() if n not in OPTION_OF}
        options["timm_kwargs"] = {**others, **(options.get("timm_kwargs") or {})}
        return [f"model.type={name}, as config.json says"]

    def __init__(
        self,
        type: Annotated[str, "timm's name, such as resnet18 or convnext_tiny.fb_in1k"] = "resnet18",
        **kwargs: Any,
    ) -> None:
        super().__init__(type, **kwargs)


class RegNet(TimmFamily):
    """RegNetX and RegNetY (Radosavovic et al., arXiv 2003.13678); Y is X with squeeze-and-excitation."""

    variants = {
        f"{kind}-{size}GF": f"regnet{kind.lower()}_{size.replace('.', ''):0>3}"
        for kind in "XY"
        for size in ("0.2", "0.4", "0.8", "1.6", "3.2", "4.0", "6.4", "8.0")
    }

    def __init__(
        self,
        type: Annotated[
            Literal[
                "X-0.2GF", "X-0.4GF", "X-0.8GF", "X-1.6GF", "X-3.2GF", "X-4.0GF", "X-6.4GF", "X-8.0GF",
                "Y-0.2GF", "Y-0.4GF", "Y-0.8GF", "Y-1.6GF", "Y-3.2GF", "Y-4.0GF", "Y-6.4GF", "Y-8.0GF",
            ],
            "kind, and billions of multiply-adds at 224 pixels",
        ] = "X-4.0GF",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(type, **kwargs)


class ResNeSt(TimmFamily):
    """ResNets with split attention (Zhang et al., arXiv 2004.08955)."""

    variants = {14: "resnest14d", 26: "resnest26d", 50: "resnest50d", 101: "resnest101e", 200: "resnest200e"}

    def __init__(self, type: Annotated[Literal[14, 26, 50, 101, 200], "layers"] = 50, **kwargs: Any) -> None:
        super().__init__(type, **kwargs)


class MobileNet(TimmFamily):
    """MobileNet v1 (Howard et al., arXiv 1704.04861), v2 (arXiv 1801.04381) and v3 (arXiv 1905.02244)."""

    variants = {
        "v1": "mobilenetv1_100",
        "v2": "mobilenetv2_100",
        "v3-large": "mobilenetv3_large_100",
        "v3-small": "mobilenetv3_small_100",
    }

    def __init__(
        self,
        type: Annotated[Literal["v1", "v2", "v3-large", "v3-small"], "version"] = "v3-large",
        **kwargs: Any,
    ) -> None:
        super().__init__(type, **kwargs)


class GhostNet(TimmFamily):
    """GhostNet (Han et al., arXiv 1911.11907): half of each layer's channels by cheap depthwise filters."""

    variants = {0.5: "ghostnet_050", 1.0: "ghostnet_100", 1.3: "ghostnet_130"}

    def __init__(
        self,
        type: Annotated[Literal[0.5, 1.0, 1.3], "width relative to the paper's"] = 1.3,  # type: ignore[valid-type]
        **kwargs: Any,
    ) -> None:
        super().__init__(type, **kwargs)
