"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A setting, file or request that cannot be served.

    The message is one line: what was wrong, what was found, what is allowed.
    `bd3_jax.main` prints it without a traceback and exits with status 2.
    """
