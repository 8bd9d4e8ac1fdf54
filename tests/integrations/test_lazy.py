"""The adapters import their libraries only when they are used, and say what to install."""

import subprocess
import sys

import pytest

import ncmethods.integrations

ADAPTERS = ["lightning", "openood", "pytorch_ood", "sklearn", "torchmetrics"]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_the_room_imports_neither():
    heavy = (
        "{'torchmetrics', 'lightning', 'pytorch_lightning', 'pytorch_ood', 'openood', 'sklearn', "
        "'torch'}"
    )
    run(
        "import sys, ncmethods.integrations\n"
        f"assert not {heavy} & set(sys.modules)\n"
        f"assert ncmethods.integrations.__all__ == {ADAPTERS}\n"
    )
    with pytest.raises(AttributeError, match=f"adapters: {', '.join(ADAPTERS)}"):
        ncmethods.integrations.ignite  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - {"sklearn"}))  # that is always there
def test_a_missing_package_is_named(name):
    how = "Jingkang50/OpenOOD" if name == "openood" else f'pip install "ncmethods[{name}]"'
    run(
        "import sys\n"
        "for gone in ('torchmetrics', 'lightning.pytorch', 'pytorch_lightning', 'pytorch_ood'):\n"
        "    sys.modules[gone] = None\n"
        "import ncmethods.integrations as room\n"
        "try:\n"
        f"    room.{name}\n"
        "except ImportError as error:\n"
        f"    assert {how!r} in str(error), error\n"
        "else:\n"
        f"    raise AssertionError({name!r})\n"
    )


def test_the_lightning_in_use_is_the_one_that_is_served():
    pytest.importorskip("pytorch_lightning")
    run(
        "import pytorch_lightning\n"
        "from ncmethods.integrations.lightning import CollapseCallback\n"
        "assert issubclass(CollapseCallback, pytorch_lightning.Callback)\n"
    )
