"""The loader of the library beside the input pipelines that CIFAR code uses today.

    python tests/benchmarks/bench_loader.py [--repeats 5] [--images 10000] [--batch 128]

The same random images in CIFAR's format (uint8, 32 × 32 × 3) with crop (padding 4), flip and
normalisation, an epoch in shuffled batches:

- ``DeviceLoader``: images stay on the device as uint8, batches are made there;
- ``PIL, 0 workers`` and ``PIL, 2 workers``: torchvision's ``RandomCrop``, ``RandomHorizontalFlip``,
  ``ToTensor``, ``Normalize`` on PIL images behind a ``DataLoader``, as in LDAM-DRW's code;
- ``v2 per image``: ``transforms.v2`` on tensors in the dataset, 0 workers;
- ``v2 per batch``: ``transforms.v2`` once on each batch of tensors. It draws one crop and one flip
  for the whole batch, so it is another augmentation: a bound and not a rival.

"input" is the pipeline alone, "step" the whole training step (forward, backward, SGD) of the
library's small_cnn on each batch, in the loop's memory format (channels last). Repeats of all
pipelines are interleaved and the minimum of each is kept, so that a busy machine slows all alike.
Target: input of PIL ≥ 5 × that of DeviceLoader. Workers are started before the clock
(``persistent_workers``); with them PIL uses more cores than the others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ncmethods.data import DeviceLoader, ImageData
from ncmethods.models import small_cnn

MEAN, STD, K = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 10
Epoch = Callable[[], Iterator[tuple[Tensor, Tensor]]]


class Images(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10: an array of images, transformed one by one."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable, pil: bool) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy() if pil else images
        self.labels, self.transform, self.pil = labels.tolist(), transform, pil

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = self.images[index]
        return self.transform(Image.fromarray(image) if self.pil else image), self.labels[index]


def pipelines(images: Tensor, labels: Tensor, batch: int) -> dict[str, Epoch]:
    """Name → a function that yields one epoch."""
    from torchvision import transforms as v1
    from torchvision.transforms import v2

    pil = v1.Compose(
        [
            v1.RandomCrop(32, padding=4),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )
    tensors = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    data = ImageData(images, labels, tuple(map(str, range(K))))
    ours = DeviceLoader(data, batch, mean=MEAN, std=STD, crop=4, flip=True)
    number = iter(range(10**9))

    def device() -> Iterator[tuple[Tensor, Tensor]]:
        for one in ours.epoch(next(number)):
            yield one.x, one.y

    def whole_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(labels)).split(batch):
            yield tensors(images[chosen]), labels[chosen]

    def loader(transform: Callable, workers: int, is_pil: bool) -> Epoch:
        made = DataLoader(
            Images(images, labels, transform, is_pil),
            batch,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        return lambda: iter(made)

    return {
        "DeviceLoader": device,
        "PIL, 0 workers": loader(pil, 0, True),
        "PIL, 2 workers": loader(pil, 2, True),
        "v2 per image": loader(tensors, 0, False),
        "v2 per batch": whole_batches,
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y).backward()
    optimizer.step()


def seconds(epoch: Epoch, each: Callable[[Tensor, Tensor], object]) -> float:
    start = time.perf_counter()
    for x, y in epoch():
        each(x, y)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of this process, without workers")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(K, (args.images,))
    table = pipelines(images, labels, args.batch)
    backbone = small_cnn(3)
    model = nn.Sequential(backbone, nn.Linear(64, K))
    nn.Module.to(model, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def nothing(x: Tensor, y: Tensor) -> None:
        pass

    def train(x: Tensor, y: Tensor) -> None:
        step(model, optimizer, x, y)

    x, y = torch.randn(args.batch, 3, 32, 32), torch.randint(K, (args.batch,))
    steps = -(-args.images // args.batch)

    def bare() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            yield x, y

    for epoch in table.values():  # starts the workers
        seconds(epoch, nothing)
    names = [(name, epoch, each) for each in (nothing, train) for name, epoch in table.items()]
    trials = [*names, ("the same batch again", bare, train)]
    best = [float("inf")] * len(trials)
    for _ in range(args.repeats):
        for i, (_, epoch, each) in enumerate(trials):
            best[i] = min(best[i], seconds(epoch, each))
    print(f"torch {torch.__version__}, {args.threads} thread(s), {args.images} images, ", end="")
    print(f"batch {args.batch}, minimum of {args.repeats} interleaved repeats\n")
    print("| pipeline | input, images/s | × DeviceLoader's time | step, images/s | × |")
    print("|---|---|---|---|---|")
    inputs, whole = best[: len(table)], best[len(table) :]
    for name, alone, with_net in zip([*table, trials[-1][0]], [*inputs, None], whole, strict=True):
        cells = ["–", "–"]
        if alone is not None:
            cells = [f"{args.images / alone:,.0f}", f"{alone / inputs[0]:.2f}"]
        cells += [f"{args.images / with_net:,.0f}", f"{with_net / whole[0]:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
