"""Make the pictures of the report and of the page of ``ud2m app`` in docs/images: python benchmarks/screenshots.py.

Needs Chromium, Playwright and Gradio. Both show the same photograph, with holes, on a desktop and on a phone.
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
HEIGHTS = {"desktop": 1000, "phone": 800}
QUALITY = 80
"""Of WebP."""
PORT = 17861
WAIT = 300_000
"""Milliseconds."""


def shot(page: Page, name: str) -> None:
    """Write what the window shows."""
    picture = Image.open(io.BytesIO(page.screenshot()))
    picture.convert("RGB").save(IMAGES / f"{name}.webp", quality=QUALITY, method=6)
    print(f"{name}.webp: {(IMAGES / f'{name}.webp').stat().st_size / 1e3:.0f} kB")


def show_report(page: Page, report: Path) -> None:
    """Open the report at its pictures, with the mouse on one of them."""
    page.goto(report.as_uri())
    strip = page.locator("figure img").first
    strip.scroll_into_view_if_needed()
    page.locator("h2").first.evaluate("node => node.scrollIntoView()")
    strip.hover(position={"x": 60, "y": 90})


def show_app(page: Page, photograph: Path) -> None:
    """Let the page of the app sample for a photograph."""
    page.goto(f"http://127.0.0.1:{PORT}/")
    page.get_by_role("button", name="Draw samples").wait_for()
    page.locator("input[type=file]").first.set_input_files(photograph)
    page.get_by_label("operator A").click()
    page.get_by_role("option", name="missing pixels, at random").click()
    page.get_by_role("button", name="Draw samples").click()
    page.get_by_text("seed 0", exact=False).wait_for()
    page.get_by_role("button", name="Download everything").wait_for()
    page.wait_for_timeout(1000)  # pictures fade in
    if page.viewport_size and page.viewport_size["width"] == WIDTHS["phone"]:
        page.get_by_text("seed 0", exact=False).scroll_into_view_if_needed()
        page.locator("h1").evaluate("() => window.scrollBy(0, 500)")
    else:
        page.evaluate("window.scrollTo(0, 0)")


def main() -> None:
    """Sample, open both pages at both widths, and write what they show."""
    with tempfile.TemporaryDirectory() as folder:
        photograph, job = Path(folder) / "coffee.png", [sys.executable, "-m", "ud2m"]
        Image.fromarray(coffee()[80:336, 200:456]).save(photograph)
        output = Path(folder) / "out"
        words = ["model=photos_inpainting", f"input={photograph}", "compare=true", "num_samples=4", f"output={output}"]
        subprocess.run([*job, "sample", *words], check=True)
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
