"""The model card and the curve in it: what was measured stands there, nothing else does, and the Hub's own reader reads it."""

import hashlib
import json
import math
import os
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
import yaml
from conftest import fit
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from condot.cli import evaluate as evaluate_command
from condot.cli import sample
from condot.core.printable import printable
from condot.pipeline.checkpoint.store import averages, load_state, raw_weights
from condot.pipeline.config.parse import config_from_mapping
from condot.pipeline.config.schema import Config
from condot.pipeline.evaluation.provenance import Provenance, hash_tensors, read_provenance
from condot.pipeline.export.load import load_flow_model
from condot.pipeline.export.loss_plot import SIZE, draw_loss, plot_loss, running_mean
from condot.pipeline.export.model_card import CardFacts, components_with_code, render_readme


@pytest.fixture
def folder(trained, tmp_path):
    """An export of one's own, to be spoilt."""
    return shutil.copytree(trained / "export", tmp_path / "export")


EVALUATION = {
    "samples": 1000, "accuracy": 0.972, "accuracy_of_held_out": 0.98, "diversity": 3.2, "diversity_of_real": 3.3, "nearest": 1.5,
    "nearest_of_held_out": 1.4, "frechet": 2.25, "frechet_of_train": 1.125, "feature_width": 64, "few": False,
    "guidance_scale": 2.0, "solver": "heun", "steps": 25,
}  # fmt: skip
RETRIEVAL = {
    "samples": 50, "candidates": 50, "top1": 0.5, "top1_interval": [0.37, 0.63], "top5": 0.8, "top5_interval": [0.67, 0.89],
    "mean_reciprocal_rank": 0.6, "chance": 0.02, "chance_of_five": 0.1, "chance_of_rank": 0.09,
}  # fmt: skip

CALL = "class_labels=[0], guidance_scale=2, num_inference_steps=25"
WHY = "no stock scheduler follows it"


OURS = Provenance(sha256="e" * 64, trained_sha256="a" * 64, step=12)
EVALUATED, RETRIEVED = (figures | Provenance.from_run("a" * 64, 12, "").as_dict() for figures in (EVALUATION, RETRIEVAL))
"""Figures of the weights that OURS names, as measured on the run."""


def card_of(run, folder, config=None, names=("zero", "one"), **told):
    card = CardFacts.from_run(run, 192, 12, torch.nn.Linear(2, 3), **{"provenance": OURS, **told})
    (folder / "README.md").write_text(
        render_readme(folder, config or Config(output_dir="/home/ann/runs/x"), names, card, 2.0, (CALL, CALL), WHY)
    )
    return ModelCard.load(folder / "README.md")


def test_the_card_tells_what_was_measured(trained, folder, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(EVALUATED))
    (run / "retrieval.json").write_text(json.dumps(RETRIEVED))
    card = card_of(run, folder, license="mit", datasets=("ann/scans",), repository="ann/digits")
    assert card.data.license == "mit" and card.data.datasets == ["ann/scans"] and card.data.pipeline_tag == "unconditional-image-generation"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        "accuracy": 0.972, "frechet_distance": 2.25, "top1_retrieval": 0.5,
    }  # fmt: skip
    assert card.data.eval_results[0].dataset_name == "ann/scans"
    assert "1,000 samples, solver heun, 25 steps, guidance 2." in card.text
    assert "| a classifier puts it into its class | 97.2% | 98.0% of held-out images |" in card.text
    assert "| Frechet distance to held-out images, 64 features | 2.250 | 1.125 of training images |" in card.text
    assert "| nearest to its own caption's image | 50.0% (37.0% to 63.0%) | 2.0% by chance |" in card.text
    assert "A dit of 9 parameters" in card.text and "2 classes: zero, one" in card.text and "192 images seen" in card.text
    assert 'from_pretrained("ann/digits")' in card.text and card.text.count("trust_remote_code") == 1 and "![loss" in card.text
    assert card.data.tags == ["condot", "flow-matching", "class-conditional"]
    assert "# digits\n" in card.text and "Nothing was measured" not in card.text
    assert yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])["output_dir"] == "x" and "/home" not in card.content


def evaluated(digits, *words):
    """What `condot evaluate` writes, of ten images."""
    assert sample.main(["evaluate", *words, "--reference", str(digits), "--num_images", "10", "--num_inference_steps", "1"]) == 0


@pytest.fixture
def quick(monkeypatch):
    """Figures in place of measured ones."""
    report = types.SimpleNamespace(as_dict=lambda: EVALUATION, meets=lambda *least: True)
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *given: report)


def on_card(run, *words):
    """Whether the exported card of a run has its figures."""
    assert sample.main(["export", "--run", str(run), *words]) == 0
    return (
        "97.2%" in (Path(words[words.index("--output") + 1]) if "--output" in words else run / "export").joinpath("README.md").read_text()
    )


def test_figures_are_of_exactly_the_weights_on_the_card(trained, digits, tmp_path, quick, capsys):
    """Measured on step 12, then two more steps; the finished command again; another average; the exported folder in the run's place."""
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "export/evaluation.json").unlink(missing_ok=True)
    evaluated(digits, "--run", str(run))
    figures = json.loads((run / "evaluation.json").read_text())
    state, tensors = load_state(run / "checkpoint-12"), averages(run / "checkpoint-12")
    assert (figures["step"], figures["ema"], figures["weights_sha256"]) == (state["step"], "", hash_tensors(tensors))
    assert on_card(run)
    assert "Measured on exactly these weights: of step 12, SHA-256" in (run / "export/README.md").read_text()
    for name in ("metrics.jsonl", "config.yaml"):
        os.utime(run / name)
    assert fit(digits, run, "--export=true") == 0, "the finished command again"
    assert "97.2%" in (run / "export/README.md").read_text() and (run / "export/evaluation.json").exists()
    capsys.readouterr()
    assert not on_card(run, "--ema", "raw", "--output", str(tmp_path / "raw"))
    assert "evaluation.json is left out of the card: it is of other weights (step 12, the first average)" in capsys.readouterr().out
    evaluated(digits, "--pipeline", str(tmp_path / "raw"))
    assert json.loads((tmp_path / "raw/evaluation.json").read_text())["ema"] == "raw"
    assert on_card(run, "--ema", "raw", "--output", str(tmp_path / "raw"))
    shutil.copy(tmp_path / "raw/evaluation.json", run / "export/evaluation.json")
    (run / "evaluation.json").unlink()
    assert not on_card(run), "what was measured on the raw weights is not told of the average, wherever it lies"
    assert fit(digits, run, "--train.max_steps=14") == 0
    os.utime(tmp_path / "raw/evaluation.json")
    (run / "evaluation.json").write_text(json.dumps(figures))  # an evaluation that began at step 12 and ends now
    capsys.readouterr()
    assert not on_card(run)
    assert "it is of other weights (step 12, the first average), and these are of step 14" in capsys.readouterr().out
    assert on_card(run, "--checkpoint", str(run / "checkpoint-12"), "--output", str(tmp_path / "twelve"))


def test_an_exported_folder_knows_its_weights(trained, digits, tmp_path, quick):
    """By the tensors in its files; figures stay with it, and are the run's too; weights that were changed are nobody's."""
    run = shutil.copytree(trained, tmp_path / "run")
    found = read_provenance(run / "export")
    file = load_file(run / "export/transformer/diffusion_pytorch_model.safetensors")
    assert (found.sha256, found.trained_sha256, found.step) == (hash_tensors(file), hash_tensors(averages(run / "checkpoint-12")), 12)
    evaluated(digits, "--pipeline", str(run / "export"))
    for _ in range(2):
        kept = json.loads((run / "export/evaluation.json").read_text())
        assert (kept["step"], kept["weights_sha256"], kept["trained_sha256"]) == (12, found.sha256, found.trained_sha256)
        assert on_card(run)
    file["pos_embed.proj.bias"] += 1
    save_file(file, run / "export/transformer/diffusion_pytorch_model.safetensors")
    other = read_provenance(run / "export")
    assert other.sha256 != found.sha256 and (other.trained_sha256, other.step) == ("", None)
    (run / "export/evaluation.json").write_text(json.dumps(EVALUATION | other.as_dict()))
    assert not on_card(run)
    (run / "export/evaluation.json").write_text("{}")
    load_flow_model(run / "export")


def test_samples_of_a_guide_are_told_so(trained, digits, tmp_path, quick):
    run = shutil.copytree(trained, tmp_path / "run")
    evaluated(digits, "--run", str(run), "--guide_run", str(trained), "--guide_ema", "raw")
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["guide_sha256"] == hash_tensors(raw_weights(trained / "checkpoint-12")) != figures["weights_sha256"]
    assert on_card(run) and "guided by another, weaker model" in (run / "export/README.md").read_text()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (json.dumps(EVALUATION), "it does not name the weights that it is of, as older ones did not: measure again"),
        (json.dumps(EVALUATED | {"weights_sha256": "b" * 64, "trained_sha256": "", "step": 9}), r"of other weights \(step 9"),
        (json.dumps({k: v for k, v in EVALUATED.items() if k != "few"}), "it lacks few"),
        (json.dumps(EVALUATED | {"accuracy": "<img src=x>"}), "accuracy='<img src=x>' is no figure"),
        (json.dumps(EVALUATED | {"frechet": math.nan}), "frechet=nan is no figure"),
        ("[1]", "it lacks samples"), ('{"top1": 1', "cannot be read"), ("[" * 10_000, "cannot be read"), ("3", "cannot be read"),
    ],
)  # fmt: skip
def test_figures_that_cannot_be_told_are_left_out_and_told(trained, folder, tmp_path, text, why, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "export/evaluation.json").unlink(missing_ok=True)
    (run / "evaluation.json").write_text(text)
    card = card_of(run, folder)
    assert re.search(rf"run/evaluation.json is left out of the card: .*{why}", capsys.readouterr().out)
    assert card.data.eval_results is None and "model_name" not in card.data.to_dict() and "97.2%" not in card.text
    assert "Nothing was measured on these weights" in card.text
    assert card.data.license == "unknown" and "No licence was given" in card.text


HOSTILE = (
    "[x](http://evil.example)", "<img src=x onerror=alert(1)>", "![x](http://evil.example/y.png)", "a|b|c", "one\n\n# two\n---\ntags: [x]",
    "---", "``` js", "`code` ``more``", "<!-- x", "**bold** _em_ ~~gone~~", "&lt;script&gt;", "$$x$$", "@ann", "http://evil.example",
    "www.evil.example", "\x1b[31mred", "\u202egnp", "</details><script>x</script>", "\\(x\\)",
)  # fmt: skip


@pytest.mark.parametrize("word", HOSTILE)
def test_strangers_words_are_only_words(trained, folder, word):
    """As names of classes, title, folder, split and recipe: CommonMark with GitHub's tables and links finds none but our own markup."""
    from markdown_it import MarkdownIt

    config = config_from_mapping(Config, {"output_dir": "runs/x", "data": {"shards": [f"/data/{word}"], "split": word or "x"}})
    title = " ".join(word.split())
    card = card_of(trained, folder, config, names=(word, "one"), title=title)
    plainly = card_of(
        trained, folder, config_from_mapping(Config, {"data": {"shards": ["/data/w"], "split": "w"}}), names=("w", "one"), title="w"
    )
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    mine, theirs = ([(t.type, t.tag) for t in flat(reader.parse(one.text))] for one in (card, plainly))
    assert mine == theirs, "the same headings, tables, links, code: a word is text and nothing else"
    shown = [t.content for t in flat(reader.parse(card.text)) if t.type == "text"]
    assert printable(title) in "".join(shown), "and is read as it is spelt"
    bare = re.sub(r"(?s)(`+)(?!`).+?(?<!`)\1(?!`)", "", card.text)  # GitHub links bare addresses too, and the Hub typesets formulas
    assert "://evil" not in bare and "www.evil" not in bare.lower() and "$$" not in bare and "\\\\(" not in bare
    head = yaml.safe_load(card.content.split("---\n")[1])
    assert head["library_name"] == "diffusers" and set(head) == set(yaml.safe_load(plainly.content.split("---\n")[1]))


def flat(tokens):
    return [
        inner for token in tokens for inner in ([token, *flat(token.children)] if token.children else [token]) if inner.type != "softbreak"
    ]


def test_the_head_holds_strangers_words_as_values(trained, folder):
    """YAML of the card: a title and a data set's folder that would be YAML by themselves come back as they were."""
    shutil.copytree(trained, folder.parent / "run")
    (folder.parent / "run/evaluation.json").write_text(json.dumps(EVALUATED))
    for word in ("a: [b", "--- x", "'#", "*x", "%y: &z", "tags: [evil]"):
        config = config_from_mapping(Config, {"data": {"shards": [f"/data/{word}"]}})
        head = card_of(folder.parent / "run", folder, config, title=word).data
        assert head.model_name == word and head.eval_results[0].dataset_name == word and head.tags[0] == "condot"


def test_the_card_names_code_by_hash_and_both_ways_to_load(trained, folder):
    """As a folder with a scheduler and a pipeline of ours will have it."""
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["scheduling_x_v1", "XScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler/scheduling_x_v1.py").write_text("a = 1\n")
    (folder / "pipeline_condot_v1.py").write_text("b = 2\n")
    assert components_with_code(index) == ["scheduler"] and components_with_code(
        {"_class_name": ["pipeline_x", "X"], "vae": ["diffusers", "V"]}
    ) == ["pipeline"]
    text = card_of(trained, folder).text
    assert f"| `scheduler/scheduling_x_v1.py` | `{hashlib.sha256(b'a = 1' + bytes([10])).hexdigest()}` |" in text
    assert f"| `pipeline_condot_v1.py` | `{hashlib.sha256(b'b = 2' + bytes([10])).hexdigest()}` |" in text
    assert 'from_pretrained("path/to/this/folder", trust_remote_code=True)' in text and "its scheduler is code of ours" in text
    assert 'custom_pipeline="pipeline_condot_v1", trust_remote_code=True)' in text and 'solver="heun"' in text


def test_the_card_of_a_text_model_links_its_origins(trained, folder, tmp_path):
    given = {"model": {"kind": "cross_dit"}, "init_from": "ann/base", "data": {"text_encoder": ["openai/clip"], "autoencoder": "ann/vae"}}
    card = card_of(trained, folder, config_from_mapping(Config, given))
    assert card.data.pipeline_tag == "text-to-image" and card.data.base_model == "ann/base"
    assert "captions, read by [openai/clip](https://huggingface.co/openai/clip)" in card.text and "the latents of [ann/vae]" in card.text
    stage = card_of(trained, folder, config_from_mapping(Config, {"checkpoint": {"start_from": "/runs/*stage*"}}))
    assert "trained from the weights of another run, `*stage*` by condot" in stage.text and "from scratch" not in stage.text
    (tmp_path / "w").mkdir()
    local = card_of(trained, folder, config_from_mapping(Config, given | {"init_from": str(tmp_path / "w")}))
    assert local.data.base_model is None and str(tmp_path) not in local.content


# --- the curve


def test_the_curve_is_of_the_values_and_the_same_points_give_the_same_bytes(tmp_path):
    points = [(i, 10.0 - i) for i in range(10)]
    assert plot_loss(points, tmp_path / "a.png", x_label="images seen", y_label="loss")
    assert plot_loss(points[::-1], tmp_path / "b.png", x_label="images seen", y_label="loss")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == SIZE and "Software" not in image.info
    assert not plot_loss([(1, 2.0)], tmp_path / "c.png", x_label="", y_label="") and not (tmp_path / "c.png").exists()


def test_the_axes_show_every_value_and_the_running_mean_below_their_labels():
    points = [(1000 * i, (7.0 * i) % 5 + 1) for i in range(60)]
    (axes,) = draw_loss(points, x_label="images seen", y_label="loss").axes
    values, mean = axes.get_lines()
    assert list(zip(*values.get_data(), strict=True)) == points
    assert list(zip(*mean.get_data(), strict=True)) == running_mean(points)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("images seen", "loss")
    assert axes.get_xlim() == (0, 59_000) and axes.get_ylim()[0] < 1 and axes.get_ylim()[1] > 5 and not axes.yaxis_inverted()
    assert axes.xaxis.get_major_formatter()(20_000) == "20k"


@pytest.mark.parametrize(("last", "scale"), [(0.5, "log"), (0.51, "linear"), (-1.0, "linear")])
def test_values_a_factor_of_20_apart_have_a_logarithmic_axis(last, scale):
    (axes,) = draw_loss([(0, 10.0), (1, last)], x_label="", y_label="").axes
    assert axes.get_yscale() == scale


def test_a_curve_looks_alike_whatever_the_users_style_and_leaves_it_alone(tmp_path):
    import matplotlib

    points = [(0, 1.0), (1, 2.0)]
    plot_loss(points, tmp_path / "a.png", x_label="x", y_label="y")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        plot_loss(points, tmp_path / "b.png", x_label="x", y_label="y")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_running_mean_keeps_a_line_and_flattens_noise():
    line = [(i, 3.0 * i) for i in range(100)]
    assert all(abs(a[1] - b[1]) < 1e-9 for a, b in zip(running_mean(line), line, strict=True))
    assert {round(y, 9) for _, y in running_mean([(i, float(i % 2)) for i in range(100)], 0.05)[5:-5]} == {
        round(5 / 11, 9),
        round(6 / 11, 9),
    }
