"""Pictures of every built page, wide and narrow, in a headless Chromium: an optional check by eye.

    python docs/screenshots.py docs/_build/html pictures

A page that needs more width than the screen has is named; with one, the exit status is 1.
"""

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = {"wide": 1400, "narrow": 400}  # pixels of a desktop and of a phone
TALLEST = 16_000  # no picture is higher than this
# The page in a frame: it has the width of a phone whatever the least width of a window is.
FRAME = """<!doctype html><body style="margin:0"><iframe id=page src="{url}"
style="width:{width}px;height:{height}px;border:0;display:block"></iframe><script>
page.onload = () => {{
  const root = page.contentDocument.documentElement;
  document.body.dataset.size = `${{root.scrollWidth}}x${{root.scrollHeight}}`;
}};
</script>"""


def opened(browser, url, *options):
    """What the browser prints when it opens an address and leaves again."""
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    access = ("--allow-file-access-from-files", "--virtual-time-budget=3000")
    command = [browser, *fixed, *access, *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def framed(page, width, height, folder):
    """Address of a page that shows the page in a frame of that size."""
    frame = folder / "frame.html"
    url = html.escape(page.resolve().as_uri())
    frame.write_text(FRAME.format(url=url, width=width, height=height))
    return frame.as_uri()


def photograph(browser, page, width, file, folder):
    """Save a picture of the page at that width; return the width that it needs, or `None`."""
    dump = opened(browser, framed(page, width, 800, folder), "--dump-dom")
    found = re.search(r'data-size="(\d+)x(\d+)"', dump)
    height = min(int(found.group(2)), TALLEST) if found else 3000
    url = framed(page, width, height, folder)
    opened(browser, url, f"--window-size={max(width, 500)},{height}", f"--screenshot={file}")
    return int(found.group(1)) if found else None


def main():
    """Take the pictures and name the pages that are too wide."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="folder of the built pages")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--only", default="*", help="pattern of pages, e.g. 'tutorials/*'")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("skipped: no Chromium found, looked for " + ", ".join(BROWSERS))
        return 0
    pages = [
        page
        for page in sorted(options.site.rglob("*.html"))
        if page.relative_to(options.site).match(options.only)
        and page.relative_to(options.site).parts[0] not in ("_modules", "_static")
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    too_wide = 0
    with tempfile.TemporaryDirectory() as folder:
        for page in pages:
            name = page.relative_to(options.site).with_suffix("").as_posix()
            for kind, width in WIDTHS.items():
                file = options.out.resolve() / f"{name.replace('/', '-')}-{kind}.png"
                needed = photograph(browser, page, width, file, Path(folder))
                if needed is None or needed > width:
                    too_wide += 1
                    print(f"{name}: needs {needed} pixels of {width}")
    print(f"{len(pages)} pages in {options.out}, {too_wide} pictures too wide")
    return 1 if too_wide else 0


if __name__ == "__main__":
    sys.exit(main())
