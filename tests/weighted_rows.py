"""Routed products of one expert a token, weighed by the router: what they must be, row by row."""

import numpy as np
import oracle
from problems import Case


def topk_ids(rows: tuple[int, ...]) -> np.ndarray:
    """So many rows of each expert, in random order, so that an expert's rows are no neighbours."""
    ids = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
    return np.random.default_rng(len(rows)).permutation(ids)[:, None]


def assert_weighted_rows(got: np.ndarray, case: Case, ids: np.ndarray, dtype: str) -> None:
    """Of a case with bias."""
    assert case.bias is not None
    for expert, weight in enumerate(case.weights):
        own = np.flatnonzero(ids[:, 0] == expert)
        if own.size:
            w, bias = case.topk_weights[own].astype(float), case.bias[expert].astype(float)
            own_x = case.x[own].astype(float)
            # What the rounding of the product may err, times the router's weight.
            budget = oracle.matmul_budget(own_x, weight, dtype, bias) * w
            exact = oracle.matmul(own_x, weight, bias) * w
            oracle.assert_within(got[own], exact, budget, f"expert {expert}")
