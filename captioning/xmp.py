"""Captions in XMP files beside the pictures, where photo programs read them: a.jpg.xmp beside a.jpg.

A caption becomes the picture's description (dc:description) and alternative text (IPTC's AltTextAccessibility), which digiKam,
darktable, PhotoPrism and Immich read. An existing file keeps everything else. Pictures are never written.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from config import UserError
from utils import in_one_line

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"


class Property(NamedTuple):
    """A property of XMP: its namespace's URI and usual prefix, and its name."""

    uri: str
    prefix: str
    local: str


DESCRIPTION = Property("http://purl.org/dc/elements/1.1/", "dc", "description")
ALT_TEXT = Property("http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/", "Iptc4xmpCore", "AltTextAccessibility")
MOST_BYTES = 16 << 20
NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
EMPTY = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{RDF}">
  <rdf:Description rdf:about=""/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


def xmp_path(picture: str | os.PathLike[str]) -> Path:
    """Path of a picture's XMP file."""
    return Path(f"{os.fspath(picture)}.xmp")


def has_description(path: Path) -> bool:
    """Whether an XMP file exists and has a description. Raises UserError if the file is damaged."""
    return path.exists() and bool(_text(_rdf(_read(path)), DESCRIPTION))


def with_caption(path: Path, caption: str) -> str:
    """The content of an XMP file with this caption as its description, and as its alternative text unless it has another
    one. Raises UserError if the file is damaged."""
    document = _read(path) if path.exists() else minidom.parseString(EMPTY.encode())
    rdf = _rdf(document)
    names = [DESCRIPTION]
    if _text(rdf, ALT_TEXT) in ("", _text(rdf, DESCRIPTION)):
        names.append(ALT_TEXT)
    for name in names:
        _set(rdf, name, NOT_XML.sub("", caption))
    return f"{document.toxml()}\n".removeprefix('<?xml version="1.0" ?>')


def _read(path: Path) -> minidom.Document:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES >> 20} MiB")
        content = path.read_bytes()
        if b"<!DOCTYPE" in content:  # entities may expand without end, or name other files
            raise ValueError("it has a DOCTYPE")
        document = minidom.parseString(content)
        if not document.getElementsByTagNameNS(RDF, "RDF"):
            raise ValueError("no rdf:RDF in it")
    except (OSError, ValueError, ExpatError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(in_one_line(f"{path}: not an XMP file that can be read ({why}): move it away")) from error
    return document


def _rdf(document: minidom.Document) -> minidom.Element:
    return document.getElementsByTagNameNS(RDF, "RDF")[0]


def _items(rdf: minidom.Element, name: Property) -> list[minidom.Element]:
    """A property's rdf:li elements, one per language, the default one first; the property itself if it has none."""
    found = rdf.getElementsByTagNameNS(name.uri, name.local)
    items = [item for each in found for item in each.getElementsByTagNameNS(RDF, "li") or [each]]
    return sorted(items, key=lambda item: item.getAttribute("xml:lang") != "x-default")


def _text(rdf: minidom.Element, name: Property) -> str:
    """A property's text in the default language, or else in the first one; "" if there is none."""
    short = [each.getAttributeNS(name.uri, name.local) for each in rdf.getElementsByTagNameNS(RDF, "Description")]
    long = ["".join(node.nodeValue or "" for node in item.childNodes) for item in _items(rdf, name)]
    return next((text.strip() for text in (*long, *short) if text.strip()), "")


def _set(rdf: minidom.Element, name: Property, text: str) -> None:
    """Set a property's text in the default language; other languages stay."""
    document: Any = rdf.ownerDocument
    descriptions = list(rdf.getElementsByTagNameNS(RDF, "Description"))
    for each in descriptions:
        if each.hasAttributeNS(name.uri, name.local):
            each.removeAttributeNS(name.uri, name.local)
    items = _items(rdf, name)
    if items and (items[0].localName != "li" or items[0].getAttribute("xml:lang") in ("", "x-default")):
        while items[0].firstChild:
            items[0].removeChild(items[0].firstChild)
    else:
        if not items:
            parent = descriptions[0] if descriptions else rdf.appendChild(_new(document, RDF, "rdf:Description"))
            own = parent.appendChild(_new(document, name.uri, f"{name.prefix}:{name.local}"))
            languages: Any = own.appendChild(_new(document, RDF, "rdf:Alt"))
        else:
            languages = items[0].parentNode
        items = [languages.insertBefore(_new(document, RDF, "rdf:li"), languages.firstChild)]
        items[0].setAttribute("xml:lang", "x-default")
    items[0].appendChild(document.createTextNode(text))


def _new(document: minidom.Document, uri: str, name: str) -> minidom.Element:
    element = document.createElementNS(uri, name)
    element.setAttribute(f"xmlns:{name.partition(':')[0]}", uri)  # minidom declares no prefix by itself
    return element
