"""Captions through several text encoders: as Stable Diffusion 3's pipeline encodes them, dropped, cached, and refused."""

import json
import shutil
from dataclasses import replace

import frozen
import pytest
import torch
from safetensors.torch import load_file, save_file
from shardmaker import make, png

from condot.core.caption_fields import draw_caption
from condot.core.data_config import DataConfig
from condot.core.data_options import read_options
from condot.core.text_states import TextStates
from condot.data.encode import command
from condot.data.encoders.text import TextEncoder, encode_captions, read_text_encoder, read_text_encoders
from condot.data.encoders.text_states import TOKEN_MULTIPLE, TextFacts, concat_text_states, drop_captions, padded_length, text_layout
from condot.data.loader.build import build, open_encoded_text, open_shards
from condot.data.loader.captions import check_captions
from condot.data.loader.stream import Share
from condot.data.loader.text_conditioner import TextConditioner

CAPTIONS = ["a red square and the blue circle", "", "green " * 40]
KINDS = {"text_encoder": ("clip_projected", 16), "text_encoder_2": ("clip_projected", 24), "text_encoder_3": ("t5", 64)}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, one_thread):
    """A folder as a pipeline of Stable Diffusion 3 lies there: CLIP, wider CLIP, T5 wider than both together."""
    folder = tmp_path_factory.mktemp("pipe")
    for seed, (part, (kind, width)) in enumerate(KINDS.items()):
        frozen.text(folder / part, kind, seed, width, tokenizer=folder / part.replace("text_encoder", "tokenizer"))
    return folder


def names(pipe):
    return (str(pipe), str(pipe / "text_encoder_2"), str(pipe / "text_encoder_3"))


def options(pipe, **more):
    return DataConfig(**{"text_encoder": names(pipe), "max_tokens": (32, 32, 20), **more})


def encoders(options):
    facts = read_text_encoders(options)
    return facts, [TextEncoder(one.name, max_tokens=one.max_tokens, padding=one.padding) for one in facts]


# --- as published


def test_three_encoders_are_those_of_stable_diffusion_3(pipe):
    """StableDiffusion3Pipeline's own encode_prompt of the same weights, captions, "" and cut ones among them, and its negative prompt."""
    import transformers
    from diffusers import StableDiffusion3Pipeline

    classes = (transformers.CLIPTextModelWithProjection, transformers.CLIPTextModelWithProjection, transformers.T5EncoderModel)
    models = {part: kind.from_pretrained(pipe / part).eval() for part, kind in zip(KINDS, classes, strict=True)}
    tokenizers = {p: transformers.AutoTokenizer.from_pretrained(pipe / p) for p in ("tokenizer", "tokenizer_2", "tokenizer_3")}
    stock = StableDiffusion3Pipeline(transformer=None, scheduler=None, vae=None, **models, **tokenizers)
    with torch.no_grad():
        states, null_states, pooled, null_pooled = stock.encode_prompt(CAPTIONS, None, None, device="cpu", max_sequence_length=20)
    facts, ours = encoders(options(pipe, text_padding="attend"))
    plan = text_layout(facts)
    assert (plan.width, plan.pooled_width, plan.tokens) == (64, 24, 52) and states.shape == (3, 52, 64)
    got = concat_text_states(encode_captions(ours, CAPTIONS), plan)
    assert torch.equal(got.states, states) and torch.equal(got.pooled, pooled) and got.mask.all()
    nulls = concat_text_states([encoder.null for encoder in ours], plan)
    torch.testing.assert_close(nulls.states.expand(3, -1, -1), null_states, rtol=1e-5, atol=1e-5)  # one row there, three here
    torch.testing.assert_close(nulls.pooled.expand(3, -1), null_pooled, rtol=1e-5, atol=1e-5)
    assert [encoder.truncated for encoder in ours] == [1, 1, 1]


def test_a_stock_pipeline_without_t5_sees_what_a_dropped_t5_gives(pipe):
    """diffusers puts zeros where text_encoder_3 is None, and attends to all of them."""
    import transformers
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    clips = {p: transformers.CLIPTextModelWithProjection.from_pretrained(pipe / p).eval() for p in ("text_encoder", "text_encoder_2")}
    words = {p: transformers.AutoTokenizer.from_pretrained(pipe / p) for p in ("tokenizer", "tokenizer_2")}
    network = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=64,
        caption_projection_dim=8, pooled_projection_dim=24, out_channels=4, pos_embed_max_size=4,
    )  # fmt: skip
    stock = StableDiffusion3Pipeline(transformer=network, scheduler=None, vae=None, text_encoder_3=None, tokenizer_3=None, **clips, **words)
    with torch.no_grad():
        states, _, pooled, _ = stock.encode_prompt(CAPTIONS, None, None, device="cpu", max_sequence_length=20)
    facts, ours = encoders(options(pipe, text_padding="attend"))
    nulls, each = [encoder.null for encoder in ours], torch.tensor([[False, False, True]] * 3)
    got = concat_text_states(
        drop_captions(encode_captions(ours, CAPTIONS), nulls, torch.zeros(3, dtype=torch.bool), each), text_layout(facts)
    )
    assert torch.equal(got.states, states) and torch.equal(got.pooled, pooled) and got.mask.all()


def test_clip_without_projection_pools_its_last_layer_at_the_end(tmp_path):
    """As CLIPTextModel's pooler_output; a whole CLIPModel's text half is the projected one, get_text_features."""
    import transformers

    folder = frozen.text(tmp_path / "clip", "clip")
    encoder = TextEncoder(str(folder), max_tokens=32)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("a red square", return_tensors="pt")
    with torch.no_grad():
        wanted = transformers.CLIPTextModel.from_pretrained(folder).eval()(**tokens, output_hidden_states=True)
    got = encoder.encode(["a red square"])
    assert torch.equal(got.pooled, wanted.pooler_output) and torch.equal(got.states, wanted.hidden_states[-2])
    assert (encoder.kind, encoder.width, encoder.pooled_width) == ("clip", 16, 16)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    read = transformers.CLIPTextConfig.from_pretrained(folder).to_dict() | {"projection_dim": 99}
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=read, vision_config=small | {"image_size": 8, "patch_size": 4}, projection_dim=10)
    ).eval()
    shutil.copytree(folder, tmp_path / "whole")
    (tmp_path / "whole/model.safetensors").unlink()
    whole.save_pretrained(tmp_path / "whole")
    encoder = TextEncoder(str(tmp_path / "whole"), max_tokens=32)
    with torch.no_grad():
        features = whole.text_projection(whole.text_model(**tokens).pooler_output)
    assert encoder.pooled_width == 10
    torch.testing.assert_close(encoder.encode(["a red square"]).pooled, features, rtol=1e-5, atol=1e-5)


def test_facts_are_known_before_the_network(pipe):
    for name, (kind, width), pooled_width in zip(names(pipe), KINDS.values(), (12, 12, 64), strict=True):
        facts, encoder = read_text_encoder(name, 20), TextEncoder(name, max_tokens=20)
        part = encoder.encode(CAPTIONS)
        assert (facts.width, facts.pooled_width) == (width, pooled_width) == (part.states.shape[2], part.pooled.shape[1])
        assert facts == encoder.facts and facts.kind == ("other" if kind == "t5" else "clip")
        json.dumps(facts.fingerprint)


def test_attention_stops_at_the_mask_unless_told_otherwise(pipe):
    """T5 sees both ways: under mask a caption's states are those of it alone, under attend they are not, and nothing is zero."""
    name = names(pipe)[2]
    masked, attended = (TextEncoder(name, max_tokens=20, padding=padding) for padding in ("mask", "attend"))
    alone = masked.encode(CAPTIONS[:1])
    among = masked.encode(CAPTIONS)
    count = alone.states.shape[1]
    torch.testing.assert_close(among.states[0, :count], alone.states[0], rtol=1e-5, atol=1e-5)
    assert not among.states[0, count:].any() and among.mask.sum(1).tolist() == [8, 1, 20]
    torch.testing.assert_close(among.pooled[0], alone.states[0].mean(0), rtol=1e-5, atol=1e-5)
    seen = attended.encode(CAPTIONS)
    assert seen.mask.all() and seen.states[0].all() and (seen.states[0, :count] - alone.states[0]).abs().max() > 1e-2
    torch.testing.assert_close(seen.pooled, seen.states.mean(1))


def test_a_pipeline_on_the_hub_gives_its_parts(pipe, tmp_path, monkeypatch):
    """owner/model stands for its text_encoder, owner/model/text_encoder_2 for the second; each with its tokenizer and nothing else."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = [str(p.relative_to(pipe)) for p in sorted(pipe.rglob("*.*")) if p.is_file()]
    fetched = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        assert name == "owner/model"
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            fetched.append(file.split("/")[0])
            (tmp_path / file).parent.mkdir(exist_ok=True)
            shutil.copy(pipe / file, tmp_path / file)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name, here, parts in (
        ("owner/model/text_encoder_2", names(pipe)[1], {"text_encoder_2", "tokenizer_2"}),
        ("owner/model", names(pipe)[0], {"text_encoder", "tokenizer"}),
    ):
        assert read_text_encoder(name, 20).fingerprint == read_text_encoder(here, 20).fingerprint and set(fetched) == parts
        fetched.clear()


# --- joined


def fact(kind, width, pooled, tokens):
    return TextFacts("x", {}, width, pooled, kind, tokens, "mask")


def part(count, length, width, pooled, start, seen=None):
    """Rows of numbers from `start`, each its own, zero behind `seen`."""
    states = torch.arange(count * length * width, dtype=torch.float64).view(count, length, width) + start
    mask = torch.arange(length) < torch.tensor(seen or [length] * count)[:, None]
    return TextStates(states * mask[..., None], mask, torch.arange(count * pooled, dtype=torch.float64).view(count, pooled) + start)


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        ([("other", 5, 5, 7)], (5, 5, 7, ((0,),), (0,))),
        ([("clip", 3, 2, 4), ("clip", 5, 4, 4), ("other", 6, 6, 9)], (8, 6, 13, ((0, 1), (2,)), (0, 1))),
        ([("clip", 3, 2, 4), ("clip", 5, 4, 4), ("other", 11, 11, 9)], (11, 6, 13, ((0, 1), (2,)), (0, 1))),
        ([("other", 5, 5, 7), ("other", 4, 4, 3)], (5, 9, 10, ((0,), (1,)), (0, 1))),
        ([("clip", 3, 2, 4), ("other", 5, 5, 7), ("clip", 3, 2, 6)], (5, 4, 17, ((0,), (1,), (2,)), (0, 2))),
    ],
)
def test_layouts(facts, found):
    plan = text_layout([fact(*one) for one in facts])
    assert (plan.width, plan.pooled_width, plan.tokens, plan.groups, plan.pooled_from) == found


def test_every_number_has_its_place():
    """Two CLIPs of 3 and 2 tokens' length side by side, another's tokens behind; each value where the layout says, and zero else."""
    facts = [fact("clip", 3, 2, 4), fact("clip", 4, 1, 4), fact("other", 5, 5, 6)]
    parts = [part(2, 3, 3, 2, 100, [3, 1]), part(2, 2, 4, 1, 200, [2, 2]), part(2, 2, 5, 5, 300, [1, 2])]
    got = concat_text_states(parts, text_layout(facts))
    assert got.states.shape == (2, 5, 7) and got.pooled.shape == (2, 3)
    wanted = torch.zeros(2, 5, 7, dtype=torch.float64)
    wanted[:, :3, :3], wanted[:, :2, 3:7], wanted[:, 3:, :5] = (p.states for p in parts)
    assert torch.equal(got.states, wanted)
    assert got.mask.tolist() == [[True, True, True, True, False], [True, True, False, True, True]]
    assert got.pooled.tolist() == [[100, 101, 200], [102, 103, 201]]
    only = concat_text_states(parts[2:], text_layout(facts[2:]))
    assert torch.equal(only.states, parts[2].states) and torch.equal(only.pooled, parts[2].pooled)


def test_clips_that_read_different_lengths_are_refused():
    with pytest.raises(
        ValueError, match=r"data.max_tokens=77 64: CLIP encoders stand side by side.* 77 and 64. Give them the same number, 64"
    ):
        text_layout([fact("clip", 3, 2, 77), fact("clip", 3, 2, 64)])
    with pytest.raises(ValueError, match=r"data\.text_encoder is empty"):
        text_layout([])


# --- dropped


def test_dropped_rows_are_exactly_the_null_or_zero():
    """Of five samples: kept; whole; encoder 0; encoder 1; whole and encoder 0, where whole goes first."""
    parts = (part(5, 3, 2, 2, 10, [3, 2, 1, 3, 2]), part(5, 2, 3, 1, 50, [1, 2, 1, 2, 1]))
    nulls = (part(1, 1, 2, 2, 1000), part(1, 4, 3, 1, 2000, [3]))
    whole = torch.tensor([0, 1, 0, 0, 1]).bool()
    each = torch.tensor([[0, 0], [0, 0], [1, 0], [0, 1], [1, 0]]).bool()
    before = [[t.clone() for t in p] for p in (*parts, *nulls)]
    first, second = drop_captions(parts, nulls, whole, each)
    assert first.states.shape == (5, 3, 2) and second.states.shape == (5, 4, 3), "as long as the longer of caption and null"
    for i, (which, counts) in enumerate([("kept", (3, 1)), ("null", (1, 3)), ("0", (1, 1)), ("1", (3, 3)), ("null", (1, 3))]):
        for k, (got, had, null) in enumerate(((first, parts[0], nulls[0]), (second, parts[1], nulls[1]))):
            zero = which == str(k)
            source, row = (null, 0) if which == "null" else (had, i)
            assert got.mask[i].sum() == counts[k] and got.mask[i, : counts[k]].all()
            length = source.states.shape[1]
            wanted, vector = source.states[row] * (not zero), source.pooled[row] * (not zero)
            assert torch.equal(got.states[i, :length], wanted) and not got.states[i, length:].any() and torch.equal(got.pooled[i], vector)
    assert all(torch.equal(a, b) for p, old in zip((*parts, *nulls), before, strict=True) for a, b in zip(p, old, strict=True)), "pure"


def test_a_whole_drop_is_the_empty_caption(pipe):
    facts, ours = encoders(options(pipe))
    parts, nulls = encode_captions(ours, CAPTIONS), [encoder.null for encoder in ours]
    dropped = drop_captions(parts, nulls, torch.tensor([True, False, False]), torch.zeros(3, 3, dtype=torch.bool))
    plan = text_layout(facts)
    got, kept, empty = (
        concat_text_states(dropped, plan),
        concat_text_states(parts, plan),
        concat_text_states(encode_captions(ours, [""]), plan),
    )
    seen = got.mask[0]
    assert seen.sum() == empty.mask.sum() == 3 and torch.equal(got.mask[1:], kept.mask[1:]) and torch.equal(got.states[1:], kept.states[1:])
    torch.testing.assert_close(got.states[0][seen], empty.states[0][empty.mask[0]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.pooled[0], empty.pooled[0], rtol=1e-5, atol=1e-5)


def test_half_precision_stays_half(pipe):
    _, ours = encoders(options(pipe))
    parts = [p.to(dtype=torch.float16) for p in encode_captions(ours, CAPTIONS)]
    dropped = drop_captions(parts, [e.null for e in ours], torch.tensor([1, 0, 0]).bool(), torch.zeros(3, 3).bool())
    assert all(p.states.dtype == p.pooled.dtype == torch.float16 and p.mask.dtype == torch.bool for p in dropped)


# --- cached


@pytest.fixture(scope="module")
def cache(pipe, tmp_path_factory, one_thread):
    """A recipe of three encoders and what it encodes to, under both paddings."""
    folder = tmp_path_factory.mktemp("cache")
    frozen.shards(folder / "images")
    for padding in ("mask", "attend"):
        recipe = frozen.recipe(
            folder / f"{padding}.yaml", shards=folder / "images", text_encoder=names(pipe), max_tokens=(32, 32, 20), text_padding=padding,
            resolution=32, encoding="cached", encoded=folder / padding, workers=0,
        )  # fmt: skip
        assert command.main(["--config", str(recipe)]) == 0
    return folder


@pytest.mark.parametrize("padding", ["mask", "attend"])
def test_cached_is_online_rounded_to_float16(cache, padding, monkeypatch):
    """States, pooled vectors and null of three encoders, from the cache without any network; shapes and masks the same."""
    options, _ = read_options(cache / f"{padding}.yaml")
    images, (facts, ours) = open_shards(options), encoders(options)
    monkeypatch.setattr(TextEncoder, "__init__", lambda *a, **k: pytest.fail("a text encoder was built"))
    text = open_encoded_text(options, images, facts)
    assert [one.encoding["name"] for one in text] == list(names_of(facts)) and len({one.shards.folders[0].name for one in text}) == 3
    stream = build(options, seed=1, share=Share(batch_size=5), captions=True, images=images, text=text)
    for batch in (next(stream), next(stream)):
        online = encode_captions(ours, batch.captions)
        for one, cached, length in zip(online, batch.text, (32, 32, 20) if padding == "attend" else (16, 16, 16), strict=True):
            assert cached.states.dtype == cached.pooled.dtype == torch.float16 and cached.states.is_contiguous()
            assert torch.equal(cached.mask, one.mask) and cached.mask.shape[1] == length
            torch.testing.assert_close(cached.states.float(), one.states, rtol=2**-10, atol=1e-3)
            torch.testing.assert_close(cached.pooled.float(), one.pooled, rtol=2**-10, atol=1e-3)
    for null, encoder in zip((one.null for one in text), ours, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(null, encoder.null.to(dtype=torch.float16), strict=True))


def names_of(facts):
    return [one.name for one in facts]


def test_the_length_of_a_batch_is_a_function_of_the_batch():
    assert (
        TOKEN_MULTIPLE == 16
        and [padded_length(n, 77) for n in (1, 16, 17, 64, 65, 77)] == [16, 16, 32, 64, 77, 77]
        and padded_length(3, 8) == 8
    )


def test_cut_captions_are_counted_of_each_encoder(cache, tmp_path, capsys):
    """Captions of 1 to 5 words and two special tokens for CLIP, one for T5: cut to 4 and 5, and said so."""
    options, _ = read_options(cache / "mask.yaml")
    images = open_shards(options)
    words = [len(images.read(s, n).files.get("txt", b"").split()) for s, count in enumerate(images.counts) for n in range(count)]
    tokens = ("--data.max_tokens", "4", "4", "5")
    assert command.main(["--config", str(cache / "mask.yaml"), "--output", str(tmp_path), *tokens]) == 0
    said = capsys.readouterr().out
    for folder, most in (("text", 2), ("text-1", 2), ("text-2", 4)):
        truncated = sum(n > most for n in words)
        manifest = json.loads((tmp_path / folder / "manifest.json").read_text())
        assert manifest["encoding"]["statistics"]["cut"] == truncated > 0
        assert (
            f"{tmp_path / folder}: " in said
            and f"{truncated} captions cut to {4 if most == 2 else 5} tokens, 1 samples without one" in said
        )


def change_null(folder):
    state = load_file(folder / "text/null.safetensors")
    save_file({**state, "pooled": state["pooled"] + 1}, folder / "text/null.safetensors")


def old_manifest(folder):
    path = folder / "text/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["encoding"]["version"]
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_null, r"text/null.safetensors cannot be read \(its sha256 is not what the manifest says\): encode the captions again"),
        (lambda f: (f / "text-1/null.safetensors").unlink(), r"text-1/null.safetensors cannot be read .*: encode the captions again"),
        (lambda f: shutil.rmtree(f / "text-2"), r"text-2 holds no finished text-2. Run `condot encode"),
        (old_manifest, "its arrays are of version 1, without pooled vectors, and 2 is read: encode the captions again"),
    ],
)
def test_a_damaged_or_old_cache_is_refused(cache, tmp_path, damage, message):
    shutil.copytree(cache / "mask", tmp_path / "encoded")
    damage(tmp_path / "encoded")
    options = replace(read_options(cache / "mask.yaml")[0], encoded=str(tmp_path / "encoded"))
    with pytest.raises(ValueError, match=message):
        open_encoded_text(options, open_shards(options), read_text_encoders(options))


def test_a_cache_of_another_encoder_width_padding_or_length_is_refused(cache, pipe, tmp_path):
    options, _ = read_options(cache / "mask.yaml")
    images = open_shards(options)
    other = str(frozen.text(tmp_path / "other", "clip_projected", 0, 32))
    for change, message in (
        (
            {"text_encoder": (other, *options.text_encoder[1:])},
            rf"it was made with {pipe}, and {other} is named here; .*width is 16 there and 32 here",
        ),
        ({"text_padding": "attend"}, "text encoder padding is mask there and attend here"),
        ({"max_tokens": (31, 31, 20)}, "text encoder max_tokens are 32 there and 31 here"),
        ({"text_encoder": options.text_encoder[::-1], "max_tokens": (20, 32, 32)}, "text encoder class is clip"),
    ):
        changed = replace(options, **change)
        with pytest.raises(ValueError, match=message):
            open_encoded_text(changed, images, read_text_encoders(changed))


# --- at work


@pytest.mark.parametrize("padding", ["mask", "attend"])
def test_what_a_network_is_told_is_the_same_from_the_cache_and_now(cache, padding):
    """Three encoders put together by hand; of five captions one is dropped whole, and of others one encoder or two."""
    options, _ = read_options(cache / f"{padding}.yaml")
    images, (facts, ours) = open_shards(options), encoders(options)
    text = open_encoded_text(options, images, facts)
    batch = next(build(options, seed=1, share=Share(batch_size=5), captions=True, images=images, text=text))
    whole, each = torch.tensor([0, 1, 0, 0, 0]).bool(), torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0]]).bool()
    nulls = [encoder.null for encoder in ours]
    wanted, none = (
        concat_text_states(drop_captions(encode_captions(ours, batch.captions), nulls, whole, each), text_layout(facts)),
        concat_text_states(nulls, text_layout(facts)),
    )
    for words, seen in (
        (TextConditioner(facts, cached=text), batch._replace(captions=())),
        (TextConditioner(facts), batch._replace(text=())),
    ):
        for got, right in ((words.build_condition(seen, whole, each), wanted), (words.null, none)):
            assert got.states.dtype == got.pooled.dtype == torch.float32 and torch.equal(got.mask, right.mask)
            torch.testing.assert_close(got.states, right.states, rtol=2**-10, atol=1e-3)
            torch.testing.assert_close(got.pooled, right.pooled, rtol=2**-10, atol=1e-3)


def test_words_come_to_the_device_of_the_network(cache):
    """meta stands for any device that is not the one that batches and caches are read on."""
    options, _ = read_options(cache / "mask.yaml")
    images, facts = open_shards(options), read_text_encoders(options)
    text = open_encoded_text(options, images, facts)
    words = TextConditioner(facts, "meta", text)
    batch = next(build(options, seed=1, share=Share(batch_size=2), images=images, text=text))
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert all(
        part.device.type == "meta" for found in (words.null, *words.nulls, words.build_condition(batch, none[:, 0], none)) for part in found
    )


def test_cut_captions_are_counted_of_all_encoders(pipe):
    """CLIP's two ends and 25 words are 27 tokens of 32; T5's one end and the words are 26, of 20."""
    words = TextConditioner(read_text_encoders(options(pipe)))
    words.read(["red " * 25, "red"])
    assert words.truncated == 1
    words.read(["green " * 40])
    assert words.truncated == 4


# --- refused


def test_one_number_is_every_encoders_limit_at_most(pipe, tmp_path):
    """CLIP's tokenizer reads 32; T5's tokenizer here too, and a BERT with longer positions would read more than its tokenizer."""
    bert = str(frozen.text(tmp_path / "bert", "bert"))
    config = json.loads((tmp_path / "bert/tokenizer_config.json").read_text()) | {"model_max_length": 24}
    (tmp_path / "bert/tokenizer_config.json").write_text(json.dumps(config))
    several = DataConfig(text_encoder=(names(pipe)[1], bert), max_tokens=(30,))
    assert [one.max_tokens for one in read_text_encoders(several)] == [30, 24]
    assert [one.max_tokens for one in read_text_encoders(replace(several, max_tokens=(128,)))] == [32, 24]
    with pytest.raises(ValueError, match=r"data.max_tokens=30: .*bert reads at most 24 tokens. Use 24 or fewer"):
        read_text_encoders(replace(several, text_encoder=(bert,)))
    with pytest.raises(ValueError, match=r"data.max_tokens=25: .*bert reads at most 24 tokens"):
        read_text_encoders(replace(several, max_tokens=(30, 25)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_encoder": ("a", "b"), "max_tokens": (1, 2, 3)}, "data.max_tokens=1 2 3 has 3 numbers for 2 encoders"),
        ({"max_tokens": (0,)}, "data.max_tokens=0: at least one token"),
        ({"max_tokens": ()}, "data.max_tokens=: at least one token"),
        ({"text_padding": "zero"}, "data.text_padding=zero: choose `mask` or `attend`"),
    ],
)
def test_values_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_no_name_is_no_encoder():
    assert DataConfig(text_encoder=("",)).text_encoder == () and read_text_encoders(DataConfig()) == ()


def test_what_is_no_text_encoder_is_refused(pipe, tmp_path):
    bare = str(frozen.text(tmp_path / "bare", "bare"))
    with pytest.raises(ValueError, match=r"data.text_padding=attend: the tokenizer of .* has no pad token. Use mask"):
        read_text_encoder(bare, 8, "attend")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer .*: save it into the same folder"):
        read_text_encoder(bare, 8)
    state = load_file(pipe / "text_encoder/model.safetensors")
    shutil.copytree(pipe / "text_encoder", tmp_path / "partly")
    save_file({key: value for key, value in state.items() if "layers.1.mlp.fc1" not in key}, tmp_path / "partly/model.safetensors")
    frozen.text(tmp_path / "x", "bert", tokenizer=tmp_path / "partly")
    with pytest.raises(
        ValueError, match=r"partly lacks 2 of the weights, such as .*layers\.1\.mlp\.fc1\.bias: copy the text encoder again"
    ):
        TextEncoder(str(tmp_path / "partly"), max_tokens=8)
    with pytest.raises(ValueError, match=r"data.text_encoder='.*text_encoder_4' has no config.json"):
        read_text_encoder(str(pipe / "text_encoder_4"), 8)


def test_shards_without_such_captions_are_named_with_what_they_have(tmp_path):
    body = {"png": png(1), "cls": 0, "json": {"name": "x", "tones": []}}
    content = [[{"__key__": str(n), **body} for n in range(3)]]
    folder = make(tmp_path / "shards", content)
    images = open_shards(DataConfig(shards=(str(folder),)))
    check_captions(images, "json.name")
    assert draw_caption({"json": b'{"words": ["red", "round"], "none": null}'}, "json.words") == "red, round"
    for empty in ("json.tones", "json.other"):
        with pytest.raises(ValueError, match=rf"data.caption={empty}: none of the first 3"):
            check_captions(images, empty)
    with pytest.raises(
        ValueError, match=r"data.caption=txt: none of the first 3 samples of .*000000.tar has .*\.json, \.png, json\.name, json\.tones"
    ):
        check_captions(images, "txt")
