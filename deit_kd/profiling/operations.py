"""The work of a training step, counted operation by operation on tensors without memory: FLOPs, bytes moved, bytes kept for backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from deit_kd.models import AnyTeacher
from deit_kd.models.folding import fold_batch_norms
from deit_kd.recipe import Distillation

SMALL, LARGE = 2, 4  # two batch sizes; the difference of their costs is that of images


class Operation(NamedTuple):
    """One call of an aten kernel, forward or backward. It takes flops and bytes for each image, and bytes whatever the batch (weights)."""

    name: str
    flops: float
    bytes_per_image: float
    fixed_bytes: float


@dataclass(frozen=True)
class StepCost:
    """What one micro-batch costs a device.

    Losses are left out: they are a few operations on [B,E] and [B,K], not on maps.
    """

    teacher: tuple[Operation, ...]  # forward of every teacher
    student_forward: tuple[Operation, ...]  # with projectors
    student_backward: tuple[Operation, ...]
    saved_bytes_per_image: float  # activations kept for backward
    fixed_saved_bytes: float  # kept too, whatever the batch: weights cast to half precision
    teacher_peak_per_image: float  # largest input and output of one operation of a teacher, which has nothing else to keep
    trained_parameters: int
    teacher_parameters: int


class _Counter(TorchDispatchMode):
    """Lists (name, flops, bytes read and written) of what runs inside; views and empty tensors move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, float, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            with self:  # inference mode hands composite operations over whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        read, written = ([t for t in tree_leaves(each) if isinstance(t, Tensor)] for each in ((args, kwargs), out))
        known = {_storage(t) for t in read}
        makes = any(_storage(t) not in known for t in written)
        if (makes or func._schema.is_mutable) and "empty" not in func.__name__:
            formula = cast("Callable[..., float] | None", flop_registry.get(func._overloadpacket))
            flops = formula(*args, **kwargs, out_val=out) if formula else 0.0
            self.found.append((str(func._overloadpacket), flops, sum(t.numel() * t.element_size() for t in read + written)))
        return out


def _storage(tensor: Tensor) -> int:
    return cast(int, tensor.untyped_storage()._cdata)


def count_operations(
    distiller: nn.Module,
    teachers: Sequence[AnyTeacher],
    distillations: Sequence[Distillation],
    img_size: int,
    folds: bool,
    half: bool,
) -> StepCost:
    """Counts a step without memory for weights or activations; the networks cannot be used afterwards.

    Args:
        distiller: student and projectors, on the meta device.
        teachers: the teacher of each distillation, on the meta device.
        distillations: of the recipe.
        img_size: pixels a side, what the student sees.
        folds: teachers are counted with their batch norms folded into convolutions.
        half: with bfloat16 autocast, as on a GPU, casts included; else float32.
    """
    each_teacher: list[Any] = list(dict.fromkeys(teachers))
    taps = [each.distill.teacher_tap if each.distill.feature_weight else None for each in distillations]
    if folds:
        for teacher in each_teacher:
            size = teacher.img_size or img_size
            image = torch.empty(1, 3, size, size, dtype=teacher.dtype, device="meta")
            fold_batch_norms(teacher.model, partial(teacher.model, image))
    cast_to_half = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    passes, saved = [], []
    with FakeTensorMode(allow_non_fake_inputs=True):  # autocast works on fake CPU tensors, not on meta's
        for model in (*each_teacher, distiller):
            model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu", requires_grad=t.requires_grad))
        distiller.train()
        for batch in (SMALL, LARGE):
            images = torch.empty(batch, 3, img_size, img_size, device="cpu")
            counted, kept = _step(taps, each_teacher, teachers, distiller, images, cast_to_half)
            passes.append(counted)
            saved.append(kept)
    teacher, forward, backward = (_per_image(small, large) for small, large in zip(*passes, strict=True))
    per_image = (saved[1] - saved[0]) / (LARGE - SMALL)
    return StepCost(
        teacher=teacher,
        student_forward=forward,
        student_backward=backward,
        saved_bytes_per_image=per_image,
        fixed_saved_bytes=saved[0] - SMALL * per_image,
        teacher_peak_per_image=max((each.bytes_per_image for each in teacher), default=0.0),
        trained_parameters=sum(p.numel() for p in distiller.parameters() if p.requires_grad),
        teacher_parameters=sum(p.numel() for model in each_teacher for p in model.parameters()),
    )


_Found = list[tuple[str, float, float]]


def _step(
    taps: Sequence[Any],
    each_teacher: list[Any],
    teachers: Sequence[Any],
    distiller: nn.Module,
    images: Tensor,
    cast_to_half: AbstractContextManager[Any],
) -> tuple[tuple[_Found, _Found, _Found], float]:
    """(operations of teachers, of the student's forward, of its backward), and bytes that forward kept for backward."""
    distiller.zero_grad(set_to_none=True)
    ours = {_storage(p) for p in distiller.parameters()} | {_storage(b) for b in distiller.buffers()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in ours:
            kept[_storage(tensor)] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with cast_to_half:
        with _Counter() as teaching:
            outputs = {teacher: teacher(images) for teacher in each_teacher}
        tapped = [None if tap is None else outputs[teacher].tapped[tap] for tap, teacher in zip(taps, teachers, strict=True)]
        with _Counter() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = distiller(images, tapped)
    results = [t for t in tree_leaves(tuple(output)) if isinstance(t, Tensor) and t.requires_grad]
    with _Counter() as backward:
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])
    return (teaching.found, forward.found, backward.found), float(sum(size for size, _ in kept.values()))


def _per_image(small: _Found, large: _Found) -> tuple[Operation, ...]:
    operations = []
    for (name, less, few), (same, more, many) in zip(small, large, strict=True):
        assert name == same
        per_image = (many - few) / (LARGE - SMALL)
        operations.append(Operation(name, (more - less) / (LARGE - SMALL), per_image, max(0.0, few - SMALL * per_image)))
    return tuple(operations)
