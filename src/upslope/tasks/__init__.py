"""Prompts, rewards and verdicts: the same object for supervised learning, reinforcement learning and evaluation."""

from upslope.tasks.base import Task, chat_prompt, load_task, select_prompts

__all__ = ["Task", "chat_prompt", "load_task", "select_prompts"]
