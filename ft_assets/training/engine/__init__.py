"""The trainer itself: from tokenised rows to the weights of an adapter. Imports torch; nothing here knows Dagster."""
