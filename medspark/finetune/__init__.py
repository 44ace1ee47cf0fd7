"""Fine-tuning of an encoder on labelled patches: linear probe and full, with honest metrics."""

from medspark.finetune.metrics import classification_metrics
from medspark.finetune.module import ClassifierModule
from medspark.finetune.run import FinetuneResult, finetune

__all__ = [
    "ClassifierModule",
    "FinetuneResult",
    "classification_metrics",
    "finetune",
]
