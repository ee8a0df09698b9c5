"""MACE: each stage against an independent slow reading, and what goes into and out of them."""

import copy
import math
import weakref

import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import expunge
from conftest import tiny_pipeline, weights
from expunge import Concept, ExpungeError, ExpungeWarning, Problem
from expunge.base import image_files
from expunge.erasing import object_masks, reference_images
from expunge.erasing.prompt_templates import RETAINED, TEMPLATES
from expunge.methods.mace import MACE
from expunge.methods.mace.prompt_sums import PromptSums, group_by_anchor
from expunge.methods.mace.suppression import focal, timestep_probabilities
from expunge.ops.attention import read_attention
from expunge.ops.low_rank import use_own_factors
from expunge.runtime.context import RunContext

SHORT = ("a photo of the {}", "{} in the street", "a drawing of one {} with clothes")
FAST = {
    "num_images": 2,
    "num_inference_steps": 2,
    "max_train_steps": 3,
    "templates": SHORT,
    "captions": "",
    "learning_rate": 0.01,
}

PROBLEM = Problem(
    (
        Concept("airplane", "the blue sky", synonyms=("jet plane",)),
        Concept("art person", "art", kind="style"),
        Concept("horse", ""),
        Concept("white bird", "sky"),
    ),
    ("ship", "dog"),
)


@pytest.fixture
def double():
    """The tiny model in float64, predicting v up to pure noise."""
    pipe = tiny_pipeline(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return expunge.load(pipe.to(torch.float64))


@pytest.fixture
def captions(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a cat with the truck\na frog of art\n\nground\n")
    return str(file)


def weight(model, layer):
    return model.weight(layer).double()


def fit(model, problem, method, seed=0):
    return expunge.erase(model, problem, method, seed=seed).changes


def plain_prior(model, problem, method, captions):
    """Prompt by prompt: E_captions + ω E_retained of Σ e eᵀ."""
    total = 0
    retained = [t.format(name) for name in problem.retain for t in RETAINED]
    for prompts, scale in ((captions, 1.0), (retained, method.domain_weight)):
        for prompt in prompts:
            for e in model.encode([prompt]).embeddings[0].double():
                total = total + scale / len(prompts) * torch.outer(e, e)
    return total


def plain_pairs(model, erased, anchored):
    """Common words before and behind are taken off by hand; what is left is the phrase."""
    e, a = model.encode([erased]), model.encode([anchored])
    words = [x.ids[0, 1 : 1 + int(x.content_mask.sum())].tolist() for x in (e, a)]
    before = 0
    while all(before < len(w) for w in words) and words[0][before] == words[1][before]:
        before += 1
    behind = 0
    while (
        all(before + behind < len(w) for w in words) and words[0][-1 - behind] == words[1][-1 - behind]
    ):
        behind += 1
    places = [[*range(before + 1), *range(len(w) + 1 - behind, 77)] for w in words]
    return [
        (e.embeddings[0, i].double(), a.embeddings[0, j].double())
        for i, j in zip(*places, strict=False)  # the longer padding is cut
    ]


def all_pairs(model, problem):
    for concept in problem.erase:
        for name in concept.names:
            for template in SHORT:
                anchored = template.format(concept.anchor) if concept.anchor else ""
                yield from plain_pairs(model, template.format(name), anchored)


def test_refine_against_a_slow_reading_of_its_equation(model, captions):
    method = MACE(stages=("refine",), ridge=0.7, ridge_floor=0.0, refine_prior=2.0, domain_weight=3.0,
                  captions=captions, templates=SHORT)  # fmt: skip
    (change,) = fit(model, PROBLEM, method)
    kept = plain_prior(model, PROBLEM, method, ["a cat with the truck", "a frog of art", "ground"])
    left = right = method.refine_prior * kept + method.ridge * torch.eye(32)
    for e, a in all_pairs(model, PROBLEM):
        left, right = left + torch.outer(a, e), right + torch.outer(e, e)
    solution = left @ torch.linalg.inv(right)
    assert (solution - torch.eye(32)).norm() > 0.1
    assert len(change.layers) == 14
    for layer in change.layers:
        plain = weight(model, layer) @ solution
        ours = change.weight(model.weight(layer)).double()
        assert (ours - plain).norm() / plain.norm() < 1e-5


def test_refine_alone_with_no_difference_changes_nothing(model):
    # A synonym of three words for an anchor of one: only phrases and padding are left out.
    same = Problem((Concept("sky", "ship"),))
    method = MACE(stages=("refine",), ridge=1e12, templates=SHORT)
    (change,) = fit(model, same, method)
    torch.testing.assert_close(change.matrix, torch.eye(32), rtol=0, atol=1e-5)


def plain_training(model, problem, concept, method, matrix, seed):
    """One concept by itself, on a copy whose weights are replaced, maps from diffusers' own scores."""
    run = RunContext(seed)
    templates = method.templates
    prompts = [t.format(name) for name in concept.names for t in templates]
    text = model.encode(prompts)
    shown = reference_images.draw_examples(
        model, concept.name, prompts[0], method.num_images, run, method.num_inference_steps
    )
    first = 1 + model.count_tokens("a photo of the")
    tokens = torch.arange(77)[None] >= first  # its own, the end and the padding
    source = "none" if concept.kind == "style" else method.masks
    mask = object_masks.find_masks(source, model, shown, tokens, run)[:, None].double()
    mask = interpolate(mask, (8, 8), mode="nearest-exact")

    unet = copy.deepcopy(model.pipe.unet)
    layers = [entry.layer.removeprefix("unet.") for entry in model.text_entries()]
    generator = run.generator("factors", concept.name)
    base, factors = {}, []
    for layer in layers:
        w = unet.get_submodule(layer).weight.detach() @ matrix
        down = torch.randn(method.rank, w.shape[1], generator=generator).double() / method.rank
        factors.append([torch.zeros(len(w), method.rank, dtype=torch.float64), down])
        base[layer] = w
    trained = [x.requires_grad_() for pair in factors for x in pair]
    adam = torch.optim.AdamW(trained, lr=method.learning_rate, weight_decay=method.weight_decay)
    chances = torch.full((1000,), 1 / 1000, dtype=torch.float64)
    if method.focal:
        chances = focal(model.log_snr(), method.focal_high, method.focal_low, method.focal_slope)
    g = run.generator("training", concept.name)
    signal = model.pipe.scheduler.alphas_cumprod.double()

    for _ in range(method.max_train_steps):
        row = int(torch.randint(len(prompts), (), generator=g))
        i = int(torch.randint(method.num_images, (), generator=g))
        t = int(torch.multinomial(chances, 1, generator=g))
        noise = torch.randn(4, 8, 8, generator=g).double()
        noisy = signal[t].sqrt() * shown.latents[i] + (1 - signal[t]).sqrt() * noise
        template, name = templates[row % 3], concept.names[row // 3]
        before = 1 + model.count_tokens(template.partition("{}")[0])
        wanted = list(range(before, before + model.count_tokens(name)))
        if method.end_tokens:
            wanted += range(1 + model.count_tokens(prompts[row]), 77)

        for layer, (up, down) in zip(layers, factors, strict=True):
            module = unet.get_submodule(layer)
            module._parameters.pop("weight", None)
            module.weight = base[layer] + up @ down
        norms, small_mask = [], mask[i : i + 1]

        def score(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            given = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (
                attn.head_to_batch_dim(f(x))
                for f, x in ((attn.to_q, hidden_states), (attn.to_k, given), (attn.to_v, given))
            )
            maps = attn.get_attention_scores(q, k)
            if encoder_hidden_states is not None:
                side = math.isqrt(maps.shape[1])
                small = interpolate(small_mask, (side, side), mode="nearest-exact").flatten()  # noqa: B023
                total = sum((maps[:, :, j] * small).square().sum() for j in wanted)  # noqa: B023
                norms.append(total.sqrt() if method.norm == "joint" else total)  # noqa: B023
            return attn.to_out[0](attn.batch_to_head_dim(maps @ v))

        unet.set_attn_processor(score)
        unet(noisy[None], t, encoder_hidden_states=text.embeddings[row : row + 1])
        adam.zero_grad()
        sum(norms).backward()
        torch.nn.utils.clip_grad_norm_(trained, method.max_grad_norm)
        adam.step()
    return {
        f"unet.{layer}": (up @ down).detach() for layer, (up, down) in zip(layers, factors, strict=True)
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": "squared", "end_tokens": False, "focal": False, "rank": 2, "masks": "none"},
        {"stages": ("suppress",), "max_grad_norm": 0.01},
    ],
)
def test_suppress_in_one_batch_against_one_by_one_read_slowly(double, settings):
    method = MACE(**{**FAST, "batch_size": 4, **settings})
    torch.manual_seed(8)
    matrix = torch.eye(32, dtype=torch.float64)
    if "refine" in method.stages:
        matrix = matrix + 0.1 * torch.randn(32, 32, dtype=torch.float64)
    before = weights(double.pipe)
    together = method.suppress(double, PROBLEM, matrix, RunContext(5))
    assert all(torch.equal(before[k], v) for k, v in weights(double.pipe).items())
    assert all(p.requires_grad and p.grad is None for p in double.pipe.unet.parameters())
    moved = 0.0
    for concept in PROBLEM.erase:
        plain = plain_training(double, PROBLEM, concept, method, matrix, 5)
        tensors = together[concept.name]
        ours = {layer: tensors[f"{layer}.up"] @ tensors[f"{layer}.down"] for layer in plain}
        difference = sum((ours[k] - plain[k]).square().sum() for k in plain).sqrt()
        size = sum(plain[k].square().sum() for k in plain).sqrt()
        assert difference / size < 1e-8
        moved += float(size)
    assert moved > 0.01


def test_a_concept_trains_the_same_whoever_is_beside_it(double):
    method = MACE(**FAST)
    eye = torch.eye(32, dtype=torch.float64)
    found = [MACE(**FAST, batch_size=b).suppress(double, PROBLEM, eye, RunContext(5)) for b in (1, 3)]
    alone = method.suppress(double, Problem(PROBLEM.erase[2:3]), eye, RunContext(5))
    for tensors in (found[1]["horse"], alone["horse"]):
        for key, tensor in found[0]["horse"].items():
            torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-10)


def test_gradient_checkpointing_changes_nothing(double):
    method = MACE(**{**FAST, "max_train_steps": 3, "masks": "none"})
    problem = Problem(PROBLEM.erase[:2])
    plain = method.suppress(double, problem, torch.eye(32), RunContext(0))
    double.network.enable_gradient_checkpointing()
    try:
        checkpointed = method.suppress(double, problem, torch.eye(32), RunContext(0))
    finally:
        double.network.disable_gradient_checkpointing()
    for concept, tensors in plain.items():
        assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if key.endswith("up"))
        for key, tensor in tensors.items():
            torch.testing.assert_close(checkpointed[concept][key], tensor, rtol=0, atol=1e-12)
    assert not any(module._forward_hooks for module in double.network.modules())


def test_suppress_lowers_the_attention(double):
    method = MACE(
        **{**FAST, "max_train_steps": 40, "learning_rate": 0.05, "focal": False, "masks": "none"}
    )
    concept = PROBLEM.erase[3]
    factors = method.suppress(double, Problem((concept,)), torch.eye(32), RunContext(0))[concept.name]
    text = double.encode(["a photo of the white bird"])
    layers = [entry.layer for entry in double.text_entries()]
    modules = [double.pipe.unet.get_submodule(x.removeprefix("unet.")) for x in layers]
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()

    def attention():
        with torch.no_grad():
            maps = read_attention(
                double.cross_attentions(),
                lambda a: a[..., int(text.content_mask.sum()) - 1 :].square().sum(),
                lambda: double.predict(noisy, 500, text),
            )
        return sum(m.sqrt() for m in maps)

    before = attention()
    ups, downs = ([factors[f"{x}.{part}"][None] for x in layers] for part in ("up", "down"))
    with use_own_factors(modules, ups, downs):
        after = attention()
    assert after < 0.9 * before


@pytest.mark.parametrize("settings", [{"fuse_prior": 2.0, "domain_weight": 3.0}, {"ridge": 5.0}])
def test_fuse_against_a_slow_reading_of_its_equation(double, captions, settings):
    method = MACE(**{**FAST, "captions": captions, "batch_size": 4, "ridge": 0.5, **settings})
    problem = PROBLEM if "fuse_prior" in settings else Problem(PROBLEM.erase)
    groups = group_by_anchor(double, problem, method.templates)
    kept = method.sum_retained(double, problem, RunContext(0))
    rows = {
        c.name: torch.cat([double.encode([t.format(n)]).embeddings[0] for n in c.names for t in SHORT])
        for c in problem.erase
    }
    sums = PromptSums.of(groups)
    torch.testing.assert_close(sums.whole, sum(e.T @ e for e in rows.values()))
    torch.manual_seed(9)
    matrix = torch.eye(32, dtype=torch.float64) + 0.1 * torch.randn(32, 32, dtype=torch.float64)
    factors = method.suppress(double, problem, matrix, RunContext(0))
    right, fused = method.fuse(groups, sums, kept, matrix, factors)
    prior = torch.zeros(32, 32, dtype=torch.float64)
    if "fuse_prior" in settings:
        listed = ["a cat with the truck", "a frog of art", "ground"]
        prior = method.fuse_prior * plain_prior(double, problem, method, listed)
    eye = torch.eye(32, dtype=torch.float64)
    for entry in double.text_entries():
        w = weight(double, entry.layer)
        refined = w @ matrix
        left, bottom = w @ prior + method.ridge * refined, prior + method.ridge * eye
        for concept in problem.erase:
            own = factors[concept.name]
            target = refined + own[f"{entry.layer}.up"] @ own[f"{entry.layer}.down"]
            for e in rows[concept.name]:
                left = left + torch.outer(target @ e, e)
                bottom = bottom + torch.outer(e, e)
        plain = left @ torch.linalg.inv(bottom)
        ours = w @ right + sum(t[f"{entry.layer}.up"] @ t[f"{entry.layer}.down"] for t in fused.values())
        assert (ours - plain).norm() / plain.norm() < 1e-9


def test_the_edit_is_one_matrix_and_one_change_a_layer(model):
    method = MACE(**{**FAST, "rank": 2, "batch_size": 3})
    right, *low = fit(model, Problem(PROBLEM.erase), method)
    assert right.kind == "right"
    assert len(right.layers) == len(low) == 14
    for change in low:
        assert change.kind == "low-rank"
        assert change.down.shape == (2 * 4, 32)
        assert change.up.dtype == change.down.dtype == torch.float16


def test_half_precision_keeps_the_edit(double):
    method, problem = MACE(**FAST), Problem(PROBLEM.erase)
    _, *low = fit(double, problem, method)
    groups = group_by_anchor(double, problem, method.templates)
    kept = method.sum_retained(double, problem, RunContext(0))
    sums = PromptSums.of(groups)
    matrix = method.refine(sums, kept)
    factors = method.suppress(double, problem, matrix, RunContext(0))
    _, fused = method.fuse(groups, sums, kept, matrix, factors)
    untrained = 0
    for change in low:
        w, layer = double.weight(change.layers[0]), change.layers[0]
        exact = sum(t[f"{layer}.up"] @ t[f"{layer}.down"] for t in fused.values())
        assert (change.weight(w) - w - exact).norm() <= 2e-3 * exact.norm()
        untrained += not exact.any()
    assert untrained == 1  # the last value, which comes after the last map


@pytest.mark.parametrize(("combine", "weight"), [("average", 0.5), ("sum", 1.0)])
def test_without_fuse_the_changes_are_averaged_or_added_up(model, combine, weight):
    problem = Problem(PROBLEM.erase[:2])
    method = MACE(**FAST, stages=("suppress",), combine=combine)
    changes = fit(model, problem, method)
    assert {change.kind for change in changes} == {"low-rank"}
    one, two = (fit(model, Problem((c,)), method) for c in problem.erase)  # alone, both are the same
    largest = 0.0
    for both, first, second in zip(changes, one, two, strict=True):
        w = model.weight(both.layers[0])
        moved = weight * (first.weight(w) + second.weight(w) - 2 * w)
        largest = max(largest, float(moved.abs().max()))
        torch.testing.assert_close(both.weight(w) - w, moved, rtol=1e-2, atol=1e-4)
    assert largest > 1e-3  # nothing behind the last attention trains its values


def test_without_fuse_the_changes_are_averaged_on_what_was_refined(model):
    assert MACE().combine == "average"  # the second row of the paper's ablation
    changes = fit(model, Problem(PROBLEM.erase[:2]), MACE(**FAST, stages=("suppress", "refine")))
    assert [change.kind for change in changes] == ["right"] + 14 * ["low-rank"]


def test_the_floor_is_in_the_first_stage(model):
    """λ is what the floor says, wherever the ridge is less."""
    problem, floor = Problem(PROBLEM.erase[:1]), 0.2
    sums = PromptSums.of(group_by_anchor(model, problem, SHORT))
    least = floor * float(sums.contexts.trace()) / 32
    made = [
        fit(model, problem, MACE(stages=("refine",), templates=SHORT, **fields))[0].matrix
        for fields in (
            {"ridge": 0.0, "ridge_floor": floor},
            {"ridge": least, "ridge_floor": 0.0},
            {"ridge": 2 * least, "ridge_floor": floor},
            {"ridge": 2 * least, "ridge_floor": 0.0},
        )
    ]
    torch.testing.assert_close(made[0], made[1])
    torch.testing.assert_close(made[2], made[3])
    assert (made[0] - made[2]).norm() > 1e-3


def test_concepts_have_anchors_of_their_own(model):
    """Each goes where its own anchor stands, and not where it would with the other's, in one edit."""
    names, anchors = ("airplane", "horse"), ("sky", "ship art")
    method = MACE(stages=("refine",), templates=("{} in the street",), ridge=1.0)

    def missed(order):
        """How far each stays from its own anchor's place, with the anchors in an order."""
        concepts = (Concept(n, a, "identity") for n, a in zip(names, order, strict=True))
        (change,) = fit(model, Problem(tuple(concepts)), method)
        e, goals = (
            model.encode([f"{name} in the street" for name in some]).embeddings[:, -60:].double()
            for some in (names, anchors)
        )
        return (e @ change.matrix.double().T - goals).flatten(1).norm(dim=1)

    assert (missed(anchors) < 0.9 * missed(anchors[::-1])).all()


def test_what_stands_before_a_phrase_holds_still(model):
    """A causal text encoder says nothing of it there: the rows are the anchor's already."""
    e, g = (model.encode([f"a photo of the {x}"]) for x in ("airplane", "sky"))
    before = 1 + model.count_tokens("a photo of the")
    assert torch.equal(e.embeddings[0, :before], g.embeddings[0, :before])
    assert not torch.allclose(e.embeddings[0, -1], g.embeddings[0, -1])


def test_a_window_moves_with_the_size_of_the_latents(model):
    """On latents of half the side the same noise hides more: the window lies at less of it."""
    wide = {"focal_high": 1.0, "focal_low": -1.0}
    here = model.latents_side
    assert here == 8
    level, plain = model.log_snr(), timestep_probabilities(MACE(**wide), model)
    for side, shift in ((here, 0.0), (2 * here, 2 * math.log(2)), (here // 2, -2 * math.log(2))):
        chances = timestep_probabilities(MACE(**wide, focal_side=side), model)
        moved = float((chances * level).sum() - (plain * level).sum())
        assert moved == pytest.approx(shift, abs=0.05)


def test_fuse_without_suppress_is_one_matrix(model):
    (change,) = fit(model, Problem(PROBLEM.erase), MACE(**FAST, stages=("refine", "fuse")))
    assert change.kind == "right"


@pytest.mark.parametrize("stages", [(), ("fuse",)])
def test_stages_that_do_nothing(stages):
    with pytest.raises(ExpungeError, match="'refine' or 'suppress'"):
        MACE(stages=stages)


def test_focal_is_the_papers_on_its_schedule():
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - beta).cumprod(0)
    t = torch.arange(1000, dtype=torch.float64)
    paper = (0.05 * (t - 200)).sigmoid() - (0.05 * (t - 400)).sigmoid()
    paper = paper / paper.sum()
    ours = focal((signal / (1 - signal)).log(), MACE.focal_high, MACE.focal_low, MACE.focal_slope)
    assert float((ours - paper).abs().sum() / 2) < 0.05
    assert float(ours.sum()) == pytest.approx(1)


def test_focal_is_the_same_noise_on_another_schedule():
    levels = []
    for power in (1.0, 2.0):
        t = torch.linspace(0, 1, 4000, dtype=torch.float64) ** power
        log_snr = 8 - 16 * t
        log_snr[-1] = -torch.inf
        chances = focal(log_snr, 1.0, -0.5, 7.0)
        below = chances.cumsum(0)
        levels.append([float(log_snr[(below < q).sum()]) for q in (0.1, 0.5, 0.9)])
    assert levels[0] == pytest.approx(levels[1], abs=0.02)


def test_reading_attention_changes_nothing_and_is_diffusers_own(model, pipe):
    text = model.encode(["a photo of the ship", "bird"])
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before, seen = model.predict(noisy, 300, text), []
    found = read_attention(
        model.cross_attentions(), lambda a: a, lambda: seen.append(model.predict(noisy, 300, text))
    )
    assert not seen  # left after the last map
    assert torch.equal(model.predict(noisy, 300, text), before)
    assert not any(m._forward_hooks for m in pipe.unet.modules())
    theirs = []

    def score(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        given = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(f(x))
            for f, x in ((attn.to_q, hidden_states), (attn.to_k, given), (attn.to_v, given))
        )
        maps = attn.get_attention_scores(q, k)
        if encoder_hidden_states is not None:
            theirs.append((attn, maps.unflatten(0, (2, -1))))
        return attn.to_out[0](attn.batch_to_head_dim(maps @ v))

    pipe.unet.set_attn_processor(score)
    torch.testing.assert_close(model.predict(noisy, 300, text), before, rtol=1e-4, atol=1e-5)
    places = {a.query: m for a, m in zip(model.cross_attentions(), found, strict=True)}
    assert len(theirs) == len(places) == 7
    for attn, maps in theirs:
        torch.testing.assert_close(places[attn.to_q], maps, rtol=1e-4, atol=1e-6)


def test_what_the_model_says_about_noise_and_images(model, pipe):
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    t = torch.tensor([0, 500, 999])
    theirs = pipe.scheduler.add_noise(latents, noise, t)
    torch.testing.assert_close(model.add_noise(latents, noise, t), theirs)
    signal = pipe.scheduler.alphas_cumprod.double()
    torch.testing.assert_close(model.log_snr().sigmoid(), signal)
    drawn = torch.rand(2, 3, 16, 16)
    mean = pipe.vae.encode(drawn * 2 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(model.encode_images(drawn), mean)
    with pytest.raises(ExpungeError, match="12 × 16 pixels; this model draws 16 × 16"):
        model.encode_images(drawn[..., :12])


class TestMasks:
    """Where masks and images come from, and what can be wrong with them."""

    @pytest.fixture
    def files(self, tmp_path):
        """Two images of an airplane, and their masks."""
        torch.manual_seed(0)
        for kind in ("pictures", "masks"):
            (tmp_path / kind / "airplane").mkdir(parents=True)
        mask = torch.zeros(3, 16, 16)
        mask[:, 4:10, 2:8] = 1
        for name in ("one", "two"):
            drawn = image_files.to_pil(torch.rand(3, 16, 16))
            image_files.save_image(drawn, tmp_path / "pictures" / "airplane" / f"{name}.png")
            image_files.save_image(
                image_files.to_pil(mask), tmp_path / "masks" / "airplane" / f"{name}.png"
            )
        return tmp_path

    @staticmethod
    def erase(model, files, **settings):
        problem = Problem((Concept("airplane", "sky"),))
        there = {"images_from": str(files / "pictures"), "masks": str(files / "masks")}
        return fit(model, problem, MACE(**{**FAST, **there, **settings}))

    def test_own_images_and_masks(self, model, files):
        shown = reference_images.read_examples(
            model, "airplane", "a photo of the airplane", files / "pictures"
        )
        assert len(shown) == 2
        found = object_masks.find_masks(
            str(files / "masks"), model, shown, torch.zeros(1, 77), RunContext(0)
        )
        assert found.shape == (2, 16, 16)
        assert found.sum() == 2 * 36
        with_masks, without = (self.erase(model, files, masks=m) for m in (str(files / "masks"), "none"))
        assert not torch.equal(with_masks[1].up, without[1].up)

    def test_a_folder_of_one_concept_needs_no_folder_within(self, model, files):
        inner = {k: str(files / k / "airplane") for k in ("pictures", "masks")}
        changes = self.erase(model, files, images_from=inner["pictures"], masks=inner["masks"])
        assert torch.equal(changes[1].up, self.erase(model, files)[1].up)

    def test_attention_masks_find_the_brighter_part(self, model):
        shown = reference_images.draw_examples(model, "ship", "ship", 3, RunContext(0), 2)
        phrase = torch.zeros(1, 77, dtype=torch.bool)
        phrase[0, 1] = True
        found = object_masks.find_masks("attention", model, shown, phrase, RunContext(0))
        assert found.shape == (3, 8, 8)
        assert set(found.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(
            found, object_masks.find_masks("attention", model, shown, phrase, RunContext(0))
        )

    @pytest.mark.parametrize("smallest", [16, 64])
    def test_attention_is_a_mean_over_all_but_coarse_maps(self, model, monkeypatch, smallest):
        monkeypatch.setattr(object_masks, "SMALLEST", smallest)
        monkeypatch.setattr(object_masks, "LOG_SNRS", (0.5,))
        shown = reference_images.draw_examples(model, "ship", "ship", 1, RunContext(0), 2)
        tokens = torch.arange(77)[None] > 0
        noise = torch.randn(shown.latents.shape, generator=RunContext(0).generator("masks", "ship"))
        t = (model.log_snr() - 0.5).abs().argmin()[None]
        noisy = model.add_noise(shown.latents, noise, t)
        forward = lambda: model.predict(noisy, t, model.encode(["ship"]))  # noqa: E731
        with torch.no_grad():
            maps = read_attention(model.cross_attentions(), lambda attention: attention, forward)
        fine = []
        for attention in maps:
            _, heads, pixels, _ = attention.shape
            side = math.isqrt(pixels)
            seen = sum(attention[0, h, :, 1:].sum(1) for h in range(heads)) / heads
            grown = interpolate(seen.view(1, 1, side, side), (8, 8), mode="bilinear")
            fine += [grown[0, 0]] if pixels >= smallest else []
        assert 0 < len(fine) <= len(maps)
        assert (len(fine) < len(maps)) == (smallest == 64)
        found = object_masks.measure_attention(model, shown, tokens, RunContext(0))
        torch.testing.assert_close(found[0], sum(fine) / len(fine))

    @pytest.mark.parametrize(
        ("harm", "message"),
        [
            ("no images", "has no images of 'airplane'"),
            ("no folder", "there is no folder .*elsewhere"),
            ("broken image", "cannot read .*one.png: it is not a whole image"),
            ("small image", "one.png: an image is 8 × 12 pixels; this model draws 16 × 16"),
            ("broken mask", "cannot read .*two.png: it is not a whole image"),
            ("no mask", "the mask of .*two.png is missing: there is no .*two.png"),
            ("small mask", "the mask .*one.png is 8 × 8 pixels, its image 16 × 16"),
            ("empty mask", "the mask of .*one.png is empty"),
            ("full mask", "the mask of .*one.png is full.*masks 'none'"),
            ("drawn images", "set images_from too"),
            ("unknown masks", "source of masks .atention.; did you mean .attention."),
        ],
    )
    def test_what_can_be_wrong(self, model, files, harm, message):
        shown, masked = files / "pictures" / "airplane", files / "masks" / "airplane"
        settings = {}
        if harm == "no images":
            [path.unlink() for path in shown.iterdir()]
        elif harm == "no folder":
            settings = {"images_from": str(files / "elsewhere")}
        elif harm == "broken image":
            whole = (shown / "one.png").read_bytes()
            (shown / "one.png").write_bytes(whole[: len(whole) // 2])
        elif harm == "broken mask":
            (masked / "two.png").write_bytes((masked / "one.png").read_bytes()[:60])
        elif harm == "small image":
            Image.new("RGB", (8, 12)).save(shown / "one.png")
        elif harm == "no mask":
            (masked / "two.png").unlink()
        elif harm == "small mask":
            Image.new("L", (8, 8), 255).save(masked / "one.png")
        elif harm in ("empty mask", "full mask"):
            Image.new("L", (16, 16), 255 * harm.startswith("full")).save(masked / "one.png")
        elif harm == "drawn images":
            settings = {"images_from": ""}
        elif harm == "unknown masks":
            settings = {"masks": "atention"}
        with pytest.raises(ExpungeError, match=message):
            self.erase(model, files, **settings)


def test_what_is_retained_must_weigh_something(model):
    method = MACE(stages=("refine",), templates=SHORT)
    with pytest.warns(ExpungeWarning, match="the retained weigh nothing"):
        fit(model, PROBLEM, method)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ridge": 0.0, "ridge_floor": 0.0},
            r"equations are .*singular.*: raise the ridge from 0, or retain more prompts",
        ),
        ({"refine_prior": 1.0, "captions": "{empty}"}, "empty.txt has no captions"),
        ({"refine_prior": 1.0, "captions": "{absent}"}, "cannot read .*absent.txt: there is no such"),
    ],
)
def test_what_the_closed_forms_cannot_do_without(model, tmp_path, settings, message):
    (tmp_path / "empty.txt").write_text("\n \n")
    files = {name: str(tmp_path / f"{name}.txt") for name in ("empty", "absent")}
    given = {k: v.format(**files) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(ExpungeError, match=message):
        fit(model, Problem((Concept("airplane", "sky"),)), MACE(stages=("refine",), **given))


def test_names_within_one_another_are_said(model):
    problem = Problem((Concept("cat", "sky"), Concept("cat of art", "")), ("the dog with the cat",))
    method = MACE(stages=("refine",), refine_prior=1.0, domain_weight=1.0, captions="")
    says = "'cat' in 'cat of art' .erased too., 'cat' in 'the dog with the cat' .retained."
    with pytest.warns(ExpungeWarning, match=says):
        assert fit(model, problem, method)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"templates": ("no place",)}, "one {} for the concept"),
        ({"focal_high": -1.0, "focal_low": 1.0}, "focal_high must be above focal_low"),
        ({"norm": "jiont"}, "did you mean 'joint'"),
        ({"stages": ("refin",)}, "did you mean 'refine'"),
        ({"learning_rate": 0.0}, "rate must be above 0"),
    ],
)
def test_fields_out_of_range(settings, message):
    with pytest.raises(ExpungeError, match=message):
        MACE(**settings)


def test_presets_are_methods_and_templates_are_thirty():
    assert {"object", "identity-1", "identity-100", "style", "explicit"} <= set(MACE.presets)
    for values in MACE.presets.values():
        assert values["about"]
        MACE(**{name: value for name, value in values.items() if name != "about"})
    assert MACE.presets["explicit"]["fuse_prior"] == pytest.approx(0.4317, rel=1e-3)
    for name, values in MACE.presets.items():  # λ₁ is λ₂, the scale once
        assert values["fuse_prior"] == values["refine_prior"], name
    assert MACE.presets["identity-100"]["refine_prior"] == pytest.approx(61.68, rel=1e-3)
    assert MACE.presets["identity-100"]["domain_weight"] == pytest.approx(2e5 * 100 / 616_767)
    assert set(TEMPLATES) == {"object", "identity", "style", "explicit"}
    for templates in TEMPLATES.values():
        assert len(set(templates)) == 30
        assert all(t.count("{}") == 1 for t in templates)


def test_other_captions_are_another_command(model, captions, tmp_path, monkeypatch):
    """What is kept was trained on weights that they refitted."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    method = MACE(**{**FAST, "captions": captions, "refine_prior": 1.0, "masks": "none"})
    problem, work = Problem(PROBLEM.erase[2:]), tmp_path / "e.work"
    whole = expunge.erase(model, problem, method, work=work)
    assert expunge.erase(model, problem, method, work=work).hash == whole.hash
    with open(captions, "a") as file:
        file.write("a dog\n")
    with pytest.raises(ExpungeError, match=r"another command \(other files\); delete it"):
        expunge.erase(model, problem, method, work=work)


def test_the_text_of_one_concept_at_a_time_is_in_memory(model, monkeypatch):
    problem = Problem(tuple(Concept(name, "sky") for name in ("airplane", "ship", "bird", "cat", "dog")))
    method, alive, most, encode = MACE(**FAST), weakref.WeakSet(), [], model.encode

    def read(prompts):
        text = encode(prompts)
        alive.add(text.embeddings)
        most.append(len(alive))
        return text

    monkeypatch.setattr(model, "encode", read)
    sums = PromptSums.of(group_by_anchor(model, problem, method.templates))
    assert len(most) == 6
    # The anchor's and its own, and at most the one before until that is let go.
    assert max(most) <= 3
    torch.manual_seed(0)
    downs = {c.name: {"x.down": torch.randn(1, 32), "x.up": torch.ones(8, 1)} for c in problem.erase}
    method.fuse(
        group_by_anchor(model, problem, method.templates),
        sums,
        torch.eye(32).double(),
        torch.eye(32).double(),
        downs,
    )
    assert len(most) == 11
    assert max(most) <= 3
