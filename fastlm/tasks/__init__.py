"""What a language model is used for: fine-tuning to tasks, one module a task, and using the result."""

from fastlm.tasks.registry import TASKS, finetune, make_task

__all__ = ["TASKS", "finetune", "make_task"]
