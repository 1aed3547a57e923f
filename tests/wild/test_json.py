"""JSON that is nested more deeply than Python follows is one line, wherever it stands."""

import pytest

from ud2m.data.remote import fetch_index
from ud2m.data.shard_index import read_index
from ud2m.files import parse_json
from ud2m.priors.prior import Prior
from ud2m.samplers.export import read_export, read_metrics

DEEP = "[" * 100_000
READERS = {
    "index.json": read_index,
    "config.json": lambda folder: read_export(str(folder)),
    "scheduler_config.json": lambda folder: Prior.from_pretrained(str(folder)),
    "metrics.json": lambda folder: read_metrics(folder / "metrics.json"),
}


@pytest.mark.parametrize("file", READERS)
def test_deep_nesting_is_one_line(file, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(DEEP)
    with pytest.raises(ValueError, match=rf"{file} .*nested too deeply") as error:
        READERS[file](tmp_path)
    assert "\n" not in str(error.value)


def test_deep_nesting_behind_an_address(tmp_path):
    (tmp_path / "index.json").write_text(DEEP)
    with pytest.raises(ValueError, match="nested too deeply"):
        fetch_index(f"pipe:cat {tmp_path}/{{}}", tmp_path / "cache")
    assert parse_json("[1]") == [1]
