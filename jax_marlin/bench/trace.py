"""Where the time of one compiled program goes: its kernels, by the scopes that made them.

XLA names each instruction after the `jax.named_scope`s that it came from, and JAX's profiler names
the instruction of each kernel. Command buffers hide that, so programs that are traced have none.
"""

import dataclasses
import pathlib
import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

# What runs other instructions, whose own times count.
_CONTROL = ("while", "conditional", "call", "async-start", "async-done", "async-update")
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = .*?[\s)}\]](?P<opcode>[a-z][a-z0-9-]*)\("
)
_OP_NAME = re.compile(r'op_name="(?P<path>[^"]*)"')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        op: the instruction's name.
        start, end: nanoseconds.
    """

    op: str
    start: float
    end: float


@dataclasses.dataclass
class Part:
    """Launches of one scope, and the time in which nothing that began earlier ran any more."""

    launches: int = 0
    ns: float = 0.0


def scopes(hlo: str) -> dict[str, str]:
    """The scopes of a compiled program's instructions, as `jit(f)/while/body/mlp/dot_general`.

    Control flow is left out. An instruction without scopes has an empty path.

    >>> scopes('''ENTRY %main {
    ...   %tanh.1 = f32[2]{0} tanh(%x), metadata={op_name="jit(f)/mlp/tanh"}
    ...   ROOT %while.2 = (f32[2]{0}, s32[]) while(%tanh.1), metadata={op_name="jit(f)/while"}
    ... }''')
    {'tanh.1': 'jit(f)/mlp/tanh'}
    """
    found = {}
    for line in hlo.splitlines():
        if (match := _INSTRUCTION.match(line)) and match["opcode"] not in _CONTROL:
            path = _OP_NAME.search(line)
            found[match["name"]] = path["path"] if path else ""
    return found


def traced(run: Callable[[], object]) -> list[Kernel]:
    """Everything that one run executes on its device, in the order in which it begins."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
        with warnings.catch_warnings():
            # jaxlib 0.12's types have no __module__, and where warnings are errors it aborts.
            warnings.simplefilter("ignore", DeprecationWarning)
            return sorted(_kernels(profile), key=lambda kernel: kernel.start)


def by_part(
    kernels: Iterable[Kernel], scopes: dict[str, str], part_of: Callable[[str], str]
) -> dict[str, Part]:
    """Sums of each part; together they are the time in which anything ran.

    Args:
        kernels: in the order in which they begin. Where one begins before another has ended, the
            overlap counts as the earlier one's.
        scopes: of the program; kernels of other instructions are left out.
        part_of: the part that a scope belongs to.
    """
    parts: dict[str, Part] = defaultdict(Part)
    done = 0.0
    for kernel in kernels:
        if kernel.op in scopes:
            part = parts[part_of(scopes[kernel.op])]
            part.launches += 1
            part.ns += max(kernel.end - max(kernel.start, done), 0.0)
            done = max(done, kernel.end)
    return dict(parts)


def _kernels(profile: Any) -> Iterator[Kernel]:
    planes = list(profile.planes)
    # On a GPU the host's plane names the instructions, too, while it launches them.
    of_device = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in of_device or planes:
        for line in plane.lines:
            for event in line.events:
                for name, value in event.stats:
                    if name == "hlo_op":
                        end = event.start_ns + event.duration_ns
                        yield Kernel(str(value), event.start_ns, end)
