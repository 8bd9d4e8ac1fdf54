"""Every architecture of timm takes a head. Slow: all of them are built, on the meta device.

``python tests/heads/test_sweep_timm.py`` writes docs/swap-table.md.
"""

import collections
import json
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from ncmethods._core import InputError, find_auxiliary, find_heads
from ncmethods.features import capture
from ncmethods.heads import Classifier, etf_head, swap_head
from ncmethods.heads.swap import widths

PAGE = Path(__file__).parents[2] / "docs" / "swap-table.md"
OLD, NEW = 10, 7
NONE, TOKENS = "no classifier", "classifier before pooling"
REASONS = {  # and what to do
    NONE: (
        f"an encoder: with `num_classes={OLD}` it has no classifier, so there is no `name=` either",
        "`heads.Classifier(backbone, head)`, with a backbone that pools",
    ),
    TOKENS: (
        "the classifier acts on every token and the model takes the first of its logits; "
        "`swap_head` works, `capture` sees tokens [N, T, D]",
        "`heads.Classifier.from_model`, which pools first",
    ),
}


class Row(NamedTuple):
    """What became of one architecture."""

    family: str  # the file in timm.models
    result: str  # "swapped", or the reason why not
    heads: list[str]  # classifiers that were swapped together
    linear: list[str]  # auxiliary classifiers
    convolution: bool
    seconds: float  # of processor time


def classifiers(net):
    """Layers of the classifier, by timm's own account, with as many outputs as it was built for."""
    own = net.get_classifier() if hasattr(net, "get_classifier") else None
    own = own if isinstance(own, tuple) else (own,)
    layers = [m for part in own if part is not None for m in part.modules()]
    return [m for m in layers if isinstance(m, (nn.Linear, nn.Conv2d)) and widths(m)[1] == OLD]


def check(name):
    """Swap, capture and split one architecture with K 10 → 7, with forward passes."""
    import timm

    start = time.process_time()
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False, num_classes=OLD).eval()
    x = torch.zeros(1, *net.pretrained_cfg.get("input_size", (3, 224, 224)), device="meta")
    family = type(net).__module__.rpartition(".")[2]
    heads, linear, conv = [], [], False
    try:
        assert classifiers(net), NONE
        found = find_heads(net)
        heads, linear = [f.name for f in found], [f.name for _, f in find_auxiliary(net)]
        conv, width = isinstance(found[0].module, nn.Conv2d), [widths(f.module)[0] for f in found]
        assert swap_head(net, etf_head, num_classes=NEW) is net
        assert [f.name for f in find_heads(net)] == heads, "the new heads are not found"
        assert not classifiers(net), "a classifier kept its number of classes"
        net.to("meta")  # the frame is real
        with torch.no_grad(), capture(net) as seen:
            assert net(x).shape == (1, NEW), "the logits have another shape"
        tokens = seen.features.ndim == 3
        assert seen.features.shape == (1, *seen.features.shape[1:-1], width[0]), "capture's shape"
        model = Classifier.from_model(net, etf_head).eval().to("meta")
        with torch.no_grad():
            out = model(x)
        assert out.features.shape == (1, sum(width)), "the Classifier has another width"
        assert out.logits.shape == (1, NEW), "the Classifier has another number of classes"
        result = TOKENS if tokens else "swapped"
    except (AssertionError, InputError, RuntimeError, TypeError, AttributeError) as error:
        result = (str(error) or type(error).__name__).splitlines()[0][:200]
    return Row(family, result, heads, linear, conv, time.process_time() - start)


def sweep(names, log=None):
    rows = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        for name in names:
            rows[name] = check(name)
            if log:
                print(json.dumps([name, rows[name]]), file=log, flush=True)
    return rows


KINDS = {  # classifiers that are not one nn.Linear behind the pooling
    "deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "levit_128s": ["head.linear", "head_dist.linear"],
    "crossvit_tiny_240": ["head.1", "head.0"],
    "efficientvim_m1": ["heads.3", "heads.0", "heads.1", "heads.2"],
    "caformer_s18": ["head.fc.fc2"],
    "dla34": ["fc"],
    "dpn48b": ["classifier"],
    "resnetv2_18": ["head.fc"],
    "resnet50_clip": ["head.proj"],
    "volo_d1_224": ["head"],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_classifier(name):
    pytest.importorskip("timm")
    (row,) = sweep([name]).values()
    assert row.heads == KINDS[name]
    assert row.result == (TOKENS if "clip" in name else "swapped")
    assert row.linear == (["aux_head"] if "volo" in name else [])
    assert row.convolution == (name in ("dla34", "dpn48b", "resnetv2_18"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_auxiliary_classifier_on_tokens():
    """VOLO adds half the maximum over tokens of its auxiliary classifier's logits."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net, x = timm.create_model("volo_d1_224", num_classes=OLD), torch.zeros(2, 3, 224, 224)
    swap_head(net, etf_head, num_classes=NEW)
    assert widths(net.aux_head)[1] == net.num_classes == NEW
    swap_head(net, etf_head, auxiliary=True).to("meta")
    assert net(x).shape == (2, NEW)
    with pytest.warns(UserWarning, match="VOLO adds the logits of an auxiliary classifier"):
        model = Classifier.from_model(timm.create_model("volo_d1_224", num_classes=OLD))
    assert model.backbone.aux_head is None


@pytest.mark.slow
def test_every_architecture_of_timm():
    timm = pytest.importorskip("timm")
    rows = sweep(timm.list_models())
    left = {name: row.result for name, row in rows.items() if row.result != "swapped"}
    assert len(left) <= 0.05 * len(rows), left
    assert {*left.values()} <= {*REASONS}, left


# --- the page -----------------------------------------------------------------------------------


def page(rows):
    """docs/swap-table.md from the results of a sweep."""
    import timm

    done = sum(row.result == "swapped" for row in rows.values())
    minutes = sum(row.seconds for row in rows.values()) / 60
    families = collections.defaultdict(dict)
    for name, row in rows.items():
        families[row.family][name] = row
    lines = [
        "# Architectures of timm that take a head",
        "",
        f"timm {timm.__version__}, torch {torch.__version__.split('+')[0]}: `heads.swap_head` put "
        f"an ETF head into **{done} of the {len(rows)} architectures** of `timm.list_models()`, "
        f"all of which build on the meta device with `num_classes={OLD}`. In each of them the "
        f"classifier was found without `name=` and replaced by one with {NEW} classes; then the "
        "model, `capture` and `Classifier.from_model` gave outputs of the right shape, and timm's "
        "`get_classifier()` held no layer with the old number of classes. The sweep takes "
        f"{minutes:.0f} minutes of processor time.",
        "",
        "```bash",
        "python tests/heads/test_sweep_timm.py   # writes this page",
        "```",
        "",
        "## Exceptions",
        "",
        "| architecture | reason | what to do |",
        "|---|---|---|",
    ]
    for name, row in rows.items():
        if row.result != "swapped":
            reason, instead = REASONS.get(row.result, (row.result, "`name=`"))
            lines.append(f"| `{name}` | {reason} | {instead} |")
    lines += [
        "",
        "## Families",
        "",
        "A family is a file of `timm.models`. Classifiers joined by + are averaged by the model "
        "and swapped together. Conv: a 1×1 convolution. Auxiliary classifiers stay linear unless "
        "`auxiliary=True`.",
        "",
        "| family | architectures | swapped | classifier (its `name=`) |",
        "|---|---|---|---|",
    ]
    for family, members in sorted(families.items()):
        kinds = dict.fromkeys(
            " + ".join(f"`{h!r}`" for h in row.heads)
            + (" (conv)" if row.convolution else "")
            + "".join(f", auxiliary `{a!r}`" for a in row.linear)
            for row in members.values()
            if row.heads
        )
        swapped = sum(row.result == "swapped" for row in members.values())
        lines.append(f"| {family} | {len(members)} | {swapped} | {'; '.join(kinds) or '—'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import timm

    results = sweep(timm.list_models(), sys.stderr)
    PAGE.write_text(page(results), encoding="utf-8")
