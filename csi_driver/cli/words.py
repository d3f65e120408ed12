# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them."""

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(number: int) -> str:
    """`68 MiB`, `1.5 GiB`: at most one decimal, exact sizes stay exact to the eye."""
    value, unit = float(number), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    text = f"{value:.1f}".removesuffix(".0")
    return f"{text} {_UNITS[unit]}"


def milliseconds(seconds: float) -> str:
    """`0.42 ms`, `13.1 ms`, `1530 ms`."""
    value = seconds * 1000
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f} ms"


def duration(seconds: float) -> str:
    """`90 s`, `15 min`, `24 h`, `7 d`: the largest unit that says it exactly."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g} {unit}"
    return f"{seconds:g} s"
