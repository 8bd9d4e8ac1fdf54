"""Images and labels as tensors: datasets, long-tail profiles, a device-resident loader."""

from ncmethods.data import glyphs
from ncmethods.data.datasets import ImageData, Splits, available, fetch, hold_out, load, names
from ncmethods.data.loader import Batch, DeviceLoader, channel_stats
from ncmethods.data.longtail import (
    CONFUSABLE_ORDER,
    TailConfig,
    class_counts,
    default_order,
    leave_out,
    long_tail_counts,
    long_tail_indices,
    long_tailed,
    reorder,
)
from ncmethods.data.outliers import outliers
from ncmethods.data.protocols import PROTOCOLS, Protocol, protocol
from ncmethods.data.samplers import BoundBatches, ClassSampler, Sampling, class_shares

__all__ = [
    "CONFUSABLE_ORDER",
    "PROTOCOLS",
    "Batch",
    "BoundBatches",
    "ClassSampler",
    "DeviceLoader",
    "ImageData",
    "Protocol",
    "Sampling",
    "Splits",
    "TailConfig",
    "available",
    "channel_stats",
    "class_counts",
    "class_shares",
    "default_order",
    "fetch",
    "glyphs",
    "hold_out",
    "leave_out",
    "load",
    "long_tail_counts",
    "long_tail_indices",
    "long_tailed",
    "names",
    "outliers",
    "protocol",
    "reorder",
]
