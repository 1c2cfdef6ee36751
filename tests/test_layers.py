"""Structure of the library: import order of packages, size of modules and functions, lazy imports."""

import ast

from conftest import ROOT, run_python

# Order of the packages, as in CONTRIBUTING.md. A module imports only from earlier packages and its own.
ORDER = (
    "base", "config", "statistics", "html", "data", "run_folder", "loading", "preprocessing", "embedded", "heads",
    "models", "tasks", "adaptation", "evaluation", "reporting", "features", "artifacts", "training", "audit",
    "inference", "run", "selection", "cli", "entry",
)  # fmt: skip
MAX_LINES = 400
MAX_FUNCTION_LINES = 75
MAX_FIT_LINES = 100


def modules():
    """Yields name (without `hftl.`), file and syntax tree of every module; `""` is `hftl/__init__.py`."""
    for file in sorted((ROOT / "hftl").rglob("*.py")):
        parts = file.relative_to(ROOT / "hftl").with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), file, ast.parse(file.read_text())


def package(name: str) -> str:
    """Returns the package of a module; top-level modules are `base`, except the two entry points."""
    if name in ("", "__main__"):
        return "entry"
    return name.split(".")[0] if (ROOT / "hftl" / name.split(".")[0]).is_dir() else "base"


def imports(tree, names):
    """Yields the names of the modules of hftl that a module imports, at any level and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hftl":
            source = node.module.removeprefix("hftl").lstrip(".")
            for alias in node.names:
                module = f"{source}.{alias.name}".lstrip(".")
                yield module if module in names else source
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("hftl").lstrip(".") for alias in node.names if alias.name == "hftl")
            yield from (alias.name.removeprefix("hftl.") for alias in node.names if alias.name.startswith("hftl."))


def import_graph():
    trees = {name: tree for name, _, tree in modules()}
    return {name: {target for target in imports(tree, trees) if target != name} for name, tree in trees.items()}


def cycles(graph):
    """Returns the groups of nodes that reach each other."""
    reach = {}
    for start in graph:
        stack, visited = list(graph[start]), set()
        while stack:
            node = stack.pop()
            if node not in visited:
                visited.add(node)
                stack.extend(graph.get(node, ()))
        reach[start] = visited
    return sorted({tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in graph} - {()})


def test_imports_point_to_earlier_packages():
    graph = import_graph()
    assert {package(name) for name in graph} == set(ORDER)
    rank = {name: index for index, name in enumerate(ORDER)}
    violations = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in targets
        if package(name) != package(target) and rank[package(name)] <= rank[package(target)]
    ]
    assert not violations, violations


def test_files_and_packages_have_no_cycles():
    graph = import_graph()
    assert not cycles(graph)
    packages = {name: set() for name in ORDER}
    for name, targets in graph.items():
        packages[package(name)] |= {package(target) for target in targets} - {package(name)}
    assert not cycles(packages)
    assert cycles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [("a", "b")]


def test_library_imports_no_recipe():
    for name, _, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                from_module = isinstance(node, ast.ImportFrom)
                names = [node.module or ""] if from_module else [alias.name for alias in node.names]
                assert not any(imported.split(".")[0] == "recipes" for imported in names), name


def test_modules_and_functions_stay_small():
    long = []
    for name, file, tree in modules():
        lines = len(file.read_text().splitlines())
        if lines > MAX_LINES:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno
                if length > (MAX_FIT_LINES if node.name == "fit" else MAX_FUNCTION_LINES):
                    long.append(f"{name}.{node.name}: {length} lines")
    assert not long, long


SHARED = ("adaptation", "evaluation", "reporting", "features", "artifacts", "training", "inference", "run")


def test_shared_code_names_no_task():
    from hftl.tasks.registry import TASKS

    for name, _, tree in modules():
        if name.split(".")[0] in SHARED:
            words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            words |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            known = {*TASKS, *(task.__name__ for task in TASKS.values())} & {w for w in words if isinstance(w, str)}
            assert not known, f"{name} names {known}; task-specific code belongs in the task"


def test_public_names_exist_and_are_listed_once():
    import hftl

    assert sorted(hftl.__all__) == sorted(hftl._MODULE_OF)
    for name in hftl.__all__:
        assert getattr(hftl, name) is not None


def test_library_uses_no_trainer_and_no_pickle():
    for name, file, _ in modules():
        text = file.read_text()
        for word in ("TrainingArguments(", "transformers.Trainer(", "import Trainer", "torch.load(", "import pickle"):
            assert word not in text, f"{name} has {word}"


def test_import_and_help_load_no_heavy_library():
    code = (
        "import sys, hftl, hftl.cli.main, hftl.run.recipe\n"
        "try: hftl.cli.main.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'transformers', 'datasets', 'peft', 'accelerate', 'matplotlib', 'jinja2', 'scipy'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert "quickstart" in run_python(code)
