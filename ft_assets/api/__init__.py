"""The HTTP API of experiments, runs and adapters: a thin layer over the Python asset API."""
