"""Names of others in every place where they are shown, and what must not leave the machine."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deit_kd import text
from fuzzing import bounded, limited
from nasty import NASTY, markdown

anything = st.one_of(st.sampled_from(NASTY), st.text(st.characters(), max_size=80), st.binary(max_size=40).map(os.fsdecode))


def shown(source: str) -> str:
    """What a reader sees of Markdown that must be one paragraph of nothing but text."""
    blocks = markdown.parse(source)
    if not blocks:
        return ""
    assert [block.type for block in blocks] == ["paragraph_open", "inline", "paragraph_close"], source
    children = blocks[1].children or []
    assert {child.type for child in children} <= {"text", "text_special"}, [child.type for child in children]
    return "".join(child.content for child in children)


@bounded
@given(anything)
def test_markdown_shows_the_name_and_nothing_else(name: str) -> None:
    safe = text.for_markdown(name)
    assert not {unicodedata.category(character) for character in safe} & {"Cc", "Cs", "Zl", "Zp"}
    assert len(text.printable(name, 300)) <= 3000
    assert shown(safe) == text.printable(name, 300).strip()
    row = markdown.render(f"| a | b |\n|---|---|\n| {safe} | end |\n")
    assert row.count("<td>") == 2
    assert "<td>end</td>" in row
    assert "<script" not in row
    assert "href" not in row
    link = (markdown.parse(f"[{safe}](https://example.test)")[1].children or [])[0]
    assert (link.type, link.attrs["href"]) == ("link_open", "https://example.test")


@bounded
@given(anything)
def test_code_shows_the_name_and_nothing_else(name: str) -> None:
    safe = text.for_code(name)
    (code,) = markdown.parse(f"x {safe}")[1].children[1:]  # type: ignore[index]
    assert code.type == "code_inline"
    assert code.content.strip() == text.printable(name, 300).replace("|", "¦").strip()
    row = markdown.render(f"| a | b |\n|---|---|\n| {safe} | end |\n")
    assert row.count("<td>") == 2
    assert "<td>end</td>" in row


@bounded
@given(anything)
def test_a_terminal_gets_one_line_that_moves_nothing(name: str) -> None:
    safe = text.for_terminal(name)
    safe.encode()
    assert "\n" not in safe
    assert not any(
        ord(character) < 32 or 127 <= ord(character) < 160 or character in "\u202e\u2066\u2069\u2028" for character in safe
    )


@bounded
@given(anything)
def test_a_table_is_read_back_and_runs_no_formula(name: str) -> None:
    stream = io.StringIO()
    csv.writer(stream).writerow([text.for_csv(name), "end"])
    stream.getvalue().encode()
    ((first, last),) = csv.reader(io.StringIO(stream.getvalue()))
    assert last == "end"
    assert text.for_csv(name) == first
    assert first[:1] not in ("=", "@", "|")


@bounded
@given(anything)
def test_a_file_name_stays_in_its_folder(name: str) -> None:
    safe = text.for_file_name(name)
    assert 0 < len(safe.encode()) <= 101
    assert Path("folder", safe).parent == Path("folder")
    assert safe not in (".", "..")
    assert not safe.startswith(("-", "."))
    assert all(character.isascii() and (character.isalnum() or character in "._-") for character in safe)


@bounded
@given(anything)
def test_yaml_and_json_hold_names_as_they_are(name: str) -> None:
    """They escape by themselves; what is in the front matter of a card is safe for strict readers as well."""
    assert json.loads(json.dumps(name)) == name
    assert yaml.safe_load(yaml.safe_dump({"name": text.printable(name)}, allow_unicode=True)) == {"name": text.printable(name)}
    yaml.safe_dump({"name": text.printable(name)}, allow_unicode=True).encode()


@pytest.mark.parametrize(
    ("name", "terminal", "in_markdown"),
    [
        (os.fsdecode(b"caf\xe9"), r"caf\udce9", r"caf\\udce9"),
        ("a\nb", r"a\nb", r"a\\nb"),
        ("\x1b[31m", r"\x1b[31m", r"\\x1b\[31m"),
        ("<b>", "<b>", "&lt;b&gt;"),
        ("a|b", "a|b", r"a\|b"),
        ("snake_case", "snake_case", "snake_case"),
        ("\u0645\u06cc\u200c\u0631", "\u0645\u06cc\u200c\u0631", "\u0645\u06cc\u200c\u0631"),
        ("T-shirt/top", "T-shirt/top", "T-shirt/top"),
    ],
)
def test_values(name: str, terminal: str, in_markdown: str) -> None:
    assert (text.for_terminal(name), text.for_markdown(name)) == (terminal, in_markdown)


def test_a_message_keeps_the_lines_of_its_faults() -> None:
    assert text.error_for_terminal("recipe x: 2 faults\n  a: b\n  c: d\x1b") == "recipe x: 2 faults\n  a: b\n  c: d\\x1b"
    assert text.error_for_terminal("data/a\nerror: b: cannot be read") == r"data/a\nerror: b: cannot be read"


SECRETS = [
    ("https://user:PASSWORD@host.test/a?token=XTOKENX#fragment", "https://host.test/a"),
    ("https://user:pa/ss@host.test/PASSWORD", "https://..."),
    ("https://user:12?PASSWORD@host.test/", "https://..."),
    ("https://user:12#PASSWORD@host.test/", "https://..."),
    ("https://user:PASS WORD@host.test/a", "https://host.test/a"),
    ("https://PASSWORD@host.test:8443/a", "https://host.test:8443/a"),
    ("HTTPS://u:PASSWORD@[::1]:80/a", "HTTPS://[::1]:80/a"),
    ("s3://KEY:PASSWORD@bucket/a/b.tar", "s3://bucket/a/b.tar"),
    ("https://bucket.test/a.tar?X-Amz-Signature=PASSWORD&b=1", "https://bucket.test/a.tar"),
    ("https:/anna:PASSWORD@h.test/a?token=XTOKENX", "https://h.test/a"),
    ("--data=s3:/KEY:PASSWORD@bucket/a", "--data=s3://bucket/a"),
    ("https://plain.test/a/b.html", "https://plain.test/a/b.html"),
    ("see https://u:PASSWORD@h.test/a, then (https://h.test/b?PASSWORD).", "see https://h.test/a, then (https://h.test/b)."),
    ("rsync user:PASSWORD@host.test:data", "rsync ...@host.test:data"),
    ("hf_PASSWORDabcdefghijklmnopqrstuv", "..."),
    ("HF_TOKEN=hf_PASSWORD123", "HF_TOKEN=..."),
    ("data.token=PASSWORD", "data.token=..."),
    ("--password=PASSWORD --x", "--password=... --x"),
    ("--hub-token PASSWORD --x", "--hub-token ... --x"),
    ("Authorization: Bearer PASSWORD", "Authorization: Bearer ..."),
    ('{"Authorization": "Basic PASSWORD=="}', '{"Authorization": "Basic ..."}'),
    ("AWS_SECRET_ACCESS_KEY='PASS WORD'", "AWS_SECRET_ACCESS_KEY=..."),
    ("password: PASSWORD", "password: ..."),
    ("ghp_PASSWORD0123456789abcdef", "..."),
    ("AKIAABCDEFGHIJKLMNOP", "..."),
    ("https://user:<PASSWORD>@host.test", "https://host.test"),
    ("see https://u:PA'SS@h.test/a, then", "see https://h.test/a, then"),
    ("--data https://h.test/x?token=PASSWORD: no such directory", "--data https://h.test/x: no such directory"),
    ("token: PASS", "token: ..."),
    ("X-Auth-Token: PASS", "X-Auth-Token: ..."),
    ("Bearer PASS", "Bearer ..."),
    ("?sas=PASS", "?sas=..."),
    ("pass=PASS", "pass=..."),
    ("smtp_auth=PASS", "smtp_auth=..."),
    ("dist_token=PASS", "dist_token=..."),
    ("user:PASS/WORD@host", "...@host"),
    ("{'auth': 'PASS WORD'}", "{'auth': ...}"),
]


@pytest.mark.parametrize(("said", "left"), SECRETS)
def test_secrets_are_hidden(said: str, left: str) -> None:
    for safe in (text.hide_secrets(said), text.for_terminal(said), text.redact(said)):
        assert not any(part in safe for part in ("PASS", "WORD", "XTOKENX"))
    assert text.hide_secrets(said) == left
    assert text.hide_secrets(left) == left
    assert text.leaks(said) or said == left
    assert not text.leaks(left)


def test_what_the_environment_calls_secret_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert text.redact("key 0123456789abcdef of wandb") == "key ... of wandb"


PATHS = [
    ("/home/anna/photos", ".../photos"),
    ("/home/anna/my photos/the cat.png", ".../the cat.png"),
    ("~/photos/cats", ".../cats"),
    ("../../other/cats/", ".../cats"),
    (r"C:\Users\anna\cats", ".../cats"),
    (r"\\server\share\cats", ".../cats"),
    ("file:///home/anna/cats", ".../cats"),
    ("local-dir:/home/anna/cats", ".../cats"),
    ("/", "..."),
    ("teacher.weights=/home/anna/x.pth", "teacher.weights=.../x.pth"),
    ("--data=/home/anna/my photos", "--data=.../my photos"),
    ("reads /home/anna/a b/c.png: cannot be read", "reads .../c.png: cannot be read"),
    ("'/home/anna/x' and (~/anna/y)", "'.../x' and (.../y)"),
    ("from local-dir:/home/anna/cats", "from local-dir:.../cats"),
    ("from file:///home/anna/cats", "from file:.../cats"),
    (r"from D:\anna\cats\x.png", "from .../x.png"),
    ("</home/anna/x>", "<.../x>"),
    ("a[0]/home/anna/x", "a[0].../x"),
    ("\u2026/home/anna/x", "\u2026.../x"),
    ("$HOME/anna/x", ".../x"),
    ("see ${HOME}/anna/x", "see .../x"),
    ("hf-hub:/home/anna/x", ".../x"),
    ("host:/home/anna/x", "host:.../x"),
]


@pytest.mark.parametrize(("said", "left"), PATHS)
def test_paths_keep_their_last_name(said: str, left: str) -> None:
    assert text.redact(said) == left
    assert text.redact(left) == left
    assert not text.leaks(left)
    assert text.redact_all({"a": [said, {"b": said}], "password": "p", "n": 1}) == {
        "a": [left, {"b": left}],
        "password": "...",
        "n": 1,
    }
    assert said == "/" or text.leaks(said)


@pytest.mark.parametrize(
    "plain",
    [
        *(
            "hf-hub:timm/regnety_160.deit_in1k",
            "T-shirt/top",
            "and/or",
            "resize to 64 / 0.9",
            "images/s",
            "a ... b",
            "n/a",
            "hf_datasets",
        ),
        *("recipe x: wandb.api_key: unknown key in an override", "api_key: must be a text", "student.model_args.num_tokens=5"),
        *("hf-hub:org/name@revision", "https://[::1]/a/b", "https://[fe80::12ab]:80/a/b", "dist_token=true", "bypass=3"),
        *("distill.student_tap=distillation_token", "distillation_token: needs a head", "student.model_args.class_token=false"),
        *(
            "https://huggingface.co/papers/2303.11098",
            "1 x 2 x 3 images",
            "CPU, 2 cores (x86_64)",
            "2 (processes) x 3",
            "epochs=3",
            "a <b/> c",
        ),
        *("timm.create_model('hf-hub:org/name')", "run.precision=no", "seed=0", "12:30", "{depth: 1, patch_size: 8}", "</td>"),
    ],
)
def test_what_is_no_secret_stays(plain: str) -> None:
    assert text.redact(plain) == plain
    assert not text.leaks(plain)


def test_a_command_keeps_no_folder() -> None:
    words = [
        "--recipe",
        "my/own.yaml",
        "--data",
        "https://u:p@h.test/a?t=1",
        "--output",
        "runs/of anna/x",
        "teacher.weights=w/x.pth",
    ]
    words += ["teacher.name=hf-hub:timm/a.b", "student.model_args={depth: 1}", "--token", "PASSWORD", "optim.lr=1e-3"]
    assert text.redact_words(words) == [
        *("--recipe", ".../own.yaml", "--data", "https://h.test/a", "--output", ".../x", "teacher.weights=.../x.pth"),
        *("teacher.name=hf-hub:timm/a.b", "student.model_args={depth: 1}", "--token", "...", "optim.lr=1e-3"),
    ]


@bounded
@given(anything)
def test_what_is_redacted_is_clean(said: str) -> None:
    safe = text.redact(said)
    assert text.redact(safe) == safe
    assert not text.leaks(safe) or "\n" in safe, (said, safe)


def test_long_texts_take_no_time() -> None:
    """A long word is looked at once, not once from each of its letters."""
    for part in ("a", "/a", "a:", "a@", "://", "--a-", "~/", "token", "x=", "\\\\a", "C:\\a", "eyJ", "hf_", "a.", " /a b"):
        long = part * (30_000 // len(part))
        with limited():
            text.redact(long)
            text.for_terminal(long)
            text.for_markdown(long)


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ("apache-2.0", "apache-2.0"),
        (["mit", "apache-2.0"], "mit, apache-2.0"),
        ([], "unknown"),
        ({"name": "mit"}, "mit"),
        ({"a": 1}, "unknown"),
        (3, "unknown"),
        (None, "unknown"),
        (True, "unknown"),
        ("a\nb \x1b", r"a b \x1b"),
        ("see /home/anna/license", "see .../license"),
        ([["mit"]], "unknown"),
        ("", "unknown"),
        ("x" * 1000, "x" * 99 + "…"),
    ],
)
def test_a_license_of_any_type_is_a_line(stated: object, name: str) -> None:
    assert text.license_name(stated) == name
