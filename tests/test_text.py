"""What the project promises about its own text: width, packages, one shared tail, a true README."""
import ast
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT, SCRIPTS

FILES = [f"{name}.py" for name in [*SCRIPTS, "common", "data", "eval"]]
TESTS = [f"tests/{name}" for name in sorted(os.listdir(f"{ROOT}/tests")) if name.endswith(".py")]


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def imported_modules(name):
    modules = set()
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
    return modules


@pytest.mark.parametrize("name", FILES + TESTS)
def test_no_line_is_wider_than_100_columns_and_only_the_five_packages_are_imported(name):
    wide = [i for i, line in enumerate(read(name).splitlines(), 1) if len(line) > 100]
    assert not wide
    ours = {os.path.basename(file).removesuffix(".py") for file in FILES + TESTS}
    foreign = imported_modules(name) - set(sys.stdlib_module_names) - ours
    assert foreign <= {"torch", "numpy", "PIL", "tqdm", "pytest"}


@pytest.mark.parametrize("name", FILES)
def test_no_file_imports_a_script_and_a_script_imports_eval_only_inside_functions(name):
    assert not imported_modules(name) & set(SCRIPTS)  # eval.py finds it by the checkpoint's method
    assert not re.search(r"^(import|from) eval\b", read(name), re.M)


def test_the_end_of_a_training_step_is_the_same_in_every_script():
    tails = set()
    for name in SCRIPTS:
        tails.update(re.findall(r"# -- the same lines.*?# -- end --", read(f"{name}.py"), re.S))
    assert len(tails) == 1


def test_readme_names_only_files_and_flags_that_exist():
    text = read("README.md").replace("\\\n", " ")
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert os.path.exists(os.path.join(ROOT, name)), name
    for script in SCRIPTS:
        lines = re.findall(rf"\b{script}\.py (.*)", text)
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(lines)))
        if not flags:
            continue
        command = [sys.executable, f"{script}.py", "-h"]
        help_text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        for flag in flags:
            assert re.search(rf"{flag}[ ,\n]", help_text), (script, flag)


def test_no_machine_path_address_or_leftover_is_committed():
    command = ["git", "ls-files", "*.py", "*.md", ".ci"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert names
    for name in names:
        if name == "tests/test_text.py" or not os.path.exists(os.path.join(ROOT, name)):
            continue
        text = read(name)
        assert not re.search(r"/root/|/home/|/work/|https?://(?!arxiv|[ab]\.org)", text), name
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), name
