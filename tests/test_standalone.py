"""Tests that a model file is all one needs to copy. Oracles: the files' own syntax trees; a fresh interpreter in a
folder that holds nothing but one of them."""
import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("draem", "dsr", "dfm")
OWN = {path.stem for folder in (ROOT, ROOT / "tests") for path in folder.glob("*.py")}
PACKAGES = {"torch", "numpy", "PIL", "pytest"}
MARK = "# Copied from "

WORK = {  # what each file does on its own
    "draem": """
import torch
from draem import DraemModel, draem_loss, rotate_normals, synthesize_anomalies
generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)
normal = torch.rand(4, 3, 32, 32)
augmented, mask = synthesize_anomalies(rotate_normals(normal, generator), torch.rand(4, 3, 32, 32), generator)
model = DraemModel(4, sspcab=True)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
before = [p.clone() for p in model.parameters()]
cost = model(augmented) and model.reconstructive_subnetwork.encoder.block5.cost
sum(draem_loss(normal, *model(augmented), mask, cost).values()).backward()
optimizer.step()
assert any((a != b).any() for a, b in zip(before, model.parameters()))
score, anomaly_map = model.eval().predict(normal)
""",
    "dsr": """
import torch
from dsr import DsrModel, detection_loss
generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)
normal = torch.rand(4, 3, 64, 64)
model = DsrModel(embedding_dim=8, num_embeddings=64, num_hiddens=8, num_residual_layers=1, num_residual_hiddens=4,
                 base_width=4)
parameters = model.train_stage(2)
optimizer = torch.optim.Adam(parameters, 1e-3)
before = [p.clone() for p in parameters]
simulated = model.simulate(normal, generator, normal_share=0.0)
sum(detection_loss(normal, simulated, *model.detect(simulated.lo, simulated.hi)).values()).backward()
optimizer.step()
assert any((a != b).any() for a, b in zip(before, parameters))
score, anomaly_map = model.eval().predict(normal)
""",
    "dfm": """
import torch
from dfm import DFMModel
generator = torch.Generator().manual_seed(0)
model = DFMModel("resnet18", "layer1", pre_trained=False)
features = torch.randn(30, 16, 4, 4, generator=generator)
score, grid = model.fit(features).score_features(features)
assert score.shape == (30,) and grid.shape == (30, 4, 4) and score.isfinite().all()
normal = torch.rand(4, 3, 32, 32, generator=generator)
score, anomaly_map = model.fit(model.features(normal)).predict(normal)
""",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_works_alone_in_an_empty_folder(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import {name}
{WORK[name]}
assert score.shape == (4,) and anomaly_map.shape == (4, *normal.shape[2:])
assert score.isfinite().all() and anomaly_map.isfinite().all()
found = sorted({OWN | {"PIL", "pytest"}!r} & set(sys.modules) - {{{name!r}}})
assert not found, found
assert {name}.__file__ == {str(tmp_path / (name + ".py"))!r}
"""
    result = subprocess.run([sys.executable, "-I", "-W", "error", "-c", code], cwd=tmp_path, capture_output=True,
                            text=True, timeout=100)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def imported(tree: ast.AST) -> set[str]:
    """The packages that a file imports, at the top or anywhere else, importorskip and importlib included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
                "__import__", "import_module", "importorskip"):
            names |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return {name if name.startswith(".") else name.split(".")[0] for name in names}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_packages():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")):
        allowed = sys.stdlib_module_names | PACKAGES | OWN
        assert imported(parse(path)) <= allowed, path
    for name in MODELS:
        assert imported(parse(ROOT / f"{name}.py")) <= sys.stdlib_module_names | {"torch"}, name
    assert imported(parse(ROOT / "common.py")).isdisjoint({*MODELS, "train"})
    hidden = 'import a.b\ndef f():\n    from c import d\n    pytest.importorskip("e")\n    from . import g\n'
    assert imported(ast.parse(hidden)) == {"a", "c", "e", "."}


def test_nothing_runs_on_import():
    for name in MODELS:
        for place, node in enumerate(parse(ROOT / f"{name}.py").body):
            docstring = place == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert docstring or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign,
                                                  ast.AnnAssign)), (name, node.lineno)


# ---------------------------------------------------------------------------------------------------------------------
# Copies


def definitions(source: str) -> dict[str, tuple[str, str, ast.AST]]:
    """Each top-level function and class: the line above it, its text, its tree."""
    lines, found = source.split("\n"), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            start = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
            found[node.name] = lines[start - 2] if start > 1 else "", "\n".join(lines[start - 1:node.end_lineno]), node
    return found


class Anonymous(ast.NodeTransformer):
    """Numbers a definition's own names in the order of their appearance and drops docstrings and type hints."""

    def __init__(self, own: set[str]):
        self.own, self.numbers = own, {}

    def number(self, name: str) -> str:
        return str(self.numbers.setdefault(name, len(self.numbers))) if name in self.own else name

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            node.name = self.number(node.name)
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(node.body) > 1:
                del node.body[0]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.arg, node.annotation = self.number(node.arg), None
        if isinstance(node, ast.Name):
            node.id = self.number(node.id)
        return super().visit(node)


def shape(text: str) -> tuple[int, str]:
    """A definition's number of statements, docstrings apart, and its code with its own names left out."""
    tree = ast.parse(text)
    own = {tree.body[0].name} | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    tree = Anonymous(own).visit(tree)
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - 1, ast.dump(tree)


def faults(sources: dict[str, str]) -> list[str]:
    """Marked copies that differ from their originals, and twins and namesakes that bear no mark."""
    found, files = [], {name: definitions(source) for name, source in sources.items()}
    for name, source in sources.items():
        marks = [line for line in source.split("\n") if "copied from" in line.lower() and line.startswith("#")]
        used = [above for above, _, _ in files[name].values() if above.startswith(MARK)]
        found += [f"{name}: {line!r} is above no definition" for line in marks if line not in used]
        for key, (above, text, _) in files[name].items():
            if above.startswith(MARK):
                file, _, original = above.removeprefix(MARK).partition(".")
                if original not in files.get(file, {}):
                    found.append(f"{name}.{key}: there is no {file}.{original}")
                elif text != files[file][original][1] or key != original:
                    found.append(f"{name}.{key} differs from {file}.{original}")
                elif files[file][original][0].startswith(MARK):
                    found.append(f"{name}.{key} is marked as the copy of a copy")
    seen = [(name, key, above, *shape(text)) for name in files for key, (above, text, _) in files[name].items()]
    for i, (name, key, above, statements, code) in enumerate(seen):
        for other, twin, above_twin, _, twins_code in seen[:i]:
            alike = key == twin or (statements > 3 and code == twins_code)
            marked = above == f"{MARK}{other}.{twin}" or above_twin == f"{MARK}{name}.{key}" or (
                above.startswith(MARK) and above == above_twin)
            if other != name and alike and not marked:
                found.append(f"{name}.{key} is {other}.{twin} without a mark")
    return found


def test_copies_equal_their_originals():
    sources = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in MODELS}
    assert faults(sources) == []
    assert sum(source.count("\n" + MARK) for source in sources.values()) > 0


ORIGINAL = '''
def f(x: int, y: int = 2) -> int:
    """What it does."""
    z = x + y
    for i in range(z):
        z += g(i)
    return z
'''


@pytest.mark.parametrize("copy, words", [
    (MARK + "a.f" + ORIGINAL, None),
    ("def h(x):\n    return 1\n", None),
    (ORIGINAL, "b.f is a.f without a mark"),
    (ORIGINAL.replace(" f(", " twin(").replace("z", "total").replace("What it", "It"), "b.twin is a.f without a mark"),
    (ORIGINAL.replace(" f(", " h(").replace("g(i)", "h(i)"), None),  # other code
    (MARK + "a.f" + ORIGINAL.replace("z + ", "z  + ").replace("x + y", "x +  y"), "b.f differs from a.f"),
    (MARK + "a.f" + ORIGINAL.replace("What", "Say what"), "b.f differs from a.f"),
    (MARK + "a.f" + ORIGINAL.replace(" f(", " k("), "b.k differs from a.f"),
    (MARK + "a.h" + ORIGINAL.replace(" f(", " h(").replace("+=", "-="), "there is no a.h"),
    (MARK + "a.f\n" + ORIGINAL.replace(" f(", " h(").replace("+=", "-="), "is above no definition"),
], ids=range(10))
def test_the_rule_for_copies_bites(copy, words):
    found = faults({"a": ORIGINAL, "b": copy})
    assert (found == []) if words is None else any(words in fault for fault in found), found
