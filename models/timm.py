"""Any image classification network of timm (pytorch-image-models) by name."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from torch import nn

from crucible.options import ConfigError
from models.base_model import BaseModel

# arguments of timm's that have an option of their own
OPTION_OF = {
    "num_classes": "data.num_classes",
    "in_chans": "data.input_channels",
    "drop_path_rate": "model.stochastic_depth",
    "drop_rate": "model.resnet_dropout",
    "pretrained": "model.pretrained",
    "checkpoint_path": "model.init_from",
}


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
    import timm

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
        network = timm.create_model(name, pretrained=pretrained, **given)
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
    from timm.layers import DropPath

    return any(isinstance(module, DropPath) and module.drop_prob > 0 for module in network.modules())


def _drops_features(network: nn.Module) -> bool:
    # about a third of timm's families have no dropout module: they apply F.dropout with their `drop_rate`
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "drop_rate", 0.0) > 0
        for module in network.modules()
    )


class TimmModel(BaseModel):
    """Any network of timm, by its name there; needs 2-D data."""

    def __init__(
        self,
        type: Annotated[str, "timm's name, such as resnet18 or convnext_tiny.fb_in1k"] = "resnet18",
        stochastic_depth: Annotated[
            float | None, "[0, 1)", "drop rate of the last block (arXiv 1603.09382); null: the network's own"
        ] = None,
        resnet_dropout: Annotated[
            float | None, "[0, 1)", "dropout rate before the head; null: the network's own"
        ] = None,
        pretrained: Annotated[bool, "start from timm's weights of this name"] = False,
        timm_kwargs: Annotated[dict[str, Any] | None, "further arguments of the network"] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model = build_timm(
            type,
            self,
            stochastic_depth=stochastic_depth,
            resnet_dropout=resnet_dropout,
            pretrained=pretrained,
            timm_kwargs=timm_kwargs,
        )
