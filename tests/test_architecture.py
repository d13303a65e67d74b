"""Rules that .github/imports.toml cannot express: fast commands, who reads the environment, no code of others."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from job.runs.lease import take
from job.storage.local import LocalStore

ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT / "job").with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "job").rglob("*.py"))
}

READS_THE_ENVIRONMENT = {"settings.load", "storage.credential_variables"}
"""The latter what the clouds' clients read themselves: whether they would repeat a secret in their errors."""
SETS_THE_ENVIRONMENT = {"cli.library_variables", "log"}
"""They tell libraries something before these are imported; they read nothing."""

# They run code that lies in the data they read.
NEVER_IMPORTED = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NEVER_CALLED = {"torch.load", "torch.save", "eval", "exec", "yaml.load", "yaml.unsafe_load", "numpy.load", "np.load"}

HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "lm_eval", "datasets", "accelerate", "numpy", "scipy"}
HEAVY |= {"pyarrow", "pandas", "boto3", "botocore", "huggingface_hub", "tensorboardX", "matplotlib", "jsonschema"}
HEAVY |= {"wandb", "mlflow"}
MOST_FILES_WITH_SETTINGS = 13
LINES = {"structlog", "rich"}
"""What is imported to write a line of the log."""


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that are imported anywhere in a file; `from job import x` is `job.x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [alias.name for alias in node.names]
            yield from ([f"job.{name}" for name in names] if node.module == "job" else [str(node.module)])


def test_what_scripts_and_tests_import_is_there() -> None:
    """Also in scripts that no test runs, and inside functions: a name that moved to another room is missed here."""
    scripts = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "infra").rglob("*.py")]
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "job":
                package = node.module.removeprefix("job").removeprefix(".")
                inside = {name.removeprefix(f"{package}.") for name in SOURCES if name.startswith(package)}
                inside |= {name.split(".")[0] for name in inside}
                missing = (
                    {alias.name for alias in node.names}
                    - inside
                    - defined(SOURCES.get(package or "__init__", ast.Module([], [])))
                )
                assert not missing, f"{path.relative_to(ROOT)}:{node.lineno}"


@cache
def defined(tree: ast.Module) -> set[str]:
    """The names that a file has at its top level, however they came there."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


FORBIDDEN = {
    "job/common/tables.py": "from job.runs.attempt import Attempt",
    "job/storage/local.py": "def f():\n    from job.cli.main import main",
    "job/evaluation/tasks.py": "import boto3",
    "job/stages/pull.py": "def f():\n    import torch",
    "job/report/charts.py": "from trl import SFTTrainer",
}


@pytest.mark.parametrize("path", FORBIDDEN)
def test_a_forbidden_import_is_refused(path: str, tmp_path: Path) -> None:
    """The contracts that `make check` holds see an import that goes the wrong way, also inside a function."""
    shutil.copytree(ROOT / "job", tmp_path / "job", ignore=shutil.ignore_patterns("__pycache__"))
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo", ROOT / ".github/imports.toml"]
    (tmp_path / path).write_text(f"{(tmp_path / path).read_text()}\n{FORBIDDEN[path]}\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "is not allowed to import" in done.stdout


def environment_uses(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(read or set, line) for every use of the environment."""
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "environb", "getenv"}, "import os instead"
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"):
            continue
        if node.attr in {"getenv", "getenvb"}:
            yield "read", node.lineno
        elif node.attr in {"environ", "environb", "putenv"}:
            parent = parents[node]
            assigned = isinstance(parent, ast.Subscript) and isinstance(parent.ctx, ast.Store | ast.Del)
            default = isinstance(parent, ast.Attribute) and parent.attr == "setdefault"
            yield "set" if assigned or default else "read", node.lineno


def test_only_settings_read_the_environment() -> None:
    """What the job does depends on its settings, and these come from one place."""
    uses = {(name, kind) for name, tree in SOURCES.items() for kind, _ in environment_uses(tree)}
    assert {name for name, kind in uses if kind == "read"} == READS_THE_ENVIRONMENT
    assert {name for name, kind in uses if kind == "set"} <= SETS_THE_ENVIRONMENT


def test_the_reader_of_the_environment_is_found_out() -> None:
    """The test above sees reading for what it is, in whatever form."""
    for code in ("os.environ['X']", "os.environ.get('X')", "x = os.getenv('X')", "f(os.environ)", "dict(os.environ)"):
        assert [kind for kind, _ in environment_uses(ast.parse(code))] == ["read"]
    for code in ("os.environ['X'] = '1'", "os.environ.setdefault('X', '1')", "del os.environ['X']"):
        assert [kind for kind, _ in environment_uses(ast.parse(code))] == ["set"]


@pytest.mark.parametrize("name", SOURCES)
def test_no_code_of_strangers_is_run(name: str) -> None:
    """No code from a model's or a data set's repository, no pickles, no evaluated text."""
    tree = SOURCES[name]
    assert not {module.split(".")[0] for module in imports(tree)} & NEVER_IMPORTED
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            pytest.fail("trust_remote_code in a mapping cannot be checked here: pass it by name")
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in NEVER_CALLED


def test_models_are_loaded_with_remote_code_refused() -> None:
    """Every call that could run a repository's code says that it must not, and takes no weights but safetensors."""
    calls = [
        (name, node)
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).startswith("Auto")
        and "from_pretrained" in ast.unparse(node.func)
    ]
    assert {name for name, _ in calls} == {
        *("export.autoround_process", "export.exported_model", "model.load_base", "model.files", "model.informed_init"),
        *("evaluation.judges", "model.text_classifier"),
        *("model.tokenizer", "model.tokenizer_files"),
    }
    for _, call in calls:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        assert "trust_remote_code" in given
        if "Model" in ast.unparse(call.func):
            assert ast.unparse(given["use_safetensors"]) == "True"


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["config"], ["config", "--schema"], ["--no.such", "1"], ["status", "x"]]
)
def test_quick_answers_import_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    """Help, settings and what is wrong with them come at once, before torch and its friends are loaded.

    An answer that is no line of the log does not load what writes one.
    """
    heavy = HEAVY if words[0] == "--no.such" else HEAVY | LINES
    if words[0] == "status":
        take(LocalStore(tmp_path / "x"), "a machine")
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys; from job.cli.main import main; code = main(sys.argv[1:]);"
        f"print(sorted({heavy!r} & {{name.split('.')[0] for name in sys.modules}}), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == (2 if words[0] == "--no.such" else 0), done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_settings_enter_few_files_of_a_run() -> None:
    """At most 13 files that a run calls have a function with `Settings` in its signature; all others take values."""
    entered = {
        name
        for name, tree in SOURCES.items()
        if name.split(".")[0] not in {"cli", "planning"}  # commands and `plan`, which a run does not call
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(part, ast.Name) and part.id == "Settings" for part in annotations(node))
    }
    assert len(entered) <= MOST_FILES_WITH_SETTINGS, sorted(entered)
    assert {"pipeline", "start_and_end", "stages.train"} <= entered


def annotations(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """All parts of the annotations of a function's signature."""
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        if argument.annotation is not None:
            yield from ast.walk(argument.annotation)
    if function.returns is not None:
        yield from ast.walk(function.returns)
