"""The drawn scenes: what they hold, that captions say what is drawn, and that the marker marks."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from PIL import Image

from config import UserError
from data.scenes import (
    COLOURS,
    COUNTS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Group,
    Scene,
    draw,
    draw_scenes,
    make_scene,
    mark,
    parse_caption,
    random_scene,
    scene_from_dict,
    score_scenes,
)


def test_scenes_hold_enough():
    assert len(COLOURS) >= 8 and len(SHAPES) >= 4 and len(SIZES) >= 2 and sorted(COUNTS.values()) == [1, 2, 3]
    assert len(PLACES) >= 5 and len(RELATIONS) >= 4
    scenes = [make_scene(0, "train", index)[0] for index in range(3000)]
    assert sum(len(scene.groups) == 2 for scene in scenes) >= len(scenes) / 3
    groups = [group for scene in scenes for group in scene.groups]
    for name, values in {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "count": {1, 2, 3}}.items():
        seen = [getattr(group, name) for group in groups]
        assert set(seen) == set(values)
        assert min(map(seen.count, values)) > 0.7 * len(seen) / len(values)  # drawn evenly
    assert {scene.where for scene in scenes} == set(PLACES) | set(RELATIONS)


def test_every_caption_states_the_whole_scene():
    for index in range(2000):
        scene, captions, _ = make_scene(3, "val", index)
        assert len(set(captions)) == 5
        for caption in captions:
            assert parse_caption(caption) in (scene, scene.inverse)
            assert mark(scene, caption)["all"]


def test_marks_find_each_single_error():
    truth = Scene((Group(2, "small", "red", "circle"), Group(1, "large", "blue", "cross")), "left of")
    assert mark(truth, "a large blue cross right of two small red circles.")["all"]
    for caption, wrong in {
        "three small red circles left of a large blue cross": "count",
        "two large red circles left of a large blue cross": "size",
        "two small red circles left of a large green cross": "colour",
        "two small red circles left of a large blue square": "shape",
        "two small red circles right of a large blue cross": "where",
    }.items():
        marks = mark(truth, caption)
        assert not marks.pop("all")
        assert [name for name, right in marks.items() if not right] == [wrong]


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "two small red circles",
        "small red circles left of a large blue cross",
        "two small red circle left of a large blue cross",
        "a small red circles on the left",
        "two small red circles left of a large blue cross on the left",
        "two small red circles left right of a large blue cross",
        "two small red circles left of a large blue cross above a small red circle",
        "two small red circles at the top of a large blue cross",
        "there is two small red circles left of a large blue cross",
    ],
)
def test_captions_that_say_less_or_nonsense_are_wrong(caption):
    truth = Scene((Group(2, "small", "red", "circle"), Group(1, "large", "blue", "cross")), "left of")
    assert not mark(truth, caption)["all"]
    assert parse_caption(caption) is None


def test_shares():
    one = Scene((Group(1, "small", "red", "circle"),), "at the top")
    two = Scene((*one.groups, Group(2, "large", "blue", "cross")), "above")
    said = ["a small red circle at the top", "at the top there is a small pink circle", "nothing"]
    scores = score_scenes([one, one, two], said)
    assert scores["scene_accuracy"] == pytest.approx(1 / 3)
    assert scores["scene_accuracy_one_group"] == 0.5 and scores["scene_accuracy_two_groups"] == 0


def test_pictures_show_their_colours_and_counts():
    """Counted by flood filling what is not ground: the drawing must show as many shapes, of that colour, as it says."""
    rng = random.Random(5)
    for _ in range(60):
        scene = random_scene(rng, 1)
        group = scene.groups[0]
        pixels = np.asarray(draw(scene, rng)).astype(int)
        near = (abs(pixels - np.array(COLOURS[group.colour])).sum(-1) < 30).astype(np.uint8)
        count = 0
        while near.any():
            y, x = np.argwhere(near)[0]
            stack = [(y, x)]
            while stack:
                y, x = stack.pop()
                if 0 <= y < near.shape[0] and 0 <= x < near.shape[1] and near[y, x]:
                    near[y, x] = 0
                    stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
            count += 1
        assert count == group.count, scene


def test_drawing_spares_a_data_set_that_was_not_drawn_here(tmp_path):
    """`--preset demo --data-dir my_coco` once replaced the annotations of a real data set."""
    for name, content in {"foreign": '{"info": {}, "images": []}', "broken": "{", "pictures": None}.items():
        (tmp_path / name / "annotations").mkdir(parents=True)
        (tmp_path / name / "val2017").mkdir()
        if content is None:
            (tmp_path / name / "val2017" / "1.jpg").write_text("a photograph")
        else:
            (tmp_path / name / "annotations" / "captions_val2017.json").write_text(content)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match="holds another data set"):
            draw_scenes(tmp_path / name, {"train": 2, "val": 2})
        assert sorted(tmp_path.rglob("*")) == before


def test_drawing_is_repeatable_and_drawn_once(tmp_path):
    sizes = {"train": 6, "test": 3}
    draw_scenes(tmp_path / "a", sizes, seed=4)
    draw_scenes(tmp_path / "b", sizes, seed=4)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 11
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    before = (tmp_path / "a" / files[-1]).stat().st_mtime_ns
    draw_scenes(tmp_path / "a", sizes, seed=4)
    assert (tmp_path / "a" / files[-1]).stat().st_mtime_ns == before
    content = json.loads((tmp_path / "a/annotations/captions_test2017.json").read_text())
    assert scene_from_dict(content["images"][1]["scene"]) == make_scene(4, "test", 1)[0]
    assert Image.open(tmp_path / "a/test2017/000000000001.png").size == (96, 96)
