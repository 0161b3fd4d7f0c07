"""One file for each command of the command line: its flags, and the function that runs it."""
