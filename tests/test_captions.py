"""Several captions a sample, drawn by weight: the same for any ranks, workers and beginnings, read now or encoded before; and bad text."""

import io
import json
import math
from dataclasses import replace

import frozen
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from shardmaker import make, png

from condot.core.caption_fields import MAX_ENTRIES, draw_caption, draw_index, parse_captions, sample_captions
from condot.core.data_config import DataConfig
from condot.core.data_options import read_options
from condot.data.encode import command
from condot.data.encoders.text import TextEncoder, read_text_encoders
from condot.data.inspect import main as inspect
from condot.data.loader.build import build, open_encoded_text, open_shards
from condot.data.loader.captions import check_captions
from condot.data.loader.encoded_cache import multi_caption_rows, read_text_rows
from condot.data.loader.read_samples import read_captions
from condot.data.loader.shuffle import uniform_at
from condot.data.loader.stream import Share
from condot.data.loader.survey import survey
from condot.data.loader.training_data import TrainingData
from condot.data.prepare.command import main as prepare
from condot.data.storage.local import LocalFolder
from condot.data.storage.shard_reader import BadSample, Shards
from condot.pipeline.config.parse import config_from_mapping as rebuilt
from condot.pipeline.config.parse import config_to_mapping, load_recipe, parse
from condot.pipeline.config.schema import Config
from condot.pipeline.training.resume_rules import run_facts

MIX = "txt=0.7,json.lines[*]=0.2,json.short=0.1"
WORDS = frozen.WORDS[4:]

pytestmark = pytest.mark.usefixtures("one_thread")


def sample(n):
    """Image n: without .txt if n mod 4 is 3, with n mod 5 lines; every caption of a sample differs from its others."""
    lines = [f"{WORDS[n % 12]} {WORDS[k]} of" for k in range(n % 5)]
    body = {
        "__key__": f"{n:03d}",
        "png": png(n, (16, 16) if n % 3 else (24, 16)),
        "json": {"short": WORDS[n % 12], "lines": [*lines, None]},
    }
    return body | ({} if n % 4 == 3 else {"txt": f"{WORDS[n % 12]} and the {WORDS[n % 7]}"})


@pytest.fixture(scope="module")
def parts(tmp_path_factory, one_thread):
    """Shards, two encoders, and all captions encoded by both."""
    folder = tmp_path_factory.mktemp("captions")
    make(folder / "shards", [[sample(n) for n in range(9)], [sample(n) for n in range(9, 20)], [sample(n) for n in range(20, 30)]])
    names = (str(frozen.text(folder / "clip", "clip_projected")), str(frozen.text(folder / "t5", "t5", 1, 24)))
    section = {"shards": [str(folder / "shards")], "resolution": 16, "text_encoder": names, "max_tokens": 12, "encoded": folder / "encoded"}
    assert command.main(["--config", str(frozen.recipe(folder / "recipe.json", **section, caption=MIX))]) == 0
    return replace(read_options(folder / "recipe.json")[0], workers=0)


def shown(options, positions, start=0, **share):
    """Position to caption, of the positions from `start` on."""
    stream, found = build(options, seed=3, share=Share(batch_size=8, **share), start=start, captions=True), {}
    while len(found) < positions:
        batch = next(stream)
        found |= dict(zip(batch.positions.tolist(), batch.captions, strict=True))
    stream.close()
    return found


# --- what a recipe says


@pytest.mark.parametrize(
    ("yaml_text", "text"),
    [
        ("{txt: 0.7, json.short: 0.3}", "txt=0.7,json.short=0.3"),
        ("[txt, json.short]", "txt,json.short"),
        ("txt=7, json.short=3", "txt=7, json.short=3"),
        ("txt", "txt"),
    ],
)
def test_both_readers_take_a_mapping_a_list_and_a_text(tmp_path, yaml_text, text):
    """And the saved configuration gives the same again."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data:\n  caption: {yaml_text}\n")
    config = parse(Config, ["--config", str(path)])
    assert config.data.caption == text == read_options(path)[0].caption
    saved = yaml.safe_load(yaml.safe_dump(config_to_mapping(config)))
    assert rebuilt(Config, saved) == config
    words = text.split(",")
    assert parse(Config, ["--data.caption", *words]).data.caption == read_options(path, {"caption": words})[0].caption == text


def test_a_mapping_replaces_that_of_the_recipe_it_extends(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {caption: {txt: 1, json.a: 1}, resolution: 64}")
    (tmp_path / "over.yaml").write_text("extends: base.yaml\ndata: {caption: {json.b: 2, json.c: 1}}")
    assert load_recipe(tmp_path / "over.yaml")["data"] == {"caption": {"json.b": 2, "json.c": 1}, "resolution": 64}
    path = str(tmp_path / "over.yaml")
    assert parse(Config, ["--config", path]).data.caption == read_options(path)[0].caption == "json.b=2,json.c=1"


def test_shares_are_weights_over_their_sum_in_any_order():
    one, two = parse_captions("txt=7,json.a=2,json.b=1"), parse_captions("json.b=0.1,txt=0.7,json.a=0.2")
    assert one.fields == two.fields == ("json.a", "json.b", "txt") and one.weights == pytest.approx([0.2, 0.1, 0.7]) == two.weights
    assert parse_captions("txt,json.a").weights == (0.5, 0.5) and parse_captions("txt=3") == parse_captions("txt") and not one.fields[3:]
    assert not parse_captions("txt").several and parse_captions("json.a[*]").several and parse_captions("") == ((), ())


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("foo", "foo is no field of a sample: choose `txt`, `json.KEY`"),
        ("{}", "{} is no field"),
        ("[]", r"\[\] is no field"),
        ("json.", "json. is no field"),
        ("json.[*]", r"json.\[\*\] is no field"),
        ("txt,", r"\(empty\) is no field"),
        ("txt[*]", "a .txt is one caption"),
        ("txt,json.a,txt", "txt is named twice"),
        ("txt=0.5,json.a", "only some fields have a weight"),
        ("txt=1e308,json.a=1e308", "too large to be added"),
        *((f"txt={word},json.a=1", f"the weight {word} is no positive number") for word in ("0", "-1", "nan", "inf", "many", "True")),
    ],
)
def test_captions_that_cannot_be_are_refused(caption, message):
    with pytest.raises(ValueError, match=f"data.caption=.*{message}"):
        DataConfig(caption=caption)


def test_an_empty_mapping_is_refused_by_both_readers(tmp_path):
    for text in ("{}", "[]"):
        (tmp_path / "recipe.yaml").write_text(f"data: {{caption: {text}}}")
        with pytest.raises(ValueError, match="is no field of a sample"):
            read_options(tmp_path / "recipe.yaml")
        with pytest.raises(ValueError, match="is no field of a sample"):
            DataConfig(**vars(parse(Config, ["--config", str(tmp_path / "recipe.yaml")]).data))


def test_a_resume_must_agree_on_shares_and_not_on_how_they_are_written():
    def fact(caption):
        return run_facts(parse(Config, ["--model.kind=mmdit", f"--data.caption={caption}"]), "x")["data"]["caption"]

    assert fact("txt") == fact("txt=2") == "txt" and fact("json.a") == "json.a"
    assert fact("txt=0.7,json.a=0.3") == fact("json.a=3, txt=7") != fact("txt=0.6,json.a=0.4") != fact("txt,json.a")


# --- what is drawn


def chi_square(counts, shares):
    """Pearson's statistic of counts against shares."""
    expected = sum(counts) * np.array(shares)
    return float((((np.array(counts) - expected) ** 2) / expected).sum())


def test_captions_come_as_often_as_their_weights_say():
    """Three fields, one of them a list of four, over 40,000 positions: 99.9 % of chi-square with 5 degrees of freedom is below 20.5."""
    numbers, shares = [0, 0, 0, 0, 1, 2], (0.2, 0.1, 0.7)
    drawn = [draw_index(numbers, shares, share) for share in uniform_at(np.arange(40_000), 5, 10).tolist()]
    counts = np.bincount(drawn, minlength=6)
    assert chi_square(counts, [0.05, 0.05, 0.05, 0.05, 0.1, 0.7]) < 20.5
    assert chi_square(counts, [0.2 / 4 + 0.01, 0.04, 0.05, 0.05, 0.1, 0.7]) > 20.5, "a hundredth would be seen"


def test_what_a_sample_lacks_falls_to_the_others_in_proportion():
    """Of weights 0.2, 0.1 and 0.7 the first and second alone have 2/3 and 1/3; one alone is always drawn."""
    shares = uniform_at(np.arange(30_000), 6, 10).tolist()
    first = sum(draw_index([0, 1], (0.2, 0.1, 0.7), share) == 0 for share in shares)
    assert chi_square([first, 30_000 - first], [2 / 3, 1 / 3]) < 10.8
    assert {draw_index([1], (0.2, 0.1, 0.7), share) for share in shares[:100]} == {0}
    assert draw_index([0, 1], (0.5, 0.5), 0.0) == 0 and draw_index([0, 1], (0.5, 0.5), math.nextafter(1, 0)) == 1


def test_frequencies_of_a_stream(parts):
    """Over 100 epochs of 30 samples, those that have all three fields: 99.9 % of chi-square with 2 degrees of freedom is below 13.8."""
    found = shown(parts, 3000)
    whole = {sample(n)["txt"]: 0 for n in range(30) if n % 4 != 3 and n % 5}
    short = list(WORDS)
    order = build(parts, seed=3, share=Share(batch_size=8)).order
    shards, numbers = order(np.arange(3000))
    first = np.array([0, 9, 20])
    counts = [0, 0, 0]
    for position, n in enumerate((first[shards] + numbers).tolist()):
        if n % 4 != 3 and n % 5:
            counts[0 if found[position] in whole else 2 if found[position] in short else 1] += 1
        assert found[position] in [text for _, text in sample_captions(files_of(n), parse_captions(MIX).fields)]
    assert chi_square(counts, [0.7, 0.2, 0.1]) < 13.8


def files_of(n):
    """Texts of image n, as its shard holds them."""
    body = sample(n)
    return {"json": json.dumps(body["json"]).encode()} | ({"txt": body["txt"].encode()} if "txt" in body else {})


def test_the_choice_is_a_function_of_seed_and_position(parts):
    """Two ranks, accumulation, threads, a later start, buckets: at each position the caption of the plain stream."""
    plain = shown(parts, 96)
    for options, more in (
        (parts, {"ranks": 2, "rank": 1}),
        (parts, {"accumulation": 4}),
        (replace(parts, workers=3), {}),
        (parts, {"start": 40}),
        (replace(parts, aspect_ratios=(1.0, 1.5), bucket_step=4), {"start": 512}),
    ):
        found = shown(options, 48, **more)
        wanted = plain if max(found) < 96 else shown(parts, max(found) + 1)
        assert len(found) >= 48 and found == {position: wanted[position] for position in found}
    for seed in (3, 4):
        batch = next(build(parts, seed=seed, share=Share(batch_size=96), captions=True))
        shares = uniform_at(batch.positions.numpy(), seed, 10).tolist()
        numbers = [int(key) for key in build(parts, seed=seed, share=Share(batch_size=8)).keys(batch)]
        assert batch.captions == tuple(draw_caption(files_of(n), MIX, share) for n, share in zip(numbers, shares, strict=True))


# --- encoded before


def test_the_cache_draws_what_is_drawn_now(parts):
    """To the bit: at each position the states and pooled vector are those that the cache holds of the caption that is read now."""
    options = replace(parts, encoding="cached")
    images, facts = open_shards(options), read_text_encoders(options)
    text = open_encoded_text(options, images, facts)
    batch = next(build(options, seed=3, share=Share(batch_size=120), captions=True, images=images, text=text))
    alone = next(build(options, seed=3, share=Share(batch_size=120), images=images, text=text))
    assert alone.captions == () and batch.captions == tuple(shown(parts, 120).values())
    fields = parse_captions(MIX).fields
    for one, with_captions, cached, fact in zip(text, batch.text, alone.text, facts, strict=True):
        assert all(bool((a == b).all()) for a, b in zip(with_captions, cached, strict=True))
        encoder = TextEncoder(fact.name, max_tokens=12)
        for i, (shard, number) in enumerate(batch.samples.tolist()):
            rows = np.load(files_like(one.shards, shard, number)).view(np.uint16)
            held = [caption for _, caption in sample_captions(images.read(shard, number).files, fields)]
            at = held.index(batch.captions[i])
            words = rows.ravel()
            count, lengths = int(words[0]), words[2 : 2 + 2 * int(words[0]) : 2].tolist()
            start = math.ceil((1 + 2 * count) / rows.shape[1]) + sum(lengths[:at])
            own = rows[start : start + lengths[at]].view(np.float16)
            assert count == len(held) and cached.mask[i].sum() == lengths[at] - 1
            assert np.array_equal(cached.states[i][cached.mask[i]].numpy(), own[1:, : fact.width])
            assert np.array_equal(cached.pooled[i].numpy(), own[0, : fact.pooled_width])
            wanted = encoder.encode([batch.captions[i]])
            np.testing.assert_allclose(own[1:, : fact.width], wanted.states[0].numpy(), rtol=2**-10, atol=1e-3)


def files_like(shards, shard, number):
    """The bytes of one encoded sample, as a file."""
    return io.BytesIO(next(iter(shards.read(shard, number).files.values())))


def test_statistics_count_captions(parts):
    """Of 30 samples: 23 texts, 30 short ones, n mod 5 lines."""
    said = LocalFolder(f"{parts.encoded}/text").manifest.encoding
    assert said["statistics"]["samples"] == 30 and said["statistics"]["missing"] == 0
    assert said["statistics"]["captions"] == sum(n % 4 != 3 for n in range(30)) + 30 + sum(n % 5 for n in range(30))
    assert (said["version"], said["caption"], said["bad"]) == (3, ["json.lines[*]", "json.short", "txt"], [])


def test_weights_may_change_and_captions_may_not(parts):
    images, facts = open_shards(parts), read_text_encoders(parts)
    open_encoded_text(replace(parts, caption="json.short=5,txt=0.1,json.lines[*]=1"), images, facts)
    for other, said in (("txt", "txt"), ("txt,json.short", "json.short,txt"), ("json.lines[*]", r"json.lines\[\*\]")):
        with pytest.raises(ValueError, match=rf"caption is json.lines\[\*\],json.short,txt there and {said} here"):
            open_encoded_text(replace(parts, caption=other), images, facts)


def test_a_cache_of_one_caption_stays_as_it_was(parts, tmp_path):
    """Version 2: the pooled vector, then the states, (1 + tokens, wider); the manifest names the one field as before."""
    options = replace(parts, caption="json.short", encoded=str(tmp_path))
    section = {**vars(options), "text_encoder": parts.text_encoder}
    assert command.main(["--config", str(frozen.recipe(tmp_path / "r.json", **section))]) == 0
    images, facts = open_shards(options), read_text_encoders(options)
    text = open_encoded_text(options, images, facts)
    assert [(one.encoding["version"], one.encoding["caption"]) for one in text] == [(2, "json.short")] * 2
    assert set(text[0].encoding["statistics"]) == {"samples", "tokens", "missing", "cut"}
    batch = next(build(options, seed=3, share=Share(batch_size=8), images=images, text=text))
    for i, (shard, number) in enumerate(batch.samples.tolist()):
        rows = np.load(files_like(text[0].shards, shard, number))
        assert rows.shape == (1 + 3, 16) and np.array_equal(batch.text[0].states[i, :3].numpy(), rows[1:])
        assert np.array_equal(batch.text[0].pooled[i].numpy(), rows[0, :12])


def test_a_sample_without_any_caption_is_encoded_as_the_empty_one(parts, tmp_path):
    make(tmp_path / "shards", [[sample(1), {"__key__": "none", "png": png(2, (16, 16)), "json": {"short": " ", "lines": [None]}}]])
    section = {
        "shards": [str(tmp_path / "shards")],
        "resolution": 16,
        "text_encoder": parts.text_encoder[:1],
        "max_tokens": 12,
        "workers": 0,
    }
    recipe = frozen.recipe(tmp_path / "r.json", **section, encoded=tmp_path / "encoded", caption=MIX, encoding="cached")
    assert command.main(["--config", str(recipe)]) == 0
    options = read_options(recipe)[0]
    images = open_shards(options)
    (text,) = open_encoded_text(options, images, read_text_encoders(options))
    batch = next(build(options, seed=0, share=Share(batch_size=8), captions=True, images=images, text=(text,)))
    empty = [i for i, caption in enumerate(batch.captions) if not caption]
    assert 0 < len(empty) < 8 and text.encoding["statistics"]["missing"] == 1
    for i in empty:
        assert np.array_equal(batch.text[0].pooled[i].numpy(), text.null.pooled[0].numpy())


def test_rows_of_several_captions_have_their_list_before_them():
    """Two captions of 2 and 3 rows in 3 columns: a list of five numbers fills two rows."""
    rows = multi_caption_rows([(4, np.full((2, 3), 1, np.float16)), (0, np.full((3, 3), 2, np.float16))])
    assert (
        rows.shape == (7, 3) and rows[:2].view(np.uint16).ravel().tolist() == [2, 4, 2, 0, 3, 0] and rows[2:, 0].tolist() == [1, 1, 2, 2, 2]
    )


# --- text that cannot be read

BAD = {
    "latin-1": {"txt": "café".encode("latin-1")},
    "utf-16 without a mark": {"txt": "cat".encode("utf-16-le")},
    "cut json": {"json": b'{"short": "a'},
    "depth": {"json": b"[" * 100_000},
    "digits": {"json": b'{"short": ' + b"9" * 5000 + b"}"},
    "mapping": {"json": b'{"short": {"a": 1}}'},
    "list of lists": {"json": b'{"short": [["a"], ["b"]]}'},
    "half a character": {"json": b'{"short": "\\ud83d"}'},
    "too many": {"json": json.dumps({"lines": ["x"] * (MAX_ENTRIES + 1)}).encode()},
}


@pytest.mark.parametrize("name", BAD)
def test_text_that_cannot_be_read_is_that_samples_fault(name):
    with pytest.raises(ValueError, match=r"^\.(txt|json): "):
        sample_captions(BAD[name], parse_captions(MIX).fields)


@pytest.mark.parametrize(
    ("files", "field", "caption"),
    [
        ({"txt": b"\xef\xbb\xbfa cat\r\n"}, "txt", "a cat"),
        ({"txt": "a café".encode("utf-16")}, "txt", "a café"),
        ({"json": b'\xef\xbb\xbf{"c": " a cat "}'}, "json.c", "a cat"),
        ({"json": b'{"c": NaN}'}, "json.c", ""),
        ({"json": b'{"c": null}'}, "json.c", ""),
        ({"json": b'{"c": ["red", null, NaN, " ", "round"]}'}, "json.c", "red, round"),
        ({"json": b'{"c": [null, "red"]}'}, "json.c[*]", "red"),
        ({"json": b'{"c": "red"}'}, "json.c[*]", "red"),
        ({"json": b'{"c": 5}'}, "json.c", "5"),
        ({"json": b'["c"]'}, "json.c", ""),
        ({"txt": b"x", "json": b"{"}, "txt", "x"),
        ({}, "json.c,txt", ""),
    ],
)
def test_what_captions_are_read_as(files, field, caption):
    assert draw_caption(files, field) == caption


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """Thirty samples of which number 4, 12 and 21 have bad text, as releases indexed them that did not read texts; number 7 a bad image."""
    monkeypatch.setattr("condot.data.format.index.read_texts", lambda texts: (int(texts.get("cls", b"65535")), "txt" in texts))
    content = [sample(n) for n in range(30)]
    content[4]["txt"], content[12]["json"], content[21]["json"] = BAD["latin-1"]["txt"], BAD["depth"]["json"], BAD["mapping"]["json"]
    content[7]["png"] = content[7]["png"][:45]
    return make(tmp_path / "shards", [content[:9], content[9:20], content[20:]])


def test_bad_text_is_replaced_and_counted_the_same_from_a_cache(damaged, parts, tmp_path, capsys):
    """Encoding keeps its place and lists it; streams name the same faults, substitutes and captions, now and before."""
    section = {"shards": [str(damaged)], "resolution": 16, "text_encoder": parts.text_encoder, "max_tokens": 12, "workers": 0}
    recipe = frozen.recipe(tmp_path / "r.json", **section, caption=MIX, encoded=tmp_path / "encoded", max_bad_share=0.2)
    assert command.main(["--config", str(recipe), "--data.max_bad_share=0.05"]) == 2
    assert "of 30 samples cannot be decoded" in capsys.readouterr().err
    assert command.main(["--config", str(recipe)]) == 0
    options = replace(read_options(recipe)[0], encoding="cached")
    images = open_shards(options)
    text = open_encoded_text(options, images, read_text_encoders(options))
    bad = [line.split(" ")[1] for line in text[0].encoding["bad"]]
    assert bad == ["004", "012", "021"] and text[0].encoding["statistics"]["samples"] == 27 and text[0].shards.counts == [9, 11, 10]
    with pytest.raises(ValueError, match="could not be read"):
        read_text_rows(next(iter(text[0].shards.read(0, 4).files.values())), 16, 12)
    now = next(build(options, seed=3, share=Share(batch_size=90), captions=True, images=images))
    before = next(build(options, seed=3, share=Share(batch_size=90), images=images, text=text))
    assert [(f.position, f.key) for f in now.faults] == [(f.position, f.key) for f in before.faults]
    assert {f.key for f in now.faults} >= {"004", "007", "012", "021"} and bool((now.samples == before.samples).all())
    lengths = [len(caption.split()) + 2 for caption in now.captions]
    assert before.text[0].mask.sum(1).tolist() == lengths


def test_bad_text_stops_nothing_that_only_looks(damaged, parts, tmp_path, capsys):
    options = DataConfig(shards=(str(damaged),), resolution=16, workers=0, caption=MIX, text_encoder=parts.text_encoder, max_tokens=(12,))
    sources = TrainingData.open(options, True)
    assert len(sources.example_captions(30)) == 27 and survey(options, True).mistakes == []
    with pytest.raises(BadSample, match=r"the caption of '004' cannot be read \(.txt: the text is no UTF-8"):
        read_captions(Shards(damaged), "txt", [3, 4])
    recipe = frozen.recipe(tmp_path / "r.json", caption=MIX, resolution=16, workers=0)
    command = [str(damaged), "--config", str(recipe), "--output", str(tmp_path / "x.png"), "--workers", "1", "--batch_size", "30"]
    assert inspect(command) == 1
    said = capsys.readouterr().out
    assert "30 of 30 images, 4 bad" in said and all(f"{key} (" in said for key in ("004", "007", "012", "021"))


# --- what the first samples say


def test_each_field_must_be_somewhere(parts):
    images = open_shards(parts)
    assert check_captions(images, MIX) == "" == check_captions(images, "json.lines[*]")
    with pytest.raises(ValueError, match=r"data.caption=json.shrt: none of the first 9 samples of .* they have .*json.short, json.lines"):
        check_captions(images, "txt=0.7,json.shrt=0.3")


def test_folders_may_have_different_fields(tmp_path):
    """One has .txt, the other .json; a field that neither has is refused, and one folder is not asked where the other answers."""
    one = make(tmp_path / "one", [[{"__key__": str(n), "png": png(n), "txt": "a"} for n in range(3)]])
    two = make(tmp_path / "two", [[{"__key__": str(n), "png": png(n), "json": {"a": "b"}} for n in range(3)]])
    both = open_shards(DataConfig(shards=(str(one), str(two))))
    assert check_captions(both, "txt,json.a") == ""
    with pytest.raises(ValueError, match=r"data.caption=json.b: none of the first 6 samples"):
        check_captions(both, "txt,json.b")


def test_lists_of_sentences_are_not_joined_by_accident(tmp_path, capsys):
    lines = ["A man rides a horse.", "Someone on a brown horse", "horse"]
    content = [{"__key__": str(n), "png": png(n), "json": {"captions": lines, "tags": ["long hair", "blue eyes", "red"]}} for n in range(3)]
    folder = make(tmp_path / "shards", [content])
    images = open_shards(DataConfig(shards=(str(folder),)))
    said = "data.caption=json.captions joins lists of sentences with commas; json.captions[*] draws one of them."
    assert check_captions(images, "json.captions") == said
    assert check_captions(images, "json.tags") == check_captions(images, "json.captions[*]") == ""
    options = DataConfig(shards=(str(folder),), caption="json.captions", resolution=16)
    assert said in survey(options, True).notes
    recipe = frozen.recipe(tmp_path / "r.json", caption="json.captions", resolution=16, workers=0)
    assert inspect([str(folder), "--config", str(recipe), "--output", str(tmp_path / "x.png"), "--workers", "1", "--batch_size", "3"]) == 0
    assert said in capsys.readouterr().out


def test_a_blank_json_is_no_caption_and_no_fault(tmp_path):
    """As a blank .txt: what the index lets pass is trained on."""
    for number, body in enumerate((b"", b" \n", b"\xef\xbb\xbf")):
        make(
            tmp_path / str(number),
            [[{"__key__": "a", "png": png(1), "json": body, "txt": ""}, {"__key__": "b", "png": png(2), "json": {"c": "dog"}}]],
        )
        shards = Shards(str(tmp_path / str(number)), "train")
        assert read_captions(shards, "json.c") == read_captions(shards, "json.c,txt") == read_captions(shards, "json.c[*]") == ["", "dog"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("text", ["a\0b", "\ud83d"])
def test_text_of_a_table_that_no_shard_may_hold_is_that_samples_fault(tmp_path, capsys, kind, text):
    """It ended the packing, naming a temporary tar, --skip_corrupt or not."""
    (tmp_path / "in").mkdir()
    if kind == "jsonl":
        for number in range(2):
            (tmp_path / f"in/{number}.png").write_bytes(png(number))
        rows = [{"file_name": "0.png", "text": text}, {"file_name": "1.png", "text": "dog"}]
        (tmp_path / "in/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif text.isascii():
        images = [{"bytes": png(number), "path": None} for number in range(2)]
        pq.write_table(pa.table({"image": images, "text": [text, "dog"]}), tmp_path / "in/train.parquet")
    else:
        pytest.skip("Arrow holds no half of a pair")
    words = [{"jsonl": "imagefolder"}.get(kind, kind), str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--workers", "0"]
    assert prepare(words) == 2
    assert "tmp-" not in (told := capsys.readouterr().err) and "--skip_corrupt" in told
    assert prepare([*words, "--skip_corrupt"]) == 0
    assert read_captions(Shards(str(tmp_path / "out"), "train"), "txt") == ["dog"]
