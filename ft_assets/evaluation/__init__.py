"""Stage 3: candidate, champion and baselines on the frozen test split, and the gates over that report."""
