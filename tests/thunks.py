"""What XLA writes about a program that it compiles: its calls, and which of them are captured."""

from pathlib import Path

# Ends of file names, as in `module_0007.jit_PROGRAM.ENDING`.
OPTIMIZED = "after_optimizations.txt"
AFTER_PASSES = "thunk_sequence_after_thunk_passes.txt"  # only where they captured something


def dump_options(folder: Path) -> dict[str, bool | str]:
    """`compiler_options` of a jitted function whose programs are to be written to `folder`."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def texts(folder: Path, program: str, ending: str) -> list[str]:
    """What XLA wrote about the programs of one name."""
    return [file.read_text() for file in sorted(folder.glob(f"*.jit_{program}.*{ending}"))]


def calls_of(target: str, text: str) -> int:
    """How often an optimized program calls a target."""
    return text.count(f'custom_call_target="{target}"')


def loose_calls(thunks: str) -> list[str]:
    """The lines of custom calls that stand beside, not below, a command buffer.

    A thunk's line is indented below the thunk that runs it: `000: kCommandBuffer`, and on the next
    lines `  000: kCustomCall`.
    """
    loose, command_buffer = [], None  # the indentation of the command buffer that we are in
    for line in filter(str.strip, thunks.splitlines()):
        indentation = len(line) - len(line.lstrip())
        if command_buffer is not None and indentation <= command_buffer:
            command_buffer = None
        if command_buffer is None and "kCommandBuffer" in line:
            command_buffer = indentation
        elif command_buffer is None and "kCustomCall" in line:
            loose.append(line)
    return loose


def all_captured(thunks: str) -> bool:
    """Whether there are command buffers, and every custom call stands in one."""
    return "kCommandBuffer" in thunks and not loose_calls(thunks)


def written(folder: Path, program: str) -> str:
    """For a failure: the names of a program's files, and the beginning of its thunks."""
    names = [file.name for file in sorted(folder.glob(f"*.jit_{program}.*.txt"))]
    thunks = "\n----\n".join(texts(folder, program, "thunk*.txt"))
    return f"{program}: XLA wrote {names}\n{thunks[:3000]}"
