"""The online network, which is trained, and the target network, its moving average (BYOL, arXiv 2006.07733).

Shape letters: V views (the L large ones first), B images, F encoder features, D outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from relicctl.models.layers import run_checkpointed


class Siamese(nn.Module):
    """``online``: encoder, projector, predictor if there is one. ``target``: encoder and projector, or None.

    The target starts as a copy of the online network and is never trained: ``update_target`` moves it.
    In train mode both run BatchNorm on the batch, each with separate running statistics.
    BatchNorm's batch is all views of one size in the encoders and all views in the heads (our choice), or with
    ``per_view`` each view by itself in both, as in ReLICv2's published pseudo-code.

    With ``microbatch`` so many images pass at a time and only their outputs are saved; the backward pass computes each
    microbatch again. The loss still sees the whole batch and its gradient is exact, but BatchNorm's statistics are
    those of each microbatch. (GradCache, Gao et al., arXiv 2101.06983, caches gradients to the same end.)
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module | None, target: bool) -> None:
        super().__init__()
        self.microbatch: int | None = None
        self.per_view = False
        self.online = nn.ModuleDict({"encoder": encoder, "projector": projector})
        self.target = copy.deepcopy(self.online).requires_grad_(False) if target else None
        if predictor is not None:
            self.online["predictor"] = predictor
        self._compiled: dict[str, Callable[[Tensor], Tensor]] = {}

    def compile_encoders(self) -> None:
        """Compile the encoders' forward pass in training, one graph per size of view; evaluation stays uncompiled."""
        for name, network in (("online", self.online), ("target", self.target)):
            if network is not None:
                self._compiled[name] = torch.compile(network["encoder"].forward, dynamic=False)

    def _encode(self, name: str, views: Tensor) -> Tensor:
        encode: Callable[[Tensor], Tensor] = self._compiled.get(name, getattr(self, name)["encoder"])
        return encode(views)

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Online: ``views``, one [V_i, B, 3, s_i, s_i] per size -> features [V, B, F], outputs [V, B, D].

        V is the sum of the V_i. One encoder forward per BatchNorm batch; the views' memory format is preserved.
        """
        parts = self._split_microbatches(views)
        if len(parts) == 1:
            return self._forward_online_part(*views)
        results = [run_checkpointed(self._forward_online_part, self.online, *part) for part in parts]
        features, outputs = zip(*results, strict=True)
        return torch.cat(features, 1), torch.cat(outputs, 1)

    def _forward_online_part(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        features = [self._encode("online", batch) for batch in self._list_norm_batches(*views)]
        outputs = [self._project_online(batch) for batch in (features if self.per_view else [torch.cat(features)])]
        images = views[0].shape[1]
        return torch.cat(features).unflatten(0, (-1, images)), torch.cat(outputs).unflatten(0, (-1, images))

    def _project_online(self, features: Tensor) -> Tensor:
        outputs: Tensor = self.online["projector"](features)
        return self.online["predictor"](outputs) if "predictor" in self.online else outputs

    def _list_norm_batches(self, *views: Tensor) -> list[Tensor]:
        """Return the images [N, 3, s, s] that each BatchNorm batch of the encoder consists of."""
        if self.per_view:
            return [view for size in views for view in size]
        return [size.flatten(0, 1) for size in views]

    @torch.no_grad()
    def forward_target(self, large: Tensor) -> Tensor:
        """Large views [L, B, 3, s, s] -> projections [L, B, D], without gradient."""
        assert self.target is not None, "this objective has no target network"
        projections = []
        for (part,) in self._split_microbatches([large]):
            projected = [self.target["projector"](self._encode("target", b)) for b in self._list_norm_batches(part)]
            projections.append(torch.cat(projected).unflatten(0, (len(large), -1)))
        return torch.cat(projections, 1)

    def _split_microbatches(self, views: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Split the views along their images."""
        images = self.microbatch or views[0].shape[1]
        return list(zip(*(view.split(images, 1) for view in views), strict=True))

    @torch.no_grad()
    def update_target(self, gamma: float) -> None:
        """Set target <- gamma target + (1 - gamma) online, for all parameters, after the optimiser's step."""
        assert self.target is not None, "this objective has no target network"
        online: list[Tensor] = [*self.online["encoder"].parameters(), *self.online["projector"].parameters()]
        target: list[Tensor] = list(self.target.parameters())
        torch._foreach_lerp_(target, online, 1.0 - gamma)


class MLPHead(nn.Sequential):
    """[N, in_dim] -> [N, out]: Linear with bias, BatchNorm, ReLU, Linear without bias.

    BatchNorm eps 1e-5, momentum 0.1. PyTorch's default initialisation (our choice).
    """

    def __init__(self, in_dim: int, hidden: int, out: int) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out, bias=False)
        )
