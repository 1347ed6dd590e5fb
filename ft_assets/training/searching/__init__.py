"""Hyper-parameter search: trials in one process, their budget, plots and the learning curve."""
