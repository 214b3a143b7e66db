"""Bytes of a compiled program's collectives, with a loop's body counted as often as it runs.

XLA's own cost analysis counts a body once, which for a scan over layers is wrong by the depth.
"""

import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def collective_bytes(text: str) -> dict[str, float]:
    """Sums the result sizes of a program's collectives, as one device sees them.

    Args:
        text: of `jax.stages.Compiled.as_text()`.

    Returns:
        {kind: bytes} of the kinds that occur; a loop without a known number of rounds counts once.
    """
    bodies: dict[str, list[str]] = {}
    entry, current = "", []
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            current = bodies.setdefault(begins[2], [])
            entry = begins[2] if begins[1] else entry
        else:
            current.append(line)
    totals: dict[str, float] = {}

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            found = _COLLECTIVE.search(line)
            if found:
                totals[found[2]] = totals.get(found[2], 0.0) + times * _size(found[1])
            elif " while(" in line:
                rounds = _TRIPS.search(line)
                walk(_CALLED.search(line)[1], times * (int(rounds[1]) if rounds else 1))
            elif " call(" in line or " conditional(" in line:
                for called in _CALLED.findall(line):
                    walk(called, times)

    walk(entry, 1)
    return totals


def _size(shapes: str) -> int:
    return sum(
        math.prod(int(n) for n in sizes.split(",") if n) * _BYTES.get(kind, 4)
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )
