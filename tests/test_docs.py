"""README and docs pages: fenced bash and Python blocks run in page order; files, settings and names exist.

Hub names are replaced by local folders of the same kind, and `uv run` is left out: the tests run inside the environment
that it creates. The fast part forks commands from a process that has imported the libraries (tests/forked.py) and
replaces all launchers but one by `python`. The slow part starts every command as printed. Links between pages are
checked by the strict build of the site (.ci/run).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = ("README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))
QUICKSTART = "uv run hftl quickstart"
NOT_RUN = {
    "pip install uv": "the environment that the tests run in",
    "uv run pytest": "these tests",
    QUICKSTART: "test_docs_quickstart_matches_page",
}
SLOW = ("hftl export", "hftl run auto")
"""Commands that run in the slow part only, by their first words."""
LAUNCHED = ("README.md", "hftl run image_classification")
"""The page and the command that the fast part runs with its launcher."""
PROGRAMS = {"pip", "uv", "accelerate", "torchrun", "python", "hftl"}
PREPARED = {
    "runs/photos": ("image_classification", "path/to/images", "resnet50.a1_in1k"),
    "runs/questions": ("text_classification", "path/to/tables", "bert-base-uncased"),
}
"""Run folders that pages may use without making them: recipe, data and model."""
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[tuple[str, str]]:
    """Returns (language, text) of the blocks that are run, in page order."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", read(page), flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    split = [command.strip() for line in lines for command in line.split("&&")]
    return [command for command in split if command and not command.startswith("#")]


def steps(page: str) -> list[tuple[str, str]]:
    """Returns (language, command or code) in page order."""
    return [
        (language, step)
        for language, block in blocks(page)
        for step in (commands(block) if language == "bash" else [block])
    ]


def parse(command: str) -> tuple[dict[str, str], list[str]]:
    """Returns the variables before a command, and its words."""
    words = shlex.split(command, comments=True)
    count = next(i for i, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


WITH_STEPS = [page for page in PAGES if any(step not in NOT_RUN for _, step in steps(page))]


@pytest.mark.parametrize("page", PAGES)
def test_docs_commands_are_known(page):
    programs = {parse(step)[1][0] for language, step in steps(page) if language == "bash"}
    assert programs <= PROGRAMS
    assert "```sh" not in read(page), "blocks that run are ```bash, others ```text"


def test_docs_skipped_commands_occur():
    printed = [step for page in PAGES for _, step in steps(page)]
    assert set(NOT_RUN) <= set(printed)
    assert all(any(step.startswith(words) for step in printed) for words in (*SLOW, LAUNCHED[1]))


def test_docs_lengths_are_bounded():
    assert len(read("README.md").splitlines()) <= 150
    assert len(read("docs/how_it_works.md").split()) <= 900


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_docs_files_and_links_exist(page):
    text = read(page)
    named = re.findall(r"`((?:[\w.]+/)+\w+\.(?:py|md|yaml))`", text)
    exact = [name for name in named if not re.search("[A-Z]{2}", name)]  # not tasks/NAME.py
    lost = [name for name in exact if not any((ROOT / top / name).is_file() for top in ("", "hftl"))]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    lost += [link for link in links if link and not (ROOT / page).parent.joinpath(link).is_file()]
    assert not lost


FILES = {"csv", "json", "jsonl", "md", "onnx", "parquet", "pt2", "py", "safetensors", "yaml"}
ATTRIBUTES = {"model.frozen"}  # of TaskModel


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_docs_settings_exist(page):
    from hftl.config.schema import RunConfig, leaves

    settings = set(leaves(RunConfig()))
    groups = {setting.rpartition(".")[0] for setting in settings}
    name = r"((?:data|model|adapt|train|checkpoint|hub)(?:\.[a-z0-9_]+)+)"
    text = read(page)
    inline = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(rf"--{name}", text)) | set(re.findall(rf"`{name}[` ]", inline))
    unknown = {each for each in named if each.rpartition(".")[2] not in FILES} - settings - groups - ATTRIBUTES
    assert not unknown


def test_docs_api_lists_public_names():
    import hftl

    text = read("docs/api.md")
    assert not [name for name in hftl.__all__ if f":: hftl.{name}\n" not in text and name != "HftlError"]
    assert "HftlError" in text


def test_ci_calls_commands_of_readme():
    lines = read(".ci/run").splitlines()
    printed = [step for _, step in steps("README.md")]
    for command in ("pip install uv", "uv run pytest"):
        assert command in printed and command in lines


def start(command: list[str], folder: Path, **environment: str) -> str:
    """Runs a command from its beginning; returns what it printed."""
    environment = {**os.environ, "PATH": PATH, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize(
    "options", [["--num_seeds", "1"], pytest.param([], marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_docs_quickstart_matches_page(options, tmp_path):
    """The fast part uses one of the three seeds."""
    printed = start([*QUICKSTART.removeprefix("uv run ").split(), *options], tmp_path)
    assert (tmp_path / "runs/quickstart/model/model.safetensors").is_file()
    pattern = r"^(scratch|frozen|lora|full) +([\d.]+) (?:±|%)"
    for text in (printed, read("docs/quickstart.md")):
        accuracy = {method: float(mean) for method, mean in re.findall(pattern, text, flags=re.MULTILINE)}
        assert max(accuracy["frozen"], accuracy["lora"], accuracy["full"]) > accuracy["scratch"]


@pytest.fixture
def folder(tmp_path, images, texts):
    """A folder that looks like a checkout with a user's data next to it."""
    for name in ("recipes", "accelerate_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("images", "other/images"):
        shutil.copytree(images, tmp_path / "path/to" / name)
    shutil.copytree(texts, tmp_path / "path/to/tables")
    shutil.copy(next(images.rglob("*.png")), tmp_path / "photo.jpg")
    shutil.copy(texts / "test.csv", tmp_path / "table.csv")
    return tmp_path


@pytest.fixture
def stand_ins(tiny_timm, tiny_bert) -> dict[str, str]:
    """Local models for names on the Hub."""
    vit, resnet = tiny_timm["test_vit"], tiny_timm["test_resnet"]
    return {
        "resnet50.a1_in1k": resnet,
        "vit_small_patch16_224.augreg_in21k": vit,
        "bert-base-uncased": tiny_bert,
    }


@pytest.fixture
def fork(forks, folder, tmp_path_factory):
    """Runs a command in a forked process; it must succeed."""

    def run(words, **environment):
        logs = tmp_path_factory.mktemp("logs")
        statuses, printed = forks.command(words, logs, 280, cwd=folder, PATH=PATH, **environment)
        assert statuses == [0], f"{words}\n{printed[-4000:]}"

    return run


def quick(words: list[str]) -> list[str]:
    """Returns a command with one epoch of training, if it trains."""
    recipe = any(word.startswith("recipes/") for word in words) or words[:2] == ["hftl", "run"]
    return [*words, "--train.num_epochs=1"] if recipe and "--help" not in words else words


def without_launcher(words: list[str]) -> list[str]:
    """Returns `python recipes/NAME.py …` for a launched recipe, and any other command as it is."""
    if words[:2] == ["hftl", "run"]:
        return ["python", f"recipes/{words[2]}.py", *words[3:]]
    if words[:2] == ["accelerate", "launch"] and "-m" not in words:
        return ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    return words


@pytest.mark.timeout(1800)  # one process after another
@pytest.mark.parametrize("started", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "started"])
@pytest.mark.parametrize("page", WITH_STEPS)
def test_docs_page_runs_in_order(page, started, folder, stand_ins, fork):
    todo = [(language, step) for language, step in steps(page) if step not in NOT_RUN]
    made = " ".join(step for _, step in todo)
    for name, (recipe, data, model) in PREPARED.items():
        if re.search(rf"{name}(?![\w-])", made) and not re.search(rf"--output_dir {name}(?![\w-])", made):
            flags = ["--data.source", data, "--model.name", stand_ins[model], "--output_dir", name]
            fork(quick(["python", f"recipes/{recipe}.py", *flags]))
    for language, step in todo:
        if language == "python":
            for name, local in stand_ins.items():
                step = step.replace(f'"{name}"', f'"{local}"')
            words, environment = ["python", "-c", step], {}
        else:
            environment, words = parse(step)
            words = quick([stand_ins.get(word, word) for word in words])
        if started:
            start(words, folder, **environment)
        elif not step.startswith(SLOW):
            launched = page == LAUNCHED[0] and step.startswith(LAUNCHED[1])
            fork(words if launched else without_launcher(words), **environment)
