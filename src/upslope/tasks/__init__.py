"""Prompts, rewards and verdicts: the same object for supervised learning, reinforcement learning and evaluation."""

from upslope.tasks.base import Task, chat_prompt, select_prompts
from upslope.tasks.loading import load_task

__all__ = ["Task", "chat_prompt", "load_task", "select_prompts"]
