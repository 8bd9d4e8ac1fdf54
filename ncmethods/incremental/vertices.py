"""Vertices: which vertex of a fixed frame each class gets, as classes arrive."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_choice
from ncmethods.frames import assign, nearest_etf, simplex_etf

__all__ = ["Policy", "Vertices", "evolve"]

Policy = Literal["fixed", "hungarian", "expand"]


class Vertices:
    """Rows for classes in their order of arrival, out of a frame with room for later ones.

    A row that was given stays as it is, but for ``"expand"``. How a class gets its row:

    - ``"fixed"``: the next vertex, whatever the class looks like;
    - ``"hungarian"``: new classes share out the free vertices so that the cosines with their
      means have the largest sum;
    - ``"expand"``: there is no spare vertex. With each session the frame becomes the simplex ETF
      of as many vertices as there are classes that lies nearest to the old rows and the new means.
      All rows move a little.

    Args:
        capacity: vertices of the frame; with ``"expand"`` only its start.
        dim: D ≥ capacity − 1.
        policy: one of the three.
        generator: CPU generator of the rotation.

    References:
        fixed: Yang et al., ICLR 2023, arXiv:2302.03004. hungarian: Ahmed et al., CVPR 2024 (OrCo;
        there the targets are not an ETF). expand: in the spirit of arXiv:2505.24254 (ProNC), whose
        steps it does not claim to be.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        policy: Policy = "fixed",
        generator: torch.Generator | None = None,
    ) -> None:
        check_choice(policy, ("fixed", "hungarian", "expand"), "policy")
        self.policy = policy
        self.frame = simplex_etf(capacity, dim, generator=generator)  # [C, D]
        self.rows = self.frame.new_empty(0, dim)  # [seen, D]
        self._free = torch.arange(capacity)

    @property
    def seen(self) -> int:
        """Number of classes that have a row."""
        return len(self.rows)

    def add(self, number: int, means: Tensor | None = None) -> Tensor:
        """Rows of all classes [seen, D] once ``number`` more have arrived.

        Args:
            number: of new classes.
            means: of their features [number, D] under the model as it is, centred by you if the
                frame is; not used by ``"fixed"``.

        Raises:
            InputError: no vertex is free, or means that are missing or of another shape.
        """
        D = self.frame.shape[1]
        if self.policy != "fixed" and self.seen and means is None:
            raise InputError(f"policy={self.policy!r} places classes by their means: pass means.")
        if means is not None and tuple(means.shape) != (number, D):
            raise InputError(f"means must be [{number}, {D}], got {tuple(means.shape)}.")
        if self.policy == "expand" and self.seen:
            return self._expand(F.normalize(means, dim=1).to(self.rows))  # type: ignore[arg-type]
        if number > len(self._free):
            raise InputError(
                f"{number} classes arrive and {len(self._free)} of {len(self.frame)} vertices are "
                "free. Build the frame with a larger capacity, or take policy='expand'."
            )
        if self.policy == "hungarian" and means is not None:
            order = assign(self.frame[self._free], means)
        else:
            order = torch.arange(number)
        chosen = self._free[order]
        self._free = self._free[~torch.isin(self._free, chosen)]
        self.rows = torch.cat([self.rows, self.frame[chosen]])
        return self.rows

    def _expand(self, means: Tensor) -> Tensor:
        target = torch.cat([self.rows, means])
        if target.shape[1] < len(target) - 1:
            raise InputError(
                f"{len(target)} classes need dim ≥ {len(target) - 1}, got {target.shape[1]}."
            )
        self.rows = nearest_etf(target).to(self.rows)
        return self.rows

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {"frame": self.frame, "rows": self.rows, "free": self._free}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.frame, self.rows, self._free = state["frame"], state["rows"], state["free"]


def evolve(means: Tensor, rows: Tensor, t: float) -> Tensor:
    """Targets on the way from class means to vertices: unit((1 − t)·unit(means) + t·rows), [n, D].

    Args:
        means: of new classes under the old model [n, D].
        rows: their vertices [n, D], unit.
        t: from 0 (the means) to 1 (the vertices), as training goes on.

    Raises:
        InputError: a t out of [0, 1], or shapes that differ.

    References:
        Yang et al., arXiv:2308.01746 (neural collapse terminus, prototype evolution).
    """
    if not 0 <= t <= 1:
        raise InputError(f"t runs from 0 to 1, got {t}.")
    if means.shape != rows.shape:
        raise InputError(f"means {tuple(means.shape)} and rows {tuple(rows.shape)} must agree.")
    return F.normalize((1 - t) * F.normalize(means, dim=1) + t * rows, dim=1)
