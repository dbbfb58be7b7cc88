"""User-facing errors, printed without a traceback."""


class PipelineError(Exception):
    """Invalid input or a failed stage. Exit status 1.

    The message states what failed, where, and what to do next.
    """


class ConfigError(PipelineError):
    """An invalid config or option. Exit status 2.

    The message names the key and the file or override that sets it.
    """
