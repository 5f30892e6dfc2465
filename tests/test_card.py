"""The model card and the curve in it: what was measured stands there, nothing else does, and the Hub's own reader reads it."""

import hashlib
import json
import os
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import sample
from pipeline.card import Card, own_parts, readme
from pipeline.config import Config
from pipeline.curve import SIZE, draw_curve, log_ticks, running_mean, ticks
from pipeline.folder import open_folder
from pipeline.recipe import build


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


def card_of(run, folder, config=None, **told):
    card = Card.of(run, 192, 12, torch.nn.Linear(2, 3), **told)
    (folder / "README.md").write_text(
        readme(folder, config or Config(output_dir="/home/ann/runs/x"), ("zero", "one"), card, 2.0, (CALL, CALL), WHY)
    )
    return ModelCard.load(folder / "README.md")


def test_the_card_tells_what_was_measured(trained, folder, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    (run / "retrieval.json").write_text(json.dumps(RETRIEVAL))
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


def test_figures_stay_with_the_export(trained, tmp_path):
    """`evaluate --pipeline` leaves them in the folder that the next export replaces: they go along, unlisted."""
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "export/evaluation.json").write_text(json.dumps(EVALUATION))
    for _ in range(2):
        assert sample.main(["export", "--run", str(run)]) == 0
        assert json.loads((run / "export/evaluation.json").read_text()) == EVALUATION
        assert "97.2%" in (run / "export/README.md").read_text()
    (run / "export/evaluation.json").write_text("{}")
    open_folder(run / "export")


def test_figures_of_other_weights_are_left_out(trained, folder, tmp_path):
    """evaluation.json from before training went on, and one that is none."""
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "export/evaluation.json").unlink(missing_ok=True)
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    (run / "retrieval.json").write_text('{"top1": 1')
    os.utime(run / "evaluation.json", (1, 1))
    card = card_of(run, folder)
    assert (
        card.data.eval_results is None
        and "model_name" not in card.data.to_dict()
        and "97.2%" not in card.text
        and "Nothing was measured on these weights" in card.text
    )
    assert card.data.license == "unknown" and "No licence was given" in card.text


def test_the_card_names_code_by_hash_and_both_ways_to_load(trained, folder):
    """As a folder with a scheduler and a pipeline of ours will have it."""
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["scheduling_x_v1", "XScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler/scheduling_x_v1.py").write_text("a = 1\n")
    (folder / "pipeline_condot_v1.py").write_text("b = 2\n")
    assert own_parts(index) == ["scheduler"] and own_parts({"_class_name": ["pipeline_x", "X"], "vae": ["diffusers", "V"]}) == ["pipeline"]
    text = card_of(trained, folder).text
    assert f"| `scheduler/scheduling_x_v1.py` | `{hashlib.sha256(b'a = 1' + bytes([10])).hexdigest()}` |" in text
    assert f"| `pipeline_condot_v1.py` | `{hashlib.sha256(b'b = 2' + bytes([10])).hexdigest()}` |" in text
    assert 'from_pretrained("path/to/this/folder", trust_remote_code=True)' in text and "its scheduler is code of ours" in text
    assert 'custom_pipeline="pipeline_condot_v1", trust_remote_code=True)' in text and 'solver="heun"' in text


def test_the_card_of_a_text_model_links_its_origins(trained, folder, tmp_path):
    given = {"model": {"kind": "cross_dit"}, "init_from": "ann/base", "data": {"text_encoder": ["openai/clip"], "autoencoder": "ann/vae"}}
    card = card_of(trained, folder, build(Config, given))
    assert card.data.pipeline_tag == "text-to-image" and card.data.base_model == "ann/base"
    assert "captions, read by [openai/clip](https://huggingface.co/openai/clip)" in card.text and "the latents of [ann/vae]" in card.text
    (tmp_path / "w").mkdir()
    local = card_of(trained, folder, build(Config, given | {"init_from": str(tmp_path / "w")}))
    assert local.data.base_model is None and str(tmp_path) not in local.content


# --- the curve


def test_the_curve_lies_where_the_values_are(tmp_path):
    """A falling line: dark at its upper left and lower right, light where it is not; the same points give the same bytes."""
    points = [(i, 10.0 - i) for i in range(10)]
    assert draw_curve(points, tmp_path / "a.png", x_label="images seen", y_label="loss")
    assert draw_curve(points[::-1], tmp_path / "b.png", x_label="images seen", y_label="loss")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    image = Image.open(tmp_path / "a.png")
    blue = torch.tensor(
        [[p[2] > p[0] + 60 and p[0] < 120 for p in (image.getpixel((x, y)) for x in range(64, 704))] for y in range(16, 352)]
    )
    rows, columns = blue.nonzero().double().T
    assert image.size == SIZE and len(rows) > 500
    assert torch.corrcoef(torch.stack([rows, columns]))[0, 1] > 0.99, "down to the right, rows count from the top"
    assert not draw_curve([(1, 2.0)], tmp_path / "c.png", x_label="", y_label="") and not (tmp_path / "c.png").exists()


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] and ticks(0, 192_000) == [0, 50_000, 100_000, 150_000]
    assert log_ticks(0.1, 2.5) == pytest.approx([0.1, 0.2, 0.5, 1, 2]) and log_ticks(1, 2e6) == pytest.approx([10.0**k for k in range(7)])


def test_the_running_mean_keeps_a_line_and_flattens_noise():
    line = [(i, 3.0 * i) for i in range(100)]
    assert all(abs(a[1] - b[1]) < 1e-9 for a, b in zip(running_mean(line), line, strict=True))
    assert {round(y, 9) for _, y in running_mean([(i, float(i % 2)) for i in range(100)], 0.05)[5:-5]} == {
        round(5 / 11, 9),
        round(6 / 11, 9),
    }
