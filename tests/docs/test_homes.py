"""The changes that the how-to pages make to other people's scripts, and what the pages say of them.

The pages' Python runs in test_docs.py. The scripts themselves are not ours to keep; put them into a
folder, at the commits that the pages name, and the slow tests here patch and run them::

    NCMETHODS_SCRIPTS=folder python -m pytest -m slow tests/docs/test_homes.py

The folder holds ``references/classification`` of pytorch/vision and ``train.py`` of
huggingface/pytorch-image-models.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ncmethods import heads

ROOT = Path(__file__).parents[2]
SCRIPTS = os.environ.get("NCMETHODS_SCRIPTS")
K = 6  # the scripts print a top-5 accuracy


def fences(page, language):
    text = (ROOT / "docs" / "howto" / f"{page}.md").read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def blocks(page, *holding):
    """The Python blocks of a page that hold one of these strings."""
    return "\n".join(b for b in fences(page, "python") if any(h in b for h in holding))


@pytest.mark.parametrize("page", ["torchvision-references", "timm"])
def test_diffs_are_whole(page):
    """Two diffs on each page, whose hunks have the lengths that their headers say."""
    diffs = fences(page, "diff")
    assert len(diffs) == 2
    for diff in diffs:
        for head, body in re.findall(r"^@@ (.+) @@\n((?:[-+ ].*\n|\n)+)", diff, re.M):
            old, new = (int(n.split(",")[1]) for n in head.split())
            lines = body.splitlines()
            assert sum(not line.startswith("+") for line in lines) == old
            assert sum(not line.startswith("-") for line in lines) == new


def test_rows_under_the_script_s_average():
    """decay · a + (1 − decay) · w, 10⁵ times at torchvision's decay: what its page prints."""
    rows = heads.etf_head(64, 10, generator=torch.Generator().manual_seed(0)).weight
    averaged, decay = rows.clone(), 0.99998
    for _ in range(100_000):
        averaged = decay * averaged + (1 - decay) * rows
    length = torch.linalg.vector_norm(averaged.double(), dim=1) - 1
    cosine = torch.cosine_similarity(averaged.double(), rows.double())
    assert 5e-5 < length.abs().max() < 5e-4
    assert 1 - cosine.min() < 1e-6
    exact = rows.clone().lerp_(rows, 1 - decay)
    assert torch.equal(exact, rows)


# --- the scripts ----------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """Six classes of coloured 32×32 images: 48 for training, 24 to validate."""
    from torchvision.transforms.functional import to_pil_image

    g = torch.Generator().manual_seed(0)
    for split, n in (("train", 8), ("val", 4)):
        for c in range(K):
            folder = tmp_path / "images" / split / f"c{c}"
            folder.mkdir(parents=True)
            for i in range(n):
                x = torch.randint(0, 80, (3, 32, 32), generator=g)
                x[c % 3] += 80 + 90 * (c > 2)
                to_pil_image(x.to(torch.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def apply(folder, diff, strip):
    command = ["git", "apply", f"-p{strip}", "-"]
    subprocess.run(command, cwd=folder, input=diff, text=True, check=True)


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPTS, reason="NCMETHODS_SCRIPTS is not set")
@pytest.mark.parametrize("loss", ["cross-entropy", "dot regression"])
def test_torchvision(loss, images, tmp_path):
    here = tmp_path / "scripts"
    shutil.copytree(Path(SCRIPTS) / "references" / "classification", here)
    for diff in fences("torchvision-references", "diff")[: 1 if loss == "cross-entropy" else 2]:
        apply(here, diff, 3)
    size = [f"--{s}-size=32" for s in ("val-resize", "val-crop", "train-crop")]
    common = ["--device=cpu", "--data-path", images, "-b8", "-j0", *size, "--lr=0.01"]
    out = run(here, "train.py", *common, "--epochs=4", "--model-ema", "--output-dir=out")
    assert len(re.findall(r"Test:  Acc@1", out)) == 4
    assert len(re.findall(r"Test: EMA Acc@1", out)) == 4
    saved = torch.load(here / "out" / "checkpoint.pth", weights_only=False)
    gram = saved["model"]["fc.weight"].double()
    want = K / (K - 1) * (torch.eye(K, dtype=torch.float64) - 1 / K)
    torch.testing.assert_close(gram @ gram.T, want, rtol=0, atol=1e-6)
    (here / "resume.py").write_text(
        "import runpy\n\nimport torch\n\n" + blocks("torchvision-references", "add_safe_globals")
        + "runpy.run_path('train.py', run_name='__main__')\n"
    )  # fmt: skip
    common += ["--resume=out/checkpoint.pth"]
    assert "Test:  Acc@1" in run(here, "resume.py", *common, "--epochs=5")
    assert "Test:  Acc@1" in run(here, "resume.py", *common, "--test-only")


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPTS, reason="NCMETHODS_SCRIPTS is not set")
@pytest.mark.parametrize("how", ["entry point", "two lines", "dot regression"])
def test_timm(how, images, tmp_path):
    pytest.importorskip("timm")
    here = tmp_path / "scripts"
    here.mkdir()
    shutil.copy(Path(SCRIPTS) / "train.py", here)
    (here / "my_models.py").write_text(blocks("timm", "@register_model", "ClassificationTask"))
    if how != "entry point":
        apply(here, fences("timm", "diff")[how == "dot regression"], 1)
    model = ["resnet18"] if how == "two lines" else ["resnet18_etf", "--device-modules=my_models"]
    common = [images, "--val-split=val", f"--num-classes={K}", "--img-size=32", "-b8", "-j0"]
    common += ["--device=cpu", "--no-prefetcher", "--output=out", "--model", *model]
    run(here, "train.py", *common, "--epochs=1", "--model-ema", "--experiment=a")
    saved = torch.load(here / "out" / "a" / "last.pth.tar", weights_only=False)
    rows = saved["state_dict"]["fc.weight"]
    assert torch.equal(rows, saved["state_dict_ema"]["fc.weight"])
    run(here, "train.py", *common, "--epochs=2", "--experiment=b", "--resume=out/a/last.pth.tar")
    again = torch.load(here / "out" / "b" / "last.pth.tar", weights_only=False)
    assert again["epoch"] == 1
    assert torch.equal(rows, again["state_dict"]["fc.weight"])
