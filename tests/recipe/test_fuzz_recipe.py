"""Recipes of strangers: changed in their values or bytes, with any override, they load or end in lines that say why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deit_kd import recipe as recipes
from deit_kd.text import printable
from fuzzing import bounded, changed, damaged, survives

RIGHT = {name: recipes.find(name)[0].read_bytes() for name in ("quickstart", "deit_two_teachers", "finetune")}
VALUES = {name: yaml.safe_load(content) for name, content in RIGHT.items()}
PIECES = ("&a ", "*a", "<<: ", "!!python/name:os.system ", "!!binary ", "- ", "? ", ": ", "{", "}", "[", "]", "---\n", "...\n", "\t", "# ", "|\n",
    ">", "'", '"', "%YAML 1.2\n", "1:30", "010", "0x1F", "1e999", ".nan", "~", "yes", "null", "2020-01-01", "\\UFFFFFFFF", "\x00", "\x1b[31m",
    "\u2028", "\udcff", "9" * 5000, "optim:\n", "no", " ", "\n")  # fmt: skip
WORDS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=6).map("".join))


def loads(name_or_path: str | Path, overrides: list[str]) -> None:
    """Fails unless the recipe loads, or each of its faults is one line."""
    try:
        recipe = recipes.load(name_or_path, overrides)
        recipes.fingerprint(recipe)
    except recipes.RecipeError as error:
        lines = str(error).split("\n  ")
        assert len(lines) <= recipes.MOST_FAULTS + 2
        for line in lines:
            assert printable(line) == line, repr(line)
            assert len(line) < 1000, line[:1000]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "mine.yaml"


@bounded
@given(content=st.sampled_from(sorted(VALUES)).flatmap(lambda name: changed(VALUES[name])))
def test_changed_values(file: Path, content: object) -> None:
    file.write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))
    survives(lambda: loads(file, []))
    survives(lambda: loads(f"{file}:taught", []))  # of finetune


@bounded
@given(
    key=st.one_of(st.sampled_from(sorted(recipes._KINDS)), WORDS),
    content=changed({"small": {"optim.lr": 1, "teacher": {"a": [1]}}}),
)
def test_any_variant(file: Path, key: str, content: object) -> None:
    if isinstance(content, dict) and isinstance(content.get("small"), dict):
        content["small"] = {key: next(iter(content["small"].values()), None)}
    document = VALUES["quickstart"] | {"variants": content}
    file.write_bytes(json.dumps(document).encode("utf-8", "surrogatepass"))
    survives(lambda: loads(f"{file}:small", []))


@bounded
@given(content=st.sampled_from(sorted(RIGHT)).flatmap(lambda name: damaged(RIGHT[name])))
def test_damaged_bytes(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    survives(lambda: loads(file, []))


@bounded
@given(data=st.data(), piece=WORDS)
def test_pieces_of_yaml_anywhere(file: Path, data: st.DataObject, piece: str) -> None:
    text = RIGHT["deit_two_teachers"].decode()
    at = data.draw(st.integers(0, len(text)))
    file.write_bytes((text[:at] + piece + text[at:]).encode("utf-8", "surrogatepass"))
    survives(lambda: loads(file, []))


@bounded
@given(key=st.one_of(st.sampled_from(sorted(recipes._KINDS)), WORDS), value=WORDS, number=st.integers(0, 3))
def test_any_override(key: str, value: str, number: int) -> None:
    override = f"{key.replace('*', str(number))}={value}"
    survives(lambda: loads("deit_two_teachers" if key.startswith("teachers") else "quickstart", [override]))


@bounded
@given(text=WORDS.filter(bool))
def test_text_survives_override_dump_and_load(file: Path, text: str) -> None:
    recipe = recipes.load("quickstart", [f"teacher.weights={text}"])
    assert recipe.teacher is not None
    assert recipe.teacher.weights == text
    file.write_text(recipes.dump(recipe), encoding="utf-8")
    assert recipes.load(file) == recipe
