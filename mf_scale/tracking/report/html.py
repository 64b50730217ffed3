"""Pages of one file: they load nothing, and run no script but the one that is named in them by its digest."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mf_scale.tracking.report.table import count, percent


def render(template: str, **values: Any) -> str:
    """The page of a template of this folder. What is not Markup is text, whatever it holds."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "count": count}
    script = (folder / "script.html").read_text(encoding="utf-8")
    style = (folder / "style.html").read_text(encoding="utf-8")
    page = environment.get_template(template)
    return page.render(style=Markup(style), script=Markup(script), policy=_policy(script), **values)


def _policy(script: str) -> str:
    """What a browser may do for the page: show its own pictures and style, run its own script, ask nobody."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
