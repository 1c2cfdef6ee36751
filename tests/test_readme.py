"""The README tells the truth: its commands and its Python run, in order, as printed.

Only hub names are replaced, by local folders of the same kind (there is no hub here), and `uv run` is left out,
because the tests run inside what it would set up. The slow part starts every command by itself; the fast part forks
them from a process that has imported the libraries (tests/forked.py).
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

README = (ROOT / "README.md").read_text()
NOT_RUN = {"pip install uv", "uv run pytest"}  # what these tests stand in
NOT_RUN |= {"hftl demo runs/photos"}  # it serves until it is interrupted; tests/test_demo.py runs it
COMPARE = "hftl compare path/to/images --model resnet50.a1_in1k --methods scratch probe frozen lora full --num_seeds 3"
NOT_RUN |= {COMPARE}  # fifteen trainings; tests/test_compare.py runs smaller ones
QUICKSTART = "uv run hftl quickstart"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


def test_every_command_is_known_to_this_test():
    programs = {shlex.split(command)[0] for command in commands()}
    assert programs == {"pip", "uv", "accelerate", "python", "hftl"}
    assert {*NOT_RUN, QUICKSTART} <= set(commands())


PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": PATH}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize(
    "options", [["--num_seeds", "1"], pytest.param([], marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_quickstart_runs_as_printed(options, tmp_path):
    """One seed of its three in the fast part: the same code, a third of the time."""
    printed = run([*QUICKSTART.removeprefix("uv run ").split(), *options], tmp_path)
    assert "Kept:" in printed and (tmp_path / "runs/quickstart/model/model.safetensors").is_file()
    lines = re.findall(r"^(scratch|frozen|lora|full) +([\d.]+) (?:±|%)", printed, flags=re.MULTILINE)
    accuracy = {method: float(mean) for method, mean in lines}
    assert max(accuracy["frozen"], accuracy["lora"], accuracy["full"]) > accuracy["scratch"]


@pytest.fixture
def place(tmp_path, images, texts):
    """A folder that looks like a checkout with a user's data beside it."""
    for name in ("recipes", "accelerate_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("images", "other/images"):
        shutil.copytree(images, tmp_path / "path/to" / name)
    shutil.copytree(texts, tmp_path / "path/to/tables")
    shutil.copy(next(images.rglob("*.png")), tmp_path / "photo.jpg")
    shutil.copy(texts / "test.csv", tmp_path / "table.csv")
    return tmp_path


@pytest.fixture(params=["forked", pytest.param("started", marks=pytest.mark.slow)])
def perform(request, forks, place, tmp_path_factory):
    """Runs a command line in the folder `place`; it must succeed."""

    def forked(words):
        statuses, said = forks.command(words, tmp_path_factory.mktemp("logs"), 280, cwd=place, PATH=PATH)
        assert statuses == [0], f"{words}\n{said[-4000:]}"

    return {"forked": forked, "started": lambda words: run(words, place)}[request.param]


@pytest.mark.timeout(900)  # twenty processes, one after another
@pytest.mark.parametrize("hub", ["xet"], indirect=True)
def test_the_other_commands_and_the_python_run_as_printed(hub, perform, place, tiny_timm, tiny_bert):
    stand_ins = {"resnet50.a1_in1k": tiny_timm["test_resnet"], "bert-base-uncased": tiny_bert}
    stand_ins |= {"user/photos": "alice/photos", "vit_small_patch16_224.augreg_in21k": tiny_timm["test_vit"]}
    done = 0
    for command in commands():
        if command in NOT_RUN or command == QUICKSTART:
            continue
        words = [stand_ins.get(word, word) for word in shlex.split(command, comments=True)]
        if any(word.startswith("recipes/") for word in words):
            words.append("--train.num_epochs=1")
        if any(word.startswith("path/to/") for word in words) and "launch" in words:
            words.append("--train.batch_size_per_device=8")  # the stand-in data have 36 rows
        perform(words)
        done += 1
    assert done == len(commands()) - len(NOT_RUN) - 1
    assert (place / "predictions.parquet").is_file()
    for code in blocks("python"):
        perform(["python", "-c", code])
