"""Content made of other content: cut off, flipped, spliced, its numbers made enormous."""

import struct
from collections.abc import Callable, Sequence
from random import Random

_NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32_767, 65_535, 65_536),
    *(2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**48, 2**62, 2**63 - 1),
    *(-1, -2, -8, -128, -(2**31), -(2**63)),
)
_WIDTHS = {1: "B", 2: "<H", 4: "<I", 8: "<Q"}


def mutate(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Return one of the seeds, changed in one to six places."""
    content = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        random.choice(_CHANGES)(random, content, seeds)
    return bytes(content)


def _flip(random: Random, content: bytearray, _seeds: Sequence[bytes]) -> None:
    if content:
        content[_place(random, content)] ^= 1 << random.randrange(8)


def _overwrite(random: Random, content: bytearray, _seeds: Sequence[bytes]) -> None:
    """Put a number that somebody may trust where another one was, aligned as numbers are."""
    width = random.choice((1, 2, 4, 4, 8, 8))
    at = _place(random, content) // width * width
    if at + width <= len(content):
        number = random.choice((*_NUMBERS, len(content), random.randrange(len(content))))
        struct.pack_into(_WIDTHS[width], content, at, number % 2 ** (8 * width))


def _nudge(random: Random, content: bytearray, _seeds: Sequence[bytes]) -> None:
    """Make a number a little larger or smaller."""
    width = random.choice((1, 2, 4, 8))
    at = _place(random, content) // width * width
    if at + width <= len(content):
        (number,) = struct.unpack_from(_WIDTHS[width], content, at)
        changed = number + random.choice((-8, -4, -1, 1, 4, 8))
        struct.pack_into(_WIDTHS[width], content, at, changed % 2 ** (8 * width))


def _cut(random: Random, content: bytearray, _seeds: Sequence[bytes]) -> None:
    del content[_place(random, content) :]


def _remove(random: Random, content: bytearray, _seeds: Sequence[bytes]) -> None:
    at = _place(random, content)
    del content[at : at + random.choice((1, 4, 8, 64))]


def _repeat(random: Random, content: bytearray, _seeds: Sequence[bytes]) -> None:
    at = _place(random, content)
    piece = content[at : at + random.choice((1, 8, 64, 512))]
    content[at:at] = piece * random.choice((1, 1, 2, 8))


def _splice(random: Random, content: bytearray, seeds: Sequence[bytes]) -> None:
    other = random.choice(seeds)
    at, start = _place(random, content), _place(random, other)
    content[at:] = other[start:]


def _place(random: Random, content: Sequence[int]) -> int:
    """Return a place in the content, more often near its beginning or its end."""
    size = len(content)
    if size < 2:
        return 0
    near = min(size, 512)
    return random.choice(
        (random.randrange(size), random.randrange(near), size - 1 - random.randrange(near))
    )


_CHANGES: Sequence[Callable[[Random, bytearray, Sequence[bytes]], None]] = (
    *(_flip, _flip, _overwrite, _overwrite, _overwrite, _nudge, _nudge),
    *(_cut, _remove, _repeat, _splice),
)
