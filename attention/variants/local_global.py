"""Layers with a window and layers without one, in turns (Gemma 2, arXiv 2408.00118, section 2; ModernBERT)."""

from __future__ import annotations

from attention.options import LocalGlobalOptions
from attention.tiled import Tiled
from attention.variant import Site
from attention.variants.blockwise import Everything
from attention.variants.sliding_window import Window


def make(options: LocalGlobalOptions, site: Site) -> Tiled:
    """For self-attention; the site's layer decides."""
    is_global = (site.layer + 1) % options.global_every == 0
    return Tiled(Everything() if is_global else Window(options.reach))
