"""A user's own files add to every table: the examples of docs/extending.md, cut out and run; and plugins are run only if named."""

import json
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, arguments, command, fit

from condot.cli import COMMANDS, sample, train
from condot.core import plugins
from condot.core.plugins import explain_missing, load_plugins, loaded_plugins, split_plugin_words, unload_plugins
from condot.core.registry import Registry, UnknownKindError
from condot.data.prepare.command import main as prepare
from condot.data.storage.shard_reader import Shards
from condot.pipeline.checkpoint.store import CheckpointManager, load_state
from condot.pipeline.config.objective import TrainingObjective
from condot.pipeline.config.parse import config_from_mapping, config_to_mapping, parse, parse_collecting_errors
from condot.pipeline.config.schema import ALIASES, Config, FlowConfig
from condot.pipeline.evaluation.metrics import METRICS
from condot.pipeline.evaluation.results import results_section
from condot.pipeline.export.scheduler_map import build_scheduler, export_form
from condot.pipeline.flow import DDPM, ODE_SOLVERS, PATHS, TIMESTEP_DISTRIBUTIONS, VE, VP, WEIGHTINGS, SubVP, uniform_grid
from condot.pipeline.training.resume_rules import find_differences, run_facts

PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.S))


@pytest.fixture
def plugin(tmp_path):
    """Write an example of the page to a file; all that plugins added is taken back after the test."""

    def write(name, text=None):
        path = tmp_path / name
        path.write_text(EXAMPLES[name] if text is None else text)
        return str(path)

    unload_plugins()
    yield write
    unload_plugins()


@pytest.fixture
def quick(monkeypatch):
    """The judge of `evaluate` need not be a good one here."""
    monkeypatch.setattr("condot.pipeline.evaluation.classifier.MAX_EPOCHS", 1)


@pytest.fixture
def bent(plugin):
    """The example of a path, loaded."""
    path = plugin("bent_path.py")
    load_plugins([path])
    return path


def test_the_page_has_one_example_for_each_table():
    assert set(EXAMPLES) == {
        *("bent_path.py", "sigmoid_weighting.py", "kumaraswamy_times.py", "ralston_solver.py", "contrast_metric.py"),
        *("frames_source.py", "csv_tracker.py", "notebook.py", "toy_network.py", "huber_objective.py", "power_regulariser.py"),
        *("norm_callback.py", "count_command.py"),
    }


def test_the_path_has_the_derivatives_it_says_and_travels_to_diffusers(bent):
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    path = PATHS["bent"]()
    (a, b), (da, db) = torch.func.jvp(lambda t: path(t)[:2], (t,), (torch.ones_like(t),))
    torch.testing.assert_close(torch.stack([a, b, da, db]), torch.stack(list(path(t))))
    torch.testing.assert_close(path.time_from_log_snr(path.log_snr(t)), t)
    flow = FlowConfig(path="bent", path_options=type(path)(-0.4))
    scheduler = build_scheduler(flow)
    assert not export_form(flow).stock and scheduler.config.path == "table"
    for sigma in (0.0004, 0.2503, 0.97):
        assert scheduler.coefficients(sigma)[0] == pytest.approx((1 - sigma) * (1 - 0.4 * sigma), rel=1e-8)


def test_the_weighting_is_the_sigmoid_of_the_log_signal_to_noise_ratio(plugin):
    """On the data prediction W = SNR sigmoid(bias - log SNR), formed without a logarithm."""
    load_plugins([plugin("sigmoid_weighting.py")])
    c = PATHS["cosine"]()(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    snr = (c.a / c.b) ** 2
    torch.testing.assert_close(WEIGHTINGS["sigmoid"](-2.0)("data", c), snr * torch.sigmoid(-2.0 - torch.log(snr)))
    objective = TrainingObjective(FlowConfig(weighting="sigmoid", weighting_options=WEIGHTINGS["sigmoid"](-2.0)), (1, 2, 2), 4)
    assert objective.loss_function.weighting.bias == -2.0


def test_the_distribution_of_times_is_one(plugin):
    """Its density is one over the slope of its quantile, and a shift goes around it."""
    load_plugins([plugin("kumaraswamy_times.py")])
    law, u = TIMESTEP_DISTRIBUTIONS["kumaraswamy"](3.0, 1.5), torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    t, slope = torch.func.jvp(law.quantile, (u,), (torch.ones_like(u),))
    torch.testing.assert_close(law.density(t), 1 / slope)
    built = parse(Config, ["--flow.time=kumaraswamy", "--flow.time.a=3", "--flow.time_shift=2"]).flow.build_timestep_distribution()
    assert built.shift == 2 and built.distribution == TIMESTEP_DISTRIBUTIONS["kumaraswamy"](a=3.0)


def test_the_solver_is_of_second_order(plugin):
    """dx/dt = -x from 1: a quarter of the error with half the steps."""
    load_plugins([plugin("ralston_solver.py")])
    start = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(ODE_SOLVERS["ralston"](lambda x, t: -x, start, uniform_grid(n)).x.item() - np.exp(-1)) for n in (20, 40)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_a_run_on_a_path_of_a_plugin_is_trained_resumed_sampled_exported_and_needs_its_file(plugin, digits, tmp_path, capsys):
    """Few steps; the checkpoint and the export record the hash, and without the file each says which one is missing."""
    file, run = plugin("bent_path.py"), tmp_path / "run"
    words = ("--flow.path=bent", "--flow.path.bend=0.3", "--train.max_steps=4", "--export=true")
    assert fit(digits, run, *words, "--plugin", file, "--dry_run") == 0 and not run.exists()
    assert fit(digits, run, *words, "--plugin", file) == 0
    state = load_state(CheckpointManager(run, 1).latest())
    record = [{"name": "bent_path.py", "sha256": loaded_plugins()[0]["sha256"]}]
    assert state["plugins"] == record and state["facts"]["flow"]["path"] == {"kind": "bent", "bend": 0.3}
    assert yaml.safe_load((run / "config.yaml").read_text())["flow"]["path"] == {"kind": "bent", "bend": 0.3}
    assert json.loads((run / "export" / "provenance.json").read_text())["plugins"] == record
    from diffusers import DiffusionPipeline

    unload_plugins()
    pipeline = DiffusionPipeline.from_pretrained(run / "export", trust_remote_code=True)
    assert pipeline.scheduler.config.path == "table"
    output = str(tmp_path / "x.png")
    for source in (("--run", str(run)), ("--pipeline", str(run / "export"))):
        drawn = [*source, "--num_images=2", "--num_inference_steps=2", "--output", output]
        assert sample.main(drawn) == 2
        assert "trained with bent_path.py (sha256 " in (said := capsys.readouterr().err) and "--plugin FILE" in said
        assert sample.main([*drawn, "--plugin", file]) == 0
        unload_plugins()
    assert fit(digits, run, *words[:1], "--train.max_steps=6") == 2
    assert "trained with bent_path.py" in capsys.readouterr().err
    edited = plugin("bent_path.py", EXAMPLES["bent_path.py"] + "\n# edited\n")
    other = [word.replace("bend=0.3", "bend=0.2") for word in words]
    assert fit(digits, run, *other, "--plugin", edited) == 2
    assert "0.3" in capsys.readouterr().err
    assert fit(digits, run, *words[:2], "--train.max_steps=6", "--plugin", edited) == 0
    assert "bent_path.py was edited: its sha256 was" in capsys.readouterr().out


def test_a_metric_of_a_plugin_is_printed_kept_and_on_the_card(plugin, quick, trained, digits, tmp_path, capsys):
    output = tmp_path / "evaluation.json"
    words = ["evaluate", "--run", str(trained), "--reference", str(digits), "--num_images=20", "--num_inference_steps=2"]
    goals = ["--min_accuracy=0", "--min_diversity=0", "--min_nearest=0", "--output", str(output)]
    assert sample.main([*words, *goals, "--plugin", plugin("contrast_metric.py")]) == 0
    assert re.search(r"contrast within an image +0\.\d{3}   beside 0\.\d{3} of held-out images", capsys.readouterr().out)
    figures = json.loads(output.read_text())
    held_out = Shards(str(digits), "val")
    from condot.data.loader.read_samples import read_images

    expected = read_images(held_out, 1, 8)[0].flatten(1).std(1).mean().item()
    assert figures["contrast_of_held_out"] == pytest.approx(expected) and 0 < figures["contrast"] < 1
    unload_plugins()
    assert "contrast" not in METRICS
    assert f"| contrast within an image | {figures['contrast']:.3f} |" in results_section(figures, {}).replace("&#46;", ".")


def test_a_metric_that_gives_no_figure_is_named(plugin, quick, trained, digits, tmp_path, capsys):
    text = EXAMPLES["contrast_metric.py"].replace("images.flatten(1).std(1).mean().item()", "float('nan')")
    words = ["evaluate", "--run", str(trained), "--reference", str(digits), "--num_images=20", "--num_inference_steps=1"]
    assert sample.main([*words, "--output", str(tmp_path / "e.json"), "--plugin", plugin("contrast_metric.py", text)]) == 2
    assert re.search(r"metric contrast: contrast\w*=nan; it returns a finite number", capsys.readouterr().err)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_of_a_plugin_is_packed_by_worker_processes_too(plugin, tmp_path, workers):
    film = np.random.default_rng(0).integers(0, 256, (60, 11, 13, 3), np.uint8)
    np.save(tmp_path / "film.npy", film)
    words = ["frames", str(tmp_path / "film.npy"), "--output", str(tmp_path / "shards"), "--seed", "1", "--shard_size", "10kB"]
    assert prepare([*words, "--workers", str(workers), "--plugin", plugin("frames_source.py")]) == 0
    from condot.data.loader.read_samples import read_captions, read_images

    shards = Shards(str(tmp_path / "shards"), "train")
    images, captions = read_images(shards, 3, 11)[0], read_captions(shards, "txt", range(60))
    assert sorted(captions) == sorted(f"frame {number}" for number in range(60)) and len(images) == 60


def test_a_tracker_of_a_plugin_gets_every_line(plugin, digits, tmp_path):
    words = ("--log.report_to=csv", "--train.max_steps=4", "--plugin", plugin("csv_tracker.py"))
    assert fit(digits, tmp_path / "run", *words) == 0
    lines = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    assert {step for step, name, _ in lines if name == "loss"} == {"2", "4"}


def test_network_objective_regulariser_and_callback_of_plugins_train_one_run(plugin, digits, tmp_path, capsys):
    """Each leaves its trace; the loss is the sum that the recipe asks for."""
    words = ["--model.kind=toy", "--model.width=16", "--model.depth=1", "--train.max_steps=4", "--log.every=1", "--flow.objective=huber"]
    for name in ("toy_network.py", "huber_objective.py", "power_regulariser.py", "norm_callback.py"):
        words += ["--plugin", plugin(name)]
    words += ["--flow.objective.delta=0.5", "--flow.regularisers.power.weight=0.1"]
    shared = [word for word in arguments(digits, tmp_path / "run") if not word.startswith("--model.")]
    assert command(*shared, *words) == 0
    assert capsys.readouterr().out.count("the weights' norm is") == 1
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(0 < line["far"] < 1 for line in lines)
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/huber"] + 0.1 * line["loss/power"], rel=1e-4)
    assert CheckpointManager(tmp_path / "run", 1).latest().name == "checkpoint-4"


def test_the_network_of_the_page_is_the_one_that_test_networks_tries():
    assert EXAMPLES["toy_network.py"] == (ROOT / "tests/toy_network.py").read_text()


def test_a_command_of_a_plugin(plugin, digits, capsys):
    load_plugins([plugin("count_command.py")])
    count = COMMANDS["count"].target
    assert count([str(digits)]) == 0 and capsys.readouterr().out == f"{len(list(digits.glob('*.tar')))}\n"
    with pytest.raises(ValueError, match="name one folder of shards"):
        count([])


def test_from_python(plugin, tmp_path, monkeypatch):
    plugin("bent_path.py")
    monkeypatch.chdir(tmp_path)
    exec(EXAMPLES["notebook.py"], {})
    assert "bent" in PATHS


def test_help_and_mistakes_know_the_options_of_a_chosen_kind(bent, capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--flow.path=bent", "--help"], ALIASES)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--flow.path.bend FLOAT above 0 leaves the noise faster, below 0 slower; -1 < bend < 1 (default: 0.5)" in text
    assert "--flow.path{condot,cosine,vp,sub_vp,ve,edm,ddpm,ddpm_scaled_linear,ddpm_cosine,bent}" in text.replace(" ", "")
    mistakes = parse_collecting_errors(Config, ["--flow.path=bent", "--flow.path.bnd=3", "--flow.path.bend=many"])[1]
    assert any("did you mean bend?" in one for one in mistakes) and any("'many'" in one for one in mistakes)
    with pytest.raises(ValueError, match=r"bend=1\.5 of the path bent: between -1 and 1"):
        parse(Config, ["--flow.path=bent", "--flow.path.bend=1.5"])


WAYS = {
    "words": (["--flow.path=ve", "--flow.path.sigma_max=348"], ""),
    "kind": (["--flow.path.kind=ve", "--flow.path.sigma_max", "348"], ""),
    "nested": ([], "flow: {path: {kind: ve, sigma_max: 348}}"),
    "dotted": ([], "flow.path: ve\nflow.path.sigma_max: 348"),
    "over": (["--flow.path.sigma_max=348"], "flow: {path: {kind: ve, sigma_max: 3}}"),
}


@pytest.mark.parametrize("way", WAYS)
def test_options_of_a_kind_are_said_in_many_ways_and_kept_in_one(way, tmp_path):
    words, text = WAYS[way]
    if text:
        (tmp_path / "r.yaml").write_text(text)
        words = ["--config", str(tmp_path / "r.yaml"), *words]
    config = parse(Config, words)
    assert config.flow == FlowConfig(path="ve", path_options=VE(sigma_max=348.0)) and config.flow.build_path().sigma_max == 348
    kept = config_to_mapping(config)
    assert kept["flow"]["path"] == {"kind": "ve", "sigma_min": 0.01, "sigma_max": 348.0} and config_from_mapping(Config, kept) == config


def test_a_bare_name_and_its_defaults_are_what_runs_of_before_recorded():
    """The facts of a run on a bare name are to the letter those of before; options make another run."""
    options = ([], ["--flow.path.sigma_max=50"], ["--flow.path.sigma_max=9"])
    bare, said, other = (parse(Config, ["--flow.path=ve", *more]) for more in options)
    assert bare == said and config_to_mapping(bare)["flow"]["path"] == "ve" and bare.flow.path_options is None
    assert not {"path_options", "time_options", "weighting_options"} & set(config_to_mapping(bare)["flow"])
    (difference,) = find_differences(run_facts(bare, "x"), run_facts(other, "x"))
    assert difference.startswith("flow.path is ve there and {'kind': 've'")


def test_another_kind_on_the_command_line_drops_the_options_of_the_recipe(tmp_path):
    (tmp_path / "base.yaml").write_text("flow: {path: {kind: ve, sigma_max: 3}, time: {kind: mode, scale: 1.0}}\ndata: {caption: txt}")
    (tmp_path / "r.yaml").write_text("extends: base.yaml\nflow: {path: {sigma_min: 0.5}}\ndata: {caption: {json.a: 1}}")
    extended = parse(Config, ["--config", str(tmp_path / "r.yaml")])
    assert extended.flow.path_options == VE(0.5, 3.0) and extended.flow.time_scale == 1.0 and extended.data.caption == "json.a=1"
    flow = parse(Config, ["--config", str(tmp_path / "r.yaml"), "--flow.path=vp"]).flow
    assert flow.path == "vp" and flow.path_options is None


def test_older_fields_are_the_options_of_older_kinds():
    new = parse(Config, ["--flow.time=logit_normal", "--flow.time.mean=0.5", "--flow.weighting=min_snr", "--flow.weighting.gamma=3"])
    assert new == parse(Config, ["--flow.time=logit_normal", "--flow.time_mean=0.5", "--flow.weighting=min_snr", "--flow.min_snr_gamma=3"])
    with pytest.raises(ValueError, match=r"flow\.time\.mean=1 beside flow\.time_mean=2: both say the same"):
        parse(Config, ["--flow.time=logit_normal", "--flow.time.mean=1", "--flow.time_mean=2"])


REFUSED = {
    "an option of another kind": (["--flow.path.sigma_max=3"], r"flow\.path\.sigma_max is an option of flow\.path=ve or edm"),
    "a kind that is not there": (["--flow.path=powr"], "one of your own comes with --plugin FILE"),
    "numbers that cannot be": (["--flow.path=ve", "--flow.path.sigma_max=0.001"], r"flow\.path: noise levels .*sigma_max=0\.001"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_kind_does_not_take_is_refused(what):
    words, said = REFUSED[what]
    with pytest.raises(ValueError, match=said):
        parse(Config, words)


@pytest.mark.parametrize("key", ["plugin", "plugins"])
def test_a_recipe_names_no_code(key, tmp_path, capsys):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "r.yaml").write_text(f"{key}: {tmp_path / 'evil.py'}")
    assert train.main(["--config", str(tmp_path / "r.yaml")]) == 2
    assert "names no code to run" in capsys.readouterr().err and not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="unknown key 'plugin"):
        config_from_mapping(Config, {key: "evil.py"})


BROKEN = {
    "no file": (None, "no Python file there"),
    "nothing": ("x = 1", "it registers nothing"),
    "syntax": ("x = (", "line 1: SyntaxError"),
    "fails": ("from condot.pipeline.flow import PATHS, VE\nPATHS.add('mine', VE)\n1 / 0", "line 3: ZeroDivisionError"),
    "taken": ("from condot.pipeline.flow import PATHS, VE\nPATHS.add('ve', VE)", "'ve' is registered already, by condot itself"),
    "name": ("from condot.pipeline.flow import PATHS, VE\nPATHS.add('my path', VE)", "Use 'my_path'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plugin_is_refused_whole(what, plugin):
    """With its line, and nothing of it stays."""
    text, said = BROKEN[what]
    before = list(PATHS)
    with pytest.raises(ValueError, match=re.escape(said)):
        load_plugins([plugin("broken.py", text) if text else "/nowhere/broken.py"])
    assert list(PATHS) == before and not loaded_plugins() and "condot_plugin_broken" not in sys.modules


def test_a_plugin_is_loaded_once_and_anew_when_it_was_edited(plugin):
    first = load_plugins([plugin("bent_path.py")])[0]
    assert load_plugins([str(first.path)])[0] is first and PATHS.source("bent") == "bent_path.py" and PATHS["bent"]().bend == 0.5
    second = load_plugins([plugin("bent_path.py", EXAMPLES["bent_path.py"].replace("float = 0.5", "float = 0.25"))])[0]
    assert second.sha256 != first.sha256 and PATHS["bent"]().bend == 0.25 and len(loaded_plugins()) == 1


def test_the_words_of_a_command_line():
    assert split_plugin_words(["a", "--plugin", "x.py", "--b=1", "--plugin=y.py"]) == (["x.py", "y.py"], ["a", "--b=1"])
    for words in (["--plugin"], ["--plugin", "--b"], ["--plugin="]):
        with pytest.raises(ValueError, match="name a Python file"):
            split_plugin_words(words)


def test_what_a_stranger_records_of_plugins_is_checked():
    with pytest.raises(UnknownKindError, match=r"trained with a\.py \(sha256 b\)"), explain_missing([{"name": "a.py", "sha256": "b"}, 5]):
        PATHS.lookup("nope")
    for record in (None, 7, [{"name": 3}], [{"name": "a" * 999, "sha256": "b"}]):
        assert plugins.valid_record(record) == []


def test_a_table_refuses_a_name_twice_and_names_the_nearest():
    table = Registry("thing", {"alpha": 1})
    table.register("beta")(2)
    assert dict(table) == {"alpha": 1, "beta": 2} and table["beta"] == 2 and table.get("gamma") is None
    with pytest.raises(ValueError, match="'alpha' is registered already"):
        table.add("alpha", 3)
    with pytest.raises(UnknownKindError, match=r"thing 'alhpa' is unknown: choose one of alpha, beta \(did you mean alpha\?\)"):
        table.lookup("alhpa")


def test_what_cannot_travel_is_refused_at_start(plugin, digits, tmp_path, capsys):
    """A path that a table misses, and DDPM steps that lie between a thousand; unless no export is asked for."""
    text = EXAMPLES["bent_path.py"].replace("1 + self.bend * (1 - 2 * t)", "1 + self.bend * (1 - t)")
    words = ("--flow.path=bent", "--train.max_steps=1", "--plugin", plugin("bent_path.py", text))
    assert fit(digits, tmp_path / "run", *words, "--export=true") == 2 and not (tmp_path / "run").exists()
    assert "flow.path=bent cannot be exported: a table" in (said := capsys.readouterr().err) and "--export=false" in said
    with pytest.raises(ValueError, match=r"flow\.path\.steps=300 cannot be exported .* divisor"):
        export_form(FlowConfig(path="ddpm", path_options=DDPM(steps=300)))


TRAVELLING = {
    "vp": VP(0.2, 15.0),
    "sub_vp": SubVP(0.2, 10.0),
    "ve": VE(0.02, 348.0),
    "ddpm": DDPM("cosine", 500),
    "ddpm_scaled_linear": DDPM("scaled_linear", 1000, 8.5e-4, 0.012),
}


@pytest.mark.parametrize("name", TRAVELLING)
@pytest.mark.parametrize("predict", ["velocity", "noise"])
def test_a_path_with_options_is_exported_as_it_is(name, predict):
    """Our own scheduler's coefficients, or the stock one's sums of variances, at timesteps are those of the path."""
    path = TRAVELLING[name]
    scheduler = build_scheduler(FlowConfig(path=name, path_options=path, predict=predict))
    for k in (1, 123, 999):
        a, b = (part.item() for part in path(torch.tensor(1 - k / 1000, dtype=torch.float64))[:2])
        if hasattr(scheduler, "coefficients"):
            assert scheduler.coefficients(k / 1000)[:2] == pytest.approx((a, b), rel=1e-6)
        else:  # in single precision
            total = scheduler.alphas_cumprod[k].item()
            assert (total, 1 - total) == pytest.approx((a**2, b**2), rel=1e-4, abs=1e-6)


def test_a_dry_run_without_the_plugin_names_the_kind(digits, tmp_path, capsys):
    unload_plugins()
    assert train.main([*arguments(digits, tmp_path / "run", "--flow.path=bent"), "--dry_run"]) == 2
    assert "path 'bent' is unknown" in capsys.readouterr().out
