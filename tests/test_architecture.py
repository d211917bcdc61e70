"""Imports point one way. Read from the sources (ast), so nothing heavy is imported and late imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("service", "engine", "kernels", "migrations")

# --- the map ------------------------------------------------------------------------------------------------------------------

BASE = {"errors", "config"}
CORE = BASE | {"domain", "ports"}
PURE = {"planning", "billing"}

LAYERS: dict[str, set[str]] = {
    "kernels": set(),
    "engine": {"kernels"},
    "errors": set(),
    "domain": {"errors"},
    "planning": {"errors", "domain"},
    "billing": {"errors", "domain"},
    "ports": {"errors", "domain"},
    "config": {"errors"},
    "log": {"config"},
    "metrics": CORE | PURE | {"usecases"},
    "ops": {"errors", "config"},
    "usecases": CORE | PURE,
    "adapters": CORE | PURE,
    "bootstrap": CORE | {"adapters"},
    "api": CORE | PURE | {"usecases", "bootstrap"},
    "dashboard": CORE | PURE | {"usecases", "bootstrap", "api"},
    "tasks": CORE | {"usecases", "bootstrap"},
    "processes": CORE | {"usecases", "bootstrap", "tasks", "log", "metrics", "ops"},
    "cli": CORE | PURE | {"usecases", "bootstrap", "api", "tasks", "processes", "log", "metrics", "ops"},
    "migrations": set(),
}
"""Layer -> the layers it may import (besides itself)."""

PROCESSES = (
    "service.children",
    "service.control",
    "service.embedded",
    "service.gpu_workers",
    "service.running",
    "service.supervisor",
    "service.worker",
    "service.worker_pool",
)

EXCEPTIONS = {
    ("service.adapters.engine_runner", "engine"): "the one place where the service meets the engine",
    ("service.adapters.token_counter", "engine.tokenizer"): "counts prompt tokens as a worker does; no torch behind it",
    ("service.cli.doctor", "kernels.clash"): "looks for the other package of that name; no torch behind it",
    ("service.cli.bench", "service.adapters.engine_runner"): "measures what a worker runs",
    ("service.cli.bench.prompts", "service.adapters.prompts"): "every engine gets what a worker runs",
    ("service.cli.bench.prompts", "engine.tokenizer"): "likewise",
    ("service.cli.bench.bound", "kernels.reference.linear"): "the fastest product may be our own",
    ("service.cli.bench.paper", "engine"): "figures of drafters, which are the engine's business",
    ("service.cli.drafter_cmds", "engine"): "drafters are the engine's business",
    ("service.cli.lab_cmds", "engine.lab"): "a replay runs the engine's decisions, without its torch",
    ("service.cli.models", "service.adapters.engine_runner"): "fetching a model is the engine's business",
    ("service.cli.admin_cmds", "service.adapters.schema"): "`db upgrade` works on the schema, which is no port",
    ("service.cli.doctor", "service.adapters.schema"): "is the schema the newest?",
    ("service.cli.cost_cmds", "service.adapters.focus_files"): "a file on the user's disk is no port",
    ("service.cli.cost_view", "service.adapters.charts"): "a file on the user's disk is no port",
    ("service.supervisor", "service.adapters.schema"): "`up` brings the schema to its newest revision",
    ("service.tasks", "service.adapters.queue_celery"): "the task, and the thread that consumes it, are parts of this application",
    ("service.adapters.schema", "migrations"): "runs them",
    ("migrations.env", "service.adapters.tables"): "compares with them",
}
"""(importer, imported), each with everything below it, that the map does not allow: and why."""

HEAVY = {"torch", "transformers", "triton", "safetensors", "numpy", "gguf", "xgrammar"}
MAY_BE_HEAVY = ("service.adapters.engine_runner", "service.cli.engine_cmds", "service.cli.bench", "service.cli.doctor")

DATABASE = (
    "service.adapters.unit_of_work",
    "service.adapters.postgres",
    "service.adapters.stores",
    "service.adapters.tables",
    "service.adapters.schema",
)

VENDORS = {
    "sqlalchemy": (*DATABASE, "migrations"),
    "alembic": ("service.adapters.schema", "migrations"),
    "psycopg": ("service.adapters.stores", "service.embedded"),
    "boto3": ("service.adapters.s3_client",),
    "botocore": ("service.adapters.s3_client", "service.adapters.s3_errors"),
    "cryptography": ("service.adapters.vault",),
    "celery": ("service.adapters.queue_celery", "service.tasks"),
    "kombu": ("service.adapters.queue_celery",),
    "redis": ("service.adapters.queue_celery",),
    "fastapi": ("service.api", "service.dashboard"),
    "starlette": ("service.api", "service.dashboard"),
    "typer": ("service.cli",),
    "rich": ("service.cli",),
    "openai": ("service.cli.demo",),
    "prometheus_client": ("service.metrics",),
    "xgrammar": ("engine",),
    "gguf": ("engine.checkpoints",),
    "llvmlite": ("kernels.native",),
    "triton": ("kernels.triton",),
}
"""Vendor library -> the only modules (with what is below them) that may know it."""

WORLD = {"asyncio", "httpx", "io", "logging", "os", "pathlib", "shutil", "socket", "structlog", "subprocess", "tempfile", "threading"}
CLOCK = {"time"}
PURE_ENGINE = (
    "engine.accounting",
    "engine.kv_blocks",
    "engine.lab.machine",
    "engine.lab.replay",
    "engine.lab.simulator",
    "engine.lab.stand_in",
    "engine.lab.step_fit",
    "engine.scheduler",
    "engine.sequence",
    "engine.waiting",
    "engine.row_table",
    "engine.speculation.calibration",
    "engine.speculation.choices",
    "engine.speculation.cost_model",
    "engine.speculation.planner",
    "engine.speculation.track_record",
    "engine.speculation.ways",
)


# --- reading ------------------------------------------------------------------------------------------------------------------


@cache
def sources() -> dict[str, ast.Module]:
    """Module name -> its syntax tree."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> the modules it imports, wherever the statement stands; `from a import b` counts as a.b where that is a module."""
    return {module: frozenset(_imports(module, tree)) for module, tree in sources().items()}


def _imports(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in sources() else str(node.module)


def within(module: str, *roots: str) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def layer(module: str) -> str:
    top, _, rest = module.partition(".")
    if top != "service":
        return top
    return "processes" if within(module, *PROCESSES) else rest.partition(".")[0]


def edges() -> Iterator[tuple[str, str]]:
    for module, imported in imports().items():
        yield from ((module, other) for other in sorted(imported))


# --- the rules ----------------------------------------------------------------------------------------------------------------


def test_every_module_has_a_layer() -> None:
    homeless = [module for module in sources() if module != "service" and layer(module) not in LAYERS]
    assert homeless == []


def test_imports_point_one_way() -> None:
    wrong = [
        f"{module} ({layer(module)}) imports {other} ({layer(other)})"
        for module, other in edges()
        if other in sources()
        and other != "service"
        and layer(other) not in {layer(module), *LAYERS[layer(module)]}
        and not any(within(module, importer) and within(other, imported) for importer, imported in EXCEPTIONS)
    ]
    assert wrong == []


@pytest.mark.parametrize(("importer", "imported"), EXCEPTIONS)
def test_no_exception_outlives_its_use(importer: str, imported: str) -> None:
    assert any(within(module, importer) and within(other, imported) for module, other in edges())


def test_the_service_needs_no_torch() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, other in edges()
        if within(module, "service", "migrations") and other.partition(".")[0] in HEAVY and not within(module, *MAY_BE_HEAVY)
    ]
    assert wrong == []


def test_vendor_libraries_stay_behind_their_adapters() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, other in edges()
        if (allowed := VENDORS.get(other.partition(".")[0])) is not None and not within(module, *allowed)
    ]
    assert wrong == []


def test_the_pure_core_knows_no_world() -> None:
    """What decides is tested by the thousand: no torch, no I/O, no clock."""
    wrong = [
        f"{module} imports {other}"
        for module, other in edges()
        if (within(module, "service.domain", "service.planning", "service.billing") or module in PURE_ENGINE)
        and other.partition(".")[0] in WORLD | CLOCK | (HEAVY - {"numpy"})
    ]
    assert wrong == []
    assert set(PURE_ENGINE) <= set(sources()), "a module of this list is gone"


def test_the_pure_core_reads_no_clock() -> None:
    calls = {"now", "utcnow", "today"}
    wrong = [
        f"{module}:{node.lineno}"
        for module, tree in sources().items()
        if within(module, "service.domain", "service.planning", "service.billing")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in calls
    ]
    assert wrong == []


def test_only_the_settings_read_the_environment() -> None:
    allowed = {
        "service.config",
        "service.supervisor",  # hands its own environment to its children
        "service.cli.bench.environments",  # likewise
        "service.cli.bench.peers.vllm",  # sets vLLM's own, which it reads when it is imported
        "service.gpu_workers",  # likewise, and hides all GPUs but one from each
        "engine.threads",  # sets how OpenMP waits, before torch is loaded
        "engine.checkpoints.sources",  # the cache folder, where the engine is used as a library
    }
    wrong = {
        module
        for module, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb") and isinstance(node.value, ast.Name)
    }
    assert wrong <= allowed


def test_drafters_do_not_know_each_other() -> None:
    """Shared parts have no drafter in them; portfolio and cross_vocab hold drafters through the registry."""
    drafters = {
        module
        for module, tree in sources().items()
        if within(module, "engine.drafters")
        and any(isinstance(node, ast.ClassDef) and node.name.endswith("Drafter") and node.name != "Drafter" for node in tree.body)
    }
    assert drafters, "no drafter found: the rule would hold of nothing"
    wrong = [f"{module} imports {other}" for module, other in edges() if module in drafters and other in drafters]
    assert wrong == []


def test_importing_the_kernels_package_does_no_work() -> None:
    """It shares its name with a package that transformers looks for: definitions and imports only."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Expr, ast.If)
    assert [type(node).__name__ for node in sources()["kernels"].body if not isinstance(node, allowed)] == []
    at_top = [node for node in sources()["kernels"].body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in at_top if isinstance(node, ast.Import) for alias in node.names}
    assert not names & HEAVY
