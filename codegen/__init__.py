"""Level 2: kernel IR, schedules, printers, host program and runtime."""
