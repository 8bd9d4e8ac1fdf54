"""The ``ncmethods`` command: recipes and the small jobs around them."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
import tyro

import ncmethods
from ncmethods._core import InputError, NCError, atomic_path, check_choice

__all__ = ["main"]


def recipes_dir() -> Path:
    """Where the recipes are: in the wheel inside the package, in a checkout beside it."""
    package = Path(ncmethods.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def load_recipe(name: str) -> ModuleType:
    """The module of a recipe, by file name without its ending.

    Raises:
        InputError: no such recipe.
    """
    check_choice(name, sorted(p.stem for p in recipes_dir().glob("[a-z]*.py")), "recipe")
    full = f"ncmethods.recipes.{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, recipes_dir() / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


@dataclass(frozen=True)
class Extract:
    """Write features, labels and logits of a dataset as one safetensors file."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """RUN_DIR, small_cnn, resnet32, torchvision:NAME, timm:NAME or package.module:factory."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A dataset that `ncmethods list` prints. With the run's own dataset, its long tail."""
    out: Path
    """File to write."""
    split: Literal["train", "test"] = "train"
    """Which part of the dataset."""
    weights: str | None = None
    """For named models: a torchvision weights name, or a state_dict file."""
    root: Path | None = None
    """Where the dataset's files are, if not in the usual places."""
    size: int | None = None
    """Resize images; None takes the run's size, or 224 for torchvision and timm."""
    batch_size: int = 256
    """Images per step."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


def extract(args: Extract) -> None:
    """Run ``ncmethods extract``."""
    from ncmethods import data, features, heads, models, training

    hub = args.model.startswith(("torchvision:", "timm:"))
    mean, std, bare = None, None, args.model in models.BACKBONES
    if not bare and (":" not in args.model or (Path(args.model) / "config.json").exists()):
        if args.weights is not None:
            raise InputError("A run has its own weights: leave --weights out.")
        run = training.load_run(args.model)
        about = run.config["data"]
        mean, std, size = about["mean"], about["std"], args.size or about["image_shape"][-1]
        if about.get("name") == args.data:
            fields = {
                f.name: about[f.name] for f in dataclass_fields(data.TailConfig) if f.name in about
            }
            splits = data.TailConfig(**fields | {"root": args.root, "size": size}).load()
        else:
            splits = data.load(args.data, args.root, size=size)
        model: torch.nn.Module = run.model
        channels = about["image_shape"][0]
    else:
        splits = data.load(args.data, args.root, size=args.size or (224 if hub else None))
        channels = 3 if hub else splits.train.images.shape[1]
        model = models.build(args.model, in_channels=channels, weights=args.weights)
        if bare:  # no head: the rows below are not used, and no logits are written
            rows = torch.nn.Linear(model.num_features, 2)  # type: ignore[arg-type]
            model = heads.Classifier(model, rows)
        if hub:  # the statistics that both zoos train with
            mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    part: data.ImageData = getattr(splits, args.split)
    if part.images.shape[1] == 1 and channels == 3:
        part = data.ImageData(part.images.expand(-1, 3, -1, -1), part.labels, part.classes)
    if part.images.shape[1] != channels:
        raise InputError(
            f"{args.model} takes {channels} channels, {args.data} has {part.images.shape[1]}."
        )
    with training.process(args.device) as here, atomic_path(args.out) as temporary:
        loader = data.DeviceLoader(
            part, args.batch_size, train=False, mean=mean, std=std, device=here.device
        )
        found = features.extract(model.to(here.device), loader)
        if bare or found.num_classes != part.num_classes:  # logits of another label set
            found = features.FeatureSet(found.features, found.labels, part.num_classes)
        found.save(temporary)
    N, D = found.features.shape
    logits = "" if found.logits is None else f", logits [{N}, {found.num_classes}]"
    print(f"{args.out}: features [{N}, {D}], labels of {found.num_classes} classes{logits}")


@dataclass(frozen=True)
class Fetch:
    """Download a dataset into the cache and check it."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """fashion-mnist, cifar10 or cifar100."""
    root: Path | None = None
    """Where to put it, if not in the cache."""


def fetch(args: Fetch) -> None:
    """Run ``ncmethods fetch``."""
    from ncmethods import data

    print(f"{args.name}: {data.fetch(args.name, args.root)}")


@dataclass(frozen=True)
class List:
    """Print the datasets, heads, losses and recipes that other commands take by name."""


def list_names(_: List) -> None:
    """Run ``ncmethods list``."""
    from ncmethods import data, losses
    from ncmethods.training.config import HEADS

    how = {n: "" if data.available(n) else " (ncmethods fetch)" for n in data.names()}
    how["image-folder"] = " (yours, by its root)"
    print(
        "recipes: ",
        ", ".join(p.stem.replace("_", "-") for p in sorted(recipes_dir().glob("[a-z]*.py"))),
    )
    print("datasets:", ", ".join(name + needs for name, needs in how.items()))
    print("heads:   ", ", ".join(HEADS))
    print("losses:  ", ", ".join(n for n in losses.__all__ if n.islower()))
    print("long-tailed methods:", ", ".join(load_recipe("long_tailed").METHODS))


@dataclass(frozen=True)
class Report:
    """Draw report.html of a finished run again."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory OUT/<method>/seed<k>."""


def report(args: Report) -> None:
    """Run ``ncmethods report``."""
    from ncmethods import tracking, viz
    from ncmethods.training.runs import read_json

    read_json(args.run / "config.json")  # or say that this is no run
    print(viz.run_page(args.run, tracking.read_rows(args.run / "metrics.jsonl")))


@dataclass(frozen=True)
class Copy:
    """Copy a recipe's file, to read it and make it yours."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """As `ncmethods list` prints it."""
    to: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="[DIR]")] = Path(".")
    """Directory; a file that is there already is not overwritten."""


def copy(args: Copy) -> None:
    """Run ``ncmethods copy``."""
    name = args.recipe.replace("-", "_")
    check_choice(name, sorted(p.stem for p in recipes_dir().glob("[a-z]*.py")), "recipe")
    target = args.to / f"{name}.py"
    if target.exists():
        raise InputError(f"{target} exists already. Name another directory.")
    args.to.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipes_dir() / f"{name}.py", target)
    print(target)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run one command."""
    sys.path.append(str(Path.cwd()))  # where a user keeps package.module:factory
    long_tailed = load_recipe("long_tailed")
    commands: dict[str, tuple[type, Callable[[Any], None]]] = {
        "long-tailed": (long_tailed.LongTailed, long_tailed.main),
        "extract": (Extract, extract),
        "fetch": (Fetch, fetch),
        "report": (Report, report),
        "list": (List, list_names),
        "copy": (Copy, copy),
    }
    union: Any = None
    for name, (config, _) in commands.items():
        one: Any = Annotated[config, tyro.conf.subcommand(name, prefix_name=False)]
        union = one if union is None else union | one
    chosen = tyro.cli(
        union,
        prog="ncmethods",
        description="Collapse-aware training methods for PyTorch.",
        args=argv,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    run = next(run for config, run in commands.values() if type(chosen) is config)
    try:
        run(chosen)
    except (NCError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        again = "a recipe that is started again goes on from its last checkpoint"
        print(f"interrupted: {again}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
