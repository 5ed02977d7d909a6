"""The tensors of a DeiT: those of a ViT, with a distillation token."""

from checkpoints.families.rows import Architecture, Family, Key, linear
from checkpoints.families.vit import HARMLESS, VIT, sizes

DEIT = (*VIT, Key("embeddings.distillation_token", "1 1 D", "distillation"))

FAMILIES = {
    "deit": Family(
        *("astra_jax.models.deit", "DeiT", "DeiTConfig", "deit.", DEIT),
        {
            "DeiTForImageClassification": Architecture(
                None, linear("classifier", "head", "C", "D"), settings={"with_teacher": False}
            ),
            "DeiTForImageClassificationWithTeacher": Architecture(
                None,
                (
                    *linear("cls_classifier", "head", "C", "D"),
                    *linear("distillation_classifier", "teacher_head", "C", "D"),
                ),
                settings={"with_teacher": True},
            ),
        },
        sizes,
        harmless=HARMLESS,
    )
}
