"""What other trainers' files ask to be erased: LECO's prompts, and concept sliders."""

import warnings

import pytest

import expunge
from expunge import Concept, ExpungeError, ExpungeWarning
from expunge.cli import concept_files
from expunge.cli.main import main

LECO = """
guidance_scale = 1.0

[[prompts]]
target = "airplane"

[[prompts]]
target = "van gogh style"
positive = "van gogh style"
unconditional = ""
neutral = "painting"
action = "erase"
guidance_scale = 1

[[prompts]]
target = "person"
positive = "smiling person"

[[prompts]]
target = ""
positive = "blurry"

[[prompts]]
target = "dog"
positive = "dog"
action = "enhance"
guidance_scale = -1.0

[[prompts]]
target = "airplane"
"""
AS_YAML = """
- target: airplane
- {target: van gogh style, positive: van gogh style, unconditional: "", neutral: painting, action: erase}
- target: person
  positive: smiling person
  guidance_scale: 1.0
- target: ""
  positive: blurry
- {target: dog, positive: dog, action: enhance, guidance_scale: -1}
- target: airplane
  neutral: null
"""
CONCEPTS = (
    Concept("airplane", ""),
    Concept("van gogh style", "painting"),
    Concept("smiling person", "person"),
    Concept("blurry", ""),
    Concept("dog", ""),
)
SLIDER = """
job: extension
config:
  name: long hair
  process:
    - type: concept_slider
      train: {steps: 500, lr: 1.0e-4}
      slider:
        target_class: person
        positive_prompt: ""
        negative_prompt: "person with [name]"
        anchor_class: dog
"""
TARGETS = """
job: train
config:
  name: detail
  process:
    - type: slider
      slider:
        targets:
          - target_class: photo
            negative: blurry photo
          - {target_class: "", positive: "", negative: "noise", weight: 1.0}
        anchors:
          - prompt: a woman
            multiplier: 1.0
          - prompt: "A woman"
"""


@pytest.fixture
def file(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(("name", "text"), [("p.toml", LECO), ("p.yaml", AS_YAML), ("p.YML", AS_YAML)])
def test_lecos_prompts(file, name, text):
    # Warnings are errors here: nothing of these is left out.
    assert concept_files.read_concepts(file(name, text)) == (CONCEPTS, ())
    (first, *_), _ = concept_files.read_concepts(file(name, text), "style")
    assert first.kind == "style"


def test_sliders(file):
    assert concept_files.read_concepts(file("s.yaml", SLIDER)) == (
        (Concept("person with long hair", "person"),),
        ("dog",),
    )
    assert concept_files.read_concepts(file("t.yaml", TARGETS)) == (
        (Concept("blurry photo", "photo"), Concept("noise", "")),
        ("a woman",),
    )
    # The slider alone, as TOML, and among prompts.
    plain = 'target_class = "cat"\nnegative = "fat cat"'
    expected = ((Concept("fat cat", "cat"),), ())
    for text in (plain, f"[slider]\n{plain}", f"[[targets]]\n{plain}", f"[[prompts]]\n{plain}"):
        assert concept_files.read_concepts(file("s.toml", text)) == expected


def test_a_slider_whose_class_is_what_it_erases(file):
    text = "slider: {target_class: cat, negative_prompt: Cat, positive_prompt: dog}"
    with pytest.warns(ExpungeWarning, match="'dog', which a slider enhances"):
        found, _ = concept_files.read_concepts(file("s.yaml", text))
    assert found == (Concept("Cat", "dog"),)


@pytest.mark.parametrize(
    ("name", "text", "left", "found"),
    [
        (
            "p.toml",
            '[[prompts]]\ntarget="cat"\nguidance_scale=3\nresolution=768\nbatch_size=1\n'
            '[[prompts]]\ntarget="dog"\naction="enhance"\n'
            '[[prompts]]\ntarget="ship"\nguidance_scale=-2\n'
            '[[prompts]]\ntarget="bird"\nmultiplier=-1',
            "guidance_scale, resolution, prompt 2 (it enhances, and expunge erases), prompt 3 (it"
            " enhances, and expunge erases), prompt 4 (it is for the LoRA turned round, at"
            " multiplier -1)",
            (Concept("cat", ""),),
        ),
        (
            "p.yaml",
            "- {target: cat, unconditional: low quality}",
            "unconditional",
            (Concept("cat", "low quality"),),
        ),
        (
            "s.yaml",
            "slider: {target_class: person, positive_prompt: old person, negative_prompt: young"
            " person, guidance_strength: 3.0, anchor_strength: 2, batch_full_slide: true}",
            "batch_full_slide, guidance_strength, anchor_strength, 'old person', which a slider"
            " enhances",
            (Concept("young person", "person"),),
        ),
        (
            "s.yaml",
            "target_class: person\npositive_prompt: old person",
            "the end that enhances 'old person'",
            (Concept("old person", "person"),),
        ),
    ],
)
def test_one_warning_says_what_was_left_out(file, name, text, left, found):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert concept_files.read_concepts(file(name, text))[0] == found
    (one,) = caught
    assert one.category is ExpungeWarning
    assert f"this of it was left out: {left}; how to erase" in str(one.message)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.toml", '[[prompts]]\npositive="a"', r"p.toml, prompt 1: a target is missing"),
        ("p.toml", '[[prompts]]\ntarget="a"\npostive="b"', "'postive'; did you mean 'positive'"),
        ("p.toml", '[[prompts]]\ntarget=3', "prompt 1: target must be text, not 3"),
        ("p.toml", '[[prompts]]\ntarget="a"\naction="erasse"', "'erasse'; did you mean 'erase'"),
        ("p.toml", '[[prompts]]\ntarget="a"\nguidance_scale="x"', "guidance_scale must be a number"),
        ("p.toml", '[[prompts]]\ntarget="a"\nneutral="A"', "prompt 1: the anchor of 'a' is the concept"),
        ("p.toml", '[[prompts]]\ntarget=" "', "prompt 1: a concept needs a name"),
        ("p.toml", 'prompts="a"', "prompts: a list of tables is expected, not 'a'"),
        ("p.toml", 'prompts=[]', "names no concept to erase"),
        ("p.toml", 'lr=1\n[[prompts]]\ntarget="a"', "the top: there is no field 'lr'"),
        (
            "p.toml",
            '[[prompts]]\ntarget="a"\nneutral="b"\n[[prompts]]\ntarget="A"\nneutral="c"',
            "prompt 2: 'A' was there on prompt 1",
        ),
        ("p.toml", '[[prompts]]\ntarget="a"\naction="enhance"', "no concept to erase: prompt 1 .it enh"),
        ("p.yaml", "- target: [a", "line 2: not YAML: expected|line 1: not YAML"),
        ("p.yaml", "just text", "neither LECO's prompts"),
        ("p.yaml", "", "neither LECO's prompts"),
        ("p.yaml", "- cat\n- dog", "prompts: a list of tables is expected"),
        ("p.yaml", "prompts_file: my prompts.yaml\ntrain: {}", "prompts_file, my prompts.yaml: g"),
        ("p.yaml", "- !!python/object/apply:os.getcwd []", "not YAML: could not determine"),
        ("s.yaml", "config: {process: [{type: sd_trainer}]}", "config: no process in it has a slider"),
        ("s.yaml", "config: 3", "config: no process"),
        ("s.yaml", "slider: 3", "slider: a table is expected, not 3"),
        ("s.yaml", "slider: {target_class: cat}", "slider: a slider needs a negative_prompt"),
        ("s.yaml", "slider: {traget_class: cat, negative_prompt: a}", "did you mean 'target_class'"),
        ("s.yaml", "slider: {targets: [{target_class: a, negative: b, postive: c}]}", "target 1: there"),
        ("s.yaml", "slider: {targets: {target_class: a}}", "targets: a list of tables"),
        ("s.yaml", "slider: {target_class: [a], negative: b}", "target_class must be text, not"),
    ],
)  # fmt: skip
def test_refused(file, name, text, message):
    with pytest.raises(ExpungeError, match=message) as error:
        concept_files.read_concepts(file(name, text))
    assert "\n" not in str(error.value)


def test_expunge_erase_reads_them(file, folder, tmp_path, capsys):
    path = file("p.toml", '[[prompts]]\ntarget="airplane"\nneutral="sky"\nguidance_scale=2.5\n')
    edit = tmp_path / "edit.safetensors"
    arguments = ["--concepts", str(path), "--retain", "ship", "--model", str(folder), "-o", str(edit)]
    assert main(["erase", "uce", *arguments, "--num-retain-words", "5"]) == 0
    assert capsys.readouterr().err.count("this of it was left out: guidance_scale") == 1
    problem = expunge.Edit.load(edit).record.problem
    assert problem == expunge.Problem((Concept("airplane", "sky"),), ("ship",))
