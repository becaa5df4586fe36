"""What can go wrong, by exit code. Every message is one line that says which thing, why, and what to do."""


class ElijahError(Exception):
    """Broken, hostile or wrongly used input: exit code 2."""

    exit_code = 2


class Unsupported(ElijahError):
    """A sound model of a kind that cannot be scanned: exit code 3."""

    exit_code = 3


class OutOfBudget(ElijahError):
    """The limit on network evaluations or on minutes was reached: the verdict is undecided, exit code 3."""

    exit_code = 3
