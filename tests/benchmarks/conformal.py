"""False alarms and power of thresholds from the fit set, a held-out part, and leave-one-out.

    python tests/benchmarks/conformal.py [--splits 200] [--alpha 0.05]

scikit-learn's digits, 1797 images of 8 × 8, behind a fixed random ReLU layer, which no image has
shaped. Classes 8 and 9 are the intruders. Each split deals the images of the other classes out to
1000 that one has and some 440 new ones. ``fit set`` fits and calibrates on the 1000; ``split``
fits on 700 and calibrates on 300; ``leave-one-out`` fits on the 1000 and calibrates by
``leave_one_out`` of the same. Given: false alarms on the new images, and share of the intruders
found, mean over splits and its standard error, and the standard deviation of false alarms between
splits.

The second table has a threshold per predicted class, by the nearest class mean, at twice alpha
(some 37 held-out images a class): false alarms in the class where they are most and least frequent
(mean over splits, class by class).
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor

from ncmethods import ood
from ncmethods.features import FeatureSet

HAD, FITTED = 1000, 700


def digits(units: int) -> tuple[Tensor, Tensor]:
    """Features [1797, units] in float64 and labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rng = torch.Generator().manual_seed(0)
    layer = torch.randn(64, units, generator=rng, dtype=torch.float64) / 8
    return (torch.from_numpy(x) / 16 @ layer).relu(), torch.from_numpy(y)


def thresholds(
    cls: type[ood.Mahalanobis], x: Tensor, y: Tensor, alpha: float
) -> dict[str, tuple[ood.Mahalanobis, ood.Threshold]]:
    """A scorer and its threshold by each way, from the 1000 samples that one has."""
    whole = FeatureSet(x, y, 8)
    scorer = cls.fit(whole)
    part = cls.fit(FeatureSet(x[:FITTED], y[:FITTED], 8))
    calibration = {
        "fit set": (scorer, scorer(x)),
        "split": (part, part(x[FITTED:])),
        "leave-one-out": (scorer, cls.leave_one_out(whole)),
    }
    return {way: (s, ood.Threshold.fit(t, alpha)) for way, (s, t) in calibration.items()}


def print_row(way: str, alarms: list[float], found: list[float]) -> None:
    """One line of the first table."""
    a, f = torch.tensor(alarms), torch.tensor(found)
    error = len(a) ** -0.5
    print(
        f"  {way:14s} {100 * a.mean():5.2f} ± {100 * a.std() * error:4.2f}   "
        f"{100 * f.mean():5.1f} ± {100 * f.std() * error:4.1f}   "
        f"{100 * a.std():4.1f}"
    )


def by_class(x: Tensor, y: Tensor, intruders: Tensor, splits: int, alpha: float) -> None:
    """The second table: one threshold for all, and one for each predicted class."""
    alarms: dict[str, list[Tensor]] = defaultdict(list)
    found: dict[str, list[float]] = defaultdict(list)
    rng = torch.Generator().manual_seed(1)
    for _ in range(splits):
        order = torch.randperm(len(y), generator=rng)
        fit, held, new = order[:FITTED], order[FITTED:HAD], order[HAD:]
        train = FeatureSet(x[fit], y[fit], 8)
        scorer = ood.Mahalanobis.fit(train)
        means = train.stats.means

        def nearest(h: Tensor, means: Tensor = means) -> Tensor:
            return torch.cdist(h, means).argmin(1)

        scores, groups, guess = scorer(x[held]), nearest(x[held]), nearest(x[new])
        one = ood.Threshold.fit(scores, alpha)
        each = ood.Threshold.fit(scores, alpha, groups=groups, num_groups=8)
        s, out = scorer(x[new]), scorer(intruders)
        flags = {"one threshold": (one(s), one(out))}
        flags["one per class"] = (each(s, guess), each(out, nearest(intruders)))
        for way, (wrong, right) in flags.items():
            hits = torch.zeros(8).index_add_(0, guess, wrong.float())
            alarms[way].append(hits / torch.bincount(guess, minlength=8))
            found[way].append(float(right.double().mean()))
    print(f"\nMahalanobis, 64 units, by predicted class, nominal {100 * alpha:g} %")
    print("  way            most-flagged class  least-flagged class  intruders found")
    for way in alarms:
        rate = 100 * torch.stack(alarms[way]).nanmean(0)
        f = 100 * torch.tensor(found[way]).mean()
        print(f"  {way:14s} {rate.max():12.1f} {rate.min():20.1f} {f:19.1f}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=0.05)
    args = parser.parse_args()
    for units in (64, 256):
        features, labels = digits(units)
        x, y, intruders = features[labels < 8], labels[labels < 8], features[labels >= 8]
        for cls in (ood.Mahalanobis, ood.RelativeMahalanobis):
            alarms: dict[str, list[float]] = defaultdict(list)
            found: dict[str, list[float]] = defaultdict(list)
            rng = torch.Generator().manual_seed(0)
            for _ in range(args.splits):
                order = torch.randperm(len(y), generator=rng)
                had, new = order[:HAD], order[HAD:]
                for way, (scorer, flag) in thresholds(cls, x[had], y[had], args.alpha).items():
                    rate = float(flag(scorer(x[new])).double().mean())
                    alarms[way].append(rate)
                    found[way].append(float(flag(scorer(intruders)).double().mean()))
            print(f"\n{cls.__name__}, {units} units, nominal {100 * args.alpha:g} %")
            print("  threshold      false alarms %   found %       sd of alarms")
            for way in alarms:
                print_row(way, alarms[way], found[way])
        if units == 64:
            by_class(x, y, intruders, args.splits, 2 * args.alpha)


if __name__ == "__main__":
    main()
