"""Stage 1: from a source's rows to clean, split, immutable snapshots."""
