"""From PIL image to normalized tensor: timm's transforms, as a recipe names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import CenterCrop, RandomCrop, Resize
from torchvision.transforms.functional import get_dimensions

from deit_kd.errors import UserError
from deit_kd.recipe import Augmentation, Data, Evaluation

Transform = Callable[[Image.Image], Tensor]
MOST_RESIZED = 2**26  # pixels; images of usual sizes and shapes have less than a tenth of this


class MustFit:
    """Returns images unchanged, but refuses those that the next step would make too large.

    Args:
        resize: the next step.
    """

    def __init__(self, resize: Resize | ResizeKeepRatio):
        self.resize = resize

    def __call__(self, image: Any) -> Any:
        """`image` itself.

        Raises:
            ValueError: too large.
        """
        _, height, width = get_dimensions(image)
        size = self.resize.size
        if isinstance(self.resize, ResizeKeepRatio):
            ratios = height / size[0], width / size[1]
            ratio = max(ratios) * self.resize.longest + min(ratios) * (1 - self.resize.longest)
            wanted = height / ratio, width / ratio
        elif isinstance(size, int):
            wanted = height * size / min(height, width), width * size / min(height, width)
        else:
            wanted = size[0], size[1]
        if wanted[1] * max(wanted[0], height) > MOST_RESIZED:  # columns are resized before lines
            raise ValueError(
                f"is {width:,} x {height:,} pixels, which would be resized to {wanted[1]:,.0f} x {wanted[0]:,.0f}; crop it, or use a smaller "
                "image size"
            )
        return image


def train_transform(data: Data, augmentation: Augmentation) -> Transform:
    """Random crop (resized, or of the padded image), flip, automatic augmentation, erasing; returns [3,H,W] float32, normalized."""
    aug = augmentation
    try:
        transform = create_transform(
            input_size=data.img_size,
            is_training=True,
            scale=aug.crop_scale or (1.0, 1.0),
            hflip=aug.horizontal_flip,
            color_jitter=aug.color_jitter or None,
            auto_augment=aug.auto_augment,
            interpolation=aug.interpolation,
            mean=data.mean,
            std=data.std,
            re_prob=aug.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"augmentation.auto_augment={aug.auto_augment}: timm does not know it ({error}); use rand-m9-mstd0.5-inc1, 3a or null"
        ) from None
    if aug.crop_padding is not None:  # in place of timm's random resized crop
        crop = [RandomCrop(data.img_size, padding=aug.crop_padding)]
        resize = Resize(data.img_size)
        transform.transforms[:1] = [
            MustFit(resize),
            resize,
            CenterCrop(data.img_size),
            *crop,
        ]  # all but the last leave CIFAR as it is
    for step in transform.transforms:
        for operation in augment_operations(step):
            if operation.name.startswith("Posterize"):
                _keep_one_bit(operation)
    return transform


def augment_operations(step: Any) -> list[AugmentOp]:
    """The single operations of timm's RandAugment or AutoAugment; none of any other step."""
    if isinstance(step, AutoAugment):
        return [operation for choice in step.policy for operation in choice]
    return list(step.ops) if isinstance(step, RandAugment) else []


def evaluation_transform(data: Data, evaluation: Evaluation) -> Transform:
    """Resizes the short side to img_size / crop_pct and crops the center; returns [3,H,W] float32, normalized."""
    return own_transform(
        input_size=data.img_size,
        crop_pct=evaluation.crop_pct,
        interpolation=evaluation.interpolation,
        mean=data.mean,
        std=data.std,
    )


def own_transform(**config: Any) -> Transform:
    """Timm's evaluation transform for a network's own configuration; it refuses images that it would make too large."""
    transform = create_transform(**config, is_training=False)
    first = transform.transforms[0]
    if isinstance(first, (Resize, ResizeKeepRatio)):
        transform.transforms.insert(0, MustFit(first))
    return transform


def _keep_one_bit(operation: AugmentOp) -> None:
    """Posterizes to no less than 1 bit.

    At the largest magnitude timm asks for 0 bits, about once in 640 images of rand-m9-mstd0.5-inc1. Pillow 13 refuses that
    (Pillow 12 gave a black image), which would end a run.
    """
    operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))
