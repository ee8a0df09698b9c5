"""Every metric against an independent implementation, and images that are none."""

import dataclasses
import json
import pickle
import sys

import numpy as np
import pytest
import torch

from expunge import ExpungeError
from expunge.base import registry
from expunge.evaluation.measure import make_metric, metric_key
from expunge.metric import Classifier, Distance, Metric, is_blank, read_images
from expunge.metrics._clip import towers


@pytest.fixture(scope="module")
def images():
    """Images that show something: smooth shapes and colours."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, 64, mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def clip():
    from expunge.emoji.clip import Clip

    return Clip.load()


EMOJI = {"model": "emoji"}
"""Whose CLIP measures."""
PROMPTS = ["a photo of the cat", "a photo of the ship"] * 12


def test_clip_score(images, clip):
    score = make_metric("clip_score", EMOJI).measure(images, PROMPTS)[:, 0]
    slow = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        a = clip.image(pixel_values=image[None] * 2 - 1).pooler_output[0].detach().double().numpy()
        ids = clip.tokenizer(prompt, return_tensors="pt").input_ids
        b = clip.text(input_ids=ids).pooler_output[0].detach().double().numpy()
        a = clip.projections["picture_projection"].double().numpy() @ a
        b = clip.projections["text_projection"].double().numpy() @ b
        slow.append(100 * max(0.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    assert score.numpy() == pytest.approx(np.array(slow), abs=1e-3)
    assert 0 < score.max() <= 100


def test_clip_zeroshot(images, clip):
    metric = make_metric("clip_zeroshot", {"classes": ["cat", "ship", "dog"], "scale": 20.0, **EMOJI})
    rows = metric.measure(images, PROMPTS)
    texts = clip.embed_texts([f"a photo of the {name}" for name in ("cat", "ship", "dog")])
    cosines = (clip.embed_images(images) @ texts.T).double().numpy()
    exp = np.exp(20 * cosines)
    chances = exp / exp.sum(1, keepdims=True)
    assert rows[:, :3].numpy() == pytest.approx(chances, abs=1e-4)
    assert metric.score(rows, ["ship"], [], "probability").numpy() == pytest.approx(
        chances[:, 1], abs=1e-4
    )
    assert metric.score(rows, ["ship"], [], "top1").tolist() == (chances.argmax(1) == 1).tolist()
    with pytest.raises(ExpungeError, match="at least two classes"):
        make_metric("clip_zeroshot", {"classes": ["cat"]})


def test_distances(images, clip):
    other = images.flip(0) * 0.8 + 0.1
    a, b = (
        clip.image(pixel_values=p * 2 - 1).pooler_output.detach().double().numpy()
        for p in (images, other)
    )
    for name in ("frechet", "kid"):
        metric = make_metric(name, EMOJI)
        rows, reference = metric.measure(images, PROMPTS), metric.measure(other, PROMPTS)
        if name == "frechet":
            first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
            roots = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
            slow = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * roots
        else:

            def kernel(x, y):
                return (x @ y / len(x) + 1) ** 3

            n = len(a)
            within = [
                np.mean([kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j])
                for x in (a, b)
            ]
            slow = sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])
        assert metric.distance(rows, reference).value == pytest.approx(slow, rel=1e-4, abs=1e-4)
        with pytest.raises(ExpungeError, match="at least two"):
            metric.distance(rows[:1], reference)
    assert make_metric("frechet", EMOJI).distance(rows, rows).value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sizes", [(40, 40), (9, 30)])  # more and fewer rows than columns
@pytest.mark.parametrize("name", ["frechet", "kid"])
def test_influences_are_what_each_image_does_to_a_distance(name, sizes):
    """Against the distance computed with one row's weight a little raised and lowered."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in sizes)
    b = 1.3 * b + 0.4
    metric = make_metric(name, {})

    def weighted(x, y, place, extra):
        """The distance where the weight of row `place` of x is (1 + extra)/n."""
        w = torch.ones(len(x), dtype=torch.float64)
        w[place] += extra
        w, v = w / w.sum(), torch.full((len(y),), 1 / len(y), dtype=torch.float64)
        if name == "kid":
            k = lambda p, q: (p @ q.T / 12 + 1) ** 3  # noqa: E731
            own = [
                (s[:, None] * s * k(p, p)).sum() - (s**2 * k(p, p).diagonal()).sum()
                for s, p in ((w, x), (v, y))
            ]
            own = [o / (1 - (s**2).sum()) for o, s in zip(own, (w, v), strict=True)]
            return own[0] + own[1] - 2 * w @ k(x, y) @ v
        means = w @ x, v @ y
        covariances = [
            len(p) / (len(p) - 1) * ((p - m).T * s) @ (p - m)
            for s, p, m in zip((w, v), (x, y), means, strict=True)
        ]
        roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
        traces = covariances[0].trace() + covariances[1].trace()
        return (means[0] - means[1]).square().sum() + traces - 2 * roots

    apart = metric.distance(a, b)
    assert weighted(a, b, 0, 0.0) == pytest.approx(apart.value, rel=1e-5)
    for one, other, influence in ((a, b, apart.influence), (b, a, apart.reference_influence)):
        assert influence.mean() == pytest.approx(0, abs=1e-9)
        for place in (0, 3, 7):
            step = 1e-4
            slope = (weighted(one, other, place, step) - weighted(one, other, place, -step)) / (2 * step)
            assert slope * len(one) == pytest.approx(float(influence[place]), rel=1e-3, abs=1e-2)


@pytest.mark.parametrize(("name", "paired"), [("frechet", True), ("kid", True), ("kid", False)])
def test_intervals_of_distances_cover(name, paired):
    """100 pairs of sets: the truth is the distance that sets of this size have on the average."""
    from expunge.evaluation.statistics import shift_by_influence

    torch.manual_seed(5)
    metric, found = make_metric(name, {}), []
    for _ in range(100):
        a, own = torch.randn(2, 40, 8).double()
        b = 0.8 * a + 0.6 * own if paired else own
        b = b * 1.2 + 0.5
        apart = metric.distance(a, b)
        sets = (
            [{"p": apart.influence + apart.reference_influence}]
            if paired
            else [{"p": apart.influence}, {"q": apart.reference_influence}]
        )
        found.append(shift_by_influence(apart.value, *sets).score)
    truth = sum(score.value for score in found) / len(found)
    assert 0.9 <= sum(score.low <= truth <= score.high for score in found) / len(found) <= 0.99


def test_distance_from_real_images(images, tmp_path):
    from expunge.base.image_files import to_pil

    for i, image in enumerate(images[:4]):
        to_pil(image).save(tmp_path / f"{i}.png")
    metric = make_metric("frechet", {"against": str(tmp_path), **EMOJI})
    assert metric.load_real().shape[0] == 4
    assert metric.provenance["against"] == str(tmp_path)
    assert metric.distance(metric.measure(images[:4], PROMPTS[:4]), metric.load_real()).value < 1e-2
    with pytest.raises(ExpungeError, match="holds no images"):
        read_images(tmp_path / "absent")


def test_pixel_distance_and_structure(images):
    other = images.roll(1, 0)
    distance = make_metric("pixel_distance", {}).measure(images, PROMPTS, other)[:, 0]
    slow = [np.sqrt(((a - b) ** 2).mean()) for a, b in zip(images.numpy(), other.numpy(), strict=True)]
    assert distance.numpy() == pytest.approx(np.array(slow), abs=1e-5)
    structure = make_metric("structure", {}).measure(images, PROMPTS, other)[:, 0]
    small = [
        p.reshape(24, 3, 8, 8, 8, 8).mean((3, 5)).reshape(24, -1)
        for p in (images.numpy(), other.numpy())
    ]
    slow = [np.corrcoef(a, b)[0, 1] for a, b in zip(*small, strict=True)]
    assert structure.numpy() == pytest.approx(np.array(slow), abs=1e-4)
    assert make_metric("structure", {}).measure(images, PROMPTS, images)[:, 0].min() > 0.9999
    assert make_metric("pixel_distance", {}).measure(images, PROMPTS, images).max() == 0


def test_detector_answers():
    metric = make_metric("detector", {})
    settings = metric.recognition(torch.zeros(1, 113)).settings
    names, styles = settings.label_names, settings.style_names
    rows = torch.full((4, len(names) + len(styles) + 1), 0.001)
    for row, label in enumerate(("cat", "cat face", "dog")):
        rows[row, names.index(label)] = 0.9
    rows[0, names.index("dog")] = 0.5
    rows[:, len(names) + styles.index("twemoji")] = 0.8
    rows[3, -1] = 0.9
    best = metric.score(rows, ["cat"], ["cat face"], "top1")
    assert best[[0, 2, 3]].tolist() == [1, 0, 0]
    assert best[1].isnan()
    assert metric.score(rows, ["dog"], [], "present").tolist() == [1, 0, 1, 0]
    assert metric.score(rows, ["dog"], [], "probability").tolist() == pytest.approx(
        [0.5, 0.001, 0.9, 0.001]
    )
    assert metric.score(rows, ["twemoji"], [], "top1").tolist() == [1] * 4
    assert metric.score(rows, ["noto"], [], "top1").tolist() == [0] * 4
    assert metric.find_broken(rows).tolist() == [False, False, False, True]
    assert metric.describe(rows) == ["cat", "cat face", "dog", "unrecognisable"]
    assert metric.knows("cat")
    assert metric.knows("noto")
    assert not metric.knows("ferry")


def test_blank_and_broken_images_are_unrecognisable(images):
    nan, white, black = torch.full((3, 64, 64), torch.nan), torch.ones(3, 64, 64), torch.zeros(3, 64, 64)
    batch = torch.stack([nan, white, black, images[0]])
    assert is_blank(batch).tolist() == [True, True, True, False]
    for name, options in (("detector", {}), ("clip_zeroshot", EMOJI)):
        metric = make_metric(name, options)
        assert isinstance(metric, Classifier)
        rows = metric.measure(batch, PROMPTS[:4])
        assert metric.find_broken(rows)[:3].tolist() == [True] * 3
        assert rows.isfinite().all()


def test_recognisers_of_two_kinds(images, tmp_path):
    """Two classifiers with labels of their own, as UnlearnCanvas has for styles and objects."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    kinds = {"styles": ("Van_Gogh", "Crayon", "Rust"), "objects": ("Cats", "no face")}
    images = (images * 255).round() / 255  # as an image file holds them
    networks = {}
    for seed, (kind, labels) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            image_size=64, patch_size=16, id2label=dict(enumerate(labels)), initializer_range=0.5,
        )  # fmt: skip
        networks[kind] = ViTForImageClassification(config).eval()
        networks[kind].save_pretrained(tmp_path / kind)
        ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / kind)
    folders = [str(tmp_path / kind) for kind in kinds]
    metric = make_metric("recogniser", {"folders": folders, "nothing": "no face"})
    rows = metric.measure(images, PROMPTS)
    for kind, columns in (("styles", slice(0, 3)), ("objects", slice(3, 5))):
        with torch.no_grad():
            slow = networks[kind](images * 2 - 1).logits.softmax(1)
        assert rows[:, columns].numpy() == pytest.approx(slow.numpy(), abs=1e-4)
    assert [metric.knows(label) for label in ("van gogh", "Cats", "Dogs")] == [True, True, False]
    styles, objects = rows[:, :3].argmax(1), rows[:, 3:5].argmax(1)
    assert metric.score(rows, ["Crayon"], [], "top1").tolist() == (styles == 1).tolist()
    cats = metric.score(rows, ["Cats"], [], "top1")
    assert cats.isnan().tolist() == (objects == 1).tolist()
    assert metric.describe(rows)[0].partition(",")[0] in ("van gogh", "crayon", "rust")
    assert len(metric.provenance["classifiers"]) == 2
    with pytest.raises(ExpungeError, match=r"needs folders .* \[options.recogniser\]"):
        _ = make_metric("recogniser", {}).provenance


@pytest.fixture(params=registry.list_names("metrics"))
def metric(request):
    """Every metric of the folder that has what it needs; the others say in a sentence what that is."""
    made, reason = registry.get("metrics", request.param)(), ""
    try:
        facts = made.provenance
    except ExpungeError as error:
        facts, reason = {}, str(error)
    if reason:
        assert "\n" not in reason
        pytest.skip(reason)
    assert facts
    return made


class TestContract:
    def measure(self, metric, batch, names=PROMPTS):
        return metric.measure(batch, names[: len(batch)], batch.flip(3) if metric.paired else None)

    def test_says_what_it_is(self, metric):
        assert type(metric).__doc__
        assert metric.higher_is_better in (True, False)
        assert registry.describe("metrics", registry.name_of("metrics", type(metric))).endswith(".")
        with pytest.raises(dataclasses.FrozenInstanceError):
            metric.paired = not metric.paired

    def test_says_what_its_numbers_hang_on(self, metric):
        again = type(metric)()
        assert json.loads(json.dumps(dict(metric.provenance))) == dict(again.provenance)
        assert metric_key(metric) == metric_key(again)

    def test_gives_a_row_of_numbers_for_each_image(self, metric, images):
        rows = self.measure(metric, images[:3])
        assert rows.ndim == 2
        assert rows.shape[0] == 3
        assert rows.is_floating_point()
        assert rows.isfinite().all()
        assert self.measure(metric, images[:1]).shape == (1, rows.shape[1])

    def test_says_the_same_of_an_image_again_and_in_any_company(self, metric, images):
        rows = self.measure(metric, images[:3])
        assert torch.equal(rows, self.measure(metric, images[:3]))
        torch.testing.assert_close(rows[:1], self.measure(metric, images[:1]), rtol=1e-3, atol=1e-4)

    def test_leaves_its_input_and_chance_as_they_were(self, metric, images):
        given, state = images[:2].clone(), torch.random.get_rng_state()
        self.measure(metric, given)
        assert torch.equal(given, images[:2])
        assert torch.equal(state, torch.random.get_rng_state())

    def test_takes_images_that_are_no_numbers_and_blank_ones(self, metric, images):
        batch = torch.stack([torch.full((3, 64, 64), torch.nan), torch.ones(3, 64, 64), images[0]])
        rows = self.measure(metric, batch)
        assert rows.isfinite().all()
        if isinstance(metric, Classifier):
            assert metric.find_broken(rows)[:2].tolist() == [True, True]
        if metric.share:
            assert 0 <= rows[:, 0].min() <= rows[:, 0].max() <= 1

    def test_reads_images_of_other_sizes(self, metric, images):
        assert self.measure(metric, images[:2, :, :48, :]).shape[0] == 2

    def test_unpickles_nothing(self, metric, images, monkeypatch):
        """Weights are safetensors, or read with weights_only: made anew, a metric runs no pickle."""
        load = torch.load

        def only_weights(*args, **kwargs):
            assert kwargs.get("weights_only") is True
            return load(*args, **kwargs)

        def refuse(*_, **__):
            raise AssertionError("a metric must not unpickle")

        monkeypatch.setattr(torch, "load", only_weights)
        monkeypatch.setattr(pickle, "load", refuse)
        monkeypatch.setattr(pickle, "loads", refuse)
        for module in [m for name, m in sys.modules.items() if name.startswith("expunge.metrics.")]:
            for value in vars(module).values():
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()
        self.measure(type(metric)(), images[:1])

    def test_answers_for_its_labels(self, metric, images):
        if not isinstance(metric, Classifier):
            pytest.skip("it answers no questions")
        rows = self.measure(metric, images[:3])
        assert not metric.knows("no such label")
        label = next(name for name in ("cat", "exposed") if metric.knows(name))
        for question in ("top1", "present", "probability"):
            said = metric.score(rows, [label], [], question)
            assert said.shape == (3,)
            assert ((said >= 0) & (said <= 1) | said.isnan()).all()
        assert metric.find_broken(rows).dtype == torch.bool
        assert len(metric.describe(rows)) == 3
        assert all(counts.shape == (3,) for counts in metric.count_parts(rows, [label]).values())

    def test_distances_of_sets(self, metric, images):
        if not isinstance(metric, Distance):
            pytest.skip("it compares no sets")
        a, b = (self.measure(metric, some) for some in (images[:6], images[6:16]))
        apart = metric.distance(a, b)
        assert (apart.influence.shape, apart.reference_influence.shape) == ((6,), (10,))
        assert abs(float(apart.influence.mean())) < 1e-6 * float(apart.influence.abs().max())
        with pytest.raises(ExpungeError, match="at least two"):
            metric.distance(a[:1], b)

    def test_bad_input_is_one_sentence(self, metric, images):
        cls = type(metric)
        with pytest.raises(ExpungeError, match="has no field 'modle'"):
            make_metric(registry.name_of("metrics", type(metric)), {"modle": 1})
        for field in dataclasses.fields(cls):
            with pytest.raises(ExpungeError, match=f"^{field.name} must be ") as caught:
                cls(**{field.name: object()})
            assert "\n" not in str(caught.value)
        if metric.paired:
            with pytest.raises(TypeError, match="references must be a tensor of images, not None"):
                metric.measure(images[:1], PROMPTS[:1])


def test_a_metric_that_breaks_the_contract_is_told(model, tmp_path):
    from expunge.evaluation.image_cache import Cache
    from expunge.evaluation.image_source import Source
    from expunge.evaluation.measure import measure
    from expunge.evaluation.sample import lay_out
    from expunge.evaluation.suite import Suite

    @dataclasses.dataclass(frozen=True)
    class Flat(Metric):
        higher_is_better = True

        @property
        def provenance(self):
            return {"version": 1}

        def measure(self, images, prompts, references=None):
            return torch.zeros(len(images))

    @dataclasses.dataclass(frozen=True)
    class Silent(Flat):
        higher_is_better = None

    with pytest.raises(TypeError, match="the metric Silent must say higher_is_better"):
        Silent()
    cells = Suite.read("object").cells(["airplane"])[:1]
    samples = lay_out(model, cells[:1], 1)
    with pytest.raises(TypeError, match=r"Flat must measure \d+ images as a tensor \(\d+, width\)"):
        measure(Cache(tmp_path), Source(model), None, samples, {"flat": Flat()})


def test_keys_are_those_of_earlier_versions():
    """Rows are kept under them: a change of words must not throw them away."""
    kept = {"features": "picture tower of the CLIP emoji, pooled", "sha256": towers("emoji").digest}
    for name in ("frechet", "kid", "alignment"):
        assert make_metric(name, EMOJI).feature_key == kept
    assert make_metric("pixel_distance", {}).feature_key == {"metric": "PixelDistance", "version": 1}
    assert make_metric("structure", {}).feature_key == {"metric": "Structure", "version": 1, "size": 8}


def test_keys_change_with_options_and_names_are_near():
    one, other = (make_metric("clip_zeroshot", {**EMOJI, **more}) for more in ({}, {"scale": 50.0}))
    assert metric_key(one) != metric_key(other)
    assert (
        metric_key(make_metric("frechet", EMOJI))
        == metric_key(make_metric("kid", EMOJI))
        == metric_key(make_metric("alignment", EMOJI))
    )
    with pytest.raises(ExpungeError, match="did you mean 'clip_score'"):
        make_metric("clip_scor", {})
    with pytest.raises(ExpungeError, match="no field 'modle'; did you mean 'model'"):
        make_metric("clip_score", {"modle": "x"})


def test_a_shipped_model_without_a_clip_says_which_have_one(tmp_path, monkeypatch):
    for folder in ("emoji/pipeline", "emoji/clip", "plain/pipeline"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(registry, "HERE", tmp_path)
    with pytest.raises(ExpungeError, match="'plain' has no CLIP of its own: name emoji, or"):
        towers("plain")
