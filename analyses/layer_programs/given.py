"""Programs of a file, one a line."""

from __future__ import annotations

from probes.edits.programs import Program
from probes.errors import OptionError, UserError
from probes.input_files import MAX_TEXT, opened


def read_programs(path: str, n_layers: int, most: int) -> tuple[Program, ...]:
    """Return the programs of a file; empty lines and those that begin with # are left out.

    Args:
        most: block-runs of a program at most.

    Raises:
        OptionError: no such file, or a line that is no program of this model, with its number.
    """
    if not path:
        return ()
    programs = []
    with opened(path, "program file", OptionError) as handle:
        lines = handle.read(MAX_TEXT).splitlines()
    for number, line in enumerate(lines, 1):
        if (text := line.strip()) and not text.startswith("#"):
            try:
                program = Program.parse(text)
                program.check(n_layers, most)
            except UserError as error:
                raise OptionError(f"{path}, line {number}: {error}") from error
            programs.append(program)
    if not programs:
        raise OptionError(f"{path} holds no program: give one a line, such as 0-11,12-15,12-29")
    return tuple(dict.fromkeys(programs))
