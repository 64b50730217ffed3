"""matplotlib's SVG as an element of a page: the page's colours and fonts, no addresses, no ids but those it needs."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

INK, MUTED, GRID, PAPER = "#1c2430", "#5d6875", "#e3e7ec", "#ffffff"
SERIES = ("#2f6fde", "#d2561a", "#1f8f62", "#9347c4", "#a87800", "#0e8a98", "#cf3d79", "#6b7280")
_PAGE_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    **{color: f"var(--series-{i})" for i, color in enumerate(SERIES)},
}


def for_page(svg: str, said: str, texts: Mapping[str, str]) -> str:
    """The <svg> element alone, sized by the page; `said`: its content in words; `texts`: id of a group -> its title."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", element).replace("xlink:href", "href")
    for color, variable in _PAGE_COLOURS.items():
        element = element.replace(color, variable)
    element = re.sub(r"'DejaVu Sans'(, [\w-]+)*", "inherit", element)
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    for group, text in texts.items():
        element = element.replace(f'<g id="{group}">', f"<g><title>{html.escape(text)}</title>", 1)
    needed = set(re.findall(r'(?:href="#|url\(#)([^")]+)', element))
    element = re.sub(r'\sid="([^"]*)"', lambda found: found[0] if found[1] in needed else "", element)
    element = re.sub(r"\n\s*", "\n", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{html.escape(said)}"', 1)
