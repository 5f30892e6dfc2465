"""Publishing: to a hub on this machine, nothing before the folder has passed, whole or not at all, and back again as it was."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import frozen
import pytest
import torch
import yaml
from conftest import ROOT, fit
from hub import READER, ROUTES, STRANGER, WRITER, Answers, serving_hub
from huggingface_hub import constants
from safetensors.torch import save_file
from test_export_text import run_of

from condot.cli import sample
from condot.pipeline.config.parse import config_from_mapping, config_to_mapping
from condot.pipeline.config.schema import Config
from condot.pipeline.export.identity_autoencoder import identity_autoencoder
from condot.pipeline.export.load import load_flow_model
from condot.pipeline.hub.checksums import check_checksums, safetensors_size, write_checksums
from condot.pipeline.hub.publish import MAX_ATTEMPTS, publish
from condot.pipeline.hub.secrets import find_secrets, without_local_paths, without_origin


@pytest.fixture(autouse=True)
def plain_uploads(monkeypatch, tmp_path):
    """No xet, and no token of the developer's."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub():
    with serving_hub() as served:
        yield served


@pytest.fixture
def folder(trained, tmp_path):
    """An export of one's own, to be spoilt."""
    copy = shutil.copytree(trained / "export", tmp_path / "export")
    (copy / "evaluation.json").unlink(missing_ok=True)
    return copy


def push(hub, folder, name="ann/digits", token=WRITER, **more):
    said = []
    address = publish(folder, name, token=token, endpoint=hub.url, wait=0.01, progress=said.append, **more)
    return address, said


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lone(hub, tmp_path, *words, **environment):
    """The environment and words of a process with this hub, and nothing of ours on its path."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, *words], "env": env | settings | environment}


# --- from the command line, and back


PULL = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
drawn = []
for place in sys.argv[1:3]:
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=len(sys.argv) > 3)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    drawn.append(pipe(class_labels=[1, 2], num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="np").images)
own = [m for m in sys.modules if m.split(".")[0] in ("condot", "pipeline", "models", "data", "train")]
print(numpy.abs(drawn[0] - drawn[1]).max(), numpy.abs(drawn[0][0] - drawn[0][1]).max() > 0, own)
"""


def test_a_run_is_published_by_one_command_and_pulled_by_a_stranger(hub, trained, tmp_path):
    """The list comes first; what lies there is the folder; stock diffusers draws the same from user/name as from the folder."""
    words = [str(ROOT / "sample.py"), "export", "--run", str(trained), "--output", str(tmp_path / "out"), "--push_to_hub", "ann/digits"]
    more = ["--private", "--license", "apache-2.0", "--dataset", "ann/scans", "--title", "Digits"]
    done = subprocess.run(**lone(hub, tmp_path, *words, *more, HF_TOKEN=WRITER), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    there = hub.repositories["ann/digits"]
    assert there.private and len(there.commits) == 2
    assert {name: data for name, data in there.files.items() if name != ".gitattributes"} == contents(tmp_path / "out")
    assert "(private):" in done.stdout and all(name in done.stdout for name in contents(tmp_path / "out"))
    head = yaml.safe_load(there.files["README.md"].decode().split("---")[1])
    assert (head["license"], head["datasets"], head["library_name"]) == ("apache-2.0", ["ann/scans"], "diffusers")
    pull = lone(hub, tmp_path, "-I", "-c", PULL, "ann/digits", str(tmp_path / "out"), HF_TOKEN=READER)
    got = subprocess.run(**pull, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert got.returncode == 0, got.stderr
    assert got.stdout.split(maxsplit=2) == ["0.0", "True", "[]\n"]
    assert hub.asked("GET /ann/digits/resolve/.*safetensors")


def test_code_of_ours_is_published_and_pulled_with_trust(hub, digits, tmp_path):
    """A recipe that no stock scheduler serves: its files are parts of an export, give nothing away, and work from the Hub."""
    assert fit(digits, tmp_path / "run", "--export=true", "--train.max_steps=2", "--flow.predict=score") == 0
    push(hub, tmp_path / "run/export")
    there = hub.repositories["ann/digits"].files
    code = sorted(name for name in there if name.endswith(".py"))
    assert code == ["pipeline_condot_v2.py", "scheduler/scheduling_flow_ode_v2.py"]
    assert all(f"| `{name}` | `{hashlib.sha256(there[name]).hexdigest()}` |" in there["README.md"].decode() for name in code)
    pull = lone(hub, tmp_path, "-I", "-c", PULL, "ann/digits", str(tmp_path / "run/export"), "trust")
    got = subprocess.run(**pull, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert got.returncode == 0, got.stderr
    assert got.stdout.split(maxsplit=2)[::2] == ["0.0", "[]\n"]


PULL_TEXT = """
import sys, torch, numpy
from diffusers import DiffusionPipeline
drawn = []
for place in sys.argv[1:3]:
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np", "solver": "exponential"}
    drawn.append(pipe(prompt=["a red square", "big circle"], generator=torch.Generator().manual_seed(3), **how).images)
own = [m for m in sys.modules if m.split(".")[0] in ("condot", "pipeline", "models", "data", "train")]
print(type(pipe).__name__, type(pipe.transformer).__name__, numpy.abs(drawn[0] - drawn[1]).max(), own)
"""


def test_a_text_model_is_pulled_with_its_pipeline_network_and_encoders(hub, tmp_path):
    """Code for two parts, tokenizer and encoder: all from user/name, and the images are the folder's."""
    run = run_of(tmp_path, frozen.shards(tmp_path / "shards", (6, 5, 5)), "mmdit, bert", "--train.max_steps=2")
    push(hub, run / "export")
    there = hub.repositories["ann/digits"].files
    assert yaml.safe_load(there["README.md"].decode().split("---")[1])["pipeline_tag"] == "text-to-image"
    assert sorted(name for name in there if name.endswith(".py")) == ["pipeline_condot_v2.py", "transformer/modeling_mmdit_v1.py"]
    pull = lone(hub, tmp_path, "-I", "-c", PULL_TEXT, "ann/digits", str(run / "export"))
    got = subprocess.run(**pull, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert got.returncode == 0, got.stderr
    assert got.stdout.strip() == "CondotPipeline CondotMMDiT 0.0 []"


def test_the_command_says_what_is_wrong_with_token_name_and_flag(hub, trained, tmp_path, capsys, monkeypatch):
    words = ["export", "--run", str(trained), "--output", str(tmp_path / "out")]
    assert sample.main([*words, "--push_to_hub", "digits"]) == 2
    assert "names no owner: give user/name" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert sample.main([*words, "--private"]) == 2
    assert "--private without --push_to_hub" in capsys.readouterr().err
    assert sample.main([*words, "--license", "Apache 2"]) == 2
    assert "lower case, such as apache-2.0" in capsys.readouterr().err
    assert sample.main([*words, "--dataset", "a/b/c"]) == 2
    assert "dataset='a/b/c'" in capsys.readouterr().err
    assert sample.main([*words, "--push_to_hub", "ann/digits"]) == 2
    assert "no token of the Hub was found. Run `hf auth login`" in capsys.readouterr().err and (tmp_path / "out").exists()
    assert not hub.requests


# --- what is sent


def test_one_commit_holds_the_listed_files_and_no_other(hub, folder):
    address, said = push(hub, folder)
    there = hub.repositories["ann/digits"]
    assert not there.private and address.endswith(there.commits[-1]) and len(hub.asked("/commit/")) == 1
    assert {name: data for name, data in there.files.items() if name != ".gitattributes"} == contents(folder)
    for name, data in contents(folder).items():
        assert f"{len(data):>15,}  {hashlib.sha256(data).hexdigest()[:16]}  {name}" in said[0]


def test_the_list_is_told_before_the_first_request(hub, folder):
    seen = []
    publish(folder, "ann/digits", token=WRITER, endpoint=hub.url, progress=lambda text: seen.append(len(hub.requests)))
    assert seen[0] == 0


def test_pushing_again_sends_what_changed_only(hub, folder):
    push(hub, folder)
    before = len(hub.asked("PUT /objects"))
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nBy hand.\n")
    push(hub, folder)
    assert len(hub.asked("PUT /objects")) == before and b"By hand" in hub.repositories["ann/digits"].files["README.md"]
    push(hub, folder)
    assert len(hub.repositories["ann/digits"].commits) == 3, "nothing changed: no commit"


def test_files_of_others_in_the_repository_stay_and_are_named(hub, folder):
    push(hub, folder)
    hub.repositories["ann/digits"].files["notes.txt"] = b"mine"
    _, said = push(hub, folder)
    assert "left as they are, not of this export: notes.txt" in said and hub.repositories["ann/digits"].files["notes.txt"] == b"mine"


def test_a_large_file_arrives_whole(hub, folder):
    torch.manual_seed(0)
    save_file({"weight": torch.randn(6_000_000)}, folder / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors")
    write_checksums(folder)
    start = time.perf_counter()
    push(hub, folder)
    assert time.perf_counter() - start < 5
    name = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
    assert hub.repositories["ann/digits"].files[name] == (folder / name).read_bytes() and (folder / name).stat().st_size > 20e6


# --- who may see it


@pytest.mark.parametrize("private", [False, True])
def test_visibility_is_as_asked_and_is_never_changed(hub, folder, private):
    push(hub, folder, private=private)
    assert hub.repositories["ann/digits"].private == private
    before, commits = len(hub.asked("PUT|preupload")), len(hub.repositories["ann/digits"].commits)
    with pytest.raises(ValueError, match=f"is there and {'private' if private else 'public'}.*give --private"):
        push(hub, folder, private=not private)
    assert len(hub.asked("PUT|preupload")) == before and len(hub.repositories["ann/digits"].commits) == commits


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_nobodys0000000000000", "does not know this token \\(401\\). Run `hf auth login`"),
        (READER, "the token of ann may only read. Run `hf auth login`"),
        (STRANGER, "may not write there \\(403\\)"),
    ],
)
def test_a_token_that_does_not_serve_is_named_before_anything_is_uploaded(hub, folder, token, message):
    with pytest.raises(ValueError, match=message) as caught:
        push(hub, folder, token=token)
    assert token not in str(caught.value)
    assert not hub.repositories and not hub.asked("PUT|preupload|commit") and len(hub.requests) <= 4


def test_somebody_elses_repository_is_not_written(hub, folder):
    """Public, so it is found; the first request that would write is refused, and no content was sent."""
    push(hub, folder)
    sent, commits = dict(hub.received), list(hub.repositories["ann/digits"].commits)
    (folder / "README.md").write_text("# Mine now\n")
    with pytest.raises(ValueError, match=r"could not upload .*may not write there"):
        push(hub, folder, token=STRANGER)
    assert hub.received == sent and hub.repositories["ann/digits"].commits == commits


@pytest.mark.parametrize("name", ["digits", "ann/../digits", "ann/digits/more", "ann/di gits", "https://huggingface.co/ann/digits", ""])
def test_a_wrong_name_is_refused_without_a_request(hub, folder, name):
    with pytest.raises(ValueError, match="give user/name"):
        push(hub, folder, name=name)
    assert not hub.requests


# --- when the Hub or the line fails


@pytest.mark.parametrize("where", ["GET /api/whoami", "POST /api/repos/create", "GET /api/models", "POST /api/validate-yaml", "/commit/"])
def test_it_tries_again_after_a_500(hub, folder, where):
    hub.fail(where, 500, times=MAX_ATTEMPTS - 1)
    _, said = push(hub, folder)
    assert sum("attempt" in text and "500 to" in text for text in said) == MAX_ATTEMPTS - 1
    assert {name: data for name, data in hub.repositories["ann/digits"].files.items() if name != ".gitattributes"} == contents(folder)


def test_waits_double_and_end(hub, folder, monkeypatch):
    waits = []
    monkeypatch.setattr("condot.pipeline.hub.publish.time.sleep", waits.append)
    hub.fail("whoami", 503, times=100)
    with pytest.raises(ValueError, match=f"no success in {MAX_ATTEMPTS} attempts.*503.*Run the same command again later"):
        push(hub, folder)
    assert waits == [0.01 * 2**k for k in range(MAX_ATTEMPTS - 1)] and len(hub.requests) == MAX_ATTEMPTS


def test_a_hub_that_is_not_there_is_one_clear_error(folder):
    with pytest.raises(ValueError, match=r"could not ask whose .* at http://127.0.0.1:9.* in 5 attempts, the last: ConnectError"):
        publish(folder, "ann/digits", token=WRITER, endpoint="http://127.0.0.1:9", wait=0.01, progress=lambda text: None)


def test_a_request_that_is_wrong_is_not_repeated(hub, folder):
    hub.fail("/commit/", 413)
    with pytest.raises(ValueError, match=r"413.*Nothing was committed"):
        push(hub, folder)
    assert len(hub.asked("/commit/")) == 1


def test_an_answer_that_is_lost_makes_no_second_commit(hub, folder):
    """The commit is done, its answer is not heard: the next attempt finds nothing left to do."""
    real, lost = Answers.commit, []

    def commit(self, *words):
        if lost:
            return real(self, *words)
        lost.append(1)
        send, self.send = self.send, lambda *a, **k: None
        real(self, *words)
        self.send = send
        self.refuse(502, "BadGateway")

    place = next(i for i, route in enumerate(ROUTES) if route[2] is real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hub.ROUTES", (*ROUTES[:place], (*ROUTES[place][:2], commit), *ROUTES[place + 1 :]))
        push(hub, folder)
    assert lost and len(hub.repositories["ann/digits"].commits) == 2


def test_a_connection_cut_in_the_middle_sends_that_file_again_alone(hub, folder):
    hub.cut("PUT /objects")
    push(hub, folder)
    sizes = {hashlib.sha256(data).hexdigest(): len(data) for name, data in contents(folder).items() if name.endswith(".safetensors")}
    sent = {oid: hub.received[oid] / size for oid, size in sizes.items()}
    assert sorted(round(share, 3) for share in sent.values()) == [1.0, 1.5], "the cut one half and whole, the other once"


PUSH = """
import sys
from pathlib import Path
from condot.pipeline.hub.publish import publish
publish(Path(sys.argv[1]), "ann/digits", wait=0.01)
"""


def test_a_killed_upload_goes_on_where_it_stopped(hub, folder, tmp_path):
    """Killed while one large file is half-way and the other there: the repository has no half export, and the other is not sent again."""
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    oid = hashlib.sha256(weights.read_bytes()).hexdigest()
    hub.hold(f"PUT /objects/{oid}")
    process = subprocess.Popen(**lone(hub, tmp_path, "-c", PUSH, str(folder), HF_TOKEN=WRITER, PYTHONPATH=str(ROOT)), cwd=tmp_path)
    try:
        assert hub.holding.wait(60)
        other = hashlib.sha256((folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
        until = time.monotonic() + 20
        while other not in hub.objects and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    hub.closing.set()
    assert list(hub.objects) == [other] and len(hub.repositories["ann/digits"].commits) == 1
    push(hub, folder)
    assert len(hub.asked(f"PUT /objects/{other}")) == 1, "it was there: not sent again"
    assert hub.repositories["ann/digits"].files["transformer/diffusion_pytorch_model.safetensors"] == weights.read_bytes()


# --- what is refused before the first request


def spoil_weights(folder):
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


FAULTS = {
    "missing": (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "scheduler/scheduler_config.json missing"),
    "changed": (lambda f: (f / "config.yaml").write_text("seed: 1\n"), "config.yaml changed"),
    "one bit": (spoil_weights, "transformer/diffusion_pytorch_model.safetensors changed"),
    "no list": (lambda f: (f / "SHA256SUMS").unlink(), "has no SHA256SUMS"),
    "a list that leads out": (lambda f: (f / "SHA256SUMS").write_text(f"{'0' * 64}  ../x\n"), "is no line of a list"),
    "no export": (lambda f: (f / "model_index.json").unlink(), "is no exported folder"),
    "data": (lambda f: (f / "train-000000.tar").write_bytes(b"x"), "train-000000.tar. Move it elsewhere"),
    "arrays": (lambda f: (f / "transformer/latents.npy").write_bytes(b"x"), "transformer/latents.npy"),
    "pictures": (lambda f: (f / "retrieval.png").write_bytes(b"x"), "retrieval.png"),
    "hidden": (lambda f: (f / ".env").write_text("A=b"), ".env"),
    "code": (lambda f: (f / "pipeline_mine_v1.py").write_text("print()\n"), "pipeline_mine_v1.py"),
    "deep": (lambda f: ((f / "a/b").mkdir(parents=True), (f / "a/b/config.json").write_text("{}")), "a/b/config.json"),
    "deep and listed": (
        lambda f: ((f / "a/b").mkdir(parents=True), (f / "a/b/config.json").write_text("{}"), write_checksums(f)),
        "a/b/config.json",
    ),
    "data and listed": (lambda f: ((f / "vae/latents.npy").write_bytes(b"x"), write_checksums(f)), "vae/latents.npy"),
    "a dangling link": (lambda f: (f / "vae/model.safetensors").symlink_to("/nowhere"), "vae/model.safetensors"),
    "its token": (lambda f: (f / "README.md").write_text(f"line\nuse {WRITER}"), "README.md line 2: this machine's token 'hf_w...'"),
    "a token": (lambda f: (f / "README.md").write_text("HF_TOKEN=hf_AbCdEfGhIjKlMnOpQr"), "line 1: a Hugging Face token"),
    "a path": (lambda f: (f / "README.md").write_text("see /home/ann/data"), "a local path '/home/ann/data'"),
    "figures": (lambda f: (f / "evaluation.json").write_text('{"reference": "/mnt/scans/7"}'), "evaluation.json line 1: a local path"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_as_it_should_be_is_refused_without_a_request(hub, folder, fault, monkeypatch):
    monkeypatch.setattr("condot.pipeline.hub.checksums.QUICK_HASH_BYTES", 10_000)
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ValueError) as caught:
        push(hub, folder)
    assert message in str(caught.value) and WRITER not in str(caught.value)
    assert not hub.requests


def test_what_weights_say_beside_their_numbers_is_read(hub, folder):
    save_file({"weight": torch.zeros(2)}, folder / "vae/diffusion_pytorch_model.safetensors", metadata={"from": "/home/ann/vae"})
    write_checksums(folder)
    with pytest.raises(ValueError, match=r"vae/diffusion_pytorch_model.safetensors line 1: a local path '/home/ann/vae'"):
        push(hub, folder)
    assert not hub.requests


SECRETS = [
    "AKIAIOSFODNN7EXAMPLE",
    "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "-----BEGIN RSA PRIVATE KEY-----",
    "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=0123456789abcdef",
    "postgres://ann:hunter22@host/db",
    'token="abcd1234efgh"',
    "'password': 'correct-horse-9'",
    "WANDB_API_KEY=0123456789abcdef",
    "ghp_0123456789abcdefghijABCDEFGHIJ012345",
    "/Users/ann/x",
    "file:///home/ann/x",
    "/root/.cache/x",
    "C:\\Users\\ann",
    '{"a": "D:\\\\data\\\\x"}',
    "~/runs/x",
]
HARMLESS = [
    "https://huggingface.co/ann/home/data",
    'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")',
    '"unk_token": "<|endoftext|>"',
    '"eos_token_id": 49407',
    "max_tokens:\n  - 128",
    '"text": "Q:\\nWhat"',
    "hf_hub_download",
    "images/root/x",
    "scale 1/2 and 3:4",
    "token = os.environ",
    '"~/a": 1234, "token": 12345, "/home": 77',  # words of a tokenizer
]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_and_local_paths_are_found(text):
    assert find_secrets(f"first line\n{text}\n")[0].startswith("line 2: ")


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_one_is_left(text):
    assert not find_secrets(text)


def test_the_working_folder_is_a_local_path(tmp_path, monkeypatch):
    inner = tmp_path / "deep"
    inner.mkdir()
    monkeypatch.chdir(inner)
    monkeypatch.setattr("condot.pipeline.hub.secrets.LOCAL_PATH_PATTERNS", {})
    assert "the working folder" in find_secrets(f"in {inner}/x")[0] and not find_secrets(f"in {inner}er")


# --- the folder itself


def test_sha256sum_verifies_the_list(folder):
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(contents(folder)) - 2, "all but the card and the list"


def test_a_changed_or_cut_folder_is_not_opened(folder, monkeypatch):
    (folder / "README.md").write_text("my own words")
    load_flow_model(folder)
    monkeypatch.setattr("condot.pipeline.hub.checksums.QUICK_HASH_BYTES", 10_000)
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    assert safetensors_size(weights) == weights.stat().st_size > 10_000
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"transformer/diffusion_pytorch_model.safetensors changed"):
        load_flow_model(folder)
    weights.write_bytes(whole)
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"scheduler/scheduler_config.json changed"):
        load_flow_model(folder)
    (folder / "SHA256SUMS").unlink()
    assert check_checksums(folder) == {}


def test_an_export_tells_no_local_path(trained, folder, tmp_path):
    """The digits' run lies in a temporary folder, and its shards in another: neither is anywhere in its texts."""
    for name, data in contents(folder).items():
        if not name.endswith((".png", ".safetensors")):
            assert str(trained.parent.parent).encode() not in data and not find_secrets(data.decode()), name
    config = config_from_mapping(Config, yaml.safe_load((folder / "config.yaml").read_text()))
    assert (config.output_dir, config.data.shards) == ("run", ("shards",)) and config.model.width == 32


def test_parts_do_not_tell_their_origin(trained, tmp_path, monkeypatch):
    """diffusers and transformers write down where a part was loaded from; a folder here is taken out, a name on the Hub stays."""
    told = {"_name_or_path": "/home/ann/vae", "text_config": {"_name_or_path": "openai/clip"}, "list": [{"name_or_path": "C:\\x"}]}
    assert without_origin(told) == {"text_config": {"_name_or_path": "openai/clip"}, "list": [{}]}

    def loaded(*words):
        vae = identity_autoencoder(*words)
        vae.register_to_config(_name_or_path=str(tmp_path / "vae"))
        return vae

    monkeypatch.setattr("condot.pipeline.export.pipeline_class.identity_autoencoder", loaded)
    assert sample.main(["export", "--run", str(trained), "--output", str(tmp_path / "out")]) == 0
    assert "_name_or_path" not in (tmp_path / "out/vae/config.json").read_text()


def test_each_place_in_a_recipe_is_scrubbed_and_names_on_the_hub_stay(tmp_path):
    (tmp_path / "vae").mkdir()
    given = {
        "output_dir": "/home/ann/runs/x/",
        "init_from": str(tmp_path / "vae"),
        "data": {
            "shards": ["s3://ann-bucket/train?sig=1", "hf://datasets/ann/scans", "..\\scans\\val"],
            "encoded": "/mnt/cache/latents",
            "cache_dir": "/scratch/c",
            "autoencoder": "ann/vae",
            "text_encoder": ["openai/clip", "./local/t5"],
        },
        "checkpoint": {"resume": "runs/x/checkpoints/5", "start_from": "/home/ann/runs/w"},
    }
    settings = config_to_mapping(config_from_mapping(Config, given))
    plain = without_local_paths(settings)
    assert settings["output_dir"] == "/home/ann/runs/x/", "the argument is left alone"
    assert (plain["output_dir"], plain["init_from"]) == ("x", "vae")
    assert plain["data"]["shards"] == ["train", "hf://datasets/ann/scans", "val"]
    assert [plain["data"][key] for key in ("encoded", "cache_dir", "autoencoder")] == ["latents", "c", "ann/vae"]
    assert plain["data"]["text_encoder"] == ["openai/clip", "t5"]
    assert plain["checkpoint"] | {"resume": "5", "start_from": "w"} == plain["checkpoint"]
    assert config_from_mapping(Config, plain).data.resolution == 256
    assert "/" not in json.dumps([plain["output_dir"], plain["init_from"], plain["checkpoint"]])
