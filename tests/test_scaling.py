"""Training on many GPUs, on paper: formulas against a ring that is simulated message by message."""

import importlib
import json
import sys

import pytest
import torch
from conftest import REPOSITORY

sys.path[:0] = [str(REPOSITORY / "benchmarks")]
results, scaling = importlib.import_module("results"), importlib.import_module("scaling")


def ring(count, numbers, link):
    """Average vectors in a ring; return the means, the bytes that each member sends, and the time it takes.

    First each part of the vector travels once around and grows into a sum, then the sums travel around. All members
    send at once, to their neighbour, and wait for what comes.
    """
    vectors = [torch.arange(numbers, dtype=torch.float64) * (k + 1) for k in range(count)]
    parts = [list(vector.chunk(count)) for vector in vectors]
    bytes_sent, seconds = [0] * count, 0.0
    for summing in (True, False):
        for turn in range(count - 1):
            # member k passes on the part that it has just completed
            moving = [((k - turn) if summing else (k + 1 - turn)) % count for k in range(count)]
            messages = [parts[k][moving[k]].clone() for k in range(count)]
            for k, message in enumerate(messages):
                after, part = (k + 1) % count, moving[k]
                parts[after][part] = parts[after][part] + message if summing else message
                bytes_sent[k] += 4 * message.numel()
            seconds += link.latency + max(4 * m.numel() for m in messages) / link.bandwidth
    return [torch.cat(part) / count for part in parts], bytes_sent, seconds


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_a_ring_sends_and_takes_what_the_formula_says(count):
    link, numbers = scaling.Link("test", bandwidth=1e6, latency=1e-3), 16 * 30
    means, bytes_sent, seconds = ring(count, numbers, link)
    expected = torch.arange(numbers, dtype=torch.float64) * (count + 1) / 2
    assert all(torch.equal(mean, expected) for mean in means)
    assert bytes_sent == [scaling.sent(count, 4 * numbers)] * count
    assert scaling.communication(count, 4 * numbers, link, messages=1) == pytest.approx(seconds)


def test_the_table_follows_from_one_step_and_the_links():
    nvlink, network = scaling.Link("NVLink", 1e9, 0.0), scaling.Link("Ethernet", 1e6, 0.0)
    rows = {row["GPUs"]: row for row in scaling.rows_of(2.0, 16, 1e6, nvlink, network)}
    assert list(rows) == [1, 2, 4, 8, 16, 32, 64]
    assert (rows[1]["step [s]"], rows[1]["images per second"], rows[1]["share of the ideal"]) == (
        "2.000",
        "8.0",
        "100.0 %",
    )
    assert (rows[8]["link"], rows[8]["communication [ms]"]) == ("NVLink", "1.75")
    # 2 * 15 / 16 of a megabyte at a megabyte per second
    assert (rows[16]["link"], rows[16]["step [s]"]) == ("Ethernet", "3.875")
    assert rows[16]["images per second"] == f"{16 * 16 / 3.875:.1f}"
    assert rows[16]["share of the ideal"] == f"{200 / 3.875:.1f} %"


class Predicted:
    """What ``estimate=true`` says of 16 images."""

    batch, flops, tflops = 16, 3e12, 100.0


def test_a_measured_step_replaces_the_estimate(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "load", lambda name: results.load(name, tmp_path))
    seconds, batch, source = scaling.one_gpu(Predicted)
    assert (seconds, batch) == (pytest.approx(0.48), 16)
    assert source == "**estimated**: 48 TFLOPs at 100 TFLOP/s"
    steps = [
        {"method": "none", "batch": 4, "seconds per step": 0.2, "images per second": 20.0},
        {"method": "all", "batch": 8, "seconds per step": 0.3, "images per second": 26.7},
        {"method": "none", "batch": 16, "memory [GB]": "out of memory"},
    ]
    found = {"scale": "real", "machine": "H100", "training": steps, "sampling": [{"method": "a"}], "shipped": []}
    found["compiled"] = [{"method": "inductor"}]
    found |= {"ceilings": [{"method": "ceilings", "product [TFLOP/s]": 701.2}]}
    (tmp_path / "bench.json").write_text(json.dumps(found))
    results.store_gpu(tmp_path, tmp_path)
    assert scaling.one_gpu(Predicted) == (0.3, 8, "**measured** (all; H100)")
    shown = results.render_document(tmp_path)
    assert "| none | 16 |" in shown
    assert "out of memory" in shown
    assert "The device reaches: 701 product [TFLOP/s].\n\n```bash\nbash benchmarks/gpu/run.sh bench" in shown
    assert "Machine: H100." in shown
    (tmp_path / "bench.json").write_text(json.dumps(found | {"scale": "tiny"}))
    with pytest.raises(ValueError, match="scale=tiny, which mean nothing"):
        results.store_gpu(tmp_path, tmp_path)
