"""One plain loop: bit-exact resume, any number of ranks, geometry beside accuracy."""

from ncmethods.training.checkpoint import load_checkpoint, save_checkpoint
from ncmethods.training.config import ModelConfig, TrainConfig, build_model, lr_factor
from ncmethods.training.distributed import Process, gather, process
from ncmethods.training.evaluate import Evaluation, evaluate
from ncmethods.training.loop import NonFiniteLoss, fit
from ncmethods.training.runs import Preprocessing, Run, load_run
from ncmethods.training.sweep import Job, Method, jobs_of, sweep, tune

__all__ = [
    "Evaluation",
    "Job",
    "Method",
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
    "jobs_of",
    "load_checkpoint",
    "load_run",
    "lr_factor",
    "process",
    "save_checkpoint",
    "sweep",
    "tune",
]
