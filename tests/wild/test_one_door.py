"""What is dangerous with files of strangers happens in one module each. Runs nothing."""

import ast

import pytest
from conftest import REPOSITORY

SOURCES = sorted([*(REPOSITORY / "ud2m").rglob("*.py"), *(REPOSITORY / "data_prep").glob("*.py")])
CONVERTER = "data_prep/convert_prior.py"
DOORS = {
    "Image.open": {"ud2m/raster.py"},
    "np.load": set(),
    "numpy.load": set(),
    "format.read_array": {"ud2m/raster.py"},
    "torch.load": {"ud2m/files.py", CONVERTER},
    "json.loads": {"ud2m/files.py"},
    "OmegaConf.load": {"ud2m/cli/train.py", "ud2m/cli/sweep.py"},
    "instantiate": set(),
    "utils.instantiate": set(),
    "utils.call": set(),
    "utils.get_object": set(),
    "utils.get_class": set(),
    "utils.get_method": set(),
    "import_module": {"ud2m/cli/objects.py"},
    "importlib.import_module": set(),
    "subprocess.run": {"ud2m/data/remote.py"},
    "subprocess.Popen": set(),
    "os.system": set(),
    "os.popen": set(),
    "gopen": {"ud2m/data/remote.py"},
    "tar.extractall": set(),
    "tar.extract": set(),
    "pickle.load": set(),
    "shutil.unpack_archive": set(),
    "yaml.load": set(),
}
ELSEWHERE = {
    # what this program has written itself
    ("OmegaConf.load", "ud2m/cli/models.py"),
    ("json.loads", "ud2m/cli/sweep.py"),
    ("json.loads", "ud2m/training/pruning.py"),
    ("json.loads", "ud2m/evaluation/cells.py"),
    ("json.loads", "ud2m/samplers/export.py"),
    ("json.loads", CONVERTER),
}


def called(path):
    """Yield the last two names of everything that a file calls, as ``Image.open``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            names, function = [], node.func
            while isinstance(function, ast.Attribute):
                names.append(function.attr)
                function = function.value
            names += [function.id] if isinstance(function, ast.Name) else []
            yield ".".join(reversed(names[:2]))


CALLS = {path.relative_to(REPOSITORY).as_posix(): set(called(path)) for path in SOURCES}


@pytest.mark.parametrize("call", DOORS)
def test_each_call_has_its_door(call):
    users = {path for path, names in CALLS.items() if call in names and (call, path) not in ELSEWHERE}
    assert users == DOORS[call]


def test_the_walk_sees_calls():
    assert "np.load" not in CALLS["ud2m/raster.py"]
    assert {"plain_name", "hashlib.sha256"} <= CALLS["ud2m/data/remote.py"]
