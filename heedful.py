"""heedful: fine-tune any pretrained transformer and prove that the result is right.

This module is the ground floor: the version, and the errors that every room may raise. It imports nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"


class UserError(Exception):
    """A fault that the user can mend; the command line prints it as one message and exits with code 2.

    Every message answers four questions, so that nobody has to read a traceback to go on.

    Args:
        found: What is wrong, with the offending value.
        where: File, line, column or configuration key.
        expected: What would have been right.
        fix: What to do about it.
    """

    exit_code = 2

    def __init__(self, found: str, *, where: str = "", expected: str = "", fix: str = "") -> None:
        super().__init__(found)
        self.found, self.where, self.expected, self.fix = found, where, expected, fix

    def __str__(self) -> str:
        parts = {"where": self.where, "found": self.found, "expected": self.expected, "do": self.fix}
        return "\n".join(f"  {name:<9}{text}" for name, text in parts.items() if text)


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite; raised before the optimizer could spread it to the weights."""

    exit_code = 3
