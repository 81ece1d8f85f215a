"""The shape of the repository: where imports point, what each folder may know, file sizes."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jax_marlin"
CPP = ROOT / "cpp"
MAX_LINES = 300

# A module may import, at module level, only modules of its own stage or an earlier one.
PYTHON_STAGES = [
    {"quant_spec"},
    {"layout", "words", "repack", "repack_rows", "native_repack"},
    {"canonical", "explicit_mesh"},
    {"linear", "weights", "dense_stack", "pack_canonical", "stack_builder", "host_arrays"},
    {"gptq_format", "gptq", "quantize", "act_order", "reference", "unpack"},
    {"sharding", "trainable", "top_k"},
    {"routing", "ops", "backend"},
    {"checkpoints", "data"},
    {"models"},
    {"inspect", "demo", "answer", "generate", "bench"},
    {"cli"},
    {"__main__", "__init__"},
]
# bindings -> ffi -> launch -> host -> kernel: a file includes its own stage or one below it. What
# runs on the host alone knows of the kernels no more than the tile.
CPP_STAGES = ["kernel", "host", "launch", "ffi", "bindings"]

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))
CPP_FILES = sorted(p for s in ("*.cc", "*.cu", "*.cuh", "*.h") for p in CPP.rglob(s))
TARGET = re.compile(r"jax_marlin_[a-z0-9_]+?_v\d+")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """jax_marlin/ops/matmul.py -> jax_marlin.ops.matmul; a package's __init__.py -> the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in PYTHON_FILES}


def stage_of(module: str) -> int:
    piece = module.split(".")[1] if "." in module else "__init__"
    for stage, names in enumerate(PYTHON_STAGES):
        if piece in names:
            return stage
    pytest.fail(f"{module} has no stage: add it to PYTHON_STAGES where it stands in the data flow")


class LoadTimeImports(ast.NodeVisitor):
    """Collects the modules of this package that a file imports when it is itself imported."""

    def __init__(self, path: Path):
        self.module = module_name(path)
        self.package = self.module.split(".")
        if path.name != "__init__.py":
            self.package.pop()
        self.found: set[str] = set()
        self.visit(ast.parse(path.read_text()))
        self.found = (self.found & MODULES.keys()) - {self.module}

    def visit_Import(self, node: ast.Import):
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom):
        base = self.package[: len(self.package) - node.level + 1] if node.level else []
        origin = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            submodule = f"{origin}.{alias.name}"
            self.found.add(submodule if submodule in MODULES else origin)

    def visit_FunctionDef(self, node: ast.FunctionDef):
        """A function's body runs later: it may import a later stage."""

    def visit_If(self, node: ast.If):
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def cpp_stage(path: Path) -> int:
    top = path.relative_to(CPP).parts[0]
    piece = top if (CPP / top).is_dir() else path.stem
    if piece not in CPP_STAGES:
        pytest.fail(f"{name_of(path)} stands in no stage of {CPP_STAGES}")
    return CPP_STAGES.index(piece)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text(), re.MULTILINE)


def own_file(included: str, includer: Path) -> Path | None:
    for base in (includer.parent, CPP, ROOT):
        if (base / included).is_file() and (base / included).resolve().is_relative_to(CPP):
            return (base / included).resolve()
    return None


def test_there_is_something_to_check():
    assert len(PYTHON_FILES) > 10
    assert len(TEST_FILES) > 10
    assert len(CPP_FILES) > 10


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_python_imports_point_backwards(path):
    own = stage_of(module_name(path))
    upward = sorted(m for m in LoadTimeImports(path).found if stage_of(m) > own)
    assert not upward, f"{name_of(path)} imports later stages: {upward}"


def test_python_imports_have_no_cycle():
    graph = {module_name(p): LoadTimeImports(p).found for p in PYTHON_FILES}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", CPP_FILES, ids=name_of)
def test_cpp_includes_point_downwards(path):
    own = cpp_stage(path)
    for included in includes(path):
        target = own_file(included, path)
        if target is not None:
            assert cpp_stage(target) <= own, f"{name_of(path)} includes {included} from above it"


@pytest.mark.parametrize("path", CPP_FILES, ids=name_of)
def test_frameworks_stay_at_the_top(path):
    frameworks = {"xla": "ffi", "nanobind": "bindings"}  # include prefix -> lowest stage that may
    for included in includes(path):
        lowest = frameworks.get(included.split("/")[0])
        assert lowest is None or cpp_stage(path) >= CPP_STAGES.index(lowest), (
            f"{name_of(path)} includes {included}; only {lowest} and above may"
        )


@pytest.mark.parametrize("path", sorted((CPP / "kernel").rglob("*.*")), ids=name_of)
def test_kernel_folder_knows_no_framework(path):
    code = without_comments(path.read_text())
    found = [w for w in ("xla", "nanobind", "Python.h", "std::vector", "<<<") if w in code]
    assert not found, f"{name_of(path)} mentions {found}"


@pytest.mark.parametrize("path", CPP_FILES, ids=name_of)
def test_asm_only_behind_ptx_functions(path):
    if path.parent == CPP / "kernel" and path.name.startswith("ptx") and path.suffix == ".cuh":
        return
    assert not re.search(r"\b(asm|__asm__)\b", without_comments(path.read_text()))


@pytest.mark.parametrize("path", [*PYTHON_FILES, *TEST_FILES, *CPP_FILES], ids=name_of)
def test_file_is_one_piece(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES, f"{name_of(path)} has {len(lines)} lines, at most {MAX_LINES}"
    assert path.stem not in {"utils", "util", "misc", "helpers", "helper", "common"}
    # The first line says the file's one job.
    opening = '"""' if path.suffix == ".py" else "//"
    assert lines and lines[0].startswith(opening) and len(lines[0]) > 20, lines[:1]


@pytest.mark.parametrize("path", [*PYTHON_FILES, *TEST_FILES], ids=name_of)
def test_only_public_jax(path):
    tree = ast.parse(path.read_text())
    dotted = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dotted |= {f"{node.module}.{alias.name}" for alias in node.names}
    private = [
        d for d in dotted if re.match(r"jax\._src|jax\.extend\.ffi|(jnp|jax\.numpy)\.u?int4", d)
    ]
    assert not private, f"{name_of(path)} uses {private}"


def test_oracle_is_independent():
    tree = ast.parse((ROOT / "tests" / "oracle.py").read_text())
    imports = [
        ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))
    ]
    assert not [line for line in imports if "jax" in line]


def op_files() -> list[Path]:
    """Files of ops/ that define a function of their own name; the rest serves them."""
    return [
        path
        for path in sorted((PACKAGE / "ops").glob("*.py"))
        if re.search(rf"^def {path.stem}\(", path.read_text(), re.MULTILINE)
    ]


@pytest.mark.parametrize("path", op_files(), ids=name_of)
def test_one_op_one_name_in_every_layer(path):
    assert (ROOT / "tests" / f"test_{path.stem}.py").is_file()
    if f"jax_marlin_{path.stem}_v" in path.read_text():
        assert (CPP / "ffi" / f"{path.stem}.cc").is_file()


def test_ops_are_found():
    expected = {"matmul", "moe_matmul", "moe_align_block_size", "ragged_dot", "moe_ffn"}
    assert expected <= {p.stem for p in op_files()}


def test_ffi_targets_have_one_name_on_both_sides():
    python = {t for p in PYTHON_FILES for t in TARGET.findall(p.read_text())}
    cpp = {t for p in CPP_FILES for t in TARGET.findall(p.read_text())}
    assert python and python == cpp
