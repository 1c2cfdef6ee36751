"""The structure holds: imports go one way, modules and functions stay small, nothing heavy is imported early."""

import ast

from conftest import ROOT, run_python

# The order in CONTRIBUTING.md. A module imports lower ranks, and modules of its own room.
RANKS = {
    "shown": -1, "errors": 0, "console": 0, "files": 0.5, "processes": 0.5, "hub": 1, "config": 1, "data": 2,
    "models": 3, "evaluation": 3.5, "evaluation.evaluate": 5, "tasks": 4, "adaptation": 4, "features": 5.5,
    "audit": 5.7,
    "features.table": 6.5, "train": 6, "publishing": 7, "audit.check": 7.5, "audit.page": 7.2, "choosing": 8,
    "zero_shot": 7.2, "testing": 7.5, "predictor": 7.5, "embedded": 8.5, "use": 8, "demo": 8, "doctor": 8, "recipe": 8,
    "cli_data": 8.5, "cli": 9,
    "__main__": 10,
}  # fmt: skip
# Names of shipped models, without the code that uses them: the room of its own would be a file for one tuple.
ALLOWED = {("models.timm_files", "embedded")}


def modules():
    for file in sorted((ROOT / "hftl").rglob("*.py")):
        parts = file.relative_to(ROOT / "hftl").with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            yield name, file, ast.parse(file.read_text())


def rank(name: str) -> float:
    return RANKS[name] if name in RANKS else RANKS[name.split(".")[0]]


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hftl":
            yield node.module.removeprefix("hftl").lstrip(".")
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("hftl.") for alias in node.names if alias.name.startswith("hftl."))


def test_imports_go_one_way():
    wrong = []
    for name, _, tree in modules():
        for imported in imports(tree):
            same_room = imported.split(".")[0] == name.split(".")[0]
            if imported and not same_room and rank(imported) >= rank(name) and (name, imported) not in ALLOWED:
                wrong.append(f"{name} ({rank(name)}) imports {imported} ({rank(imported)})")
    assert not wrong, wrong


def test_nothing_in_the_library_imports_a_recipe():
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
        if lines > 330:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno
                if length > (120 if node.name == "fit" else 75):
                    long.append(f"{name}.{node.name}: {length} lines")
    assert not long, long


SHARED = ("train", "evaluation", "publishing", "adaptation", "features", "predictor", "testing")


def test_shared_code_knows_no_task_by_name():
    from hftl.tasks.registry import TASKS

    for name, _, tree in modules():
        if name.split(".")[0] in SHARED:
            words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            words |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            known = {*TASKS, *(task.__name__ for task in TASKS.values())} & {w for w in words if isinstance(w, str)}
            assert not known, f"{name} names {known}: what is special about a task belongs into the task"


def test_public_names_exist_and_are_listed_once():
    import hftl

    assert sorted(hftl.__all__) == sorted(hftl._HOME_OF)
    for name in hftl.__all__:
        assert getattr(hftl, name) is not None


def test_no_trainer_and_no_pickle():
    for name, file, _ in modules():
        text = file.read_text()
        for word in ("TrainingArguments(", "transformers.Trainer(", "import Trainer", "torch.load(", "import pickle"):
            assert word not in text, f"{name} has {word}"


def test_importing_hftl_and_its_help_load_nothing_heavy():
    code = (
        "import sys, hftl, hftl.cli.main, hftl.run.recipe\n"
        "try: hftl.cli.main.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'transformers', 'datasets', 'peft', 'accelerate', 'matplotlib', 'jinja2', 'scipy'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert "quickstart" in run_python(code)
