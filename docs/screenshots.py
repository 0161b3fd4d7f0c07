"""Take the pictures of README and docs, of the demonstration:  python docs/screenshots.py [WORKDIR]

It trains the demonstration in a terminal, unless WORKDIR has finished, and opens TensorBoard and report in Chromium.
"""

import contextlib
import html
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyte
from PIL import Image
from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINES, COLUMNS = 24, 110
SHOWN_AT = 200  # of the demonstration's 360 steps


def train_on_terminal(workdir: Path) -> str:
    """What the terminal shows in the middle of the training, as HTML."""
    master, slave = pty.openpty()
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    command = [sys.executable, "main.py", f"--workdir={workdir}", f"--config.data.root={workdir.parent / 'birds'}"]
    with subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environment):
        os.close(slave)
        shown = ""
        with contextlib.suppress(OSError):  # the training has closed its end
            while part := os.read(master, 2**16):
                stream.feed(part)
                if not shown and any(
                    f"step {step}/" in line for line in screen.display for step in range(SHOWN_AT, 360)
                ):
                    shown = as_html(screen)
    os.close(master)
    return shown


def as_html(screen: pyte.Screen) -> str:
    lines = []
    for row in range(LINES):
        cells = (screen.buffer[row][column] for column in range(COLUMNS))
        lines.append(
            "".join(f"<span style='color:{colour_of(cell.fg)}'>{html.escape(cell.data)}</span>" for cell in cells)
        )
    style = "background:#1b1d22;color:#d8dade;font:13px/1.35 'DejaVu Sans Mono';padding:14px;margin:0;width:max-content"
    return f"<body style='margin:0;width:max-content'><pre style=\"{style}\">" + "\n".join(lines) + "</pre>"


def colour_of(name: str) -> str:
    return "inherit" if name == "default" else f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else name


@contextlib.contextmanager
def tensorboard(workdir: Path) -> Iterator[str]:
    """The address of a TensorBoard of this run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "tensorboard"
    command = [program, f"--logdir={workdir.parent}", f"--port={port}", "--host=127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(120):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def save(page: Page, name: str, **clip) -> None:
    """Few colours, so that the file stays small."""
    file = DOCS / name
    page.screenshot(path=file, **clip)
    Image.open(file).convert("RGB").quantize(128).save(file, optimize=True)


def main() -> None:
    workdir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo").absolute()
    terminal = "" if (workdir / "results.json").exists() else train_on_terminal(workdir)
    subprocess.run([sys.executable, "main.py", "report", f"--workdir={workdir}"], cwd=ROOT, check=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        if terminal:
            page.set_content(terminal)
            save(page, "terminal.png", full_page=False, clip=page.locator("pre").bounding_box())
        page.goto((workdir / "report.html").as_uri())
        save(page, "report.png", clip={"x": 0, "y": 0, "width": 1280, "height": 1500}, full_page=True)
        with tensorboard(workdir) as address:
            page.goto(f"{address}/?tagFilter=(train|val)/(loss|accuracy|learning_rate|images_per_second)$#timeseries")
            page.get_by_role("button", name="Settings").click()  # which are open at first
            page.wait_for_timeout(8000)  # its charts are drawn one after the other
            save(page, "tensorboard.png")
        browser.close()


if __name__ == "__main__":
    main()
