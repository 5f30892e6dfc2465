"""Places that condot writes to are folders of this machine: a URL is refused and never becomes a folder's name."""

import io
import tarfile

import pytest

from condot.core.data_config import DataConfig
from condot.data.prepare.command import main
from condot.pipeline.config.schema import Config
from tests.shardmaker import png

URL = "https://ann:5ECRET@host/x?sig=5ECRET"


@pytest.mark.parametrize("make", [lambda: Config(output_dir=URL), lambda: DataConfig(encoded=URL), lambda: DataConfig(cache_dir=URL)])
def test_a_url_is_no_folder(make):
    with pytest.raises(ValueError, match=r"of this machine|on this machine") as caught:
        make()
    assert "5ECRET" not in str(caught.value) and "host" in str(caught.value)


def test_one_split_of_all_tars_and_splits_of_each_contradict(tmp_path, capsys):
    assert main(["webdataset", str(tmp_path), "--split", "val", "--splits", "train"]) == 2
    assert "--split val and --splits train" in capsys.readouterr().err


def test_what_lies_beside_tars_is_not_overwritten(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(png(1))
        tar.addfile(info, io.BytesIO(png(1)))
    for name in ("report.json", "summary.png"):
        (tmp_path / name).write_text("mine")
        assert main(["webdataset", str(tmp_path)]) == 2
        assert f"holds {name} and no manifest" in capsys.readouterr().err and (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert main(["webdataset", str(tmp_path)]) == 0 == main(["webdataset", str(tmp_path)])
