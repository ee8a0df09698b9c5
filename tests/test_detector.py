"""The detector: its two questions, and folders that are not whole."""

import dataclasses
import json
import threading

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file

from expunge import ExpungeError
from expunge.base.modules import MAKING
from expunge.emoji.detector import Detector, DetectorConfig, Network, Recognition

SETTINGS = DetectorConfig(
    ("cat", "dog"), ("flat", "shaded"), (4, 8), thresholds=(0.3, 0.7), nothing=0.2, unrecognisable=0.5
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    weights = Network(2, 2, SETTINGS.widths).state_dict()
    half = {name: t.half() if t.is_floating_point() else t for name, t in weights.items()}
    save_file(half, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(SETTINGS)))
    return tmp_path


def test_an_image_has_one_best_answer():
    labels = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.1, 0.1], [0.9, 0.1]])
    styles = torch.tensor([[0.9, 0.1]]).expand(4, 2)
    seen = Recognition(labels, styles, torch.tensor([0.1, 0.1, 0.1, 0.9]), SETTINGS)
    assert seen.top() == ["cat", "dog", "nothing", "unrecognisable"]
    assert seen.top_style() == ["flat"] * 4


def test_a_label_is_there_from_its_own_threshold():
    labels = torch.tensor([[0.4, 0.6], [0.2, 0.8]])
    seen = Recognition(labels, labels, torch.zeros(2), SETTINGS)
    assert seen.has("cat").tolist() == [True, False]
    assert seen.has("dog").tolist() == [False, True]
    with pytest.raises(ExpungeError, match="no label 'catt'; did you mean 'cat'"):
        seen.has("catt")


def test_a_saved_detector_reads_images_alone_as_in_a_batch(folder):
    detector = Detector.load(folder)
    images = torch.rand(5, 3, 64, 64)
    together, alone = detector(images), detector(images, batch_size=1)
    assert together.labels.shape == together.styles.shape == (5, 2)
    torch.testing.assert_close(together.labels, alone.labels)
    assert torch.all((together.unrecognisable >= 0) & (together.unrecognisable <= 1))


def test_a_detector_is_whole_though_another_thread_reads_a_pipeline(folder):
    """Accelerate then makes the modules of all threads without storage."""
    images, wanted, found = torch.rand(2, 3, 64, 64), Detector.load(folder), []
    thread = threading.Thread(target=lambda: found.append(Detector.load(folder)))
    with MAKING, init_empty_weights():
        thread.start()
        thread.join(0.3)
    thread.join()
    assert torch.equal(found[0](images).labels, wanted(images).labels)


def test_images_of_another_size_are_refused(folder):
    with pytest.raises(ExpungeError, match=r"64, 64\), not \(1, 3, 32, 32\)"):
        Detector.load(folder)(torch.rand(1, 3, 32, 32))


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (cut, "not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "No such file"),
        (lambda folder: (folder / "config.json").unlink(), "No such file"),
        (lambda folder: (folder / "config.json").write_text("{}"), "not a detector's folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a detector's folder"),
    ],
)
def test_a_folder_that_is_not_whole_is_one_clear_sentence(folder, harm, says):
    harm(folder)
    with pytest.raises(ExpungeError, match=says) as caught:
        Detector.load(folder)
    assert "\n" not in str(caught.value)
