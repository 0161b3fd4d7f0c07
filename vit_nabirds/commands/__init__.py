"""One file for each command: its FLAGS, those REQUIRED, whether it is PARALLEL (may be one of several processes) or
CONFIGURED (its default configuration file, if it takes one), and the function `run` that returns its exit code."""
