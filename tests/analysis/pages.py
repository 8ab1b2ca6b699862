"""What a page of HTML must be that is read anywhere."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Ids, addresses, tags and pictures of a page, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.pictures: list[dict[str, Any]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        links = ("src", "href", "srcset", "poster", "data", "action", "background")
        self.addresses += [value for name, value in attrs if name in links and value]
        if tag == "img":
            self.pictures.append(given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def check_self_contained(file: Path) -> Page:
    """Assert that a page is whole, asks for nothing and that its pictures are in it."""
    text = file.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert page.pictures
    for picture in page.pictures:
        kind, _, content = picture["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert len(picture["alt"]) > 20
        drawing = ElementTree.fromstring(base64.b64decode(content))
        assert drawing.tag.endswith("svg")
        links = [v for e in drawing.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert page.addresses == [picture["src"] for picture in page.pictures]
    return page
