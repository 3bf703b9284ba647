"""Networks that a config.json describes, as timm writes one, in a folder or on the hub: read through a schema with bounds.

What a config asks for is counted on the meta device and held against the weights beside it before it takes memory. timm opens no file
here: it gets the values that were checked, and the weights that `open_weights` gave.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import AfterValidator, Field
from timm.models import PretrainedCfg
from timm.models._hub import EntryNotFoundError, _get_safe_alternatives, _parse_model_cfg, download_from_hf
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

from deit_kd.documents import MEGABYTE, Document, parse_json, read_bytes
from deit_kd.errors import UserError
from deit_kd.models.taps import TimmModel
from deit_kd.models.weights import TIMMS, must_be_finite, open_weights
from deit_kd.text import printable

RELEASED = Path(__file__).resolve().parent.parent / "released"
AGAIN = "fetch the folder again from its authors, or write it with timm.models.save_for_hf"
MOST_PIXELS = 4096  # a side; timm's largest is 1024
MOST_CLASSES = 1_000_000  # timm's largest is 115,217
MOST_ARGUMENT = 100_000
MOST_NUMBERS, MOST_TENSORS = 250_000_000, 5_000  # of a network without weights beside its config
MOST_OF_HUB = 10_000_000_000  # likewise, where its weights are not fetched; timm's largest has 6.7
# where timm looks for a folder's weights, and the ends of other names
_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
WEIGHTS = ("model.safetensors", *_FILES[2:], *[f"open_clip_{name}" for name in _FILES[:4]])
SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin")
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


@dataclasses.dataclass
class _WithWeights(PretrainedCfg):
    """timm copies a config with everything in it, the weights too, for each network."""

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        without = copy.copy(self)
        without.state_dict = None
        return {**PretrainedCfg.to_dict(without, *args, **kwargs), "state_dict": self.state_dict}


@dataclasses.dataclass(frozen=True)
class Described:
    """A network of a folder or the hub, as its config.json has it."""

    config: Path
    architecture: str  # timm's name
    arguments: dict[str, Any]  # of the architecture
    pretrained: dict[str, Any]  # fields of timm's PretrainedCfg
    hub_id: str | None  # of the hub's

    def weights(self) -> Path:
        """The file of weights, fetched if it is on the hub.

        Raises:
            UserError: there is none.
        """
        if self.hub_id is not None:
            return _hub_weights(self.hub_id, self.pretrained.get("hf_hub_filename") or "pytorch_model.bin")
        folder = self.config.parent
        there = sorted(os.listdir(folder))
        names = [name for name in WEIGHTS if name in there] or [name for end in SUFFIXES for name in there if name.endswith(end)]
        if not names:
            raise UserError(f"{folder}: has no weights, only {self.config.name}; put a model.safetensors there")
        return folder / names[0]

    def load(self, drawn_before: bool = False, **changed: Any) -> TimmModel:
        """The network with its weights, after all was checked.

        Args:
            drawn_before: draws the random weights of a whole network first, after which fresh heads get other ones.
            changed: arguments that shall differ from the stored ones.

        Raises:
            UserError: weights that cannot be read, or that are not this network's; arguments that it refuses.
        """
        file, tensors = self.open_weights()
        must_be_finite(tensors, file)
        try:
            if drawn_before:
                self.create()
            return self.create(tensors, **changed)
        except Exception as error:  # timm raises many types for what does not fit
            raise UserError(f"{file}: not the weights of {self._name} ({why(error)}); {AGAIN}") from None

    def open_weights(self) -> tuple[Path, dict[str, Tensor]]:
        """The file of weights, and its tensors once they are known to be this network's; see `weights.open_weights`.

        Raises:
            UserError: as there; or they are another network's.
        """
        file = self.weights()
        tensors = open_weights(file, TIMMS)
        must_fit(self.create, tensors, self._name, file, self.pretrained["input_size"])
        return file, tensors

    def build(self, **changed: Any) -> TimmModel:
        """The network with random weights, after its size was checked.

        Raises:
            UserError: a network that is too large, or does not work.
        """
        self.must_be_usual()
        try:
            return self.create(**changed)
        except Exception as error:
            raise UserError(f"{self._name} cannot be built so ({why(error)}); {AGAIN}") from None

    def must_be_usual(self) -> None:
        """Holds the network against what networks usually are, where its weights are not there to tell.

        Raises:
            UserError: it is larger, or does not work.
        """
        must_fit(
            self.create, None, self._name, self.config, self.pretrained["input_size"], MOST_OF_HUB if self.hub_id else MOST_NUMBERS
        )

    def create(self, tensors: Mapping[str, Tensor] | None = None, **changed: Any) -> TimmModel:
        """What timm makes of it, unchecked; without `tensors` of random weights."""
        config = _WithWeights(**self.pretrained, state_dict=None if tensors is None else dict(tensors))
        arguments = {**self.arguments, **changed, "pretrained_model_args": dict(self.arguments)}
        model = timm.create_model(self.architecture, pretrained=tensors is not None, pretrained_cfg=config, **arguments)
        model.pretrained_cfg.pop("state_dict", None)
        return model

    @property
    def _name(self) -> str:
        return f"{self.architecture} with the model_args of {self.config}"


def must_fit(
    create: Callable[[], TimmModel],
    tensors: Mapping[str, Tensor] | None,
    name: str,
    file: Path,
    input_size: Sequence[int],
    most_numbers: int = 0,
) -> None:
    """Builds and runs a network on the meta device, where nothing takes memory, and holds it against its weights.

    Args:
        create: builds it.
        tensors: the weights, of which shapes alone are read; None: there are none.
        name: of the network, for messages.
        file: of the weights, likewise.
        input_size: [3] channels, height and width of an image that it must take.
        most_numbers: that it may have without weights.

    Raises:
        UserError: it needs more or far less than the weights have, or does not work.
    """
    stored = most_numbers if tensors is None else sum(value.numel() for value in tensors.values())
    number = MOST_TENSORS if tensors is None else len(tensors)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            warnings.simplefilter("ignore")  # an odd network is told of below
            with _at_most(stored + stored // 4 + 1_000_000, 4 * number + 100):
                model = create().eval()
            output = model(torch.zeros(1, *input_size))
        classes = model.num_classes
        if not isinstance(output, Tensor) or output.ndim < 2 or (classes and output.shape != (1, classes)):
            raise ValueError(f"an image gives {list(getattr(output, 'shape', []))} instead of {classes} logits")
    except _TooLarge:
        if tensors is None:
            raise UserError(f"{name} is larger than {stored:,} numbers in {number:,} tensors; {AGAIN}") from None
        raise UserError(
            f"{file}: not the weights of {name}: it has {stored:,} numbers in {number:,} tensors, the network more; {AGAIN}"
        ) from None
    except Exception as error:  # torch and timm raise many types for arguments that do not fit
        raise UserError(f"{name} does not work ({why(error)}); {AGAIN}") from None
    needed = sum(value.numel() for value in model.state_dict().values())
    if tensors is not None and stored > 4 * needed + 1_000_000:
        raise UserError(f"{file}: not the weights of {name}: it has {stored:,} numbers, the network {needed:,}; {AGAIN}")


class _TooLarge(BaseException):  # which nobody in between takes for an error of theirs
    pass


@contextmanager
def _at_most(numbers: int, tensors: int) -> Iterator[None]:
    """Networks that are built inside may have so much; the first module or parameter beyond ends the block."""
    left = {"numbers": numbers, "tensors": tensors, "modules": 10 * tensors}

    def parameter(_: Any, __: str, value: Tensor | None) -> None:
        if value is not None:
            left["tensors"] -= 1
            left["numbers"] -= value.numel()
            if min(left["tensors"], left["numbers"]) < 0:
                raise _TooLarge

    def module(_: Any, __: str, ___: Any) -> None:
        left["modules"] -= 1
        if left["modules"] < 0:
            raise _TooLarge

    hooks = [register_module_parameter_registration_hook(parameter), register_module_module_registration_hook(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def folder_of(name: str) -> Path | None:
    """Where a folder, a run or a released name has its config.json."""
    places = (Path(name), Path(name) / "student", RELEASED / name)
    return next((path for path in places if name and "\0" not in name and os.path.lexists(path / "config.json")), None)


def describe(source: str) -> Described | None:
    """The network of a folder, a run, a released name, `local-dir:` or `hf-hub:`; None of other sources.

    Raises:
        UserError: no config.json, or none of a network that timm knows.
    """
    scheme, _, place = source.partition(":")
    scheme = scheme.lower().replace("_", "-") if place else ""
    folder = Path(place) if scheme == "local-dir" else None if scheme == "hf-hub" else folder_of(source)
    if folder is None and scheme != "hf-hub":
        return None
    file = _download(place, "config.json") if folder is None else folder.absolute() / "config.json"
    content = read_bytes(file, AGAIN, 16 * MEGABYTE)
    config = parse_json(content, str(file), _Config, AGAIN)
    if config.architecture is None:
        found = " (it is one of transformers)" if config.architectures is not None else ""
        raise UserError(f"{file}: architecture: is missing{found}; give a folder with a config.json that timm wrote")
    architecture = config.architecture.partition(".")[0]
    if not timm.is_model(architecture):
        raise UserError(f"{file}: architecture: timm knows no {architecture!r}; {AGAIN}")
    own = config.pretrained_cfg or parse_json(content, str(file), _Pretrained, AGAIN)  # old ones have no mapping of their own
    stated = own.model_dump(exclude_none=True, exclude={"labels", "custom_load"})
    stated |= {"num_classes": config.num_classes} if config.num_classes is not None else {}
    names = config.label_names or config.labels or own.label_names or own.labels
    arguments = {key: value for key, value in (config.model_args or {}).items() if value is not None}
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
    classes = pretrained.get("num_classes", 1000)
    if (asked := arguments.get("num_classes", classes)) != classes:
        raise UserError(f"{file}: num_classes: is {classes}, and {json.dumps(asked)} in model_args; {AGAIN}")
    if names and len(names) != classes:
        raise UserError(f"{file}: label_names: names {len(names)} classes, the network has {classes}; {AGAIN}")
    return Described(file, architecture, arguments, pretrained, place if folder is None else None)


def _hub_weights(hub_id: str, name: str) -> Path:
    if "/" in name or "\\" in name:
        raise UserError(f"hf-hub:{hub_id}: hf_hub_filename {name!r} is no name of a file; {AGAIN}")
    wanted = [*_get_safe_alternatives(name), name] if not name.endswith(".safetensors") else [name]
    for each in wanted[:-1]:
        try:
            return Path(download_from_hf(hub_id, each))
        except EntryNotFoundError:
            continue
        except Exception:  # told of the last one
            break
    return _download(hub_id, wanted[-1])


def _download(hub_id: str, name: str) -> Path:
    try:
        return Path(download_from_hf(hub_id, name))
    except Exception as error:  # the hub's client raises many types
        raise UserError(
            f"hf-hub:{printable(hub_id)}: cannot be loaded ({why(error)}); check the name; with no network, give a folder with config.json and "
            "model.safetensors, or for a teacher give a local file with teacher.weights=PATH"
        ) from None


def why(error: BaseException, most: int = 300) -> str:
    """An error of another library in one line."""
    return printable(" ".join(str(error)[: 10 * most].split()))[:most] or type(error).__name__
