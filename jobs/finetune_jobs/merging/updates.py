"""What an adapter does to one tensor of the model: how its rows become the merged ones, and what a merged layer gives.

The two are written apart, so that one checks the other. Tensors of one dimension count as columns of one number a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraUpdate:
    """``W' = W + scale * b @ a`` (arXiv:2106.09685), W as the file has it; a and b in float32.

    With a ``magnitude`` each row of that is brought to the length that was learned for it: DoRA, arXiv:2402.09353.
    """

    a: Tensor
    """(r, columns of W)"""
    b: Tensor
    """(rows of W, r)"""
    scale: float
    magnitude: Tensor | None = None
    """(rows of W,)"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def unchanged(self) -> bool:
        """Nothing was learned: b or a is exactly zero. With magnitudes that cannot be told."""
        return self.magnitude is None and not (bool(self.b.any()) and bool(self.a.any()))

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """The merged rows ``start`` to ``stop``, in float32, of those of the base."""
        moved: Tensor = torch.addmm(base.float(), self.b[start:stop], self.a, alpha=self.scale)
        if self.magnitude is None:
            return moved
        lengths: Tensor = torch.linalg.vector_norm(moved, dim=1)
        return moved * (self.magnitude[start:stop] / lengths)[:, None]

    def outputs(self, base: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
        """What these rows of the layer must give for inputs ``x`` (columns, n): base and adapter side by side."""
        given = torch.addmm(base.float() @ x, self.b[start:stop], self.a @ x * self.scale)
        if self.magnitude is None:
            return given
        b = self.b[start:stop]
        # |w + s b A|^2, multiplied out.
        square = base.float().square().sum(1) + 2 * self.scale * ((base.float() @ self.a.T) * b).sum(1)
        square += self.scale**2 * ((b @ (self.a @ self.a.T)) * b).sum(1)
        return given * (self.magnitude[start:stop] / square.sqrt())[:, None]


@dataclass(frozen=True)
class Whole:
    """A tensor that was trained whole takes the base's place."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of both."""
        return tuple(self.tensor.shape)

    @property
    def unchanged(self) -> bool:
        """That cannot be told."""
        return False

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """The trained rows."""
        return self.tensor[start:stop].float()

    def outputs(self, base: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
        """Of the trained rows alone."""
        trained = self.tensor[start:stop].float()
        return trained.reshape(stop - start, -1) @ x


@dataclass(frozen=True)
class Scaling:
    """Rows or columns are multiplied by learned factors: IA3, arXiv:2205.05638."""

    factors: Tensor
    """(rows, 1) or (1, columns); (rows,) of a bias."""
    optional: bool = False
    """The model may do without the tensor: a layer's bias."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the factors; 1 stands for any size."""
        return tuple(self.factors.shape)

    @property
    def unchanged(self) -> bool:
        """All factors are 1."""
        return bool((self.factors == 1).all())

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """The scaled rows, in float32."""
        return base.float() * (self.factors if self.shape[0] == 1 else self.factors[start:stop])

    def outputs(self, base: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
        """What the rows give for inputs that are scaled before, or scaled after."""
        flat = base.float().reshape(stop - start, -1)
        if self.shape[0] == 1 and base.dim() > 1:
            return flat @ (x * self.factors.T)
        return (flat @ x) * self.factors[start:stop].reshape(-1, 1)


Update = LoraUpdate | Whole | Scaling


def fits(update: Update, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of that shape can be changed so."""
    if not isinstance(update, Scaling):
        return update.shape == shape
    return len(update.shape) == len(shape) and all(a in (1, b) for a, b in zip(update.shape, shape, strict=True))
