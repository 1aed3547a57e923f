"""Pages in headless Chromium."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def probed(text: str, script: str, folder: Path, width: int = 1000) -> dict:
    """Return what a script has put into ``found`` at the end of a page; fails where the page or it has errors.

    The script may ``await``. Skips the test where there is no browser.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no chromium is installed: the script of the page is not run")
    (folder / "page.html").write_text(text.replace("</body>", _PROBE.replace("SCRIPT", script) + "</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", f"--window-size={width},800", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]  # errors of the scripts
    found = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)[1])
    assert (found.pop("broken"), found.pop("resources")) == (0, 0)
    assert found.pop("wide") <= 0
    return found


_PROBE = """
<script>
window.addEventListener('load', async () => {
const found = {};
const pointer = (target, kind, x = 0, y = 0) => {
  const box = target.getBoundingClientRect();
  target.dispatchEvent(new PointerEvent(kind, {bubbles: kind !== 'pointerleave',
    clientX: box.left + x * box.width, clientY: box.top + y * box.height}));
};
const wait = milliseconds => new Promise(resolve => setTimeout(resolve, milliseconds));
SCRIPT
found.broken = [...document.images].filter(i => !i.naturalWidth).length;
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.resources = performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length;
const result = document.createElement('pre');
result.id = 'probe'; result.textContent = JSON.stringify(found); document.body.append(result);
});
</script>
"""
