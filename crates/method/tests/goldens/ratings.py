"""Writes ratings.json: what people said of labels, and what statsmodels makes of it.

    pip install numpy statsmodels
    python ratings.py
"""

import json
from pathlib import Path

import numpy as np
import statsmodels
import statsmodels.api as sm
from statsmodels.stats.proportion import proportion_confint


def clustered(values, units):
    """A regression on a constant, with errors that belong together within a unit."""
    fit = sm.OLS(values, np.ones(len(values)))
    return fit.fit(cov_type="cluster", cov_kwds={"groups": units}, use_t=True)


def method(ratings, chosen, units):
    several = len(set(units)) > 1
    interval = None
    if several:
        low, high = clustered(ratings, units).conf_int(0.05)[0]
        interval = [max(low, 1.0), min(high, 5.0)]
    share = chosen.mean()
    # As many responses as would tell as much if no two were of one unit.
    size = len(set(units))
    if several and 0 < share < 1:
        # A variance that is nought but for rounding would be a size without bounds.
        size = min(len(units), share * (1 - share) / max(clustered(chosen, units).bse[0] ** 2, 1e-12))
    low, high = proportion_confint(share * size, size, 0.05, "wilson")
    return {"mean": ratings.mean(), "mean_interval": interval, "best": int(chosen.sum()), "share": share, "share_interval": [low, high]}


def case(rng, units, raters, methods):
    good = rng.normal(3.5, 0.8, size=(units, methods)) + np.linspace(-0.8, 0.8, methods)
    responses = []
    for unit in range(units):
        for _ in range(rng.integers(1, raters + 1)):
            ratings = np.clip(np.rint(good[unit] + rng.normal(0, 0.7, methods)), 1, 5).astype(int)
            # Most choose one of the highest, some don't look.
            highest = np.flatnonzero(ratings == ratings.max())
            best = rng.choice(highest) if rng.random() < 0.75 else rng.integers(methods)
            responses.append((unit, ratings.tolist(), int(best)))
    valid = [r for r in responses if r[1][r[2]] == max(r[1])]
    if not valid:
        return None
    of = np.array([r[0] for r in valid])
    rated, chosen = np.array([r[1] for r in valid], float), np.array([r[2] for r in valid])
    return {"responses": responses, "valid": len(valid), "methods": [method(rated[:, m], (chosen == m).astype(float), of) for m in range(methods)]}


if __name__ == "__main__":
    print("statsmodels", statsmodels.__version__, "NumPy", np.__version__)
    rng = np.random.default_rng(5)
    sizes = [(1, 3, 2), (2, 1, 2), (2, 3, 4), (5, 1, 3), (12, 3, 4), (40, 3, 2)]
    cases = [c for i in range(72) if (c := case(rng, *sizes[i % len(sizes)]))]
    lines = ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases)
    (Path(__file__).parent / "ratings.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(len(cases), "cases,", len(lines), "bytes")
