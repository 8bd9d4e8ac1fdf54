"""Score image files: which of them should nobody trust?

    ncmethods score --run runs/ood/ce/seed0 --images folder/
    ncmethods score --run runs/ood/ce/seed0 --images files.txt --scorer neco --out scores.jsonl

Fits a scorer on the training images of a finished run and a threshold on images that its network
has not seen, then reads the files one batch after the other: a million of them take no more memory
than a thousand. Each row of OUT says path, score, p-value, flag and predicted class; a file that
cannot be read gets a row that says why. Beside OUT lies a sheet of the most suspicious images. Rows
go to OUT.part until all are there; the same command goes on where it was stopped.

What is promised, and what is not: docs/methods/threshold.md.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncmethods import ood, training, viz
from ncmethods._core import InputError, check_choice
from ncmethods.data.folders import images_below, read_square, reason
from ncmethods.training import CachedRun

Row = dict[str, Any]
FIELDS = ("path", "score", "p_value", "flag", "label", "note")


@dataclass(frozen=True)
class Score:
    """Score a folder of images with a finished run: which ones should nobody trust?"""

    run: Path
    """Run directory OUT/<method>/seed<k> of long-tailed, compare-heads or ood."""
    images: Path
    """A folder, searched with all below it, or a text file with one path per line."""
    scorer: str = "relative"
    """By name, as neco, knn or mahalanobis++; `ncmethods ood` compares them on your data."""
    alpha: float = 0.05
    """Share of images like the training images that may be flagged by mistake."""
    per_class: bool = False
    """A threshold for each predicted class, so that no class pays for the others."""
    out: Path = Path("scores.csv")
    """A .csv file, or .jsonl with one JSON object per line."""
    sheet: int = 30
    """Images on the sheet OUT.png, the most suspicious first; 0 for none."""
    features: Path = Path("runs/score/features")
    """Where the features of the run are kept for the next time."""
    batch_size: int = 256
    """Files per step."""
    root: Path | None = None
    """Where the run's dataset is, if not in the usual places."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


def detector(config: Score, device: torch.device) -> ood.Detector:
    """The run's model with a fitted scorer and a calibrated threshold."""
    run = CachedRun(config.run, config.features, device=device, root=config.root)
    held_out, _, note = run.calibration()
    if note:
        print(f"{config.run}: {note}", file=sys.stderr)
    scorer = ood.fit(config.scorer, run.features("train"), run.model.head)
    shape = run.data["image_shape"]
    found = ood.Detector(
        run.model.to(device),
        scorer,
        mean=run.data["mean"],
        std=run.data["std"],
        size=shape[1:],
        classes=run.data["classes"],
    )
    by = "predicted class" if config.per_class else "none"
    return found.calibrate(held_out, config.alpha, groups=by)


def listed(images: Path) -> Iterator[str]:
    """Paths to score, in an order that stays."""
    if images.is_dir():
        yield from images_below(images)
        return
    try:
        with images.open(encoding="utf-8") as lines:
            yield from (line.rstrip("\n") for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--images {images} is neither a folder nor a text file with one path per line: {error}"
        ) from error


def rows_of(judge: ood.Detector, paths: Sequence[str], pool: ThreadPoolExecutor) -> list[Row]:
    """One row per file; those that cannot be read are flagged and say why."""
    C, (H, W) = len(judge.images.mean or ()), judge.images.size or (0, 0)

    def read(path: str) -> Tensor | str:
        try:
            return read_square(path, (C, H, W))
        except Exception as error:  # damaged files make Pillow raise nearly anything
            return " ".join(reason(error).split())

    found = list(pool.map(read, paths))
    good = [i for i, image in enumerate(found) if isinstance(image, Tensor)]
    rows: list[Row] = [
        dict.fromkeys(FIELDS) | {"path": path, "flag": True, "note": f"cannot be read: {said}"}
        for path, said in zip(paths, ("" if isinstance(x, Tensor) else x for x in found))
    ]
    if good:
        verdict = judge(torch.stack([x for x in found if isinstance(x, Tensor)]))
        for i, s, p, flag, c in zip(good, *(v.tolist() for v in verdict)):
            label = judge.classes[c] if judge.classes and c >= 0 else c
            rows[i] = dict(zip(FIELDS, (paths[i], round(s, 6), round(p, 6), flag, label, "")))
    return rows


def written(rows: Sequence[Row], as_csv: bool) -> str:
    """Lines of the file."""
    if not as_csv:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    lines = io.StringIO()
    csv.DictWriter(lines, FIELDS, lineterminator="\n").writerows(
        {k: int(v) if k == "flag" else v for k, v in row.items()} for row in rows
    )
    return lines.getvalue()


def read_rows(path: Path, as_csv: bool) -> Iterator[Row]:
    """Rows of a finished or broken file."""
    with path.open(encoding="utf-8", newline="") as lines:
        if not as_csv:
            yield from map(json.loads, lines)
            return
        for row in csv.DictReader(lines):
            yield row | {"flag": row["flag"] == "1", "score": float(row["score"] or "nan")}


def resumed(part: Path, as_csv: bool, settings: str) -> tuple[int, str | None]:
    """How many rows are done, and the last path; a line that was torn is cut off.

    Raises:
        InputError: the rows were made with other settings.
    """
    about = part.with_suffix(".settings")
    if not part.exists() or not about.exists():
        about.write_text(settings, encoding="utf-8")
        part.write_text(",".join(FIELDS) + "\n" if as_csv else "", encoding="utf-8")
        return 0, None
    if about.read_text(encoding="utf-8") != settings:
        raise InputError(
            f"{part} was begun with other settings. Repeat that command, name another --out, or "
            "delete it."
        )
    whole = part.read_bytes()
    with part.open("r+b") as file:
        file.truncate(whole.rfind(b"\n") + 1)
    done, last = 0, None
    for row in read_rows(part, as_csv):
        done, last = done + 1, row["path"]
    return done, last


def draw_sheet(config: Score, judge: ood.Detector, as_csv: bool) -> Path | None:
    """The most suspicious images that could be read, on one sheet."""
    import heapq

    rows = (r for r in read_rows(config.out, as_csv) if r["score"] is not None)
    worst = heapq.nlargest(
        config.sheet, rows, key=lambda r: -np.inf if np.isnan(r["score"]) else r["score"]
    )
    worst = [row for row in worst if not np.isnan(row["score"])]
    if not worst:
        return None
    images = []
    for row in worst:
        with open(row["path"], "rb"):
            images.append(read_square(row["path"], (3, 96, 96)))
    captions = [
        f"{Path(r['path']).name[-22:]}\n{r['label']}, p = {float(r['p_value']):.3f}" for r in worst
    ]
    path = config.out.with_suffix(".png")
    title = f"Most suspicious first ({config.scorer})"
    viz.contact_sheet(images, captions, title=title).savefig(path, dpi=110)
    return path


def main(config: Score) -> None:
    """Score every file, then print what was found."""
    check_choice(config.out.suffix, (".csv", ".jsonl"), "ending of --out")
    ood.check_name(config.scorer)
    if config.batch_size < 1 or config.sheet < 0:
        raise InputError(
            f"--batch-size must be ≥ 1 and --sheet ≥ 0, got {config.batch_size}, {config.sheet}."
        )
    as_csv, part = config.out.suffix == ".csv", config.out.with_name(config.out.name + ".part")
    with training.process(config.device) as here:
        if not here.first:
            return
        judge = detector(config, here.device)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(
            {"weights": judge.weights_hash, "scorer": config.scorer, "alpha": config.alpha}
            | {"images": str(config.images), "per_class": config.per_class}
        )
        done, last = resumed(part, as_csv, settings)
        paths = listed(config.images)
        for path in islice(paths, done):
            if path == last:
                last = None
        if last is not None:
            raise InputError(
                f"The files are not those that {part} was begun with: the path {last} has moved. "
                "Delete it to begin anew."
            )
        with (
            ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
            part.open("a", encoding="utf-8", newline="") as file,
        ):
            while batch := list(islice(paths, config.batch_size)):
                file.write(written(rows_of(judge, batch, pool), as_csv))
                file.flush()
    os.replace(part, config.out)
    part.with_suffix(".settings").unlink()
    report(config, judge, as_csv)


def report(config: Score, judge: ood.Detector, as_csv: bool) -> None:
    """Print the numbers, and where things are."""
    total = flagged = broken = 0
    for row in read_rows(config.out, as_csv):
        unreadable = bool(row["note"])
        total, broken = total + 1, broken + unreadable
        flagged += row["flag"] and not unreadable
    if not total:
        raise InputError(f"{config.images} holds no images.")
    assert judge.threshold is not None
    low, high = judge.threshold.band()[0].tolist()
    sheet = draw_sheet(config, judge, as_csv) if config.sheet else None
    print(
        f"{total:,} files: {flagged:,} flagged, {broken:,} cannot be read.\n"
        f"Of images like those of the training {100 * config.alpha:g} % are flagged by mistake "
        f"(this calibration: {100 * low:.1f} to {100 * high:.1f} %, nine times in ten)."
    )
    print(f"rows:  {config.out}" + (f"\nsheet: {sheet}" if sheet else ""))
