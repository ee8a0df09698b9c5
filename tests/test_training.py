"""The loop that every training stage shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.emoji.loop import train
from training.emoji.muon import Muon, orthogonalise


def regression(stop_at: int | None = None):
    torch.manual_seed(0)
    module, x = nn.Linear(4, 3), torch.randn(64, 4)
    y = x @ torch.randn(4, 3)

    def loss_of(step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        if step == stop_at:
            raise KeyboardInterrupt
        loss = (module(x) - y).square().mean()
        return loss, {"loss": loss.item()}

    return module, loss_of, lambda: (module(x) - y).square().mean().item()


def test_a_stage_learns_and_continues_from_its_checkpoint(tmp_path):
    module, loss_of, error = regression()
    before = error()
    train("fit", module, loss_of, tmp_path, Muon(module, 0.05), minutes=0.01)
    assert error() < before
    steps = torch.load(tmp_path / "fit.pt", weights_only=True)["step"]
    again, loss_of, error = regression()
    train("fit", again, loss_of, tmp_path, Muon(again, 0.05), minutes=0.01)  # no time is left
    assert torch.load(tmp_path / "fit.pt", weights_only=True)["step"] == steps
    assert torch.equal(again.weight, module.weight)


def test_an_interrupt_keeps_the_checkpoint(tmp_path, capsys):
    module, loss_of, _ = regression()
    train("fit", module, loss_of, tmp_path, Muon(module, 0.05), minutes=0.005)
    kept = (tmp_path / "fit.pt").read_bytes()
    step = torch.load(tmp_path / "fit.pt", weights_only=True)["step"]
    module, loss_of, _ = regression(stop_at=step + 3)
    with pytest.raises(SystemExit) as stopped:
        train("fit", module, loss_of, tmp_path, Muon(module, 0.05), minutes=1)
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().out
    assert (tmp_path / "fit.pt").read_bytes() == kept
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp"] == []


@pytest.mark.parametrize("shape", [(8, 64), (64, 8), (12, 12)])
def test_orthogonalise_is_the_polar_factor(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    error = (orthogonalise(matrix) - u @ v).norm() / (u @ v).norm()
    # The square case is a short iteration.
    assert error < (1e-3 if max(shape) >= 4 * min(shape) else 0.35)
