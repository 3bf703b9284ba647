"""What a pickle of weights would do, read from its opcodes: nothing is built.

torch's own reader builds tensors and plain values alone, but does not bound what they take: bytes that a call asks for, tuples that hold another
one twice, level on level, so that a hash of them takes hours.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import IO, Any

MOST_OPCODES = 600_000  # a network of 1,000 tensors with its optimizer's state and an average has 100,000
MOST_VALUES = 4_000_000  # that a walk through a value may meet
MOST_LEVELS = 100
_CALLS = (
    r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|sparse_tensor|meta_tensor_no_storage)",
    r"torch\.(Size|device|serialization\._get_layout)|collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)",
    r"_codecs\.encode",
)
CALLED = re.compile("|".join(_CALLS))  # what a pickle of tensors and numbers calls
_KINDS = r"torch\.(storage\.UntypedStorage|\w+Storage|u?int\d+|b?float\d\w*|bool|complex\d+|q\w+|strided|sparse_\w+)"
NAMED = re.compile("|".join((*_CALLS, _KINDS)))  # and what else it names
_NAMING = ("GLOBAL", "INST", "STACK_GLOBAL")
_FILLED = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # opcodes that put values into one that is there


class Foreign(ValueError):
    """Names an object that is no part of weights."""


class Unbounded(ValueError):
    """A pickle that is damaged, or larger than one of weights."""


@dataclass
class _Value:
    size: int = 1  # values that a walk through it meets
    levels: int = 0
    text: str = ""  # of a text; of a global its name; of a tuple that of its last part

    def take(self, parts: Collection[_Value]) -> None:
        self.size += sum(part.size for part in parts)
        self.levels = max([self.levels, *(1 + part.levels for part in parts)])
        if self.size > MOST_VALUES or self.levels > MOST_LEVELS:
            raise Unbounded("values that hold one another too often")


def check_pickle(stream: IO[bytes], harmless: Collection[str]) -> None:
    """Reads one pickle up to its end.

    Args:
        stream: of bounded length; it stands behind the pickle afterwards.
        harmless: names of objects beside weights that are not built either.

    Raises:
        Foreign: it names or calls something else than tensors, plain values and `harmless`.
        Unbounded: it is damaged, or too large.
    """
    stack: list[_Value | None] = []  # None: a mark
    memo: dict[int, _Value | None] = {}
    try:
        argument: Any
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MOST_OPCODES:
                raise Unbounded("more steps than weights take")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if argument is None else int(argument)] = stack[-1]
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[int(argument)])
            elif opcode.name == "MARK":
                stack.append(None)
            elif not opcode.stack_before and opcode.stack_after and opcode.name not in _NAMING:  # most of a pickle
                stack.append(_Value(text=argument if isinstance(argument, str) else ""))
            else:
                _run(opcode, argument, stack, harmless)
    except (Foreign, Unbounded):
        raise
    except Exception as error:  # pickletools raises many types
        raise Unbounded(f"a damaged pickle: {error}") from None


def _run(opcode: pickletools.OpcodeInfo, argument: object, stack: list[_Value | None], harmless: Collection[str]) -> None:
    """What an opcode does to the stack."""
    taken = opcode.stack_before
    parts: list[_Value | None] = []
    if pickletools.markobject in taken:
        mark = max(at for at, value in enumerate(stack) if value is None) if stack[-1] is not None else len(stack) - 1
        parts, taken = stack[mark + 1 :], taken[: taken.index(pickletools.markobject)]
        del stack[mark:]
    first = len(stack) - len(taken)
    parts = stack[first:] + parts if first >= 0 else [None]
    values = [part for part in parts if part is not None]
    if len(values) < len(parts):
        raise Unbounded("a damaged pickle")
    del stack[first:]
    name = opcode.name
    if name in _NAMING:
        named = f"{values[0].text}.{values[1].text}" if name == "STACK_GLOBAL" else str(argument).replace(" ", ".")
        if named not in harmless and not NAMED.fullmatch(named):
            raise Foreign(named)
        stack.append(_Value(text=named))
    elif name in _FILLED:
        values[0].take(values[1:])
        stack.append(values[0])
    else:
        if name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"):
            called = values[0].text
            # other codecs compress, or take the square of a text's length
            known = called in harmless or (CALLED.fullmatch(called) and (called != "_codecs.encode" or values[1].text == "latin1"))
            if not known:
                raise Foreign(called or "without a name")
        for _ in opcode.stack_after:
            made = _Value(text=values[-1].text if values and name.startswith("TUPLE") else "")
            made.take(values)
            stack.append(made)
