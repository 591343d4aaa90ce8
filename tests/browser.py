"""Pages in Chromium, without a window."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium: apt-get install chromium")


class Opened(NamedTuple):
    title: str
    console: list[str]  # what the page and the browser have to say of it


def open_page(page: Path, *flags: str) -> Opened:
    """The page when its scripts have run; with `--force-dark-mode`, say, for one who reads in the dark."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom", *flags, page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    title = re.search(r"<title>(.*?)</title>", ended.stdout, re.DOTALL)[1].replace("&quot;", '"')
    return Opened(title, re.findall(r":CONSOLE[:(].*", ended.stderr))
