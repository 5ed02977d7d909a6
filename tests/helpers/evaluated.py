"""What `astra eval --json` writes, without a model."""

import json

from astra_jax.codecs.config import NestedPQConfig, VQConfig


def evaluated(path, rows, **more):
    path.write_text(json.dumps({"verb": "eval", "rows": rows, **more}))
    return path


def coded(N, G, value, **astra):
    """A row of ASTRA, with the configuration of its codes."""
    codes = astra if "codec" in astra else VQConfig(**{"groups": G, **astra}).as_dict()
    return {"N": N, "G": G, "astra": codes, "accuracy %": value}


def nested(N, G, value, **astra):
    """A row of the first G groups of nested codes, with a predictor."""
    full = NestedPQConfig(groups=4, widths=(4, 4, 2, 2), levels=(1, 1, 2), predictor="mlp")
    return coded(N, G, value, **{**full.with_groups(G).as_dict(), **astra})


ORIGINAL = {"N": 1, "G": None, "astra": None, "accuracy %": 92.5}
