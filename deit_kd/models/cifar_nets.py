"""The 32 px networks of the CIFAR-100 distillation tables, after CRD's and mdistiller's code, registered with timm here.

Parameters have the names of those code bases, so that their checkpoints load as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

Block: TypeAlias = Callable[[int, int, int], nn.Module]  # of channels, width and stride


class CifarNet(nn.Module):
    """What timm asks of a network; a family adds its modules and then calls `_finish`.

    Of the families' arguments, `layers` counts the blocks of each stage and `widths` are their channels, first the stem's.
    """

    head_name, first_conv = "fc", "conv1"
    head_std: float | None = None  # of the classifier's initial weights; None: torch's initialization
    zero_bias = False

    def __init__(
        self, num_classes: int = 100, in_chans: int = 3, drop_rate: float | None = None, drop_path_rate: float | None = None
    ):
        super().__init__()
        if in_chans != 3 or drop_rate or drop_path_rate:
            raise ValueError(f"{type(self).__name__} takes 3 channels and has neither dropout nor stochastic depth")
        self.num_classes = num_classes

    def _finish(self, stages: list[list[str]], channels: Sequence[int], reductions: Sequence[int]) -> None:
        """Initializes; `stages` names the modules of each, the last of which puts out what the stage passes on."""
        self.stages = stages
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": names[-1]}
            for names, width, reduction in zip(stages, channels, reductions, strict=True)
        ]
        self.num_features = self.head_hidden_size = channels[-1]
        self.apply(self.initialize)
        self.reset_classifier(self.num_classes)

    def initialize(self, module: nn.Module) -> None:
        """As the authors do: He's for convolutions, and what the family's flags say of the classifier."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and self.head_std is not None:
            nn.init.normal_(module.weight, std=self.head_std)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None and self.zero_bias:
            nn.init.zeros_(module.bias)

    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.get_submodule(self.head_name)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier; 0 classes give the pooled features."""
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.initialize(head)
        self.set_submodule(self.head_name, head)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last map [B,C,H,W] and those that the stages `indices` pass on, as timm has it; `norm` means nothing to a CNN."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt}: a CNN gives NCHW")
        wanted, last = feature_take_indices(len(self.stages), indices)
        maps = []
        for index, names in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            for name in names:
                x = self.get_submodule(name)(x)
            if index in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B,3,H,W] -> the last map [B,C,H,W], after its activation."""
        return self.forward_intermediates(x, [-1])[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits [B,K], or pooled features [B,C]."""
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B,3,H,W] -> logits [B,K]."""
        return self.forward_head(self.forward_features(x))


def conv(channels: int, width: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size, but for its stride; a batch normalization follows it."""
    return nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False)


def stack(block: Block, channels: int, width: int, count: int, stride: int) -> nn.Sequential:
    """Blocks of one width, the first of which has the stride."""
    return nn.Sequential(*(block(width if index else channels, width, 1 if index else stride) for index in range(count)))


def shortcut(channels: int, width: int, stride: int) -> nn.Sequential:
    """The other branch of a residual block: nothing where the shapes agree."""
    if stride == 1 and channels == width:
        return nn.Sequential()
    return nn.Sequential(conv(channels, width, 1, stride), nn.BatchNorm2d(width))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleaves the channels of the groups."""
    return rearrange(x, "b (g c) h w -> b (c g) h w", g=groups)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.downsample = shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,D,H/s,W/s]."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, inside with a quarter of the width."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width // 4, 1), nn.BatchNorm2d(width // 4)
        self.conv2, self.bn2 = conv(width // 4, width // 4, 3, stride), nn.BatchNorm2d(width // 4)
        self.conv3, self.bn3 = conv(width // 4, width, 1), nn.BatchNorm2d(width)
        self.shortcut = shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,D,H/s,W/s]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class GroupUnit(nn.Module):
    """ShuffleNet's unit: grouped 1x1 convolutions; the first of a stage appends its pooled input instead of adding it."""

    def __init__(self, channels: int, width: int, stride: int, groups: int = 3):
        super().__init__()
        self.stride, self.groups = stride, 1 if channels == 24 else groups  # the stem's 24 channels are not grouped
        width -= channels if stride == 2 else 0
        inner = width // 4
        self.conv1, self.bn1 = conv(channels, inner, 1, groups=self.groups), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, groups=inner), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, width, 1, groups=groups), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,D,H/s,W/s]."""
        out = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], dim=1) if self.stride == 2 else out + x)


class SplitUnit(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass unchanged."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = conv(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = conv(half, half, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]."""
        kept, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)))
        return shuffle(torch.cat([kept, out], dim=1), 2)


class DownUnit(nn.Module):
    """ShuffleNetV2's first unit of a stage: two branches of stride 2."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = conv(channels, channels, 3, 2, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(channels, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = conv(half, half, 3, 2, half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,D,H/2,W/2]."""
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        right = F.relu(self.bn5(self.conv5(right)))
        return shuffle(torch.cat([left, right], dim=1), 2)


class ResNet(CifarNet):
    """A stem at full resolution and stages of blocks; `last` is the width of a 1x1 convolution before the pooling, if any."""

    stem_kernel, first_stride = 3, 1
    block: Block = BasicBlock

    def __init__(self, layers: Sequence[int], widths: Sequence[int], last: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.conv1, self.bn1, self.relu = conv(3, widths[0], self.stem_kernel), nn.BatchNorm2d(widths[0]), nn.ReLU()
        names, reductions, channels = [], [], list(widths[1:])
        for index, (count, (before, after)) in enumerate(zip(layers, pairwise(widths), strict=True)):
            names.append([f"layer{index + 1}"])
            reductions.append(self.first_stride * 2**index)
            self.add_module(names[-1][0], stack(self.block, before, after, count, 2 if index else self.first_stride))
        names[0] = ["conv1", "bn1", "relu", *names[0]]
        if last is not None:
            self.conv2, self.bn2, self.last_relu = conv(widths[-1], last, 1), nn.BatchNorm2d(last), nn.ReLU()
            names[-1] += ["conv2", "bn2", "last_relu"]
            channels[-1] = last
        self._finish(names, channels, reductions)


class BottleneckResNet(ResNet):
    """ResNet-50's kind; the widths are those that the stages put out."""

    head_name = "linear"
    block: Block = Bottleneck


class ShuffleNetV1(ResNet):
    """ShuffleNet with three groups."""

    head_name, stem_kernel, first_stride = "linear", 1, 2
    block: Block = GroupUnit

    def initialize(self, module: nn.Module) -> None:
        """Leaves torch's."""


class ShuffleNetV2(ShuffleNetV1):
    """ShuffleNetV2, without the stem's pooling."""

    @staticmethod
    def block(channels: int, width: int, stride: int) -> nn.Module:
        """One unit."""
        return SplitUnit(width) if stride == 1 else DownUnit(channels, width)


class WideBlock(nn.Module):
    """Pre-activation; a shortcut with a convolution starts behind the first activation."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.convShortcut = None if stride == 1 and channels == width else conv(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,D,H/s,W/s]."""
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(CifarNet):
    """Pre-activation ResNet; its last stage includes the final normalization."""

    zero_bias = True

    def __init__(self, layers: Sequence[int], widths: Sequence[int], **kwargs: Any):
        super().__init__(**kwargs)
        self.conv1 = conv(3, widths[0])
        for index, (count, (before, after)) in enumerate(zip(layers, pairwise(widths), strict=True)):
            blocks = stack(WideBlock, before, after, count, 2 if index else 1)
            self.add_module(f"block{index + 1}", nn.Sequential(OrderedDict(layer=blocks)))
        self.bn1, self.relu = nn.BatchNorm2d(widths[-1]), nn.ReLU()
        self._finish([["conv1", "block1"], ["block2"], ["block3", "bn1", "relu"]], widths[1:], (1, 2, 4))


class VGG(CifarNet):
    """VGG with batch normalization and one linear layer, without pooling between the last two stages.

    CRD's code pools there too for images of just 64 px; here a network is the same at every size.
    """

    head_name, first_conv, head_std, zero_bias = "classifier", "block0.0", 0.01, True

    def __init__(self, layers: Sequence[int], widths: Sequence[int] = (64, 128, 256, 512, 512), **kwargs: Any):
        super().__init__(**kwargs)
        for index, (count, (before, after)) in enumerate(zip(layers, pairwise((3, *widths)), strict=True)):
            modules: list[nn.Module] = []
            for channels in (before, *[after] * (count - 1)):
                modules += [nn.Conv2d(channels, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            self.add_module(f"block{index}", nn.Sequential(*modules))
        self.pool = nn.MaxPool2d(2)
        stages = [["block0"], ["pool", "block1"], ["pool", "block2"], ["pool", "block3"], ["block4"]]
        self._finish(stages, widths, (1, 2, 4, 8, 8))


class InvertedResidual(nn.Module):
    """MobileNetV2's block, which keeps its first convolution where it expands nothing."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int):
        super().__init__()
        inner = channels * expansion
        self.is_residual = stride == 1 and channels == width
        self.conv = nn.Sequential(
            *(conv(channels, inner, 1), nn.BatchNorm2d(inner), nn.ReLU()),
            *(conv(inner, inner, 3, stride, inner), nn.BatchNorm2d(inner), nn.ReLU()),
            *(conv(inner, width, 1), nn.BatchNorm2d(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,D,H/s,W/s]."""
        return x + self.conv(x) if self.is_residual else self.conv(x)


class MobileNetV2(CifarNet):
    """MobileNetV2 with a stem of stride 2; its stages end where the resolution changes, and `width` is a factor."""

    head_name, first_conv, head_std, zero_bias = "classifier.0", "conv1.0", 0.01, True

    def __init__(self, width: float = 0.5, expansion: int = 6, layers: Sequence[int] = (1, 2, 3, 4, 3, 3, 1), **kwargs: Any):
        super().__init__(**kwargs)
        widths = [int(base * width) for base in (32, 16, 24, 32, 64, 96, 160, 320)]
        last = int(1280 * max(1.0, width))
        self.conv1 = nn.Sequential(conv(3, widths[0], 3, 2), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.blocks = nn.ModuleList()
        for count, stride, (before, after) in zip(layers, (1, 1, 2, 2, 1, 2, 1), pairwise(widths), strict=True):
            block = partial(InvertedResidual, expansion=expansion if self.blocks else 1)
            self.blocks.append(stack(block, before, after, count, stride))
        self.conv2 = nn.Sequential(conv(widths[-1], last, 1), nn.BatchNorm2d(last), nn.ReLU())
        self.classifier = nn.Sequential()
        ends = [["conv1", "blocks.0", "blocks.1"], ["blocks.2"], ["blocks.3", "blocks.4"], ["blocks.5", "blocks.6", "conv2"]]
        self._finish(ends, (widths[2], widths[3], widths[5], last), (2, 4, 8, 16))


NETWORKS: dict[str, tuple[type[CifarNet], dict[str, Any]]] = {
    "cifar_resnet20": (ResNet, {"layers": (3, 3, 3), "widths": (16, 16, 32, 64)}),
    "cifar_resnet32": (ResNet, {"layers": (5, 5, 5), "widths": (16, 16, 32, 64)}),
    "cifar_resnet56": (ResNet, {"layers": (9, 9, 9), "widths": (16, 16, 32, 64)}),
    "cifar_resnet110": (ResNet, {"layers": (18, 18, 18), "widths": (16, 16, 32, 64)}),
    "cifar_resnet8x4": (ResNet, {"layers": (1, 1, 1), "widths": (32, 64, 128, 256)}),
    "cifar_resnet32x4": (ResNet, {"layers": (5, 5, 5), "widths": (32, 64, 128, 256)}),
    "cifar_resnet50": (BottleneckResNet, {"layers": (3, 4, 6, 3), "widths": (64, 256, 512, 1024, 2048)}),
    "cifar_wrn_16_2": (WideResNet, {"layers": (2, 2, 2), "widths": (16, 32, 64, 128)}),
    "cifar_wrn_40_1": (WideResNet, {"layers": (6, 6, 6), "widths": (16, 16, 32, 64)}),
    "cifar_wrn_40_2": (WideResNet, {"layers": (6, 6, 6), "widths": (16, 32, 64, 128)}),
    "cifar_vgg8": (VGG, {"layers": (1, 1, 1, 1, 1)}),
    "cifar_vgg13": (VGG, {"layers": (2, 2, 2, 2, 2)}),
    "cifar_mobilenetv2": (MobileNetV2, {}),
    "cifar_shufflenetv1": (ShuffleNetV1, {"layers": (4, 8, 4), "widths": (24, 240, 480, 960)}),
    "cifar_shufflenetv2": (ShuffleNetV2, {"layers": (4, 8, 4), "widths": (24, 116, 232, 464), "last": 1024}),
}

default_cfgs = generate_default_cfgs(
    {
        name: {
            **{"url": "", "license": "apache-2.0", "num_classes": 100},
            **{"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"},
            **{"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)},
            **{"first_conv": network.first_conv, "classifier": network.head_name},
        }
        for name, (network, _) in NETWORKS.items()
    }
)


def _register(name: str) -> Callable[..., nn.Module]:
    network, args = NETWORKS[name]

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        features = {"out_indices": 3, "feature_cls": "getter"}
        return build_model_with_cfg(network, name, pretrained, feature_cfg=features, **{**args, **kwargs})

    build.__name__ = name
    return register_model(build)


globals().update({name: _register(name) for name in NETWORKS})  # timm has put the names into __all__
