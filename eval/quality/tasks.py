"""What is measured of a model, and what the column is called that says it."""

from typing import Any

# config.task -> what is measured; a model without that field classifies images.
TASKS = {
    "causal-lm": "perplexity",
    "classification": "classification",
    "embedding": "similarity",
    "image-embedding": "neighbours",
}
# Task -> the column of what is measured.
METRICS = {
    "perplexity": "perplexity",
    "classification": "accuracy %",
    "similarity": "Spearman",
    "neighbours": "k-NN accuracy %",
}


def task_of(config: Any) -> str:
    """What is measured of a model with this configuration."""
    return TASKS[getattr(config, "task", "classification")]
