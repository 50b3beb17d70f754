"""reading.py, columns.py and what readers share: captions, names and tables as people really have them."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_sources import CSV_OF_FIVE, FIVE, cache_folder, captions, coco_json, error_of, fill, hub_cache, ids, names
from test_sources import pictures as empty

from data.reading import clean_all, listed
from data.sources import load_table, load_tables, recognise

__all__ = ["cache_folder", "hub_cache"]  # fixtures

NAMES = list(FIVE)


def everything(root: Path, **options: str) -> dict[str, list[str]]:
    """{picture: its captions} of all parts."""
    parts = load_tables("auto", root, **options).values()
    return {name: own for part in parts for name, own in zip(names(part), captions(part), strict=True)}


def csv_of(cells: list[str], header: str = "image,caption") -> str:
    return "\n".join([header, *cells]) + "\n"


# Captions


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('["a dog", "two dogs"]', ["a dog", "two dogs"]),
        ("['a dog', \"it's two\"]", ["a dog", "it's two"]),
        ("['it\\'s one',]", ["it's one"]),
        ("['a dog' 'two\\tdogs'\n 'three']", ["a dog", "two dogs", "three"]),
        ("[u'a dog', u'two']", ["a dog", "two"]),
        ("[np.str_('a dog'), np.str_('two')]", ["a dog", "two"]),
        ('["caf\\u00e9", null]', ["café", ""]),
        ("[]", []),
        ("[sic] a dog", ["[sic] a dog"]),
        ("[a dog]", ["[a dog]"]),
        ("[1, 2]", ["[1, 2]"]),
        ("['a', 3]", ["['a', 3]"]),
        ("['a'] and 'b'", ["['a'] and 'b'"]),
        ("['a''b']", ["['a''b']"]),
        (r"['\x']", [r"['\x']"]),
        ("[" * 5000 + "]" * 5000, ["[" * 5000 + "]" * 5000]),
    ],
)
def test_a_list_that_is_text_is_the_list(text: str, wanted: list[str]) -> None:
    """Flickr30k's `raw` column, pandas and NumPy write captions so; brackets and quotes were trained on. NumPy puts no
    commas, and Python joins 'a' 'b' to one text."""
    assert clean_all(text, "here") == wanted == [own for item in [text] for own in clean_all([item], "here")]
    assert isinstance(listed(text), str) == (wanted == [text])


def test_lists_as_text_in_every_layout(tmp_path: Path) -> None:
    quoted = '"[""cap"", ""two""]"'
    lines = [json.dumps({"image": name, "caption": "['cap', 'two']"}) for name in NAMES]
    raw = [f'{quoted},"[1, 2]",train,{name},{i}' for i, name in enumerate(NAMES)]
    annotations = [(i, i, '["cap", "two"]') for i in range(5)]
    kaggle = "".join(f'{name}| 0| ["cap", "two"]\n' for name in NAMES)
    made: dict[str, dict[str, str | bytes]] = {
        "csv": {"c.csv": csv_of([f"{name},{quoted}" for name in NAMES])},
        "flickr30k of the Hub": {"f.csv": csv_of(raw, "raw,sentids,split,filename,img_id")},
        "jsonl": {"c.jsonl": "\n".join(lines)},
        "captions.txt": {"captions.txt": csv_of([f"{name},{quoted}" for name in NAMES])}
        | empty(*(f"Images/{n}" for n in NAMES)),
        "results.csv": {"results.csv": f"image_name| comment_number| comment\n{kaggle}"},
        "coco": {"annotations/captions_train2017.json": coco_json(enumerate(NAMES), annotations)},
        "text beside": {f"{i}.txt": '["cap", "two"]' for i in range(5)},
    }
    for layout, files in made.items():
        found = everything(fill(tmp_path / layout, FIVE | files))
        assert len(found) == 5 and all(own == ["cap", "two"] for own in found.values()), layout


def conversation(*answers: str, question: str = "from", text: str = "value") -> list[dict[str, str]]:
    human, model = ("human", "gpt") if question == "from" else ("user", "assistant")
    return [turn for a in answers for turn in ({question: human, text: "<image>\nSay."}, {question: model, text: a})]


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_a_conversations_last_answer_is_the_caption(tmp_path: Path, name: str) -> None:
    """LLaVA's form had no caption column and no way to name one. Its mixtures hold conversations about no picture."""
    records = [{"id": i, "image": n, "conversations": conversation("first", f"cap {i}")} for i, n in enumerate(NAMES)]
    records.append({"id": 9, "conversations": conversation("about no picture")})
    lines = list(map(json.dumps, records))
    fill(tmp_path, FIVE | {name: "\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]"})
    assert everything(tmp_path) == {n: [f"cap {i}"] for i, n in enumerate(NAMES)}
    ((what, number),) = load_table("auto", tmp_path, "train").left_out.items()
    assert number == 1 and what.startswith("conversations without a picture (the first: chat.json")


def test_messages_are_conversations_too() -> None:
    assert clean_all(conversation("one", "two", question="role", text="content"), "here") == ["two"]
    assert clean_all(conversation("one")[:1], "here") == []  # a question without an answer


# Files of captions


def lines_of_json() -> str:
    return "\n".join(json.dumps({"image": name, "caption": f"cap é {name}"}) for name in NAMES) + "\n"


EXCEL = CSV_OF_FIVE.replace(",", ";").replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.json", lines_of_json()),
        ("c.ndjson", lines_of_json()),
        ("C.JSONL", lines_of_json()),
        ("c.json", json.dumps({name: [f"cap é {name}"] for name in NAMES})),
        ("c.json", json.dumps({name: {"caption": f"cap é {name}", "tags": "x"} for name in NAMES}, indent=1)),
        ("c.json", json.dumps({"info": {}, "data": [{"image": name, "caption": f"cap é {name}"} for name in NAMES]})),
        ("c.jsonl", lines_of_json().encode("utf-16")),
        ("c.csv", csv_of([f"{name},cap é {name}" for name in NAMES]).encode("utf-16")),
        ("c.csv", csv_of([f"{name},cap é {name}" for name in NAMES]).encode("utf-16-le")),
        ("c.csv", csv_of([f"{name},cap é {name}" for name in NAMES]).encode("utf-16-be")),
        ("c.tsv", csv_of([f"{name}\tcap é {name}\r" for name in NAMES], "image\tcaption\r").encode("utf-16")),
        ("C.CSV", csv_of([f"{name},cap é {name}" for name in NAMES])),
        ("c.csv", csv_of([f"{name};cap é {name}" for name in NAMES], "sep=;\r\nimage;caption")),
        ("c.csv", csv_of([f"{name}^cap é {name}" for name in NAMES], '"sep=^"\nimage^caption').encode("utf-16")),
    ],
)
def test_tables_whatever_their_name_or_encoding(tmp_path: Path, name: str, content: str | bytes) -> None:
    """Each was once "no captions found", or "cut or damaged" where it was named."""
    root = fill(tmp_path, FIVE | {name: content})
    assert everything(root) == everything(root / name) == {each: [f"cap é {each}"] for each in NAMES}


def test_texts_in_utf_16(tmp_path: Path) -> None:
    fill(tmp_path, FIVE | {f"{i}.txt": f"cap é {i}\r\ntwo\r\n".encode("utf-16") for i in range(5)})
    assert everything(tmp_path)["3.jpg"] == ["cap é 3", "two"]
    fill(tmp_path, {"3.txt": "a\0b"})  # a control character, and not UTF-16
    assert everything(tmp_path)["3.jpg"] == ["ab"]


def test_a_line_is_counted_from_the_top_of_the_file(tmp_path: Path) -> None:
    fill(tmp_path, FIVE | {"c.csv": "sep=;\nimage;caption\n0.jpg;a\n1.jpg;b;c\n"})
    assert error_of(lambda: load_tables("auto", tmp_path)).startswith(f"{tmp_path / 'c.csv'}:4: 3 columns")


def test_what_was_recognised_by_its_name_goes_before_what_is_by_its_content(tmp_path: Path) -> None:
    """Texts beside pictures were read where a file of results lay there too, and still are."""
    fill(tmp_path, FIVE | {f"{i}.txt": "beside" for i in range(5)} | {"results.json": lines_of_json()})
    fill(tmp_path, {"all.json": coco_json(enumerate(NAMES), [(i, i, "coco") for i in range(5)])})
    assert recognise(tmp_path)[0] == "sidecar" and recognise(tmp_path / "all.json")[0] == "coco"
    assert everything(tmp_path)["0.jpg"] == ["beside"] and everything(tmp_path / "results.json")["0.jpg"] == [
        "cap é 0.jpg"
    ]


@pytest.mark.parametrize("kind", ["struct", "bytes", "a list as text"])
def test_pictures_inside_parquet_that_nobody_has_called_pictures(tmp_path: Path, kind: str, hub_cache: None) -> None:
    """pandas writes {bytes, path} without Hugging Face's note on what that is."""
    pytest.importorskip("datasets")
    content = []
    for i in range(5):
        file = io.BytesIO()
        Image.new("RGB", (2, 2), (i, 0, 0)).save(file, "PNG")
        content.append(file.getvalue())
    column = content if kind == "bytes" else [{"bytes": each, "path": None} for each in content]
    texts = [f"['cap {i}', 'two']" if kind == "a list as text" else f"cap {i}" for i in range(5)]
    pq.write_table(pa.table({"image": column, "text": texts}), tmp_path / "all.parquet")
    for path in (tmp_path, tmp_path / "all.parquet"):
        parts = load_tables("auto", path)
        found = {part.picture(row): part.captions_of(row) for part in parts.values() for row in range(len(part))}
        assert sorted(found) == sorted(content)
        assert found[content[3]] == (["cap 3", "two"] if kind == "a list as text" else ["cap 3"])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"c.csv": csv_of(["0.jpg,x"], "foto,satz")}, "c.csv: no column for the pictures among 'foto', 'satz': name "
         "it with --image-column, and the captions' with --caption-column"),
        ({"c.json": '[{"image": "0.jpg", "satz": "x"}]'}, "c.json: no column for the captions among 'image', 'satz': name it "
         "with --caption-column"),
        ({"c.csv": "0.jpg,a dog\n1.jpg,a cat\n"}, "c.csv: its first line is '0.jpg', 'a dog': put the names of the columns above it, "
         "such as image,caption"),
        ({"a.zip": b"PK", "b.tar.gz": b"", "c.xlsx": b"PK"}, "unpack a.zip, b.tar.gz and save c.xlsx as CSV"),
    ],
)  # fmt: skip
def test_what_lies_there_is_said(tmp_path: Path, files: dict[str, str | bytes], said: str) -> None:
    """It was "no captions found" and eight layouts."""
    root = fill(tmp_path, FIVE | files)
    error = error_of(lambda: load_tables("auto", root))
    assert error.startswith(f"no captions found in {root} beside 5 pictures without captions")
    assert error.endswith(f": {said}")
    first = root / next(iter(files))
    assert said.partition(", b.tar")[0].removeprefix(f"{first.name}: ") in error_of(lambda: load_tables("auto", first))


def test_pictures_that_are_packed(tmp_path: Path) -> None:
    fill(tmp_path, {"c.csv": CSV_OF_FIVE, "images.zip": b"PK"})
    assert error_of(lambda: load_tables("auto", tmp_path)).endswith(": unpack images.zip")


def test_where_karpathys_split_comes_from(tmp_path: Path) -> None:
    assert "deepimagesent/caption_datasets.zip" in error_of(lambda: load_tables("karpathy", fill(tmp_path, FIVE)))


# COCO's form under other names


def coco_of(listed: list[str], **more: object) -> str:
    """Two captions a picture; `more` replaces a field of every annotation, or removes it."""
    content = json.loads(coco_json(enumerate(listed), [(i, i // 2, f"cap {i}") for i in range(2 * len(listed))]))
    content["annotations"] = [{k: v for k, v in (a | more).items() if v is not None} for a in content["annotations"]]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("source", "folder", "written"),
    [
        ("captions.json", "images/", ""),
        ("captions.json", "", ""),
        ("anything.json", "images/", "images/"),
        ("anything.json", "Images/", "train2014/"),
        ("annotations/train.json", "train/", ""),
        ("annotations/train.json", "images/train/", "train/"),
        ("annotations/my_training_set.json", "training/", ""),
        ("annotations/captions_train2017.json", "train2017/", "train2017/"),
        ("annotations/captions_train2017.json", "images/", ""),
        ("annotations/captions_train2017.json", "", ""),
        ("nocaps_val_4500_captions.json", "val/", ""),
        ("captions.json", "images/", "http://images.cocodataset.org/train2017/"),
    ],
)
def test_cocos_form_whatever_it_is_called(tmp_path: Path, source: str, folder: str, written: str) -> None:
    """VizWiz, nocaps and many tools write it: once no layout, or "not a list of objects". Names may have a folder or not."""
    root = fill(tmp_path, empty(*(folder + name for name in NAMES)) | {source: coco_of([written + n for n in NAMES])})
    fill(tmp_path, {"annotations/instances.json": '{"images": [], "annotations": [{"category_id": 1}]}'})
    assert everything(root) == everything(root / source) == {
        folder + name: [f"cap {2 * i}", f"cap {2 * i + 1}"] for i, name in enumerate(NAMES)
    }  # fmt: skip
    assert load_table("coco", root, "val").name == "coco"


def test_cocos_parts_under_other_names(tmp_path: Path) -> None:
    files = {f"annotations/{part}.json": coco_of([f"{part}_{name}" for name in NAMES]) for part in ("train", "val")}
    fill(tmp_path, files | empty(*(f"{part}/{part}_{name}" for part in ("train", "val") for name in NAMES)))
    for path in (tmp_path, tmp_path / "annotations/val.json"):
        parts = load_tables("auto", path)
        assert [names(parts[split])[0] for split in ("train", "val", "test")] == [
            "train/train_0.jpg", "val/val_0.jpg", "val/val_0.jpg",
        ]  # fmt: skip
    fill(tmp_path, {"a.json": coco_of(NAMES), "b.json": coco_of(NAMES)} | FIVE)
    assert "holds 4 (" in error_of(lambda: load_tables("auto", tmp_path))
    assert len(everything(tmp_path / "b.json")) == 5


@pytest.mark.parametrize("number", [None, "x9", 1.5])
def test_without_numbers_the_order_of_annotations_counts(tmp_path: Path, number: object) -> None:
    """They were refused, although nothing but the order needs them."""
    fill(tmp_path, empty(*(f"train2017/{name}" for name in NAMES)))
    fill(tmp_path, {"annotations/captions_train2017.json": coco_of(NAMES, id=number)})
    assert everything(tmp_path)["train2017/4.jpg"] == ["cap 8", "cap 9"]


def test_rejected_captions_are_left_out_and_counted(tmp_path: Path) -> None:
    """VizWiz: "Quality issues are too severe to recognize visual content" was learned as a caption."""
    content = json.loads(coco_of(NAMES))
    for annotation, flag in zip(content["annotations"], ("is_rejected", "is_precanned", "is_rejected"), strict=False):
        annotation[flag] = True
    fill(tmp_path, empty(*(f"images/{name}" for name in NAMES)) | {"c.json": json.dumps(content)})
    assert everything(tmp_path)["images/1.jpg"] == ["cap 3"] and "images/0.jpg" not in everything(tmp_path)
    assert load_table("auto", tmp_path, "train").left_out == {
        "rejected captions (the first: annotation 0)": 3,
        "pictures without a caption": 1,
    }


def test_nocaps_says_each_pictures_domain(tmp_path: Path) -> None:
    content = json.loads(coco_of(NAMES))
    for i, image in enumerate(content["images"]):
        image["domain"] = ["in-domain", "near-domain"][i % 2]
    fill(tmp_path, empty(*(f"val/{name}" for name in NAMES)) | {"nocaps_val_4500_captions.json": json.dumps(content)})
    table = load_table("auto", tmp_path, "val")
    assert table.domains_of([1, 0]) == ["near-domain", "in-domain"]
    content["images"][0]["domain"] = "flowers"
    (tmp_path / "nocaps_val_4500_captions.json").write_text(json.dumps(content))
    assert load_table("auto", tmp_path, "val").domains_of([0, 1]) == []


def test_textcaps_as_it_is_downloaded(tmp_path: Path) -> None:
    """Its captions are called caption_str, its pictures lie in train_images/ and are named without that and a suffix."""
    for part in ("train", "val"):
        own = [f"{part}{i:012x}" for i in range(3)]
        entries = [
            {"question": "", "image_id": name, "image_classes": ["Sign"], "flickr_original_url": "https://x/y.jpg",
             "image_width": 8, "set_name": part, "image_name": name, "image_path": f"train/{name}.jpg", "caption_id": 5 * i + k,
             "caption_str": f"cap {i} {k}", "caption_tokens": ["cap"], "reference_strs": [f"cap {i} 0", f"cap {i} 1"]}
            for i, name in enumerate(own) for k in range(2)
        ]  # fmt: skip
        about = {"dataset_type": part, "dataset_name": "TextCaps", "dataset_version": "0.1", "data": entries}
        fill(tmp_path, {f"TextCaps_0.1_{part}.json": json.dumps(about)})
        fill(tmp_path, empty(*(f"train_images/{name}.jpg" for name in own)))
    parts = load_tables("auto", tmp_path)
    assert names(parts["train"]) == [f"train_images/train{i:012x}.jpg" for i in range(3)]
    assert captions(parts["val"]) == [[f"cap {i} 0", f"cap {i} 1"] for i in range(3)]


# Flickr's authors


TOKENS = "".join(f"{name}#{k}\tcap {k} of {name} .\n" for name in NAMES for k in range(2))


@pytest.mark.parametrize(
    ("source", "folder", "family"),
    [
        ("Flickr8k.token.txt", "Flicker8k_Dataset/", "flickr8k"),
        ("Flickr8k_text/Flickr8k.token.txt", "Flickr8k_Dataset/Flicker8k_Dataset/", "flickr8k"),
        ("results_20130124.token", "flickr30k-images/", "flickr30k"),
        ("results_20130124.token", "", "flickr30k"),
    ],
)
def test_the_authors_own_files(tmp_path: Path, source: str, folder: str, family: str) -> None:
    """What the university sends was read by nothing; a lemmatised copy lies beside it."""
    beside = source.rpartition("/")[0]
    lists = {"train": "0.jpg\n1.jpg\n", "dev": "2.jpg\n", "test": "3.jpg\n"} if family == "flickr8k" else {}
    files: dict[str, str | bytes] = {
        f"{beside}/Flickr_8k.{part}Images.txt".strip("/"): own for part, own in lists.items()
    }
    files[f"{beside}/Flickr8k.lemma.token.txt".strip("/")] = "not this"
    root = fill(tmp_path, files | {source: TOKENS} | empty(*(folder + name for name in NAMES)))
    for path in (root, root / source):
        parts = load_tables("auto", path)
        assert parts["train"].name == family and not parts["train"].missing
        assert everything(path)[f"{folder}3.jpg"] == ["cap 0 of 3.jpg .", "cap 1 of 3.jpg ."]
        if lists:
            assert [ids(parts[split]) for split in ("train", "val", "test")] == [
                ["0.jpg", "1.jpg"],
                ["2.jpg"],
                ["3.jpg"],
            ]
    fill(tmp_path, {source: f"{TOKENS}cut off"})
    assert error_of(lambda: load_tables("auto", root)).startswith(f"{root / source}:11: not 'name#number caption'")


def test_pictures_in_none_of_the_lists_are_counted(tmp_path: Path) -> None:
    lists = {"Flickr_8k.trainImages.txt": "0.jpg\n1.jpg\n", "Flickr_8k.devImages.txt": "2.jpg\n"}
    fill(
        tmp_path,
        lists
        | {"captions.txt": CSV_OF_FIVE.replace("file_name", "image")}
        | empty(*(f"Images/{name}" for name in NAMES)),
    )
    left_out = load_tables("auto", tmp_path)["train"].left_out
    assert left_out == {"pictures in none of the lists (the first: 3.jpg)": 2}


@pytest.mark.parametrize("source", ["captions.txt", "flickr30k_images/results.csv", "dataset_flickr8k.json", "c.csv"])
@pytest.mark.parametrize("base", ["{}/pictures/Images", "https://example.org/a"])
def test_names_that_say_the_whole_way(tmp_path: Path, source: str, base: str) -> None:
    """Flickr8k's Images/ was put before them a second time, and none was there."""
    root = fill(tmp_path / "pictures", empty(*(f"Images/{name}" for name in NAMES)))
    paths = [f"{base.format(tmp_path)}/{name}" for name in NAMES]
    karpathys = [{"filename": path, "split": "train", "sentences": [{"raw": "text"}]} for path in paths]
    karpathys[0]["split"] = "val"
    content = {
        "results.csv": "image_name| comment_number| comment\n" + "".join(f"{path}| 0| text\n" for path in paths),
        "dataset_flickr8k.json": json.dumps({"images": karpathys}),
    }.get(Path(source).name, "image,caption\n" + "".join(f"{path},text\n" for path in paths))
    fill(root, {source: content})
    assert everything(root) == {f"Images/{name}": ["text"] for name in NAMES}


def test_a_link_that_leads_to_itself_is_a_missing_picture(tmp_path: Path) -> None:
    """One of them ended the reading of any layout: "cannot be read: Too many levels of symbolic links"."""
    fill(tmp_path, empty(*NAMES) | {"c.csv": CSV_OF_FIVE})
    before = names(load_tables("auto", tmp_path)["train"])
    link = tmp_path / before[0]
    link.unlink()
    link.symlink_to(link)
    train = load_tables("auto", tmp_path)["train"]
    assert names(train) == before[1:] and train.missing == (before[0],)


def test_captions_by_picture_whose_first_name_has_an_unknown_suffix(tmp_path: Path) -> None:
    """{picture: captions} was recognised by its first name alone."""
    content = {"raw.cr2": "one"} | {name: "text" for name in NAMES}
    fill(tmp_path, empty("raw.cr2", *NAMES) | {"captions.json": json.dumps(content)})
    assert everything(tmp_path)["raw.cr2"] == ["one"]


# Names of pictures


NFD = unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("written", "there"),
    [
        (".\\imgs\\{}.jpg", "imgs/{}.jpg"),
        ("imgs\\{}.jpg", "IMGS/{}.JPG"),
        ("{}.jpg", "{}.JPG"),
        ("{}.jpg", "images/{}.png"),
        ("a.b.{}", "a.b.{}.webp"),
        ("café{}.jpg", NFD + "{}.jpg"),
        (NFD + "{}.jpg", "café{}.jpg"),
        ("{root}/imgs/{}.jpg", "imgs/{}.jpg"),
        ("/home/somebody/imgs/{}.jpg", "imgs/{}.jpg"),
        ("C:\\Users\\me\\imgs\\{}.jpg", "imgs/{}.jpg"),
        ("https://host.org/some/my%20photo%20{}.jpg?size=large", "imgs/my photo {}.jpg"),
    ],
)
def test_names_that_mean_one_picture(tmp_path: Path, written: str, there: str) -> None:
    """All of them were "missing", or led out of the folder, with the pictures in front of one's eyes."""
    rows = [f"{written.format(i, root=tmp_path)},cap {i}" for i in range(5)]
    fill(tmp_path, empty(*(there.format(i) for i in range(5))) | {"c.csv": csv_of(rows)})
    assert {Path(name).as_posix(): own for name, own in everything(tmp_path).items()} == {
        there.format(i): [f"cap {i}"] for i in range(5)
    }


def test_windows_names_say_their_part(tmp_path: Path) -> None:
    listed_ = ["train\\0.jpg", "train\\1.jpg", "val\\2.jpg"]
    fill(tmp_path, empty(*(name.replace("\\", "/") for name in listed_)))
    fill(tmp_path, {"c.csv": csv_of([f"{name},x" for name in listed_])})
    parts = load_tables("auto", tmp_path)
    assert ids(parts["train"]) == ["train/0.jpg", "train/1.jpg"] and ids(parts["val"]) == ["val/2.jpg"]


def test_a_name_with_a_backslash_in_it_is_itself(tmp_path: Path) -> None:
    fill(tmp_path, empty(*(f"a\\{i}.jpg" for i in range(5))) | {"c.csv": csv_of([f"a\\{i}.jpg,x" for i in range(5)])})
    assert set(everything(tmp_path)) == {f"a\\{i}.jpg" for i in range(5)}


@pytest.mark.parametrize(
    ("written", "there", "said"),
    [
        ("{}.jpg", ("{}.png", "{}.webp"), "(the most similar name is '1.png')"),
        ("{}.jpg", ("photos/{}.jpg",), "(the most similar name is 'photos/1.jpg')"),
        ("photo_{}.jpg", ("foto_{}.jpg",), "(the most similar name is 'foto_0.jpg')"),
        (
            "https://host.org/{}.jpg",
            ("a/{}.jpg", "b/{}.jpg"),
            "(the most similar name is 'a/0.jpg'): download the pictures",
        ),
        ("https://host.org/{}.jpg", (), ":2: 'https://host.org/0.jpg' leads out of the data folder: download"),
    ],
)
def test_names_that_may_mean_several_or_none(tmp_path: Path, written: str, there: tuple[str, ...], said: str) -> None:
    """Nothing is guessed: thumbnails or another size may lie in the other folder."""
    fill(tmp_path, empty(*(each.format(i) for each in there for i in range(5))))
    fill(tmp_path, {"c.csv": csv_of([f"{written.format(i)},cap {i}" for i in range(5)])})
    assert said in error_of(lambda: load_tables("auto", tmp_path))


def test_a_picture_that_a_row_names_is_not_anothers(tmp_path: Path) -> None:
    """A.JPG and a.jpg in one table: the second would be the same picture, perhaps in another part."""
    fill(tmp_path, empty("A.JPG", *(f"{i}.jpg" for i in range(40))))
    fill(tmp_path, {"c.csv": csv_of(["a.jpg,x", "A.JPG,y", *(f"{i}.jpg,z" for i in range(40))])})
    assert "a.jpg" not in everything(tmp_path) and everything(tmp_path)["A.JPG"] == ["y"]


def test_it_is_said_when_names_differ(tmp_path: Path) -> None:
    fill(tmp_path, {"c.csv": CSV_OF_FIVE} | empty(*(f"{i}.JPG" for i in range(5))))
    about = load_table("auto", tmp_path, "train").about
    assert "5 pictures are there under another case, Unicode form or suffix ('1.JPG' for '1.jpg')" in about


# Parts


def test_pictures_of_one_text_stay_together(tmp_path: Path) -> None:
    """a.jpg and a.png beside one a.txt are one photograph twice: half of such pairs had one of them in test."""
    suffixes = ("jpg", "png")
    fill(
        tmp_path,
        empty(*(f"{i}.{suffix}" for i in range(40) for suffix in suffixes), *(f"{i}.jpg" for i in range(40, 60))),
    )
    fill(tmp_path, {f"{i}.txt": f"cap {i}" for i in range(60)})
    stems = [{Path(name).stem for name in names(part)} for part in load_tables("auto", tmp_path).values()]
    assert sum(map(len, stems)) == len(set().union(*stems)) == 60 and all(stems)
    small = fill(tmp_path / "small", empty("a.jpg", "a.png", "b.jpg", "b.png") | {"a.txt": "x", "b.txt": "y"})
    assert "too few" in error_of(lambda: load_tables("auto", small))


def test_pictures_of_one_stem_but_their_own_texts_are_two(tmp_path: Path) -> None:
    rows = [f"{i}.{suffix},{suffix} {i}" for i in range(100) for suffix in ("jpg", "png")]
    fill(tmp_path, empty(*(row.split(",")[0] for row in rows)) | {"c.csv": csv_of(rows)})
    stems = [{Path(name).stem for name in names(part)} for part in load_tables("auto", tmp_path).values()]
    assert sum(map(len, stems)) > 100


def test_bits_of_sixteen() -> None:
    """What a 12-bit camera keeps in a file of 16 bits was black. Truly dark pictures of 16 bits stay as they are."""
    from data.pictures import load_picture

    across = np.linspace(0, 1, 32)[None].repeat(32, 0)
    for top, white in ((4095, 4095), (3000, 4095), (5000, 65535), (65535, 65535)):
        for kind in ("PNG", "TIFF"):
            file = io.BytesIO()
            Image.fromarray((across * top).round().astype(np.uint16)).save(file, kind)
            assert abs(load_picture(file.getvalue(), 32)[0].numpy() - across * top / white * 255).max() <= 1, (
                top,
                kind,
            )
