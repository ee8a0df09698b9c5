"""The metrics that need extras, against other readings of the same numbers.

They need `expunge[metrics]` and torchvision's torch. Their networks have random weights: the real ones
come from the net, and what is measured of them is how they are read.
"""

import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from expunge.base.errors import ExpungeError
from expunge.evaluation.measure import make_metric

pytest.importorskip("torchvision", reason="needs expunge[metrics]")
torch_fidelity = pytest.importorskip("torch_fidelity", reason="needs expunge[metrics]")
torchmetrics = pytest.importorskip("torchmetrics", reason="needs expunge[metrics]")
nudenet = pytest.importorskip("nudenet", reason="needs expunge[metrics]")


@pytest.fixture(scope="module")
def images():
    """Two sets of eight, (8, 3, 64, 64), in steps of 1/255."""
    torch.manual_seed(0)
    return [(torch.rand(8, 3, 64, 64) * scale * 255).round() / 255 for scale in (1.0, 0.6)]


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Random weights for Inception."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    network = module.FeatureExtractorInceptionV3
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network, "load_state_dict", lambda *_: None)
        torch.save(network("inception-v3-compat", ["2048"]).state_dict(), path)
    return path


def test_fid(images, inception, tmp_path):
    for name, some in zip("ab", images, strict=True):
        (tmp_path / name).mkdir()
        for k, image in enumerate(some):
            pixels = (image * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, cuda=False, verbose=False,
        feature_extractor_weights_path=str(inception), cache=False,
    )["frechet_inception_distance"]  # fmt: skip
    metric = make_metric("fid", {"weights": str(inception)})
    ours = metric.distance(*(metric.measure(some, [""] * 8) for some in images)).value
    assert ours > 0
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_weights_that_are_code_are_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return ran.touch, ()

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ExpungeError, match="cannot read Inception's weights"):
        make_metric("fid", {"weights": str(tmp_path / "weights.pth")}).provenance  # noqa: B018
    assert not ran.exists()


def test_lpips(images, tmp_path, monkeypatch):
    """Σ over layers of the mean over places of Σ_c w_c (f_c − g_c)², with f and g of length 1."""
    from torchvision.models import AlexNet_Weights, alexnet

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = alexnet()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    name = AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(network.state_dict(), tmp_path / "hub" / "checkpoints" / name)
    ours = make_metric("lpips", {}).measure(images[0], [""] * 8, images[1])[:, 0]

    folder = Path(torchmetrics.functional.image.__file__).parent / "lpips_models"
    heads = torch.load(folder / "alex.pth", weights_only=True, map_location="cpu")
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    wanted = torch.zeros(8)
    sides = [(2 * some - 1 - shift) / scale for some in images]
    layer = 0
    with torch.no_grad():
        for module in network.eval().features:
            sides = [module(side) for side in sides]
            if isinstance(module, torch.nn.ReLU):
                unit = [side / side.norm(dim=1, keepdim=True).clamp_min(1e-10) for side in sides]
                weighed = (unit[0] - unit[1]) ** 2 * heads[f"lin{layer}.model.1.weight"]
                wanted += weighed.sum(1).mean((1, 2))
                layer += 1
    assert layer == 5
    assert (ours > 0).all()
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_nudenet(images, tmp_path):
    """The same detections as the package's own, on the same images read from files."""
    metric = make_metric("nudenet", {"threshold": 0.2})
    rows = metric.measure(images[0], [""] * 8)
    detector = nudenet.NudeDetector()
    for k, image in enumerate(images[0]):
        path = tmp_path / f"{k}.png"
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(path)
        found = [one["class"] for one in detector.detect(str(path)) if one["score"] >= 0.2]
        assert rows[k, 0] == sum("EXPOSED" in name for name in found)
    assert metric.provenance["nudenet"]
    assert metric.knows("exposed")
    assert not metric.knows("airplane")
