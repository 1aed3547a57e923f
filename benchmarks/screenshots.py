"""Make the pictures of the report and of the page of ``ud2m app`` in docs/images: python benchmarks/screenshots.py.

Needs Chromium, Playwright and Gradio. Both show the same photograph, on a desktop and on a phone.
"""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from skimage.data import coffee

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDTHS = {"desktop": 1280, "phone": 400}
"""CSS pixels."""
HEIGHTS = {"desktop": 900, "phone": 800}
POINT = (0.62, 0.78)
"""Where the mouse is in the report's pictures, as shares of width and height: at a spoon."""
QUALITIES = range(80, 20, -5)
"""Of WebP, of which the first is taken with which a picture has at most ``MOST`` bytes."""
MOST = 60_000
PORT = 17861
WAIT = 300_000
"""Milliseconds."""


def shot(page: Page, name: str) -> None:
    """Write what the window shows."""
    picture, path = Image.open(io.BytesIO(page.screenshot())).convert("RGB"), IMAGES / f"{name}.webp"
    for quality in QUALITIES:
        picture.save(path, quality=quality, method=6)
        if path.stat().st_size <= MOST:
            break
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, quality {quality}")


def scroll_to(page: Page, place: str) -> None:
    """Put a part of the page at the top of the window."""
    page.locator(place).first.evaluate("node => window.scrollTo(0, node.getBoundingClientRect().top + scrollY - 12)")


def show_report(page: Page, report: Path) -> None:
    """Open the report at its pictures, with the mouse on one of them: all show the same place enlarged."""
    page.goto(report.as_uri())
    page.get_by_role("button", name="2×").click()
    scroll_to(page, ".pictures")
    box = page.locator(".pictures img").first.bounding_box()
    assert box
    x, y = POINT
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])


def show_app(page: Page, photograph: Path) -> None:
    """Let the page of the app sample for a photograph."""
    page.goto(f"http://127.0.0.1:{PORT}/")
    page.get_by_role("button", name="Draw samples").wait_for()
    page.locator("input[type=file]").first.set_input_files(photograph)
    page.get_by_role("combobox", name="model").click()
    page.get_by_role("option", name="photographs_super_resolution").click()
    page.get_by_label("operator A").click()
    page.get_by_role("option", name="super-resolution").click()
    page.get_by_role("button", name="Draw samples").click()
    page.get_by_text("seed 0", exact=False).wait_for()
    page.get_by_role("button", name="Download everything").wait_for()
    page.wait_for_timeout(1000)  # pictures fade in
    if page.viewport_size and page.viewport_size["width"] == WIDTHS["phone"]:
        scroll_to(page, "button.primary")
    else:
        page.evaluate("window.scrollTo(0, 0)")


def main() -> None:
    """Sample, open both pages at both widths, and write what they show."""
    with tempfile.TemporaryDirectory() as folder:
        photograph, job = Path(folder) / "coffee.png", [sys.executable, "-m", "ud2m"]
        Image.fromarray(coffee()[80:336, 200:456]).save(photograph)
        output = Path(folder) / "out"
        words = ["model=photographs_inpainting", "compare=true", "num_samples=4"]
        subprocess.run([*job, "sample", *words, f"input={photograph}", f"output={output}"], check=True)
        app = subprocess.Popen([*job, "app", f"port={PORT}"], stdout=subprocess.PIPE, text=True)
        try:
            print(app.stdout.readline() if app.stdout else "")  # waits until it listens
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                for kind, width in WIDTHS.items():
                    page = browser.new_page(viewport={"width": width, "height": HEIGHTS[kind]})
                    page.set_default_timeout(WAIT)
                    show_report(page, output / "report.html")
                    shot(page, f"report-{kind}")
                    show_app(page, photograph)
                    shot(page, f"app-{kind}")
                browser.close()
        finally:
            app.terminate()
            app.wait()


if __name__ == "__main__":
    main()
