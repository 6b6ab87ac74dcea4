"""From what a command raises to an exit code and a line."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Sequence

import typer

from analyses.cli.console import warn
from probes.errors import UserError, shown

# Typer carries its own copy of click; the base of its usage errors is reached through a public subclass.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

# It carries the help text of a command that was given nothing, in its lines.
NoArguments: type[Exception] = next(c for c in UsageError.__subclasses__() if c.__name__ == "NoArgsIsHelpError")

INTERRUPTED = 130
"""Exit code after Ctrl-C, which Typer may also return by itself."""
SURROUNDINGS = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR,
    errno.EISDIR, errno.ENODEV, errno.ENXIO, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETXTBSY,
})  # fmt: skip
"""What the operating system refuses because of how a machine is set up or of what a path leads to."""
LONGEST_WORD = 400
"""Characters of a word of a message, which a library may have taken whole from its input."""


def call(app: typer.Typer, args: Sequence[str]) -> int:
    """Run a command of `app`; return the exit code."""
    try:
        code = app(args=list(args), standalone_mode=False)
    except UserError as error:
        return _bad(str(error))
    except NoArguments as error:
        warn(str(error))
        return 2
    except UsageError as error:
        return _bad(str(getattr(error, "format_message", error.__str__)()))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        if error.errno not in SURROUNDINGS:
            return _fault()
        named = "" if error.filename is None else f" {shown(str(error.filename))}"
        return _bad(f"cannot use{named or ' a file'}: {error.strerror}; give another path, or mend its folder")
    except MemoryError:
        return _bad("out of memory; give fewer or shorter prompts, fewer points, or a smaller model")
    except Exception:
        return _fault()
    if code == INTERRUPTED:
        warn("interrupted; what was committed stays, and the same command goes on from there")
    return code if isinstance(code, int) else 0


def _fault() -> int:
    warn(traceback.format_exc())
    warn("this is a fault of Bathyscope, not of your input; please report the lines above")
    return 1


def _bad(message: str) -> int:
    warn("error: " + " ".join(map(_cut, message.split())))
    return 2


def _cut(word: str) -> str:
    half = LONGEST_WORD // 2
    return word if len(word) <= LONGEST_WORD else f"{word[:half]}…{word[-half:]}"
