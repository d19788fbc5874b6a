"""Damage to bytes and to values: what the formats' fuzzers have in common."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

NUMBERS = [0, -1, 1, 2**31, 2**31 - 1, 2**63, 2**64, -(2**63), 10**6, 10**12, 10**20, 10**400, 0.5, 1e308, -0.0]
ODD_NUMBERS = [float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "", " ", "\x00", "a" * 300, "a" * 100_000, "../..", "/etc/passwd", "~", "\ud800", "\U0010ffff", "9" * 4000, "1e400",
    "0-9999999999", "3-1", "(a+)+$", "[", "null", "é", "\n", "model", "0", "-1", "auto", "100%", "6GiB", "4x64",
]  # fmt: skip
OTHERS = [None, True, False, [], {}, [[]], [{}], {"": ""}, [None], {"a": {"b": {"c": 1}}}, [1, 2, 3], "x", 7, 0.25]


def nested(depth: int, *, as_list: bool = True) -> Any:
    """Lists or mappings in each other."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


def hostile(rng: random.Random) -> Any:
    """A value that does not belong where it is put."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(NUMBERS)
    if kind < 0.35:
        return rng.choice(ODD_NUMBERS)
    if kind < 0.65:
        return rng.choice(TEXTS)
    if kind < 0.93:
        return copy.deepcopy(rng.choice(OTHERS))
    if kind < 0.96:
        return nested(rng.choice([5, 100, 400]), as_list=rng.random() < 0.5)
    if kind < 0.98:
        return list(range(rng.choice([100, 5000])))
    return {str(number): number for number in range(rng.choice([100, 5000]))}


def mutated(rng: random.Random, value: Any, known: Mapping[str, Any] | None = None) -> Any:
    """A value with one to three things changed in it somewhere; `known` are keys worth adding, with their values."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _mutated_once(rng, value, known or {})
    return value


def _mutated_once(rng: random.Random, value: Any, known: Mapping[str, Any]) -> Any:
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return hostile(rng)
    owner, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.55:
        owner[key] = hostile(rng)
    elif kind < 0.65:
        del owner[key]
    elif kind < 0.75 and isinstance(owner, dict):
        owner[rng.choice([*map(str, TEXTS), f"{key}x", str(key)[1:]])] = owner.pop(key)
    elif kind < 0.85 and isinstance(owner, dict) and known:
        name = rng.choice(sorted(known))
        owner[name] = copy.deepcopy(known[name]) if rng.random() < 0.5 else hostile(rng)
    elif kind < 0.92:
        other, there = rng.choice(places)  # values that change places
        owner[key] = copy.deepcopy(other[there]) if there in other or isinstance(other, list) else hostile(rng)
    elif isinstance(owner, list):
        owner.extend([copy.deepcopy(owner[key])] * rng.choice([1, 3, 200]))
    else:
        owner[key] = [owner[key]] if rng.random() < 0.5 else {str(key): owner[key]}
    return value


def _places(value: Any, depth: int = 0) -> Any:
    """Everything in nested lists and mappings, as where it is."""
    if depth > 50 or not isinstance(value, dict | list):
        return
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        yield from _places(value[key], depth + 1)


def damaged(rng: random.Random, content: bytes, tokens: tuple[bytes, ...] = ()) -> bytes:
    """Bytes that were cut, flipped, repeated or written over; `tokens` are worth writing in."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        if not data:
            return bytes(data)
        kind, at = rng.random(), rng.randrange(len(data))
        if kind < 0.3:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.45:
            data[at] = rng.choice(b"\x00\xff\x80{}[]:,\"'0-9eE&*!<> \n")
        elif kind < 0.55:
            del data[at:]
        elif kind < 0.65:
            del data[at : at + rng.randrange(1, 30)]
        elif kind < 0.8:
            piece = data[at : at + rng.randrange(1, 40)]
            data[at:at] = piece * rng.choice([1, 2, 50])
        elif kind < 0.95 and tokens:
            token = rng.choice(tokens)
            data[at : at + rng.choice([0, 1, len(token)])] = token
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 12))
    return bytes(data)
