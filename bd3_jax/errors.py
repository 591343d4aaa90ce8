"""The one exception that stands for a user's mistake, and a mistake that any text can hold."""


class UserError(Exception):
    """A setting, file or request that cannot be served.

    The message is one line: what was wrong, what was found, what is allowed.
    `bd3_jax.command_line.exit_status` prints it without a traceback and exits with status 2.
    """


def require_text(value: object, name: str) -> None:
    """Raises UserError, naming it, where `value` is no text that UTF-8 can encode.

    Bytes of a command line that are not UTF-8 become halves of surrogate pairs.
    """
    try:
        str.encode(value)  # type: ignore[arg-type]
    except (UnicodeEncodeError, TypeError):
        raise UserError(f"{name} is {value!r:.80}; allowed: text in UTF-8") from None
