"""The studio's session from choosing to taking away, without a browser."""

import base64
import errno
import json
import pickle
import shlex
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import expunge
from expunge import Concept, Problem
from expunge.base.errors import ExpungeError
from expunge.base.files import read_header
from expunge.cli import erase as erase_command
from expunge.cli import main as command_line
from expunge.methods.mace import MACE
from expunge.studio import choice, models, recipes, server, uploads, views, working
from expunge.studio.choice import Choice, View
from expunge.studio.choosing import Foresight
from expunge.studio.house import Studio
from expunge.studio.jobs import Job
from expunge.studio.looking import Pair
from expunge.studio.models import Models
from expunge.studio.strength import check_strength
from quick import QUICK

pytestmark = pytest.mark.filterwarnings("default::expunge.base.errors.ExpungeWarning")


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    # The smaller of the models that ship, for most of it is the same for both.
    studio = Studio(tmp_path_factory.mktemp("studio"), first="emoji")
    studio.models.get("emoji")
    return studio


@pytest.fixture
def session(studio):
    """A new session."""
    return studio.session()


@pytest.fixture(scope="module")
def erased(studio):
    """A session that has erased the airplane, by the cheapest preset."""
    session = studio.session()
    session.choose(["airplane"])
    session.choose_method("uce", "original")
    session._choose(view=View(("the airplane",), 5, 1))
    done(session.erase())
    return session


def done(job):
    """The result of a job that ends well."""
    assert job.wait(120)
    assert job.state == "done", job.error
    return job.result


# Choosing.


def test_a_name_is_proposed_with_what_is_known_of_it(session):
    session.choose(["Airplane", "flag of Japan", "twemoji"])
    kinds = {concept.name: concept.kind for concept in session.choice.concepts}
    assert kinds == {"airplane": "object", "flag of Japan": "identity", "twemoji style": "style"}
    assert all(concept.synonyms == () for concept in session.choice.concepts)  # proposed, not taken
    assert "jet" in session.knowledge.synonyms("airplane")
    assert session.choice.retain[:2] == ("automobile", "bird")


def test_what_stays_follows_the_choice_and_keeps_what_was_added(session):
    session.choose(["airplane"])
    session.retain([*session.choice.retain, "a red house"])
    session.choose(["airplane", "bird"])
    assert "a red house" in session.choice.retain
    assert not {"bird", "airplane"} & set(session.choice.retain)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda s: s.choose(["cat", "Cat"]), "erased twice"),
        (lambda s: s.choose([" "]), "needs a name"),
        (lambda s: s.retain(["airplane"]), "both erased and retained"),
        (lambda s: s.retain([""]), "empty"),
        (lambda s: s.change("airplane", anchor="airplane"), "the concept itself"),
        (lambda s: s.change("airplane", kind="objct"), "did you mean 'object'"),
        (lambda s: s.change("airplne", anchor="sky"), "did you mean 'airplane'"),
        (lambda s: s.choose_method("ucee"), "did you mean 'uce'"),
        (lambda s: s.choose_method("mace", "emojj"), "did you mean 'emoji'"),
        (lambda s: s.choose_seed(-1), "not -1"),
        (lambda s: s.choose_seed(None), "not None"),
        (lambda s: s.choose_text(" "), "empty"),
        (lambda s: s.choose_text("cat=ground\ndog=sky, objct"), "line 2"),
        (lambda s: s.choose_model("emojj"), "did you mean 'emoji'"),
        (lambda s: s.choose_model(""), "name a model"),
        (lambda s: s.look(["a cat"]), "erase something first"),
        (lambda s: s.take("edit"), "erase something first"),
    ],
)
def test_a_choice_that_does_not_fit_changes_nothing(session, act, said):
    session.choose(["airplane"])
    before = session.choice
    with pytest.raises(ExpungeError, match=said) as error:
        act(session)
    assert "\n" not in str(error.value)
    assert str(session.folder) not in str(error.value)
    assert session.choice == before


def test_concepts_come_from_a_list(session, tmp_path):
    session.choose_text("airplane|jet=sky\nflag of Japan=a flag, identity\n# a comment")
    assert session.choice.concepts == (
        Concept("airplane", "sky", "object", ("jet",)),
        Concept("flag of Japan", "a flag", "identity"),
    )
    file = tmp_path / "some.toml"
    file.write_text('retain = ["ship"]\n[[concept]]\nname = "cat"\n', encoding="utf-8")
    session.choose_list(file)
    assert session.choice.concepts == (Concept("cat"),)
    assert session.choice.retain == ("ship",)


def test_a_studio_begins_with_the_default_model(tmp_path):
    session = Studio(tmp_path).session()
    session.choose(["airplane", "jorvek ambrask", "Isolmo Lamberque"])
    kinds = {concept.name: concept.kind for concept in session.choice.concepts}
    assert kinds == {"airplane": "object", "Jorvek Ambrask": "identity", "Isolmo Lamberque": "style"}
    known = session.models.knowledge(session.choice.model)
    assert set(known.suites_for(["airplane"])) >= {"object", "pairs"}
    assert known.suites_for(["Jorvek Ambrask"])[0] == "identity"


def test_presets_are_for_the_model_and_the_kind(session):
    session.choose(["twemoji style"])
    session.choose_method("ant")
    assert session.choice.preset == "emoji-style"
    session.choose(["airplane"])
    assert session.choice.preset == "emoji-object"
    offered = [option.name for option in recipes.presets("mace", "emoji")]
    assert offered[0] == "emoji"
    assert "identity-100" not in offered
    assert "emoji" not in [option.name for option in recipes.presets("mace", "some-sd")]
    options = [*recipes.methods(), *recipes.presets("ace", "emoji")]
    assert all(option.about.endswith(".") for option in options)


# Before the work.


def test_what_is_foreseen(session):
    session.choose(["cat"])
    session.retain(["a cat's face", "dog"])
    found = session.foresee()
    assert found.problem == ""
    assert "MB of weights" in found.memory
    assert found.time.startswith("about ")
    assert any("“a cat's face” shares words with “cat”" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("airplne", "did you mean “airplane”"),
        ("flag of Jap", "did you mean “flag of Japan”"),
        ("飞机", "no word in the script of “飞机”"),
        ("самолёт", "no word in the script"),
        ("zzyzx", "can only spell “zzyzx”"),
        ("Van Gogh", "“Van Gogh” is taken for an object: choose style for an artist"),
    ],
)
def test_a_name_that_the_model_does_not_know_is_said(session, name, said):
    session.choose([name])
    assert any(said in note for note in session.foresee().notes)


def test_questions_leave_the_working_tokenizer_alone(studio, session):
    """It keeps the padding of its last call: asked in another thread, it would spoil a batch."""
    loaded = studio.models.get("emoji")
    loaded.model.encode(["a cat", "a dog and a ship"])
    working = loaded.model.pipe.tokenizer.backend_tokenizer
    before = (working.padding, working.truncation)
    assert before[0] is not None
    session.choose(["飞机", "cat"])
    assert session.foresee().time
    assert (working.padding, working.truncation) == before
    assert loaded.asked.pipe.unet is loaded.model.pipe.unet
    assert loaded.asked.vocabulary() == loaded.model.vocabulary()


def test_what_else_will_move_is_foreseen_once_and_before_the_work(session):
    session.choose(["airplane"])
    assert session.foresee().forecast is None
    done(session.preview())
    found = session.foresee().forecast
    names = [move.name for move in found.moves]
    assert set(session.choice.retain) <= set(names)
    assert "airplane" not in names
    shown = views.foresight(session.foresee())
    assert all(name in shown for name in names[: views.MOVES])
    assert all(f"<span>{name}</span>" in shown for name in session.choice.retain)
    assert session.preview() is None
    session.choose_method("esd")
    assert session.foresee().forecast is None  # it was another method's
    session.choose_method("uce")
    assert session.foresee().forecast == found


def test_what_cannot_be_done_is_said_before_the_work(session):
    assert session.foresee() == Foresight(problem="choose at least one concept to erase")
    with pytest.raises(ExpungeError, match="choose at least one"):
        session.erase()
    session.choose(["a " * 200 + "cat"])
    assert "this model reads no more than" in session.foresee().problem


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("it was loaded"))
    there = Models(memory=lambda: 1000.0)
    with pytest.raises(ExpungeError, match="of weights, and 0.9 kB can be used here"):
        there.get(str(folder))
    assert there.ready(str(folder)) is None


def test_strangers_name_no_files(folder):
    with pytest.raises(ExpungeError, match="reads no files by their place"):
        Models(local_files=False).check(str(folder))
    Models(local_files=False).check("emoji")


def test_a_single_file_is_read_by_the_configuration_that_is_told(session, single, folder):
    done(session.choose_model(str(single), str(folder)))
    assert session.choice.config == str(folder)
    session.choose(["airplane"])
    made = done(session.erase())
    assert made.model == str(single)
    assert done(session.take("safetensors")).files[0].is_file()
    assert f"--config {folder}" in session.command().replace("\\\n  ", "")
    assert f"config={str(folder)!r}" in session.python()
    again = type(session)("again", session.models, session.desk, session.folder, "emoji")
    assert again.choice == session.choice
    for model, config, said in (
        (str(folder), str(folder), "is for a single file"),
        (str(single), str(folder / "none"), "none"),
    ):
        with pytest.raises(ExpungeError, match=said):
            session.choose_model(model, config)
        assert session.choice.config == str(folder)


def test_a_pickled_model_is_refused(session, tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ExpungeError, match="pickled"):
        session.choose_model(str(file))
    assert session.choice.model == "emoji"


# The work.


def test_the_edit_is_the_librarys_own(erased, studio):
    model = studio.models.get("emoji").model
    problem = Problem(
        (Concept("airplane", "ground"),),
        ("automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    )
    own = expunge.erase(model, problem, recipes.build("uce", "original"))
    assert erased.made.edit.hash == own.hash
    assert erased.made.edit.record.problem == problem


def test_pairs_are_of_the_same_prompts_and_seeds(erased, studio):
    (pair,) = done(erased.look(["the airplane"], seed=5, number=1))
    assert (pair.prompt, pair.seed) == ("the airplane", 5)
    (same,) = done(erased.look(["the airplane"], seed=5, number=1, strength=0.0))
    assert same.before.tobytes() == same.after.tobytes() == pair.before.tobytes()
    assert pair.after.tobytes() != pair.before.tobytes()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"prompts": [" "]}, "at least one prompt"),
        ({"prompts": ["a"] * 9, "number": 8}, "more than the 64"),
        ({"prompts": ["a"], "strength": 9}, "strength must be 0 to 2"),
        ({"prompts": ["a"], "number": 0}, "at least 1"),
        ({"prompts": ["a"], "seed": -1}, "seed"),
    ],
)
def test_a_look_that_cannot_be_taken(erased, how, said):
    with pytest.raises(ExpungeError, match=said):
        erased.look(**how)


def test_two_sessions_do_not_disturb_each_other(studio, erased):
    other = studio.session()
    other.choose(["cat"])
    assert erased.choice.concepts == (Concept("airplane"),)
    assert other.made is None
    assert other.folder != erased.folder
    assert studio.session(other.name) is other
    strange = studio.session("../../etc")
    assert strange.folder.parent == studio.folder
    assert len({strange.name, other.name, erased.name}) == 3


def test_a_second_erasure_at_once_is_refused(studio, session):
    session.choose(["cat"])
    session.choose_method("uce", "original")
    go = threading.Event()
    blocked = studio.desk.submit(working_job(go))
    job = session.erase()
    assert session.place() == 1
    with pytest.raises(ExpungeError, match="erasing is still under way here"):
        session.erase()
    session.cancel()
    assert job.state == "cancelled"
    go.set()
    assert blocked.wait(10)


def working_job(go):
    from expunge.studio.jobs import Job

    return Job("another", "Erasing", lambda job: go.wait(30))


@pytest.mark.slow
def test_a_cancelled_erasure_goes_on_where_it_was(studio, session, monkeypatch):
    rough = {"about": "a rough try in a few steps", **QUICK["mace"]}
    monkeypatch.setattr(MACE, "presets", {**MACE.presets, "rough": rough})
    session.choose(["cat", "dog"])
    session.choose_method("mace", "rough")
    job = session.erase()
    seen = []
    while job.active:
        kept = list((session.folder / "work").glob("*/*/*.safetensors"))
        if kept and not seen:
            seen = kept
            session.cancel()
        job.wait(0.01)
    assert job.state == "cancelled"
    assert seen
    assert session.unfinished
    assert session.made is None
    done(session.erase())
    assert not session.unfinished
    problem = session.choice.problem.with_anchors({"object": "ground"})
    own = expunge.erase(studio.models.get("emoji").model, problem, recipes.build("mace", "rough"))
    assert session.made.edit.hash == own.hash


@pytest.mark.slow
def test_a_suite_judges_and_the_card_has_its_figures(erased):
    verdict = done(erased.judge("object", "glance"))
    assert verdict.columns == ("H_o", "efficacy", "generality", "specificity")
    assert [row[0] for row in verdict.rows] == ["original", "no-airplane"]
    assert (verdict.folder / "index.html").is_file()
    assert "x-report" in views.report(verdict)
    taken = done(erased.take("card"))
    assert "Suite object, in per cent" in taken.files[0].read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_attack_shows_every_rung(erased):
    rungs = done(erased.attack("inversion", 4, "a photo of the airplane", number=1))
    labels = ["Before the erasure", "Erased"]
    labels += [f"A new word, learnt in {n} steps" for n in (1, 4)]
    assert [rung.label for rung in rungs] == labels
    assert rungs[0].seen == [True]


def test_a_full_disk_is_told_without_the_place_of_the_files(erased, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", full)
        assert erased.take("edit").wait(120)
    shown = views.progress(erased, "right")
    assert "No space left" in shown
    assert str(erased.folder) not in shown


def test_an_attack_on_nothing_is_refused_before_it_waits(erased):
    with pytest.raises(ExpungeError, match="write the prompt"):
        erased.attack("inversion", 4, " \n")


@pytest.mark.parametrize(("attack", "budget"), [("inversn", 4), ("inversion", 0), ("embedding", -1)])
def test_an_attack_that_there_is_not(erased, attack, budget):
    with pytest.raises(ExpungeError, match="did you mean 'inversion'|must be above 0"):
        erased.attack(attack, budget, "the airplane")


# Taking away.


@pytest.mark.parametrize("form", ["edit", "lora", "comfyui"])
def test_what_is_taken_away_can_be_read(erased, form):
    taken = done(erased.take(form))
    if form == "edit":
        assert expunge.Edit.load(taken.files[0]).hash == erased.made.edit.hash
    else:
        weights, card = taken.files
        assert weights.name == f"no-airplane-{form}.safetensors"
        assert "no-airplane" not in card.read_text(encoding="utf-8") or card.suffix == ".md"
        assert any("lora" in name for name in read_header(weights))


PROBLEMS = [
    Problem((Concept("airplane"),)),
    Problem((Concept("airplane", "sky", synonyms=("jet", "plane")),), ("bird", "a ship at sea")),
    Problem((Concept("it's", ""), Concept("cat", "a dog")), ("$HOME",)),
    Problem((Concept("Van Gogh", "art", "style"),)),
    Problem((Concept("airplane"), Concept("flag of Japan", "a flag", "identity"))),
]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("preset", ["default", "emoji"])
def test_the_command_and_the_lines_of_python_say_the_same(problem, preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heard = []
    text = recipes.command("emoji", problem, "mace", preset, 7)
    if text.startswith("cat >"):
        head, rest = text.split("END\n", 1)[0], text.rpartition("\nEND\n")[2]
        lines = text.partition("\n")[2].partition("END\n")[0]
        (tmp_path / "concepts.txt").write_text(lines, encoding="utf-8")
        text = rest
        assert head
    monkeypatch.setattr(
        erase_command, "erase_concepts", lambda options, method: heard.append((options, method))
    )
    assert command_line.main(shlex.split(text.replace("\\\n", ""))[1:]) == 0
    options, method = heard[0]
    assert erase_command.check_problem(options) == problem
    assert options.seed == 7
    assert method == recipes.build("mace", preset)
    said = {}

    class Saved:
        def save(self, path):
            said["path"] = path

    def erase(model, problem, method, seed=0):
        said.update(problem=problem, method=method, seed=seed)
        return Saved()

    monkeypatch.setattr(expunge, "load", lambda name: name, raising=False)
    monkeypatch.setattr(expunge, "erase", erase, raising=False)
    exec(recipes.python("emoji", problem, "mace", preset, 7), {})
    assert said["problem"] == problem
    assert said["seed"] == 7
    assert said["method"] == ("mace" if preset == "default" else method)
    assert said["path"] == options.output


# Keeping and opening.


def test_a_session_is_opened_again_with_its_edit(erased, studio):
    file = erased.save(carry=True)
    other = studio.session()
    other.open(file)
    assert other.choice == erased.choice
    assert other.made.edit.hash == erased.made.edit.hash
    again = Studio(studio.folder, studio.models, "emoji").session(other.name)  # after a restart
    assert again.choice == other.choice
    assert again.made.edit.hash == erased.made.edit.hash


def test_a_header_length_that_begins_like_a_pickle_is_none(tmp_path):
    """A safetensors file begins with its header's length; of one in 32 the first byte is 0x80."""
    path = tmp_path / "edit.safetensors"
    for n in range(0, 400, 8):
        save_file({"a": torch.zeros(1)}, path, {"note": "x" * n})
        if path.read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no such length was tried")
    assert uploads.check(path, (".safetensors",)) == path


def test_an_edit_is_opened(erased, studio):
    other = studio.session()
    other.open(erased.edit_path)
    assert other.choice.problem == erased.made.edit.record.problem
    assert other.made.model == "emoji"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no session of the studio"),
        ({"format": 99}, "newer expunge"),
        ({"concepts": "cat"}, "a table is expected"),
        ({"concepts": [{"name": "cat"}, {"name": "Cat"}]}, "erased twice"),
        ({"concepts": [{"name": "cat", "kind": "objct"}]}, "did you mean 'object'"),
        ({"method": "ucee"}, "did you mean 'uce'"),
        ({"seed": "1"}, "seed cannot be '1'"),
        ({"retain": "bird"}, "retain must be a list"),
        ({"view": {"strenth": 1}}, "did you mean|no field"),
        ({"model": "emojj"}, "did you mean 'emoji'"),
        ({"edit": "no base64!"}, "the edit in it is broken"),
        ({"edit": base64.b64encode(pickle.dumps({})).decode()}, "not a whole safetensors"),
    ],
)
def test_a_file_that_is_no_session_changes_nothing(session, tmp_path, change, said):
    session.choose(["airplane"])
    before, file = session.choice, tmp_path / "studio.json"
    data = json.loads(choice.write(Choice(concepts=(Concept("cat"),)), file).read_text(encoding="utf-8"))
    text = change if isinstance(change, str) else json.dumps({**data, **change})
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ExpungeError, match=said) as error:
        session.open(file)
    assert str(tmp_path) not in str(error.value)
    assert session.choice == before
    assert session.made is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.ckpt", b"PK\3\4", "pickled"),
        ("list.txt", b"\x80\4\x95", "pickled"),
        ("edit.safetensors", pickle.dumps({}), "pickled"),
        ("edit.safetensors", b"\x10\0\0\0\0\0\0\0{}", "not a whole safetensors"),
        ("list.exe", b"MZ", "none of the files"),
        ("list.txt", b"", "is empty"),
        ("list.csv", b"a" * 2000, "may have 1.0 kB here"),
    ],
)
def test_uploads_are_checked(tmp_path, monkeypatch, name, content, said):
    monkeypatch.setitem(uploads.LIMITS, ".csv", 1000)
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ExpungeError, match=said) as error:
        uploads.check(file, (*uploads.LISTS, *uploads.OPENED))
    assert str(tmp_path) not in str(error.value)


# Strength.


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan")])
def test_a_strength_out_of_range(strength):
    with pytest.raises(ExpungeError, match="strength must be 0 to 2"):
        check_strength(strength)


# Serving.


def test_a_port_in_use_gives_the_next_free_one():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = server.free_port("127.0.0.1", port)
        assert free > port
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", free))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "99999"], "a port is 1 to 65535, not 99999"),
        (["--host", "192.0.2.1"], "no address of this machine"),
        (["--model", "emojj"], "did you mean 'emoji'"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(server, "check_gradio", lambda: None)
    assert command_line.main(["studio", "--no-browser", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_without_gradio_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    assert command_line.main(["studio"]) == 2
    assert "pip install 'expunge[studio]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_who_can_reach_it(host, local):
    assert server.is_local(host) is local


def test_what_is_typed_is_no_html(session):
    name = "<img src=x onerror=alert(1)>"
    shown = [
        views.foresight(Foresight(notes=(name,))),
        views.foresight(Foresight(problem=name)),
        views.notes([name]),
        views.sentence(name),
    ]
    for text in shown:
        assert "<img" not in text
        assert "&lt;img" in text


def test_every_form_and_size_is_told_in_a_sentence():
    for told in (*working.FORMS.values(), *working.SIZES.values()):
        assert told[0].isupper()
        assert told.endswith(".")


# What a newcomer needs.


def test_what_was_drawn_stays_in_sight_while_the_first_erasure_runs(session):
    session.choose(["airplane"])
    done(session.preview())
    assert views.PRESS in views.now(session)
    session.job = Job("s", "Erasing", lambda job: None)  # as it stands while the work waits
    shown = views.now(session)
    assert "What the model draws now" in shown
    assert "<figure>" in shown
    assert views.PRESS not in shown
    session.choose(["cat"])  # nothing is drawn of that yet
    assert views.now(session) == views.WELCOME


@pytest.mark.parametrize(
    ("name", "asked"),
    [("airplane", False), ("twemojii stile", True), ("a very strange thing", False)],
)
def test_a_card_asks_about_a_name_that_is_almost_known(session, name, asked):
    shown = views.heading(name, session)
    assert name in shown
    assert ("Did you mean “twemoji style”?" in shown) is asked


def test_figures_and_pairs_say_how_they_are_read():
    found = working.Verdict(
        suite="style", columns=("H_style", "efficacy", "content"), rows=(), folder=Path(), notes=()
    )
    shown = views.verdict(found)
    assert "Efficacy: the erased is gone" in shown
    assert "harmonic mean" in shown
    assert "specificity" not in shown  # it is no column here
    white = Image.new("RGB", (8, 8))
    assert "before is on the left" in views.pairs([Pair("a cat", 0, white, white)])
    assert views.pairs([]) == ""


def test_before_there_are_pairs_the_page_says_that_they_come():
    white = Image.new("RGB", (8, 8))
    assert "come here as soon as they are drawn" in views.sides(None)
    assert "come here" not in views.sides(Pair("a cat", 0, white, white))
