"""Where a run begins: at published weights, whole or with low-rank additions; and in which precision it computes."""

import shutil

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from conftest import fit
from diffusers import DiTTransformer2DModel, UNet2DModel

from condot.cli import sample
from condot.cli.assembly.build_run import PREVIEW_CAPTIONS, benchmark_precision
from condot.cli.assembly.trained_model import TrainedModel
from condot.core.data_config import DataConfig
from condot.data.loader.training_data import TrainingData
from condot.models import registry
from condot.models.convert import from_stock
from condot.models.dit.spec import DiTConfig
from condot.models.lora import add_lora
from condot.pipeline.checkpoint.store import load_state, load_tensors
from condot.pipeline.config.schema import Config, LogConfig, TrainConfig
from condot.pipeline.latent_space import LatentSpace
from condot.pipeline.launch import distributed, precision

SIZES = ("--model.width=32", "--model.depth=2", "--model.heads=2", "--model.patch_size=2")
STILL = ("--train.learning_rate=1e-30", "--train.max_steps=1")


@pytest.fixture(scope="module", autouse=True)
def threads(one_thread):
    """Curves are compared with one another."""


@pytest.fixture
def published(tmp_path):
    """A stock DiT of ten classes with random weights, one embedding of time and class for all its blocks."""
    torch.manual_seed(0)
    stock = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=1000, norm_eps=1e-6,
    )  # fmt: skip
    first = stock.transformer_blocks[0].norm1.emb
    stock.transformer_blocks[1].norm1.emb.load_state_dict(first.state_dict())
    with torch.no_grad():
        table = first.class_embedder.embedding_table.weight
        table[10:] = table[1000]  # only the first ten rows are classes
    stock.transformer_blocks[1].norm1.emb.load_state_dict(first.state_dict())
    stock.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def weights(run, step, part="model"):
    return {k.removeprefix(f"{part}."): v for k, v in load_tensors(run / f"checkpoint-{step}").items() if k.startswith(f"{part}.")}


def test_a_run_begins_with_published_weights_and_resumes_without_them(digits, published, tmp_path, capsys):
    """Noise is predicted, so the sign stays; after a step without length the weights are the converted ones, the average too."""
    run, noise = tmp_path / "run", ("--flow.predict=noise", "--flow.path=ddpm")
    assert fit(digits, run, *SIZES, *noise, *STILL, f"--init_from={published}") == 0
    expected = from_stock(DiTTransformer2DModel.from_pretrained(published), 1.0, num_classes=10).state_dict()
    for part in ("model", "ema"):
        found = weights(run, 1, part)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    shutil.rmtree(published)
    assert fit(digits, run, *SIZES, *noise, f"--init_from={published}", "--train.max_steps=2") == 0
    assert "were trained" not in capsys.readouterr().out
    assert fit(digits, tmp_path / "other", *SIZES, *noise, f"--init_from={published}") == 2
    assert "there is no such folder or file" in capsys.readouterr().err


def test_what_the_weights_were_trained_for_is_said_where_the_recipe_differs(digits, published, tmp_path, capsys):
    assert fit(digits, tmp_path / "run", *SIZES, *STILL, f"--init_from={published}") == 0
    assert "the weights were trained with flow.path=ddpm flow.predict=noise, and this recipe is another" in capsys.readouterr().out
    assert fit(digits, tmp_path / "run", *SIZES, f"--init_from={published}", f"--checkpoint.start_from={published}") == 2
    assert "give one of them" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_listed_with_what_would(digits, published, tmp_path, capsys):
    assert fit(digits, tmp_path / "run", "--model.width=48", "--model.depth=3", "--model.heads=2", f"--init_from={published}") == 2
    err = capsys.readouterr().err
    assert all(word in err for word in ("missing", "misshapen", "blocks.2.", "model.width=32", "model.depth=2")) and "Traceback" not in err
    assert (
        fit(
            digits,
            tmp_path / "run",
            "--model.kind=unet",
            "--model.block_channels",
            "32",
            "--model.head_width=32",
            f"--init_from={published}",
        )
        == 2
    )
    assert "model.kind=dit" in capsys.readouterr().err


def test_a_published_unet_begins_a_ddpm(digits, tmp_path):
    """An unconditional network of stock diffusers goes on as one; digits have classes, which begin afresh only where asked for."""
    torch.manual_seed(0)
    small = {"block_out_channels": (32,), "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    stock = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, attention_head_dim=32, num_class_embeds=11, **small)
    stock.save_pretrained(tmp_path / "stock")
    run = tmp_path / "run"
    words = ("--model.kind=unet", "--model.block_channels", "32", "--model.head_width=32", "--train.batch_size=4", "--flow.predict=noise")
    assert fit(digits, run, *words, *STILL, "--flow.path=ddpm", "--flow.time=discrete", f"--init_from={tmp_path / 'stock'}") == 0
    found, expected = weights(run, 1), stock.state_dict()
    assert all(torch.allclose(found[f"net.{name}"], value, rtol=0, atol=1e-20) for name, value in expected.items())


def test_a_stage_goes_on_from_its_own_checkpoint(digits, trained, tmp_path):
    """The same command resumes: what it started from is not taken a second time."""
    stage = f"--checkpoint.start_from={trained}"
    assert fit(digits, tmp_path / "whole", stage) == 0
    assert fit(digits, tmp_path / "cut", stage, "--train.max_steps=4") == 0
    assert fit(digits, tmp_path / "cut", stage) == 0
    one, two = (load_tensors(tmp_path / name / "checkpoint-12") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    left = tmp_path / "cut/.tmp-of-a-kill"
    left.mkdir()
    assert fit(digits, tmp_path / "cut", stage) == 0 and not left.exists(), "swept at the start, where the disk may be full"


def test_low_rank_additions_train_alone_resume_and_merge(digits, trained, tmp_path, capsys):
    """Nothing else moves; a resumed run is bitwise the uninterrupted one; sampled and exported they are part of the weights."""
    pytest.importorskip("peft", reason="peft is not installed: pip install 'condot[lora]'")
    words = ("--train.lora_rank=4", f"--checkpoint.start_from={trained}")
    with pytest.raises(AssertionError):
        assert fit(digits, tmp_path / "bad", *words[:1], "--train.lora_rank=-1") == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert fit(digits, whole, *words, "--export=true") == 0
    assert fit(digits, cut, *words, "--train.max_steps=4", "--checkpoint.every=4") == 0
    assert fit(digits, cut, *words) == 0
    one, two = (load_tensors(run / "checkpoint-12") for run in (whole, cut))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    before, after = weights(trained, 12, "ema"), weights(whole, 12)
    frozen = {name.replace(".base_layer", ""): value for name, value in after.items() if "lora_" not in name}
    assert frozen.keys() == before.keys() and all(torch.equal(frozen[name], before[name]) for name in before)
    moved = [name for name in after if "lora_B" in name]
    assert len(moved) == 4 and all(after[name].abs().max() > 0 for name in moved)
    assert sum("optim." in name and "base_layer" in name for name in one) == 0, "no moments of what is frozen"
    network = TrainedModel(whole).network
    average = weights(whole, 12, "ema")
    name = "blocks.0.attention.out"
    added = average[f"{name}.lora_B.default.weight"] @ average[f"{name}.lora_A.default.weight"] * (16 / 4)
    torch.testing.assert_close(network.state_dict()[f"{name}.weight"], average[f"{name}.base_layer.weight"] + added)
    assert sample.main(["export", "--run", str(whole), "--output", str(tmp_path / "folder")]) == 0
    first, again = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (whole / "export", tmp_path / "folder")
    )
    assert first == again, "what training exports, card and all, is what sample.py does"
    capsys.readouterr()
    assert fit(digits, cut, *words, "--train.lora_alpha=8", "--train.max_steps=14") == 2
    assert "lora is [4, 16.0] there and [4, 8.0] here" in capsys.readouterr().err


def test_additions_begin_by_the_seed_of_the_run(digits, trained, tmp_path):
    """The first halves, looked up: after a step without length they are those that the seed draws."""
    pytest.importorskip("peft", reason="peft is not installed: pip install 'condot[lora]'")
    assert fit(digits, tmp_path / "run", "--train.lora_rank=4", f"--checkpoint.start_from={trained}", "--seed=7", *STILL) == 0
    found = weights(tmp_path / "run", 1)
    for seed, same in ((7, True), (0, False)):
        ours = registry.build("dit", channels=1, resolution=8, num_classes=10, patch_size=2, width=32, depth=2, heads=2)
        add_lora(ours, 4, 16.0, seed=seed)
        begun = {name: value for name, value in ours.state_dict().items() if "lora_A" in name}
        assert len(begun) == 4 and all(torch.equal(found[name], value) is same for name, value in begun.items())


def test_the_measured_precision_is_kept(digits, tmp_path, monkeypatch):
    """A resumed run computes as it began, whatever would be faster now."""
    answers = iter(["bf16", "no"])
    monkeypatch.setattr(precision, "pick_faster_precision", lambda *given, **named: next(answers))
    run = tmp_path / "run"
    assert fit(digits, run, "--train.mixed_precision=auto", "--train.max_steps=2") == 0
    assert load_state(run / "checkpoint-2")["precision"] == "bf16"
    assert fit(digits, run, "--train.mixed_precision=auto", "--train.max_steps=4") == 0
    assert load_state(run / "checkpoint-4")["precision"] == "bf16"
    assert fit(digits, tmp_path / "new", "--train.mixed_precision=auto", "--train.max_steps=1") == 0
    assert load_state(tmp_path / "new" / "checkpoint-1")["precision"] == "no"


def test_precision_is_measured_on_the_device_that_trains(digits, monkeypatch):
    """meta stands for a device that is not the one networks are built on; four ranks of two portions share a batch of 32."""
    seen, asked = [], []
    monkeypatch.setattr(precision, "pick_faster_precision", lambda network, inputs: seen.append((network, inputs)) or "no")
    small, quiet = DiTConfig(width=32, depth=2, heads=2), LogConfig(report_to=("none",))
    config = Config(
        model=small, log=quiet, train=TrainConfig(batch_size=32, gradient_accumulation_steps=2, mixed_precision="auto", cpu_threads=1)
    )
    sources = TrainingData.open(DataConfig(shards=(str(digits),), resolution=8, channels=1), False)
    assert benchmark_precision(config, sources, LatentSpace.from_pixels(1, 8), 4, torch.device("meta")) == "no"
    ((network, inputs),) = seen
    assert {p.device.type for p in network.parameters()} == {part.device.type for part in inputs} == {"meta"} and len(inputs[0]) == 4
    AcceleratorState._reset_state(True)
    distributed.create_accelerator(config, distributed.init_distributed(config), None, lambda *given: asked.append(given) or "no")
    assert asked == [(1, PartialState().device)]


def test_recipe_and_constructors_know_the_same_fields():
    """What the section `model` says of a kind is what its constructor takes, with the same defaults where both have one."""
    import inspect
    from dataclasses import fields

    of_data = {"channels", "resolution", "num_classes", "text_width", "pooled_width", "outputs"}  # and of the objective
    for kind, spec in registry.NETWORKS.items():
        said = {item.name: item.default for item in fields(spec.config)}
        taken = inspect.signature(spec.network.__init__).parameters
        assert said.pop("kind") == kind
        presets = {"preset", "style", *next(iter(spec.presets.values()), {})} & said.keys() if spec.presets else set()
        assert said.keys() - {"preset", "style"} == taken.keys() - of_data - {"self"}, kind
        for name, value in said.items():
            if name not in presets and value is not None and taken[name].default is not inspect.Parameter.empty:
                assert value == taken[name].default, (kind, name)
    assert PREVIEW_CAPTIONS == 32


def test_a_network_that_is_told_sizes_trains_and_samples(digits, tmp_path):
    """All digits are 8 x 8 and whole: what the network is told is one condition, in training and in sampling."""
    run = tmp_path / "run"
    assert fit(digits, run, "--model.micro_conditions=true", "--log.sample_every=12", "--log.sample_steps=2") == 0
    assert (run / "samples" / "step-0000012.png").is_file()
    source = TrainedModel(run).build_model("cpu")
    network = TrainedModel(run).network
    x, t, labels = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5), torch.tensor([0, 1, 2])
    told = torch.tensor([[8.0, 8, 0, 0, 8, 8]]).expand(3, -1)
    with torch.no_grad():
        assert torch.equal(source.field(x, t, labels), network(x, t, labels, told))
        assert not torch.equal(source.field(x, t, labels), network(x, t, labels, told + 100))


def test_adapters_beside_weights_that_do_not_fit(digits, trained, tmp_path, capsys):
    """Another network, and a run that holds adapters itself: one line that says what differs, nothing written, no traceback."""
    pytest.importorskip("peft", reason="peft is not installed: pip install 'condot[lora]'")
    start, adapters = f"--checkpoint.start_from={trained}", "--train.lora_rank=2"
    for more in ((adapters, "--model.width=64"), ("--model.width=64",)):
        assert fit(digits, tmp_path / "run", start, *more) == 2
        error = capsys.readouterr().err
        assert "is of another network" in error and "there and F32" in error and "Give it the same section `model`" in error, error
    assert fit(digits, tmp_path / "lora", start, adapters, "--train.max_steps=1") == 0
    capsys.readouterr()
    for more in ((adapters,), ()):
        assert fit(digits, tmp_path / "next", f"--checkpoint.start_from={tmp_path / 'lora'}", *more) == 2
        error = capsys.readouterr().err
        assert (
            "It holds low-rank additions: export it, and give the folder as init_from" in error
            and error.count("\n") < 3
            and "Trace" not in error
        )


@pytest.mark.parametrize("seed", ["4294967296", "18446744073709551615"])
def test_seeds_of_64_bits(digits, trained, tmp_path, seed):
    """Above NumPy's 32 bits: they train, sample, and are seeds of their own."""
    assert fit(digits, tmp_path / "run", f"--seed={seed}", "--train.max_steps=1") == 0
    assert fit(digits, tmp_path / "low", f"--seed={int(seed) % 2**32}", "--train.max_steps=1") == 0
    one, two = (load_tensors(tmp_path / name / "checkpoint-0") for name in ("run", "low"))
    assert not torch.equal(one["model.enter.weight"], two["model.enter.weight"])
    pictures = []
    for number in (seed, str(int(seed) % 2**32)):
        words = ["--run", str(trained), "--num_inference_steps", "1", "--class_labels", "1", "--seed", number]
        assert sample.main([*words, "--output", str(tmp_path / f"{number}.png")]) == 0
        pictures.append((tmp_path / f"{number}.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_seeds_that_are_none(digits, trained, tmp_path, capsys):
    for seed in ("-1", "18446744073709551616"):
        assert fit(digits, tmp_path / "run", f"--seed={seed}") == 2
        assert f"seed={seed}: a seed is a whole number from 0 to 2^64 - 1" in capsys.readouterr().err
        assert sample.main(["--run", str(trained), "--seed", seed]) == 2
        assert f"--seed {seed}: a seed is a whole number from 0 to 2^64 - 1" in capsys.readouterr().err


def test_resuming_by_name_as_in_scripts_of_diffusers(digits, tmp_path, capsys):
    """`--resume_from_checkpoint checkpoint-4` is of the run's own folder, whatever lies where the command was given."""
    run = tmp_path / "run"
    assert fit(digits, run, "--train.max_steps=4") == 0
    for word in ("checkpoint-4", "latest", str(run / "checkpoint-4")):
        shutil.copytree(run, tmp_path / word.replace("/", "-"))
        capsys.readouterr()
        folder = tmp_path / word.replace("/", "-")
        assert fit(digits, folder, "--train.max_steps=5", f"--resume_from_checkpoint={word}") == 0
        assert "step 4 of 5" in capsys.readouterr().out and (folder / "checkpoint-5").is_dir()
    assert fit(digits, run, "--resume_from_checkpoint=checkpoint-7") == 2
    assert f"{run}/checkpoint-7 is not there; {run} holds checkpoint-4, checkpoint-0" in capsys.readouterr().err
    assert fit(digits, run, "--resume_from_checkpoint=checkpoint-0") == 2
    assert "older than checkpoint-4" in capsys.readouterr().err
    assert fit(digits, run, "--resume_from_checkpoint=checkpoint-4", "--dry_run") == 0
    assert f"goes on from {run}/checkpoint-4" in capsys.readouterr().out
