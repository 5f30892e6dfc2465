"""Starting from published weights: outputs are theirs, what does not fit is listed, and the recipe that would fit is named."""

import argparse
import copy
import json

import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from stocks import STOCK, setting, shake, stock_network, stock_output

from condot.models import registry
from condot.models.common.layers import sincos_positions
from condot.models.convert import to_stock
from condot.models.dit.original import _original_names
from condot.models.init_from import init_from_published, requirements_of
from condot.models.published import _choose_files, load_published

DIT = {
    "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 3, "num_layers": 2, "sample_size": 8, "patch_size": 2,
    "num_embeds_ada_norm": 9, "norm_eps": 1e-6,
}  # fmt: skip


def required_by(name):
    """What a recipe has to say for the weights that this names."""
    return requirements_of(load_published(name))


def saved(tmp_path, name):
    stock = stock_network(name)
    stock.save_pretrained(tmp_path / "weights")
    return stock, str(tmp_path / "weights")


def network_of(required, **more):
    """As train.py builds it: the section `model`, and what the data say."""
    data = dict(required.data)
    if required.model["kind"] in ("mmdit", "cross_dit") or required.model.get("condition") == "text":
        data.setdefault("pooled_width", 14)
    return registry.build(**{**required.model, **data, **more}, seed=1)


@pytest.fixture
def dit(tmp_path):
    """A folder with a DiT whose blocks embed class and time alike, as published ones do, and that predicts variances."""
    torch.manual_seed(0)
    stock = shake(DiTTransformer2DModel(**DIT, out_channels=6))
    first = stock.transformer_blocks[0].norm1.emb
    stock.transformer_blocks[1].norm1.emb.load_state_dict(first.state_dict())
    stock.save_pretrained(tmp_path / "dit")
    return stock, tmp_path / "dit"


def dit_output(stock, x, t, labels):
    return stock(x, 1000 * (1 - t), class_labels=labels).sample[:, :3]


X, T, LABELS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.linspace(0, 1, 4), torch.tensor([0, 3, 8, 9])


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_the_named_recipe_takes_the_weights(tmp_path, name):
    """A network built as its requirements say gives the published output, times the sign of the flow."""
    stock, folder = saved(tmp_path, name)
    required = required_by(folder)
    network = network_of(required, **({"num_classes": 5} if name == "unet" else {}))
    report = init_from_published(folder, network)
    sign = -1 if name.startswith("sd3") else 1
    assert required.flow == {"sd3": {"path": "condot", "predict": "velocity"}}.get(
        name.split()[0].rstrip(",")[:3], {"path": "ddpm_scaled_linear" if "text" in name else "ddpm", "predict": "noise"}
    )
    given = setting(stock)
    theirs = stock_output(stock, *given)
    assert (network(*given) - sign * theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert report.tensors == len(network.state_dict())
    assert report.notes == (("the variances that the weights also predict are left out",) if "variances" in name else ())
    with pytest.raises(ValueError, match=r"no config\.json"):
        init_from_published(str(tmp_path), network)


@torch.no_grad()
def test_a_published_dit(dit):
    stock, folder = dit
    required = required_by(str(folder))
    assert str(required) == "model.kind=dit model.patch_size=2 model.width=48 model.depth=2 model.heads=4 model.clock=diffusers"
    network = network_of(required, num_classes=9)
    assert init_from_published(str(folder), network).notes == ("the variances that the weights also predict are left out",)
    assert (network(X, T, LABELS) - dit_output(stock, X, T, LABELS)).abs().max() < 1e-5
    as_trained = network_of(required, num_classes=9, clock="original")
    init_from_published(str(folder), as_trained)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), as_trained.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"model\.clock=sit for diffusers"):
        init_from_published(str(folder), network_of(required, num_classes=9, clock="sit"))


@torch.no_grad()
def test_other_classes_begin_afresh_and_null_stays(dit):
    stock, folder = dit
    network = network_of(required_by(str(folder)), num_classes=4)
    first = network.classes.weight[:4].clone()
    report = init_from_published(str(folder), network)
    assert "4 classes begin afresh in place of the weights' 9; the null class is theirs" in report.notes
    assert torch.equal(network.classes.weight[:4], first)
    null = torch.full((4,), 4)
    assert (network(X, T, null) - dit_output(stock, X, T, null + 5)).abs().max() < 1e-5


@torch.no_grad()
def test_what_we_exported_comes_back(tmp_path):
    """1001 rows of which 5 are classes are 5 classes; the scheduler beside says that it is a flow, so the sign comes back too."""
    options = {"kind": "dit", "channels": 3, "resolution": 8, "num_classes": 5, "width": 48, "depth": 2, "heads": 4, "patch_size": 2}
    ours = shake(registry.build(**options, seed=0))
    to_stock(ours, -1.0).save_pretrained(tmp_path / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text("{}")
    required = required_by(str(tmp_path))
    assert required.flow == {"path": "condot", "predict": "velocity"}
    network = network_of(required, num_classes=5)
    report = init_from_published(str(tmp_path), network)
    assert report.notes == ()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), network.state_dict().values(), strict=True))
    init_from_published(str(tmp_path), network, factor=1.0)
    assert torch.equal(network.leave.weight, -ours.leave.weight), "a factor that is given counts"


def test_untied_blocks_need_their_own_conditions(tmp_path):
    torch.manual_seed(0)
    DiTTransformer2DModel(**DIT).save_pretrained(tmp_path)
    required = required_by(str(tmp_path))
    assert required.model["own_conditions"]
    init_from_published(str(tmp_path), network_of(required, num_classes=9))
    with pytest.raises(ValueError, match=r"5 missing \(classes.weight.*10 unexpected .*model.own_conditions=true"):
        init_from_published(str(tmp_path), network_of(required, num_classes=9, own_conditions=False))


def original(depth=2, width=48, classes=9):
    """A checkpoint as DiT's and SiT's code writes it."""
    g = torch.Generator().manual_seed(4)
    ours = registry.build("dit", channels=3, resolution=8, num_classes=classes, width=width, depth=depth, heads=4, patch_size=2)
    state = {name: 0.1 * torch.randn(value.shape, generator=g) for name, value in ours.state_dict().items()}
    state["leave.weight"], state["leave.bias"] = 0.1 * torch.randn(24, width, generator=g), 0.1 * torch.randn(24, generator=g)
    named = {theirs: state[name] for name, theirs in _original_names(depth).items()}
    named["x_embedder.proj.weight"] = named["x_embedder.proj.weight"].view(width, 3, 2, 2)
    return {**named, "pos_embed": sincos_positions(width, 4, 4)[None]}, state


@pytest.mark.parametrize("form", ["flat.pt", "transit-DiT.pt", "ema-of-the-other.pt", "named.pt", "state.safetensors", "wrapped.pth"])
def test_original_checkpoints(tmp_path, form):
    """DiT's are flat or under `ema`, beside an optimiser and a Namespace, which alone tells DiT from SiT: a file's name does not."""
    theirs, ours = original()
    path = tmp_path / form
    if form.endswith("safetensors"):
        save_file({k: v.contiguous() for k, v in theirs.items()}, path)
    elif form in ("flat.pt", "transit-DiT.pt"):
        torch.save(theirs, path)
    elif form in ("ema-of-the-other.pt", "named.pt"):
        other = {k: v + 1 for k, v in theirs.items()}
        args = argparse.Namespace(path_type="Linear", prediction="velocity") if "other" in form else argparse.Namespace(model="DiT-S/2")
        torch.save({"model": other, "ema": theirs, "opt": {"lr": 1e-4}, "args": args}, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.items()}, "epoch": 3}, path)
    required = required_by(str(path))
    clock = {"ema-of-the-other.pt": "sit", "named.pt": "original"}.get(form)
    assert required.model == {"kind": "dit", "patch_size": 2, "width": 48, "depth": 2} | ({"clock": clock} if clock else {})
    assert required.data == {"channels": 3, "resolution": 8}
    flows = {"sit": {"path": "condot", "predict": "velocity"}, "original": {"path": "ddpm", "predict": "noise"}}
    assert required.flow == flows.get(clock, {})
    network = network_of(required, num_classes=9, heads=4) if clock else network_of(required, num_classes=9, heads=4, clock="sit")
    report = init_from_published(str(path), network)
    unsaid = "the file does not say whether it is DiT's or SiT's: it is read as model.clock=sit, as the recipe has it"
    assert report.notes == ("the variances that the weights also predict are left out", *([] if clock else [unsaid]))
    assert ("the file does not say whose it is" in str(required)) == (clock is None)
    state = network.state_dict()
    assert all(torch.equal(state[k], v) for k, v in ours.items() if not k.startswith("leave"))
    assert torch.equal(state["leave.weight"], torch.cat([ours["leave.weight"][6 * i : 6 * i + 3] for i in range(4)]))
    wrong = {"sit": "original", "original": "sit"}.get(clock, "diffusers")
    with pytest.raises(ValueError, match=rf"model.clock={wrong} for {clock or 'original or sit'}"):
        init_from_published(str(path), network_of(required, num_classes=9, heads=4, clock=wrong))


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_is_never_executed(tmp_path, capsys):
    path = tmp_path / "bad.pt"
    torch.save({"ema": original()[0], "hook": Trap()}, path)
    with pytest.raises(ValueError, match=r"bad.pt holds more than tensors, which would have to be executed"):
        required_by(str(path))
    assert "executed" not in capsys.readouterr().out


def test_weights_that_do_not_fit_are_listed(dit):
    _, folder = dit
    required = required_by(str(folder))
    with pytest.raises(ValueError) as said:
        init_from_published(str(folder), network_of(required, num_classes=9, depth=3, width=96, qk_norm=True))
    text = str(said.value)
    assert "16 missing (blocks.0.attention.key_norm.weight, " in text and "30 misshapen (time.enter.weight (48, 256) for (96, 256)" in text
    assert "They fit with model.kind=dit model.patch_size=2 model.width=48 model.depth=2 model.heads=4" in text
    assert "3 channels of an image" in text
    with pytest.raises(ValueError, match=r"unexpected \(blocks.1.attention.out.bias, .* and 4 more\)"):
        init_from_published(str(folder), network_of(required, num_classes=9, depth=1))


@pytest.mark.parametrize(("name", "change", "says"), [
    ("sd3", {"heads": 2}, "model.heads=2 for 4"),
    ("sd3", {"position_grid": 7}, "model.position_grid=7 for 9"),
    ("sd3", {"position_line": (0.0, 1.0)}, r"model.position_line=0.0 1.0 for 0.0 0.66"),
    ("sd3", {"qk_norm": True}, "15 missing|10 missing|11 missing"),
    ("sd3", {"text_width": 24}, r"misshapen \(text.weight \(48, 20\) for \(48, 24\)\).*20 of a token of data.text_encoder"),
    ("pixart", {"heads": 2}, "model.heads=2 for 4"),
    ("pixart, interpolated", {"interpolation_scale": None}, "model.interpolation_scale=1 for 2"),
    ("unet", {"head_width": 16}, "model.head_width=16 for 32"),
    ("unet, as ddpm", {"layout": "plain"}, "model.layout=none for ddpm|model.layout=None for ddpm"),
    ("unet", {"num_classes": 5, "channels": 1}, "3 channels of an image"),
])  # fmt: skip
def test_what_does_not_fit_is_told(tmp_path, name, change, says):
    _, folder = saved(tmp_path, name)
    required = required_by(folder)
    with pytest.raises(ValueError, match=says):
        init_from_published(folder, network_of(required, **{**({"num_classes": 5} if name == "unet" else {}), **change}))


def test_another_kind_is_told(tmp_path):
    _, folder = saved(tmp_path, "pixart")
    other = registry.build("dit", channels=3, resolution=12, num_classes=2, patch_size=2, width=48, depth=3, heads=4)
    with pytest.raises(
        ValueError, match=r"holds a PixArtTransformer2DModel, which is no model.kind=dit. They fit with model.kind=cross_dit"
    ):
        init_from_published(folder, other)


@torch.no_grad()
def test_micro_conditions_may_be_added(tmp_path):
    """Sizes begin without a say, so the output is still the published one."""
    for name in ("sd3, qk-norm", "pixart", "unet, text"):
        stock, folder = saved(tmp_path / name, name)
        network = network_of(required_by(folder), micro_conditions=True)
        report = init_from_published(folder, network)
        assert any("know no micro-conditions" in note for note in report.notes)
        given = setting(stock)
        theirs = stock_output(stock, *given)
        assert (network(*given).abs() - theirs.abs()).abs().max() <= 1e-5 * theirs.abs().max()


def test_another_resolution_is_told(dit):
    _, folder = dit
    report = init_from_published(str(folder), network_of(required_by(str(folder)), num_classes=9, resolution=16))
    assert "the weights were trained at a resolution of 8, which is 16 here" in report.notes


def test_damaged_folders(tmp_path, dit):
    _, folder = dit
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["proj_out_2.bias"]
    save_file({**state, "more": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"its own DiTTransformer2DModel: 1 missing \(proj_out_2.bias\), 1 unexpected \(more\)"):
        required_by(str(folder))
    weights.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="cannot be read"):
        required_by(str(folder))
    weights.unlink()
    with pytest.raises(ValueError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        required_by(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="configuration cannot be read"):
        required_by(str(folder))
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="holds a FluxTransformer2DModel: ours can hold DiT"):
        required_by(str(folder))
    with pytest.raises(ValueError, match="no such folder or file"):
        required_by(str(tmp_path / "nothing"))


@pytest.mark.parametrize("form", ["sharded", "bin", "half", "legacy"])
@torch.no_grad()
def test_forms_of_folders(tmp_path, dit, form):
    """Many files, the old pickled form, half precision, and the class's old name: the same network."""
    stock, folder = dit
    other = tmp_path / "other"
    copy = DiTTransformer2DModel.from_pretrained(folder)
    if form == "half":
        copy = copy.half()
    copy.save_pretrained(other, **{"sharded": {"max_shard_size": "50KB"}, "bin": {"safe_serialization": False}}.get(form, {}))
    if form == "legacy":
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(
            json.dumps({**config, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "old": 1})
        )
    network = network_of(required_by(str(other)), num_classes=9)
    init_from_published(str(other), network)
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert (network(X, T, LABELS) - dit_output(stock, X, T, LABELS)).abs().max() < (3e-2 if form == "half" else 1e-5)


def test_a_hub_id_is_downloaded_sparingly(monkeypatch, tmp_path, dit):
    """Only the network's configuration and its safetensors are asked for; nothing else of a pipeline."""
    import huggingface_hub

    _, folder = dit
    pipeline = tmp_path / "hub"
    pipeline.mkdir()
    folder.rename(pipeline / "transformer")
    asked = {}
    files = ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "vae/config.json"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: asked.update(more, name=name) or str(pipeline))
    assert required_by("somebody/dit").model["width"] == 48
    assert asked["name"] == "somebody/dit"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert asked["allow_patterns"] == ["transformer/config.json", weights, "scheduler/scheduler_config.json"]
    files[2:3] = ["transformer/diffusion_pytorch_model.fp16.safetensors", "transformer/diffusion_pytorch_model.bf16.safetensors"]
    required_by("somebody/dit")
    assert asked["allow_patterns"][1:-1] == [files[2]], "where there is no other, a variant"

    def unreachable(*args, **more):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        ValueError, match=r"init_from='somebody/dit' is no folder or file here and cannot be had from the Hub \(no network\)"
    ):
        required_by("somebody/dit")


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_a_variant_alone(tmp_path, safe, shards):
    """As diffusers writes `variant="fp16"`, whole and in parts; the full weights are taken where they are there, fp16 before bf16."""
    torch.manual_seed(2)
    stock = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=3, out_channels=6, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=9,
    )  # fmt: skip
    size = {"max_shard_size": "60kB"} if shards else {}
    half = copy.deepcopy(stock).half()
    copy.deepcopy(stock).bfloat16().save_pretrained(tmp_path, variant="bf16", safe_serialization=safe, **size)
    half.save_pretrained(tmp_path, variant="fp16", safe_serialization=safe, **size)
    names = [path.name for path in tmp_path.iterdir()]
    assert (len(names) > 5) == shards and not any(name.startswith("diffusion_pytorch_model.safe") and "index" not in name for name in names)
    found = load_published(str(tmp_path))
    expected = half.state_dict()
    assert found.variant == "fp16" and found.state.keys() == expected.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, expected[key].float()) for key, value in found.state.items())
    report = init_from_published(str(tmp_path), network_of(required_by(str(tmp_path)), num_classes=9))
    assert "the full weights are not there, and those of the variant fp16 are taken" in report.notes
    stock.save_pretrained(tmp_path, safe_serialization=False)
    whole = load_published(str(tmp_path))
    assert whole.variant == "" and all(torch.equal(whole.state[key], value) for key, value in stock.state_dict().items())


def test_files_of_a_repository_are_chosen_as_those_of_a_folder():
    stem = "diffusion_pytorch_model"
    for names, expected in {
        (f"{stem}.safetensors", f"{stem}.bin", f"{stem}.fp16.safetensors"): ("", [f"{stem}.safetensors"]),
        (f"{stem}.bin", f"{stem}.fp16.safetensors"): ("", [f"{stem}.bin"]),
        (f"{stem}.fp16.bin", f"{stem}.non_ema.safetensors"): ("fp16", [f"{stem}.fp16.bin"]),
        (f"{stem}.bf16.safetensors", f"{stem}.fp16.safetensors", f"{stem}.fp16.bin"): ("fp16", [f"{stem}.fp16.safetensors"]),
        (f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16-00001-of-00001.safetensors"):
            ("fp16", [f"{stem}.fp16-00001-of-00001.safetensors", f"{stem}.safetensors.index.fp16.json"]),
        (f"{stem}.safetensors.index.json", "config.json"): ("", [f"{stem}.safetensors.index.json"]),
        (f"{stem}.safetensors.index.json", f"{stem}.non_ema.bin"): ("non_ema", [f"{stem}.non_ema.bin"]),
        ("model.safetensors", "README.md"): ("", []),
    }.items():  # fmt: skip
        assert _choose_files(names) == expected, names
