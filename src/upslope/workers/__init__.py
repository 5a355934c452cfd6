"""Processes that can be killed, with numbered jobs and deadlines: what runs code that may hang, die or lie."""
