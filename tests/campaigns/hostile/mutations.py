"""Hostile bytes, values and JSON, all drawn from a `numpy.random.Generator`."""

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from numpy.random import Generator

Item = TypeVar("Item")

NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 2**16, 2**31, 2**63, -(2**63), 10**30),
    *(0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *("", " ", "a", "-1", "1e9", "nan", "null", "true", "é", "\x00", "\ud800", "\x1b[2J", "x" * 70_000),
    *("../../../etc/passwd", "/dev/zero", "C:\\..\\a", "{{ 1/0 }}", "{% for", "%s%n", "<image>", "<image>" * 99),
)
DEEP = 200
"""Levels of the deepest nested value."""


def pick(rng: Generator, options: Sequence[Item]) -> Item:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def hostile_value(rng: Generator) -> Any:
    """A value that hardly any field expects."""
    kind = rng.integers(8)
    if kind < 3:
        return pick(rng, NUMBERS)
    if kind < 5:
        return pick(rng, TEXTS)
    if kind == 5:
        return pick(rng, (None, True, False))
    if kind == 6:
        return pick(rng, ([], {}, [[]], [None], {"": {}}, {"a": 1}, ["a", 1], [1] * 3000))
    nested: Any = 0
    for _ in range(DEEP):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def mutated(rng: Generator, value: Any, changes: int | None = None) -> Any:
    """A copy of a nested value in which one to three of its parts, or so many, are replaced, removed or wrapped."""
    root = {"": copy.deepcopy(value)}
    for _ in range(rng.integers(1, 4) if changes is None else changes):
        _mutate(rng, root)
    return root[""]


def _mutate(rng: Generator, root: dict[str, Any]):
    holder: Any = root
    key: Any = ""
    while (part := holder[key]) and isinstance(part, (dict, list)) and rng.random() < 0.8:
        holder, key = part, pick(rng, list(part) if isinstance(part, dict) else range(len(part)))
    kind = rng.integers(8)
    if kind < 4:
        holder[key] = hostile_value(rng)
    elif kind == 4 and holder is not root:
        del holder[key]
    elif kind == 5:
        holder[key] = pick(rng, ([holder[key]], {"a": holder[key]}, str(holder[key])[:1000]))
    elif kind == 6 and isinstance(holder, dict) and holder is not root:
        holder[f"{key}{pick(rng, ('s', ' ', '_', '.'))}"] = holder.pop(key)
    elif isinstance(holder[key], dict):
        holder[key][pick(rng, ("auto_map", "_class_name", "model_type", "dtype", "a", ""))] = hostile_value(rng)
    elif isinstance(holder[key], (int, float)):
        holder[key] = pick(rng, (-holder[key], holder[key] + 1, holder[key] * 1000, str(holder[key])))
    else:
        holder[key] = hostile_value(rng)


def _truncate(rng: Generator, content: bytes) -> bytes:
    return content[: rng.integers(len(content) + 1)]


def _flip(rng: Generator, content: bytes) -> bytes:
    """Some bytes have other values; every second time, only near the beginning, where headers are."""
    changed = bytearray(content)
    reach = min(len(changed), 64) if rng.random() < 0.5 else len(changed)
    for _ in range(rng.integers(1, 9) if reach else 0):
        changed[rng.integers(reach)] = pick(rng, (0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))))
    return bytes(changed)


def _enlarge(rng: Generator, content: bytes) -> bytes:
    """A number of a header is huge."""
    width = pick(rng, (2, 4, 8))
    place = int(rng.integers(max(1, min(len(content), 64) - width)))
    number = pick(rng, (b"\xff" * width, b"\x7f" + b"\xff" * (width - 1), b"\xff" * (width - 1) + b"\x7f"))
    return content[:place] + number + content[place + width :]


def _block(rng: Generator, content: bytes) -> tuple[int, int]:
    start = int(rng.integers(len(content) + 1))
    return start, min(len(content), start + int(rng.integers(1, 65)))


def _duplicate(rng: Generator, content: bytes) -> bytes:
    start, stop = _block(rng, content)
    return content[:stop] + content[start:stop] * int(rng.integers(1, 20)) + content[stop:]


def _remove(rng: Generator, content: bytes) -> bytes:
    start, stop = _block(rng, content)
    return content[:start] + content[stop:]


def _fill(rng: Generator, content: bytes) -> bytes:
    start, stop = _block(rng, content)
    return content[:start] + pick(rng, (b"\x00", b"\xff", b"\n", b'"')) * (stop - start) + content[stop:]


def _append(rng: Generator, content: bytes) -> bytes:
    return content + rng.bytes(int(rng.integers(1, 200)))


BYTE_MUTATIONS: tuple[Callable[[Generator, bytes], bytes], ...] = (
    *(_truncate, _flip, _flip, _enlarge, _enlarge, _duplicate, _remove, _fill, _append),
)


def mutated_bytes(rng: Generator, content: bytes) -> bytes:
    """The content with one to three changes; once in fifty cases nothing is left."""
    if rng.random() < 0.02:
        return b""
    for _ in range(rng.integers(1, 4)):
        content = pick(rng, BYTE_MUTATIONS)(rng, content)
    return content


BROKEN_JSON = (
    *(b"", b"null", b"[]", b"{}", b'"text"', b"0", b"{", b"{}}", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000),
    *(b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"{'a': 1}", b"// {}\n{}", b"\x00" * 100, b'{"a": 1, "a": {}}'),
)


def hostile_json(rng: Generator, value: Any) -> bytes:
    """JSON of the value with hostile parts, or text that is hardly any JSON."""
    kind = rng.random()
    if kind < 0.75:
        return json.dumps(mutated(rng, value)).encode()
    if kind < 0.9:
        return mutated_bytes(rng, json.dumps(value).encode())
    return pick(rng, BROKEN_JSON)


__all__ = ["BROKEN_JSON", "hostile_json", "hostile_value", "mutated", "mutated_bytes", "pick"]
