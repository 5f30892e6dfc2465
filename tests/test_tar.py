"""The tar format both ways: the reference reader reads ours, we read the reference writers'; damage and malice end in one error."""

import io
import os
import random
import subprocess
import tarfile
import time

import pytest
import webdataset
from PIL import Image

from condot.data.format.tar_headers import BLOCK, pax_records
from condot.data.format.tar_reader import REMEDIES, TarRemarks, _plain_files, members, parse_sample_files, samples
from condot.data.format.tar_writer import TarWriter
from condot.data.storage.shard_reader import Shards

NAMES = [
    "a.jpg",
    "./b.seg.png",
    f"{'x' * 86}.jpg",
    *(f"{'n' * (length - 4)}.jpg" for length in (99, 100, 101, 102)),
    *(f"{'folder/' * count}{'long name ' * 12}{count}.jpg" for count in (1, 20, 40)),
    *(f"späte Ernte {'日本語' * count}/絵{count}.jpg" for count in (1, 12, 30)),
]
FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def add(tar, name, body=b"", **more):
    info = tarfile.TarInfo(name)
    info.size = len(body)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(body))


def tar_of(path, *files, kind="gnu", **more):
    with tarfile.open(path, "w", format=FORMATS[kind], **more) as tar:
        for name, body in files:
            add(tar, name, body)
    return path


def header(name, size=b"00000000000\0", kind=b"0", magic=b"ustar\x0000", signed=False):
    """One header by hand, with a right checksum."""
    head = bytearray(BLOCK)
    head[: len(name)], head[124:136], head[156:157], head[257:265] = name, size, kind, magic
    head[148:156] = b" " * 8
    total = sum(head) - (256 * sum(byte > 127 for byte in head) if signed else 0)
    head[148:156] = b"%06o\0 " % total
    return bytes(head)


def padded(body):
    return body + bytes(-len(body) % BLOCK)


def extension(kind, body):
    return header(b"././@LongLink", b"%011o\0" % len(body), kind) + padded(body)


END = bytes(2 * BLOCK)


def walked(path):
    return [(m.name, m.offset, m.size) for m in members(path) if not m.special]


def tarfiles(path, **more):
    """The regular files of a tar by Python's own reader."""
    with tarfile.open(path, **more) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]


def spans(path):
    """Key and files of every sample, each read from its own bytes alone."""
    body = path.read_bytes()
    return [parse_sample_files(body[span.start : span.end]) for span in samples(path)]


def test_webdataset_reads_our_shards(digits):
    """The reference reader finds the same samples in the same order."""
    shards = Shards(digits, "train")
    tars = [str(digits / s.name) for s in shards.shards]
    theirs = [(s["__key__"], s["cls"]) for s in webdataset.WebDataset(tars, shardshuffle=False)]
    ours = [(sample.key, sample.files["cls"]) for s, n in enumerate(shards.counts) for sample in (shards.read(s, i) for i in range(n))]
    assert ours == theirs and len(ours) == 1438


def test_we_read_webdatasets_shards(tmp_path):
    """Its writer's tars, with long names and keys in folders, are walked like tarfile walks them."""
    buffer = io.BytesIO()
    Image.new("L", (3, 5)).save(buffer, "PNG")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for i in range(4):
            sink.write({"__key__": f"{'long/' * 30}{i:03d}", "png": buffer.getvalue(), "cls": i, "txt": "ü" * i})
    assert walked(tmp_path / "a.tar") == tarfiles(tmp_path / "a.tar") and len(walked(tmp_path / "a.tar")) == 12
    assert [(span.key, sorted(span.files)) for span in samples(tmp_path / "a.tar")] == [
        (f"{'long/' * 30}{i:03d}", ["cls", "png", "txt"]) for i in range(4)
    ]


# --- names


@pytest.mark.parametrize("kind", FORMATS)
def test_names_of_any_length_are_tarfiles(tmp_path, kind):
    """Also behind folders and links of long names, which are theirs alone."""
    kept = [name for name in NAMES if kind != "ustar" or len(name.encode()) < 100]
    with tarfile.open(tmp_path / "a.tar", "w", format=FORMATS[kind]) as tar:
        for i, name in enumerate(kept):
            if kind != "ustar":
                add(tar, f"{'d' * 120}{i}/", type=tarfile.DIRTYPE)
                add(tar, f"{'l' * 120}{i}", type=tarfile.SYMTYPE, linkname="t" * 150)
            add(tar, name, b"%d" % i * 700)
    assert walked(tmp_path / "a.tar") == tarfiles(tmp_path / "a.tar") and len(walked(tmp_path / "a.tar")) == len(kept)
    links = [m.name for m in members(tmp_path / "a.tar") if m.special]
    assert len(links) == (0 if kind == "ustar" else len(kept)) and all(len(name) > 120 for name in links)


@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tars_of_the_command_are_tarfiles_and_webdatasets(tmp_path, kind):
    """`tar --format` in each of its forms: all files of a sample, whatever the lengths of their names, from the sample's bytes alone."""
    most = {"v7": 90, "ustar": 90}.get(kind, 230)
    for length in (10, 85, 90, 96, 97, 98, 120, 150, 230):
        for stem in (f"{'p' * (length - 8)} {length}", f"{'ü' * ((length - 8) // 2)} {length}"):
            if len(stem.encode()) <= most:
                folder = tmp_path / "in" / ("deep/" * 10 if kind not in ("v7",) else "")
                folder.mkdir(parents=True, exist_ok=True)
                for suffix in ("jpg", "txt", "json"):
                    (folder / f"{stem}.{suffix}").write_bytes(os.urandom(random.randrange(1200)))
    tar = tmp_path / "a.tar"
    subprocess.run(["tar", "--sort=name", f"--format={kind}", "-C", tmp_path / "in", "-cf", tar, "."], check=True)
    assert walked(tar) == tarfiles(tar) and len(walked(tar)) >= 15
    theirs = [(s["__key__"], {k: v for k, v in s.items() if k[:2] != "__"}) for s in webdataset.WebDataset(str(tar), shardshuffle=False)]
    assert spans(tar) == theirs and all(len(files) == 3 for _, files in theirs)


def test_names_that_are_no_utf8_stay_distinct(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("ä.jpg", "ö.jpg", "ü" * 120 + ".jpg"):
            add(tar, name, b"x")
    assert walked(tmp_path / "a.tar") == tarfiles(tmp_path / "a.tar", encoding="utf-8", errors="surrogateescape")
    assert len({name for name, _, _ in walked(tmp_path / "a.tar")}) == 3
    body = b"21 hdrcharset=BINARY\n" + b"14 path=\xe4.jpg\n"
    (tmp_path / "b.tar").write_bytes(extension(b"x", body) + header(b"other.jpg") + END)
    assert walked(tmp_path / "b.tar")[0][0] == tarfiles(tmp_path / "b.tar")[0][0] == "\udce4.jpg"


def test_what_is_read_by_hand_is_tarfiles(tmp_path):
    """Headers that no writer at hand makes: PAX sizes and several records, base-256, blanks, signed checksums, v7 folders, NULs."""
    body, tar = padded(b"B" * 700), tmp_path / "a.tar"
    cases = [
        extension(b"x", b"12 size=700\n" + b"20 comment=a=b size\n") + header(b"a.jpg", b"00000000000\0") + body,
        extension(b"x", b"14 path=x.jpg\n" + b"14 path=y.jpg\n") + header(b"a.jpg", b"00000001274\0") + body,
        extension(b"g", b"17 comment=hello\n") + header(b"b.jpg", b"\x80" + bytes(11)),
        header(b"c.jpg", b"       1274 ") + body,
        header(b"\xe4\xf6.jpg", b"00000001274 ", kind=b"\0", magic=bytes(8), signed=True) + body,
        header(b"folder/", b"00000001274\0", kind=b"\0", magic=bytes(8)),
        header(b"folder/", b"00000001274\0", kind=b"5"),
        header(b"d.jpg\0.txt", b"00000001274\0", kind=b"7") + body,
        extension(b"L", b"long\0er.jpg") + header(b"short.jpg", b"00000001274\0") + body,
        extension(b"K", b"nowhere" * 30) + header(b"link", kind=b"2") + header(b"e.jpg", b"00000001274\0") + body,
        header(b"f.jpg", b"\x80" + (700).to_bytes(11, "big")) + body,
        header(b"unknown", b"00000001274\0", kind=b"Q") + body + header(b"g.jpg"),
    ]
    for number, case in enumerate([*cases, b"".join(cases)]):
        tar.write_bytes(case + END)
        assert walked(tar) == tarfiles(tar, errorlevel=2), number
    assert len(walked(tar)) == 10


def test_records_of_pax_are_read_by_length():
    assert pax_records(b"14 path=x.jpg\n20 comment=a=b size\n" + bytes(9)) == {b"path": b"x.jpg", b"comment": b"a=b size"}
    assert pax_records(b"11 a=1\n2=3\n") == {b"a": b"1\n2=3"} and pax_records(b"") == {}
    for body in (
        b"0 a=b\n",
        b"-7 a=b\n",
        b"7 a=b\n",
        b"6 a=bc",
        b"6 a=b\n6 a=b",
        b" a=b\n",
        bytes(9),
        b"6 a=b\n\0\0x",
        b"5 =b\n",
        b"4 a\n",
        b"\xff",
        b"99999999 a=b\n",
    ):
        with pytest.raises(ValueError, match="another length than it states"):
            pax_records(body)


# --- malice

SIZES = (b"+10", b"0o17", b"1_0", b"1 0", b"8", b"x", "\u0663".encode())
HOSTILE = {
    "folder of negative size": header(b"a/", b"-0000001000\0", b"5") + END,
    "negative size": header(b"a.jpg", b"-0000001000\0") + END,
    **{
        f"size {text!r}": header(b"a.jpg", text.ljust(12, b"\0")) + END
        for text in (b"+10", b"0o17", b"1_0", b"1 0", b"8", b"x", "\u0663".encode())
    },
    "negative base-256": header(b"a.jpg", b"\xff" * 12) + END,
    "endless base-256": header(b"a.jpg", b"\x80" + b"\xff" * 11) + END,
    "record of no length": extension(b"x", b"0 a=b\n") + header(b"a.jpg") + END,
    "record longer than all": extension(b"x", b"900 path=a\n") + header(b"a.jpg") + END,
    "PAX size below zero": extension(b"x", b"11 size=-5\n") + header(b"a.jpg") + END,
    "global name": extension(b"g", b"14 path=x.jpg\n") + header(b"a.jpg") + END,
    "global size": extension(b"g", b"10 size=5\n") + header(b"a.jpg") + END,
    "two names": extension(b"L", b"a.jpg") + extension(b"L", b"b.jpg") + header(b"c.jpg") + END,
    "a name of 2 MB": extension(b"L", b"x" * (2 << 20)) + header(b"a.jpg") + END,
    "a name for nothing": extension(b"L", b"a.jpg") + END,
    "a name that is cut": extension(b"L", b"a.jpg" * 300)[:-800],
    "small records": extension(b"x", b"5 a=\n" * 200_000 + b"0") + header(b"a.jpg") + END,
    "sparse blocks to the end": header(b"a.jpg", kind=b"S")[:482] + b"\1" + header(b"a.jpg", kind=b"S")[483:] + b"\1" * BLOCK * 9,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_end_at_once(tmp_path, case):
    (tmp_path / "a.tar").write_bytes(HOSTILE[case])
    began = time.process_time()
    with pytest.raises(ValueError, match=r"a\.tar: .*byte \d+.*Pack or copy"):
        list(samples(tmp_path / "a.tar"))
    assert time.process_time() - began < 1, "milliseconds, but for a busy machine"


def test_mutated_tars_end_in_an_error_or_in_files_that_are_there(tmp_path):
    """Each walk is finite, whatever is changed, the checksums made right again half the time; samples read alone are those in place."""
    rng, tar = random.Random(0), tmp_path / "a.tar"
    wholes = []
    for kind in FORMATS:
        with tarfile.open(tar, "w", format=FORMATS[kind]) as file:
            for i in range(4):
                add(file, f"{'é' * (60 if kind != 'ustar' else 3)}{i}.jpg", b"x" * 600, mtime=1.5)
                add(file, f"{'é' * (60 if kind != 'ustar' else 3)}{i}.txt", b"words")
            add(file, "folder", type=tarfile.DIRTYPE)
            add(file, "link", type=tarfile.LNKTYPE, linkname="l" * (120 if kind != "ustar" else 9))
        wholes.append(tar.read_bytes().rstrip(b"\0") + bytes(1536))
    refused, began, count = 0, time.process_time(), 1200
    for _ in range(count):
        body = bytearray(rng.choice(wholes))
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(body) // BLOCK) * BLOCK
            places = (rng.randrange(BLOCK), rng.randrange(124, 136), 156, rng.randrange(0, 20), rng.randrange(257, 265), 482)
            body[at + rng.choice(places)] = rng.choice((0, 32, 45, 48, 55, 61, 0x80, 0xFF, *b"LKxgS5127Q", rng.randrange(256)))
            if rng.random() < 0.7:
                body[at + 148 : at + 156] = b"%06o\0 " % (sum(body[at : at + 148]) + sum(body[at + 156 : at + BLOCK]) + 256)
        tar.write_bytes(body)
        try:
            for span in samples(tar):
                alone = {e: bytes(body[m.offset : m.offset + m.size]) for e, m in span.files.items()}
                if not span.fault:
                    assert parse_sample_files(bytes(body[span.start : span.end])) == (span.key, alone)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert count / 3 < refused < count and time.process_time() - began < 60


# --- the end


def joined(path, *parts):
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def test_tars_one_behind_another_are_all_read(tmp_path):
    """`cat a.tar b.tar`, with the zeros of whatever writer between: as GNU tar's --ignore-zeros; a mark ends a sample."""
    parts = [tar_of(tmp_path / f"{i}.tar", (f"{i // 2}.jpg", b"%d" % i * 600), (f"{i // 2}.txt", b"x")) for i in range(4)]
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    tar, remarks = joined(tmp_path / "a.tar", parts[0], tmp_path / "empty.tar", *parts[1:]), TarRemarks()
    assert walked(tar) == tarfiles(tar, ignore_zeros=True)
    assert [span.key for span in samples(tar, remarks=remarks)] == ["0", "0", "1", "1"] and remarks.joined == 3
    assert [files["jpg"][:1] for _, files in spans(tar)] == [b"0", b"1", b"2", b"3"]


def test_zeros_behind_the_end_are_none_of_our_business(tmp_path):
    tar = tar_of(tmp_path / "a.tar", ("a.jpg", b"x"))
    with open(tar, "ab") as file:
        file.truncate(300_000_007)
    began = time.process_time()
    assert len(list(members(tar))) == 1 and time.process_time() - began < 5


def test_anything_else_behind_the_end_is_named(tmp_path):
    tar = tar_of(tmp_path / "a.tar", ("a.jpg", b"x"))
    whole = tar.read_bytes()
    for body in (b"garbage", b"\7" * 5000, whole[:100], whole[1:], b"x" * 511):
        tar.write_bytes(whole + bytes(5) + body)
        first = len(whole) + 5
        with pytest.raises(ValueError, match=rf"byte {first}, behind the end-of-archive mark at byte 1024, belongs to no tar"):
            list(members(tar))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_header_that_is_zeroed_is_no_end(tmp_path, kind):
    """Whichever it is, of a file or of its long name, and whatever lies behind it: a picture, nothing, another tar."""
    inner = tar_of(tmp_path / "inner.tar", ("x.jpg", b"inside")).read_bytes()
    long = "n" * 150 if kind != "ustar" else "n"
    files = [("a.jpg", b"x" * 600), (f"{long}.jpg", b"y" * 9), ("b.txt", b""), ("c.tar", inner), ("d.jpg", b"z")]
    tar = tar_of(tmp_path / "a.tar", *files, kind=kind)
    whole = tar.read_bytes()
    with tarfile.open(tar) as file:
        places = [at for m in file for at in range(m.offset, m.offset_data, BLOCK)]
    assert len(places) >= 5
    for at in places:
        tar.write_bytes(whole[:at] + bytes(BLOCK) + whole[at + BLOCK :])
        with pytest.raises(ValueError, match=r"a\.tar: .*byte \d+"):
            list(members(tar))


# --- what is no regular file


def test_links_and_devices_are_seen(tmp_path):
    """Hard and symbolic links as GNU tar stores them, and a pipe: each spoils the sample it belongs to, with what helps."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"x" * 600)
    os.link(folder / "a.jpg", folder / "b.jpg")
    os.symlink("a.jpg", folder / "c.jpg")
    os.mkfifo(folder / "d.jpg")
    tar = tmp_path / "a.tar"
    subprocess.run(["tar", "--sort=name", "-C", folder, "-cf", tar, "."], check=True)
    faults = {span.key: span.fault for span in samples(tar)}
    assert [*faults] == ["./a", "./b", "./c", "./d"] and not faults["./a"]
    assert all("--dereference --hard-dereference" in faults[key] for key in ("./b", "./c")) and "pipe" in faults["./d"]
    subprocess.run(
        ["tar", "--sort=name", "--dereference", "--hard-dereference", "--exclude=d.jpg", "-C", folder, "-cf", tar, "."], check=True
    )
    assert spans(tar) == [(f"./{key}", {"jpg": b"x" * 600}) for key in "abc"]


@pytest.mark.parametrize("form", ["gnu", "oldgnu", *(f"posix --sparse-version={v}" for v in ("0.0", "0.1", "1.0"))])
def test_sparse_files_are_faults_of_their_sample(tmp_path, form):
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "c.jpg"):
        (tmp_path / "in" / name).write_bytes(b"x")
    with open(tmp_path / "in" / "b.jpg", "wb") as file:
        for i in range(40):
            file.seek(i * 300_000)
            file.write(b"data")
    subprocess.run(
        ["tar", "--sort=name", "--sparse", *f"--format={form}".split(), "-C", tmp_path / "in", "-cf", tmp_path / "a.tar", "."], check=True
    )
    found = list(samples(tmp_path / "a.tar"))
    assert [(span.key, bool(span.fault)) for span in found] == [("./a", False), ("./b", True), ("./c", False)]
    assert REMEDIES["stored sparse"] in found[1].fault
    assert [m.end for m in members(tmp_path / "a.tar")][:2] == [found[1].start, found[2].start]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["000000012", "a/b", "caf\u00e9", "x_y", ".hidden", f"{'n' * 60}/{'n' * 80}"])
def test_plain_headers_are_read_as_all_headers_are(tmp_path, monkeypatch, form, key):
    """The short cut through our own shards' headers gives what the walk gives, or steps aside."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for extension, body in {"jpg": b"\xff\xd8" * 700, "txt": b"", "seg.png": b"mask", "JSON": b"{}"}.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mtime, info.uname = len(body), 1_700_000_000, "somebody"
            tar.addfile(info, io.BytesIO(body))
    span = path.read_bytes()[: -2 * BLOCK]
    for length in (len(span), 3 * BLOCK, 5):
        taken = parse_sample_files(span[:length])
        monkeypatch.setattr("condot.data.format.tar_reader._plain_files", lambda span: None)
        assert parse_sample_files(span[:length]) == taken
        monkeypatch.undo()


def test_the_short_cut_is_taken_for_our_own_shards():
    buffer = io.BytesIO()
    TarWriter(buffer).add("000000012", {"jpg": b"x" * 900, "cls": b"3", "txt": b"a caption"})
    assert _plain_files(buffer.getvalue()) == ("000000012", {"jpg": b"x" * 900, "cls": b"3", "txt": b"a caption"})


def test_the_short_cut_steps_aside_where_a_span_has_two_keys():
    buffer = io.BytesIO()
    writer = TarWriter(buffer)
    writer.add("000000012", {"jpg": b"one"})
    writer.add("000000013", {"txt": b"another's"})
    assert _plain_files(buffer.getvalue()) is None
