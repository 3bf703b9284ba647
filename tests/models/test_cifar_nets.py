"""The 32 px networks against CRD's, and what timm and the taps ask of them."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

import deit_kd.models.cifar_nets  # noqa: F401  # registers them

# Parameters at 100 classes; the same in millions as the distillation literature prints it; pooled width; logits of `known_answer`.
# Counts and logits are those of a float64 transcription of CRD's code (RepDistiller, models/ at eedab9d, mobilenetv2.py at
# b13aecc). Some papers truncate: 2.25 for wrn_40_2, 1.35 for shufflenetv2.
TABLE = {
    "cifar_resnet20": (278_324, 0.28, 64, -296.711779, 220.7459147),
    "cifar_resnet32": (472_756, 0.47, 64, 22877.37114, 26216.59632),
    "cifar_resnet56": (861_620, 0.86, 64, -1183666416, 858475857.1),
    "cifar_resnet110": (1_736_564, 1.74, 64, 4.91886241e20, 4.065931324e20),
    "cifar_resnet8x4": (1_233_540, 1.23, 256, 15.11157265, 12.34647049),
    "cifar_resnet32x4": (7_433_860, 7.43, 256, 36350735.75, 26043419.81),
    "cifar_resnet50": (23_705_252, 23.71, 2048, -22.93971647, 24.94315852),
    "cifar_wrn_16_2": (703_284, 0.70, 128, 173.7243297, 191.5228614),
    "cifar_wrn_40_1": (569_780, 0.57, 64, 47242.20247, 54658.54446),
    "cifar_wrn_40_2": (2_255_156, 2.26, 128, 86863326.64, 95881507.42),
    "cifar_vgg8": (3_965_028, 3.97, 512, 11.94544862, 9.366467014),
    "cifar_vgg13": (9_462_180, 9.46, 512, -56.85987733, 77.92105277),
    "cifar_mobilenetv2": (812_836, 0.81, 1280, -1.582950471, 1.187878585),
    "cifar_shufflenetv1": (949_258, 0.95, 960, 0.929663857, 0.9362985471),
    "cifar_shufflenetv2": (1_355_528, 1.36, 1024, 0.3838121748, 0.6660008761),
}

# Reduced networks, for what does not depend on the size.
SMALL: dict[str, dict[str, Any]] = {
    "cifar_resnet20": {"layers": (1, 1, 1)},
    "cifar_resnet50": {"layers": (1, 1, 1, 1), "widths": (8, 16, 32, 64, 128)},
    "cifar_wrn_16_2": {"layers": (1, 1, 1)},
    "cifar_vgg13": {"widths": (8, 16, 16, 32, 32)},
    "cifar_mobilenetv2": {"layers": (1, 1, 1, 2, 1, 1, 1)},
    "cifar_shufflenetv1": {"layers": (1, 2, 1), "widths": (24, 120, 240, 480)},
    "cifar_shufflenetv2": {"layers": (1, 2, 1), "widths": (24, 48, 96, 192), "last": 64},
}
CHECKPOINT_NAMES = {
    "cifar_resnet20": ("conv1.weight", "bn1.running_var", "layer1.2.conv2.weight", "layer2.0.downsample.1.bias", "fc.weight"),
    "cifar_resnet50": ("conv1.weight", "layer1.0.shortcut.0.weight", "layer4.2.bn3.weight", "linear.bias"),
    "cifar_wrn_40_2": ("block1.layer.0.bn1.bias", "block3.layer.0.convShortcut.weight", "bn1.running_mean", "fc.bias"),
    "cifar_vgg13": ("block0.0.bias", "block4.4.running_mean", "classifier.weight"),
    "cifar_mobilenetv2": (
        "conv1.1.bias",
        "blocks.0.0.conv.0.weight",
        "blocks.6.0.conv.7.bias",
        "conv2.0.weight",
        "classifier.0.bias",
    ),
    "cifar_shufflenetv1": ("layer2.7.conv3.weight", "layer3.0.bn3.weight", "linear.weight"),
    "cifar_shufflenetv2": ("layer1.0.conv5.weight", "layer2.7.bn3.bias", "conv2.weight", "bn2.bias", "linear.weight"),
}
FIRST = {"cifar_vgg13": "block0.0.weight", "cifar_mobilenetv2": "conv1.0.weight"}


def known_answer(model: nn.Module) -> Tensor:
    """The logits of a fixed image with fixed weights."""
    for name, value in model.state_dict().items():
        if value.ndim == 0:
            continue
        wave = torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + zlib.crc32(name.encode()) % 1000).view_as(value)
        if value.ndim > 1:
            value.copy_(wave / math.sqrt(value[0].numel()))
        else:
            value.copy_(1 + 0.3 * wave if name.endswith(("var", "weight")) else 0.1 * wave)
    with torch.no_grad():
        return model(torch.sin(0.013 * torch.arange(3 * 32 * 32, dtype=torch.float64)).view(1, 3, 32, 32))


@pytest.mark.parametrize("name", TABLE)
def test_network_is_the_published_one(name: str) -> None:
    parameters, published, width, first_logit, scale = TABLE[name]
    assert name in timm.list_models()
    model = timm.create_model(name).double().eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(parameters / 1e6, 2) == published
    assert model.num_classes == 100
    assert model.num_features == model.head_hidden_size == model.get_classifier().in_features == width
    logits = known_answer(model)
    assert logits[0, 0].item() == pytest.approx(first_logit, rel=1e-8)
    assert logits.square().mean().sqrt().item() == pytest.approx(scale, rel=1e-8)


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_parameters_have_the_names_of_published_checkpoints(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    names = list(model.state_dict())
    assert set(CHECKPOINT_NAMES[name]) <= set(names)
    assert names[0] == FIRST.get(name, "conv1.weight") == f"{model.pretrained_cfg['first_conv']}.weight"
    assert names[-1] == f"{model.pretrained_cfg['classifier']}.bias"


@pytest.mark.parametrize("name", SMALL)
def test_stages_and_head(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **SMALL[name]).eval()
    images = torch.randn(2, 3, 64, 64)
    final, maps = model.forward_intermediates(images)
    assert [list(x.shape) for x in maps] == [
        [2, stage["num_chs"], 64 // stage["reduction"], 64 // stage["reduction"]] for stage in model.feature_info
    ]
    assert torch.equal(final, maps[-1])
    assert torch.equal(final, model.forward_features(images))
    assert final.min() >= 0  # after its activation
    pooled = model.forward_head(final, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model(images), model.forward_head(final))
    assert torch.equal(model(images), model.get_classifier()(pooled))

    first, last = model.forward_intermediates(images, indices=[0, -1], intermediates_only=True)
    assert torch.equal(first, maps[0])
    assert torch.equal(last, maps[-1])
    stopped, (only,) = model.forward_intermediates(images, indices=[0], stop_early=True)
    assert torch.equal(stopped, only)
    assert torch.equal(only, maps[0])
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(images, output_fmt="NLC")

    hooked = []
    for stage in model.feature_info:
        model.get_submodule(stage["module"]).register_forward_hook(lambda *args: hooked.append(args[-1]))
    model(images).square().sum().backward()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(hooked, maps, strict=True))
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]

    model.reset_classifier(7)
    assert model(images[:, :, :33, :40]).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)


@pytest.mark.parametrize("wrong", [{"in_chans": 1}, {"drop_rate": 0.1}, {"drop_path_rate": 0.1}, {"wings": 2}])
def test_arguments_that_the_networks_do_not_know(wrong: dict[str, Any]) -> None:
    timm.create_model("cifar_resnet8x4", drop_rate=0.0, drop_path_rate=0.0, in_chans=3)
    with pytest.raises((TypeError, ValueError)):
        timm.create_model("cifar_resnet8x4", **wrong)


def test_initialization_is_the_authors() -> None:
    torch.manual_seed(0)
    for name in ("cifar_resnet8x4", "cifar_wrn_16_2", "cifar_vgg8", "cifar_mobilenetv2"):
        model = timm.create_model(name)
        weight = max((m.weight for m in model.modules() if isinstance(m, nn.Conv2d)), key=Tensor.numel)
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (len(weight) * weight[0, 0].numel())), rel=0.02), name
        head = model.get_classifier()
        assert head.bias.any() == (name == "cifar_resnet8x4"), name
        if name in ("cifar_vgg8", "cifar_mobilenetv2"):
            assert head.weight.std().item() == pytest.approx(0.01, rel=0.02), name


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_mobilenetv2"])
def test_an_exported_network_loads_with_timm_alone(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=5, **SMALL[name]).eval()
    save_for_hf(model, tmp_path, model_args=SMALL[name], safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert loaded.pretrained_cfg["mean"] == pytest.approx((0.5071, 0.4867, 0.4408))
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)(images).shape == (2, 3)
