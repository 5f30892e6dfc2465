"""What a run learns from, opened as the recipe says: captions encoded before or now, or none for a network on classes."""

from dataclasses import replace

import frozen
import pytest
import torch

from condot.core.data_config import DataConfig
from condot.data.encode.command import main as encode
from condot.data.encoders.text import TextEncoder
from condot.data.loader.stream import Share
from condot.data.loader.training_data import TrainingData

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def options(tmp_path_factory, one_thread):
    """Captions encoded by CLIP, 16 wide and pooled to 12, and by T5, 24 wide."""
    folder = tmp_path_factory.mktemp("sources")
    names = (str(frozen.text(folder / "clip", "clip_projected")), str(frozen.text(folder / "t5", "t5", 1, 24)))
    frozen.shards(folder / "images", (6, 5))
    section = {"shards": [str(folder / "images")], "resolution": 16, "text_encoder": names, "max_tokens": 12, "encoded": folder / "encoded"}
    assert encode(["--config", str(frozen.recipe(folder / "recipe.json", **section))]) == 0
    more = {"text_encoder": names, "max_tokens": (12,), "encoding": "cached", "encoded": str(folder / "encoded")}
    return DataConfig(shards=(str(folder / "images"),), resolution=16, workers=0, **more)


@pytest.mark.parametrize("encoding", ["online", "cached"])
def test_a_network_on_text_reads_captions_or_their_encodings(options, encoding):
    """One of the two, never both: a caption that is not used is a read that is wasted. A cache that lies there is not read online."""
    sources = TrainingData.open(replace(options, encoding=encoding), True)
    assert sources.widths == (24, 12) and len(sources.text) == (2 if encoding == "cached" else 0)
    batch = next(sources.stream(0, Share(batch_size=4)))
    assert (len(batch.captions), len(batch.text)) == ((4, 0) if encoding == "online" else (0, 2))


@pytest.mark.parametrize("encoding", ["online", "cached"])
def test_a_network_on_classes_reads_no_captions(options, encoding):
    """Whatever the recipe says of text encoders, even one that is not there."""
    sources = TrainingData.open(replace(options, encoding=encoding, text_encoder=("/nowhere",), caption="json.none"), False)
    batch = next(sources.stream(0, Share(batch_size=4)))
    assert (
        sources.widths is None
        and sources.build_text_conditioner(torch.device("cpu")) is None
        and sources.preview_captions(0, 4) is None
        and sources.truncation_note == ""
    )
    assert (batch.captions, batch.text) == ((), ())


@pytest.mark.parametrize("encoding", ["online", "cached"])
def test_what_is_shown_are_the_first_captions_of_the_order(options, encoding):
    """Those of the first eight samples by the run's seed, whole, token for token as each encoder gives them alone; and no caption."""
    sources = TrainingData.open(replace(options, encoding=encoding), True)
    sources.build_text_conditioner(torch.device("cpu"))
    shown, null = sources.preview_captions(3, 8)
    batch = next(sources.stream(3, Share(batch_size=8)))
    captions = [sources.images.read(*sample).files.get("txt", b"").decode() for sample in batch.samples.tolist()]
    ours = [TextEncoder(name, max_tokens=12) for name in options.text_encoder]
    assert len(set(captions)) > 4 and not torch.equal(sources.preview_captions(4, 8)[0].pooled, shown.pooled)
    for got, texts in ((shown, captions), (null, [""])):
        for row, caption in enumerate(texts):
            clip, t5 = (encoder.encode([caption]) for encoder in ours)
            tokens = torch.cat([torch.nn.functional.pad(clip.states[0], (0, 8)), t5.states[0]])
            torch.testing.assert_close(got.states[row][got.mask[row]], tokens, rtol=2**-10, atol=1e-3)
            torch.testing.assert_close(got.pooled[row], clip.pooled[0], rtol=2**-10, atol=1e-3)


def test_shards_without_the_captions_are_refused(options):
    with pytest.raises(ValueError, match=r"data.caption=json.name: none of the first 6 samples"):
        TrainingData.open(replace(options, encoding="online", caption="json.name"), True)
