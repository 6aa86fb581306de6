"""Pictures of every built page, wide and narrow, in a headless Chromium: an optional check by eye.

    python docs/screenshots.py docs/_build/html pictures
    python docs/screenshots.py docs/_build/html             # no pictures, only what follows

What the browser itself can tell is named, and makes the exit status 1: a page that needs more width
than the screen has, markup or a formula that was not translated, an empty picture, a link into the
page that leads nowhere, a warning or an error in the output of a cell.
"""

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = {"wide": 1400, "narrow": 400}  # pixels of a desktop and of a phone
TALLEST = 16_000  # no picture is higher than this; a longer page has several
# The page in a frame: it has the width of a phone whatever the least width of a window is.
FRAME = """<!doctype html><body style="margin:0;overflow:hidden"><iframe id=page src="{url}"
style="width:{width}px;height:{height}px;border:0;display:block;margin-top:-{top}px"></iframe>
<script>{checks}</script>"""
CHECKS = r"""page.onload = () => {
  const inside = page.contentDocument, root = inside.documentElement, found = new Set();
  const every = (selector) => [...inside.querySelectorAll(selector)];
  const short = (text) => text.trim().replace(/\s+/g, " ").slice(0, 80);
  const tell = (what, text) => found.add(`${what}: ${short(text)}`);
  const markup = new RegExp([/\$[^$\s]/, /\\[a-zA-Z]+/, /:::/, /```/, /\{[a-z:]+\}[`(]/,
    /\*\*\w[^*]*\*\*/, /`[^`]+`/, /^:[a-z]+:/, /\|\s*-{3,}/].map((it) => it.source).join("|"));
  const width = page.clientWidth, boxes = every(".content").concat(root);
  const needed = Math.max(...boxes.map((it) => it.getBoundingClientRect().left + it.scrollWidth));
  if (needed > width) {
    const wide = every("article *").filter((it) => it.getBoundingClientRect().right > width + 1
      && !it.closest(".table-wrapper, .math-wrapper, pre"));
    const last = wide.pop(), block = last?.closest("p, li, dt, figure, h1, h2, h3") ?? last;
    tell(`needs ${needed} pixels of ${width}`, block?.textContent ?? "");
  }
  const texts = inside.createTreeWalker(inside.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const at = texts.currentNode;
    if (markup.test(at.data) && !at.parentElement.closest("pre, code, script, style, svg, .sig"))
      tell("untranslated", at.data);
  }
  for (const it of every("math"))
    if (it.querySelector("merror") || !it.getBoundingClientRect().width)
      tell("formula", it.textContent);
  for (const it of inside.images)
    if (!it.naturalWidth || it.getBoundingClientRect().width < 1) tell("empty picture", it.src);
  for (const it of every("a[href^='#']")) {
    const name = decodeURIComponent(it.getAttribute("href").slice(1));
    if (name && !inside.getElementById(name)) tell("dead link", "#" + name);
  }
  for (const it of every(".cell_output"))
    if (/Traceback|Warning:/.test(it.textContent)) tell("in an output", it.textContent);
  document.body.dataset.found = JSON.stringify([root.scrollHeight, ...found]);
};"""


def opened(browser, url, *options):
    """What the browser prints when it opens an address and leaves again."""
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    access = ("--allow-file-access-from-files", "--virtual-time-budget=3000")
    command = [browser, *fixed, *access, *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def framed(page, width, height, folder, top=0):
    """Address of a page that shows the page in a frame of that size, from `top` on."""
    frame = folder / "frame.html"
    url = html.escape(page.resolve().as_uri())
    page_and_size = FRAME.format(url=url, width=width, height=height, top=top, checks=CHECKS)
    frame.write_text(page_and_size)
    return frame.as_uri()


def photograph(browser, page, width, file, folder):
    """Save pictures of the page at that width, if there is a file; return what is wrong with it."""
    dump = opened(browser, framed(page, width, 800, folder), "--dump-dom")
    told = re.search(r'data-found="([^"]*)"', dump)
    height, *found = json.loads(html.unescape(told.group(1))) if told else [3000, "does not load"]
    for part, top in enumerate(range(0, height, TALLEST) if file else ()):
        url = framed(page, width, height, folder, top)
        size = f"--window-size={max(width, 500)},{min(height - top, TALLEST)}"
        name = file.with_stem(f"{file.stem}-{part + 1}") if part else file
        opened(browser, url, size, f"--screenshot={name}")
    return found


def main():
    """Take the pictures and name the defects."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="folder of the built pages")
    parser.add_argument("out", type=Path, nargs="?", help="folder for the pictures")
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
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    defects = 0
    with tempfile.TemporaryDirectory() as folder:
        for page in pages:
            name = page.relative_to(options.site).with_suffix("").as_posix()
            for kind, width in WIDTHS.items():
                picture = f"{name.replace('/', '-')}-{kind}.png"
                file = options.out.resolve() / picture if options.out else None
                for defect in photograph(browser, page, width, file, Path(folder)):
                    defects += 1
                    print(f"{name}, {kind}: {defect}", flush=True)
    print(f"{len(pages)} pages, {defects} defects")
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
