"""Training: settings, runs, checkpoints that survive a crash, exact resuming."""

from fastlm.training.config import RunConfig, load_config
from fastlm.training.graph import RecordedPass
from fastlm.training.run import choose_checkpoint, resume_run, start_run
from fastlm.training.trainer import Trainer, TrainResult

__all__ = [
    "RecordedPass",
    "RunConfig",
    "TrainResult",
    "Trainer",
    "choose_checkpoint",
    "load_config",
    "resume_run",
    "start_run",
]
