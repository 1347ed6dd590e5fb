"""Evaluation of tasks that write text: text-generation and extraction."""
