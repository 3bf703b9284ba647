"""The door for config.json of networks, as timm writes it in folders and on the hub: a typed schema with bounds.

A license is a text of one line, or null; lists and mappings of some are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
from pydantic import AfterValidator, Field
from timm.layers import to_2tuple
from timm.models._hub import _parse_model_cfg

from deit_kd.errors import UserError
from deit_kd.files.documents import MEGABYTE, Document, parse_json, read_bytes, short
from deit_kd.recipe.checks import MOST_TOKENS, patch_of
from deit_kd.text import printable

AGAIN = "fetch the folder again from its authors, or write it with timm.models.save_for_hf"
MOST_PIXELS = 4096  # a side; timm's largest is 1024
MOST_CLASSES = 1_000_000  # timm's largest is 115,217
MOST_ARGUMENT = 100_000
# arguments of timm's that are no network's: they choose what is loaded, and how strictly
NOT_OF_NETWORKS = {
    "pretrained",
    "checkpoint_path",
    "cache_dir",
    "scriptable",
    "exportable",
    "no_jit",
    "features_only",
    "feature_cfg",
}
NOT_OF_NETWORKS |= {"feature_cls", "out_indices", "pruned", "kwargs_filter", "model_cfg", "model_cls", "variant", "device", "dtype"}


def _line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line, without control characters")
    return text


def _names(value: Any) -> Any:
    some = [value] if isinstance(value, str) else value
    if (
        not isinstance(some, list)
        or not 0 < len(some) <= 100
        or not all(isinstance(name, str) and len(name) < 200 for name in some)
    ):
        raise ValueError("must be a name of a module, or a list of some")
    return value


def _labels(value: Any) -> Any:
    """A list of names; timm also writes {"0": name}."""
    if isinstance(value, dict):
        if set(value) != {str(number) for number in range(len(value))}:
            raise ValueError("must be a list, or name the classes 0, 1, 2 ... without a gap")
        value = [value[str(number)] for number in range(len(value))]
    if not isinstance(value, list) or not all(isinstance(name, str) and 0 < len(name) <= 1000 for name in value):
        raise ValueError("must be a list of class names of at most 1000 characters")
    if twice := next((name for name, last in zip(sorted(value), sorted(value)[1:], strict=False) if name == last), None):
        raise ValueError(f"names two classes {printable(twice)}; tell them apart")
    return value


def _argument(value: Any, levels: int = 3) -> Any:
    if isinstance(value, (list, dict)):
        if levels == 0 or len(value) > 100:
            raise ValueError("must be at most 3 levels deep, with at most 100 values a level")
        for each in value.values() if isinstance(value, dict) else value:
            _argument(each, levels - 1)
    elif isinstance(value, str) and (len(value) > 200 or not value.isprintable()):
        raise ValueError("texts must be one line of at most 200 characters")
    elif isinstance(value, (int, float)) and not abs(value) <= MOST_ARGUMENT:
        raise ValueError(f"numbers must be at most {MOST_ARGUMENT}")
    return value


def _name(name: str) -> str:
    if not name.isidentifier() or name in NOT_OF_NETWORKS or name.startswith("pretrained_"):
        raise ValueError("is no argument of a network")
    return name


def _sizes(value: dict[str, Any]) -> dict[str, Any]:
    size = value.get("img_size")
    for side in size if isinstance(size, list) and len(size) == 2 else [1 if size is None else size]:
        if type(side) is not int or not 1 <= side <= MOST_PIXELS:
            raise ValueError(f"img_size: must be one or two numbers of pixels from 1 to {MOST_PIXELS}")
    return value


def _native(value: Any) -> Any:
    if value not in (None, False):
        raise ValueError("must be false: weights that a loader of their own converts are not read here")
    return value


Line = Annotated[str, Field(max_length=200), AfterValidator(_line)]
Side = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
Mean = Annotated[float, Field(ge=-10, le=10)]  # of pixels in [0, 1]
Std = Annotated[float, Field(ge=1e-4, le=1000)]
Names = Annotated[Any, AfterValidator(_names)]
Labels = Annotated[Any, AfterValidator(_labels)]
Arguments = Annotated[
    dict[Annotated[str, AfterValidator(_name)], Annotated[Any, AfterValidator(_argument)]], AfterValidator(_sizes)
]
Classes = Annotated[int, Field(ge=0, le=MOST_CLASSES)]


class _Pretrained(Document):
    """What timm's PretrainedCfg says that is needed here. Places to load from are not: the weights are those beside the config."""

    tag: Line | None = None
    hf_hub_filename: Line | None = None
    custom_load: Annotated[Any, AfterValidator(_native)] = None
    input_size: tuple[Side, Side, Side] | None = None
    fixed_input_size: bool | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"] | None = None
    crop_pct: Annotated[float, Field(ge=0.2, le=2)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    mean: tuple[Mean, Mean, Mean] | None = None
    std: tuple[Std, Std, Std] | None = None
    num_classes: Classes | None = None
    label_offset: Annotated[int, Field(ge=0, le=1000)] | None = None
    label_names: Labels | None = None
    labels: Labels | None = None  # an old name of it
    first_conv: Names | None = None
    classifier: Names | None = None
    license: Line | None = None


class _Config(Document):
    architecture: Line | None = None
    architectures: Any = None  # transformers'
    num_classes: Classes | None = None
    label_names: Labels | None = None
    labels: Labels | None = None
    model_args: Arguments | None = None
    pretrained_cfg: _Pretrained | None = None


def too_many_tokens(architecture: str, arguments: Mapping[str, Any], side: int) -> str | None:
    """Why images of `side` pixels have more patches than a network can compare with one another; None if they do not."""
    patch = patch_of(architecture, arguments)
    if patch is None or (tokens := (side // patch) ** 2) <= MOST_TOKENS:
        return None
    return f"images of {side} pixels a side in patches of {patch} are {tokens:,} tokens, more than {MOST_TOKENS:,}"


def read_config(file: Path, remedy: str = AGAIN) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A config.json: timm's name of the architecture, its arguments, and the fields of timm's PretrainedCfg, as timm merges them.

    Args:
        file: its path.
        remedy: what the user does about a bad one.

    Raises:
        UserError: it is none, or of a network that timm does not know.
    """
    content = read_bytes(file, remedy, 16 * MEGABYTE)
    config = parse_json(content, str(file), _Config, remedy)
    if config.architecture is None:
        found = " (it is one of transformers)" if config.architectures is not None else ""
        raise UserError(f"{file}: architecture: is missing{found}; give a folder with a config.json that timm wrote")
    architecture = config.architecture.partition(".")[0]
    if not timm.is_model(architecture):
        own_file = (parse_json(content, str(file), dict[str, Any], remedy).get("deit_kd") or {}).get("architecture_in")
        remedy = f"give --import with the path of {short(own_file)}, which registers it" if isinstance(own_file, str) else remedy
        raise UserError(f"{file}: architecture: timm knows no {architecture!r}; {remedy}")
    own = config.pretrained_cfg or parse_json(content, str(file), _Pretrained, remedy)  # old ones have no mapping of their own
    stated = own.model_dump(exclude_none=True, exclude={"labels", "custom_load"})
    stated |= {"num_classes": config.num_classes} if config.num_classes is not None else {}
    names = config.label_names or config.labels or own.label_names or own.labels
    arguments = {key: value for key, value in (config.model_args or {}).items() if value is not None}
    if "num_classes" in arguments:
        stated.setdefault("num_classes", arguments["num_classes"])
    stated |= {"license": own.license or "unknown"} | ({"label_names": names} if names else {})
    stated = {
        "input_size": (3, 224, 224),
        "classifier": getattr(timm.get_pretrained_cfg(architecture), "classifier", None),
        **stated,
    }
    if stated["input_size"][0] != 3 or arguments.get("in_chans", 3) != 3:
        raise UserError(f"{file}: takes images of other than 3 channels; only those of 3 can be used here")
    pretrained, _, arguments = _parse_model_cfg(
        {"pretrained_cfg": stated, "model_args": arguments, "architecture": architecture}, {}
    )
    sizes = [stated["input_size"][1:], arguments.get("img_size") or 1]
    if reason := too_many_tokens(architecture, arguments, max(max(to_2tuple(size)) for size in sizes)):
        raise UserError(f"{file}: {reason}; {AGAIN}")
    classes = pretrained.get("num_classes", 1000)
    if (asked := arguments.get("num_classes", classes)) != classes:
        raise UserError(f"{file}: num_classes: is {classes}, and {json.dumps(asked)} in model_args; {remedy}")
    if names and len(names) != classes:
        raise UserError(f"{file}: label_names: names {len(names)} classes, the network has {classes}; {remedy}")
    return architecture, arguments, pretrained
