"""CachedRun: the features of a finished run, extracted once, and other classifiers on them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncmethods._core import CheckpointError, InputError, atomic_path, write_text
from ncmethods.data import (
    DeviceLoader,
    ImageData,
    TailConfig,
    class_counts,
    leave_out,
    load,
    long_tail_indices,
    reorder,
)
from ncmethods.features import FeatureSet, extract
from ncmethods.stats import nth_of_class
from ncmethods.tracking import read_rows
from ncmethods.training.evaluate import Evaluation
from ncmethods.training.loop import _finite
from ncmethods.training.runs import load_run, read_json

__all__ = ["CachedRun", "check_one_method"]


class CachedRun:
    """A finished run of :func:`ncmethods.training.fit` whose backbone stays as it is.

    Its features are extracted once, in eval mode without augmentation, and kept as safetensors.

    Args:
        place: the run directory.
        store: where features are kept, in a directory that names the seed and the weights.
        device: where the backbone runs.
        root: where the dataset's files are, if not in the usual places.

    Raises:
        CheckpointError: not a run directory, or the run has not finished.
    """

    def __init__(
        self,
        place: str | os.PathLike[str],
        store: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.place, self.device = Path(place), torch.device(device)
        self.root = None if root is None else Path(root)
        run = load_run(self.place)
        self.model, self.config = run.model, run.config
        self.seed: int = self.config["seed"]
        self.data: dict[str, Any] = self.config["data"]
        content = (self.place / "weights.safetensors").read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        self._store = Path(store) / f"seed{self.seed}-{self.digest[:12]}"
        self._held: dict[str, FeatureSet] = {}  # read once, for all methods

    @property
    def method(self) -> str:
        """What the run was trained with, by name."""
        return str(self.config["method"])

    @property
    def counts(self) -> Tensor:
        """Training images per class, int64 [K]."""
        return torch.tensor(self.data["counts"])

    def rows(self) -> list[dict[str, Any]]:
        """Of its metrics.jsonl: the last one measures its own classifier."""
        return _rows(self.place / "metrics.jsonl")

    def features(self, split: str) -> FeatureSet:
        """Features, labels and logits of its images, on the CPU.

        Args:
            split: ``"train"``, ``"test"``, or ``"validation"`` where the run's data set some aside.

        Raises:
            DataError: the dataset is missing or damaged.
            InputError: it is not the one that the run was trained on.
        """
        if split not in self._held:
            path = self._store / f"{split}.safetensors"
            found = FeatureSet.load(path) if path.exists() else self._extract(split, path)
            self._held[split] = found
        return self._held[split]

    def images(self, name: str, images: Tensor) -> FeatureSet:
        """Features and logits of other images, kept under ``name``; they have no labels.

        Args:
            name: of the file.
            images: uint8 [N, C, H, W] in the shape that the run was trained on.
        """
        path = self._store / f"{name.replace('/', '_')}.safetensors"
        if path.exists():
            return FeatureSet.load(path)
        classes = tuple(self.data["classes"])
        anyhow = torch.zeros(len(images), dtype=torch.int64)
        return self._save(ImageData(images, anyhow, classes), path, labelled=False)

    def unseen(self, per_class: int) -> FeatureSet | None:
        """Features of images of the dataset's training set that the tail has left out.

        They are what the tail would have drawn next. Neither backbone nor head was trained on them,
        so a hyperparameter can be chosen on them; the test images stay out of it.

        Args:
            per_class: images of each class, at most.

        Returns:
            None where the tail left no image of some class.
        """
        path = self._store / f"unseen-{per_class}.safetensors"
        if path.exists():
            return FeatureSet.load(path)
        about, seen = self.data, self.counts
        whole = load(about["name"], self.root, size=about["size"]).train
        if about.get("without"):
            whole = leave_out(whole, about["without"])
        order = [whole.classes.index(name) for name in about["classes"]]
        images = reorder(whole, order)
        more = (seen + per_class).minimum(class_counts(images))
        if bool((more <= seen).any()):
            return None
        drawn = long_tail_indices(images.labels, more.tolist(), seed=about["seed"])
        labels = images.labels[drawn]
        new = images.subset(drawn[nth_of_class(labels) >= seen[labels]])
        return self._save(new, path)

    def calibration(self) -> tuple[FeatureSet, FeatureSet, str]:
        """Features to calibrate on, which the network has not seen, features to test on, a note.

        The first that there are of: images that the data set aside (``validation``); images that
        the tail left out, half as many per class as there are to test; half of the test images, of
        which the note speaks.
        """
        test = self.features("test")
        if self.data.get("validation"):
            return self.features("validation"), test, ""
        per_class = max(1, len(test) // test.num_classes // 2)
        unseen = self.unseen(per_class)
        if unseen is not None:
            return unseen, test, ""
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(self.seed))
        held_out, rest = (test.subset(rows) for rows in order.chunk(2))
        return held_out, rest, "half of the test images calibrate, the others test"

    def _extract(self, split: str, path: Path) -> FeatureSet:
        about = self.data
        names = {f.name for f in fields(TailConfig)} - {"root", "groups"}
        tail = TailConfig(**{k: v for k, v in about.items() if k in names}, root=self.root)
        splits = tail.load()
        if class_counts(splits.train).tolist() != about["counts"] or (
            list(splits.train.classes) != about["classes"]
        ):
            raise InputError(
                f"{about['name']} gives other images than those that {self.place} was trained on. "
                "Name the directory of its files with root."
            )
        part = getattr(splits, split)
        if part is None:
            raise InputError(f"{self.place} set no {split} images aside.")
        return self._save(part, path)

    def _save(self, images: ImageData, path: Path, *, labelled: bool = True) -> FeatureSet:
        mean, std = self.data["mean"], self.data["std"]
        loader = DeviceLoader(images, 256, train=False, mean=mean, std=std, device=self.device)
        found = extract(self.model.to(self.device), loader, len(self.counts), progress=False)
        self.model.cpu()
        found = found if labelled else replace(found, labels=None)
        found.save(path)
        return found

    # --- classifiers on the features -------------------------------------------------------------

    def finished(
        self, out: Path, name: str, settings: Mapping[str, Any]
    ) -> list[dict[str, Any]] | None:
        """Rows of the result ``OUT/<name>/seed<k>``, None where there is none yet.

        Raises:
            CheckpointError: it holds the result of another run or of other settings.
        """
        place = out / name / f"seed{self.seed}"
        if not (place / "metrics.jsonl").exists():
            return None
        if read_json(place / "config.json") != json.loads(json.dumps(self._record(name, settings))):
            raise CheckpointError(
                f"{place} holds the result of another run or of other settings. "
                "Choose another --out, or repeat the command that began it."
            )
        return _rows(place / "metrics.jsonl")

    def finish(
        self,
        out: Path,
        name: str,
        head: nn.Linear,
        settings: Mapping[str, Any],
        extra: Mapping[str, float] | None = None,
    ) -> list[dict[str, Any]]:
        """Measure ``head`` on the features and write ``OUT/<name>/seed<k>``; returns its row.

        The directory reads like that of a run. Where the features are the backbone's output (a
        plain ``nn.Linear``, or a head without a neck), ``load_run`` gives the backbone with the
        new classifier; elsewhere only ``head.safetensors`` is written.

        Args:
            out: of the comparison.
            name: of the method.
            head: features → logits.
            settings: how it was made, as JSON keeps them; kept in config.json.
            extra: further entries of the row.
        """
        from safetensors.torch import save

        place, head = out / name / f"seed{self.seed}", head.cpu().requires_grad_(False)
        train, test = (
            replace(rows, logits=head(rows.features))
            for rows in (self.features("train"), self.features("test"))
        )
        groups: dict[str, Sequence[int]] = self.data["groups"]
        measured = Evaluation(train, test, head)
        row = measured.row(self.counts, groups, list(groups.values())[-1] or None)
        files = {"head": head.state_dict(), "evaluation": measured.tensors()}
        if self._whole:
            backbone = self.model.backbone.state_dict()
            bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
            files["weights"] = {f"backbone.{k}": v for k, v in backbone.items()} | {
                "head.weight": head.weight,
                "head.bias": bias,
            }
        for title, tensors in files.items():
            with atomic_path(place / f"{title}.safetensors") as temporary:
                temporary.write_bytes(save({k: v.clone() for k, v in tensors.items()}))
        record = json.dumps(self._record(name, settings), indent=1)
        write_text(place / "config.json", record + "\n")
        whole = {"epoch": self.config["train"]["epochs"], **row, **(extra or {})}
        # The last file: now it is finished.
        write_text(place / "metrics.jsonl", json.dumps(_finite(whole)) + "\n")
        return _rows(place / "metrics.jsonl")

    @property
    def _whole(self) -> bool:
        """Whether the features are what the backbone gives, without a neck between."""
        head = self.model.head
        neck = getattr(head, "neck", None)
        return isinstance(head, nn.Linear) or isinstance(neck, nn.Identity)

    def _record(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        origin = {"method": self.method, "weights": self.digest}
        record = self.config | {"method": name, "stage_one": origin, "stage_two": dict(settings)}
        if self._whole:
            record["model"] = self.config["model"] | {"head": "linear", "head_args": {}}
        return record


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(read_rows(path))


def check_one_method(runs: Sequence[CachedRun]) -> None:
    """Raise unless the runs are seeds of one method, model and kind of data.

    Raises:
        InputError: no run, runs that differ, or one seed twice.
    """
    if not runs:
        raise InputError("Name at least one run directory, OUT/<method>/seed<k>.")
    flat = [
        {"method": run.method}
        | {f"model.{k}": v for k, v in run.config["model"].items()}
        | {f"data.{k}": v for k, v in run.data.items() if k not in ("seed", "mean", "std")}
        for run in runs
    ]
    for run, other in zip(runs, flat):
        differ = [k for k in flat[0].keys() | other.keys() if flat[0].get(k) != other.get(k)]
        if differ:
            shown = "; ".join(
                f"{k}: {flat[0].get(k)!r} and {other.get(k)!r}" for k in sorted(differ)[:3]
            )
            raise InputError(
                f"{runs[0].place} and {run.place} are not seeds of one method on one kind of data "
                f"({shown}). Give each its own command and --out."
            )
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"Each seed may come once, got runs of the seeds {seeds}.")
