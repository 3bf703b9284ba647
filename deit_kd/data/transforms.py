"""From PIL image to normalised tensor: timm's transforms, as the recipe names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from torch import Tensor
from torchvision.transforms import CenterCrop, RandomCrop, Resize

from deit_kd.errors import UserError
from deit_kd.recipe import Recipe

Transform = Callable[[Image.Image], Tensor]


def train_transform(recipe: Recipe) -> Transform:
    """Random crop (resized, or of the padded image), flip, automatic augmentation and erasing; gives [3,H,W] float32, normalised."""
    aug, data = recipe.augmentation, recipe.data
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
        transform.transforms[:1] = [Resize(data.img_size), CenterCrop(data.img_size), *crop]  # the first two leave CIFAR as it is
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


def evaluation_transform(recipe: Recipe) -> Transform:
    """Resize the short side to img_size / crop_pct, centre crop; gives [3,H,W] float32, normalised."""
    return create_transform(
        input_size=recipe.data.img_size,
        crop_pct=recipe.evaluation.crop_pct,
        interpolation=recipe.evaluation.interpolation,
        mean=recipe.data.mean,
        std=recipe.data.std,
    )


def _keep_one_bit(operation: AugmentOp) -> None:
    """Posterises to no less than 1 bit.

    At the largest magnitude timm asks for 0 bits, about once in 640 images of rand-m9-mstd0.5-inc1. Pillow 13 refuses that
    (Pillow 12 gave a black image), which would end a run.
    """
    operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))
