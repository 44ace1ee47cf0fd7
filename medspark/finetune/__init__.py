"""Fine-tuning of an encoder on labelled samples, with honest metrics, and prediction with it."""

from medspark.finetune.classifier import Classifier, load_classifier
from medspark.finetune.metrics import classification_metrics
from medspark.finetune.module import ClassifierModule
from medspark.finetune.result import FinetuneResult
from medspark.finetune.run import finetune
from medspark.finetune.settings import Settings

__all__ = [
    "Classifier",
    "ClassifierModule",
    "FinetuneResult",
    "Settings",
    "classification_metrics",
    "finetune",
    "load_classifier",
]
