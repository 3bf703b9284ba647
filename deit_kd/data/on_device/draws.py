"""The random parameters of an image's augmentation on the device, drawn in a worker.

Numbers are drawn from the same generators and in the same order as timm draws them while it changes an image on the CPU. So crops,
flips, operations, magnitudes, interpolations and boxes of each sample equal those of the CPU's augmentation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import CenterCrop, ColorJitter, InterpolationMode, Normalize, RandomCrop, RandomHorizontalFlip, Resize

from deit_kd.data.decode import Jpeg
from deit_kd.data.on_device.pillow_ops import interpolation_weights, table
from deit_kd.data.sources.base import pixels, pixels_or_jpeg
from deit_kd.data.transforms import MustFit, augment_operations, train_transform
from deit_kd.recipe import Augmentation, Data


class Crop(NamedTuple):
    """A crop of a JPEG that is then resized: `lines` of `length` pixels, first along `length`, then across.

    Lines are rows of the image, or columns where Pillow resizes these first.
    """

    content: Tensor  # [bytes] uint8, the file
    plane: int  # pixels of the whole image
    first: int  # the place of the crop's first pixel in it
    line_step: int  # places from line to line
    lines: int
    lines_mirrored: bool
    step: int  # from pixel to pixel
    length: int
    mirrored: bool
    bicubic: bool  # or bilinear
    columns: bool  # are the lines


class AugmentParams(NamedTuple):
    """An image [3,H,W] uint8, cropped and flipped, or the crop of a JPEG; and the operations that remain."""

    image: Tensor | Crop
    operations: list[tuple[str, Sequence[float]]]  # in order, with their arguments
    box: tuple[int, int, int, int] | None  # to erase: top, left, height, width
    noise: int  # the seed of what the box is filled with


class Jpegs(NamedTuple):
    """The images of a batch that the device decodes."""

    content: Tensor  # [bytes] uint8, one file after another
    table: Tensor  # [11,J] int: bytes of each, and the numbers of `Crop`
    members: Tensor  # [J] int, positions in the batch
    others: Tensor  # [B-J] int, positions of the other images


class Turn(NamedTuple):
    """How many images of a batch take which form of operation next, in the order in which they then lie."""

    idle: int = 0
    tables: int = 0  # of a pixel alone, see `pillow_ops.table`
    autocontrast: int = 0
    equalize: int = 0
    color: int = 0
    contrast: int = 0
    sharpness: int = 0
    resampled: int = 0
    gaussian_blur: int = 0


class BatchPlan(NamedTuple):
    """The operations on a batch. The host knows how many images take each, so it need not ask the device.

    Numbers for the device lie behind each other in one tensor, which costs one copy; `unpack` gives them by name:
        order: [T+1,B] int64: of each turn, where in the one before its images are; the last puts the batch back in order.
        tables: [.,256] uint8, factors: [.] float32, matrices: [.,2,3] float64, weights: [.,4,4] float32, sigmas: [.] float64: of the
            operations of all turns.
        erased: [E] int64, positions in the batch; boxes: [E,2,2] int64, where rows and columns begin and end; noise: [E] int32, seeds.
    """

    turns: list[Turn]
    packed: Tensor  # [bytes] uint8
    layout: list[tuple[str, torch.dtype, tuple[int, ...], int, int]]  # name, dtype, shape, and between which bytes
    jpegs: Jpegs | None = None

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """The numbers by name, of `packed` on any device."""
        return {name: packed[start:end].view(dtype).view(shape) for name, dtype, shape, start, end in self.layout}


class CannotBeDrawnError(Exception):
    """An augmentation that is not made of single operations."""


class WorkerTransform:
    """Crops and flips pixels [3,H,W] uint8 and draws the parameters of the rest; of a JPEG it only draws.

    Raises:
        CannotBeDrawnError: see there.
    """

    def __init__(self, data: Data, augmentation: Augmentation, sends_jpegs: bool):
        self.geometry: list[Callable[[Tensor], Tensor]] = []
        self.colors: list[Callable[[list[Any]], list[Any]]] = []
        self.erasing: RandomErasing | None = None
        self.crop: RandomResizedCropAndInterpolation | None = None
        transform: Any = train_transform(data, augmentation)
        for step in transform.transforms:
            if isinstance(step, RandomResizedCropAndInterpolation):
                self.crop = step
                self.geometry.append(partial(_resized_crop, step))
            elif isinstance(step, (MustFit, Resize, CenterCrop, RandomCrop, RandomHorizontalFlip)):
                self.geometry.append(step)
            elif operations := augment_operations(step):
                for operation in operations:
                    operation.aug_fn = partial(_record, operation.name, data.img_size)
                self.colors.append(step)
            elif isinstance(step, ColorJitter):
                self.colors.append(partial(_jitter, step))
            elif isinstance(step, RandomErasing):
                self.erasing = step
                self.erasing.per_pixel = False  # the worker makes no noise
            elif not isinstance(step, (MaybeToTensor, Normalize)):
                raise CannotBeDrawnError(f"auto_augment={augmentation.auto_augment} is not made of single operations")
        self.size = data.img_size
        self.sends_jpegs = sends_jpegs
        self.read = pixels_or_jpeg if self.sends_jpegs else pixels  # of (source, index), what this takes

    def __call__(self, read: Tensor | Jpeg) -> AugmentParams:
        """Draws from the global generators; a JPEG and its pixels get the same draws."""
        image = self._place(read) if isinstance(read, Jpeg) else read
        if isinstance(image, Tensor):
            for step in self.geometry:
                image = step(image)
        operations: list[Any] = []
        for draw in self.colors:
            operations = draw(operations)
        target = _Target(self.size)
        if self.erasing is not None:
            self.erasing(target)
        return AugmentParams(image, operations, target.box, random.getrandbits(31) if target.box else 0)

    def _place(self, jpeg: Jpeg) -> Crop:
        """The crop that `geometry` would make of the pixels."""
        assert self.crop is not None
        (top, left, height, width), mode = _draw_crop(self.crop, torch.empty(1).expand(3, jpeg.height, jpeg.width))
        sides = torch.tensor([[[0, 1]]])
        for step in self.geometry[1:]:  # flips
            sides = step(sides)
        flipped, columns = bool(sides[0, 0, 0]), _columns_first(self.size, height, width)
        down, across = (jpeg.width, height, False), (1, width, flipped)
        lines, pixels = (across, down) if columns else (down, across)
        plane, first = jpeg.height * jpeg.width, top * jpeg.width + left
        return Crop(jpeg.content, plane, first, *lines, *pixels, mode == InterpolationMode.BICUBIC, columns)


def _resized_crop(step: RandomResizedCropAndInterpolation, pixels: Tensor) -> Tensor:
    """As timm crops. The antialiased filter is Pillow's, with weights of 16 instead of 22 bits."""
    (top, left, height, width), mode = _draw_crop(step, pixels)
    size = step.size[0]
    crop = pixels[None, :, top : top + height, left : left + width]
    if _columns_first(size, height, width):
        crop = F.interpolate(crop, (size, width), mode=mode.value, antialias=True)
    return F.interpolate(crop, (size, size), mode=mode.value, antialias=True)[0]


def _draw_crop(step: RandomResizedCropAndInterpolation, pixels: Tensor) -> tuple[tuple[int, int, int, int], InterpolationMode]:
    """(top, left, height, width), and how to resize."""
    box, modes = step.get_params(pixels, step.scale, step.ratio), step.interpolation
    return box, random.choice(modes) if isinstance(modes, (list, tuple)) else modes


def _columns_first(size: int, height: int, width: int) -> bool:
    """Pillow 13 shrinks such columns before rows, and rounds in between."""
    return size < height and 2 * width < height + size


def _jitter(step: ColorJitter, drawn: list[Any]) -> list[Any]:
    order, *factors, _ = step.get_params(step.brightness, step.contrast, step.saturation, step.hue)
    names = "brightness", "contrast", "color"  # the last of `order` is hue, which recipes do not change
    return drawn + [(names[n], (factors[n],)) for n in order.tolist() if n < len(names) and factors[n] is not None]


_NAMES = {
    "AutoContrast": "autocontrast",
    "Equalize": "equalize",
    "Invert": "invert",
    "Solarize": "solarize",
    "SolarizeAdd": "solarize_add",
    "Color": "color",
    "Contrast": "contrast",
    "Brightness": "brightness",
    "Sharpness": "sharpness",
    "GaussianBlur": "gaussian_blur",
}


def _record(name: str, size: int, drawn: list[Any], *level: float, resample: Any, **_: Any) -> list[Any]:
    """Replaces the function of a timm `AugmentOp`: records what it would do to an image of `size` pixels a side."""
    name = name.removesuffix("Increasing").removesuffix("Original")
    if name in _NAMES:
        return [*drawn, (_NAMES[name], level)]
    if name == "Posterize":
        return [*drawn, ("posterize", (min(8, max(1, level[0])),))]
    if name == "Desaturate":
        return [*drawn, ("color", (min(1.0, max(0.0, 1.0 - level[0])),))]
    if name == "GaussianBlurRand":
        return [*drawn, ("gaussian_blur", (random.uniform(0.1, 2.0 * level[0]),))]
    chosen = random.choice(resample) if isinstance(resample, (list, tuple)) else resample
    kind = "bicubic" if chosen == Image.Resampling.BICUBIC else "bilinear"
    return [*drawn, (kind, _matrix(name, level[0], size))]


def _matrix(name: str, level: float, size: int) -> tuple[float, ...]:
    """Where in the image an output pixel is taken from, as Pillow's transform and rotate compute it."""
    if name == "Rotate":
        angle, center = -math.radians(level % 360.0), size / 2.0
        a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
        return a, b, a * -center + b * -center + 0.0 + center, -b, a, -b * -center + a * -center + 0.0 + center
    shift = level * size if name.endswith("Rel") else level
    return {
        "ShearX": (1.0, level, 0.0, 0.0, 1.0, 0.0),
        "ShearY": (1.0, 0.0, 0.0, level, 1.0, 0.0),
        "TranslateX": (1.0, 0.0, shift, 0.0, 1.0, 0.0),
        "TranslateY": (1.0, 0.0, 0.0, 0.0, 1.0, shift),
    }[name.removesuffix("Rel")]


class _Target:
    """A stand-in for an image: timm's RandomErasing draws a box and writes to it, and the box is recorded."""

    dtype = torch.float32

    def __init__(self, size: int):
        self.shape = torch.Size((3, size, size))
        self.box: tuple[int, int, int, int] | None = None

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, where: tuple[slice, slice, slice], pixels: Tensor) -> None:
        rows, columns = where[1:]
        self.box = rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start


_TABLES = ("posterize", "solarize", "solarize_add", "invert", "brightness")
_RESAMPLED = ("bicubic", "bilinear")


def make_plan(drawn: Sequence[AugmentParams | None]) -> BatchPlan:
    """The plan of a batch; a sample that needs no operation is None."""
    turns, orders, before = list[Turn](), list[list[int]](), list(range(len(drawn)))
    tables, factors, matrices, weights, sigmas = (list[Any]() for _ in range(5))
    for number in range(max((len(each.operations) for each in drawn if each), default=0)):
        takes: dict[str, list[tuple[int, str, Sequence[float]]]] = {form: [] for form in Turn._fields}
        for position, each in enumerate(drawn):
            name, arguments = each.operations[number] if each and number < len(each.operations) else ("idle", ())
            form = "tables" if name in _TABLES else "resampled" if name in _RESAMPLED else name
            takes[form].append((position, name, arguments))
        turns.append(Turn(*map(len, takes.values())))
        tables += [table(name, *arguments or (0.0,)) for _, name, arguments in takes["tables"]]
        factors += [arguments[0] for form in ("color", "contrast", "sharpness") for _, _, arguments in takes[form]]
        sigmas += [arguments[0] for _, _, arguments in takes["gaussian_blur"]]
        for _, name, (a, b, c, d, e, f) in takes["resampled"]:
            matrices.append([[a, b, c - 0.5], [d, e, f - 0.5]])
            weights.append(interpolation_weights(name))
        order = [position for group in takes.values() for position, _, _ in group]
        place = {position: index for index, position in enumerate(before)}
        orders.append([place[position] for position in order])
        before = order
    orders.append(sorted(range(len(before)), key=before.__getitem__))
    boxes = [(position, each.box, each.noise) for position, each in enumerate(drawn) if each and each.box]
    packed, layout = _pack(
        order=np.array(orders, np.int64),
        tables=np.array(tables, np.uint8).reshape(-1, 256),
        factors=np.array(factors, np.float32),
        matrices=np.array(matrices, np.float64).reshape(-1, 2, 3),
        weights=np.array(weights, np.float32).reshape(-1, 4, 4),
        sigmas=np.array(sigmas, np.float64),
        erased=np.array([position for position, _, _ in boxes], np.int64),
        boxes=np.array([[[y, y + h], [x, x + w]] for _, (y, x, h, w), _ in boxes], np.int64).reshape(-1, 2, 2),
        noise=np.array([seed for _, _, seed in boxes], np.int32),
    )
    return BatchPlan(turns, packed, layout, _jpegs([each.image if each else None for each in drawn]))


def _pack(**arrays: np.ndarray) -> tuple[Tensor, list[tuple[str, torch.dtype, tuple[int, ...], int, int]]]:
    """Arrays behind each other in bytes, each from a multiple of 8 on."""
    content, layout = bytearray(), []
    for name, array in arrays.items():
        dtype = torch.from_numpy(array).dtype
        layout.append((name, dtype, array.shape, len(content), len(content) + array.nbytes))
        content += array.tobytes() + bytes(-array.nbytes % 8)
    return torch.frombuffer(content, dtype=torch.uint8), layout


def _jpegs(images: Sequence[Tensor | Crop | None]) -> Jpegs | None:
    crops = [(position, image) for position, image in enumerate(images) if isinstance(image, Crop)]
    if not crops:
        return None
    return Jpegs(
        content=torch.cat([crop.content for _, crop in crops]),
        table=torch.tensor([[len(crop.content), *crop[1:]] for _, crop in crops], dtype=torch.int64).T.contiguous(),
        members=torch.tensor([position for position, _ in crops]),
        others=torch.tensor([n for n, image in enumerate(images) if not isinstance(image, Crop)], dtype=torch.int64),
    )
