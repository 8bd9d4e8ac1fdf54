"""The adapters import their libraries only when they are used, and say what to install."""

import subprocess
import sys

import pytest

import ncmethods.integrations


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_the_room_imports_neither():
    heavy = "{'torchmetrics', 'lightning', 'pytorch_lightning', 'pytorch_ood', 'torch'}"
    run(
        "import sys, ncmethods.integrations\n"
        f"assert not {heavy} & set(sys.modules)\n"
        "assert ncmethods.integrations.__all__ == ['lightning', 'pytorch_ood', 'torchmetrics']\n"
    )
    with pytest.raises(AttributeError, match="adapters: lightning, pytorch_ood, torchmetrics"):
        ncmethods.integrations.ignite  # noqa: B018


def test_a_missing_package_is_named():
    run(
        "import sys\n"
        "for name in ('torchmetrics', 'lightning.pytorch', 'pytorch_lightning', 'pytorch_ood'):\n"
        "    sys.modules[name] = None\n"
        "import ncmethods.integrations as room\n"
        "for name in room.__all__:\n"
        "    try:\n"
        "        getattr(room, name)\n"
        "    except ImportError as error:\n"
        "        assert f'pip install \"ncmethods[{name}]\"' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(name)\n"
    )


def test_the_lightning_in_use_is_the_one_that_is_served():
    pytest.importorskip("pytorch_lightning")
    run(
        "import pytorch_lightning\n"
        "from ncmethods.integrations.lightning import CollapseCallback\n"
        "assert issubclass(CollapseCallback, pytorch_lightning.Callback)\n"
    )
