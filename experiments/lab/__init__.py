"""What all experiments share: run folders, statistics, tables, timing, prompts."""
