"""What the project promises about its own text: sizes, packages, one shared tail, a README that tells the truth."""
import ast, os, re, subprocess, sys

import pytest

from conftest import ROOT

LINES = {"align.py": 250, "mug.py": 330, "lcl.py": 430, "timix.py": 570, "m3i.py": 485, "common.py": 750, "data.py": 1336, "eval.py": 1630}
SCRIPTS = [name for name in ("align.py", "mug.py", "lcl.py", "timix.py", "m3i.py") if os.path.exists(os.path.join(ROOT, name))]
FILES = [name for name in LINES if os.path.exists(os.path.join(ROOT, name))]


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


@pytest.mark.parametrize("name", FILES)
def test_a_file_stays_a_sitting_long(name):
    lines = read(name).splitlines()
    assert len(lines) <= 1.15 * LINES[name]
    assert max(map(len, lines)) <= 150


@pytest.mark.parametrize("name", FILES + [f"tests/{f}" for f in sorted(os.listdir(os.path.join(ROOT, "tests"))) if f.endswith(".py")])
def test_only_the_five_packages_are_imported(name):
    modules = {(n.module or "").split(".")[0] for n in ast.walk(ast.parse(read(name))) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name.split(".")[0] for n in ast.walk(ast.parse(read(name))) if isinstance(n, ast.Import) for a in n.names}
    ours = {f[:-3] for f in LINES} | {"conftest", "bench", "bench_gradients", "bench_plan"}
    assert modules - set(sys.stdlib_module_names) - ours <= {"torch", "numpy", "PIL", "tqdm", "pytest"}


@pytest.mark.parametrize("name", FILES)
def test_no_file_but_eval_imports_a_method(name):
    imported = {a.name for n in ast.walk(ast.parse(read(name))) if isinstance(n, ast.Import) for a in n.names}
    assert not imported & {s[:-3] for s in SCRIPTS}


def tail(name):
    return re.search(r"# -- the same lines in every script.*?# -- end --", read(name), re.S)[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_tail_of_the_step_loop_is_the_same_in_every_script(name):
    assert tail(name) == tail("align.py")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_reads_in_the_agreed_order(name):
    source = read(name)
    marks = ['"""', "\nimport ", "\nclass Config", "\nDEMO", "(nn.Module)", "\ndef main(cfg)", "\nif __name__"]
    assert [source.index(m) for m in marks] == sorted(source.index(m) for m in marks)
    fields = re.search(r"class Config:\n(.*?)\n\n", source, re.S)[1]
    assert not [line for line in fields.splitlines() if ":" in line.split("#")[0] and "#" not in line]       # every number has an owner


def test_readme_states_the_real_line_counts_and_lists_what_exists():
    rows = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", read("README.md"), re.M))
    assert rows.keys() == set(FILES)
    for name, lines in rows.items():
        assert int(lines) == len(read(name).splitlines()), name


def test_readme_shows_a_command_and_a_table_early_and_the_ci_runs_its_tests():
    lines = read("README.md").splitlines()
    assert next(i for i, line in enumerate(lines) if "python3 -m venv" in line) < 29
    assert next(i for i, line in enumerate(lines) if line.startswith("|")) < 19
    assert sum("-m pytest" in line for line in lines) == 1 and "-m pytest" in read(".ci/run")


def test_readme_names_only_files_and_flags_that_exist():
    text = read("README.md").replace("\\\n", " ")
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert os.path.exists(os.path.join(ROOT, name)), name
    for script in SCRIPTS:
        help_text = subprocess.run([sys.executable, script, "-h"], cwd=ROOT, capture_output=True, text=True).stdout
        for line in re.findall(rf"\b{script} (.*)", text):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line.split(" | ")[0]):
                assert f" {flag} " in help_text or f"{flag}\n" in help_text or f"{flag}," in help_text, (script, flag)


def test_no_machine_path_address_or_leftover_is_committed():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert names
    for name in names:
        text = read(name)
        assert not re.search(r"/root/|/home/|/work/|https?://(?!arxiv)", text) or name == "tests/test_text.py", name
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text) or name == "tests/test_text.py", name
