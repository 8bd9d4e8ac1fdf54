"""Our scorers as OpenOOD's postprocessors.

OpenOOD is in no registry: its base class is stood in for by one of the same methods. The adapter
was run once against the real files at Jingkang50/OpenOOD@3c35632 (base_postprocessor.py,
metrics.py): `inference` and `compute_all_metrics` gave the AUROC and FPR95 (OOD positive) of ours.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from ncmethods import heads, ood
from ncmethods._core import InputError
from ncmethods.features import extract


class BasePostprocessor:
    def __init__(self, config):
        self.config = config

    def setup(self, net, id_loader_dict, ood_loader_dict):
        pass

    def postprocess(self, net, data):
        raise NotImplementedError


@pytest.fixture
def openood(monkeypatch):
    stand_in = ModuleType("openood.postprocessors")
    stand_in.BasePostprocessor = BasePostprocessor
    monkeypatch.setitem(sys.modules, "openood", ModuleType("openood"))
    monkeypatch.setitem(sys.modules, "openood.postprocessors", stand_in)
    monkeypatch.delitem(sys.modules, "ncmethods.integrations.openood", raising=False)
    import ncmethods.integrations as room

    yield room.openood
    sys.modules.pop("ncmethods.integrations.openood", None)
    vars(room).pop("openood", None)


@pytest.mark.parametrize("kind", ["linear", "etf"])
def test_confidence_and_prediction(openood, kind):
    torch.manual_seed(0)
    body, x = nn.Sequential(nn.Flatten(), nn.Linear(27, 12), nn.ReLU()), torch.randn(40, 3, 3, 3)
    if kind == "etf":
        net = heads.Classifier(body, heads.etf_head(12, 4)).eval()
        head = net.head
    else:
        net = nn.Sequential(body, nn.Linear(12, 4)).eval()
        head = net[1]
    train = extract(net, [(x, torch.arange(40) % 4)])
    for scorer in (ood.MSP.fit(train, head=head), ood.Mahalanobis.fit(train, shrinkage=0.5)):
        adapter = openood.Postprocessor(scorer)
        assert isinstance(adapter, BasePostprocessor)
        assert adapter.APS_mode is False  # its Evaluator reads it
        classes, confidence = adapter.postprocess(net, x)
        torch.testing.assert_close(confidence, -scorer(train.features, train.logits))
        assert torch.equal(classes, train.logits.argmax(1))
        assert not confidence.requires_grad


def test_refuses_what_is_not_fitted(openood):
    with pytest.raises(InputError, match="Pass a fitted scorer, got type"):
        openood.Postprocessor(ood.MSP)
