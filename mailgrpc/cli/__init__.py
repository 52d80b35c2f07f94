"""The command: one module a command, each a click command of the module's name.

`main` is the root: it finds commands without loading them, and turns errors into one line and an
exit code. What several commands share stands in `session` (settings, the client), `output`
(terminal, pipe, JSON), `values` (times, durations) and `filters`.
"""
