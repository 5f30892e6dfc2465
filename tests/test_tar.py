"""The tar format both ways: the reference reader reads ours, we read the reference writer's."""

import io
import tarfile

import webdataset
from PIL import Image

from data.shards import Shards
from data.tar import members, samples


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
    with tarfile.open(tmp_path / "a.tar") as tar:
        theirs = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert [(m.name, m.offset, m.size) for m in members(tmp_path / "a.tar")] == theirs and len(theirs) == 12
    assert [(span.key, sorted(span.files)) for span in samples(tmp_path / "a.tar")] == [
        (f"{'long/' * 30}{i:03d}", ["cls", "png", "txt"]) for i in range(4)
    ]
