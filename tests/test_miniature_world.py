"""The world of the miniature model: its lists, its scenes, and the words of its captions."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from training.miniature import artists, people
from training.miniature.captions import HELD_OUT, caption, is_held_out
from training.miniature.drawings import Drawings
from training.miniature.names import ARTIST_FIRST, ARTIST_LAST, PERSON_FIRST, PERSON_LAST
from training.miniature.scenes import SceneMaker, load_shard, write_shard
from training.miniature.world import read_world

WORLD = read_world()


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    """Random pixels in place of the fetched drawings."""
    rng = np.random.default_rng(0)
    count = len(WORLD.labels) * len(WORLD.styles)
    alpha = rng.integers(0, 256, (30, 1, 96, 96))
    some = np.concatenate([rng.integers(0, 256, (30, 3, 96, 96)) * alpha // 255, alpha], 1).astype(
        np.uint8
    )
    objects = some[np.arange(count) % len(some)]
    faces = len(people.FACES)
    clothes = [[(i + j) % len(people.CLOTHES) for j in range(faces)] for i in range(len(WORLD.people))]
    one = objects[:faces]
    everyone = np.broadcast_to(one, (len(WORLD.people), *one.shape))
    labels = [k for k in range(len(WORLD.labels)) for _ in WORLD.styles]
    return Drawings(
        objects, labels, list(range(len(WORLD.styles))) * len(WORLD.labels), everyone, clothes
    )


@pytest.fixture(scope="module")
def structures(drawings):
    maker = SceneMaker(WORLD, drawings, 5)
    return [maker.structure() for _ in range(4000)]


def test_counts_are_the_papers_and_some_for_tuning():
    for group in (WORLD.named, WORLD.artists):
        assert Counter(one.split for one in group) == {"erase": 100, "retain": 100, "tune": 40}
    assert len(WORLD.tuning) == len(set(WORLD.tuning)) == 30
    assert len(WORLD.groups["ten"]) == 10
    further = {WORLD.labels[i].name for i in WORLD.groups["objects"]}
    assert set(WORLD.tuning) < further
    assert len(further - set(WORLD.tuning)) >= 100
    assert not set(WORLD.tuning) & set(WORLD.shows)


def test_names_are_unique_and_most_share_a_word():
    found = [one.name for one in (*WORLD.named, *WORLD.artists)]
    assert len(set(found)) == len(found)
    for group in (WORLD.named, WORLD.artists):
        words = Counter(word for one in group for word in one.name.split())
        assert all(len(one.name.split()) == 2 for one in group)
        assert all(words[word] >= 2 for one in group for word in one.name.split())
    lists = (PERSON_FIRST, PERSON_LAST, ARTIST_FIRST, ARTIST_LAST)
    assert len(set().union(*lists)) == sum(map(len, lists))


def test_no_object_answers_to_two_labels_or_to_a_part_of_a_name():
    names = [name for label in WORLD.labels for name in label.names]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert not set(names) & {*PERSON_FIRST, *PERSON_LAST, *ARTIST_FIRST, *ARTIST_LAST}


def test_any_two_people_differ_in_two_features_and_many_in_no_more():
    pairs = [people.differences(a.features, b.features) for a, b in combinations(WORLD.people, 2)]
    assert min(pairs) == 2
    near = Counter(
        a.name
        for a in WORLD.named
        if any(a is not b and people.differences(a.features, b.features) == 2 for b in WORLD.named)
    )
    assert len(near) > 0.9 * len(WORLD.named)


def test_hair_that_does_not_show_is_no_difference():
    bald = ("noHair1", "", "tan", "none", "none")
    assert people.differences(bald, ("afro", "red", "tan", "none", "none")) == 1
    assert (
        people.differences(
            ("afro", "blue", "tan", "none", "none"), ("afro", "red", "dark", "none", "none")
        )
        == 2
    )


def test_lists_are_what_the_rules_give():
    assert tuple(people.choose()) == WORLD.people
    assert tuple(artists.choose()) == WORLD.artists
    assert len({(a.palette, a.technique) for a in WORLD.artists}) == len(WORLD.artists)


def test_artists_are_deterministic_and_told_apart_by_palette_and_by_technique():
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(images, size=(64, 64), mode="bilinear")
    count, kinds = len(artists.PALETTES), len(artists.TECHNIQUES)
    palettes = [p for p in range(count) for _ in range(kinds)]
    techniques = list(range(kinds)) * count
    drawn = artists.draw(image.repeat(count * kinds, 1, 1, 1), palettes, techniques)
    assert torch.equal(drawn[:3], artists.draw(image.repeat(3, 1, 1, 1), palettes[:3], techniques[:3]))
    flat = drawn.view(count, kinds, -1)
    for rows in (flat, flat.transpose(0, 1)):
        for row in rows:  # one palette or one technique kept
            distance = torch.cdist(row, row).fill_diagonal_(torch.inf) / row.shape[1] ** 0.5
            assert distance.min() > 0.03
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_a_further_object_has_one_drawing_and_the_ten_words_two(structures):
    sets: dict[str, set[str]] = {}
    for scene in structures:
        for thing in scene["things"]:
            if thing["kind"] == "object":
                sets.setdefault(thing["name"], set()).add(thing["style"])
    names = [WORLD.labels[i].name for i in WORLD.groups["objects"]]
    further = [sets[name] for name in names if name in sets]
    assert {len(styles) for styles in further} == {1}
    assert set().union(*further) == set(WORLD.styles)
    ten = [sets[WORLD.labels[i].name] for i in WORLD.groups["ten"]]
    assert {len(styles) for styles in ten} == {2}
    assert set().union(*ten) == set(WORLD.styles)


def test_same_seed_same_scenes_and_a_structure_draws_its_scene_again(drawings):
    one, same = (SceneMaker(WORLD, drawings, 3).make(12) for _ in range(2))
    assert one.structures == same.structures
    assert np.array_equal(one.images, same.images)
    assert one.structures != SceneMaker(WORLD, drawings, 4).make(12).structures
    assert np.array_equal(SceneMaker(WORLD, drawings, 9).paint(one.structures[3:5]), one.images[3:5])
    assert one.images.shape == (12, 3, 64, 64)
    assert one.images.dtype == np.uint8


def test_a_thing_is_painted_where_its_structure_says(drawings):
    scene = {"things": [], "background": "white", "horizon": 0.6, "artist": "", "use": "named"}
    shape = {"kind": "shape", "name": "square", "color": "black", "spot": [0.4, 0.75, 0.25]}
    image = SceneMaker(WORLD, drawings, 0).paint([scene | {"things": [shape]}])[0].astype(int)
    assert image[:, 16, 48].max() < 60  # the middle of the square
    rows, columns = np.nonzero(image[0] < 128)
    assert abs(columns.mean() - 47.5) < 0.6
    assert abs(rows.mean() - 15.5) < 0.6
    assert abs(len(rows) - (0.75 * 0.4 * 64) ** 2) < 30
    assert (image[:, :, :30] == 255).all()


def test_shards_are_read_back(drawings, tmp_path):
    scenes = SceneMaker(WORLD, drawings, 3).make(5)
    write_shard(scenes, tmp_path / "a" / "1-000")
    back = load_shard(tmp_path / "a" / "1-000")
    assert back.structures == scenes.structures
    assert np.array_equal(back.images, scenes.images)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["1-000.jsonl", "1-000.npy"]


def test_no_caption_uses_a_phrasing_of_the_suites(structures):
    rng = random.Random(0)
    assert not any(is_held_out(caption(structure, rng, WORLD)) for structure in structures)
    for template in HELD_OUT:
        for filled in (
            template.format("Abrel Bolvane"),
            f"A {template.format('cat')} on grass".capitalize(),
        ):
            assert is_held_out(filled), filled
    assert not is_held_out("a photo of a cat")
    assert not is_held_out("a picture in the style of Abrel Bolvane")


def test_captions_name_what_is_there_and_nobody_else(structures):
    rng = random.Random(1)
    names = {person.name for person in WORLD.named}
    for structure in structures:
        text = caption(structure, rng, WORLD)
        there = {
            thing["name"] for thing in structure["things"] if thing["kind"] == "person" and thing["name"]
        }
        told = {name for name in names if name in text}
        assert told <= there
        assert not structure["artist"] or structure["artist"] in text
        assert (text == "") == (structure["use"] == "empty")
        if told and there:
            assert told == there  # all or, where an artist stands alone, none


def test_captions_use_every_name_of_an_object(structures):
    rng = random.Random(2)
    scene = {"background": "white", "horizon": 0.6, "artist": "", "use": "named"}
    thing = {"kind": "object", "name": "airplane", "style": "noto", "spot": [0.6, 0.5, 0.5]}
    texts = " | ".join(caption(scene | {"things": [thing]}, rng, WORLD) for _ in range(300))
    assert all(name in texts for name in WORLD.labels[WORLD.label_index["airplane"]].names)
    phrases = WORLD.implied_held_out
    assert not any(phrase in caption(s, rng, WORLD) for s in structures for phrase in phrases)


def test_the_empty_text_stands_for_one_large_thing_in_the_middle(structures):
    plain = [structure for structure in structures if structure["use"] in ("empty", "generic")]
    assert 0.05 < len(plain) / len(structures) < 0.2
    for structure in plain:
        (thing,) = structure["things"]
        size, x, y = thing["spot"]
        assert thing["name"] in WORLD.shows
        assert (size, x, y) == (0.75, 0.5, 0.5)
        assert structure["artist"] == ""


def test_captions_name_every_kind_of_thing_and_not_the_thing(structures):
    rng = random.Random(4)
    told: dict[str, list[str]] = {kind: [] for kind in WORLD.kinds}
    for structure in structures:
        if structure["use"] == "kind":
            (thing,) = structure["things"]
            assert thing["name"] in WORLD.kinds[structure["kind"]]
            told[structure["kind"]].append(caption(structure, rng, WORLD))
    for kind, texts in told.items():
        assert len(texts) > len(structures) / 500
        words = WORLD.implied if kind == "weapon" else (kind,)
        assert all(any(word in text for word in (*words, kind)) for text in texts)


def test_things_stand_apart_on_the_latents_grid_whatever_they_are(structures):
    counts = Counter(len(structure["things"]) for structure in structures)
    assert set(counts) == {0, 1, 2, 3, 4}
    sizes: dict[str, set[float]] = {"object": set(), "person": set(), "shape": set()}
    places: dict[str, Counter[tuple[float, float]]] = {kind: Counter() for kind in sizes}
    for structure in structures:
        covered = np.zeros((8, 8), int)
        for thing in structure["things"]:
            size, x, y = thing["spot"]
            left, top, side = 8 * (x - size / 2), 8 * (y - size / 2), 8 * size
            assert all(value == int(value) for value in (left, top, side))
            covered[int(top) : int(top + side), int(left) : int(left + side)] += 1
            sizes[thing["kind"]].add(size)
            if len(structure["things"]) > 1:
                places[thing["kind"]][x, y] += 1
        assert covered.max(initial=0) <= 1
    assert sizes == {"object": {0.5, 0.75}, "person": {0.5, 0.75, 1.0}, "shape": {0.5, 0.75}}
    assert set(places["object"]) == set(places["person"])
