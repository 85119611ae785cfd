"""relicctl: ReLICv2 self-supervised pretraining. ``load_encoder`` is imported on first use, to keep the CLI light."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relicctl.version import __version__

__all__ = ["__version__", "load_encoder"]

if TYPE_CHECKING:
    from relicctl.encoders.file import load_encoder


def __getattr__(name: str) -> Any:
    if name == "load_encoder":
        from relicctl.encoders.file import load_encoder

        return load_encoder
    raise AttributeError(f"module 'relicctl' has no attribute {name!r}")
