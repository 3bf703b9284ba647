"""run.overlap_teacher: batches and teachers' answers that another CUDA stream made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deit_kd.data import Batch
from deit_kd.models import AnyTeacher, TeacherOutput


def keep_for_this_stream(batches: Sequence[Batch], taught: Sequence[Mapping[AnyTeacher, TeacherOutput]]) -> None:
    """Keeps the memory of tensors of another stream until this one has done with them."""
    made = [[each.images, each.targets, each.labels, each.indices, each.cached_teacher] for each in batches]
    for tensor in tree_leaves([made, [list(each.values()) for each in taught]]):
        if isinstance(tensor, Tensor):
            tensor.record_stream(torch.cuda.current_stream())
