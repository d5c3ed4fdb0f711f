"""A page of attention as one HTML file that needs nothing else: no script, no other file."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from attnsurgeon.outputs import atomic_output
from attnsurgeon.report.attention_page import COLOURS, Page, Picture

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #333 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 1em }
figure { margin: 0 } figcaption { font-size: 12px } small { color: #666 }
.map small { display: block }
.grid img { width: 100%; image-rendering: auto }
.strip { margin: .4em 0 } .strip img { width: 100%; height: 18px; image-rendering: pixelated }
.bar { display: flex; height: 16px; background: #eee }
.bar span { background: #2a6f97 } .bar span:nth-child(even) { background: #e9a23b }
table { border-collapse: collapse; width: 100% } td { padding: .15em .6em .15em 0 }
td:first-child { white-space: nowrap }
"""


def write_html(page: Page, path: Path, *, force: bool = False) -> None:
    """Write a page with its pictures inside.

    Raises:
        OutputRefused: the file cannot be written, or exists and `force` is not given.
    """
    pictures = "".join(_figure(picture) for picture in (page.photograph, *page.overlays))
    strips = "".join(_figure(strip, "strip") for strip in page.strips)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{escape(page.title)}</title>',
        f"<style>{STYLE}</style>",
        f"<h1>{escape(page.title)}</h1><p>{COLOURS}</p>",
        f'<div class="grid">{pictures}</div>{strips}',
        _branches(page),
        "</html>\n",
    ]
    with atomic_output(path, force=force) as part:
        part.write_text("\n".join(parts), encoding="utf-8")


def _figure(picture: Picture, kind: str = "map") -> str:
    memory = io.BytesIO()
    Image.fromarray(picture.pixels.numpy()).save(memory, "PNG")
    data = base64.b64encode(memory.getvalue()).decode("ascii")
    title, caption = escape(picture.title), escape(picture.caption)
    return (
        f'<figure class="{kind}"><figcaption>{title} <small>{caption}</small></figcaption>'
        f'<img alt="{title}" src="data:image/png;base64,{data}"></figure>'
    )


def _branches(page: Page) -> str:
    if not page.branches:
        return ""
    rows = "".join(_row(site, shares) for site, shares in page.branches.items())
    return (
        "<h2>Which branch is preferred</h2><p>Mean over channels; the first is the host's own.</p>"
        f"<table>{rows}</table>"
    )


def _row(site: str, shares: tuple[float, ...]) -> str:
    numbers = " ".join(f"{share:.3f}" for share in shares)
    bars = "".join(f'<span style="width:{share:.2%}"></span>' for share in shares)
    return (
        f"<tr><td>{escape(site)}</td><td>{numbers}</td>"
        f'<td width="60%"><div class="bar">{bars}</div></td></tr>'
    )
