"""The other objectives, for comparison under equal conditions. Each returns ``{"loss": scalar}``.

Shape letters: V views, the L large ones first; N images here, M images in all processes; D embedding size.
Like ReLICv2's loss, all compute in float32 or better under any autocast. ReLIC is that loss, with two large
views and all negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from relicctl.core.distributed import DistributedGather
from relicctl.core.loss import MAX_LOGITS, l2_normalize


def byol_loss(online: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return 2 - 2 cos(online view v, target view l), the mean over images and pairs v != l.

    BYOL, arXiv 2006.07733, eq. 2; it sums its two pairs, the mean is our choice for any number of views.
    ``online`` [V, N, D], large views first; ``target`` [L, N, D], detached here. ValueError for one view.
    """
    views, images, _ = online.shape
    large = len(target)
    if views < 2:
        raise ValueError("byol needs at least two views")
    with torch.autocast(online.device.type, enabled=False):
        cosines = torch.einsum("vnd,lnd->vln", l2_normalize(online), l2_normalize(target.detach()))
        different = cosines.sum() - cosines.diagonal().sum()
        return {"loss": 2 - 2 * different / ((views - 1) * large * images)}


def simclr_loss(online: Tensor, *, temperature: float, gather: DistributedGather | None = None) -> dict[str, Tensor]:
    """Return NT-Xent (SimCLR, arXiv 2002.05709, eq. 1), the mean over images and ordered pairs of different views.

    ``online`` [V, N, D]. A positive is set against all views of all other images of the global batch. Beyond
    two views, further views of the same image are no negatives: our choice.
    ``gather`` as in ``relicv2_loss``. ValueError for fewer than two views.
    """
    views, images, _ = online.shape
    if views < 2:
        raise ValueError("simclr needs at least two views")
    with torch.autocast(online.device.type, enabled=False):
        z_VND = l2_normalize(online)
        z_VMD = gather.gather_online(z_VND) if gather else z_VND
        first, total = gather.get_offset_and_total(images) if gather else (0, images)
        self_rows = torch.arange(first, first + images, device=online.device)
        is_self = self_rows[:, None] == torch.arange(total, device=online.device)

        def compute_terms(v: int) -> Tensor:
            logits = torch.einsum("nd,vmd->vnm", z_VND[v], z_VMD) / temperature
            negatives = logits.masked_fill(is_self, -torch.inf).logsumexp((0, 2))
            positives = logits.diagonal(offset=first, dim1=1, dim2=2)  # [V, N]
            terms_VN = F.softplus(negatives - positives)  # = -log(e^positive / (e^positive + e^negatives))
            return terms_VN.sum() - terms_VN[v].sum()

        if views * views * images * total > MAX_LOGITS:
            sums = [checkpoint(compute_terms, v, use_reentrant=False, preserve_rng_state=False) for v in range(views)]
        else:
            sums = [compute_terms(v) for v in range(views)]
        return {"loss": torch.stack(sums).sum() / (views * (views - 1) * images)}


def supervised_loss(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the cross-entropy of class logits [V, N, classes] and labels int64 [N], the mean over views and images."""
    views = len(logits)
    with torch.autocast(logits.device.type, enabled=False):
        flat = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        return {"loss": F.cross_entropy(flat, labels.repeat(views))}
