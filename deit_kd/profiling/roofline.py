"""How long a recipe takes on devices, which need not be there: counted work divided by what a device can do.

Seconds of a pass are the sum over its operations of max(FLOPs / peak, bytes / bandwidth), divided by the share of the peak that such networks
reach, or the time to launch the operations where that is longer. Every number for GPUs is a prediction; see `EFFICIENCY`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deit_kd.data.build import accumulation
from deit_kd.errors import UserError
from deit_kd.models.summary import Plan
from deit_kd.profiling.devices import Device
from deit_kd.profiling.operations import Operation, StepCost

# The share of the roofline that is reached, from published images a second, not from a measurement here. Teachers: RegNetY-160 inference in timm's results
# tables, eager 1,070 (3090), 1,664 (4090), 2,299 (5090), 2,377 (RTX PRO 6000): 0.77, 0.75, 0.68, 0.53; compiled 2,152, 2,848, 3,093: 0.97, 0.84, 0.69.
# Students: timm's training table, 3090, DeiT-Ti and DeiT-S, eager 2,253 and 1,033: 0.48, 0.62; compiled one ViT-5-S on an H100 in nvSubquadratic's
# documentation, 7,716, taken as a DeiT-S: 0.71. No datacenter GPU is among the teachers'.
EFFICIENCY = {"teacher": {False: 0.71, True: 0.84}, "student": {False: 0.55, True: 0.71}}
# Of a CPU: measured here on one AMD EPYC core with AVX-512, batches of 8 in float32, processor time: RegNetY-160 0.83, 0.79, DeiT-Ti 0.82, DeiT-S 0.83.
CPU_EFFICIENCY = {"teacher": 0.8, "student": 0.8}
# Launches a step beside the networks', counted by the suite's rehearsal: of the augmentation with and without RandAugment, of optimizer and guard.
AUGMENTATION, UPDATE = {True: 150, False: 10}, 30
COMPILED = 0.5  # of an eager step's launches, an estimate: what is compiled fuses everything but products and convolutions
USABLE = 0.9  # of a device's memory; the rest goes to the driver and to gaps


@dataclass(frozen=True)
class Training:
    """The values of a recipe that decide how long its run is and what a device holds."""

    img_size: int  # pixels a side
    global_batch_size: int
    epochs: int
    eval_every_epochs: int
    has_ema: bool
    moments: int  # numbers that the optimizer keeps for each parameter
    augments: bool  # by operations of RandAugment and its kin


@dataclass(frozen=True)
class Prediction:
    """Of a whole recipe on some devices. Seconds are those of an optimizer step, on each device at the same time."""

    device: str
    compiled: bool
    processes: int
    device_batch: int
    accumulation_steps: int
    memory_bytes: float  # of a device at device_batch
    largest_batch: int  # the largest power of two whose training step fits
    teacher_seconds: float
    student_seconds: float  # forward, backward, optimizer
    all_reduce_bytes: float  # of each device
    all_reduce_seconds: float
    gather_bytes: float
    gather_seconds: float
    host_seconds: float  # that the host of a GPU needs to launch all kernels
    steps: int
    images_per_second: float  # of all devices, if the data keep up
    evaluation_hours: float
    hours: float
    device_hours: float

    @property
    def step_seconds(self) -> float:
        """Seconds of all parts, none of them hidden behind another but launches behind the device's work."""
        return max(self.teacher_seconds + self.student_seconds, self.host_seconds) + self.all_reduce_seconds + self.gather_seconds

    @property
    def is_host_bound(self) -> bool:
        """Whether the device waits for launches."""
        return self.host_seconds >= self.teacher_seconds + self.student_seconds


def seconds_of(operations: Iterable[Operation], batch: int, device: Device, efficiency: float) -> float:
    """Seconds of a pass over `batch` images."""
    operations = list(operations)
    moved = [
        max(each.flops * batch / device.flops, (each.bytes_per_image * batch + each.fixed_bytes) / device.bandwidth)
        for each in operations
    ]
    if device.is_gpu:  # the host runs ahead of the device, or holds it up: see `Prediction.host_seconds`
        return sum(moved) / efficiency
    return sum(moved) / efficiency + len(operations) * device.launch


def state_bytes(training: Training, plan: Plan, work: StepCost) -> float:
    """Weights, gradients, the optimizer's moments and EMA of what is trained, and the teachers' weights; float32."""
    frozen = plan.student_parameters + plan.projector_parameters - work.trained_parameters
    ema = plan.student_parameters if training.has_ema else 0
    return 4.0 * ((2 + training.moments) * work.trained_parameters + frozen + ema + (0 if plan.cached else work.teacher_parameters))


def memory_bytes(training: Training, plan: Plan, work: StepCost, batch: int) -> float:
    """What a training step of `batch` images holds at its peak.

    The teacher's activations are freed before the student's are kept. At the peak all of these are held, and the largest backward operation runs.
    """
    student = work.saved_bytes_per_image + max(each.bytes_per_image for each in work.student_backward)
    images = 3 * training.img_size**2 * 4
    return (
        state_bytes(training, plan, work)
        + work.fixed_saved_bytes
        + batch * (images + max(student, 0 if plan.cached else work.teacher_peak_per_image))
    )


def largest_batch(training: Training, plan: Plan, work: StepCost, device: Device) -> int:
    """The largest power of two that fits; 0: not even one image."""
    fitting = [1 << n for n in range(15) if memory_bytes(training, plan, work, 1 << n) <= USABLE * device.memory]
    return fitting[-1] if fitting else 0


def predict(
    training: Training,
    plan: Plan,
    work: StepCost,
    device: Device,
    *,
    train_images: int,
    val_images: int = 0,
    gpus: int = 1,
    nodes: int = 1,
    compiled: bool = False,
    device_batch: int | None = None,
) -> Prediction:
    """Hours of a whole run, data not counted.

    Args:
        training: how long it is.
        plan: its counts.
        work: its operations; with autocast for a GPU, in float32 for a CPU.
        device: what each process has; processes of a CPU share it.
        train_images: of an epoch, before `repeats`.
        val_images: of an evaluation; 0 leaves it out.
        gpus: processes of a machine.
        nodes: machines.
        compiled: with the efficiency of torch.compile.
        device_batch: the largest micro-batch; None for what fits.

    Raises:
        UserError: a global batch that does not divide, or a device on which no image fits.
    """
    processes = gpus * nodes
    fits = largest_batch(training, plan, work, device)
    if not fits:
        raise UserError(f"--gpu {device.name}: not one image of {training.img_size} px fits in {device.memory / 1e9:.0f} GB")
    total = min(training.global_batch_size, train_images // processes * processes)
    share = total // processes
    micro = max((n for n in range(1, share + 1) if share % n == 0 and n <= (device_batch or fits)), default=1)
    micro_steps = accumulation(total, processes, micro)
    slower = 1 if device.is_gpu else gpus
    efficiency = {name: by[compiled] for name, by in EFFICIENCY.items()} if device.is_gpu else CPU_EFFICIENCY
    teacher = 0.0 if plan.cached else slower * seconds_of(work.teacher, micro, device, efficiency["teacher"])
    forward = slower * seconds_of(work.student_forward, micro, device, efficiency["student"])
    backward = slower * seconds_of(work.student_backward, micro, device, efficiency["student"])
    update = slower * (28 + (12 if training.has_ema else 0)) * work.trained_parameters / device.bandwidth
    passes = (
        2 if micro_steps > 1 and (plan.gathered_per_image or plan.gathered_per_share) else 1
    )  # a first without gradients, see GlobalBatch
    student = micro_steps * (passes * forward + backward) + update
    speed = device.inside if nodes == 1 else device.between
    reduced = 2 * (processes - 1) / processes * plan.gradient_bytes
    gathered = (processes - 1) * (share * plan.gathered_per_image + micro_steps * plan.gathered_per_share) * 4.0
    steps_per_epoch = train_images // total
    steps = training.epochs * max(1, steps_per_epoch)
    launches = (0 if plan.cached else len(work.teacher)) + passes * len(work.student_forward) + len(work.student_backward)
    launches = micro_steps * (launches + AUGMENTATION[training.augments]) + UPDATE
    host = (COMPILED if compiled else 1.0) * launches * device.launch if device.is_gpu else 0.0
    seconds = max(micro_steps * teacher + student, host) + (reduced + gathered) / speed
    evaluations = -(-training.epochs // training.eval_every_epochs) * (2 if training.has_ema else 1)
    evaluation = val_images / processes / micro * (evaluations * forward + teacher)
    hours = (steps * seconds + evaluation) / 3600
    return Prediction(
        device=device.name,
        compiled=compiled,
        processes=processes,
        device_batch=micro,
        accumulation_steps=micro_steps,
        memory_bytes=memory_bytes(training, plan, work, micro),
        largest_batch=fits,
        teacher_seconds=micro_steps * teacher,
        student_seconds=student,
        all_reduce_bytes=reduced,
        all_reduce_seconds=reduced / speed,
        gather_bytes=gathered,
        gather_seconds=gathered / speed,
        host_seconds=host,
        steps=steps,
        images_per_second=total / seconds,
        evaluation_hours=evaluation / 3600,
        hours=hours,
        device_hours=hours * (processes if device.is_gpu else nodes),
    )


def cache_bytes(plan: Plan, views: int) -> dict[str, int]:
    """Disk for what the first teacher says of so many views, by form: its pooled features, its logits, or the 100 largest of them."""
    shapes = dict(plan.shapes)
    width, classes = (
        int(shapes[name].rstrip("]").split(", ")[1]) for name in (_first(shapes, "features"), _first(shapes, "logits"))
    )
    top = min(100, classes)
    return {
        "features bf16": views * 2 * width,
        "features int8": views * (width + 4),
        "logits fp16": views * 2 * classes,
        f"top-{top} logits": views * 4 * (top + 1),
    }


def _first(shapes: dict[str, str], what: str) -> str:
    return next(name for name in shapes if name.startswith("teacher") and name.endswith(what))
