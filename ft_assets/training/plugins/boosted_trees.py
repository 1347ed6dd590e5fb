"""Gradient boosted trees (XGBoost; Chen and Guestrin, 2016) on TF-IDF of words and word pairs.

Trees and terms are kept as XGBoost's binary JSON, JSON and safetensors.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from ft_assets.specs import Strict
from ft_assets.training.plugins.interface import Predict, Progress, Rows

TREES, TERMS, WEIGHTS = "trees.ubj", "terms.json", "idf.safetensors"


class TreeSettings(Strict):
    """How texts become numbers, and numbers trees."""

    ngrams: int = Field(2, ge=1, le=5, description="Terms are sequences of up to this many words.")
    max_terms: int = Field(20_000, ge=1, description="The most frequent terms of the training rows are kept.")
    min_rows: int = Field(2, ge=1, description="Terms in fewer training rows are left out.")
    rounds: int = Field(300, ge=1, le=100_000, description="Trees of each label, at most.")
    early_stopping: int | None = Field(
        20, ge=1, description="Stop after this many rounds without a lower validation loss; the best is kept."
    )
    learning_rate: float = Field(0.2, gt=0, le=1, description="Share of each tree that is added (eta).")
    max_depth: int = Field(6, ge=1, le=64, description="Depth of a tree.")
    min_child_weight: float = Field(1.0, ge=0, description="Least sum of second derivatives in a leaf.")
    l2: float = Field(1.0, ge=0, description="L2 penalty on the leaves (lambda).")
    row_share: float = Field(1.0, gt=0, le=1, description="Rows that a tree is grown on, drawn (subsample).")
    term_share: float = Field(0.5, gt=0, le=1, description="Terms that a tree may ask for, drawn (colsample_bytree).")
    threads: int = Field(1, ge=1, le=1024, description="Threads; more are worth it from some ten thousand rows on.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of what is drawn.")


class BoostedTrees:
    """A plug-in trainer; see `interface.Trainer`."""

    version = "1"
    packages = ("xgboost-cpu", "scikit-learn", "scipy")
    settings = TreeSettings

    def train(self, rows: Rows, settings: TreeSettings, folder: Path, progress: Progress) -> None:
        import xgboost
        from safetensors.numpy import save_file

        words = _vectoriser(settings.ngrams, min_df=settings.min_rows, max_features=settings.max_terms)
        told = {
            "objective": "multi:softprob",
            "num_class": len(rows.labels),
            "eval_metric": "mlogloss",
            "tree_method": "hist",
            "eta": settings.learning_rate,
            "max_depth": settings.max_depth,
            "min_child_weight": settings.min_child_weight,
            "lambda": settings.l2,
            "subsample": settings.row_share,
            "colsample_bytree": settings.term_share,
            "nthread": settings.threads,
            "seed": settings.seed,
        }
        training = xgboost.DMatrix(words.fit_transform(rows.training.texts), label=rows.training.targets)
        watched = [(training, "training")]
        if len(rows.validation.texts):
            validation = xgboost.DMatrix(words.transform(rows.validation.texts), label=rows.validation.targets)
            watched.append((validation, "validation"))

        class Told(xgboost.callback.TrainingCallback):
            """Hands the loss of each round on."""

            def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
                progress(epoch + 1, settings.rounds, float(evals_log["training"]["mlogloss"][-1]))
                return False

        callbacks: list[Any] = [Told()]
        if settings.early_stopping and len(watched) > 1:
            callbacks.append(
                xgboost.callback.EarlyStopping(rounds=settings.early_stopping, data_name="validation", save_best=True)
            )
        trees = xgboost.train(
            told, training, num_boost_round=settings.rounds, evals=watched, callbacks=callbacks, verbose_eval=False
        )
        trees.save_model(folder / TREES)
        terms = {"ngrams": settings.ngrams, "terms": words.get_feature_names_out().tolist()}
        (folder / TERMS).write_text(json.dumps(terms, ensure_ascii=False), encoding="utf-8")
        save_file({"idf": np.asarray(words.idf_, dtype=np.float64)}, folder / WEIGHTS)

    def load(self, folder: Path) -> Predict:
        import xgboost
        from safetensors.numpy import load_file

        terms = json.loads((folder / TERMS).read_text(encoding="utf-8"))
        words = _vectoriser(terms["ngrams"], vocabulary=terms["terms"])
        words.idf_ = load_file(folder / WEIGHTS)["idf"]
        trees = xgboost.Booster(model_file=str(folder / TREES))
        return lambda texts: trees.predict(xgboost.DMatrix(words.transform(texts)))


def _vectoriser(ngrams: int, **options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, ngrams), sublinear_tf=True, dtype=np.float32, **options)
