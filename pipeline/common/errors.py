"""The errors a user can cause and mend; `cli` prints them in a line or two, without a traceback."""


class PipelineError(Exception):
    """Bad input or a failed stage: the message says what, where and what to do next. Exit status 1."""


class ConfigError(PipelineError):
    """A config that cannot be used: the message names the file and the key. Exit status 2."""
