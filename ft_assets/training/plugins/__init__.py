"""Trainers of other frameworks: a class with the interface of `interface.Trainer`, named by a recipe."""
