"""Exit codes of every command.

Stability: stable.
"""

OK = 0
INTERNAL = 1  # a defect of jaxinfer, or a machine that ran out of something
USAGE = 2  # wrong options, an unreadable or contradictory input, a model that is not there
ROWS_FAILED = 3  # the job is complete and some of its rows are error rows
INTERRUPTED = 130  # Ctrl-C
RETRY = 75  # stopped by SIGTERM, or because another of its processes is gone: the same command goes on (EX_TEMPFAIL)

HELP = (
    "Exit codes: 0 done; 1 internal error; 2 wrong usage or input; 3 done, with error rows; "
    "75 stopped by SIGTERM or with a process lost, run the same command again; 130 Ctrl-C."
)
