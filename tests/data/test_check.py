"""check.py: each thing that it reports is put into a small data set and must be found, and a clean set must pass."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_shared
from PIL import Image
from processes import finished, launch

import dataset
from config import UserError
from data import check
from data.check import check_tables, count_odd, print_report
from data.copies import MAX_DISTANCE
from data.sources import load_tables

Picture = tuple[str, bytes | None, list[str]]  # file name, content (None: missing), captions


def photo(seed: int, size: int = 96) -> Image.Image:
    """Soft spots of colour: no two seeds look alike, and copies of one do."""
    spots = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    return Image.fromarray(spots).resize((size, size), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


def some(part: str, number: int, first_seed: int) -> list[Picture]:
    """Sound pictures with captions of their own."""
    return [
        (f"{part}{i}.jpg", jpeg(photo(first_seed + i)), [f"{part} picture {i}", f"another view of {part} {i}"])
        for i in range(number)
    ]


def write(root: Path, **parts: list[Picture]) -> Path:
    """COCO's layout."""
    number = 0
    for part, pictures in parts.items():
        (root / f"{part}2017").mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for name, content, captions in pictures:
            number += 1
            images.append({"id": number, "file_name": name})
            annotations += [{"id": 10 * number + i, "image_id": number, "caption": c} for i, c in enumerate(captions)]
            if content is not None:
                (root / f"{part}2017" / name).write_bytes(content)
        about = {"images": images, "annotations": annotations}
        (root / f"annotations/captions_{part}2017.json").write_text(json.dumps(about))
    return root


def clean(root: Path) -> Path:
    return write(root, train=some("train", 12, 0), val=some("val", 4, 100), test=some("test", 4, 200))


def few(**parts: int) -> list[str]:
    """What the check says of parts as small as these tests'."""
    return [f"{part}: numbers rest on {number} pictures, mostly chance below 200" for part, number in parts.items()]


def report_of(root: Path, **options) -> check.Report:
    return check_tables(load_tables("auto", root), progress=False, **options)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def state_of(folder: Path) -> dict[str, tuple[int, str]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files}


# The command


def test_a_clean_set_passes_and_is_left_as_it_was(tmp_path, monkeypatch, capsys):
    root = clean(tmp_path / "data")
    before = state_of(root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dataset.py", "check", "data"])
    assert dataset.main() == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == "fit to train on"
    warned = [line.removeprefix("warning     ") for line in output.splitlines() if line.startswith("warning")]
    assert state_of(root) == before and {path.name for path in tmp_path.iterdir()} == {"data", "check"}
    names = {path.name for path in (tmp_path / "check").iterdir()}
    assert names == {"check.json", "bad_samples.csv", "duplicates.csv", "lengths.png"}
    figures = json.loads((tmp_path / "check/check.json").read_text())
    assert figures["fit"] and not figures["reasons"] and figures["warnings"] == warned == few(val=4, test=4)
    train = figures["parts"]["train"]
    assert (train["pictures"], train["captions"], train["missing"], train["undecodable"]) == (12, 24, 0, 0)
    assert train["captions_a_picture"] == {"min": 2, "median": 2.0, "max": 2}
    assert rows_of(tmp_path / "check/bad_samples.csv") == rows_of(tmp_path / "check/duplicates.csv") == []
    assert "train       12 pictures, 24 captions (2 a picture)" in output


def test_pictures_in_no_part_are_counted_and_names_escaped(tmp_path, capsys):
    """Half a folder that no caption named was not mentioned; what colours a terminal came out of names as it is."""
    root = clean(tmp_path / "data")
    for name in ("val2017/b\x1b[31m.jpg", "val2017/a.png", ".hidden/c.jpg", "val2017/._val0.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    report = report_of(root)
    assert report.figures["unused"] == {"pictures": 2, "first": "val2017/a.png"}
    (root / "val2017/a.png").unlink()
    print_report(report_of(root))
    output = capsys.readouterr().out
    assert "unused      1 picture below the folder in no split, such as val2017/b\\x1b[31m.jpg\n" in output
    assert report_of(clean(tmp_path / "other")).figures["unused"] == {"pictures": 0, "first": None}


def test_an_unfit_set_exits_1_and_says_why_last(tmp_path):
    broken = [("cut.jpg", jpeg(photo(50))[:700], ["cut"]), ("empty.jpg", b"", ["empty"]), ("gone.jpg", None, ["gone"])]
    write(tmp_path / "data", train=some("train", 9, 0) + broken, val=some("val", 4, 100))
    result = finished("dataset.py", "check", "data", "--output-dir", "out", cwd=tmp_path, code=None)
    assert result.returncode == 1, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last == "not fit: pictures missing or undecodable: 3 of 16 (allowed: 1.0%)"
    bad = {Path(row["picture"]).name: row for row in rows_of(tmp_path / "out/bad_samples.csv")}
    assert set(bad) == {"cut.jpg", "empty.jpg", "gone.jpg"} and {row["part"] for row in bad.values()} == {"train"}
    assert bad["gone.jpg"]["reason"] == "no such file" and "empty" in bad["empty.jpg"]["reason"]
    assert "truncated" in bad["cut.jpg"]["reason"]
    assert all(f"{name} (train): " in result.stdout for name in bad)


def test_ctrl_c_ends_in_one_line(tmp_path):
    root = tmp_path / "data"
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)
    root.mkdir()
    Image.fromarray(noise).save(tmp_path / "noise.png", compress_level=0)
    for i in range(2000):  # minutes of decoding
        os.link(tmp_path / "noise.png", root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"picture {i}")
    with launch("dataset.py", "check", "data", "--output-dir", "out", cwd=tmp_path) as process:
        for _ in range(600):  # the folder is made when the reading begins
            if (tmp_path / "out").exists():
                break
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.strip() == "stopped" and "fit" not in output
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    root = clean(tmp_path / "data")
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr(check, "check_tables", lambda *_: pytest.fail("read the pictures first"))
    with pytest.raises(UserError, match=r"taken.*--output-dir"):
        check.main([str(root), "--output-dir", str(tmp_path / "taken/out")])
    before = state_of(root)
    with pytest.raises(UserError, match="inside the data folder"):
        check.main([str(root), "--output-dir", str(root / "check")])
    with pytest.raises(UserError, match="inside the data folder"):
        check.main([str(root / "annotations/captions_train2017.json"), "--output-dir", str(root / "x/y")])
    assert state_of(root) == before and not (root / "check").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-bad-share", "1.5"], "max_bad_share is 1.5"),
        (["--max-words", "0"], "max_words is 0"),
        (["--num-workers", "0"], "num_workers is 0"),
    ],
)
def test_flags_that_mean_nothing(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        check.main([str(tmp_path), *flags])


def test_data_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="name the folder"):
        check.main([])
    with pytest.raises(UserError, match="no such folder"):
        check.main(["nothing"])
    assert not list(tmp_path.iterdir())


# Pictures


def test_the_allowed_share_is_of_all_pictures(tmp_path):
    """As training has it: one bad picture of three to validate with must not stop a run."""
    gone = [("gone.jpg", None, ["gone"])]
    root = write(tmp_path, train=some("train", 30, 0), val=some("val", 3, 100) + gone)
    assert report_of(root, max_bad_share=0.02).reasons == ["pictures missing or undecodable: 1 of 34 (allowed: 2.0%)"]
    report = report_of(root, max_bad_share=0.03)
    assert report.verdict == "fit to train on"
    assert report.warnings == ["pictures missing or undecodable: 1 of 34", *few(val=3)]


def test_exact_copies_between_parts_and_inside_them(tmp_path):
    train, val, test = some("train", 6, 0), some("val", 4, 100), some("test", 4, 200)
    train.append(("again.jpg", train[0][1], ["the first once more"]))
    val[2] = ("was-test1.jpg", test[1][1], ["of test"])
    test[3] = ("was-train5.jpg", train[5][1], ["of train"])
    empty = [("a.jpg", b"", ["a"]), ("b.jpg", b"", ["b"])]  # equal, but no pictures
    root = write(tmp_path / "data", train=train + empty, val=val + empty[:1], test=test)
    report = report_of(root, max_bad_share=0.24)
    assert [part["exact_copies_inside"] for part in report.figures["parts"].values()] == [1, 0, 0]
    number = {pair: found["exact"] for pair, found in report.figures["duplicates"].items()}
    assert number == {"train/val": 0, "train/test": 1, "val/test": 1}
    assert report.reasons == ["test pictures that are also in train: 1 of 4 (allowed: 24.0%)"]
    assert "test pictures that are also in val: 1 of 4" in report.warnings

    assert check.main([str(root), "--output-dir", str(tmp_path / "out"), "--max-bad-share", "0.25"]) == 0
    rows = rows_of(tmp_path / "out/duplicates.csv")
    found = {(Path(row["picture"]).name, Path(row["same_as_picture"]).name, row["kind"]) for row in rows}
    assert found == {("was-train5.jpg", "train5.jpg", "exact"), ("test1.jpg", "was-test1.jpg", "exact")}
    assert min(Image.open(tmp_path / "out/duplicates.png").size) > 200

    assert check.main([str(clean(tmp_path / "clean")), "--output-dir", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out/duplicates.png").exists()  # the earlier data's


def test_near_copies_are_resized_recompressed_or_slightly_cropped(tmp_path):
    pytest.importorskip("imagehash")
    train = [(f"{i}.jpg", jpeg(photo(i, 200)), [f"picture {i}"]) for i in range(6)]
    test = [
        ("resized0.jpg", jpeg(photo(0, 200).resize((70, 110))), ["smaller"]),
        ("recompressed1.jpg", jpeg(photo(1, 200), 30), ["coarser"]),
        ("cropped2.jpg", jpeg(photo(2, 200).crop((2, 2, 198, 198))), ["without a rim"]),
        ("other.jpg", jpeg(photo(77, 200)), ["another"]),
    ]
    root = write(tmp_path / "data", train=train, val=some("val", 2, 100), test=test)
    report = report_of(root)
    pairs = {(test[pair.row][0], pair.same_as_part, pair.same_as_row) for pair in report.duplicates}
    assert pairs == {("resized0.jpg", "train", 0), ("recompressed1.jpg", "train", 1), ("cropped2.jpg", "train", 2)}
    assert report.figures["duplicates"]["train/test"] == {"exact": 0, "near": 3}
    assert report.verdict == "fit to train on"  # what is near is for a person to judge
    assert report.warnings == [*few(val=2, test=4), "test pictures that look like one in train: 3 of 4"]


def test_equal_shapes_of_other_colours_are_not_near(tmp_path):
    """The perceptual hash alone takes them for each other, as it does half of all drawn scenes."""
    imagehash = pytest.importorskip("imagehash")

    def square(colour: str) -> Image.Image:
        image = Image.new("RGB", (96, 96), "white")
        image.paste(colour, (20, 30, 60, 70))
        return image

    assert imagehash.phash(square("red")) - imagehash.phash(square("blue")) <= MAX_DISTANCE
    train = [*some("train", 3, 0), ("red.jpg", jpeg(square("red")), ["a red square"])]
    root = write(tmp_path, train=train, val=[("blue.jpg", jpeg(square("blue")), ["a blue square"])])
    assert report_of(root).duplicates == []


def test_a_black_picture_is_no_copy_of_a_broken_one(tmp_path):
    """What is remembered of a broken picture is zeros, and so is a black one's hash."""
    pytest.importorskip("imagehash")
    black = jpeg(Image.new("RGB", (96, 96)))
    train = [*some("train", 3, 0), ("broken.jpg", b"no picture", ["broken"])]
    assert report_of(write(tmp_path, train=train, val=[("black.jpg", black, ["black"])])).duplicates == []


def test_without_imagehash_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    copy = ("copy.jpg", jpeg(photo(0), 60), ["a copy"])
    root = write(tmp_path, train=some("train", 3, 0), val=[copy, ("same.jpg", jpeg(photo(1)), ["the same"])])
    report = report_of(root)
    print_report(report)
    lines = [line for line in capsys.readouterr().out.splitlines() if "ImageHash" in line]
    assert len(lines) == 1 and "pip install -r requirements/data.txt" in lines[0]
    assert report.figures["duplicates"] == {"train/val": {"exact": 1, "near": None}}


def test_val_that_serves_as_test_is_looked_at_once(tmp_path, capsys):
    report = report_of(write(tmp_path, train=some("train", 3, 0), val=some("val", 2, 100)))
    print_report(report)
    assert set(report.figures["parts"]) == {"train", "val"} and set(report.figures["duplicates"]) == {"train/val"}
    assert report.verdict == "fit to train on" and report.warnings == few(val=2)
    assert "val serves as test" in capsys.readouterr().out


def test_no_train_part(tmp_path):
    assert report_of(write(tmp_path, val=some("val", 3, 0))).verdict == "not fit: no train split"


def test_a_test_picture_with_the_id_of_a_train_picture(tmp_path):
    """Training refuses it, so that the check must not call it fit."""
    train, test = [*some("train", 3, 0), ("000000000004.jpg", jpeg(photo(4)), ["four"])], some("test", 2, 200)
    root = write(
        tmp_path,
        train=train,
        val=some("val", 2, 100),
        test=[("COCO_val2014_000000000004.jpg", jpeg(photo(5)), ["once more"]), *test],
    )
    assert not report_of(root).reasons
    source = root / "annotations/captions_test2017.json"
    content = json.loads(source.read_text())
    content["images"][0]["id"] = content["annotations"][0]["image_id"] = 4
    source.write_text(json.dumps(content))
    assert report_of(root).reasons == ["test pictures that are, by their ids, train pictures: 1"]


def test_pictures_inside_tar_files(tmp_path):
    for part, seeds in (("train", range(5)), ("val", (4, 8)), ("test", (9,))):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for key, seed in enumerate(seeds):
                content = jpeg(photo(seed))
                for suffix, data in (("jpg", content[:500] if seed == 2 else content), ("txt", b"picture %d" % seed)):
                    member = tarfile.TarInfo(f"{key:03}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    report = report_of(tmp_path)
    assert [bad.picture for bad in report.bad] == [f"{tmp_path}/train.tar: 002"]
    assert [(pair.part, pair.row, pair.same_as_row) for pair in report.duplicates] == [("val", 0, 4)]


# Captions


def test_lengths_repeats_and_what_was_left_out(tmp_path, capsys):
    captions = [
        ["one two three four", " ", "a dog"],
        ["a dog", "a dog"],
        ["a dog .", "w " * 12],
        ["only one"],
        ["a dog"],
    ]
    train = [(f"{i}.jpg", jpeg(photo(i)), own) for i, own in enumerate(captions)]
    root = write(tmp_path / "data", train=[*train, ("none.jpg", jpeg(photo(9)), [""])], val=some("val", 2, 100))
    report = report_of(root, max_words=10)
    found = report.figures["captions"]
    words = [4, 2, 2, 2, 3, 12, 2, 2, 3, 5, 3, 5]
    assert [found["words"][name] for name in ("min", "median", "95 %", "max")] == [
        2,
        float(np.median(words)),
        float(np.percentile(words, 95)),
        12,
    ]
    assert found["words"]["captions_of_0_1_2_words"] == [0, 0, 5, 3, 1, 2]
    assert found["over_long"] == {"more_words_than": 10, "captions": 1, "example": " ".join("w" * 12)}
    assert found["on_several_pictures"] == [{"caption": "a dog", "pictures": 3}]  # on one of them twice
    assert report.figures["left_out"] == {"empty captions": 2, "pictures without a caption": 1}
    assert report.warnings == [*few(val=2), "captions of more than 10 words: 1"]
    print_report(report)
    output = capsys.readouterr().out
    assert "skipped     2 empty captions\n" in output and "repeated    on 3 pictures: 'a dog'\n" in output
    assert "(1 to 2 a picture)" in output


ODD = {
    "replacement character": ["caf\ufffd", "\ufffd and 犬"],
    "mojibake": ["CafÃ© de la gare", "itâ€™s a dog", "a dog ðŸ˜€"],
    "control or invisible": ["a\x07dog", "zero\u200bwidth", "a\ufeffdog", "\u202ereversed"],
    "emoji": ["a dog 🐶", "sun ☀ above", "❤"],
    "Chinese, Japanese or Korean": ["一只狗", "いぬ", "개"],
    "right-to-left": ["كلب", "כלב"],
    "other non-ASCII": ["café", "Straße — naïve", "собака", "SÃO PAULO", "10 °C"],
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_characters(kind):
    import pyarrow as pa

    plain = ["a dog", "it's 5 o'clock (~3 %)", "a_b@c.d"]
    captions = [*plain, *ODD[kind]]
    assert count_odd(pa.chunked_array([captions])) == {kind: {"captions": len(ODD[kind]), "example": ODD[kind][0]}}


def test_damaged_captions_warn_and_foreign_ones_do_not(tmp_path, capsys):
    train = some("train", 3, 0)
    train[0][2][0] = "CafÃ© " + "de la gare " * 8
    train[1][2][0] = "word " * 30 + "犬"
    report = report_of(write(tmp_path, train=train, val=some("val", 2, 100)))
    assert report.warnings == [*few(val=2), "damaged captions (mojibake): 1"] and not report.reasons
    print_report(report)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("characters")]
    assert len(lines) == 2 and "CafÃ©" in lines[0] and "犬" in lines[1]
    assert max(map(len, lines)) < 120


NOT_PLAIN = {
    "that begin with [, { or <": ["['a', 3]", '{"caption": "a dog"}', "[a dog]"],
    "with HTML entities": ["a dog &amp; a cat", "it&#39;s a dog", "a dog&#x2019;s"],
    "with mark-up": ["a <b>bold</b> dog", "a dog<br/>"],
    "with URL-encoding": ["denise%27s+dog", "caf%c3%a9", "a+dog+runs"],
    "that say nan or None": ["nan", "None", "N/A"],
    "with special tokens": ["a dog <|endoftext|>", "so <|im_end|> there"],
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_captions_that_are_no_plain_text_warn(kind, tmp_path, capsys):
    """Brackets, &amp; and %27s+ were learned with the words, and the check said nothing but "fit to train on"."""
    train = some("train", 4, 0)
    plain = ["R&D and 3 < 4; 100 % > 50%, a+b", "100%fat & more; 20%de", "(nan) none of them", "a | b"]
    for picture, odd, own in zip(train, NOT_PLAIN[kind] * 2, plain, strict=False):
        picture[2][:] = [own, odd]
    report = report_of(write(tmp_path, train=train, val=some("val", 2, 100)))
    number = sum(len(picture[2]) == 2 and picture[2][1] in NOT_PLAIN[kind] for picture in train)
    assert report.warnings[1:] == [f"captions {kind}: {number}, such as {NOT_PLAIN[kind][0]!r}"] and not report.reasons
    print_report(report)
    assert f"warning     captions {kind}: " in capsys.readouterr().out


def test_a_caption_may_be_odd_in_several_ways(tmp_path):
    train = some("train", 2, 0)
    train[0][2][:] = ["<p>a &quot;dog&quot;%20</p>"]
    warnings = report_of(write(tmp_path, train=train, val=some("val", 2, 100))).warnings
    assert [line.split(":")[0] for line in warnings[1:]] == [f"captions {kind}" for kind in list(NOT_PLAIN)[:4]]


def test_rows_that_are_there_twice_are_counted(tmp_path, capsys):
    train = some("train", 3, 0)
    train[0][2][:] = ["a dog", "a cat", "a dog", "a dog"]
    report = report_of(write(tmp_path, train=train, val=some("val", 2, 100)))
    assert report.figures["captions"]["twice_on_a_picture"] == 2
    print_report(report)
    assert "repeated    2 captions repeated on the same picture" in capsys.readouterr().out


def test_a_missing_pictures_nearest_name_is_said(tmp_path):
    train = [*some("train", 9, 0), ("fotograph.jpg", None, ["a dog"])]
    root = write(tmp_path, train=train, val=some("val", 2, 100))
    (root / "photos").mkdir()
    (root / "photos/fotografh.jpg").write_bytes(jpeg(photo(70)))
    (bad,) = report_of(root).bad
    assert bad.reason == "no such file (the most similar name is 'photos/fotografh.jpg')"


# Real data


def test_tiny_coco_is_fit(tmp_path):
    report = report_of(needs_shared("tiny_coco"))
    assert report.verdict == "fit to train on" and not report.bad and not report.duplicates
    assert {split: part["captions"] for split, part in report.figures["parts"].items()} == {"train": 250, "val": 250}
