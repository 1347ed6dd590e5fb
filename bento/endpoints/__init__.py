"""Handlers of requests, by what they are about; the work is done by the scorer, the batcher and the engines."""
