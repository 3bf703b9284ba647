"""Names that break tables, terminals, Markdown and files, and a Markdown parser to look at them with."""

from __future__ import annotations

import os

from markdown_it import MarkdownIt

NASTY = [
    os.fsdecode(b"caf\xe9"),
    *("cat\ndog", "a\r\nb", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "tab\there", "nul\0"),
    *("\u202egnp.exe", "\u2066x\u2069", "\u200f", "line\u2028end", "a\u00adb", "\ufeffcat", "\ue000"),
    *(r"$\frac{1}$", "$", "$$", r"\$", r"x^{y_{z", "a|b", "`code`", "``", "`", r"\`", "\\", "a\\"),
    *("<script>alert(1)</script>", "<!-- -->", "&lt;", "&amp;", "a & b", "<b>", "</td>"),
    *(
        "](http://evil.test)",
        "[x](http://evil.test)",
        "![x](y)",
        "<http://evil.test>",
        "http://evil.test",
        "www.evil.test",
        "[x]: y",
        "a@b.cc",
    ),
    *("{{ jinja }}", "{% raw %}", "${HOME}", "%s", "{0}"),
    *(
        "---",
        "- item",
        "+ item",
        "* item",
        "1. one",
        "2) two",
        "# head",
        "> quote",
        "===",
        "~~~",
        "~~gone~~",
        "***",
        "__bold__",
        "_it_",
    ),
    *(
        "",
        " ",
        "  two  ",
        "y" * 10_000,
        "é" * 5_000,
        "\U0001f431",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "e\u0301",
        "a" + "\u0301" * 50,
    ),
    *(
        "\u732b",
        "\u05d7\u05ea\u05d5\u05dc",
        "\u0645\u06cc\u200c\u0631\u0648\u0645",
        "snake_case_name",
        "T-shirt/top",
        "CON",
        "..",
        ".",
        "../../etc",
    ),
    *(
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "|calc",
        "null",
        "true",
        "0o17",
        "1e3",
        "2001-01-01",
        "a: b",
        "#c",
        "!!python/object",
        "&a",
        "*a",
    ),
]


markdown = MarkdownIt("commonmark").enable("table").enable("strikethrough")
