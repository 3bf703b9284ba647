"""The recipes that come with the project: their names, their variants, and where a run of one is kept.

`recipes/FAMILY/NAME.yaml` is a complete recipe. Its last section, `variants`, maps the name of a variant to the few keys that differ, and
to a `description` of one line. NAME is the file as it stands; NAME:VARIANT has the keys of that variant.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deit_kd.files.documents import short
from deit_kd.recipe.document import RecipeError
from deit_kd.recipe.schema import Recipe
from deit_kd.text import printable

FOLDER = Path(__file__).resolve().parent.parent.parent / "recipes"
# Each of these was once a file of its own. They stay names: commands, scripts and run folders have them.
SHORT_NAMES = {
    "deit_ti": "deit_logsum:tiny",
    "deit_s": "deit_logsum:small",
    "deit_ti_plain": "deit_logsum:tiny_plain",
    "deit_s_plain": "deit_logsum:small_plain",
    "deit_ti_vkd": "deit_vkd:tiny",
    "deit_s_vkd": "deit_vkd:small",
    "deit_ti_hard": "deit_hard:tiny",
    "deit_s_hard": "deit_hard:small",
    "deit_ti_soft": "deit_soft:tiny",
    "deit_s_soft": "deit_soft:small",
    "deit_ti_cskd": "deit_cskd:tiny",
    "deit_s_cskd": "deit_cskd:small",
    "deit_b_nd": "deit_nd:base",
    "deit_s_nd": "deit_nd:small",
    "deit_ti_nd": "deit_nd:tiny",
    "deit_ti_nkd": "deit_nkd:tiny",
    "deit_s_nkd": "deit_nkd:small",
    "deit_ti_two_teachers": "deit_two_teachers:tiny",
    "deit_s_two_teachers": "deit_two_teachers:small",
    "deit_ti_funmatch": "deit_funmatch",
    "deit_ti_two_stages": "deit_two_stages",
    "imagenet_resnet34_resnet18": "imagenet_logsum",
    "imagenet_resnet34_resnet18_kdpp": "imagenet_nd:resnet34_resnet18",
    "imagenet_resnet34_resnet18_dkdpp": "imagenet_nd:resnet34_resnet18_dkd",
    "imagenet_resnet50_mobilenetv1_kdpp": "imagenet_nd:resnet50_mobilenetv1",
    "cifar100_resnet32x4_resnet8x4_logsum": "cifar100_logsum:resnet32x4_resnet8x4",
    "cifar100_resnet32x4_resnet8x4_logsum_dkd": "cifar100_logsum:resnet32x4_resnet8x4_dkd",
    "cifar100_resnet50_mobilenetv2_logsum": "cifar100_logsum:resnet50_mobilenetv2",
    "cifar100_resnet50_mobilenetv2_logsum_dkd": "cifar100_logsum:resnet50_mobilenetv2_dkd",
    "cifar100_nd_resnet32x4_resnet8x4": "cifar100_nd:resnet32x4_resnet8x4",
    "cifar100_nd_resnet32x4_shufflenetv1": "cifar100_nd:resnet32x4_shufflenetv1",
    "cifar100_nd_resnet32x4_shufflenetv2": "cifar100_nd:resnet32x4_shufflenetv2",
    "cifar100_nd_resnet50_mobilenetv2": "cifar100_nd:resnet50_mobilenetv2",
    "cifar100_nd_resnet56_resnet20": "cifar100_nd:resnet56_resnet20",
    "cifar100_nd_wrn_40_2_wrn_40_1": "cifar100_nd:wrn_40_2_wrn_40_1",
    **{
        f"cifar100_resnet32x4_resnet8x4_{method}": f"cifar100_{method}"
        for method in ("kd", "dkd", "dist", "fitnet", "at", "cc", "crd", "reviewkd")
    },
    "quickstart_alone": "quickstart:alone",
    "finetune_probe": "finetune:probe",
    "finetune_taught": "finetune:taught",
}


@dataclass(frozen=True, kw_only=True)
class File(Recipe):
    """What a file holds: a recipe, and the keys in which its variants differ from it. Scalars of variants are read as text."""

    variants: dict[str, dict[str, str]] = field(default_factory=dict)


def find(name_or_path: str | Path) -> tuple[Path, str | None]:
    """The file that a name or path means, and the variant that it asks for, if any.

    Args:
        name_or_path: a name in `recipes/`, the path of a YAML file, or a run folder; each may end in `:VARIANT`.

    Raises:
        RecipeError: there is no such recipe.
    """
    text = str(Path(name_or_path))
    in_folder = os.path.dirname(os.path.abspath(text)) == str(FOLDER)  # noqa: PTH100, PTH120
    name = text
    if text.endswith(".yaml") and in_folder and not _file(text):  # recipes/deit_ti.yaml, where every recipe once was
        name = Path(text).stem
    name = SHORT_NAMES.get(name, name)
    if path := _file(name):
        return path, None
    stem, _, variant = name.rpartition(":")
    if stem and (path := _file(stem)):
        return path, variant
    if any(Path(each).suffix in (".yaml", ".yml") for each in (text, stem)):
        raise RecipeError(f"recipe file {printable(text)} does not exist")
    if stem in SHORT_NAMES:
        raise RecipeError(f"{printable(text)}: {stem} is {SHORT_NAMES[stem]} already; a variant follows the name of a file")
    known = [*(each for each, _ in listing()), *SHORT_NAMES]
    hint = nearest(text, known) or f"; known, or the path of a YAML file:\n{overview()}"
    raise RecipeError(f"unknown recipe {short(text)}{hint}")


def take_variants(document: dict[str, Any], variant: str | None, file: Path) -> list[str]:
    """Removes the section `variants` from a document; returns the keys of one variant as `key=value` overrides.

    Raises:
        RecipeError: the section is no mapping of names to keys, or has no such variant.
    """
    variants = document.pop("variants", None) or {}
    if not isinstance(variants, dict) or not all(isinstance(keys, dict) for keys in variants.values()):
        raise RecipeError(
            f"{printable(str(file))}: variants: must map a name to the keys that differ, such as small: {{epochs: 10}}"
        )
    if variant is None:
        return []
    if variant not in variants:
        there = f"it has {', '.join(variants)[:300]}" if variants else "it has none"
        raise RecipeError(printable(f"{file}: no variant is called {short(variant)}; {there}"))
    keys = {key: value for key, value in variants[variant].items() if key != "description"}
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]


def names() -> list[str]:
    """The recipes that come with the project, each once: NAME, or NAME:VARIANT where a file has variants."""
    every = [name for name, _ in listing()]
    return [name for name in every if not any(other.startswith(f"{name}:") for other in every)]


def listing() -> Iterator[tuple[str, str]]:
    """(name, one line) of each file and of each of its variants: what --help prints and a shell completes."""
    also = {name: f" (also {old})" for old, name in SHORT_NAMES.items()}
    for file in _files().values():
        header, _, variants = file.read_text(encoding="utf-8", errors="replace").partition("\nvariants:\n")
        first = header.partition("\n")[0].removeprefix("# ").strip()
        yield file.stem, f"{first}{also.get(file.stem, '')}"
        for variant, line in re.findall(r"^  ([\w.-]+):\n    description: (.*)$", variants, re.MULTILINE):
            name = f"{file.stem}:{variant}"
            yield name, f"{line}{also.get(name, '')}"


def overview() -> str:
    """`listing` as text, one recipe a line."""
    return "\n".join(f"  {name:<42} {line}" for name, line in listing())


def run_folder(name_or_path: str | Path) -> Path:
    """Where a run of a recipe is kept by default: runs/NAME_VARIANT, or the run folder that was named."""
    path = Path(name_or_path)
    with suppress(RecipeError, OSError):
        file, variant = find(path)
        if file == path / "recipe.yaml" and ((path / "run.json").exists() or (path / "checkpoints").is_dir()):
            return path
        if variant is not None and path.stem not in SHORT_NAMES:
            return Path("runs") / f"{Path(str(path).removesuffix(f':{variant}')).stem}_{variant}"
    return Path("runs") / path.stem


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing when no known word is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    # A key is often right but in the wrong section: compare the last part too.
    close = close or [k for k in known if "." in k and k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _files() -> dict[str, Path]:
    return {file.stem: file for file in sorted(FOLDER.rglob("*.yaml"))}


def _file(text: str) -> Path | None:
    path = Path(text)
    if path.suffix not in (".yaml", ".yml"):
        if path.name == text and text in (files := _files()):
            return files[text]
        path = path / "recipe.yaml"
    return path if os.path.exists(path) else None  # no error for any name, other than path.exists()  # noqa: PTH110
