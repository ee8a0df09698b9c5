"""Otsu's threshold: split values into dark and bright where the two differ most."""

from __future__ import annotations

from torch import Tensor, arange


def otsu(values: Tensor) -> Tensor:
    """Find the threshold of each row that maximises the variance between its two sides: (n, 1).

        t = argmax_t  w(t) (1 − w(t)) (μ_above(t) − μ_below(t))²

    w(t) is the share of values up to t. A value above the threshold belongs to the bright side.
    The threshold of a constant row is its value: nothing is above it.

    Args:
        values: (n, k), in any range.

    Source: Otsu, A Threshold Selection Method from Gray-Level Histograms, 1979, eq. 14.
    """
    # Every cut lies between two neighbours of the sorted values, so all are tried at once.
    ordered = values.double().sort(1).values
    k = ordered.shape[1]
    count = arange(1, k, device=values.device)
    below = ordered.cumsum(1)[:, :-1]
    above = ordered.sum(1, keepdim=True) - below
    between = count * (k - count) * (above / (k - count) - below / count).square()
    best = between.argmax(1, keepdim=True)
    # Equal values stay on one side: a cut between two of them is never the best one.
    return ordered.gather(1, best).to(values.dtype)
