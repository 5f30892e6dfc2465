"""A small round of `benchmarks/fuzz.py`: damaged files of every kind end as counted bad samples, in packing, in looking and in training."""

from benchmarks.fuzz import Fuzz
from benchmarks.fuzz_seeds import containers, images


def test_of_damaged_files_come_counted_bad_samples_and_nothing_else(tmp_path):
    fuzz = Fuzz(tmp_path, seed=1)
    fuzz.containers(6 * len(containers()))
    fuzz.round(0, images(), 6 * len(images()))
    assert not fuzz.findings, "\n".join(f"{found['what']}: {found['why']}" for found in fuzz.findings)
    assert fuzz.steps == 3 and fuzz.replaced > 0, "training met none of the damage"
    packed, written = fuzz.packed.total(), fuzz.files.total()
    assert 0.2 * written < packed < 0.9 * written, f"{packed} of {written} packed: the damage is all too much, or none"
