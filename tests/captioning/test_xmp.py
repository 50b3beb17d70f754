"""captioning/xmp.py: captions where photo programs look, beside what they have written there."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from captioning.xmp import has_description, with_caption, xmp_path
from config import UserError

DARKTABLE = """<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:exif="http://ns.adobe.com/exif/1.0/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:darktable="http://darktable.sf.net/" xmlns:dc="http://purl.org/dc/elements/1.1/"
   exif:DateTimeOriginal="2024:05:01 10:11:12" xmp:Rating="4" darktable:history_end="1">
   <darktable:history><rdf:Seq><rdf:li darktable:operation="exposure" darktable:params="gz02eJx"/></rdf:Seq></darktable:history>
   <dc:subject><rdf:Bag><rdf:li>holiday</rdf:li><rdf:li>dog &amp; cat</rdf:li></rdf:Bag></dc:subject>
   <!-- a note -->{more}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""
ALT = '<dc:description><rdf:Alt><rdf:li xml:lang="{lang}">{text}</rdf:li></rdf:Alt></dc:description>'
needs_exiftool = pytest.mark.skipif(not shutil.which("exiftool"), reason="no exiftool (libimage-exiftool-perl)")


def fields(path: Path) -> dict[str, object]:
    """What exiftool reads of an XMP file."""
    command = ["exiftool", "-json", "-struct", "-G1", "-XMP:all", str(path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)[0]
    return {name: value for name, value in found.items() if name.startswith("XMP") and "xmptk" not in name.lower()}


def write(folder: Path, content: str, caption: str) -> Path:
    path = xmp_path(folder / "a.jpg")
    path.write_text(content, encoding="utf-8")
    path.write_text(with_caption(path, caption), encoding="utf-8")
    return path


@needs_exiftool
@pytest.mark.parametrize("caption", ['a dog <runs> & "jumps"', "两只狗 – a café", "one\ntwo"])
def test_exiftool_reads_a_new_file(tmp_path: Path, caption: str) -> None:
    path = xmp_path(tmp_path / "a.jpg")
    assert path.name == "a.jpg.xmp" and not has_description(path)
    path.write_text(with_caption(path, caption), encoding="utf-8")
    assert has_description(path)
    assert fields(path) == {"XMP-dc:Description": caption, "XMP-iptcCore:AltTextAccessibility": caption}


@needs_exiftool
def test_everything_else_is_kept(tmp_path: Path) -> None:
    """Ratings, keywords and the history of a raw converter's edits are somebody's work."""
    (before := tmp_path / "before.xmp").write_text(DARKTABLE.format(more=""))
    known = fields(before)
    assert len(known) >= 5
    path = write(tmp_path, DARKTABLE.format(more=""), "a dog")
    added = {"XMP-dc:Description": "a dog", "XMP-iptcCore:AltTextAccessibility": "a dog"}
    assert fields(path) == known | added
    assert "<!-- a note -->" in path.read_text() and "darktable:params" in path.read_text()
    again = with_caption(path, "two dogs")
    path.write_text(again)
    assert fields(path) == known | dict.fromkeys(added, "two dogs")


@needs_exiftool
@pytest.mark.parametrize(
    ("before", "other"),
    [
        (ALT.format(lang="x-default", text="old"), {}),
        (ALT.format(lang="de", text="ein Hund"), {"XMP-dc:Description-de": "ein Hund"}),
        ("<dc:description>old</dc:description>", {}),
        ("<dc:description><rdf:Alt/></dc:description>", {}),
    ],
)
def test_a_description_is_replaced_in_the_default_language(tmp_path: Path, before: str, other: dict[str, str]) -> None:
    path = write(tmp_path, DARKTABLE.format(more=before), "a dog")
    found = {name: text for name, text in fields(path).items() if "Description" in name}
    assert found == other | {"XMP-dc:Description": "a dog"}


def test_a_persons_alternative_text_stays(tmp_path: Path) -> None:
    own = '<i:AltTextAccessibility xmlns:i="http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/"><rdf:Alt><rdf:li>mine</rdf:li></rdf:Alt></i:AltTextAccessibility>'
    path = write(tmp_path, DARKTABLE.format(more=own), "a dog")
    assert path.read_text().count("a dog") == 1 and "mine" in path.read_text() and has_description(path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "<html/>",
        DARKTABLE[:300],
        '<!DOCTYPE a [<!ENTITY b "c">]>' + DARKTABLE.split("\n", 1)[1],
        "not \ufffd xml",
    ],
)
def test_a_damaged_file_is_one_line_and_stays(tmp_path: Path, content: str) -> None:
    path = xmp_path(tmp_path / "a.jpg")
    path.write_text(content)
    for read in (has_description, lambda path: with_caption(path, "a dog")):
        with pytest.raises(UserError, match="not an XMP file") as error:
            read(path)
        assert "\n" not in str(error.value)
    assert path.read_text() == content
