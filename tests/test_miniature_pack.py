"""The miniature as a packed folder: of tiny untrained networks, by what packs the real one."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

import expunge
from expunge import Concept, ExpungeError, Problem
from expunge.base import registry
from expunge.cli.main import main
from expunge.edit import Edit
from expunge.evaluation.measure import make_metric
from expunge.evaluation.suite import Suite
from expunge.miniature import recogniser
from expunge.miniature.recogniser import Recogniser
from training.miniature import card, pack
from training.miniature.recogniser import Names, joined, thresholds_of
from training.miniature.unet import build
from training.miniature.world import read_world

TOKENIZER = Path(recogniser.__file__).parent / "pipeline" / "tokenizer"
WORLD = read_world()
NAMES = Names.of(WORLD)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder as the stages leave it, with the tokenizer that was trained."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text("utf-8"))
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"], initializer_factor=3.0,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    blocks = {
        "block_out_channels": (4,) * 4,
        "norm_num_groups": 2,
        "latent_channels": 16,
        "sample_size": 64,
    }
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    AutoencoderKL(**blocks, **kinds).save_pretrained(folder / "vae")
    nets = {
        "unet": build(16, 8, 32, (32, 32)),
        "recogniser": recogniser.Network(NAMES.sizes, (8, 8, 16)),
    }
    for name, net in nets.items():
        torch.save({"average": net.state_dict()}, folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def packed(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "miniature"
    folder.mkdir()
    (folder / "kept.py").write_text("")
    pack.main(["--work", str(work), "--to", str(folder)])
    return folder


@pytest.fixture(scope="module")
def edit(packed, tmp_path_factory):
    """An edit of it, of a person and an artist."""
    path = tmp_path_factory.mktemp("edits") / "edit.safetensors"
    problem = Problem((Concept("Quessa Wexlow", kind="identity"),), ("cat",))
    found = expunge.erase(expunge.load(packed / "pipeline"), problem)
    found.save(path)
    return path


def run(capsys, *arguments):
    """The exit code of a command, and what it says of errors and warnings, unwrapped."""
    code = main([str(one) for one in arguments])
    return code, " ".join(capsys.readouterr().err.split())


def test_the_folder_is_whole(packed, work):
    assert {path.name for path in packed.iterdir()} == {
        "pipeline", "recogniser", "concepts.json", "README.md", "NOTICE", "drawn.png", "kept.py"
    }  # fmt: skip
    model = expunge.load(packed / "pipeline")
    assert (model.num_inference_steps, model.guidance_scale) == (16, 2.0)
    assert model.anchors["identity"] == "a person"
    weights = torch.load(work / "unet.pt", weights_only=True)["average"]
    for name, tensor in model.pipe.unet.state_dict().items():
        torch.testing.assert_close(tensor, weights[name].half().float(), rtol=0, atol=0)
    assert model.pipe.scheduler.config.prediction_type == "v_prediction"
    known = json.loads((packed / "pipeline" / "expunge.json").read_text("utf-8"))["names"]
    assert len(known["identity"]) == 240
    assert {"Aurelo Cazarro", "noto"} <= set(known["style"])
    assert {"kitty", "pistol"} <= set(known["object"])
    concepts = json.loads((packed / "concepts.json").read_text("utf-8"))
    assert concepts["objects"]["delivery truck"]["names"][0] == "truck"
    assert "Open Peeps" in (packed / "NOTICE").read_text("utf-8")
    assert "Twemoji" in (packed / "NOTICE").read_text("utf-8")
    assert main(["info", str(packed / "pipeline")]) == 0


def test_a_folder_that_cannot_be_packed_stays_as_it_was(packed, work, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in packed.rglob("*")}
    with pytest.raises(SystemExit, match=r"no .*other.pt: train it first"):
        pack.pack(work, packed, recogniser="other")
    with pytest.raises(SystemExit, match=r"copy src/expunge/miniature/pipeline/tokenizer there"):
        pack.pack(tmp_path, packed)
    monkeypatch.setattr(pack, "LARGEST", 1000)
    with pytest.raises(SystemExit, match="a file that is committed has at most 1,000"):
        pack.pack(work, packed)
    assert {path: path.stat().st_mtime_ns for path in packed.rglob("*") if path != packed} == {
        path: time for path, time in before.items() if path != packed
    }


def test_the_card_says_what_was_measured_and_what_was_not(packed, tmp_path):
    text = (packed / "README.md").read_text("utf-8")
    assert "has not met its gates" in text
    assert "{" not in text
    folder = shutil.copytree(packed, tmp_path / "copy")
    rows = [("people", 0.6, 0.85), ("ten words", 0.99, 0.95), ("word alone, people", 0.4, 0.9)]
    gates = [
        {"gate": gate, "value": value, "n": 100, "goal": None, "least": least, "passes": value >= least}
        for gate, value, least in rows
    ]
    (folder / "gates.json").write_text(json.dumps({"gates": gates}))
    accuracy = {"drawings": {"person": 0.987}, "after the VAE": {"person": 0.9}}
    (folder / "recogniser" / "held_out.json").write_text(json.dumps(accuracy))
    card.write_card(folder, {"text_encoder": 1, "unet": 13_500_000, "vae": 1, "recogniser": 1})
    text = (folder / "README.md").read_text("utf-8")
    assert "Not met: people; word alone, people." in text
    assert "| ten words | 99 % (100) | 95 % |  |" in text
    assert text.index("Is it a yardstick") < text.index("| word alone, people | 40 % (100) |")
    assert "| person | 98.7 % | 90.0 % |" in text
    assert "13.5 M" in text


# -- the judge ----


def rows_of(judge, *seen):
    """Rows in which only what is named is seen."""
    heads = []
    for one in seen:
        values = {head: torch.full((size,), 0.01) for head, size in NAMES.sizes.items()}
        for thing in one.get("things", ()):
            values["things"][NAMES.things.index(thing)] = 0.9
        if person := one.get("person"):
            values["people"][NAMES.people.index(person)] = 0.9
        values["palette"][NAMES.palettes.index(one.get("palette", "none"))] = 0.9
        values["technique"][NAMES.techniques.index(one.get("technique", "none"))] = 0.9
        values["face"][:] = one.get("face", 0.0)
        values["broken"][:] = one.get("broken", 0.0)
        heads.append(torch.cat(list(values.values())))
    return torch.stack(heads)


@pytest.fixture(scope="module")
def judge(packed):
    return make_metric("miniature", {"folder": str(packed / "recogniser")})


def test_who_it_is_is_asked_among_images_with_a_face(judge):
    one, other = NAMES.people[:2]
    rows = rows_of(
        judge,
        {"person": one, "face": 0.9},
        {"person": one},
        {"person": other, "face": 0.9},
        {"face": 0.9},
        {"things": ["cat"], "broken": 0.9},
    )
    found = judge.score(rows, [one], [], "top1")
    assert found[[0, 2, 3]].tolist() == [1, 0, 0]
    assert found[[1, 4]].isnan().all()
    assert judge.score(rows, [one], [], "present").tolist() == [1, 1, 0, 0, 0]
    assert judge.score(rows, [one], [other], "top1")[2].isnan()
    assert judge.find_broken(rows).tolist() == [False] * 4 + [True]
    assert judge.describe(rows) == [
        one, "background only", other, "a person", "unrecognisable"
    ]  # fmt: skip


def test_an_artist_is_a_palette_and_a_technique(judge):
    artist = WORLD.artists[0]
    traits = {"palette": artist.palette, "technique": artist.technique}
    rows = rows_of(
        judge,
        {**traits, "things": ["cat"]},
        {"palette": artist.palette},
        {"technique": artist.technique},
        {},
    )
    assert judge.score(rows, [artist.name], [], "top1").tolist() == [1, 0, 0, 0]
    assert judge.score(rows, [artist.name], [], "probability")[0] == pytest.approx(0.81)
    assert judge.describe(rows)[0] == f"cat by {artist.name}"
    assert judge.score(rows, ["cat"], [], "top1").tolist() == [1, 0, 0, 0]
    assert judge.knows(artist.name)
    assert judge.knows("noto")
    with pytest.raises(ExpungeError, match="no label 'Aurelo Cazaro'; did you mean 'Aurelo Cazarro'"):
        judge.score(rows, ["Aurelo Cazaro"], [], "top1")


def test_faces_and_near_artists_are_counted(judge, packed, monkeypatch):
    artist = WORLD.artists[0]
    rows = rows_of(
        judge,
        {"palette": artist.palette, "technique": artist.technique, "face": 0.9},
        {"palette": artist.palette},
        {},
        {"technique": artist.technique},
    )

    def answer(self, images, batch_size=128):
        return self.recognition(rows)

    monkeypatch.setattr(Recogniser, "__call__", answer)
    images, folder = torch.rand(4, 3, 64, 64), {"folder": str(packed / "recogniser")}
    prompts = [f"art by {artist.name.upper()}"] * 3 + ["a cat"]
    near = make_metric("near_artist", folder).measure(images, prompts)
    assert near[:, 0].tolist() == [0, 1, 0, 0]  # both is no half, and the last names nobody
    assert make_metric("face_ratio", folder).measure(images, prompts)[:, 0].tolist() == [1, 0, 0, 0]


def test_the_judge_measures_images_as_they_come(judge):
    images = torch.rand(3, 3, 48, 64)
    images[1] = torch.nan
    rows = judge.measure(images, [""] * 3)
    assert rows.shape == (3, sum(NAMES.sizes.values()))
    assert rows.isfinite().all()
    assert bool(judge.find_broken(rows)[1])
    heads = judge.recognition(rows)
    assert heads.head("palette").sum(1).tolist() == pytest.approx([1] * 3, abs=1e-5)
    assert judge.provenance["people"] == 240


def test_thresholds_leave_one_false_alarm_in_a_hundred():
    n = 1000
    truth = {head: torch.zeros(n, size) for head, size in NAMES.sizes.items()}
    answers = {head: torch.zeros(n, size) for head, size in NAMES.sizes.items()}
    answers["things"][:, 3] = torch.linspace(0, 0.6, n)
    answers["face"][:, 0] = torch.linspace(0, 0.4, n)
    found = thresholds_of(joined([answers]), truth)
    assert found.present == pytest.approx(0.594, abs=1e-3)
    assert found.face == pytest.approx(0.396, abs=1e-3)
    assert (found.nothing, found.unrecognisable) == (0.3, 0.1)  # their bounds
    truth["things"][:, 3] = 1  # what is there is no false alarm
    assert thresholds_of(answers, truth).present == 0.1
    assert (answers["things"][:, 3] > 0.594).float().mean() <= 0.011


# -- bad input, through the command line ----


def test_without_weights_the_name_is_one_sentence(tmp_path, capsys, monkeypatch):
    for folder in ("emoji/pipeline", "miniature/suites"):
        (tmp_path / "package" / folder).mkdir(parents=True)
    monkeypatch.setattr(registry, "HERE", tmp_path / "package")
    monkeypatch.setattr(recogniser, "FOLDER", tmp_path / "package" / "miniature" / "recogniser")
    code, said = run(capsys, "draw", "a cat", "--model", "miniature", "-o", tmp_path / "cat.png")
    assert code == 2
    assert "the weights of the model 'miniature' are not in this package but in a clone" in said
    assert "take emoji" in said
    assert not (tmp_path / "cat.png").exists()
    with pytest.raises(ExpungeError, match="not in this package but in a clone"):
        expunge.load("miniature")
    with pytest.raises(ExpungeError, match="recogniser is not in this package yet"):
        Recogniser.load()


@pytest.mark.parametrize("part", ["pipeline", "recogniser"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_broken_or_missing_shard_is_named(part, damage, packed, edit, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(packed, tmp_path / "miniature")
    shard = max((folder / part).rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    whole = shard.read_bytes()
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(whole[:-100])
    if part == "pipeline":
        monkeypatch.setattr("expunge.base.registry.HERE", tmp_path)
        code, said = run(capsys, "draw", "a cat", "--model", "miniature", "-o", tmp_path / "out.png")
    else:
        own = tmp_path / "own.toml"
        own.write_text(
            'version = 1\nscore = "H_c"\njudge = "miniature"\nerase = ["Quessa Wexlow"]\n'
            '[templates]\nerased = ["a sketch of {}"]\n'
            f'[options]\nminiature = {{ folder = "{folder / part}" }}\n'
        )
        place = ("--model", packed / "pipeline", "-o", tmp_path / "out.png")
        code, said = run(capsys, "evaluate", edit, "--suite", own, *place)
    assert code == 2
    assert ("no weights" if (damage, part) == ("missing", "pipeline") else shard.name) in said
    assert "Traceback" not in said
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("concept", "says"),
    [
        (
            "Abrel",
            "'Abrel' is a part of 10 names, so say which one is meant: Abrel Bolvane, Abrel Crendle",
        ),
        ("wexlow", "'wexlow' is a part of"),
        ("Aurelo", "Aurelo Cazarro, Aurelo Devrault"),
        ("Quessa Wexlow|quessa", "'quessa' is a part of"),
    ],
)
def test_one_word_of_a_name_asks_which(concept, says, packed, tmp_path, capsys):
    output = tmp_path / "edit.safetensors"
    code, said = run(
        capsys, "erase", "uce", "--concept", concept, "--model", packed / "pipeline", "-o", output
    )
    assert code == 2
    assert says in said
    assert not output.exists()


def test_a_kind_is_corrected_and_a_name_that_nobody_has_is_told(packed, tmp_path, capsys):
    kinds = {
        "Aurelo Cazarro": "style",
        "quessa wexlow": "identity",
        "pistol": "object",
        "Hastri Quorb": "object",
    }
    told = [part for name in kinds for part in ("--concept", name)]
    place = ("--model", packed / "pipeline", "-o", tmp_path / "edit.safetensors")
    code, said = run(capsys, "erase", "uce", "--num-retain-words", 0, *told, *place)
    assert code == 0
    assert (
        "'Aurelo Cazarro' is of the kind style in this model, not object: it is erased as style" in said
    )
    assert "'quessa wexlow' is of the kind identity in this model" in said
    assert "knows no 'Hastri Quorb': did you mean 'Hastri Quorby'?" in said
    assert said.count("this model") == 3  # nothing is said twice, and nothing of the pistol
    erased = Edit.load(tmp_path / "edit.safetensors").record.problem.erase
    assert {concept.name: concept.kind for concept in erased} == kinds


def test_a_suite_names_the_nearest_of_whom_it_knows():
    suite = Suite.read("identity", "miniature")
    with pytest.raises(
        ExpungeError, match="knows nothing of 'Quessa Wexlo'.*did you mean 'Quessa Wexlow'"
    ):
        suite.cells(["Quessa Wexlo"])


def test_an_edit_of_one_shipped_model_is_refused_by_another(edit, packed, tmp_path, capsys):
    other, model = Edit.load(edit), expunge.load(packed / "pipeline")
    assert other.fits(model)
    other = dataclasses.replace(other, record=dataclasses.replace(other.record, model="miniature"))
    other.save(tmp_path / "edit.safetensors")
    assert other.fits(model)  # a folder of its own may be the model
    model.name = "emoji"
    with pytest.raises(ExpungeError, match="was made for the model miniature, and this is emoji"):
        other.apply(model)
    code = main(["info", str(tmp_path / "edit.safetensors"), "--model", "emoji"])
    assert code == 0
    assert "made for the model miniature, and this is emoji" in " ".join(capsys.readouterr().out.split())
