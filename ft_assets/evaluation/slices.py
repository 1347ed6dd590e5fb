"""Groups of test rows that are looked at one by one, so that a good average cannot hide a bad corner."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from ft_resources.errors import EvaluationError


def slice_values(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """For every kind of slice, the value each row has; each kind divides all rows.

    Kinds: `length` (terciles of the number of characters), `label` (the true one), `origin` and `month` of the
    event time (UTC; "unknown" without one).

    Args:
        rows: Columns text, label, origin, event_time.

    Raises:
        EvaluationError: A column is missing.
    """
    missing = {"text", "label", "origin", "event_time"} - set(rows.columns)
    if missing:
        raise EvaluationError(
            f"the rows lack the columns {sorted(missing)}", mend="Keep the columns of the test split."
        )
    when = pd.to_datetime(rows["event_time"], utc=True)
    return {
        "length": length_buckets(rows["text"]),
        "label": rows["label"].astype(str),
        "origin": rows["origin"].fillna("unknown").astype(str),
        "month": when.dt.strftime("%Y-%m").where(when.notna(), "unknown").astype(str),
    }


def length_buckets(texts: pd.Series) -> pd.Series:
    """A third of the rows each, by number of characters: an ordered categorical with the bounds in its names.

    Rows of one length stay together, so few distinct lengths give fewer buckets.
    """
    lengths = texts.str.len().to_numpy(dtype=np.int64)
    if not lengths.size:
        return pd.Series(pd.Categorical([], ordered=True), index=texts.index)
    first, second = (int(q) for q in np.quantile(lengths, [1 / 3, 2 / 3], method="lower"))
    top = int(lengths.max())
    bounds = sorted({bound for bound in (first, second) if bound < top})
    names = []
    for at in range(len(bounds) + 1):
        if not bounds:
            names.append("all lengths")
        elif at == 0:
            names.append(f"up to {bounds[0]} characters")
        elif at == len(bounds):
            names.append(f"over {bounds[-1]} characters")
        else:
            names.append(f"{bounds[at - 1] + 1} to {bounds[at]} characters")
    at = np.searchsorted(np.array(bounds, dtype=np.int64), lengths, side="left")
    return pd.Series(pd.Categorical.from_codes(at, names, ordered=True), index=texts.index)


def slice_masks(rows: pd.DataFrame) -> Iterator[tuple[str, str, np.ndarray]]:
    """(kind, value, bool mask [rows]) of every slice; a kind with a single value says nothing and is left out."""
    for name, values in slice_values(rows).items():
        codes, uniques = pd.factorize(values, sort=True)
        if len(uniques) > 1:
            for code, value in enumerate(uniques):
                yield name, str(value), codes == code
