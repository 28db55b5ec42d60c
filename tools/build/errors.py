"""The one error of the build."""


class BuildError(RuntimeError):
    """A build that cannot go on; the message says what to do."""
