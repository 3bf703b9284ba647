"""Students: timm's DeiTs and CNNs by name, and the conv-stem DeiT of the projector paper, registered with timm here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deit_kd.errors import UserError
from deit_kd.models.described import why
from deit_kd.models.features import TimmModel
from deit_kd.recipe import Student, nearest


class ConvStem(PatchEmbed):
    """Patches through a small CNN: three 64-channel convolutions (the first of stride 2), then a patch_size/2 convolution.

    `conv_embed` of the authors' code, after Co-advise (Ren et al., CVPR 2022): it adds 0.87 M parameters and 1.20 GMACs at
    224 px to a DeiT-Ti, nearly doubling its compute.
    """

    def __init__(self, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, **kwargs: Any):
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **kwargs)

        def block(channels: int, kernel: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(channels, 64, kernel, stride, kernel // 2, bias=False)
            return [convolution, nn.BatchNorm2d(64), nn.ReLU(inplace=True)]

        stem = nn.Sequential(*block(in_chans, 7, 2), *block(64, 3, 1), *block(64, 3, 1))
        patches = nn.Conv2d(64, embed_dim, patch_size // 2, patch_size // 2)
        self.proj = nn.Sequential(OrderedDict(stem=stem, patches=patches))

    def init_weights(self) -> None:
        """He initialization of every convolution, as the authors' code has it."""
        for module in self.proj.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)


class ConvStemDeiT(VisionTransformerDistilled):
    """DeiT whose patches come from `ConvStem` and whose distillation token is the mean of the patch embeddings, not learned."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "embed_layer": ConvStem})
        del self.dist_token

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """timm's, without the learned distillation token."""
        VisionTransformer.init_weights(self, *args, **kwargs)
        self.patch_embed.init_weights()

    def _pos_embed(self, x: Tensor) -> Tensor:
        conv_token = x.mean(dim=1, keepdim=True)  # x.shape, not len: an exported program would keep the number
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), conv_token, x], dim=1)
        return self.pos_drop(x + self.pos_embed)


class TwoTeacherDeiT(VisionTransformerDistilled):
    """DeiT with two learned distillation tokens, one for each teacher, and a head for each; inference averages all heads.

    The heads of CivT (Co-advise, Ren et al., CVPR 2022), without its two stems.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.num_prefix_tokens = 3
        self.dist_token_2 = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + self.num_prefix_tokens, self.embed_dim))
        self.head_dist_2 = nn.Linear(self.embed_dim, self.num_classes) if self.num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """timm's, and the same for the second token."""
        if hasattr(self, "dist_token_2"):  # timm's constructor calls this before the second token exists
            nn.init.trunc_normal_(self.dist_token_2, std=0.02)
            super().init_weights(*args, **kwargs)

    def _pos_embed(self, x: Tensor) -> Tensor:
        learned = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.dist_token, self.dist_token_2)]
        return self.pos_drop(torch.cat([*learned, x], dim=1) + self.pos_embed)

    def no_weight_decay(self) -> set[str]:
        """Timm's list, and the second token."""
        return {*super().no_weight_decay(), "dist_token_2"}

    def get_classifier(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        """The class head, then a head for each distillation token."""
        return self.head, self.head_dist, self.head_dist_2

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for another number of classes."""
        super().reset_classifier(num_classes, global_pool)
        self.head_dist_2 = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B,T,D] tokens -> mean of the three heads' logits, or of the three tokens."""
        if pre_logits:
            return x[:, : self.num_prefix_tokens].mean(dim=1)
        return torch.stack([head(self.head_drop(x[:, token])) for token, head in enumerate(self.get_classifier())]).mean(dim=0)


def authors_to_timm(state_dict: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Renames the keys of the authors' releases to ours and drops those of their loss modules; our keys pass unchanged.

    With `model`, a position embedding of another grid is resampled to the model's, prefix tokens left alone.
    """
    renamed = {}
    for key, value in state_dict.items():
        if key.startswith(("distillation_loss.", "projector.")):
            continue
        key = key.replace("conv_embed.conv.", "patch_embed.proj.stem.").replace("conv_embed.proj.", "patch_embed.proj.patches.")
        if key == "pos_embed" and isinstance(model, VisionTransformer) and value.shape[1] != model.pos_embed.shape[1]:
            grid = list(model.patch_embed.grid_size)
            value = resample_abs_pos_embed(value, grid, num_prefix_tokens=model.num_prefix_tokens)
        renamed[key.replace("head_conv.", "head_dist.")] = value
    return renamed


def _convstem(variant: str, pretrained: bool, **kwargs: Any) -> TimmModel:
    # The authors' LayerNorms use eps 1e-6, timm's default for its ViTs too.
    return build_model_with_cfg(
        ConvStemDeiT,
        variant,
        pretrained,
        pretrained_filter_fn=authors_to_timm,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


def _two_teachers(variant: str, pretrained: bool, **kwargs: Any) -> TimmModel:
    return build_model_with_cfg(
        TwoTeacherDeiT,
        variant,
        pretrained,
        pretrained_filter_fn=authors_to_timm,  # for another size
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        f"deit_{size}_{kind}_patch16_224": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": first_conv,
            "classifier": heads,
            "license": "apache-2.0",
        }
        for kind, first_conv, heads in (
            ("convstem_distilled", "patch_embed.proj.stem.0", ("head", "head_dist")),
            ("two_teachers", "patch_embed.proj", ("head", "head_dist", "head_dist_2")),
        )
        for size in ("tiny", "small", "base")
        if kind == "convstem_distilled" or size != "base"
    }
)


@register_model
def deit_tiny_convstem_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> TimmModel:
    """DeiT-Ti with the conv stem: 6.63 M parameters, 2.43 GMACs."""
    args = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _convstem("deit_tiny_convstem_distilled_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def deit_small_convstem_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> TimmModel:
    """DeiT-S with the conv stem: 23.80 M parameters, 5.92 GMACs."""
    args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _convstem("deit_small_convstem_distilled_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def deit_base_convstem_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> TimmModel:
    """DeiT-B with the conv stem: 89.98 M parameters."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _convstem("deit_base_convstem_distilled_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def deit_tiny_two_teachers_patch16_224(pretrained: bool = False, **kwargs: Any) -> TimmModel:
    """DeiT-Ti with two distillation tokens: 6.10 M parameters."""
    args = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _two_teachers("deit_tiny_two_teachers_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def deit_small_two_teachers_patch16_224(pretrained: bool = False, **kwargs: Any) -> TimmModel:
    """DeiT-S with two distillation tokens: 22.82 M parameters."""
    args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _two_teachers("deit_small_two_teachers_patch16_224", pretrained, **{**args, **kwargs})


def _has_fixed_size(name: str) -> bool:
    """Whether an architecture takes images of the size alone that it is built for."""
    if (own := timm.get_pretrained_cfg(name)) is not None:
        return bool(own.fixed_input_size)
    with torch.device("meta"):  # a user's, registered without configuration
        return bool(timm.create_model(name).pretrained_cfg.get("fixed_input_size"))


def build_student(config: Student, num_classes: int, img_size: int) -> TimmModel:
    """The recipe's student with fresh weights.

    Raises:
        UserError: a name that timm does not know, or arguments that the architecture refuses.
    """
    if config.name not in timm.list_models():
        raise UserError(
            f"student.name={config.name}: timm knows no such architecture{nearest(config.name, timm.list_models())}; your own needs --import FILE"
        )
    args = {"num_classes": num_classes, "drop_path_rate": config.drop_path or None, **config.model_args}
    try:
        if _has_fixed_size(config.name):  # a ViT; CNNs take any size
            args["img_size"] = img_size
        student = timm.create_model(config.name, pretrained=False, **args)
        if timm.get_pretrained_cfg(config.name) is None:  # a user's, which may build another architecture with other arguments
            student.pretrained_cfg["architecture"] = config.name
        return student
    except Exception as error:  # networks raise many types for arguments that do not fit
        raise UserError(f"student.model_args={config.model_args}: {config.name} refuses them ({why(error)})") from None
