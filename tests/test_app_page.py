"""The page of ``ud2m app``, clicked through in headless Chromium."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import REPOSITORY
from PIL import Image
from tiny_sampler import export

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'ud2m[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright, which drives the browser, is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT = 120_000
"""Milliseconds; of a machine that does much else."""
MOST = 5000
"""Pixels."""
MANY = 5000
"""Samples of a micro model that take longer than ``WAIT``."""
SHAPE = (48, 64)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        # in a container Chromium cannot make its own sandbox
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory, browser):
    """Yield the address of a page whose model is a micro one, and its process."""
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "temporary").mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "TMPDIR": str(folder / "temporary"),
        "UD2M_MAX_PIXELS": str(MOST),
    }
    command = [sys.executable, "-m", "ud2m", "app", f"model={export(folder)}", f"port={port}", f"max_samples={MANY}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    while "the page is at" not in (folder / "log").read_text():
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/", psutil.Process(process.pid)
    uploads = list((folder / "temporary").rglob("*.png"))
    process.terminate()
    process.wait()
    assert uploads
    assert not list((folder / "temporary").glob("ud2m-app-*"))  # nothing of a visitor's stays
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def server(running):
    """Return the address of the page."""
    return running[0]


def visit(browser, address):
    """Open the page as another visitor."""
    page = browser.new_context(accept_downloads=True).new_page()
    page.set_default_timeout(WAIT)
    page.outside = []
    page.on("request", lambda sent: page.outside.append(sent.url))
    page.goto(address)
    page.get_by_role("button", name="Draw samples").wait_for()
    return page


def drop(page, path):
    page.locator("input[type=file]").first.set_input_files(path)


def choose(page, operator):
    page.get_by_label("operator A").click()
    page.get_by_role("option", name=operator).click()


def draw(page, seed):
    page.get_by_label("seed").fill(str(seed))
    page.get_by_role("button", name="Draw samples").click()


def drawn(page, seed):
    """Wait for the samples, and return the files in the archive."""
    page.get_by_text(f"seed {seed}", exact=False).wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download everything").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def refusal(page):
    """Return what the page says, and close it."""
    told = page.get_by_test_id("toast-body").last
    told.wait_for()
    text = told.inner_text()
    page.get_by_test_id("toast-close").last.click()
    told.wait_for(state="detached")
    return text


def picture(path, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


def pixels(data):
    return np.array(Image.open(io.BytesIO(data))).astype(int)


def test_upload_draw_a_mask_sample_and_download(browser, server, tmp_path):
    page = visit(browser, server)
    draw(page, 1)
    assert "there is no picture" in refusal(page)
    (tmp_path / "text.png").write_text("hello")
    drop(page, tmp_path / "text.png")
    assert "text.png is not an image that can be read" in refusal(page)
    page.get_by_label("Clear").first.click()
    Image.new("RGB", (100, 51)).save(tmp_path / "large.png")
    drop(page, tmp_path / "large.png")
    assert f"large.png has too many pixels: 100x51, at most {MOST} are decoded" in refusal(page)
    page.get_by_label("Clear").first.click()
    drop(page, picture(tmp_path / "mine.png"))
    choose(page, "missing pixels, marked by hand")
    canvas = page.locator("canvas").first
    canvas.wait_for()
    draw(page, 2)
    assert "no pixel is marked as missing" in refusal(page)
    canvas.scroll_into_view_if_needed()  # a mouse counts from the corner of the window
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 20, y)
    page.mouse.down()
    page.mouse.move(x + 20, y, steps=5)
    page.mouse.up()
    draw(page, 3)
    files = drawn(page, 3)
    clean, y = pixels((tmp_path / "mine.png").read_bytes()), pixels(files["observation.png"])
    hole = np.abs(y).sum(-1) == 0
    assert hole[SHAPE[0] // 2, SHAPE[1] // 2]  # where it was painted
    assert 0.01 < hole.mean() < 0.9
    assert not hole[[0, 0, -1, -1], [0, -1, 0, -1]].any()
    assert np.abs(y - clean)[~hole].mean() < 20  # noise of 0.05 is 13 levels
    assert {"mean.png", "std.png", "report.html", "metrics.json", "samples/003.png"} <= files.keys()
    assert json.loads(files["config.json"])["input"] == "mine.png"
    assert not [url for url in page.outside if not url.startswith((server, "data:", "blob:"))]
    page.context.close()


def test_two_visitors_at_once(browser, server, tmp_path):
    pages = [visit(browser, server) for _ in range(2)]
    for k, page in enumerate(pages):
        drop(page, picture(tmp_path / f"visitor {k}.png", k))
        choose(page, "noise alone")
    for k, page in enumerate(pages):
        draw(page, 10 + k)
    for k, page in enumerate(pages):
        y = pixels(drawn(page, 10 + k)["observation.png"])
        errors = [np.abs(y - pixels(Path(tmp_path / f"visitor {j}.png").read_bytes())).mean() for j in range(2)]
        assert errors[k] < 20 < 60 < errors[1 - k]
        page.context.close()


def test_the_job_of_a_visitor_who_leaves_ends(browser, server, tmp_path):
    leaving, staying = (visit(browser, server) for _ in range(2))
    for page in (leaving, staying):
        drop(page, picture(tmp_path / "mine.png"))
        choose(page, "noise alone")
    leaving.get_by_label("number input for samples").fill(str(MANY))
    draw(leaving, 20)
    leaving.get_by_text("network evaluations", exact=False).first.wait_for()
    draw(staying, 21)  # waits for the other one
    leaving.context.close()
    assert "samples/003.png" in drawn(staying, 21)  # in time
    staying.context.close()


def test_memory_stays_flat(browser, running, tmp_path):
    address, process = running
    page, held = visit(browser, address), []
    for k in range(10):
        drop(page, picture(tmp_path / f"{k}.png", k))
        if k == 0:
            choose(page, "noise alone")
        draw(page, 30 + k)
        page.get_by_text(f"seed {30 + k}", exact=False).wait_for()
        held.append(process.memory_info().rss)
        page.get_by_label("Clear").first.click()
    page.context.close()
    assert max(held) - held[2] < 7e6  # it was 3 MB a picture where each thread of Gradio's computed
