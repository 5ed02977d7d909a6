"""The tensors of a RoBERTa and an XLM-RoBERTa: those of a BERT, but for the classifier."""

from checkpoints.families.bert import BERT, sizes
from checkpoints.families.rows import Architecture, Family, linear, masked_lm

CLASSIFIER = (
    *linear("classifier.dense", "head.dense", "pooled", "D"),
    *linear("classifier.out_proj", "head.out", "C", "pooled"),
)
MASKED_LM = masked_lm("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")


def _family(name: str) -> Family:
    """The classes of transformers are `NameModel`, `NameForMaskedLM` and `NameForSequenceClassification`, our
    configuration is `NameConfig`."""
    return Family(
        *("astra_jax.models.roberta", "Roberta", f"{name}Config", "roberta.", BERT),
        {
            f"{name}Model": Architecture("embedding"),
            f"{name}ForMaskedLM": MASKED_LM,
            f"{name}ForSequenceClassification": Architecture("classification", CLASSIFIER),
        },
        sizes,
        skipped=(r"embeddings\.position_ids",),
    )


FAMILIES = {"roberta": _family("Roberta"), "xlm-roberta": _family("XLMRoberta")}
