"""Folders that mean harm: each is one line that names the file, and nothing of it is run, opened elsewhere, waited for or given room."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import sys

import frozen
import pytest
import torch
from conftest import fit
from safetensors.torch import load_file, save_file

from condot.cli import sample
from condot.data.encoders.autoencoder import Autoencoder
from condot.data.encoders.text import TextEncoder, read_text_encoder
from condot.models.published import load_published
from condot.pipeline.checkpoint import manifest
from condot.pipeline.checkpoint.store import load_into, load_state, load_tensors
from condot.pipeline.config.parse import config_from_mapping
from condot.pipeline.config.schema import Config
from condot.pipeline.hub.checksums import check_checksums

DEEP = "[" * 100_000
SECRET = "secret.txt"
seen: list[str] = []
sys.addaudithook(lambda event, told: seen.append(f"{event} {told[0]!r}") if event in WATCHED else None)
WATCHED = (
    "open",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.fixture(autouse=True)
def watched(tmp_path, monkeypatch):
    """No code, no file of elsewhere, no network, no gigabytes, and an answer within a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (tmp_path / SECRET).write_text("a: b")
    (tmp_path / "evil.py").write_text("open('executed', 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *a: (_ for _ in ()).throw(AssertionError("it asks")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen.clear()
    signal.signal(signal.SIGALRM, lambda *a: (_ for _ in ()).throw(AssertionError("it hangs")))
    signal.alarm(120)
    yield
    signal.alarm(0)
    assert not (tmp_path / "executed").exists() and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000
    elsewhere = [event for event in seen if SECRET in event or event.split()[0] != "open"]
    assert not elsewhere, elsewhere


def edit(path, **changes):
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | changes))


def linked(path, to):
    path.unlink(missing_ok=True)
    os.symlink(to, path)


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def unlisted(folder):
    """Without its list of hashes, as a stranger's folder comes."""
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    return folder


def header(path, change):
    """Rewrite the header of a safetensors file."""
    body = path.read_bytes()
    length = int.from_bytes(body[:8], "little")
    told = json.loads(body[8 : 8 + length])
    text = json.dumps(change(told) or told).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body[8 + length :])


def first(told):
    return next(entry for name, entry in told.items() if name != "__metadata__")


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
MODEL, NETWORK, CLOCK = "model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"
EXPORTED = {
    "index no json": lambda f: (f / MODEL).write_text("{"),
    "index deep": lambda f: (f / MODEL).write_text(DEEP),
    "index a list": lambda f: (f / MODEL).write_text("[1]"),
    "index of numbers": lambda f: edit(f / MODEL, transformer=[1, 2]),
    "index no utf-8": lambda f: (f / MODEL).write_bytes(b"\xff\xfe\xfd"),
    "index a link": lambda f: linked(f / MODEL, f.parent / SECRET),
    "names a list": lambda f: edit(f / MODEL, id2label=["a"]),
    "names of words": lambda f: edit(f / MODEL, id2label={"x": "a"}),
    "names of numbers": lambda f: edit(f / MODEL, id2label={"0": 1}),
    "scheduler a function": lambda f: edit(f / MODEL, scheduler=["diffusers", "load_image"]),
    "scheduler a pipeline": lambda f: edit(f / MODEL, scheduler=["diffusers", "DiffusionPipeline"]),
    "scheduler a module": lambda f: edit(f / MODEL, scheduler=["diffusers", "utils"]),
    "scheduler unknown": lambda f: edit(f / MODEL, scheduler=["os", "system"]),
    "network a pipeline": lambda f: edit(f / MODEL, transformer=["diffusers", "FluxPipeline"]),
    "network of a file": lambda f: edit(f / MODEL, transformer=["evil", "Evil"]),
    "another part": lambda f: edit(f / MODEL, safety_checker=["transformers", "AutoModel"]),
    "a text encoder that is a function": lambda f: edit(f / MODEL, text_encoder=["transformers", "pipeline"]),
    "a tokenizer that is a model": lambda f: edit(f / MODEL, tokenizer=["transformers", "AutoModel"]),
    "quantized": lambda f: edit(f / NETWORK, quantization_config={"quant_method": "bitsandbytes"}),
    "a config in the config": lambda f: edit(f / NETWORK, config=SECRET),
    "a name or path": lambda f: edit(f / NETWORK, pretrained_model_name_or_path=SECRET),
    "a billion layers": lambda f: edit(f / NETWORK, num_layers=10**9),
    "wide": lambda f: edit(f / NETWORK, attention_head_dim=10**6),
    "many positions": lambda f: edit(f / NETWORK, sample_size=10**5),
    "negative": lambda f: edit(f / NETWORK, num_attention_heads=-2),
    "zero": lambda f: edit(f / NETWORK, patch_size=0),
    "text for numbers": lambda f: edit(f / NETWORK, num_layers="2"),
    "not a number": lambda f: edit(f / NETWORK, attention_head_dim=float("nan")),
    "config a list": lambda f: (f / NETWORK).write_text("[]"),
    "config a pipe": lambda f: pipe(f / NETWORK),
    "config a link out": lambda f: linked(f / NETWORK, f.parent / SECRET),
    "config a loop": lambda f: linked(f / NETWORK, f / NETWORK),
    "config a device": lambda f: linked(f / NETWORK, "/dev/zero"),
    "config gone": lambda f: (f / NETWORK).unlink(),
    "weights a pickle": lambda f: (f / WEIGHTS).write_bytes(pickle.dumps(Evil())),
    "weights a pipe": lambda f: pipe(f / WEIGHTS),
    "weights gone, a pickle there": lambda f: os.rename(f / WEIGHTS, f / "transformer/diffusion_pytorch_model.bin"),
    "weights cut": lambda f: os.truncate(f / WEIGHTS, 1000),
    "weights' header huge": lambda f: (f / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + b"{}"),
    "weights' offsets lie": lambda f: header(f / WEIGHTS, lambda told: first(told).update(data_offsets=[0, 2**40])),
    "weights' shape lies": lambda f: header(f / WEIGHTS, lambda told: first(told).update(shape=[2**31, 2**31])),
    "weights' type unknown": lambda f: header(f / WEIGHTS, lambda told: first(told).update(dtype="PICKLE")),
    "shards elsewhere": lambda f: (f / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": f"../../{SECRET}"}})),
    "weights too few": lambda f: save_file(dict(list(load_file(f / WEIGHTS).items())[:3]), f / WEIGHTS),
    "no layers": lambda f: edit(f / NETWORK, num_layers=0),
    "a share of no number": lambda f: edit(f / NETWORK, dropout=float("nan")),
    "an autoencoder of another class": lambda f: edit(f / MODEL, vae=["diffusers", "AutoencoderTiny"]),
    "steps by the trillion": lambda f: edit(f / CLOCK, num_train_timesteps=10**12),
    "steps of no number": lambda f: edit(f / CLOCK, num_train_timesteps="many"),
    "betas of words": lambda f: edit(f / CLOCK, trained_betas=["a"]),
    "recipe opens a file": lambda f: (f / "config.yaml").write_text(f"config: {SECRET}\n"),
    "recipe asks for help": lambda f: (f / "config.yaml").write_text("help: true\n"),
    "recipe a python object": lambda f: (f / "config.yaml").write_text("!!python/object/apply:os.system ['touch executed']\n"),
    "recipe a list": lambda f: (f / "config.yaml").write_text("[1, 2]\n"),
    "list of hashes no text": lambda f: (f / "SHA256SUMS").write_bytes(b"\xff\xff"),
    "list of hashes a link": lambda f: linked(f / "SHA256SUMS", f.parent / SECRET),
    "list of hashes of links": lambda f: (
        os.symlink(f.parent / SECRET, f / "link"),
        (f / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in ("link", MODEL, NETWORK, CLOCK))),
    ),
    "list of hashes without end": lambda f: ((f / "SHA256SUMS").touch(), os.truncate(f / "SHA256SUMS", 2**40)),
    "list of hashes elsewhere": lambda f: (f / "SHA256SUMS").write_text(f"{'0' * 64}  ../{SECRET}\n"),
}


def test_a_list_of_hashes_that_was_cut_or_of_which_a_bit_flips_is_told(trained, tmp_path):
    """Any bit, and any line that is lost of what is read first."""
    folder = shutil.copytree(trained / "export", tmp_path / "export")
    path, told = folder / "SHA256SUMS", 0
    body = path.read_bytes()
    check_checksums(folder)
    for at in range(0, len(body), 7):
        path.write_bytes(body[:at] + bytes([body[at] ^ 1 << at % 8]) + body[at + 1 :])
        with contextlib.suppress(ValueError):
            check_checksums(folder)
            told -= 1
        told += 1
    assert told == len(range(0, len(body), 7))
    path.write_bytes(body[: body.index(b"\n") + 1])
    with pytest.raises(ValueError, match=r"model_index\.json.* not in SHA256SUMS"):
        check_checksums(folder)


def one_line(capsys, folder):
    """The last line said: an error of one line that names the folder."""
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in error and str(folder) in line and len(line) < 2000, error
    return line


@pytest.mark.parametrize("case", EXPORTED)
def test_an_exported_folder_that_means_harm_is_one_line(trained, tmp_path, capsys, case):
    folder = unlisted(tmp_path / "export") if shutil.copytree(trained / "export", tmp_path / "export") else None
    EXPORTED[case](folder)
    status = sample.main(["--pipeline", str(folder), "--output", str(tmp_path / "a.png"), "--num_inference_steps=1", "--num_images=1"])
    assert status == 2 and one_line(capsys, tmp_path)


def test_code_that_a_config_names_is_neither_asked_for_nor_run(trained, tmp_path, capsys):
    """`auto_map` means nothing where nobody trusts it: the stock class is built, and the pictures are as ever."""
    folder = unlisted(tmp_path / "export") if shutil.copytree(trained / "export", tmp_path / "export") else None
    edit(folder / NETWORK, auto_map={"AutoModel": "evil.Evil"}, _commit_hash="x", _name_or_path="/etc", torch_dtype="load")
    shutil.copy(tmp_path / "evil.py", folder / "transformer/evil.py")
    words = ["--output", str(tmp_path / "a.png"), "--num_inference_steps=1", "--num_images=1"]
    assert sample.main(["--pipeline", str(folder), *words]) == 0, capsys.readouterr().err


# --- checkpoints, sealed by who made them


def reseal(folder, change=lambda said: None, files=lambda said: None):
    """Write a manifest that fits what is there, as an attacker can."""
    said = json.loads((folder / "manifest.json").read_text())
    for name in said["files"]:
        body = (folder / name).read_bytes() if (folder / name).is_file() else b""
        said["files"][name] = {"bytes": len(body), "sha256": manifest.hashlib.sha256(body).hexdigest()}
    change(said["tensors"])
    files(said["files"])
    manifest.write_manifest(folder, 1, said["files"], said["tensors"])


def state(**changes):
    return lambda f: (edit(f / "state.json", **changes), reseal(f))


def settings(section, **changes):
    def act(f):
        said = json.loads((f / "state.json").read_text())["config"]
        edit(f / "state.json", config=said | {section: said[section] | changes})
        reseal(f)

    return act


def listed(change):
    return lambda f: reseal(f, change)


def parts(told):
    return lambda f: (
        save_file(load_file(f / RANK), f / RANK, metadata={"condot": told if isinstance(told, str) else json.dumps(told)}),
        reseal(f),
    )


def every(f, whole, offset):
    """The same said of each tensor."""
    return {"parts": {name: {"whole": whole, "offset": offset} for name in load_file(f / RANK)}}


RANK = "rank-00000.safetensors"
CHECKPOINTS = {
    "state a list": lambda f: ((f / "state.json").write_text("[]"), reseal(f)),
    "state deep": lambda f: ((f / "state.json").write_text(DEEP), reseal(f)),
    "state no utf-8": lambda f: ((f / "state.json").write_bytes(b"\xff" * 9), reseal(f)),
    "state a pipe": lambda f: pipe(f / "state.json"),
    "state a link": lambda f: linked(f / "state.json", f.parent.parent / SECRET),
    "state empty": lambda f: ((f / "state.json").write_text("{}"), reseal(f)),
    "step a text": state(step="1"),
    "step negative": state(step=-1),
    "step not a number": state(step=float("nan")),
    "images a list": state(images=[1]),
    "config a text": state(config="x"),
    "config opens a file": state(config={"config": SECRET}),
    "config asks for help": state(config={"help": True}),
    "config with an option": state(config={"data": {"split": f"--config={SECRET}"}}),
    "config unknown": state(config={"nonsense": 1}),
    "names of numbers": state(class_names=[1, 2]),
    "space a list": state(space=[1]),
    "space of words": state(space={"channels": "x"}),
    "space huge": lambda f: state(space=json.loads((f / "state.json").read_text())["space"] | {"height": 10**9})(f),
    "text a list": state(text=[1]),
    "a billion layers": settings("model", depth=10**9),
    "wide": settings("model", width=10**6),
    "manifest of nothing": lambda f: reseal(f, files=lambda said: said.clear()),
    "manifest elsewhere": lambda f: reseal(f, files=lambda said: said.update({f"../../{SECRET}": said["state.json"]})),
    "manifest of NUL": lambda f: reseal(f, files=lambda said: said.update({"a\0b": said["state.json"]})),
    "manifest of no text": lambda f: reseal(f, files=lambda said: said.update({"\ud800": said["state.json"]})),
    "sizes of words": lambda f: reseal(f, files=lambda said: said["state.json"].update(bytes="x")),
    "sizes negative": lambda f: reseal(f, files=lambda said: said["state.json"].update(bytes=-1)),
    "hashes of numbers": lambda f: reseal(f, files=lambda said: said["state.json"].update(sha256=3)),
    "a device of no bytes": lambda f: (
        linked(f / "zero", "/dev/zero"),
        reseal(f, files=lambda s: s.update(zero={"bytes": 0, "sha256": "0" * 64})),
    ),
    "tensors of words": listed(lambda said: said.update({next(iter(said)): "F32"})),
    "tensors negative": listed(lambda said: said.update({next(iter(said)): ["F32", [-1]]})),
    "tensors huge": listed(lambda said: said.update({next(iter(said)): ["F32", [2**40, 2**20]]})),
    "tensors too many": listed(lambda said: said.update({f"model.x{i}": ["F32", [2**40]] for i in range(9)})),
    "tensors of others": listed(lambda said: said.clear()),
    "weights a pickle": lambda f: ((f / RANK).write_bytes(pickle.dumps(Evil())), reseal(f)),
    "weights cut": lambda f: (os.truncate(f / RANK, 999), reseal(f)),
    "weights a pipe": lambda f: pipe(f / RANK),
    "weights' offsets lie": lambda f: (header(f / RANK, lambda told: first(told).update(data_offsets=[0, 2**40])), reseal(f)),
    "weights' shape lies": lambda f: (header(f / RANK, lambda told: first(told).update(shape=[2**33, 2**33])), reseal(f)),
    "parts deep": parts(DEEP),
    "parts a list": parts({"parts": [1]}),
    "parts of words": lambda f: parts(every(f, "x", "y"))(f),
    "parts huge": lambda f: parts(every(f, [2**40, 2**20], [0, 0]))(f),
    "parts negative": lambda f: parts(every(f, [4, 4], [-1, 0]))(f),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_means_harm_is_one_line(trained, tmp_path, capsys, case):
    """By whichever way it is read: sampled from, resumed, or taken as the beginning of another run."""
    run = tmp_path / "run"
    shutil.copytree(trained / "checkpoint-12", run / "checkpoint-12")
    CHECKPOINTS[case](run / "checkpoint-12")
    words = ["--output", str(tmp_path / "a.png"), "--num_inference_steps=1", "--num_images=1"]
    assert sample.main(["--run", str(run), *words]) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said.err and str(run) in said.out + line and len(line) < 2000
    with pytest.raises(ValueError):
        state = load_state(run / "checkpoint-12")
        config_from_mapping(Config, state["config"])
        tensors = {
            name: torch.zeros(shape)
            for name, (_, shape) in json.loads((run / "checkpoint-12/manifest.json").read_text())["tensors"].items()
        }
        load_tensors(run / "checkpoint-12", prefix="model.")
        load_into(run / "checkpoint-12", tensors)
        raise ValueError("a checkpoint whose tensors are good; its state is refused where it is used")


@pytest.mark.parametrize("option", ["checkpoint.resume", "checkpoint.start_from", "init_from"])
@pytest.mark.parametrize("case", ["state deep", "parts deep", "weights a pickle", "step a text", "tensors huge", "state a pipe"])
def test_training_refuses_it_in_one_line(digits, trained, tmp_path, capsys, option, case):
    folder = tmp_path / "other" / "checkpoint-12"
    shutil.copytree(trained / "checkpoint-12", folder)
    CHECKPOINTS[case](folder)
    assert fit(digits, tmp_path / "run", f"--{option}={folder}") == 2 and one_line(capsys, folder)


def test_figures_that_no_run_wrote_are_refused_when_it_is_resumed(digits, trained, tmp_path, capsys):
    for changes in ({"guard": {"losses": ["x"]}}, {"meter": {"loss": "x"}}, {"guard": {"losses": 3}}, {"facts": 3}, {"averages": [1]}):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(trained / "checkpoint-12", tmp_path / "run/checkpoint-12")
        state(**changes)(tmp_path / "run/checkpoint-12")
        assert fit(digits, tmp_path / "run", "--train.max_steps=13") == 2 and one_line(capsys, tmp_path / "run"), changes


# --- frozen encoders, and weights to begin with

CODE = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
TEXTS = {
    "kernels of the Hub": lambda f: edit(f / "config.json", _attn_implementation="evil/kernel"),
    "kernels of the Hub, plainly": lambda f: edit(f / "config.json", attn_implementation="evil/kernel:run"),
    "quantized": lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}),
    "another kind": lambda f: edit(f / "config.json", model_type="timm_wrapper"),
    "a kind of its own": lambda f: edit(
        f / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    ),
    "a billion layers": lambda f: edit(f / "config.json", num_hidden_layers=10**9),
    "wide": lambda f: edit(f / "config.json", intermediate_size=10**9),
    "many words": lambda f: edit(f / "config.json", vocab_size=10**10),
    "text for numbers": lambda f: edit(f / "config.json", hidden_size="x"),
    "no type": lambda f: edit(f / "config.json", dtype="load", torch_dtype="hub"),
    "an adapter": lambda f: (f / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(f.parent / SECRET)})),
    "words of elsewhere": lambda f: edit(f / "tokenizer_config.json", vocab_file=f"../{SECRET}"),
    "a tokenizer of elsewhere": lambda f: edit(f / "tokenizer_config.json", tokenizer_file=f"../{SECRET}"),
    "tokenizers of elsewhere": lambda f: edit(f / "tokenizer_config.json", fast_tokenizer_files=[f"../{SECRET}"]),
    "a tokenizer's pipe": lambda f: pipe(f / "tokenizer.json"),
    "a tokenizer's link": lambda f: linked(f / "tokenizer.json", f.parent / SECRET),
    "a tokenizer deep": lambda f: (f / "tokenizer.json").write_text(DEEP),
    "a template's pipe": lambda f: ((f / "additional_chat_templates").mkdir(), os.mkfifo(f / "additional_chat_templates/a.jinja")),
    "weights a pickle": lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Evil())),
    "shards elsewhere": lambda f: (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"../{SECRET}"}})),
    "shards of numbers": lambda f: (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3})),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_encoder_that_means_harm_is_one_line(tmp_path, case):
    folder = tmp_path / "encoder"
    frozen.text(folder, "bert")
    TEXTS[case](folder)
    with pytest.raises(ValueError) as caught:
        TextEncoder(str(folder), max_tokens=8)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_text_encoder_with_code_is_read_without_it(tmp_path):
    folder = tmp_path / "encoder"
    frozen.text(folder, "bert")
    before = read_text_encoder(str(folder), 8)
    edit(folder / "config.json", auto_map=CODE)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, chat_template="{{ evil }}")
    shutil.copy(tmp_path / "evil.py", folder / "evil.py")
    after = read_text_encoder(str(folder), 8)
    assert after.fingerprint["weights"] == before.fingerprint["weights"] and TextEncoder(str(folder), max_tokens=8).width == before.width


VAES = {
    "a config in the config": lambda f: edit(f / "config.json", config=SECRET),
    "quantized": lambda f: edit(f / "config.json", quantization_config={"quant_method": "torchao"}),
    "another class": lambda f: edit(f / "config.json", _class_name="FluxPipeline"),
    "a billion layers": lambda f: edit(f / "config.json", layers_per_block=10**9),
    "wide": lambda f: edit(f / "config.json", block_out_channels=[32 * 10**4] * 2),
    "channels of words": lambda f: edit(f / "config.json", latent_channels="x"),
    "blocks of numbers": lambda f: edit(f / "config.json", down_block_types=[3, 4]),
    "scale of words": lambda f: edit(f / "config.json", scaling_factor="x"),
    "deep": lambda f: (f / "config.json").write_text(DEEP),
    "a pipe": lambda f: pipe(f / "config.json"),
    "weights a pickle": lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Evil())),
}


@pytest.mark.parametrize("case", VAES)
def test_an_autoencoder_that_means_harm_is_one_line(tmp_path, case):
    folder = tmp_path / "vae"
    frozen.kl(folder)
    VAES[case](folder)
    with pytest.raises(ValueError) as caught:
        Autoencoder(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "case", ["a billion layers", "wide", "negative", "zero", "text for numbers", "config a list", "weights a pickle", "shards elsewhere"]
)
def test_weights_to_begin_with_that_mean_harm_are_one_line(trained, tmp_path, case):
    shutil.copytree(trained / "export", tmp_path / "export")
    EXPORTED[case](tmp_path / "export")
    with pytest.raises(ValueError) as caught:
        load_published(str(tmp_path / "export"))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# --- what is no harm


def test_links_inside_a_folder_and_of_the_hubs_cache_are_followed(trained, tmp_path):
    """Snapshots of the Hub's cache are links to its blobs."""
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(trained / "export", snapshot)
    (cache / "blobs").mkdir()
    for number, path in enumerate([snapshot / NETWORK, snapshot / WEIGHTS, snapshot / MODEL]):
        os.rename(path, cache / "blobs" / str(number))
        os.symlink(os.path.relpath(cache / "blobs" / str(number), path.parent), path)
    words = ["--output", str(tmp_path / "a.png"), "--num_inference_steps=1", "--num_images=1"]
    assert sample.main(["--pipeline", str(unlisted(snapshot)), *words]) == 0
