"""What a page of ours holds and what it would load, for tests."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "input", "link"}
_LOADING = ("src", "href", "xlink:href", "srcset", "data", "poster", "action", "formaction", "background", "ping")


class Page(HTMLParser):
    """Text, pictures, tables, and everything that would load something or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.text, self.policy = html, "", ""
        self.images = self.rows = 0
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.faults: list[str] = []
        """What somebody who does not see the page would miss."""
        self._inside = ""
        self._tables: list[set[str]] = []
        self.feed(html)
        self.faults += [f"table without {part}" for t in self._tables for part in {"caption", "thead"} - t]
        ids = re.findall(r'<[^>]*\sid="([^"]*)"', html)
        self.faults += [f"the id {name} stands twice" for name in set(ids) if ids.count(name) > 1]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self._inside = tag
        self.text += " " if tag in ("td", "th", "tr") else ""
        self.images += tag == "img"
        self.rows += tag == "tr"
        self.loads += [given[name] for name in _LOADING if not given.get(name, "#").startswith(("data:", "#"))]
        self.loads += [f"{tag} {name}" for name in given if name.startswith("on")]
        if tag in ("link", "iframe", "object", "embed", "base", "form", "audio", "video"):
            self.loads.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "meta" and given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag == "table":
            self._tables.append(set())
        elif tag in ("caption", "thead"):
            self._tables[-1].add(tag)
        if (tag == "img" and not given.get("alt")) or (tag == "svg" and not given.get("aria-label")):
            self.faults.append(f"{tag} without words")
        if tag == "th" and given.get("scope") not in ("col", "row"):
            self.faults.append("a head without scope")

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    @property
    def words(self) -> str:
        """The text with single spaces."""
        return " ".join(self.text.split())

    def check(self) -> None:
        """It loads nothing, its policy forbids what it does not need, its script is the one the policy names."""
        assert self.loads == [], self.loads
        assert self.faults == [], self.faults
        styles = "".join(re.findall(r"<style>(.*?)</style>", self.html, re.DOTALL))
        assert "@import" not in styles and "url(" not in styles
        assert not re.search(r"url\((?!#)", self.html)
        assert "default-src 'none'" in self.policy and "unsafe-eval" not in self.policy
        (allowed,) = re.findall(r"script-src ([^;]*);", self.policy)
        (script,) = self.scripts
        assert allowed == f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        assert "fetch" not in script and "XMLHttp" not in script and "innerHTML" not in script
