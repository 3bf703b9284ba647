"""The step of a run on a GPU that is not there: the project's own code on fake CUDA tensors, which have shapes and devices but no values.

    python tests/fake_gpu.py [--processes 8] [--device-batch-size N] [--full-size] [RECIPE or key=value ...]

It finds tensors on two devices, operations whose shape depends on values (masks), and what makes the host wait for the device; and it counts
kernel launches by phase. It does not see values, streams, compiled code, or how long anything takes. Attention takes its path of many
kernels here, so the student's launches are too many.

It is a program of its own, because it makes torch.cuda answer as beside a GPU. It prints a line of JSON for each recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._subclasses.fake_tensor as fake_tensors
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
GPU = torch.device("cuda", 0)
# The host reads a number of these to go on.
READS = {"_local_scalar_dense", "is_nonzero", "equal"}
# These look at values on the host, by themselves or for the shape of what they give.
CHECKS = {"_linalg_check_errors", "nonzero", "masked_select", "_unique2", "bincount", "repeat_interleave"}
# They launch nothing.
VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "expand", "t", "transpose", "permute", "movedim", "select", "slice", "split"),
    *("split_with_sizes", "unbind", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "diagonal", "unfold", "view_as_real"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "record_stream", "device"),
}
# CUDA kernels without an implementation for fake tensors: what they give.
NO_FAKE: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": lambda x, eps: (_channels(x), _channels(x)),
    "batch_norm_gather_stats_with_counts": lambda x, *_: (_channels(x), _channels(x)),
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda g, x, *_: tuple(_channels(x) for _ in range(4)),
    "batch_norm_backward_elemt": lambda g, x, *_: torch.empty_like(x),
    "_fused_sgd_": lambda *_, **__: None,
    "_linalg_check_errors": lambda *_, **__: None,
}


def _channels(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


class Mode(FakeTensorMode):
    """Does not look for the device."""

    avoid_device_init = True


class Watch(TorchDispatchMode):
    """Counts launches by phase, and waits by the line that caused them, while it listens."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.phase, self.listens = "buffers", False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name in READS and any(map(on_gpu, given)):
            self.note(f"{name} reads a number")
            return 1.0 if given[0].is_floating_point() else given[0].dtype == torch.bool or 1
        if name == "_local_scalar_dense" and isinstance(given[0], FakeTensor):
            return 0.0  # of the host's own memory
        if name == "index" and on_gpu(args[0]) and any(each is not None and each.dtype == torch.bool for each in args[1]):
            raise Unknown(f"a mask as an index: {place()}")
        if name in CHECKS and any(map(on_gpu, given)):
            self.note(f"{name} looks at values")
        output = NO_FAKE[name](*args, **kwargs) if name in NO_FAKE else func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            self.copied(name, args, kwargs, output)
        if name not in VIEWS and any(on_gpu(each) for each in [*given, *tree_leaves(output)]):
            self.count()
        return output

    def copied(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], output)
        if on_gpu(source) == on_gpu(target):
            return
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if waits:
            self.note(f"a copy {'from' if on_gpu(source) else 'to'} the device waits")
        elif not on_gpu(source) and source.numel() and not getattr(source, "is_pinned_here", False):
            self.note("a copy of memory that is not pinned")

    def count(self) -> None:
        if self.listens:
            self.launches[self.phase] += 1

    def note(self, what: str) -> None:
        if self.listens:
            self.waits[f"{what}: {place()}"] += 1


class Unknown(Exception):
    """A shape that the host does not know."""


WATCH, MODE = Watch(), Mode(allow_non_fake_inputs=True)


def on_gpu(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


def place() -> str:
    """The innermost line of the package, without its number: tests name it."""
    frames = [frame for frame in traceback.extract_stack() if "/deit_kd/" in frame.filename]
    return f"{Path(frames[-1].filename).relative_to(ROOT / 'deit_kd')}: {frames[-1].line}" if frames else "outside of the package"


@contextlib.contextmanager
def fakes() -> Iterator[None]:
    if WATCH in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        yield
        return
    with MODE, WATCH:
        yield


def backward(loss: Tensor) -> None:
    """Autograd's engine, which asks the driver for streams before it runs a node of a CUDA tensor."""
    order: list[Any] = []
    seen, stack = set(), [(loss.grad_fn, False)]
    while stack:  # each node after all that read its output
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((before, False) for before, _ in node.next_functions if before is not None)]  # type: ignore[union-attr]
    given: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        for node in reversed(order):
            incoming = given.pop(node, None)
            if not incoming:
                continue
            if hasattr(node, "variable"):
                leaf = node.variable
                leaf.grad = incoming[0].detach() if leaf.grad is None else leaf.grad.add_(incoming[0])
                continue
            gradients = [incoming.get(number) for number in range(len(node._input_metadata))]
            custom = isinstance(node, torch.autograd.function.BackwardCFunction)
            output = node.apply(*gradients) if custom else node(*gradients)
            for (before, number), value in zip(
                node.next_functions, output if isinstance(output, tuple) else (output,), strict=False
            ):
                if before is not None and value is not None:
                    value, held = _as_wanted(value, before._input_metadata[number]), given.setdefault(before, {})
                    held[number] = held[number] + value if number in held else value


def _as_wanted(gradient: Tensor, wanted: Any) -> Tensor:
    assert wanted.device == gradient.device, f"a gradient on {gradient.device} for a tensor on {wanted.device}"
    if gradient.shape != tuple(wanted.shape):
        gradient = gradient.sum_to_size(tuple(wanted.shape))
    return gradient if gradient.dtype == wanted.dtype else gradient.to(wanted.dtype)


def fake_of(tensor: Tensor, device: torch.device = GPU) -> Tensor:
    with MODE, torch.no_grad():
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def replace_tensors(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Changes parameters and buffers; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for each in module.modules():
        for held in (each._parameters, each._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = made.setdefault(id(tensor), change(tensor)) if id(tensor) not in made else made[id(tensor)]
    return module


def move(module: nn.Module, *arguments: Any, **kwargs: Any) -> nn.Module:
    """nn.Module.to."""
    if any(str(each).startswith("cuda") for each in arguments):
        return replace_tensors(module, lambda tensor: tensor if isinstance(tensor, FakeTensor) else fake_of(tensor))
    if not any(isinstance(tensor, FakeTensor) for tensor in module.parameters()):
        return REAL_MOVE(module, *arguments, **kwargs)
    dtype = next((each for each in arguments if isinstance(each, torch.dtype)), None)

    def change(tensor: Tensor) -> Tensor:
        with MODE, torch.no_grad():
            made = tensor.detach().to(dtype if tensor.is_floating_point() else None)
            if tensor.ndim == 4 and "memory_format" in kwargs:
                made = made.contiguous(memory_format=kwargs["memory_format"])
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    return replace_tensors(module, change)


REAL_MOVE: Callable[..., nn.Module] = nn.Module.to


class Event:
    """Of a stream, and the stream: everything is done at once."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record(self, *_: Any) -> None:
        pass

    wait_stream = wait_event = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        WATCH.note("synchronizes")


class OneOfMany(nn.Module):
    """In the place of DDP."""

    def __init__(self, module: nn.Module, **_: Any):
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **kwargs: Any) -> Any:
        return self.module(*arguments, **kwargs)

    def no_sync(self) -> Any:
        return contextlib.nullcontext()


def put_in_place(owner: Any, **values: Any) -> None:
    """For good: this process does nothing else."""
    for name, value in values.items():
        setattr(owner, name, value)


def answer(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def make_believe(processes: int) -> None:
    """torch.cuda answers as beside an H100; several processes are there, of which this is the first."""
    put_in_place(
        torch.cuda,
        **{name: answer(True) for name in ("is_available", "is_bf16_supported")},
        **{name: answer(None) for name in ("manual_seed", "manual_seed_all", "set_device", "empty_cache", "init")},
        **{name: answer(False) for name in ("is_current_stream_capturing", "_is_in_bad_fork")},
        device_count=answer(1),
        current_device=answer(0),
        get_device_name=answer("NVIDIA H100 80GB HBM3"),
        get_device_capability=answer((9, 0)),
        synchronize=lambda *_: WATCH.note("synchronizes"),
        Event=Event,
        Stream=Event,
        current_stream=Event,
        stream=answer(contextlib.nullcontext()),
    )
    put_in_place(fake_tensors, init_gpu_context=answer(None))
    put_in_place(torch.nn.utils.clip_grad, _has_foreach_support=answer(True))  # it is for CUDA, and not for subclasses of Tensor
    put_in_place(nn.Module, to=move)
    torch.utils._device._device_constructors()  # remembers torch.empty before it is another
    real_list, real_empty = Tensor.tolist, torch.empty

    def tolist(self: Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return real_list(self)
        if on_gpu(self):
            WATCH.note("tolist reads numbers")

        def ones(shape: tuple[int, ...]) -> Any:
            return [ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0

        return ones(tuple(self.shape))

    def pinned(self: Tensor, *_: Any) -> Tensor:
        self.is_pinned_here = True  # type: ignore[attr-defined]
        return self

    def empty(*arguments: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = real_empty(*arguments, **kwargs)
        return pinned(made) if pin_memory else made

    put_in_place(
        Tensor, tolist=tolist, pin_memory=pinned, record_stream=answer(None), backward=lambda self, *_, **__: backward(self)
    )
    generator = torch.Generator
    put_in_place(torch, empty=empty, Generator=lambda *_, **__: generator())

    def deep(self: Tensor, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), fake_of(self, self.fake_device))  # type: ignore[attr-defined]

    put_in_place(FakeTensor, __deepcopy__=deep)
    if processes > 1:
        _many(processes)


def _many(processes: int) -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = {"RANK": 0, "WORLD_SIZE": processes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": 29511}
    os.environ.update({**{name: str(value) for name, value in ranks.items()}, "MASTER_ADDR": "127.0.0.1"})
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    put_in_place(PartialState, _prepare_backend=lambda *_, **__: ("nccl", DistributedType.MULTI_GPU))
    put_in_place(torch.nn.parallel, DistributedDataParallel=OneOfMany)

    def of_gpus(name: str) -> Callable[..., None]:
        def collective(*arguments: Any, **kwargs: Any) -> None:
            for each in tree_leaves((arguments, kwargs)):
                assert not isinstance(each, Tensor) or on_gpu(each), f"NCCL has no {name} of a CPU tensor: {place()}"
            WATCH.count()

        return collective

    names = ("all_reduce", "broadcast", "all_gather_into_tensor", "all_gather", "barrier")
    put_in_place(dist, **{name: of_gpus(name) for name in names})
    put_in_place(
        dist,
        broadcast_object_list=answer(None),
        all_gather_object=lambda found, mine, **_: found.__setitem__(slice(None), [mine] * len(found)),
    )


class RealBatches:
    """Loads in real memory, which counts as pinned."""

    def __init__(self, dataset: Any, collate: Any, workers: int, pin: bool, *more: Any):
        from deit_kd.data.workers import Batches

        assert pin, "what goes to a GPU is pinned"
        self.batches = Batches(dataset, collate, 0, False, *more)

    def __call__(self, keys: Any) -> Iterator[Any]:
        with _disable_current_modes():
            stream = iter(self.batches(keys))
        while True:
            with _disable_current_modes():
                batch = next(stream, None)
            if batch is None:
                return
            for each in tree_leaves(batch):
                if isinstance(each, Tensor):
                    each.is_pinned_here = True  # type: ignore[attr-defined]
            yield batch


def in_phase(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **kwargs: Any) -> Any:
        before, WATCH.phase = WATCH.phase, name
        try:
            with fakes():
                return function(*arguments, **kwargs)
        finally:
            WATCH.phase = before

    return call


def rehearse(recipe: Any, data: Path, device_batch_size: int | None) -> dict[str, Any]:
    """Trains two steps, neither of which is logged, and evaluates; tells of the second, which finds the states made."""
    from accelerate.state import AcceleratorState

    from deit_kd.models import Teacher
    from deit_kd.models.folding import fold_batch_norms
    from deit_kd.profiling import bench
    from deit_kd.tasks.classification import Classification
    from deit_kd.training import acceleration, loop
    from deit_kd.training.loop import fit

    AcceleratorState._reset_state(reset_partial_state=True)
    WATCH.waits.clear()
    WATCH.launches.clear()
    WATCH.listens, steps = False, 0

    def accelerated(run: Any, teachers: Any, example: Any, accelerator: Any, sharded: bool = False) -> Any:
        """As on a GPU without compilation; its own measures values."""
        for teacher in dict.fromkeys(teachers):
            if isinstance(teacher, Teacher):
                with fakes(), torch.inference_mode():
                    size = teacher.img_size or recipe.data.img_size
                    teacher.model = copy.deepcopy(teacher.model)
                    fold_batch_norms(teacher.model, lambda teacher=teacher, size=size: teacher.probe(torch.empty(1, 3, size, size)))  # type: ignore[misc]
                    teacher.lay_out(torch.channels_last)
                    low = teacher.dtype_once_folded or acceleration.HALF.get(accelerator.mixed_precision)
                    if low and (teacher.dtype_once_folded or teacher.follows_autocast):
                        teacher.use(low)
        return acceleration.Acceleration((), None)

    own = {"prepare": acceleration.prepare, "backward": loop._backward, "update": loop._update}

    def count_step(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        WATCH.listens = steps > 1
        return in_phase("backward and the rest", own["backward"])(*arguments)

    acceleration.prepare, loop._backward, loop._update = accelerated, count_step, in_phase("optimizer", own["update"])  # type: ignore[assignment]
    try:
        benchmark = bench.StepBenchmark(recipe, data, "cuda", device_batch_size)
        with fakes():
            task, loader = benchmark.task, benchmark.loader
            task.compute_terms = in_phase("student and losses", task.compute_terms)  # type: ignore[method-assign]
            loader._finished = in_phase("augmentation", loader._finished)  # type: ignore[method-assign]
            task.train_loader, task.steps_per_epoch = bench._Endless(loader.epoch), 2  # type: ignore[assignment]
            fit(
                task,
                benchmark.accelerator,
                benchmark.optimizer,
                benchmark.schedule,
                bench.Run(log_every_steps=bench.NEVER, eval_every_epochs=1, save_every_steps=bench.NEVER),
                bench._Kept(benchmark.accelerator, "", 2),
                Path(benchmark.folder.name),
                total_steps=bench.NEVER,
                clip_grad=recipe.optim.clip_grad,
                reads_every_step=False,
                ema=benchmark.ema,
            )
            WATCH.listens = False
            without = [
                name
                for name, parameter in task.module.named_parameters()
                if parameter.requires_grad and parameter not in benchmark.optimizer.state
            ]
            task.train_loader = loader
            Classification.evaluate(task, None if benchmark.ema is None else benchmark.ema.module)
            Classification.inspect(task)
    finally:
        acceleration.prepare, loop._backward, loop._update = own["prepare"], own["backward"], own["update"]  # type: ignore[assignment]
        WATCH.listens = False
    return {"waits": dict(WATCH.waits), "launches": dict(WATCH.launches), "without_gradient": without}


def make_photos(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 2)):
        for label in range(10):
            for number in range(count):
                file = folder / split / f"class{label}" / f"{number}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
    return folder


def write_cache(name: str, data: Path, overrides: list[str], folder: Path) -> Path:
    from deit_kd.cli import main as command
    from small_recipes import COMMON, reduced

    words = [*COMMON, *reduced(name), "run.precision=bf16", "run.augment_on=device", *overrides]
    with contextlib.redirect_stdout(sys.stderr):
        command(["cache-teacher", name, "--data", str(data), "--output", str(folder), "--device", "cpu", "--views", "1", *words])
    return folder


def change_the_project() -> None:
    """Images load in real memory; what else reads values while parts are built runs on fake tensors."""
    from deit_kd.data import loader
    from deit_kd.data.on_device.augment import Finish
    from deit_kd.models import Teacher
    from deit_kd.models.cached_teacher import CachedTeacher
    from deit_kd.tasks import setup as setup_of_tasks
    from deit_kd.training import setup

    def class_means(*given: Any) -> Tensor | None:
        source, stated, teacher = given[3], *given[-2:]
        return fake_of(torch.empty(len(source.class_names), teacher.width)) if stated.class_means else None

    def in_real_memory(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with _disable_current_modes():
                return function(*arguments)

        return call

    put_in_place(loader, Batches=RealBatches)
    put_in_place(CachedTeacher, read=in_real_memory(CachedTeacher.read))
    put_in_place(setup, prepare=in_phase("building", setup.prepare))
    put_in_place(setup_of_tasks, stated_means=class_means)
    put_in_place(Finish, __init__=in_phase("building", Finish.__init__))
    put_in_place(Teacher, probe=in_phase("building", Teacher.probe), forward=in_phase("teacher", Teacher.forward))


def main() -> None:
    from deit_kd import recipe as recipes
    from small_recipes import COMMON, reduced

    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device-batch-size", type=int)
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--cached", action="store_true", help="the teacher's answers come from a cache, which is written first")
    options = parser.parse_intermixed_args()
    names, overrides = ([word for word in options.words if ("=" in word) == wanted] for wanted in (False, True))
    with tempfile.TemporaryDirectory() as folder:
        data, cache = make_photos(Path(folder) / "photos"), Path(folder) / "cache"
        if options.cached:
            write_cache(names[0], data, overrides, cache)
            overrides += ["run.augment_on=device", f"teacher.cache={cache}"]
        make_believe(options.processes)
        change_the_project()
        for name in names:
            size = [*COMMON, *reduced(name)]
            if options.full_size:
                size = [*COMMON[:3], *(["teacher.weights=random"] if recipes.load(name).teacher else [])]
            size += [f"global_batch_size={(16 if options.full_size else 8) * options.processes}", "run.precision=bf16", *overrides]
            recipe = recipes.load(name, size)
            if any(each.distill.class_means == "auto" for each in recipe.distillations()):
                recipe = recipes.load(name, [*size, "distill.class_means=theirs"])
            try:
                result = rehearse(recipe, data, options.device_batch_size)
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                ours = [f"{Path(each.filename).name}:{each.lineno} {each.line}" for each in frames if "torch" not in each.filename]
                result = {"error": f"{type(error).__name__}: {error}"[:2000], "at": ours[-8:]}
            print(json.dumps({"recipe": name, **result}), flush=True)


if __name__ == "__main__":
    main()
