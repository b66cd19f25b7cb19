"""The verbs of the `stackrlhf` command, a file a verb or a natural group; flows/cli.py has the options of each.

A verb takes the parsed arguments and returns the exit code. Standard output is for what was asked for, standard error for the rest.
"""

DONE, FAILED, WRONG, FORBIDDEN, INTERRUPTED = 0, 1, 2, 3, 75
