"""Fine-tuning as a graph of assets: data, training, evaluation, release, monitoring."""
