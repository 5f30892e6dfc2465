"""Damage: bits, runs, lengths and whole pieces of a file changed by chance, in front of checksums and behind them."""

from __future__ import annotations

import random
import struct
import zlib

from benchmarks.fuzz_seeds import chunk

EXTREMES = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def mutate(body: bytes, rng: random.Random) -> bytes:
    """Return a file with one to four kinds of damage; structure behind checksums is damaged too, and the checksums mended."""
    data = bytearray(body)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        at, kind = rng.randrange(len(data)), rng.randrange(9)
        length = min(rng.choice((1, 2, 4, 16, 64, 400)), len(data) - at)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = bytes([rng.choice((0, 255, 65))]) * length
        elif kind == 2:
            del data[max(1, at) :]
        elif kind == 3:
            data[at:at] = rng.randbytes(length)
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = data[at : at + length]
        elif kind == 6:  # a number where headers are
            at = rng.randrange(min(len(data), 256))
            form = rng.choice((">I", "<I", ">H", "<H", "B"))
            bits = 8 * struct.calcsize(form)
            data[at : at + bits // 8] = struct.pack(form, rng.choice(EXTREMES) % (1 << bits))
        elif kind == 7:
            other = bytes(data)
            data[at:] = other[rng.randrange(len(other)) :]
        else:
            data = bytearray(_mended(bytes(data), rng))
    return bytes(data)


def _mended(body: bytes, rng: random.Random) -> bytes:
    """Damage inside a PNG chunk or a tar header, with its checksum made right again; other files lose a byte."""
    if body.startswith(b"\x89PNG"):
        return _png(body, rng)
    if len(body) % 512 == 0 and len(body) >= 1024:
        return _tar(body, rng)
    at = rng.randrange(len(body))
    return body[:at] + body[at + 1 :]


def _png(body: bytes, rng: random.Random) -> bytes:
    parts, at = [], 8
    while at + 12 <= len(body):
        length = struct.unpack(">I", body[at : at + 4])[0]
        if at + 12 + length > len(body):
            break
        parts.append((body[at + 4 : at + 8], body[at + 8 : at + 8 + length]))
        at += 12 + length
    if not parts:
        return body
    which = rng.randrange(len(parts))
    name, inside = parts[which]
    if name == b"IDAT" and rng.random() < 0.5:
        try:
            inside = zlib.compress(bytes(b ^ (rng.random() < 0.02) for b in zlib.decompress(inside)) + rng.randbytes(rng.choice((0, 9))))
        except zlib.error:
            inside = inside[:-1]
    elif inside:
        place = rng.randrange(len(inside))
        inside = inside[:place] + bytes([rng.choice((0, 1, 3, 16, 255))]) + inside[place + 1 :]
    parts[which] = (name, inside)
    if rng.random() < 0.3:
        rng.shuffle(parts)
    return body[:8] + b"".join(chunk(*part) for part in parts)


def _tar(body: bytes, rng: random.Random) -> bytes:
    """One header of a tar with a field of a stranger's, and the right sum."""
    heads = [at for at in range(0, len(body), 512) if body[at + 257 : at + 262] == b"ustar"]
    if not heads:
        return body
    at = rng.choice(heads)
    head = bytearray(body[at : at + 512])
    field, values = rng.choice(
        (
            (
                (124, 136),
                (b"-0000001000\0", b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"           \0", b"0x10", b"00000000000\0"),
            ),
            ((156, 157), (b"L", b"x", b"g", b"K", b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"\0", b"Z")),
            (
                (0, 100),
                (b"", b"../../x.jpg", b"/etc/passwd.jpg", b"\x1b[2J.jpg", b"a" * 100, b".jpg", b"._x.jpg", b"\xff\xfe.jpg", b"x.png"),
            ),
            ((345, 500), (b"a" * 155, b"..", b"\xff")),
        )
    )
    value = rng.choice(values)
    head[field[0] : field[1]] = value.ljust(field[1] - field[0], b"\0")[: field[1] - field[0]]
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    more = body[at + 512 :]
    if value in (b"x", b"g") and rng.random() < 0.5:
        more = rng.choice((b"0 a=b\n", b"99999999999 path=x\n", b"-5 path=x\n", b"11 path=a\n5 =\n", b"20 size=99999999999\n")) + more
    return body[:at] + bytes(head) + more
