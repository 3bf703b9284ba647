"""Projectors: from the student's width D to the teacher's width E. They are trained with the student and left out of its export."""

from __future__ import annotations

from torch import Tensor, linalg, nn
from torch.nn import functional as F

from deit_kd.errors import UserError
from deit_kd.recipe import Projector
from deit_kd.recipe.objectives import PROJECTORS


class Orthonormal(nn.Module):
    """x [B,D] -> x Q^T [B,E] with orthonormal columns of Q [E,D] (rows, where E < D), as VkD has it (Miles et al., CVPR 2024).

    Q = A L^-T, with A the free weight and L the Cholesky factor of A^T A: for D = 192, E = 3024 this is small beside the student's
    step, where torch's own parametrisation holds an E x E buffer. Q does not depend on the scale of A. The Gram matrix squares
    A's condition number, so that float64 keeps Q orthonormal to float32's precision however far A has moved.
    """

    def __init__(self, student_width: int, teacher_width: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(nn.Linear(student_width, teacher_width, bias=False).weight.detach()))

    def matrix(self) -> Tensor:
        """Q [E,D], in the weight's precision."""
        wide = self.weight.shape[0] < self.weight.shape[1]
        tall = (self.weight.t() if wide else self.weight).double()
        factor, failed = linalg.cholesky_ex(tall.t() @ tall)  # cholesky itself makes the host wait for its error
        factor = factor.masked_fill(failed.bool(), float("nan"))  # a loss that is not finite, which skips the step and is reported
        q = linalg.solve_triangular(factor, tall.t(), upper=False)
        return (q if wide else q.t()).to(self.weight.dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B,D] -> [B,E], of the same length."""
        return F.linear(features, self.matrix())


def build_projector(config: Projector, student_width: int, teacher_width: int) -> nn.Module:
    """A projector of vectors, features [B,D] -> [B,E]."""
    if config.kind == "orthonormal":
        return Orthonormal(student_width, teacher_width)
    if config.kind == "bn_dropout_linear":  # ND's adapter, with its initialization
        assert config.dropout is not None
        linear = nn.Linear(student_width, teacher_width)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.normal_(linear.bias, std=0.01)
        return nn.Sequential(nn.BatchNorm1d(student_width), nn.Dropout(config.dropout), linear)
    if config.kind == "linear":
        assert config.depth is not None
        assert config.width is not None
        between = teacher_width if config.width == "teacher" else config.width
        widths = [student_width, *[between] * (config.depth - 1), teacher_width]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            if layers:
                layers += [nn.BatchNorm1d(inputs), nn.ReLU(inplace=True)]
            layers.append(nn.Linear(inputs, outputs, bias=bool(config.bias)))
        return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    if function := PROJECTORS[config.kind].function:
        module = function(student_width, teacher_width, **config.parameters)
        if not isinstance(module, nn.Module):
            raise UserError(
                f"projector.kind: {config.kind} must return a module, got {type(module).__name__}; mend it in your file"
            )
        return module
    assert config.kind == "none", config.kind
    return nn.Identity()


def first_matrix(projector: nn.Module) -> Tensor | None:
    """The projector's first matrix [width, D]; its spectrum shows a collapse."""
    if isinstance(projector, Orthonormal):
        return projector.matrix()
    return next((layer.weight for layer in projector.modules() if isinstance(layer, nn.Linear)), None)
