"""One plain loop: bit-exact resume, any number of ranks, geometry beside accuracy."""

from ncmethods.training.checkpoint import load_checkpoint, save_checkpoint
from ncmethods.training.config import ModelConfig, TrainConfig, build_model, lr_factor
from ncmethods.training.distributed import Process, gather, process
from ncmethods.training.evaluate import Evaluation, evaluate
from ncmethods.training.loop import NonFiniteLoss, fit
from ncmethods.training.runs import Preprocessing, Run, load_run

__all__ = [
    "Evaluation",
    "ModelConfig",
    "NonFiniteLoss",
    "Preprocessing",
    "Process",
    "Run",
    "TrainConfig",
    "build_model",
    "evaluate",
    "fit",
    "gather",
    "load_checkpoint",
    "load_run",
    "lr_factor",
    "process",
    "save_checkpoint",
]
