"""Suites of long prompts, whose answers can be scored: RULER's tasks, LongBench, and completion of code."""
