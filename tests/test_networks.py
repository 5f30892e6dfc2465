"""Every network of the table, by its spec alone; and one from a file outside the house."""

import ast
import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, arguments, command
from stocks import shake
from torch import nn

from condot.cli.assembly.trained_model import TrainedModel
from condot.core.model_config import ModelConfig
from condot.core.registry import registering_from
from condot.models.common.spec import NetworkSpec
from condot.models.convert import from_diffusers, to_diffusers
from condot.models.cost import count_params_and_macs, example_inputs, stages
from condot.models.lora import add_lora, merge_lora
from condot.models.memory import fsdp_units
from condot.models.registry import NETWORKS, build, find_spec, spec_of
from condot.pipeline.checkpoint.store import CheckpointManager, load_state
from condot.pipeline.config.parse import config_from_mapping, parse
from condot.pipeline.config.schema import Config

TOY = Path(__file__).with_name("toy_network.py")
SHAPE = (3, 8, 8)


def tiny(kind, **more):
    return build(kind, channels=SHAPE[0], resolution=SHAPE[1], **{**NETWORKS[kind].tiny, **more}, seed=0)


def given(kind, batch=3):
    text = {name: NETWORKS[kind].tiny.get(name, 0) for name in ("text_width", "pooled_width")}
    return example_inputs(tiny(kind), SHAPE, batch=batch, tokens=5, **text)


@pytest.fixture
def toy(monkeypatch):
    """The network of the file, registered while a test runs."""
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("toy_network", TOY))
    monkeypatch.setitem(sys.modules, "toy_network", module)  # where types of its dataclass are looked up
    with registering_from(str(TOY)) as added:
        module.__spec__.loader.exec_module(module)
    yield module
    for registry, name in added:
        registry.discard(name)
    assert "toy" not in NETWORKS and "toy" not in ModelConfig.kinds


@pytest.fixture(params=[*NETWORKS, "toy"])
def kind(request):
    if request.param == "toy":
        request.getfixturevalue("toy")
    return request.param


@torch.no_grad()
def test_a_network_is_what_its_spec_says(kind):
    """Found by its class, as a subclass of it too; called as the house calls it; its rule knows every parameter; it begins at zero."""
    network, spec = tiny(kind), NETWORKS[kind]
    assert spec_of(network) is spec and ModelConfig.kinds[kind] is spec.config and spec.kind == kind
    network.__class__ = type("Sharded", (type(network),), {})  # as FSDP2 does
    assert spec_of(network) is spec
    x, t, condition = given(kind)[:3]
    out = network(x, t, condition)
    assert out.shape == x.shape and not out.any()
    for name in ("channels", "resolution", "num_classes", "micro_conditions", "size_multiple"):
        assert hasattr(network, name), name
    assert (network.conditioning in ("class", "text") and spec.config().conditioning == network.conditioning) or kind == "unet"
    zero = [name for name, value in network.named_parameters() if not value.any()]
    assert all(spec.init_rule(name) in ("zero", "torch") for name in zero) and zero


@torch.no_grad()
def test_a_network_goes_out_and_comes_back(kind):
    """Where it has a form elsewhere: twice the output there, and the same bits at home again."""
    network, spec = shake(tiny(kind)), NETWORKS[kind]
    if spec.stock is None and spec.custom is None:
        with pytest.raises(ValueError, match=r"Mixer has no class to travel in: .*DiT"):
            to_diffusers(network, 2.0)
        return
    for masked in (False, True):
        exported = to_diffusers(network, 2.0, masked=masked)
        back = from_diffusers(exported, 2.0, num_classes=network.num_classes or None, pooled_width=6)
        state = back.state_dict()
        assert find_spec(back) is spec and state.keys() == network.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_costs_are_counted_and_adapters_taken_in(kind):
    """All weights stand in one unit that FSDP gathers; adapters leave the output as it is, and the names as they were."""
    network, spec = shake(tiny(kind)), NETWORKS[kind]
    assert sum(torch.Size(shape).numel() for unit in fsdp_units(network) for shape in unit) == sum(p.numel() for p in network.parameters())
    text = {name: spec.tiny.get(name, 0) for name in ("text_width", "pooled_width")}
    assert stages(network) and count_params_and_macs(network, SHAPE, **text)[1] > 0
    names, inputs = list(network.state_dict()), given(kind)
    before = network(*inputs)
    target = "attention" if "attention" in spec.lora_targets else next(iter(spec.lora_targets))
    assert add_lora(network, 2, 2.0, (target,)) > 0
    assert torch.equal(network(*inputs), before)
    assert list(merge_lora(network).state_dict()) == names


def test_a_network_of_a_file_trains_resumes_and_samples(toy, digits, tmp_path, capsys):
    """Its section is parsed, helped with, saved and held to; a run ends, goes on and is drawn from; an export says why not."""
    run, more = tmp_path / "run", ("--model.kind=toy", "--model.width=32", "--model.depth=1")
    words = [word for word in arguments(digits, run, "--train.max_steps=3", *more) if not word.startswith("--model.heads")]
    assert parse(Config, words).model == toy.ToyConfig(width=32, depth=1)
    with pytest.raises(ValueError, match=r"model.width=2: a whole number at least 4"):
        parse(Config, [*words, "--model.width=2"])
    with pytest.raises(ValueError, match=r"model\.heads is a field of model.kind=dit, which was not chosen"):
        parse(Config, [*words, "--model.heads=2"])
    with pytest.raises(SystemExit):
        parse(Config, ["--model.kind=toy", "--help"])
    assert "An MLP-Mixer on classes." in capsys.readouterr().out
    assert command(*words) == 0
    first = CheckpointManager(run, keep=1).latest()
    assert load_state(first)["config"]["model"]["width"] == 32 and load_state(first)["step"] == 3
    assert command(*[*words, "--train.max_steps=5"]) == 0
    assert load_state(CheckpointManager(run, keep=1).latest())["step"] == 5
    model = TrainedModel(run).build_model("cpu")
    assert model.field(torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 10])).isfinite().all()
    capsys.readouterr()
    assert command(*[*words, f"--output_dir={tmp_path / 'other'}", "--export=true"]) == 2
    error = capsys.readouterr().err
    assert "model.kind=toy: a Mixer has no class to be exported in. Give --export=false" in error and not (tmp_path / "other").exists()


def test_a_saved_run_of_an_unknown_network_says_so():
    """Without the file, what its run saved is refused by name."""
    with pytest.raises(ValueError, match=r"model\.kind=toy is unknown: choose one of dit, cross_dit, mmdit, unet\."):
        config_from_mapping(Config, {"model": {"kind": "toy", "width": 8}})
    with pytest.raises(ValueError, match=r"model\.kind='toy' is unknown: choose one of dit, cross_dit, mmdit, unet\."):
        build("toy", channels=1, resolution=8)


def test_a_spec_that_does_not_fit_is_refused(toy):
    spec = NETWORKS["toy"]
    with pytest.raises(ValueError, match=r"network 'mine': the section ToyConfig says kind='toy'. Give both one name"):
        NETWORKS.add("mine", spec)
    with pytest.raises(ValueError, match=r"network 'toy' is registered already"):
        NETWORKS.add("toy", spec)

    class Bare(nn.Module):
        def __init__(self, *, channels, resolution, num_classes, width):
            super().__init__()

    NETWORKS.discard("toy")
    with pytest.raises(ValueError, match=r"model.kind=toy: Bare takes no depth, patch_size, of which ToyConfig has fields"):
        NETWORKS.add("toy", dataclasses.replace(spec, network=Bare))
    assert "toy" not in NETWORKS and "toy" not in ModelConfig.kinds
    with pytest.raises(ValueError, match="Linear is no network that is registered: DiT, CrossDiT, MMDiT, UNet are"):
        spec_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no section `model`: derive a dataclass"):
        NetworkSpec(config=type("Plain", (ModelConfig,), {"kind": "plain"}), network=Bare, init_rule=lambda name: "torch").check()


def test_nothing_outside_its_folder_knows_a_network():
    """The kind-blind halves name no network and no class of its forms: a new one is its folder and a line of the registry."""
    classes = {spec.network for spec in NETWORKS.values()} | {cls for spec in NETWORKS.values() if spec.stock for cls in spec.stock.classes}
    names = {cls.__name__ for cls in classes}
    for path in (path for path in (ROOT / "models").glob("*.py") if path.name != "registry.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not used & names, (path, used & names)
